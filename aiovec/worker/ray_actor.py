"""A worker as an actor on a Ray cluster: the same envs behind the same requests, which come as calls.

A call brings a request, which is done in the actor's one thread for it, always the same; so a step costs one call and no
change of threads. It takes back what replies there are when it is done. Others come later: those of envs that do not wait
for each other, and each of many that are asked by one request shall be told as soon as it is there. For these another
call waits, in a thread of its own, and so does one that looks at what the envs do, and one that never ends: it tells
the parent of the actor's end.
"""

from __future__ import annotations

import faulthandler
import importlib
import os
import sys
import tempfile
import threading
from array import array
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from aiovec.exchange.black_box import IDLE, MOST_THREADS, TIMES_PER_ROW, doing_in, readable_stack
from aiovec.exchange.frames import Frame
from aiovec.exchange.in_order import InOrder
from aiovec.exchange.ray_messages import About, Look, Request, Told, by_itself, opened
from aiovec.worker.entry import THREAD_LIMITS, keep_freed_memory

if TYPE_CHECKING:
    from aiovec.exchange.messages import MapRequest
    from aiovec.exchange.slab import Geometry, Slab, Strip
    from aiovec.worker.server import Arrays

__all__ = ["CONCURRENCY_GROUPS", "EnvActor"]

# One thread each; all other calls have one for themselves.
CONCURRENCY_GROUPS = {"more": 1, "look": 1, "until_end": 1}


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
        from aiovec.worker.server import Server  # noqa: PLC0415  heavy, and behind the limits of threads

        self._index = index
        self._link = _CallLink(num_envs, self._reply)
        self._server = Server(self._link)
        self._requests: InOrder[Request] = InOrder()
        self._changed = threading.Condition()  # what follows
        self._replies: list[tuple[int, bytes, Arrays]] = []
        self._num_due = 0  # replies that no call has taken yet
        self._num_told = 0

    def __repr__(self) -> str:
        return f"aiovec worker {self._index}"  # before each line that it prints

    def exchange(self, asked: Any) -> Any:
        """Does what a request asks: takes an `Ask` and gives a `Told`, as `by_itself` makes them."""
        number, num_replies, request = opened(asked)
        with self._changed:
            self._num_due += num_replies
        for its_turn in self._requests.take(number, request):
            self._server.handle(Frame(*its_turn))
        with self._changed:
            return self._tell()

    def more(self) -> Any:
        """The same for replies that come later: waits until there are some, or none is to come."""
        with self._changed:
            while self._num_due and not self._replies:
                self._changed.wait()
            return self._tell()

    def _tell(self) -> Any:
        replies, self._replies = self._replies, []
        self._num_due -= len(replies)
        told = Told(self._num_told, replies, array("d", self._link.times))
        self._num_told += 1
        self._changed.notify_all()
        return by_itself(told, sum(len(data) + sum(column.nbytes for column in arrays) for _, data, arrays in replies))

    def _reply(self, seq: int, data: bytes, arrays: Arrays) -> None:
        """From any thread."""
        with self._changed:
            self._replies.append((seq, data, arrays))
            self._changed.notify_all()

    def about(self) -> About:
        """Where it is."""
        ray: Any = importlib.import_module("ray")
        context = ray.get_runtime_context()
        address = str(ray.util.get_node_ip_address())
        return About(os.getpid(), context.get_node_id(), address, str(context.get_actor_id()))

    def look(self, with_stack: bool) -> Look:
        """What it does."""
        doing = self._link.doing_now()
        return Look(doing, _stack_of_envs() if doing and with_stack else "")

    def until_end(self) -> None:
        """Never returns: who awaits it hears of the actor's end."""
        threading.Event().wait()


class _CallLink:
    """See `aiovec.worker.server.Link`."""

    waits: bool = True

    def __init__(self, num_envs: int, reply: Callable[[int, bytes, Arrays], None]) -> None:
        self.times: list[float] = [0.0] * (1 + TIMES_PER_ROW * num_envs)
        self._lanes = [[IDLE, 0] for _ in range(MOST_THREADS + 2)]
        self._reply = reply

    def doing(self, lane: int) -> list[int]:
        return self._lanes[lane]

    def doing_now(self) -> list[tuple[int, int, int, int]]:
        numbers = [number for lane in self._lanes for number in lane]
        return [(doing.row, int(doing.phase), doing.number, doing.lane) for doing in doing_in(numbers)]

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
    """The Python stacks of the threads that are in an env."""
    with tempfile.TemporaryFile() as dumped:
        faulthandler.dump_traceback(dumped)
        dumped.seek(0)
        threads = dumped.read().decode(errors="replace").split("\n\n")
    return readable_stack("\n\n".join(thread for thread in threads if "/aiovec/worker/" in thread))
