"""Serves the requests of a parent, in whichever way they come: each is done, and answered.

One after the other in the thread that runs it, which has no event loop, so that an env may run one. Where a worker
holds async envs, or shares its envs out to threads, another thread reads the requests, and this one is one of the lanes.
"""

from __future__ import annotations

import functools
import gc
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy.typing as npt

from aiovec.errors import add_note
from aiovec.exchange import pickles, replies, step_each
from aiovec.exchange.actions import ActionColumns
from aiovec.exchange.failures import FailureRecord, capture
from aiovec.exchange.frames import Frame, FrameKind
from aiovec.exchange.messages import (
    BatchReply,
    BuildReply,
    BuildRequest,
    CallReply,
    CallRequest,
    MapRequest,
    RebuildRequest,
    ResetRequest,
    SetAttrRequest,
)
from aiovec.exchange.slab import Geometry, Slab, Strip
from aiovec.worker.clock import StepClock
from aiovec.worker.core import WorkerCore
from aiovec.worker.host import Work
from aiovec.worker.lanes import InlineLane, Lane, Lanes, ThreadLane
from aiovec.worker.travel import dumps_batch_reply, dumps_call_reply
from aiovec.worker.turns import Doing

if TYPE_CHECKING:
    import asyncio

__all__ = ["Arrays", "Link", "Requests", "Server"]

# On the step path: a name of an enumeration costs 0.1 µs to look up.
_STEP_TOGETHER = FrameKind.STEP_TOGETHER
_STEPS = (FrameKind.STEP, _STEP_TOGETHER, FrameKind.STEP_EACH)

Arrays = Sequence[npt.NDArray[Any]]

_Reply = TypeVar("_Reply")


class Requests(Protocol):
    """Where requests are read.

    Attributes:
        fileno: Where an event loop sees that there is something to read.
    """

    fileno: int

    def read(self, is_lock_step: bool) -> Iterable[Frame] | None:
        """Waits for the next requests, and gives those that are complete; `None`: the parent is gone."""


class Link(Protocol):
    """The way back to the parent, and what is shared with it.

    Attributes:
        times: See `exchange.black_box.OpenBlackBox.times`.
        waits: Whether who brings a request waits until it is done, or handed to a lane, and brings the next one then, in
            the same thread; else requests are read.
    """

    times: Any
    waits: bool

    def doing(self, lane: int) -> Doing:
        """See `exchange.black_box.OpenBlackBox.doing`."""
        raise NotImplementedError

    def attach(self, geometry: Geometry) -> Slab:
        """The memory that is shared."""
        raise NotImplementedError

    def attach_strip(self, slab: Slab, strip: Strip) -> None:
        """Another strip of it."""

    def mapped(self, request: MapRequest, slab: Slab) -> None:
        """The slab is mapped."""

    def reply(self, seq: int, data: bytes, arrays: Arrays = ()) -> None:
        """Answers request `seq`; `arrays` are the rows, where no memory is shared."""

    def reply_together(self, frame: Frame, data: bytes) -> None:
        """Answers a step that all workers take together."""

    def reply_sent(self, seq: int, env_index: int, data: bytes, arrays: Arrays) -> None:
        """Answers the step of an env that was sent an action, whose answer waits until it is asked for."""

    def echo(self, seq: int) -> None:
        """Answers an `ECHO`."""


class Server:
    """A worker behind a link: either requests are brought to `handle`, or `run` reads them.

    Args:
        link: Replies out.
    """

    def __init__(self, link: Link) -> None:
        self._link = link
        self._is_lock_step = True  # else the parent needs the core: each env wakes it by itself
        self._clock = StepClock(link.times)
        self._core = WorkerCore(self._capture, link.attach, link.doing(0), self._clock)
        self._lanes: Lanes | None = None  # without any, all is done in this thread
        self._loop: asyncio.AbstractEventLoop | None = None  # of async envs
        self._is_all_async = False
        self._main_lane = ThreadLane(link.doing(0), self._clock)
        self._thread_lanes: list[Lane] = [self._main_lane]
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

    def run(self, requests: Requests) -> None:
        """Serves until the parent says close, or is gone."""
        while (complete := requests.read(self._is_lock_step)) is not None:
            frames = iter(complete)
            for frame in frames:
                self.handle(frame)
                if self._lanes is not None:
                    self._run_beside_lanes(requests, frames)
                    self._main_lane.run()
                    return
                if self._closing:
                    return
        self._core.closing().do(self._link.doing(0), self._clock)  # the parent closed its end without a word

    def _run_beside_lanes(self, requests: Requests, begun: Iterator[Frame]) -> None:
        """The same in another thread, behind the requests that were received already.

        Where all envs are async, in that of their loop: a thread more would fight with it for the interpreter's lock,
        which keeps an env from its request for 2 ms where there are many.
        """
        loop = self._loop
        if loop is None or not self._is_all_async:
            thread = threading.Thread(
                target=self._run_rest, args=(requests, begun), name="aiovec-requests", daemon=True
            )
            thread.start()
            return

        def begin() -> None:
            if self._go_on(begun):
                loop.add_reader(requests.fileno, read)

        def read() -> None:
            if not self._read(requests):
                loop.remove_reader(requests.fileno)

        loop.call_soon_threadsafe(begin)

    def _run_rest(self, requests: Requests, begun: Iterator[Frame]) -> None:
        goes_on = self._go_on(begun)
        while goes_on:
            goes_on = self._read(requests)

    def _read(self, requests: Requests) -> bool:
        """Handles what one read gives; tells whether there will be more."""
        try:
            frames = requests.read(False)
        except ConnectionError:
            frames = None
        if frames is None:
            self._lose()
            return False
        return self._go_on(frames)

    def _go_on(self, frames: Iterable[Frame]) -> bool:
        """Handles requests; tells whether there will be more."""
        try:
            for frame in frames:
                self.handle(frame)
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

    def handle(self, frame: Frame) -> None:
        """Does what a request asks, or hands it to a lane."""
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
            answer(work.do(self._link.doing(0), self._clock))
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

    def _answer_sent(self, frame: Frame, env_index: int, reply: BatchReply | None) -> None:
        """Answers the step of one env that was sent an action."""
        data = b"" if reply is None else self._dumped(frame, reply, [env_index], "step")
        self._link.reply_sent(frame.seq, env_index, data, self._arrays(frame, [env_index]))

    def _answer_batch(
        self, frame: Frame, reply: BatchReply | None, answered: Sequence[int] | None, command: str
    ) -> None:
        """Answers a step or a reset of these envs; those of the frame's group, if none are named."""
        if reply is None and self._shared:
            data, arrays = b"", []
        else:
            env_ids = self._core.ids_of_group(frame.group) if answered is None else answered
            data = b"" if reply is None else self._dumped(frame, reply, env_ids, command)
            arrays = self._arrays(frame, env_ids)
        if frame.kind == _STEP_TOGETHER:
            self._link.reply_together(frame, data)
        else:
            self._link.reply(frame.seq, data, arrays)

    def _arrays(self, frame: Frame, answered: Sequence[int]) -> list[npt.NDArray[Any]]:
        """The rows of these envs, where no memory is shared."""
        return [] if self._shared else self._core.rows(frame.buffer, answered)

    def _dumped(self, frame: Frame, reply: BatchReply, answered: Sequence[int], command: str) -> bytes:
        """What there is to say beside the rows, as bytes."""
        try:
            return dumps_batch_reply(reply, answered, command, self._capture_on_the_way)
        except Exception as exception:  # noqa: BLE001  what an env gave has surprised us
            return self._refusal(frame, exception, answered)

    def _refuse(self, frame: Frame, exception: Exception, env_ids: Sequence[int]) -> None:
        """Answers a request that failed as a whole: these envs failed in it."""
        data = self._refusal(frame, exception, env_ids)
        if frame.kind == _STEP_TOGETHER:
            self._link.reply_together(frame, data)
        else:
            self._link.reply(frame.seq, data)

    def _refusal(self, frame: Frame, exception: Exception, env_ids: Sequence[int]) -> bytes:
        command = "step" if frame.kind in _STEPS else FrameKind(frame.kind).name.lower()
        add_note(exception, "the worker could not read the request, or could not pickle its answer")
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
        self._do(frame, work, lambda _reply: self._link.reply(frame.seq, replies.dumps(reply)))

    def _rebuild(self, frame: Frame) -> None:
        request: RebuildRequest = pickles.loads(frame.payload)
        build = self._build_request(request.build)
        if build.num_threads > 1 or request.asynchronous:
            self._open_lanes(build, request.asynchronous)
        work = self._core.rebuild(build, request.delay, request.lost, request.asynchronous)
        self._do(frame, work, lambda _reply: self._link.reply(frame.seq, b""))

    def _build_request(self, pickled: bytes | memoryview) -> BuildRequest:
        request: BuildRequest = pickles.loads(pickled)
        self._traceback_locals = request.traceback_locals
        return request

    def _open_lanes(self, request: BuildRequest, asynchronous: Sequence[int]) -> None:
        """Shares the envs out: the main thread is one of the threads, async envs have a loop in another."""
        if self._lanes is None:
            others = [ThreadLane(self._link.doing(number), self._clock) for number in range(1, request.num_threads)]
            if self._link.waits and others:  # nobody runs the main thread's
                self._main_lane.start()
            for lane in others:
                lane.start()
            self._thread_lanes += others
            if self._link.waits and not others:  # they stay in the thread that has built them
                self._thread_lanes = [InlineLane(self._link.doing(0), self._clock)]
        by_row: dict[int, Any] = {}
        if asynchronous:
            from aiovec.worker.async_lane import AsyncLane, start_loop  # noqa: PLC0415  asyncio: few workers need it

            doing, overstaying = self._link.doing(-2), self._link.doing(-1)
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
        actions = _given(frame.payload) if frame.payload else None
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
                self._link.reply(seq, self._refusal(frame, exception, [env_index]))
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
            lambda reply: self._link.reply(frame.seq, dumps_call_reply(reply, asked, request.name, self._capture)),
        )

    def _set_attr(self, frame: Frame) -> None:
        request: SetAttrRequest = pickles.loads(frame.payload)
        self._do(frame, self._core.setting(request), lambda reply: self._link.reply(frame.seq, replies.dumps(reply)))

    def _echo(self, frame: Frame) -> None:
        """Answers behind whatever was asked before."""
        turns = [(row, _no_turn()) for row in range(len(self._core.env_ids))]
        self._do(frame, Work(turns, lambda: None), lambda _reply: self._link.echo(frame.seq))

    def _map(self, frame: Frame) -> None:
        request: MapRequest = pickles.loads(frame.payload)
        self._shared = request.shared
        self._link.mapped(request, self._core.map(request))
        gc.freeze()  # what is there now stays: the collector need not walk through it again and again
        self._link.reply(frame.seq, b"")

    def _grow(self, frame: Frame) -> None:
        self._link.attach_strip(self._core.slab, pickles.loads(frame.payload))
        self._link.reply(frame.seq, b"")

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
            self._link.reply(frame.seq, replies.dumps(reply))
            self._main_lane.stop()

        self._do(frame, self._core.closing(), answer)

    def _capture_on_the_way(self, exception: BaseException, env_index: int, command: str) -> FailureRecord:
        self._core.host.has_failed(env_index, exception)
        return self._capture(exception, env_index, command)

    def _capture(self, exception: BaseException, env_index: int, command: str) -> FailureRecord:
        return capture(exception, env_index, os.getpid(), command, self._traceback_locals)


def _given(payload: Any) -> Any:
    """The actions of a request, which are arrays that came by themselves, or pickled."""
    return payload if type(payload) is ActionColumns else pickles.loads(payload)


def _no_turn() -> Any:
    yield from ()
