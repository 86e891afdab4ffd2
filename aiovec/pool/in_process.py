"""The worker of `num_workers=0`: the same envs and the same requests, in the parent's own process.

For a debugger, for async envs that only wait, and where a process would cost more than it brings. A sync env's step then
runs on the loop's thread; this is the one place where the loop waits for an env. Replies come by the loop's next turn,
so that other tasks get theirs between two steps.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

from aiovec.errors import EnvTimeoutError
from aiovec.exchange.black_box import IDLE, TIMES_PER_ROW, Doing
from aiovec.exchange.failures import FailureRecord
from aiovec.exchange.frames import Frame, FrameKind
from aiovec.exchange.messages import BatchReply, BuildRequest, ResetRequest
from aiovec.exchange.replies import failed_in
from aiovec.exchange.slab import Geometry, Slab
from aiovec.exchange.step_each import StepEachRequest
from aiovec.exchange.tally import Tally
from aiovec.exchange.wanted import Wanted
from aiovec.pool.worker import Told, Worker
from aiovec.worker.async_lane import AsyncLane
from aiovec.worker.clock import StepClock
from aiovec.worker.core import WorkerCore
from aiovec.worker.host import Work
from aiovec.worker.lanes import InlineLane, Lanes
from aiovec.worker.travel import copied_reply
from aiovec.worker.turns import drive

__all__ = ["InProcess", "InProcessWorker"]


class InProcessWorker:
    """All envs of a vector, held by the parent.

    Args:
        loop: What the vector belongs to.
        env_ids: All of them.
        slab: Gives the parent's own memory.
        told: What to call; nobody dies here.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        env_ids: range,
        slab: Callable[[Geometry], Slab],
        told: Told,
    ) -> None:
        self.index = 0
        self.env_ids = env_ids
        self.pid: int = os.getpid()
        self.place: str = ""
        self.alive: bool = True
        self.is_condemned: bool = False
        self.exitcode: int | None = None
        self.ended: asyncio.Event = asyncio.Event()
        self._loop = loop
        self._replied, self._resume = told.replied, told.resume
        self._doing = [IDLE, 0]
        self._times = [0.0] * (1 + TIMES_PER_ROW * len(env_ids))
        self._clock = StepClock(self._times)
        self._core = WorkerCore(self._capture, slab, self._doing, self._clock)
        self._traceback_locals = False
        self._async_lane: AsyncLane | None = None
        self._lanes = Lanes([InlineLane(self._doing, self._clock)], {})
        self._handlers: dict[int, Callable[[Frame], None]] = {
            FrameKind.BUILD: self._build,
            FrameKind.MAP: self._map,
            FrameKind.STEP: self._step,
            FrameKind.STEP_EACH: self._step_each,
            FrameKind.RESET: self._reset,
            FrameKind.OBSERVE: self._observe,
            FrameKind.CALL: lambda frame: self._do(frame, self._core.calling(frame.payload)),
            FrameKind.SET_ATTR: lambda frame: self._do(frame, self._core.setting(frame.payload)),
            FrameKind.CLOSE: self._close,
        }

    def __repr__(self) -> str:
        return f"<InProcessWorker alive={self.alive}>"

    def prepare(self, message: Any) -> Any:
        return message

    def post(self, kind: int, seq: int, buffer: int, prepared: Any, group: int = 0) -> None:
        self._handlers[kind](Frame(kind, seq, buffer, prepared, group))

    def _do(
        self,
        frame: Frame,
        work: Work[Any],
        copied: Callable[[Any], Any] = lambda reply: reply,
        may_be_cancelled: bool = False,
    ) -> None:
        """Does what a request asks; what is answered on the spot is delivered by the loop's next turn."""

        def ended() -> None:
            self._loop.call_soon(self._deliver, frame._replace(payload=copied(work.reply())))

        self._lanes.do(work.turns, ended, may_be_cancelled)

    def _deliver(self, reply: Frame) -> None:
        self._replied(self.index, reply)
        self._resume()
        if reply.kind == FrameKind.CLOSE:
            self._end()

    def unpack(self, payload: Any) -> Any:
        return payload

    def failed_envs(self, payload: BatchReply | None) -> Sequence[tuple[int, int]]:
        return failed_in(payload) if payload is not None else ()

    def signal(self, number: int) -> None:
        """There is no process to signal."""

    def kill(self) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: `terminate` follows
            self._loop.call_soon_threadsafe(self._abandon)

    def terminate(self) -> None:
        self._abandon()

    @property
    def doing(self) -> Sequence[Doing]:
        return ()

    @property
    def times(self) -> Sequence[float]:
        return tuple(self._times)

    def look(self) -> None:
        """There is no other process to look at."""

    def ask_stack(self) -> None:
        """There is no other process to ask."""

    @property
    def stack_nbytes(self) -> int:
        return 0

    @property
    def stack(self) -> str:
        return ""

    def kill_as(self, verdict: EnvTimeoutError) -> None:
        """There is no process to kill; `step_timeout` is refused here."""

    # ---- requests

    def _build(self, frame: Frame) -> None:
        request: BuildRequest = frame.payload
        self._traceback_locals = request.traceback_locals

        work = self._core.build(request)

        def built() -> None:
            reply = work.reply()
            if reply.asynchronous:
                self._open_lane(request, reply.asynchronous)
            self._do(frame, self._core.closing() if reply.failures else Work([], lambda: reply), lambda _: reply)

        self._lanes.do(work.turns, built, may_be_cancelled=False)

    def _open_lane(self, request: BuildRequest, asynchronous: Sequence[int]) -> None:
        timeout, grace = request.step_timeout, request.close_grace
        self._async_lane = AsyncLane(self._loop, self.env_ids, timeout, grace, [IDLE, 0], [IDLE, 0], self._clock)
        self._lanes = Lanes([InlineLane(self._doing, self._clock)], dict.fromkeys(asynchronous, self._async_lane))

    def _map(self, frame: Frame) -> None:
        self._core.map(frame.payload)
        self._do(frame, Work([], lambda: None))

    def _step(self, frame: Frame) -> None:
        if self._async_lane is None:  # the columns' own path
            reply = self._core.step(frame.buffer, frame.group, frame.payload)
            work: Work[BatchReply | None] = Work([], lambda: reply)
        else:
            work = self._core.stepping(frame.buffer, frame.group, frame.payload)
        answered = self._core.ids_of_group(frame.group)
        self._do(frame, work, lambda reply: self._copied(reply, answered, "step"), may_be_cancelled=True)

    def _step_each(self, frame: Frame) -> None:
        request: StepEachRequest = frame.payload
        actions = self._core.actions_of(request)
        for seq, (row, action) in enumerate(zip(request.rows, actions, strict=True), frame.seq):
            work = self._core.stepping_one(frame.buffer, row, action, request.autoreset)
            copied = functools.partial(self._copied, answered=[self.env_ids[row]], command="step")
            self._do(frame._replace(seq=seq), work, copied, may_be_cancelled=True)

    def _reset(self, frame: Frame) -> None:
        request: ResetRequest = frame.payload
        if self._async_lane is not None:  # what is owed to these is not asked for any more
            self._async_lane.cancel(range(len(self.env_ids)) if request.rows is None else request.rows)
        answered = self._core.answered_by(request)
        work = self._core.resetting(frame.buffer, request)
        self._do(frame, work, lambda reply: self._copied(reply, answered, "reset"), may_be_cancelled=True)

    def _observe(self, frame: Frame) -> None:
        work = self._core.observing(frame.buffer)
        self._do(frame, work, lambda reply: self._copied(reply, self.env_ids, "observe"))

    def _close(self, frame: Frame) -> None:
        if self._async_lane is not None:
            self._async_lane.cancel(range(len(self.env_ids)), everything=True)

        self._do(frame, self._core.closing())

    def _abandon(self) -> None:
        """Closes the envs that close at once; the others are cancelled, and nobody waits for them."""
        if self.ended.is_set():
            return
        turns = self._core.closing().turns
        if self._async_lane is not None:
            self._async_lane.abandon()
            turns = [(row, turn) for row, turn in turns if not self._core.host.rows.is_async[row]]
        for row, turn in turns:
            drive(turn, row, self._doing, self._clock)
        self._end()

    def _end(self) -> None:
        self.alive = False
        self.ended.set()
        if self._async_lane is not None:
            self._async_lane.abandon()

    # ---- answers

    def _copied(self, reply: BatchReply | None, answered: Sequence[int], command: str) -> BatchReply | None:
        return copied_reply(reply, answered, command, self._capture_on_the_way)

    def _capture_on_the_way(self, exception: BaseException, env_index: int, command: str) -> FailureRecord:
        self._core.host.has_failed(env_index, exception)
        return self._capture(exception, env_index, command)

    def _capture(self, exception: BaseException, env_index: int, command: str) -> FailureRecord:
        """The very exception, not a copy; a real Ctrl-C goes on as what it is."""
        if isinstance(exception, KeyboardInterrupt):
            raise exception
        return FailureRecord.of(exception, env_index, os.getpid(), command, self._traceback_locals)


class InProcess:
    """See `aiovec.pool.worker.Backend`.

    Args:
        loop: What the vector belongs to.
        slab: Gives the parent's own memory.
    """

    shares_memory: bool = True
    maps_memory: bool = False  # it is ours
    tallies: Sequence[Tally] = ()
    wanted: Wanted | None = None

    def __init__(self, loop: asyncio.AbstractEventLoop, slab: Callable[[Geometry], Slab]) -> None:
        self._loop = loop
        self._slab = slab

    def __repr__(self) -> str:
        return "<InProcess>"

    async def open(self) -> None:
        """There is nothing to prepare."""

    def start_worker(self, index: int, env_ids: range, told: Told) -> InProcessWorker:
        assert not index  # noqa: S101  it holds all envs
        return InProcessWorker(self._loop, env_ids, self._slab, told)

    async def why_not_there(self, workers: Sequence[Worker]) -> str:  # noqa: ARG002
        return ""

    async def close(self) -> None:
        """There is nothing to free."""

    def terminate(self) -> None:
        """There is nothing to free."""
