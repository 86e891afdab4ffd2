"""A worker as an actor on a Ray cluster: the same envs behind the same requests, which come as calls.

The envs live in a thread of their own, always the same; the actor's event loop only takes calls and gives replies, also
while an env is at work. A call brings a request, if any, and takes back what replies there are: at least one, but where
there is none left to wait for. So a step costs one call, and the replies of envs that end one by one come together if
they end together.
"""

from __future__ import annotations

import asyncio
import importlib
import os
import queue
import sys
import threading
from collections import deque
from collections.abc import Iterable, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any, NamedTuple

from aiovec.exchange.black_box import IDLE, MOST_THREADS, TIMES_PER_ROW, doing_in, readable_stack
from aiovec.exchange.frames import Frame
from aiovec.exchange.in_order import InOrder
from aiovec.worker.entry import THREAD_LIMITS, keep_freed_memory

if TYPE_CHECKING:
    from aiovec.exchange.messages import MapRequest
    from aiovec.exchange.slab import Geometry, Slab, Strip
    from aiovec.worker.server import Arrays

__all__ = ["About", "Ask", "EnvActor", "Look", "Told"]


class Ask(NamedTuple):
    """What a call brings.

    Attributes:
        number: Of the call.
        num_replies: How many replies its request will have; 0 where it has none.
        request: A frame.
    """

    number: int
    num_replies: int
    request: tuple[int, int, int, Any, int] | None


class Told(NamedTuple):
    """What a call takes back.

    Attributes:
        number: Of this.
        replies: Of each the number of its request, its bytes, and its rows.
        times: See `exchange.black_box.OpenBlackBox.times`.
    """

    number: int
    replies: Sequence[tuple[int, bytes, Arrays]]
    times: Sequence[float]


class About(NamedTuple):
    """Where an actor is."""

    pid: int
    node_id: str
    address: str
    actor_id: str


class Look(NamedTuple):
    """What an actor does at this moment.

    Attributes:
        doing: See `exchange.black_box.BlackBox.doing`, as plain integers.
        stack: The Python stack of its envs, innermost call first, if asked for.
    """

    doing: Sequence[tuple[int, int, int, int]]
    stack: str


class EnvActor:
    """The actor.

    Args:
        index: Which of the vector's workers.
        num_envs: How many envs it will hold.
        path: The parent's `sys.path`: what it can import from there can be imported here, if it is there.
    """

    def __init__(self, index: int, num_envs: int, path: Sequence[str]) -> None:
        for variable in THREAD_LIMITS:
            os.environ.setdefault(variable, "1")
        sys.path += [entry for entry in path if entry not in sys.path]
        keep_freed_memory()
        self._index = index
        self._link = _CallLink(num_envs, self._reply)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._asked: InOrder[Ask] = InOrder()
        self._replies: list[tuple[int, bytes, Arrays]] = []
        self._num_due = 0  # replies that no call has taken yet
        self._num_told = 0
        self._waiting: deque[asyncio.Future[Told]] = deque()  # the calls, first come, first served
        self._crash: BaseException | None = None
        threading.Thread(target=self._serve, name="aiovec-envs", daemon=True).start()

    def __repr__(self) -> str:
        return f"aiovec worker {self._index}"  # before each line that it prints

    # ---- calls of the parent, on the actor's loop

    async def exchange(self, ask: tuple[Any, ...]) -> tuple[Any, ...]:
        """Takes an `Ask`, gives a `Told`; as plain tuples, which Ray pickles in half the time."""
        self._loop = asyncio.get_running_loop()
        waiting: asyncio.Future[Told] = self._loop.create_future()
        self._waiting.append(waiting)
        for number_replies_request in self._asked.take(ask[0], Ask(*ask)):
            self._num_due += number_replies_request.num_replies
            if number_replies_request.request is not None:
                self._link.put(Frame(*number_replies_request.request))
        self._give()
        return tuple(await waiting)

    async def about(self) -> About:
        """Where it is."""
        ray: Any = importlib.import_module("ray")
        context = ray.get_runtime_context()
        address = str(ray.util.get_node_ip_address())
        return About(os.getpid(), context.get_node_id(), address, str(context.get_actor_id()))

    async def look(self, with_stack: bool) -> Look:
        """What it does."""
        doing = self._link.doing_now()
        return Look(doing, _stack_of_envs() if doing and with_stack else "")

    async def until_end(self) -> None:
        """Never returns: who awaits it hears of the actor's end."""
        await asyncio.Event().wait()

    # ---- replies

    def _serve(self) -> None:
        from aiovec.worker.server import Server  # noqa: PLC0415  heavy, and behind the limits of threads

        try:
            Server(self._link).run()
        except BaseException as exception:  # noqa: BLE001  it is for the parent, who would wait for ever
            self._crash = exception
            if self._loop is not None:
                self._loop.call_soon_threadsafe(self._give)

    def _reply(self, seq: int, data: bytes, arrays: Arrays) -> None:
        """From any thread."""
        assert self._loop is not None  # noqa: S101  what is answered was asked
        self._loop.call_soon_threadsafe(self._take, (seq, data, arrays))

    def _take(self, reply: tuple[int, bytes, Arrays]) -> None:
        self._replies.append(reply)
        self._give()

    def _give(self) -> None:
        """Lets calls return that have something to take, or nothing to wait for."""
        while self._waiting and self._crash is not None:
            self._waiting.popleft().set_exception(self._crash)
        while self._waiting and (self._replies or len(self._waiting) > self._num_due):
            replies, self._replies = self._replies, []
            self._num_due -= len(replies)
            told = Told(self._num_told, replies, self._link.times.copy())
            self._num_told += 1
            self._waiting.popleft().set_result(told)


class _CallLink:
    """See `aiovec.worker.server.Link`."""

    fileno: int | None = None

    def __init__(self, num_envs: int, reply: Any) -> None:
        self.times: list[float] = [0.0] * (1 + TIMES_PER_ROW * num_envs)
        self._lanes = [[IDLE, 0] for _ in range(MOST_THREADS + 2)]
        self._requests: queue.SimpleQueue[Frame] = queue.SimpleQueue()
        self._reply = reply

    def put(self, request: Frame) -> None:
        self._requests.put(request)

    def doing(self, lane: int) -> list[int]:
        return self._lanes[lane]

    def doing_now(self) -> list[tuple[int, int, int, int]]:
        numbers = [number for lane in self._lanes for number in lane]
        return [(doing.row, int(doing.phase), doing.number, doing.lane) for doing in doing_in(numbers)]

    def read(self, is_lock_step: bool) -> Iterable[Frame]:  # noqa: ARG002
        return (self._requests.get(),)

    def attach(self, geometry: Geometry) -> Slab:
        raise NotImplementedError("no memory is shared with a worker on Ray")

    def attach_strip(self, slab: Slab, strip: Strip) -> None:
        raise NotImplementedError("no memory is shared with a worker on Ray")

    def mapped(self, request: MapRequest, slab: Slab) -> None:
        """Nothing is shared."""

    def reply(self, seq: int, data: bytes, arrays: Arrays = ()) -> None:
        self._reply(seq, data, arrays)

    def reply_together(self, frame: Frame, data: bytes) -> None:
        raise NotImplementedError("workers on Ray answer each for itself")

    def reply_sent(self, seq: int, env_index: int, data: bytes, arrays: Arrays) -> None:  # noqa: ARG002
        self._reply(seq, data, arrays)

    def echo(self, seq: int) -> None:
        raise NotImplementedError("workers on Ray answer each for itself")


def _stack_of_envs() -> str:
    """The Python stacks of the threads that are in an env, in the words of `faulthandler`."""
    blocks: list[str] = []
    for ident, frame in sys._current_frames().items():  # noqa: SLF001  documented, for such purposes
        lines: list[str] = []
        current: FrameType | None = frame
        while current is not None:
            code = current.f_code
            lines.append(f'  File "{code.co_filename}", line {current.f_lineno} in {code.co_name}')
            current = current.f_back
        if any("/aiovec/worker/" in line for line in lines) and ident != threading.get_ident():
            blocks.append("\n".join([f"Thread {ident:#018x}:", *lines]))
    return readable_stack("\n\n".join(blocks))
