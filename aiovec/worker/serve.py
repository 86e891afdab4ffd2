"""Serves requests from a blocking socket, one after the other, in a process of its own.

A worker has no event loop, so that an env may run one. Between two requests it looks for the next some 100
microseconds before it sleeps: on a virtual machine a core that sleeps takes 25-50 µs to wake, which with 64
CartPole is a quarter of a step. It yields its core at every look and stops looking where that does not pay.
"""

from __future__ import annotations

import gc
import os
import select
import socket
import time
from collections.abc import Callable, Sequence

from aiovec.exchange import pickles, replies, step_each
from aiovec.exchange.black_box import open_black_box
from aiovec.exchange.failures import FailureRecord, capture
from aiovec.exchange.frames import Frame, FrameKind, FrameReader, pack_frame, pack_header
from aiovec.exchange.messages import (
    BatchReply,
    BuildReply,
    BuildRequest,
    CallReply,
    CallRequest,
    RebuildRequest,
    ResetRequest,
)
from aiovec.exchange.reply_area import ReplyArea
from aiovec.exchange.slab import Geometry, Slab
from aiovec.exchange.tally import take_last
from aiovec.worker.core import WorkerCore
from aiovec.worker.travel import dumps_batch_reply, dumps_call_reply

__all__ = ["serve"]

_LOOK_SECONDS = 250e-6  # the parent comes back within 30-100 µs, and the slowest worker keeps the others waiting
_MOST_SKIPPED = 63  # waits without a look after many that did not pay


def serve(connection: socket.socket, slab_fd: int, tally_fd: int, black_box_fd: int, look_again: bool) -> None:
    """Serves until the parent says close, or is gone.

    Args:
        connection: A blocking stream socket; frames in, frames out.
        slab_fd: The memory, empty until the first `MAP`.
        tally_fd: See `aiovec.exchange.tally`.
        black_box_fd: See `aiovec.exchange.black_box`.
        look_again: Whether to look for the next request before sleeping.
    """
    _Server(connection, slab_fd, tally_fd, black_box_fd, look_again).run()


class _Server:
    def __init__(
        self, connection: socket.socket, slab_fd: int, tally_fd: int, black_box_fd: int, look_again: bool
    ) -> None:
        self._connection = connection
        self._tally_fd = tally_fd
        self._look_again = _LookAgain(connection) if look_again else None
        doing = open_black_box(black_box_fd)
        self._core = WorkerCore(self._capture, lambda geometry: self._attach(geometry, slab_fd), doing)
        self._reply_area: ReplyArea | None = None
        self._shared = True
        self._closing = False
        self._traceback_locals = False
        self._handlers: dict[int, Callable[[Frame], bytes | None]] = {
            FrameKind.STEP_TOGETHER: self._step,
            FrameKind.STEP: self._step,
            FrameKind.RESET: self._reset,
            FrameKind.CALL: self._call,
            FrameKind.SET_ATTR: self._set_attr,
            FrameKind.BUILD: self._build,
            FrameKind.REBUILD: self._rebuild,
            FrameKind.MAP: self._map,
            FrameKind.CLOSE: self._close,
        }

    def run(self) -> None:
        connection, reader = self._connection, FrameReader()
        while not self._closing:
            if self._look_again is not None and not reader.partial:
                self._look_again()
            received = connection.recv_into(reader.space())
            if not received:  # the parent closed its end without a word
                self._core.close()
                return
            reader.received(received)
            for frame in reader.frames():
                self._answer(frame)

    def _answer(self, frame: Frame) -> None:
        if frame.kind == FrameKind.ECHO:
            self._connection.sendall(pack_header(FrameKind.ECHO, frame.seq))
            return
        if frame.kind == FrameKind.STEP_EACH:
            self._step_each(frame)
            return
        try:
            reply = self._handlers[frame.kind](frame)
        except Exception as exception:  # noqa: BLE001  a request that cannot be unpickled here, above all
            reply = self._refuse(frame, exception, self._core.env_ids)
        if frame.kind == FrameKind.STEP_TOGETHER:
            self._answer_together(frame.seq, reply or b"")
        else:
            self._reply(frame.seq, reply)

    def _reply(self, seq: int, reply: bytes | None) -> None:
        header = pack_header(FrameKind.REPLY, seq) if not reply else pack_frame(FrameKind.REPLY, seq, 0, reply)
        self._connection.sendall(header)

    def _answer_together(self, seq: int, reply: bytes) -> None:
        assert self._reply_area is not None  # noqa: S101  mapped before the first step
        if not self._reply_area.leave(seq, reply):
            self._connection.sendall(pack_frame(FrameKind.REPLY, seq, 0, reply))
        # Behind the reply: whoever hears that all are done must find the replies of all.
        if take_last(self._tally_fd):
            self._connection.sendall(pack_header(FrameKind.ALL_DONE, seq))

    def _refuse(self, frame: Frame, exception: Exception, env_ids: Sequence[int]) -> bytes:
        """The answer to a request that failed as a whole: these envs failed in it."""
        command = FrameKind(frame.kind).name.lower()
        exception.add_note("the worker could not read the request, or could not pickle its answer")
        failures = [self._capture(exception, env_index, command) for env_index in env_ids]
        if frame.kind == FrameKind.BUILD:
            return replies.dumps(BuildReply([], {}, None, failures))
        if frame.kind in (FrameKind.STEP, FrameKind.STEP_TOGETHER, FrameKind.STEP_EACH, FrameKind.RESET):
            return replies.dumps(BatchReply({}, failures=failures))
        return replies.dumps(CallReply([], failures))

    def _build(self, frame: Frame) -> bytes:
        return replies.dumps(self._core.build(self._build_request(frame.payload)))

    def _build_request(self, pickled: bytes | memoryview) -> BuildRequest:
        request: BuildRequest = pickles.loads(pickled)
        self._traceback_locals = request.traceback_locals
        return request

    def _rebuild(self, frame: Frame) -> None:
        request: RebuildRequest = pickles.loads(frame.payload)
        self._core.rebuild(self._build_request(request.build), request.delay, request.lost)

    def _step(self, frame: Frame) -> bytes | None:
        actions = pickles.loads(frame.payload) if frame.payload else None
        reply = self._core.step(frame.buffer, actions)
        if reply is None and self._shared:
            return None
        return self._batch(reply, frame.buffer, self._core.env_ids, "step")

    def _step_each(self, frame: Frame) -> None:
        request, pickled_actions = step_each.loads(frame.payload)
        env_ids = self._core.ids_of(request.rows)
        try:
            if pickled_actions:
                request = request._replace(actions=pickles.loads(pickled_actions))
            actions = self._core.actions_of(request)
        except Exception as exception:  # noqa: BLE001  what a user gave may not load here
            for position, env_index in enumerate(env_ids):
                self._reply(frame.seq + position, self._refuse(frame, exception, [env_index]))
            return
        for position, (row, action) in enumerate(zip(request.rows, actions, strict=True)):
            try:
                reply = self._core.step_one(frame.buffer, row, action, request.autoreset)
                say_nothing = reply is None and self._shared
                data = None if say_nothing else self._batch(reply, frame.buffer, [env_ids[position]], "step")
            except Exception as exception:  # noqa: BLE001  its answer cannot be pickled
                data = self._refuse(frame, exception, [env_ids[position]])
            self._reply(frame.seq + position, data)

    def _reset(self, frame: Frame) -> bytes | None:
        request: ResetRequest = pickles.loads(frame.payload)
        reply = self._core.reset(frame.buffer, request)
        if reply is None and self._shared:
            return None
        return self._batch(reply, frame.buffer, self._core.answered_by(request), "reset")

    def _batch(self, reply: BatchReply | None, buffer: int, answered: Sequence[int], command: str) -> bytes:
        reply = reply or BatchReply({})
        if not self._shared:
            reply = reply._replace(arrays=self._core.rows(buffer, answered))
        return dumps_batch_reply(reply, answered, command, self._capture_on_the_way)

    def _call(self, frame: Frame) -> bytes:
        request: CallRequest = pickles.loads(frame.payload)
        asked = self._core.ids_of(request.rows)
        return dumps_call_reply(self._core.call(request), asked, request.name, self._capture)

    def _set_attr(self, frame: Frame) -> bytes:
        return replies.dumps(self._core.set_attr(pickles.loads(frame.payload)))

    def _map(self, frame: Frame) -> None:
        request = pickles.loads(frame.payload)
        self._shared = request.shared
        slab = self._core.map(request)
        if request.num_workers:
            self._reply_area = slab.reply_area(request.worker_index)
        gc.freeze()  # what is there now stays: the collector need not walk through it again and again

    def _close(self, _frame: Frame) -> bytes:
        self._closing = True
        return replies.dumps(self._core.close())

    def _attach(self, geometry: Geometry, slab_fd: int) -> Slab:
        slab = Slab.attach(geometry, slab_fd)
        os.close(slab_fd)
        return slab

    def _capture_on_the_way(self, exception: BaseException, env_index: int, command: str) -> FailureRecord:
        self._core.host.has_failed(env_index, exception)
        return self._capture(exception, env_index, command)

    def _capture(self, exception: BaseException, env_index: int, command: str) -> FailureRecord:
        return capture(exception, env_index, os.getpid(), command, self._traceback_locals)


class _LookAgain:
    """Looks whether the socket is readable for some microseconds, as long as that pays."""

    def __init__(self, connection: socket.socket) -> None:
        poll = select.poll()
        poll.register(connection.fileno(), select.POLLIN)
        self._poll = poll.poll
        self._skips = 0  # how many waits to skip after the next failure
        self._to_skip = 0

    def __call__(self) -> None:
        if self._to_skip:
            self._to_skip -= 1
            return
        poll, give_way, clock = self._poll, os.sched_yield, time.perf_counter
        give_way()  # to the parent, which our answer has just woken
        end = clock() + _LOOK_SECONDS
        while not poll(0):
            if clock() > end:
                self._skips = self._to_skip = min(2 * self._skips + 1, _MOST_SKIPPED)
                return
            give_way()
        self._skips = 0
