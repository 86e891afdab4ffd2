"""Serves requests from a blocking socket, in a process of its own.

One after the other in the main thread, which has no event loop, so that an env may run one. Where a worker holds async
envs, or shares its envs out to threads, another thread reads the requests, and the main thread is one of the lanes.

Between two requests the main thread looks for the next some 100 microseconds before it sleeps: on a virtual machine a
core that sleeps takes 25-50 µs to wake, which with 64 CartPole is a quarter of a step. It yields its core at every
look and stops looking where that does not pay.
"""

from __future__ import annotations

import functools
import gc
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from aiovec.exchange import pickles, replies, step_each
from aiovec.exchange.answer_slots import AnswerSlots
from aiovec.exchange.black_box import open_black_box
from aiovec.exchange.failures import FailureRecord, capture
from aiovec.exchange.frames import Frame, FrameKind, FrameReader, pack_frame, pack_header
from aiovec.exchange.groups import index_in
from aiovec.exchange.messages import (
    BatchReply,
    BuildReply,
    BuildRequest,
    CallReply,
    CallRequest,
    RebuildRequest,
    ResetRequest,
    SetAttrRequest,
)
from aiovec.exchange.reply_area import ReplyArea
from aiovec.exchange.slab import Geometry, Slab
from aiovec.exchange.tally import NUM_TALLIES, take_last
from aiovec.exchange.wanted import take_wanted
from aiovec.worker.clock import StepClock
from aiovec.worker.core import WorkerCore
from aiovec.worker.host import Work
from aiovec.worker.lanes import Lanes, ThreadLane
from aiovec.worker.travel import dumps_batch_reply, dumps_call_reply

if TYPE_CHECKING:
    import asyncio

__all__ = ["SharedFiles", "serve"]

# On the step path: a name of an enumeration costs 0.1 µs to look up.
_STEP_TOGETHER, _ALL_DONE = FrameKind.STEP_TOGETHER, FrameKind.ALL_DONE
_STEPS = (FrameKind.STEP, _STEP_TOGETHER, FrameKind.STEP_EACH)

_LOOK_SECONDS = 250e-6  # the parent comes back within 30-100 µs, and the slowest worker keeps the others waiting
_MOST_SKIPPED = 63  # waits without a look after many that did not pay

_Reply = TypeVar("_Reply")


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
    _Server(connection, files, look_again).run()


class _Server:
    def __init__(self, connection: socket.socket, files: SharedFiles, look_again: bool) -> None:
        self._connection = connection
        self._sending = threading.Lock()
        self._files = files
        self._look_again = _LookAgain(connection) if look_again else None
        self._is_lock_step = True  # else the parent needs the core: each env wakes it by itself
        self._black_box = open_black_box(files.black_box)
        self._clock = StepClock(self._black_box.times)
        self._core = WorkerCore(self._capture, self._attach, self._black_box.doing(0), self._clock)
        self._reply_areas: list[ReplyArea] = []  # one for each tally
        self._answer_slots: AnswerSlots | None = None
        self._lanes: Lanes | None = None  # without any, all is done in this thread
        self._loop: asyncio.AbstractEventLoop | None = None  # of async envs
        self._is_all_async = False
        self._main_lane = ThreadLane(self._black_box.doing(0), self._clock)
        self._thread_lanes = [self._main_lane]
        self._cancel: Callable[[Sequence[int], bool], None] = lambda _rows, _everything: None
        self._shared = True
        self._closing = False
        self._traceback_locals = False
        self._handlers: dict[int, Callable[[Frame], None]] = {
            FrameKind.STEP_TOGETHER: self._step,
            FrameKind.STEP: self._step,
            FrameKind.STEP_EACH: self._step_each,
            FrameKind.RESET: self._reset,
            FrameKind.CALL: self._call,
            FrameKind.SET_ATTR: self._set_attr,
            FrameKind.BUILD: self._build,
            FrameKind.REBUILD: self._rebuild,
            FrameKind.MAP: self._map,
            FrameKind.GROW: self._grow,
            FrameKind.OBSERVE: self._observe,
            FrameKind.ECHO: self._echo,
            FrameKind.CLOSE: self._close,
        }

    def run(self) -> None:
        connection, reader = self._connection, FrameReader()
        while True:
            if self._look_again is not None and self._is_lock_step and not reader.partial:
                self._look_again()
            received = connection.recv_into(reader.space())
            if not received:
                break
            reader.received(received)
            frames = iter(reader.frames())
            for frame in frames:
                self._handle(frame)
                if self._lanes is not None:
                    self._run_beside_lanes(reader, frames)
                    self._main_lane.run()
                    return
                if self._closing:
                    return
        self._core.closing().do(self._black_box.doing(0), self._clock)  # the parent closed its end without a word

    def _run_beside_lanes(self, reader: FrameReader, begun: Iterator[Frame]) -> None:
        """The same in another thread, behind the requests that were received already.

        Where all envs are async, in that of their loop: a thread more would fight with it for the interpreter's lock,
        which keeps an env from its request for 2 ms where there are many.
        """
        loop = self._loop
        if loop is None or not self._is_all_async:
            thread = threading.Thread(target=self._run_rest, args=(reader, begun), name="aiovec-requests", daemon=True)
            thread.start()
            return

        def begin() -> None:
            if self._go_on(begun):
                loop.add_reader(self._connection.fileno(), read)

        def read() -> None:
            if not self._read(reader):
                loop.remove_reader(self._connection.fileno())

        loop.call_soon_threadsafe(begin)

    def _run_rest(self, reader: FrameReader, begun: Iterator[Frame]) -> None:
        goes_on = self._go_on(begun)
        while goes_on:
            goes_on = self._read(reader)

    def _read(self, reader: FrameReader) -> bool:
        """Handles what one read gives; tells whether there will be more."""
        try:
            received = self._connection.recv_into(reader.space())
        except ConnectionError:
            received = 0
        if not received:
            self._lose()
            return False
        reader.received(received)
        return self._go_on(reader.frames())

    def _go_on(self, frames: Iterable[Frame]) -> bool:
        """Handles requests; tells whether there will be more."""
        try:
            for frame in frames:
                self._handle(frame)
                if self._closing:
                    return False
        except ConnectionError:
            self._lose()
            return False
        return True

    def _lose(self) -> None:
        """The parent is gone, or has closed its end without a word."""
        assert self._lanes is not None  # noqa: S101
        self._cancel(range(len(self._core.env_ids)), True)
        self._lanes.do(self._core.closing().turns, self._main_lane.stop, may_be_cancelled=False)

    def _handle(self, frame: Frame) -> None:
        try:
            self._handlers[frame.kind](frame)
        except ConnectionError:
            raise
        except Exception as exception:  # noqa: BLE001  a request that cannot be unpickled here, above all
            self._refuse(frame, exception, self._core.ids_of_group(frame.group))

    def _do(
        self, frame: Frame, work: Work[_Reply], answer: Callable[[_Reply], None], may_be_cancelled: bool = False
    ) -> None:
        """Does what a request asks, here or in the lanes."""
        if self._lanes is None:
            answer(work.do(self._black_box.doing(0), self._clock))
        else:
            self._lanes.do(work.turns, lambda: self._finish(frame, work, answer), may_be_cancelled)

    def _finish(self, frame: Frame, work: Work[_Reply], answer: Callable[[_Reply], None]) -> None:
        """The last turn of a request has ended, in whichever thread this is."""
        try:
            answer(work.reply())
        except ConnectionError:
            pass  # the parent is gone, and ends us
        except Exception as exception:  # noqa: BLE001  what an env gave has surprised us
            self._refuse(frame, exception, self._core.ids_of_group(frame.group))

    # ---- answers

    def _send(self, frame: bytes) -> None:
        with self._sending:
            self._connection.sendall(frame)

    def _answer(self, seq: int, reply: bytes | None) -> None:
        self._send(pack_header(FrameKind.REPLY, seq) if not reply else pack_frame(FrameKind.REPLY, seq, 0, reply))

    def _answer_together(self, frame: Frame, reply: bytes) -> None:
        seq, index = frame.seq, index_in(frame.group)
        if not self._reply_areas[index].leave(seq, reply):
            self._send(pack_frame(FrameKind.REPLY, seq, 0, reply))
        # Behind the reply: whoever hears that all are done must find the replies of all.
        if take_last(self._files.second_tally if index else self._files.tally):
            self._send(pack_header(_ALL_DONE, seq))

    def _answer_sent(self, frame: Frame, env_index: int, reply: BatchReply | None) -> None:
        """Answers the step of one env that was sent an action, whose answer waits until it is asked for."""
        data = b"" if reply is None and self._shared else self._dumped(frame, reply, [env_index], "step")
        slots = self._answer_slots
        if slots is None or not slots.leave(env_index, frame.seq, data):
            self._answer(frame.seq, data)
        elif take_wanted(self._files.wanted):  # behind the answer: who is woken must find it
            self._send(pack_header(FrameKind.AWAKE, frame.seq))

    def _answer_batch(
        self, frame: Frame, reply: BatchReply | None, answered: Sequence[int] | None, command: str
    ) -> None:
        """Answers a step or a reset of these envs; those of the frame's group, if none are named."""
        if reply is None and self._shared:
            data = b""
        else:
            env_ids = self._core.ids_of_group(frame.group) if answered is None else answered
            data = self._dumped(frame, reply, env_ids, command)
        if frame.kind == _STEP_TOGETHER:
            self._answer_together(frame, data)
        else:
            self._answer(frame.seq, data)

    def _dumped(self, frame: Frame, reply: BatchReply | None, answered: Sequence[int], command: str) -> bytes:
        """What there is to say beside the rows, as bytes."""
        try:
            reply = reply or BatchReply({})
            if not self._shared:
                reply = reply._replace(arrays=self._core.rows(frame.buffer, answered))
            return dumps_batch_reply(reply, answered, command, self._capture_on_the_way)
        except Exception as exception:  # noqa: BLE001  what an env gave has surprised us
            return self._refusal(frame, exception, answered)

    def _refuse(self, frame: Frame, exception: Exception, env_ids: Sequence[int]) -> None:
        """Answers a request that failed as a whole: these envs failed in it."""
        data = self._refusal(frame, exception, env_ids)
        if frame.kind == _STEP_TOGETHER:
            self._answer_together(frame, data)
        else:
            self._answer(frame.seq, data)

    def _refusal(self, frame: Frame, exception: Exception, env_ids: Sequence[int]) -> bytes:
        command = "step" if frame.kind in _STEPS else FrameKind(frame.kind).name.lower()
        exception.add_note("the worker could not read the request, or could not pickle its answer")
        failures = [self._capture(exception, env_index, command) for env_index in env_ids]
        if frame.kind == FrameKind.BUILD:
            return replies.dumps(BuildReply([], {}, None, [], failures))
        if frame.kind in (*_STEPS, FrameKind.RESET, FrameKind.OBSERVE):
            return replies.dumps(BatchReply({}, failures=failures))
        return replies.dumps(CallReply([], failures))

    # ---- requests

    def _build(self, frame: Frame) -> None:
        request = self._build_request(frame.payload)
        if request.num_threads > 1:
            self._open_lanes(request, ())
        self._do(frame, self._core.build(request), lambda reply: self._answer_build(frame, request, reply))

    def _answer_build(self, frame: Frame, request: BuildRequest, reply: BuildReply) -> None:
        if reply.asynchronous:
            self._open_lanes(request, reply.asynchronous)
        work: Work[Any] = self._core.closing() if reply.failures else Work([], lambda: None)
        self._do(frame, work, lambda _reply: self._answer(frame.seq, replies.dumps(reply)))

    def _rebuild(self, frame: Frame) -> None:
        request: RebuildRequest = pickles.loads(frame.payload)
        build = self._build_request(request.build)
        if build.num_threads > 1 or request.asynchronous:
            self._open_lanes(build, request.asynchronous)
        work = self._core.rebuild(build, request.delay, request.lost, request.asynchronous)
        self._do(frame, work, lambda _reply: self._answer(frame.seq, None))

    def _build_request(self, pickled: bytes | memoryview) -> BuildRequest:
        request: BuildRequest = pickles.loads(pickled)
        self._traceback_locals = request.traceback_locals
        return request

    def _open_lanes(self, request: BuildRequest, asynchronous: Sequence[int]) -> None:
        """Shares the envs out: the main thread is one of the threads, async envs have a loop in another."""
        if self._lanes is None:
            others = [
                ThreadLane(self._black_box.doing(number), self._clock) for number in range(1, request.num_threads)
            ]
            for lane in others:
                lane.start()
            self._thread_lanes += others
        by_row: dict[int, Any] = {}
        if asynchronous:
            from aiovec.worker.async_lane import AsyncLane, start_loop  # noqa: PLC0415  asyncio: few workers need it

            doing, overstaying = self._black_box.doing(-2), self._black_box.doing(-1)
            self._loop = start_loop()
            self._is_all_async = len(asynchronous) == len(request.env_ids)
            async_lane = AsyncLane(
                self._loop,
                request.env_ids,
                request.step_timeout,
                request.close_grace,
                doing,
                overstaying,
                self._clock,
            )
            by_row = dict.fromkeys(asynchronous, async_lane)
            self._cancel = lambda rows, everything: async_lane.cancel(
                [row for row in rows if row in by_row], everything=everything
            )
        self._lanes = Lanes([*self._thread_lanes], by_row)

    def _step(self, frame: Frame) -> None:
        self._is_lock_step = True
        actions = pickles.loads(frame.payload) if frame.payload else None
        if self._lanes is None:
            reply = self._core.step(frame.buffer, frame.group, actions)
            self._answer_batch(frame, reply, None, "step")
            return
        self._do(
            frame,
            self._core.stepping(frame.buffer, frame.group, actions),
            lambda reply: self._answer_batch(frame, reply, None, "step"),
            may_be_cancelled=True,
        )

    def _step_each(self, frame: Frame) -> None:
        self._is_lock_step = False
        request, pickled_actions = step_each.loads(frame.payload)
        env_ids = self._core.ids_of(request.rows)
        try:
            if pickled_actions:
                request = request._replace(actions=pickles.loads(pickled_actions))
            actions = self._core.actions_of(request)
        except Exception as exception:  # noqa: BLE001  what a user gave may not load here
            for seq, env_index in enumerate(env_ids, frame.seq):
                self._answer(seq, self._refusal(frame, exception, [env_index]))
            return
        for seq, (row, env_index, action) in enumerate(zip(request.rows, env_ids, actions, strict=True), frame.seq):
            work = self._core.stepping_one(frame.buffer, row, action, request.autoreset)
            own = frame._replace(seq=seq)
            if request.autoreset:
                answer = functools.partial(self._answer_sent, own, env_index)
            else:
                answer = functools.partial(self._answer_batch, own, answered=[env_index], command="step")
            self._do(own, work, answer, may_be_cancelled=True)

    def _reset(self, frame: Frame) -> None:
        request: ResetRequest = pickles.loads(frame.payload)
        rows = range(len(self._core.env_ids)) if request.rows is None else request.rows
        self._cancel(rows, False)  # what is owed to these is not asked for any more
        answered = self._core.answered_by(request)
        self._do(
            frame,
            self._core.resetting(frame.buffer, request),
            lambda reply: self._answer_batch(frame, reply, answered, "reset"),
            may_be_cancelled=True,
        )

    def _call(self, frame: Frame) -> None:
        request: CallRequest = pickles.loads(frame.payload)
        asked = self._core.ids_of(request.rows)
        self._do(
            frame,
            self._core.calling(request),
            lambda reply: self._answer(frame.seq, dumps_call_reply(reply, asked, request.name, self._capture)),
        )

    def _set_attr(self, frame: Frame) -> None:
        request: SetAttrRequest = pickles.loads(frame.payload)
        self._do(frame, self._core.setting(request), lambda reply: self._answer(frame.seq, replies.dumps(reply)))

    def _echo(self, frame: Frame) -> None:
        """Answers behind whatever was asked before."""
        turns = [(row, _no_turn()) for row in range(len(self._core.env_ids))]
        echo = pack_header(FrameKind.ECHO, frame.seq)
        self._do(frame, Work(turns, lambda: None), lambda _reply: self._send(echo))

    def _map(self, frame: Frame) -> None:
        request = pickles.loads(frame.payload)
        self._shared = request.shared
        slab = self._core.map(request)
        if request.num_workers:
            self._reply_areas = [slab.reply_area(request.worker_index, tally) for tally in range(NUM_TALLIES)]
            self._answer_slots = slab.answer_slots()
        gc.freeze()  # what is there now stays: the collector need not walk through it again and again
        self._answer(frame.seq, None)

    def _grow(self, frame: Frame) -> None:
        self._core.grow(pickles.loads(frame.payload), self._files.slab)
        self._answer(frame.seq, None)

    def _observe(self, frame: Frame) -> None:
        self._do(
            frame,
            self._core.observing(frame.buffer),
            lambda reply: self._answer_batch(frame, reply, self._core.env_ids, "observe"),
        )

    def _close(self, frame: Frame) -> None:
        self._closing = True
        self._cancel(range(len(self._core.env_ids)), True)

        def answer(reply: CallReply) -> None:
            self._answer(frame.seq, replies.dumps(reply))
            self._main_lane.stop()

        self._do(frame, self._core.closing(), answer)

    def _attach(self, geometry: Geometry) -> Slab:
        os.set_inheritable(self._files.slab, False)  # it stays open for what is added later
        return Slab.attach(geometry, self._files.slab)

    def _capture_on_the_way(self, exception: BaseException, env_index: int, command: str) -> FailureRecord:
        self._core.host.has_failed(env_index, exception)
        return self._capture(exception, env_index, command)

    def _capture(self, exception: BaseException, env_index: int, command: str) -> FailureRecord:
        return capture(exception, env_index, os.getpid(), command, self._traceback_locals)


def _no_turn() -> Any:
    yield from ()


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
