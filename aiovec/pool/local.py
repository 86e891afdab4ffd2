"""A worker that is a process on this machine: its process, its channel and its output, as one.

What the pool asks of a worker, of whichever kind: `prepare` a request (may fail, touches nothing), `post` it
(cannot fail), `unpack` a reply's payload, and its end. What a worker tells the pool:
`replied` with each reply, `resume` as the last act of a callback that may have brought any, `died` once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from aiovec.errors import EnvTimeoutError, WorkerDied
from aiovec.exchange import pickles, replies, step_each
from aiovec.exchange.black_box import Doing
from aiovec.exchange.frames import Frame, pack_frame, pack_header
from aiovec.exchange.step_each import StepEachRequest
from aiovec.pool.channel import Channel
from aiovec.pool.output import WorkerOutput
from aiovec.pool.process import WorkerProcess

__all__ = ["Death", "LocalWorker", "Worker"]

Death = WorkerDied | EnvTimeoutError

_HANG_UP_SECONDS = 0.5


class Worker(Protocol):
    """The seam between the pool and a kind of worker."""

    index: int
    env_ids: range
    pid: int
    alive: bool
    exitcode: int | None
    ended: asyncio.Event
    is_condemned: bool  # it is about to be killed: what it answers counts no more

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

    def ask_stack(self) -> None:
        """Has the worker write down its Python stack, whatever it is doing."""

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


class LocalWorker:
    """A process on this machine.

    Args:
        index: Which of the vector's workers.
        env_ids: Its envs.
        process: Just started.
        replied: Called with the worker's index and each reply.
        resume: Called last in whatever may have brought replies.
        died: Called once if the process ends unasked, with what there is to say.
    """

    def __init__(
        self,
        index: int,
        env_ids: range,
        process: WorkerProcess,
        replied: Callable[[int, Frame], None],
        resume: Callable[[], None],
        died: Callable[[int, Death], None],
    ) -> None:
        self.index = index
        self.env_ids = env_ids
        self.pid: int = process.pid
        self.alive: bool = True
        self.ended: asyncio.Event = asyncio.Event()
        self.is_condemned: bool = False
        self._process = process
        self._replied = replied
        self._resume = resume
        self._died = died
        self.exitcode: int | None = None
        self._hanging_up: asyncio.TimerHandle | None = None
        self._hung_up = False
        self._verdict: EnvTimeoutError | None = None
        self._last_times: Sequence[float] = ()
        self._last: tuple[int | None, str] = (None, "")  # the env that it ended in, its last stack
        self._output = WorkerOutput(process.files.output, f"aiovec worker {index}")
        self._channel = Channel(process.files.connection, self._received, resume, self._lost)

    def __repr__(self) -> str:
        return f"<LocalWorker {self.index} pid={self.pid} alive={self.alive} {self._channel!r}>"

    def watch(self, loop: asyncio.AbstractEventLoop) -> None:
        """Puts the worker on the loop."""
        self._output.watch(loop)
        self._channel.open(loop)
        self._process.watch(loop, self._process_ended)

    def prepare(self, message: Any) -> bytes:
        if message is None:
            return b""
        return step_each.dumps(message) if type(message) is StepEachRequest else pickles.dumps_to_worker(message)

    def post(self, kind: int, seq: int, buffer: int, prepared: bytes, group: int = 0) -> None:
        if prepared:
            self._channel.write(pack_frame(kind, seq, buffer, prepared, group))
        else:
            self._channel.write(pack_header(kind, seq, buffer, 0, group))

    def unpack(self, payload: memoryview | bytes) -> Any:
        return replies.loads(payload)

    def failed_envs(self, payload: memoryview | bytes) -> Sequence[tuple[int, int]]:
        return replies.failed_envs(payload)

    def signal(self, number: int) -> None:
        """Sends a signal to the worker and what it started."""
        self._process.signal(number)

    def kill(self) -> None:
        self.alive = False
        self._process.kill()

    def terminate(self) -> None:
        self.alive = False
        self._process.kill()
        self._finish()

    @property
    def doing(self) -> Sequence[Doing]:
        return () if self._process.is_reaped else self._process.files.black_box.doing

    @property
    def times(self) -> Sequence[float]:
        return self._last_times if self._process.is_reaped else self._process.files.black_box.times

    def ask_stack(self) -> None:
        self._process.ask_stack()

    @property
    def stack_nbytes(self) -> int:
        return 0 if self._process.is_reaped else self._process.files.black_box.stack_nbytes

    @property
    def stack(self) -> str:
        return "" if self._process.is_reaped else self._process.files.black_box.stack

    def kill_as(self, verdict: EnvTimeoutError) -> None:
        self._verdict = verdict
        self._process.kill()

    def _received(self, frame: Frame) -> None:
        if not self.is_condemned:
            self._replied(self.index, frame)

    def _process_ended(self) -> None:
        self._channel.drain()
        was_alive, self.alive = self.alive, False
        self._finish()
        if was_alive:
            self._died(self.index, self._verdict or self._obituary())
        self._resume()

    def _obituary(self) -> WorkerDied:
        exitcode = None if self._hung_up else self.exitcode
        env_index, stack = self._last
        facts = (self.env_ids, self.pid, exitcode, None, self._output.stderr_tail)
        return WorkerDied(*facts, env_index=env_index, stack=stack)

    def _finish(self) -> None:
        """Takes what is left of a process that has ended or was killed, and frees everything."""
        if self._hanging_up is not None:
            self._hanging_up.cancel()
        if not self._process.is_reaped:  # else the interpreter is at its exit, and that was done
            self._output.finish()
            doing = self.doing
            self._last = (self.env_ids[doing[0].row] if len(doing) == 1 else None, self.stack)
            self._last_times = self.times
            self.exitcode = self._process.reap()
        self._channel.close()
        self.ended.set()

    def _lost(self) -> None:
        """The socket closed although the process may live: without it the process is of no use."""
        if self.alive:  # most often it is just ending, and its end will tell more
            self._hanging_up = asyncio.get_running_loop().call_later(_HANG_UP_SECONDS, self._hang_up)

    def _hang_up(self) -> None:
        self._hung_up = True
        self._process.kill()
