"""Looks for envs that are stuck, and ends their worker, with its Python stack of that moment.

What counts is one env's own call, inside the worker: else 2 000 envs in a frame would time out, and none is
stuck. Workers write down which env they are in (`exchange.black_box`); here it is looked at from time to time. So
the worker needs no clock, and an env that is found in the same call for the whole limit has really been there that
long, however late the loop itself is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence

from aiovec.errors import EnvTimeoutError
from aiovec.exchange.black_box import Doing, Phase
from aiovec.pool.pending_call import PendingCall
from aiovec.pool.worker import Worker

__all__ = ["Sightings", "Watch", "end_stuck"]

_LOOKS_PER_LIMIT = 5
_LONGEST_INTERVAL_SECONDS = 1.0
_STACK_SECONDS = 0.5  # faulthandler takes some ms; a process that does not even get there has none
_STACK_INTERVAL_SECONDS = 0.01


class Sightings:
    """Since when each worker was seen in the same call of the same env; a pure function of what it is told.

    Args:
        limit: Seconds for each call of an env.
        build_limit: Seconds for its construction.
    """

    def __init__(self, limit: float, build_limit: float) -> None:
        self._limit = limit
        self._build_limit = build_limit
        self._seen: dict[int, dict[tuple[int, Doing], float]] = {}

    def __repr__(self) -> str:
        return f"<Sightings of {sorted(self._seen)}>"

    def limit_of(self, doing: Doing) -> float:
        """Seconds that this may take."""
        return self._build_limit if doing.phase is Phase.BUILD else self._limit

    def see(self, index: int, pid: int, doing: Sequence[Doing], now: float) -> list[Doing]:
        """What this worker is stuck in, each to be told once.

        Args:
            index: The worker.
            pid: Its process: another one may have taken its place.
            doing: The calls of envs that it is in.
            now: Seconds.
        """
        known = self._seen.get(index, {})
        seen = self._seen[index] = {(pid, call): known.get((pid, call), now) for call in doing}
        stuck = [call for (_, call), since in seen.items() if now - since >= self.limit_of(call)]
        for call in stuck:
            seen[pid, call] = float("inf")
        return stuck


class Watch:
    """Looks while calls are pending.

    Args:
        loop: Where.
        limit: Seconds that one env's call may take.
        build_limit: Seconds that its construction may take.
        stuck: Called with the worker's index, what it is stuck in, and the limit.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        limit: float,
        build_limit: float,
        stuck: Callable[[int, Sequence[Doing], float], None],
    ) -> None:
        self._loop = loop
        self._limit = limit
        self._interval = min(limit / _LOOKS_PER_LIMIT, build_limit / _LOOKS_PER_LIMIT, _LONGEST_INTERVAL_SECONDS)
        self._stuck = stuck
        self._sightings = Sightings(limit, build_limit)
        self._next: asyncio.TimerHandle | None = None

    def __repr__(self) -> str:
        return f"<Watch limit={self._limit} looking={self._next is not None}>"

    def begin(self, workers: Sequence[Worker], calls: Mapping[int, PendingCall]) -> None:
        """A call is pending."""
        if self._next is None:
            self._next = self._loop.call_later(self._interval, self._look, workers, calls)

    def end(self) -> None:
        """Looks no more."""
        if self._next is not None:
            self._next.cancel()
            self._next = None

    def _look(self, workers: Sequence[Worker], calls: Mapping[int, PendingCall]) -> None:
        self._next = None
        now = self._loop.time()
        for worker in workers:
            doing = worker.doing if worker.alive else ()
            if stuck := self._sightings.see(worker.index, worker.pid, doing, now):
                self._stuck(worker.index, stuck, self._sightings.limit_of(stuck[0]))
            worker.look()
        if calls:
            self.begin(workers, calls)


def end_stuck(
    loop: asyncio.AbstractEventLoop,
    worker: Worker,
    late: Sequence[int],
    command: str,
    seconds: float,
    *,
    has_begun: bool,
) -> None:
    """Kills a worker as soon as it has written down its stack.

    From here on it counts as dead, whatever it still answers: the signal that asks for the stack may end the very
    `sleep` or `recv` in C that it is stuck in.

    Args:
        loop: The running loop.
        worker: Whose.
        late: The envs that are named.
        command: What they do not end.
        seconds: The limit that has passed.
        has_begun: Whether it is in an env, and not still before the first.
    """
    deadline = loop.time() + _STACK_SECONDS
    worker.is_condemned = True

    def kill_when_written(written: int) -> None:
        if not worker.alive:  # closed, or it has ended by itself
            return
        now = worker.stack_nbytes
        if not has_begun or (now > 0 and now == written) or loop.time() > deadline:
            lost, pid, place, stack = worker.env_ids, worker.pid, worker.place, worker.stack
            worker.kill_as(
                EnvTimeoutError(late, command, seconds, lost_env_ids=lost, pid=pid, place=place, stack=stack)
            )
        else:
            loop.call_later(_STACK_INTERVAL_SECONDS, kill_when_written, now)

    if has_begun:
        worker.ask_stack()
    kill_when_written(0)
