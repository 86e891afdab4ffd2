"""A worker that is an actor on a Ray cluster: calls out, replies in, and what Ray says of its end.

Ray's references are awaited by their callbacks, which come in a thread of Ray's and go on on the loop: no thread waits
for one, and the loop waits for none. Calls and what they bring back are numbered, since either may overtake another.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from aiovec.errors import EnvTimeoutError, WorkerDied
from aiovec.exchange import pickles, replies, step_each
from aiovec.exchange.actions import ActionColumns
from aiovec.exchange.black_box import TIMES_PER_ROW, Doing, Phase
from aiovec.exchange.frames import Frame, FrameKind
from aiovec.exchange.in_order import InOrder
from aiovec.exchange.messages import RebuildRequest
from aiovec.exchange.ray_messages import LARGE_NBYTES, Ask, by_itself, opened
from aiovec.exchange.replies import Apart
from aiovec.exchange.step_each import StepEachRequest
from aiovec.pool.threads import in_thread
from aiovec.pool.worker import Told

__all__ = ["SHUT_DOWN", "RayWorker"]

SHUT_DOWN = "Ray was shut down"

# Ray tells of the end of an actor that was killed within some ms, unless its node, or the cluster, is gone.
_END_SECONDS = 3.0

# Who looks at an actor has its answer within some ms.
_SILENT_SECONDS = 1.0

_PHASES = {
    FrameKind.BUILD: Phase.BUILD,
    FrameKind.REBUILD: Phase.BUILD,
    FrameKind.RESET: Phase.RESET,
    FrameKind.CALL: Phase.CALL,
    FrameKind.SET_ATTR: Phase.CALL,
}

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


class _Prepared(NamedTuple):
    num_replies: int
    payload: Any


_BARE = _Prepared(1, b"")


class RayWorker:
    """See `aiovec.pool.worker.Worker`.

    Args:
        loop: The running loop.
        index: Which of the vector's workers.
        env_ids: Its envs.
        actor: The handle of an `aiovec.worker.ray_actor.EnvActor`, just created; Ray may have no place for it yet.
        is_ray_there: Whether there is a Ray: without one, a call would start, or join, another.
        kill: Ends an actor.
        told: What to call.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        index: int,
        env_ids: range,
        actor: Any,
        is_ray_there: Callable[[], bool],
        kill: Callable[[Any], None],
        told: Told,
    ) -> None:
        self.index = index
        self.env_ids = env_ids
        self.pid: int = 0
        self.place: str = "on Ray, not begun"
        self.alive: bool = True
        self.exitcode: int | None = None
        self.ended: asyncio.Event = asyncio.Event()
        self.is_condemned: bool = False
        self._loop = loop
        self._actor = actor
        self._is_ray_there = is_ray_there
        self._kill = kill
        self._replied, self._resume, self._died = told
        self._exchange = actor.exchange.remote
        self._more = actor.more.options(concurrency_group="more").remote
        self._look = actor.look.options(concurrency_group="look").remote
        self._sending: set[asyncio.Task[None]] = set()  # requests that a thread hands to Ray
        self._held: list[Callable[[], None]] | None = []  # requests, until it has told where it is
        self._num_calls = 0
        self._num_waiting = 0  # calls that have not come back
        self._is_more_asked = False
        self._num_due = 0  # replies that are to come
        self._told: InOrder[Sequence[tuple[int, bytes, Sequence[Any]]]] = InOrder()
        self._close_seq = -1
        self._times: Sequence[float] = ()
        self._doing: Sequence[Doing] = ()
        self._last_kind: int = FrameKind.BUILD
        self._num_looks = 0
        self._looking_since: float | None = None
        self._stack = ""
        self._verdict: EnvTimeoutError | None = None
        self._call(actor.about.options(concurrency_group="look").remote, self._began)
        self._call(actor.until_end.options(concurrency_group="until_end").remote, self._failed)

    def __repr__(self) -> str:
        return f"<RayWorker {self.index} pid={self.pid} alive={self.alive} {self.place}>"

    # ---- requests

    def prepare(self, message: Any) -> _Prepared:
        if message is None:
            return _BARE
        if type(message) is StepEachRequest:
            return _Prepared(len(message.rows), step_each.dumps(message))
        if type(message) is RebuildRequest:  # it bears what another worker was sent
            message = replace(message, build=message.build.payload)
        return _Prepared(1, message if type(message) is ActionColumns else pickles.dumps_to_worker(message))

    def post(self, kind: int, seq: int, buffer: int, prepared: _Prepared, group: int = 0) -> None:
        self._last_kind = kind
        if kind == FrameKind.CLOSE:
            self._close_seq = seq
        number, self._num_calls = self._num_calls, self._num_calls + 1
        self._num_due += prepared.num_replies
        self._num_waiting += 1
        ask = partial(self._ask, kind, seq, buffer, group, number, prepared)
        if self._held is None:
            ask()
        else:
            self._held.append(ask)

    def _ask(self, kind: int, seq: int, buffer: int, group: int, number: int, prepared: _Prepared) -> None:
        payload = prepared.payload
        nbytes = sum(column.nbytes for column in payload.arrays) if type(payload) is ActionColumns else len(payload)
        ask = by_itself(Ask(number, prepared.num_replies, (int(kind), seq, buffer, payload, group)), nbytes)
        if nbytes < LARGE_NBYTES:
            self._call(self._exchange, self._returned, ask)
        else:
            task = self._loop.create_task(self._call_with_much(ask), name=f"aiovec: a request to worker {self.index}")
            self._sending.add(task)
            task.add_done_callback(self._sending.discard)
        if prepared.num_replies > 1:
            self._ask_more()

    def _ask_more(self) -> None:
        """To be there when an env ends, and not only when all of its request have."""
        if not self._is_more_asked:
            self._is_more_asked = True
            self._num_waiting += 1
            self._call(self._more, self._more_returned)

    def _call(self, function: Callable[..., Any], returned: Callable[[Future[Any]], None], *arguments: Any) -> None:
        try:
            if not self._is_ray_there():
                raise RuntimeError(SHUT_DOWN)
            reference = function(*arguments)
        except Exception as error:  # noqa: BLE001  whatever Ray says: the worker is lost, which its owner is told by the loop
            self._loop.call_soon(self.lose, error)
        else:
            self._listen(reference, returned)

    async def _call_with_much(self, ask: Any) -> None:
        """Where Ray's object store has to take it, which may have to make room first."""
        try:
            if not self._is_ray_there():
                raise RuntimeError(SHUT_DOWN)
            reference = await in_thread(self._exchange, ask)
        except Exception as error:  # noqa: BLE001  whatever Ray says: the worker is lost, which its owner is told
            self.lose(error)
        else:
            self._listen(reference, self._returned)

    def unpack(self, payload: Any) -> Any:
        return replies.loads(payload)

    def failed_envs(self, payload: Any) -> Sequence[tuple[int, int]]:
        return replies.failed_envs(payload)

    # ---- what comes back

    def _listen(self, reference: Any, arrived: Callable[[Future[Any]], None]) -> None:
        def tell(future: Future[Any]) -> None:  # in a thread of Ray's
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody asks any more
                self._loop.call_soon_threadsafe(arrived, future)

        reference.future().add_done_callback(tell)

    def _more_returned(self, future: Future[Any]) -> None:
        self._is_more_asked = False
        self._returned(future)

    def _returned(self, future: Future[Any]) -> None:
        """A call has come back."""
        if self.ended.is_set():
            return
        if (error := future.exception()) is not None:
            self.lose(error)
            return
        number, came, self._times = opened(future.result())
        self._num_waiting -= 1
        self._num_due -= len(came)
        for told in self._told.take(number, came):
            for seq, data, arrays in told:
                self._take(seq, Apart(data, arrays) if arrays else data)
        if self._num_due and not self._num_waiting:
            self._ask_more()
        self._resume()

    def _take(self, seq: int, payload: Any) -> None:
        if not self.is_condemned:
            self._replied(self.index, Frame(FrameKind.REPLY, seq, 0, payload))
        if seq == self._close_seq:
            self.kill()

    def _began(self, future: Future[Any]) -> None:
        if future.exception() is None:
            self.pid, node_id, address, actor_id = future.result()
            self.place = f"on Ray node {node_id[:12]} at {address}, actor {actor_id[:12]}"
        held, self._held = self._held, None
        for ask in held or ():  # whatever becomes of it: its death can say where it was
            ask()

    def _failed(self, future: Future[Any]) -> None:
        self.lose(future.exception() or RuntimeError("the actor has ended"))

    # ---- its end

    def signal(self, number: int) -> None:
        """An actor knows no signal but its end."""
        if number in (signal.SIGKILL, signal.SIGTERM):
            self._kill(self._actor)

    def kill(self) -> None:
        self.alive = False
        self._kill(self._actor)
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._loop.call_later, _END_SECONDS, self.ended.set)

    def terminate(self) -> None:
        self.alive = False
        self._kill(self._actor)
        self.ended.set()

    def lose(self, error: BaseException) -> None:
        """The actor is gone, or of no use any more: a call of it will not come back."""
        if self.ended.is_set():
            return
        was_alive, self.alive = self.alive, False
        self._kill(self._actor)
        self.ended.set()
        if was_alive:
            self._died(self.index, self._verdict or self._obituary(error))
        self._resume()

    def _obituary(self, error: BaseException) -> WorkerDied:
        error = getattr(error, "cause", None) or error  # Ray wraps what a call has raised
        told = _COLOURS.sub("", str(error))
        cause = "\n".join(line.strip() for line in told.splitlines() if line.strip()) or type(error).__name__
        return WorkerDied(self.env_ids, self.pid, None, None, "", place=self.place, cause=cause)

    # ---- what it does

    @property
    def doing(self) -> Sequence[Doing]:
        return self._doing

    @property
    def times(self) -> Sequence[float]:
        return self._times or [0.0] * (1 + TIMES_PER_ROW * len(self.env_ids))

    def look(self) -> None:
        if not self.alive or not self.pid:
            return
        now = self._loop.time()
        if self._looking_since is None:
            self._looking_since = now
            self._num_looks += 1
            self._call(self._look, self._looked, False)
        elif now - self._looking_since > _SILENT_SECONDS:
            # It is stopped, or in C code that keeps Python's lock, or cut off. Until it answers it counts as being in a
            # call of each of its envs.
            phase = _PHASES.get(FrameKind(self._last_kind), Phase.STEP)
            self._doing = [Doing(row, phase, self._num_looks, 0) for row in range(len(self.env_ids))]

    def _looked(self, future: Future[Any]) -> None:
        self._looking_since = None
        if future.exception() is None:
            self._doing = [Doing(row, Phase(phase), number, lane) for row, phase, number, lane in future.result().doing]

    def ask_stack(self) -> None:
        self._stack = ""
        self._call(self._look, self._stack_came, True)

    def _stack_came(self, future: Future[Any]) -> None:
        if future.exception() is None:
            self._stack = future.result().stack

    @property
    def stack_nbytes(self) -> int:
        return len(self._stack)

    @property
    def stack(self) -> str:
        return self._stack

    def kill_as(self, verdict: EnvTimeoutError) -> None:
        self._verdict = verdict
        self._kill(self._actor)
        self._loop.call_later(_END_SECONDS, self.lose, verdict)
