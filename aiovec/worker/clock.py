"""How long envs take: written into shared memory, where the parent reads it when it is asked for `statistics()`.

Where envs take turns in one thread, a step is timed as a whole, and every 61st one env by env: two looks at the clock
for each env are 2 % of a CartPole.
"""

from __future__ import annotations

import time
from collections.abc import Callable, MutableSequence, Sequence
from typing import Any

from aiovec.exchange.black_box import TIMES_PER_ROW

__all__ = ["StepClock"]

_TIMED_STEPS = 61  # one of so many: a prime, so that it is not always the turn of the same group of envs


class StepClock:
    """The times of a worker's envs.

    Args:
        times: See `exchange.black_box.OpenBlackBox.times`.
    """

    def __init__(self, times: MutableSequence[float] | memoryview[float]) -> None:
        self._times = times
        self._num_batches = 0

    def batch(self, seconds: float) -> None:
        """All envs took so long for a step, one after the other."""
        self._times[0] += seconds

    def calls(
        self, calls: Sequence[Callable[[Any], Any]], group: range | None = None
    ) -> Sequence[Callable[[Any], Any]]:
        """What a step of all, or of these rows, calls, one an env; timed, if it is this one's turn."""
        self._num_batches += 1
        if group is not None:
            calls = calls[group.start : group.stop]
        if self._num_batches % _TIMED_STEPS != 1:
            return calls
        return [self._timed(row, call) for row, call in enumerate(calls, 0 if group is None else group.start)]

    def _timed(self, row: int, call: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def timed(action: Any) -> Any:
            began = time.perf_counter()
            try:
                return call(action)
            finally:
                self._add(row, time.perf_counter() - began)

        return timed

    def turn(self, row: int, seconds: float) -> None:
        """One env took so long for a step, or a reset."""
        self._add(row, seconds)
        self._times[TIMES_PER_ROW * row + 4] += seconds

    def _add(self, row: int, seconds: float) -> None:
        times, start = self._times, TIMES_PER_ROW * row
        times[start + 1] = seconds
        times[start + 2] += seconds
        times[start + 3] += 1
