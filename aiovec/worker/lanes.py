"""Lanes: where turns are driven when the envs of a worker do not all take turns in one thread.

Each env has one lane for its life, and each lane keeps the order of what it is given; so each env has its requests in
order, always in the same thread. What a request asks is answered when the last of its turns has ended, in whichever
lane that is.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from aiovec.worker.clock import StepClock
from aiovec.worker.turns import Doing, Turn, drive

__all__ = ["InlineLane", "Lane", "Lanes", "ThreadLane"]


class Lane(Protocol):
    """Drives turns, in order for each row."""

    def put(self, row: int, turn: Turn[Any], ended: Callable[[], None], may_be_cancelled: bool) -> None:
        """Takes a turn.

        Args:
            row: Whose.
            turn: What to drive.
            ended: Called when it has ended.
            may_be_cancelled: Whether a reset, which comes meanwhile, may end it.
        """


class InlineLane:
    """Drives a turn as soon as it comes, in the caller's thread.

    Args:
        doing: Tells which env is called.
        clock: Takes how long envs took.
    """

    def __init__(self, doing: Doing, clock: StepClock) -> None:
        self._doing = doing
        self._clock = clock

    def put(self, row: int, turn: Turn[Any], ended: Callable[[], None], may_be_cancelled: bool) -> None:  # noqa: ARG002
        drive(turn, row, self._doing, self._clock)
        ended()


class ThreadLane:
    """Drives turns in the thread that runs it.

    Args:
        doing: Tells which env is called.
        clock: Takes how long envs took.
    """

    def __init__(self, doing: Doing, clock: StepClock) -> None:
        self._doing = doing
        self._clock = clock
        self._turns: queue.SimpleQueue[tuple[int, Turn[Any], Callable[[], None]] | None] = queue.SimpleQueue()

    def put(self, row: int, turn: Turn[Any], ended: Callable[[], None], may_be_cancelled: bool) -> None:  # noqa: ARG002
        self._turns.put((row, turn, ended))

    def run(self) -> None:
        """Drives what comes, until it is stopped."""
        while (item := self._turns.get()) is not None:
            row, turn, ended = item
            drive(turn, row, self._doing, self._clock)
            ended()

    def start(self) -> None:
        """Runs it in a thread of its own."""
        threading.Thread(target=self.run, name="aiovec-envs", daemon=True).start()

    def stop(self) -> None:
        """Ends `run`, behind what was put before."""
        self._turns.put(None)


class Lanes:
    """The lanes of a worker.

    Args:
        lanes: The rows are dealt out to these in turn.
        by_row: Rows that have another lane.
    """

    def __init__(self, lanes: list[Lane], by_row: Mapping[int, Lane]) -> None:
        self._lanes = lanes
        self._by_row = by_row

    def do(self, turns: Sequence[tuple[int, Turn[Any]]], ended: Callable[[], None], may_be_cancelled: bool) -> None:
        """Gives each turn to its lane; `ended` is called once, by whoever ends last."""
        if not turns:
            ended()
            return
        if len(turns) > 1:
            ended = _CountDown(len(turns), ended)
            # Those with a lane of their own first: the others may be driven on the spot.
            turns = sorted(turns, key=lambda item: item[0] not in self._by_row)
        for row, turn in turns:
            lane = self._by_row.get(row) or self._lanes[row % len(self._lanes)]
            lane.put(row, turn, ended, may_be_cancelled)


class _CountDown:
    """Calls a function at the last of so many calls, in whichever thread that is."""

    def __init__(self, count: int, last: Callable[[], None]) -> None:
        self._left = count
        self._last = last
        self._lock = threading.Lock()

    def __call__(self) -> None:
        with self._lock:
            self._left -= 1
            is_last = not self._left
        if is_last:
            self._last()
