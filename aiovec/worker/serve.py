"""Serves requests from a blocking socket, one after the other, in a process of its own.

A worker has no event loop, so that an env may run one. Between two requests it looks for the next a few
microseconds before it sleeps: on a virtual machine a core that sleeps takes 25-50 µs to wake, which with 64
CartPole is a quarter of a step. It yields its core at every look and stops looking where that does not pay.
"""

from __future__ import annotations

import gc
import os
import select
import socket
import time
from collections.abc import Callable
from typing import Any

from aiovec.exchange import pickles
from aiovec.exchange.failures import FailureRecord, capture
from aiovec.exchange.frames import Frame, FrameKind, FrameReader, pack_frame, pack_header
from aiovec.exchange.messages import BatchReply, BuildReply, CallReply
from aiovec.exchange.slab import Geometry, Slab
from aiovec.worker.core import WorkerCore

__all__ = ["serve"]

_LOOK_SECONDS = 50e-6  # a parent without a policy comes back within some 30 µs
_MOST_SKIPPED = 63  # waits without a look after many that did not pay


def serve(connection: socket.socket, slab_fd: int, look_again: bool) -> None:
    """Serves until the parent says close, or is gone.

    Args:
        connection: A blocking stream socket; frames in, frames out.
        slab_fd: The memory, empty until the first `MAP`.
        look_again: Whether to look for the next request before sleeping.
    """
    _Server(connection, slab_fd, look_again).run()


class _Server:
    def __init__(self, connection: socket.socket, slab_fd: int, look_again: bool) -> None:
        self._connection = connection
        self._look_again = _LookAgain(connection) if look_again else None
        self._core = WorkerCore(self._capture, lambda geometry: self._attach(geometry, slab_fd))
        self._shared = True
        self._closing = False
        self._handlers: dict[int, Callable[[Frame], Any]] = {
            FrameKind.STEP: self._step,
            FrameKind.RESET: self._reset,
            FrameKind.CALL: lambda frame: self._core.call(pickles.loads(frame.payload)),
            FrameKind.SET_ATTR: lambda frame: self._core.set_attr(pickles.loads(frame.payload)),
            FrameKind.BUILD: lambda frame: self._core.build(pickles.loads(frame.payload)),
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
        reply: BatchReply | BuildReply | CallReply | None
        try:
            reply = self._handlers[frame.kind](frame)
        except Exception as exception:  # noqa: BLE001  a request that cannot be unpickled here, above all
            reply = self._refuse(frame, exception)
        if reply is None:
            self._connection.sendall(pack_header(FrameKind.REPLY, frame.seq))
        else:
            self._connection.sendall(pack_frame(FrameKind.REPLY, frame.seq, 0, self._pickled(reply, frame)))

    def _pickled(self, reply: Any, frame: Frame) -> bytes:
        try:
            return pickles.dumps_to_parent(reply)
        except Exception as exception:  # noqa: BLE001  an info or a result that no pickler takes
            return pickles.dumps_to_parent(self._refuse(frame, exception))

    def _refuse(self, frame: Frame, exception: Exception) -> BatchReply | BuildReply | CallReply:
        """The answer to a request that failed as a whole: every env of this worker failed in it."""
        command = FrameKind(frame.kind).name.lower()
        exception.add_note("the worker could not read the request, or could not pickle its answer")
        failures = [self._capture(exception, env_index, command) for env_index in self._core.env_ids]
        if frame.kind == FrameKind.BUILD:
            return BuildReply([], {}, None, failures)
        if frame.kind in (FrameKind.STEP, FrameKind.RESET):
            return BatchReply({}, failures=failures)
        return CallReply([], failures)

    def _step(self, frame: Frame) -> BatchReply | None:
        actions = pickles.loads(frame.payload) if frame.payload else None
        return self._with_rows(self._core.step(frame.buffer, actions), frame.buffer)

    def _reset(self, frame: Frame) -> BatchReply | None:
        return self._with_rows(self._core.reset(frame.buffer, pickles.loads(frame.payload)), frame.buffer)

    def _with_rows(self, reply: BatchReply | None, buffer: int) -> BatchReply | None:
        if self._shared:
            return reply
        return (reply or BatchReply({}))._replace(arrays=self._core.rows(buffer))

    def _map(self, frame: Frame) -> None:
        request = pickles.loads(frame.payload)
        self._shared = request.shared
        self._core.map(request)
        gc.collect()
        gc.freeze()  # what is there now stays: the collector need not walk through it again and again

    def _close(self, _frame: Frame) -> CallReply:
        self._closing = True
        return self._core.close()

    def _attach(self, geometry: Geometry, slab_fd: int) -> Slab:
        slab = Slab.attach(geometry, slab_fd)
        os.close(slab_fd)
        return slab

    def _capture(self, exception: BaseException, env_index: int, command: str) -> FailureRecord:
        return capture(exception, env_index, os.getpid(), command)


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
        end = clock() + _LOOK_SECONDS
        while not poll(0):
            if clock() > end:
                self._skips = self._to_skip = min(2 * self._skips + 1, _MOST_SKIPPED)
                return
            give_way()
        self._skips = 0
