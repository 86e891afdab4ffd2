"""Serves requests from a blocking socket, in a process of its own, which shares memory with the parent.

Between two requests the main thread looks for the next some 100 microseconds before it sleeps: on a virtual machine a
core that sleeps takes 25-50 µs to wake, which with 64 CartPole is a quarter of a step. It yields its core at every
look and stops looking where that does not pay.
"""

from __future__ import annotations

import os
import select
import socket
import threading
import time
from collections.abc import Iterable
from typing import NamedTuple

from aiovec.exchange import replies
from aiovec.exchange.answer_slots import AnswerSlots
from aiovec.exchange.black_box import open_black_box
from aiovec.exchange.frames import Frame, FrameKind, FrameReader, pack_frame, pack_header
from aiovec.exchange.groups import index_in
from aiovec.exchange.messages import MapRequest
from aiovec.exchange.reply_area import ReplyArea
from aiovec.exchange.slab import Geometry, Slab, Strip
from aiovec.exchange.tally import NUM_TALLIES, take_last
from aiovec.exchange.wanted import take_wanted
from aiovec.worker.server import Arrays, Server

__all__ = ["SharedFiles", "serve"]

_REPLY, _ALL_DONE = FrameKind.REPLY, FrameKind.ALL_DONE  # on the step path: to look up such a name costs 0.1 µs

_LOOK_SECONDS = 250e-6  # the parent comes back within 30-100 µs, and the slowest worker keeps the others waiting
_MOST_SKIPPED = 63  # waits without a look after many that did not pay


class SharedFiles(NamedTuple):
    """Descriptors of what a worker shares with the parent, beside their connection.

    Attributes:
        slab: The memory, empty until the first `MAP`.
        tally: See `aiovec.exchange.tally`.
        second_tally: Of the second group of envs, where they are stepped in groups.
        wanted: See `aiovec.exchange.wanted`.
        black_box: See `aiovec.exchange.black_box`.
    """

    slab: int
    tally: int
    second_tally: int
    wanted: int
    black_box: int


def serve(connection: socket.socket, files: SharedFiles, look_again: bool) -> None:
    """Serves until the parent says close, or is gone.

    Args:
        connection: A blocking stream socket; frames in, frames out.
        files: What else is shared.
        look_again: Whether to look for the next request before sleeping.
    """
    link = _SocketLink(connection, files, look_again)
    Server(link).run(link)


class _SocketLink:
    """See `aiovec.worker.server.Link`, and `Requests`."""

    waits: bool = False

    def __init__(self, connection: socket.socket, files: SharedFiles, look_again: bool) -> None:
        self._connection = connection
        self._sending = threading.Lock()
        self._files = files
        self._look_again = _LookAgain(connection) if look_again else None
        self._reader = FrameReader()
        self._reply_areas: list[ReplyArea] = []  # one for each tally
        self._answer_slots: AnswerSlots | None = None
        black_box = open_black_box(files.black_box)
        self.doing = black_box.doing
        self.times = black_box.times
        self.fileno: int = connection.fileno()

    def read(self, is_lock_step: bool) -> Iterable[Frame] | None:
        reader = self._reader
        if is_lock_step and self._look_again is not None and not reader.partial:
            self._look_again()
        received = self._connection.recv_into(reader.space())
        if not received:
            return None
        reader.received(received)
        return reader.frames()

    def attach(self, geometry: Geometry) -> Slab:
        os.set_inheritable(self._files.slab, False)  # it stays open for what is added later
        return Slab.attach(geometry, self._files.slab)

    def attach_strip(self, slab: Slab, strip: Strip) -> None:
        slab.attach_strip(strip, self._files.slab)

    def mapped(self, request: MapRequest, slab: Slab) -> None:
        if request.num_workers:
            self._reply_areas = [slab.reply_area(request.worker_index, tally) for tally in range(NUM_TALLIES)]
            self._answer_slots = slab.answer_slots()

    def reply(self, seq: int, data: bytes, arrays: Arrays = ()) -> None:
        if arrays:
            data = replies.with_arrays(data, arrays)
        self._send(pack_frame(_REPLY, seq, 0, data) if data else pack_header(_REPLY, seq))

    def reply_together(self, frame: Frame, data: bytes) -> None:
        seq, index = frame.seq, index_in(frame.group)
        if not self._reply_areas[index].leave(seq, data):
            self.reply(seq, data)
        # Behind the reply: whoever hears that all are done must find the replies of all.
        if take_last(self._files.second_tally if index else self._files.tally):
            self._send(pack_header(_ALL_DONE, seq))

    def reply_sent(self, seq: int, env_index: int, data: bytes, arrays: Arrays) -> None:
        slots = self._answer_slots
        if slots is None or not slots.leave(env_index, seq, data):
            self.reply(seq, data, arrays)
        elif take_wanted(self._files.wanted):  # behind the answer: who is woken must find it
            self._send(pack_header(FrameKind.AWAKE, seq))

    def echo(self, seq: int) -> None:
        self._send(pack_header(FrameKind.ECHO, seq))

    def _send(self, frame: bytes) -> None:
        with self._sending:
            self._connection.sendall(frame)


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
