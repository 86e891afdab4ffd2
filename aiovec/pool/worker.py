"""The seam between the pool and the workers, wherever these are.

What the pool asks of a worker, of whichever kind: `prepare` a request (may fail, touches nothing), `post` it
(cannot fail), `unpack` a reply's payload, and its end. What a worker tells the pool is in `Told`. Who starts workers
of a kind, and owns what they have in common, is a `Backend`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from aiovec.errors import EnvTimeoutError, WorkerDied
from aiovec.exchange.black_box import Doing
from aiovec.exchange.frames import Frame
from aiovec.exchange.tally import Tally
from aiovec.exchange.wanted import Wanted

__all__ = ["Backend", "Death", "Told", "Worker"]

Death = WorkerDied | EnvTimeoutError


class Told(NamedTuple):
    """What workers call, on the loop.

    Attributes:
        replied: Called with the worker's index and each reply.
        resume: Called last in whatever may have brought replies.
        died: Called once if the worker ends unasked, with what there is to say.
    """

    replied: Callable[[int, Frame], None]
    resume: Callable[[], None]
    died: Callable[[int, Death], None]


class Worker(Protocol):
    """A worker.

    Attributes:
        index: Which of the vector's workers.
        env_ids: Its envs.
        pid: Its process; 0 as long as that is not known.
        place: On a Ray cluster: its node and its actor. Empty on this machine.
        alive: Whether it has not ended, and nobody has ended it.
        exitcode: As in `multiprocessing.Process.exitcode`, where there is one.
        ended: Set when it has.
        is_condemned: It is about to be killed: what it answers counts no more.
    """

    index: int
    env_ids: range
    pid: int
    place: str
    alive: bool
    exitcode: int | None
    ended: asyncio.Event
    is_condemned: bool

    def prepare(self, message: Any) -> Any:
        """Makes a message ready to be posted; raises what pickling it raises."""

    def post(self, kind: int, seq: int, buffer: int, prepared: Any, group: int = 0) -> None:
        """Sends a request; its reply bears the same `seq`."""

    def unpack(self, payload: Any) -> Any:
        """The reply behind a payload."""

    def failed_envs(self, payload: Any) -> Sequence[tuple[int, int]]:
        """The envs that failed in the reply to a batch, each with a `Failed`."""
        raise NotImplementedError

    def signal(self, number: int) -> None:
        """Sends a signal to the worker and what it started."""

    def kill(self) -> None:
        """Ends the worker now; `ended` is set once the loop has noticed."""

    def terminate(self) -> None:
        """Ends the worker and frees everything of it, now and without the loop."""

    @property
    def doing(self) -> Sequence[Doing]:
        """The calls of envs that the worker is in: one at most, unless its envs do not wait for each other."""
        raise NotImplementedError

    @property
    def times(self) -> Sequence[float]:
        """See `exchange.black_box.OpenBlackBox.times`."""
        raise NotImplementedError

    def look(self) -> None:
        """Has `doing` tell of this moment, or soon: where that is not shared, it must be asked for."""

    def ask_stack(self) -> None:
        """Has the worker write down its Python stack, whatever env it is in."""

    @property
    def stack_nbytes(self) -> int:
        """How much of it is written."""
        raise NotImplementedError

    @property
    def stack(self) -> str:
        """What it wrote."""
        raise NotImplementedError

    def kill_as(self, verdict: EnvTimeoutError) -> None:
        """Ends the worker now; its death is told as this."""


class Backend(Protocol):
    """Where the workers of a vector are.

    Attributes:
        shares_memory: Whether they read actions from the parent's memory, and write their rows there.
        maps_memory: Whether they must map it, and be told of its growth.
        wanted: Where the answers of sent envs wait in shared memory: tells workers when to wake us.
    """

    shares_memory: bool
    maps_memory: bool
    wanted: Wanted | None

    @property
    def tallies(self) -> Sequence[Tally]:
        """Where steps are answered by them: of all envs or the first group, of the second group."""
        raise NotImplementedError

    async def open(self) -> None:
        """Prepares what the workers have in common; raises `WorkerStartError`."""

    def start_worker(self, index: int, env_ids: range, told: Told) -> Worker:
        """Starts a worker without waiting for it; raises `WorkerStartError`."""
        raise NotImplementedError

    async def why_not_there(self, workers: Sequence[Worker]) -> str:
        """Why some of these have not begun yet, where the system has not given them; empty if it has."""
        raise NotImplementedError

    async def close(self) -> None:
        """Frees what the workers had in common, once all have ended."""

    def terminate(self) -> None:
        """The same, now and without the loop."""
