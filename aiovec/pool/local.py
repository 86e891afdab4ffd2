"""Workers that are processes on this machine: of each its process, its channel and its output, as one."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from aiovec.errors import EnvTimeoutError, WorkerDied, WorkerStartError
from aiovec.exchange import pickles, replies, step_each
from aiovec.exchange.black_box import Doing
from aiovec.exchange.frames import Frame, pack_frame, pack_header
from aiovec.exchange.step_each import StepEachRequest
from aiovec.exchange.tally import NUM_TALLIES, Tally
from aiovec.exchange.wanted import Wanted
from aiovec.pool.channel import Channel
from aiovec.pool.cpus import usable_cpus
from aiovec.pool.memory import SlabMemory
from aiovec.pool.output import WorkerOutput
from aiovec.pool.process import WorkerProcess
from aiovec.pool.worker import Told, Worker

__all__ = ["LocalProcesses", "LocalWorker"]

_HANG_UP_SECONDS = 0.5


class LocalWorker:
    """A process on this machine.

    Args:
        index: Which of the vector's workers.
        env_ids: Its envs.
        process: Just started.
        told: What to call.
    """

    def __init__(self, index: int, env_ids: range, process: WorkerProcess, told: Told) -> None:
        self.index = index
        self.env_ids = env_ids
        self.pid: int = process.pid
        self.place: str = ""
        self.alive: bool = True
        self.ended: asyncio.Event = asyncio.Event()
        self.is_condemned: bool = False
        self._process = process
        self._replied, self._resume, self._died = told
        self.exitcode: int | None = None
        self._hanging_up: asyncio.TimerHandle | None = None
        self._hung_up = False
        self._verdict: EnvTimeoutError | None = None
        self._last_times: Sequence[float] = ()
        self._last: tuple[int | None, str] = (None, "")  # the env that it ended in, its last stack
        self._output = WorkerOutput(process.files.output, f"aiovec worker {index}")
        self._channel = Channel(process.files.connection, self._received, told.resume, self._lost)

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
        self._finish()

    @property
    def doing(self) -> Sequence[Doing]:
        return () if self._process.is_reaped else self._process.files.black_box.doing

    @property
    def times(self) -> Sequence[float]:
        return self._last_times if self._process.is_reaped else self._process.files.black_box.times

    def look(self) -> None:
        """It is shared."""

    def ask_stack(self) -> None:
        if self.doing:  # before its first env it may not have set up faulthandler: SIGUSR1 would just end it
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
        """Ends the process, if it has not, takes what is left of it, and frees everything."""
        if self._hanging_up is not None:
            self._hanging_up.cancel()
        try:
            if not self._process.is_reaped:  # else the interpreter is at its exit, and that was done
                self._process.kill()  # before the rest is read: what it started may go on writing
                self._output.finish()
                doing = self.doing
                self._last = (self.env_ids[doing[0].row] if len(doing) == 1 else None, self.stack)
                self._last_times = self.times
        finally:  # whatever our stdout raises, a Ctrl-C in it too: who waits for the end must hear of it
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


class LocalProcesses:
    """See `aiovec.pool.worker.Backend`.

    Args:
        loop: The running loop.
        context: `None` for fresh interpreters, else the name of a multiprocessing start method.
        num_envs: How many envs.
        num_workers: How many workers.
        memory: What they map.
        shares_memory: Whether they do.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        context: str | None,
        num_envs: int,
        num_workers: int,
        memory: SlabMemory,
        shares_memory: bool,
    ) -> None:
        self.shares_memory: bool = shares_memory
        self.maps_memory: bool = shares_memory
        self.tallies: list[Tally] = []
        self.wanted: Wanted | None = None
        self._loop = loop
        self._context = context
        self._num_envs = num_envs
        self._num_workers = num_workers
        self._memory = memory

    def __repr__(self) -> str:
        return f"<LocalProcesses context={self._context!r}>"

    async def open(self) -> None:
        try:
            for _ in range(NUM_TALLIES):
                self.tallies.append(Tally(self._num_workers))
            self.wanted = Wanted()
            self._memory.open()
        except OSError as error:
            raise WorkerStartError.of(range(self._num_envs), error) from error

    def start_worker(self, index: int, env_ids: range, told: Told) -> LocalWorker:
        assert self.wanted is not None  # noqa: S101
        tallies = [tally.worker_fd for tally in self.tallies]
        shared_fds = (self._memory.fd, *tallies, self.wanted.worker_fd)
        look_again = self._num_workers <= usable_cpus()
        try:
            process = WorkerProcess(self._context, len(env_ids), shared_fds, look_again, f"aiovec-worker-{index}")
            worker = LocalWorker(index, env_ids, process, told)
            try:
                worker.watch(self._loop)
            except BaseException:
                worker.terminate()
                raise
        except OSError as error:
            raise WorkerStartError.of(env_ids, error) from error
        return worker

    async def why_not_there(self, workers: Sequence[Worker]) -> str:  # noqa: ARG002
        return ""  # a process that was started is there

    async def close(self) -> None:
        self.terminate()

    def terminate(self) -> None:
        for tally in self.tallies:
            tally.close()
        self.tallies.clear()
        if self.wanted is not None:
            self.wanted.close()
            self.wanted = None
