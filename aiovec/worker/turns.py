"""A turn: what one request asks of one env, without the waiting.

It is a generator that yields each call of the env, and is sent what that returned, or thrown what it raised. So envs
whose methods return and envs whose methods are awaited share one description (`worker.envs`). Who drives a turn waits,
or awaits (`worker.async_lane`), and writes down which env is called, for the case that it never returns.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, MutableSequence
from typing import Any, NamedTuple, TypeVar

from aiovec.exchange.black_box import IDLE, Phase, doing_code
from aiovec.worker.clock import StepClock

__all__ = ["Doing", "EnvCall", "Outcome", "Pause", "Turn", "drive", "to_throw", "was_raised"]

_Result = TypeVar("_Result")

Doing = MutableSequence[int] | memoryview  # two integers: see `exchange.black_box`


class EnvCall(NamedTuple):
    """A call of an env.

    Attributes:
        phase: What it is asked for.
        function: Calls it.
    """

    phase: Phase
    function: Callable[[], Any]


class Pause:
    """Waits between two attempts, as the call of an env.

    Args:
        seconds: How long.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __call__(self) -> None:
        time.sleep(self.seconds)


Turn = Generator[EnvCall, Any, _Result]


class Outcome:
    """What the turns of one request have given, beside the rows.

    Attributes:
        infos: The infos that are not empty, by row, in the order of their turns.
        entries: What `SAME_STEP` says of the last step of an episode, by env index.
        errors: By row, what was raised.
        known: Of these, the rows whose failure the env's next turn takes account of already: it may begin before the
            reply is made.
    """

    def __init__(
        self,
        infos: list[tuple[int, dict[str, Any]]] | None = None,
        errors: dict[int, BaseException] | None = None,
    ) -> None:
        self.infos: list[tuple[int, dict[str, Any]]] = [] if infos is None else infos
        self.entries: list[tuple[int, dict[str, Any]]] = []
        self.errors: dict[int, BaseException] = {} if errors is None else errors
        self.known: set[int] = set()


class _EnvExit(BaseException):
    """Stands for a `GeneratorExit` of an env, on its way through a turn."""


def to_throw(exception: BaseException) -> BaseException:
    """What to throw into a turn: a generator would take a `GeneratorExit` for its own end, and close the inner ones."""
    if not isinstance(exception, GeneratorExit):
        return exception
    stands_for = _EnvExit()
    stands_for.__cause__ = exception
    return stands_for


def was_raised(exception: BaseException) -> BaseException:
    """What an env raised, given what came out of a turn."""
    if isinstance(exception, _EnvExit) and exception.__cause__ is not None:
        return exception.__cause__
    return exception


def drive(turn: Turn[_Result], row: int, doing: Doing, clock: StepClock) -> _Result:
    """Drives a turn to its end, in this thread; `doing` says so while the env is called."""
    spent = 0.0
    is_step = False
    try:
        phase, function = next(turn)
        while True:
            doing[1] += 1
            doing[0] = doing_code(row, phase)
            began = time.perf_counter()
            try:
                returned = function()
            except BaseException as exception:  # noqa: BLE001  the turn decides
                doing[0] = IDLE
                phase, function = turn.throw(to_throw(exception))
            else:
                doing[0] = IDLE
                spent += time.perf_counter() - began
                is_step = is_step or phase is Phase.STEP
                phase, function = turn.send(returned)
    except StopIteration as stop:
        if is_step:
            clock.turn(row, spent)
        result: _Result = stop.value
        return result
