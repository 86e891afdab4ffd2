"""The worker of `num_workers=0`: the same envs and the same requests, in the parent's own process.

For a debugger, and where a process would cost more than it brings. An env's step then runs on the loop's
thread; this is the one place where the loop waits for an env. Replies come by the loop's next turn, so that
other tasks get theirs between two steps.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from typing import Any

from aiovec.errors import EnvTimeoutError
from aiovec.exchange.black_box import IDLE, Doing
from aiovec.exchange.failures import FailureRecord
from aiovec.exchange.frames import Frame, FrameKind
from aiovec.exchange.messages import BatchReply, BuildReply, BuildRequest, CallReply, MapRequest, ResetRequest
from aiovec.exchange.replies import failed_in
from aiovec.exchange.slab import Geometry, Slab
from aiovec.exchange.step_each import StepEachRequest
from aiovec.worker.core import WorkerCore
from aiovec.worker.travel import copied_reply

__all__ = ["InProcessWorker"]


class InProcessWorker:
    """All envs of a vector, held by the parent.

    Args:
        env_ids: All of them.
        slab: Gives the parent's own memory.
        replied: Called with the worker's index and each reply.
        resume: Called last in whatever brought replies.
    """

    def __init__(
        self,
        env_ids: range,
        slab: Callable[[Geometry], Slab],
        replied: Callable[[int, Frame], None],
        resume: Callable[[], None],
    ) -> None:
        self.index = 0
        self.env_ids = env_ids
        self.pid: int = os.getpid()
        self.alive: bool = True
        self.is_condemned: bool = False
        self.exitcode: int | None = None
        self.ended: asyncio.Event = asyncio.Event()
        self._replied = replied
        self._resume = resume
        self._core = WorkerCore(self._capture, slab, [IDLE, 0])
        self._traceback_locals = False
        self._handlers: dict[int, Callable[[int, Any], Any]] = {
            FrameKind.BUILD: lambda _buffer, message: self._build(message),
            FrameKind.MAP: lambda _buffer, message: self._map(message),
            FrameKind.STEP: self._step,
            FrameKind.RESET: self._reset,
            FrameKind.CALL: lambda _buffer, message: self._core.call(message),
            FrameKind.SET_ATTR: lambda _buffer, message: self._core.set_attr(message),
            FrameKind.CLOSE: lambda _buffer, _message: self._close(),
        }

    def __repr__(self) -> str:
        return f"<InProcessWorker alive={self.alive}>"

    def prepare(self, message: Any) -> Any:
        return message

    def post(self, kind: int, seq: int, buffer: int, prepared: Any) -> None:
        if kind == FrameKind.STEP_EACH:
            self._step_each(seq, buffer, prepared)
            return
        reply = self._handlers[kind](buffer, prepared)
        asyncio.get_running_loop().call_soon(self._deliver, Frame(kind, seq, buffer, reply))

    def _deliver(self, reply: Frame) -> None:
        self._replied(self.index, reply)
        self._resume()

    def unpack(self, payload: Any) -> Any:
        return payload

    def failed_envs(self, payload: BatchReply | None) -> Sequence[tuple[int, int]]:
        return failed_in(payload) if payload is not None else ()

    def signal(self, number: int) -> None:
        """There is no process to signal."""

    def kill(self) -> None:
        self._close()

    def terminate(self) -> None:
        self._close()

    @property
    def doing(self) -> Doing | None:
        return None

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

    def _step(self, buffer: int, message: Any) -> BatchReply | None:
        return copied_reply(self._core.step(buffer, message), self.env_ids, "step", self._capture_on_the_way)

    def _reset(self, buffer: int, message: ResetRequest) -> BatchReply | None:
        reply = self._core.reset(buffer, message)
        return copied_reply(reply, self._core.answered_by(message), "reset", self._capture_on_the_way)

    def _step_each(self, seq: int, buffer: int, message: StepEachRequest) -> None:
        for position, (row, action) in enumerate(zip(message.rows, self._core.actions_of(message), strict=True)):
            reply = self._core.step_one(buffer, row, action, message.autoreset)
            reply = copied_reply(reply, [self.env_ids[row]], "step", self._capture_on_the_way)
            asyncio.get_running_loop().call_soon(self._deliver, Frame(FrameKind.REPLY, seq + position, buffer, reply))

    def _build(self, message: BuildRequest) -> BuildReply:
        self._traceback_locals = message.traceback_locals
        return self._core.build(message)

    def _map(self, message: MapRequest) -> None:
        self._core.map(message)

    def _close(self) -> CallReply:
        self.alive = False
        self.ended.set()
        return self._core.close()

    def _capture_on_the_way(self, exception: BaseException, env_index: int, command: str) -> FailureRecord:
        self._core.host.has_failed(env_index, exception)
        return self._capture(exception, env_index, command)

    def _capture(self, exception: BaseException, env_index: int, command: str) -> FailureRecord:
        """The very exception, not a copy; a real Ctrl-C goes on as what it is."""
        if isinstance(exception, KeyboardInterrupt):
            raise exception
        return FailureRecord.of(exception, env_index, os.getpid(), command, self._traceback_locals)
