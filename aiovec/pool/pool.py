"""The workers of one started vector: calls out, replies in, start and end.

A call whose task was cancelled stays pending, and its replies are still taken; what becomes of them is told
by `states`. Each method here that changes something is synchronous.
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from itertools import pairwise
from typing import Any, TypeVar

import anyio.to_thread
import numpy.typing as npt

from aiovec.errors import ClosedEnvironmentError, CrashLoopError, WorkerStartError
from aiovec.exchange.black_box import Doing
from aiovec.exchange.frames import Frame, FrameKind
from aiovec.exchange.messages import RebuildRequest, ResetRequest
from aiovec.exchange.reply_area import ReplyArea
from aiovec.exchange.slab import Geometry, Slab, create_memory_file
from aiovec.exchange.tally import Tally
from aiovec.pool.answer import Answer
from aiovec.pool.in_process import InProcessWorker
from aiovec.pool.local import Death, LocalWorker
from aiovec.pool.mending import Mending
from aiovec.pool.pending_call import PendingCall
from aiovec.pool.process import WorkerProcess
from aiovec.pool.restarts import GIVEN_UP, Restarts
from aiovec.pool.ring import HOME, Ring
from aiovec.pool.states import EnvStates
from aiovec.pool.watch import Watch, end_stuck

__all__ = ["Pool", "split_envs", "usable_cpus"]

_Result = TypeVar("_Result")

_BATCH_KINDS = frozenset({FrameKind.STEP, FrameKind.STEP_TOGETHER, FrameKind.RESET})


def usable_cpus() -> int:
    """How many CPUs this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def split_envs(num_envs: int, num_workers: int) -> list[range]:
    """The contiguous envs of each worker, as even as can be."""
    share, rest = divmod(num_envs, num_workers)
    bounds = [index * share + min(index, rest) for index in range(num_workers + 1)]
    return [range(start, stop) for start, stop in pairwise(bounds)]


class Pool:
    """The workers of one vector.

    Args:
        loop: The running loop; everything here happens on it.
        num_envs: How many envs.
        num_workers: How many processes; 0 for none.
        context: See `AsyncVectorEnv`.
        shared_memory: See `AsyncVectorEnv`.
        start_timeout: See `AsyncVectorEnv`; of a worker that takes a dead one's place, too.
        step_timeout: See `AsyncVectorEnv`.
        restarts: The budget, where failed envs are built anew without being asked.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        num_envs: int,
        num_workers: int,
        context: str | None,
        shared_memory: bool,
        start_timeout: float,
        step_timeout: float | None,
        restarts: Restarts | None,
    ) -> None:
        self.loop = loop
        self._thread = threading.get_ident()
        self.states: EnvStates = EnvStates(num_envs)
        self.workers: list[LocalWorker | InProcessWorker] = []
        self.shared: bool = shared_memory or num_workers == 0
        self._env_ids = split_envs(num_envs, num_workers or 1)
        self._num_workers = num_workers
        self._context = context
        self._slab_fd = -1
        self._tally: Tally | None = None
        self._start_timeout = start_timeout
        # Whether a step is answered by the tally: one worker has nobody to wait for, and rows that are sent wake us.
        self._may_be_together = num_workers > 1 and shared_memory
        self._together = self._may_be_together
        self._apart_since = 0  # the number of the last call before a worker died, or took another's place
        self._watch: Watch | None = None
        if step_timeout is not None or restarts is not None:
            self._watch = Watch(loop, step_timeout or float("inf"), start_timeout, self._stuck)
        self._calls: dict[int, PendingCall] = {}
        self._answered: list[Answer] = []  # complete, and to be resumed when the callback at hand ends
        self._reply_areas: list[ReplyArea] = []
        self._untold: list[Death | CrashLoopError] = []
        self._deaths: dict[int, Death] = {}  # as they were first told, by worker
        self._blueprints: list[tuple[Any, Any]] = []  # what a worker is sent at its start: BUILD, MAP
        self._rebuilding: dict[int, asyncio.TimerHandle] = {}  # by the number of the request; ends what takes too long
        self._mapping: set[int] = set()
        self._seq = 0
        self._bare_requests: Mapping[int, Any] = {}
        self.mending: Mending | None = None if restarts is None else Mending(restarts, self.workers, self._replace)
        self.slab: Slab | None = None
        self.ring: Ring | None = None

    def __repr__(self) -> str:
        return f"<Pool workers={len(self.workers)} calls={list(self._calls.values())} {self.states!r}>"

    # ---- start

    async def start_workers(self) -> None:
        """Starts every process, one after the other without waiting for any, and connects to it."""
        if not self._num_workers:
            self.workers.append(InProcessWorker(self._env_ids[0], self._in_process_slab, self._replied, self._resume))
            return
        try:
            self._tally = Tally(self._num_workers)
            self._slab_fd = create_memory_file()
        except OSError as error:
            raise WorkerStartError(range(self._env_ids[-1].stop), error) from error
        for index in range(self._num_workers):
            self.workers.append(self._start_worker(index))
            await asyncio.sleep(0)

    def _start_worker(self, index: int) -> LocalWorker:
        assert self._tally is not None  # noqa: S101
        env_ids, look_again = self._env_ids[index], self._num_workers <= usable_cpus()
        try:
            process = WorkerProcess(
                self._context, self._slab_fd, self._tally.worker_fd, look_again, f"aiovec-worker-{index}"
            )
            worker = LocalWorker(index, env_ids, process, self._replied, self._resume, self._died)
            try:
                worker.watch(self.loop)
            except BaseException:
                worker.terminate()
                raise
        except OSError as error:
            raise WorkerStartError(env_ids, error) from error
        return worker

    def keep_blueprints(self, builds: Mapping[int, Any], maps: Mapping[int, Any]) -> None:
        """Takes what each worker was sent at its start, for one that takes its place."""
        self._blueprints = [(builds[worker.index], maps[worker.index]) for worker in self.workers]

    def replace_dead(self, indices: Iterable[int]) -> None:
        """Starts a worker in the place of each of these that died; what is posted next is served once it is there.

        Raises:
            WorkerStartError: The system gave none; the rest is as it was.
        """
        for index in indices:
            if not self.workers[index].alive:
                self._replace(index)

    def _replace(self, index: int, delay: float = 0.0, lost: Sequence[int] = ()) -> None:
        worker = self._start_worker(index)
        self.workers[index] = worker
        del self._deaths[index]
        # Who asks for a reset has no use for a death that nobody was told of.
        self._untold = [untold for untold in self._untold if not set(untold.env_ids) & set(worker.env_ids)]
        if self.mending is None:
            for env_index in worker.env_ids:
                self.states.break_(env_index, "must be reset, after the death of its worker")
        else:
            self.states.forget(worker.env_ids)
        build, mapping = self._blueprints[index]
        request = worker.prepare(RebuildRequest(build, delay, [env_index - worker.env_ids.start for env_index in lost]))
        seq, timeout = self.next_seq(), self._start_timeout + delay
        self._rebuilding[seq] = self.loop.call_later(timeout, self._rebuilds_too_long, seq, worker)
        worker.post(FrameKind.REBUILD, seq, HOME, request)
        seq = self.next_seq()
        self._mapping.add(seq)
        worker.post(FrameKind.MAP, seq, HOME, mapping)
        self._apart_since = seq

    def _rebuilds_too_long(self, seq: int, worker: LocalWorker) -> None:
        if self._rebuilding.pop(seq, None) is not None and worker.alive:
            doing = worker.doing
            late = worker.env_ids if doing is None else [worker.env_ids[doing.row]]
            end_stuck(self.loop, worker, doing, late, "build", self._start_timeout)

    def _stuck(self, index: int, doing: Doing, seconds: float) -> None:
        worker = self.workers[index]
        end_stuck(self.loop, worker, doing, [worker.env_ids[doing.row]], doing.phase.name.lower(), seconds)

    async def map_slab(self, geometry: Geometry, lend: bool) -> None:
        """Reserves the memory, now that its size is known."""
        if self.shared and self._slab_fd >= 0:
            self.slab = await anyio.to_thread.run_sync(Slab.allocate, geometry, self._slab_fd)
        else:
            self.slab = Slab.private(geometry)
        self.ring = Ring(self.slab, lend)
        self._reply_areas = [self.slab.reply_area(index) for index in range(geometry.num_workers)]
        self._bare_requests = self.prepare(dict.fromkeys(range(len(self.workers))))

    def _in_process_slab(self, _geometry: Geometry) -> Slab:
        assert self.slab is not None  # noqa: S101
        return self.slab

    # ---- calls

    def next_seq(self) -> int:
        """The number of the next call."""
        self._seq += 1
        return self._seq

    def raise_untold_death(self) -> None:
        """Raises, once, the death of a worker that nobody was waiting for.

        Raises:
            WorkerDied: It happened since the last call.
            EnvTimeoutError: Likewise.
        """
        if self._untold:
            raise self._untold.pop(0)

    def prepare(self, messages: Mapping[int, Any]) -> dict[int, Any]:
        """Makes a message for each of these workers ready; raises what pickling raises, before any is touched."""
        return {index: self.workers[index].prepare(message) for index, message in messages.items()}

    def step_requests(self, rows: Sequence[Any] | npt.NDArray[Any] | None) -> Mapping[int, Any]:
        """One step request for each worker; `rows` are the actions where they are not in the slab."""
        requests = self._bare_requests
        if rows is not None:
            requests = self.prepare({w.index: rows[w.env_ids.start : w.env_ids.stop] for w in self.workers})
        if self._together:
            assert self._tally is not None  # noqa: S101
            self._tally.begin_step()
        return requests

    def _come_together(self, call: PendingCall) -> None:
        """After a death: once every worker has answered a call by itself, steps are answered by the tally again."""
        is_by_itself = call.seq > self._apart_since and not call.deaths and len(call.payloads) == len(self.workers)
        if self._may_be_together and is_by_itself:
            assert self._tally is not None  # noqa: S101
            self._tally.begin_anew()
            self._together = True

    def post(
        self,
        kind: FrameKind,
        command: str,
        prepared: Mapping[int, Any],
        *,
        seq: int | None = None,
        buffer: int = HOME,
        env_ids: Sequence[int] | None = None,
        resets: Mapping[int, ResetRequest] | None = None,
    ) -> PendingCall:
        """Sends a request to some workers, or to all; from here on the call is pending.

        Args:
            kind: Of the requests.
            command: As messages name the call.
            prepared: From `prepare`, by worker.
            seq: A number that was already given to the call.
            buffer: Which buffer the workers write.
            env_ids: Of a batch: the rows of its answer, if not all envs.
            resets: What the requests of a reset ask, by worker.
        """
        seq = seq or self.next_seq()
        is_batch = kind in _BATCH_KINDS
        call = PendingCall(seq, command, is_batch, buffer, prepared, Answer(loop=self.loop), env_ids)
        self._calls[seq] = call
        if self.mending is not None and is_batch:
            self.mending.begin(call, resets or {})
        if self._watch is not None:
            self._watch.begin(self.workers, self._calls)
        try:
            for index, request in prepared.items():
                worker = self.workers[index]
                if worker.alive:
                    worker.post(kind, seq, buffer, request)
                else:
                    self._fail(call, worker.index, self._deaths[index])
        except BaseException:  # a Ctrl-C in the middle of an env that lives in this process
            self._forget(call)
            for env_index in self._env_ids[0]:
                self.states.break_(env_index, "was interrupted")
            raise
        return call

    def post_step(self, prepared: Mapping[int, Any], seq: int) -> PendingCall:
        """Sends a step request to every worker."""
        kind = FrameKind.STEP_TOGETHER if self._together else FrameKind.STEP
        return self.post(kind, "step", prepared, seq=seq, buffer=self._take_buffer())

    def post_reset(
        self, seq: int, prepared: Mapping[int, Any], requests: Mapping[int, ResetRequest], env_ids: Sequence[int] | None
    ) -> PendingCall:
        """Sends reset requests; `env_ids` are the rows of the answer, if not all envs."""
        buffer = self._take_buffer() if env_ids is None else HOME
        return self.post(FrameKind.RESET, "reset", prepared, seq=seq, buffer=buffer, env_ids=env_ids, resets=requests)

    def _take_buffer(self) -> int:
        return self.ring.take() if self.ring is not None else HOME

    async def answered(self, call: PendingCall) -> list[Any]:
        """Waits for a call and reads its replies, in the order of its workers; none if nobody has anything to say.

        Whatever it raises, the call goes on in the workers: the rows of a batch are then owed, other answers are
        dropped.

        Raises:
            WorkerDied: At once, if one of the workers died.
            ClosedEnvironmentError: The vector was terminated meanwhile.
            asyncio.CancelledError: Nobody waits any more.
        """
        try:
            await call.future
            if call.deaths:
                raise call.deaths[0]
            has_something_to_say = call.mended is not None or any(call.payloads.values())
            if has_something_to_say and call.is_to_be_read_in_a_thread:
                replies = await anyio.to_thread.run_sync(self._read, call)
            else:
                replies = self._read(call) if has_something_to_say else []
        except BaseException:
            if call.is_batch:
                self._abandon(call)
            else:
                self.drop(call)
            raise
        if call.is_batch and self.slab is None:  # terminated between the answer and our turn
            raise ClosedEnvironmentError(f"{call.command}()")
        return replies

    def completed(
        self, call: PendingCall, result: Callable[[PendingCall, list[Any]], _Result], replies: list[Any]
    ) -> _Result:
        """The result of a batch that was answered; whatever goes wrong in it, no env stays awaited."""
        try:
            return result(call, replies)
        except BaseException:
            self.states.interrupt(call.seq)
            if call.seq in self._calls:
                self._forget(call)
            raise

    def _read(self, call: PendingCall) -> list[Any]:
        if call.mended is not None:
            for part in call.mended.parts:
                _ = part.reply
        if not any(call.payloads.values()):
            return []
        unpack = self.workers[0].unpack
        return [unpack(call.payloads[index]) for index in sorted(call.payloads)]

    def _abandon(self, call: PendingCall) -> None:
        """The task that waited for a batch is gone: what is not answered yet is owed, the rest is idle."""
        call.is_abandoned = True
        answered = call.payloads if call.deaths else {}
        self.states.abandon(call.seq, [i for index in answered for i in call.answered_by(self.workers[index].env_ids)])
        for index, payload in answered.items():
            for env_index, _ in self.workers[index].failed_envs(payload):
                self.states.break_(env_index, f"failed in {call.command}")

    def drop(self, call: PendingCall) -> None:
        """Nobody will ask for the answer: its buffer goes back once no worker writes there any more."""
        call.is_dropped = True
        if not call.missing:
            self._forget(call)

    def done(self, call: PendingCall) -> None:
        """The answer was taken, and its buffer is the caller's."""
        self._calls.pop(call.seq, None)
        if not self._together:
            self._come_together(call)

    def stepped(self, failed: AbstractSet[int]) -> None:
        """With `on_failure="restart"`: a step was taken in which these failed."""
        if self.mending is not None:
            self.mending.stepped(failed)
            self.forget_lost()

    def forget_lost(self) -> None:
        """Envs that were lost while others still answered have no observation to repeat, although they gave one."""
        if self.mending is not None and self.mending.lost_env_ids:
            self.states.forget(self.mending.lost_env_ids)

    def drop_unowed(self) -> None:
        """Drops the calls that were cancelled, and whose envs have all been reset since."""
        for call in list(self._calls.values()):
            if call.is_abandoned and not self.states.is_owed_to(call.seq):
                self.drop(call)

    def _forget(self, call: PendingCall) -> None:
        self._calls.pop(call.seq, None)
        if self.ring is not None:
            self.ring.give_back(call.buffer)

    def _replied(self, index: int, frame: Frame) -> None:
        call = self._calls.get(frame.seq)
        if call is None:
            self._replied_to_start(index, frame)  # or the pool was closed meanwhile
            return
        if frame.kind == FrameKind.ALL_DONE:
            self._take_reply_areas(call, call.missing)
        elif frame.kind == FrameKind.ECHO:
            self._take_reply_areas(call, call.missing & {index})
        elif index in call.missing:  # else the worker counts as dead
            self._take(call, index, frame.payload)
        if not call.missing:
            self._complete(call)

    def _replied_to_start(self, index: int, frame: Frame) -> None:
        """What a worker that takes a dead one's place says of its start."""
        deadline = self._rebuilding.pop(frame.seq, None)
        if deadline is not None:
            deadline.cancel()
        is_of_start = deadline is not None or frame.seq in self._mapping
        self._mapping.discard(frame.seq)
        if is_of_start and frame.payload:  # it has failed as a whole, and told why on its stderr
            self.workers[index].signal(signal.SIGKILL)

    def _complete(self, call: PendingCall) -> None:
        """Every worker has answered, or is gone."""
        if call.is_dropped:
            self._forget(call)
        else:
            self._answered.append(call.future)

    def _take_reply_areas(self, call: PendingCall, workers: Iterable[int]) -> None:
        """Takes what workers have left of a step; a reply too large for its area is on its way by the socket."""
        for index in tuple(workers) if self._reply_areas else ():
            if call.mended is not None and index in call.mended.in_parts:
                continue  # what it had left was taken, and it was asked again
            reply = self._reply_areas[index].take(call.seq)
            if reply is not None and not self.workers[index].is_condemned:
                self._take(call, index, reply)

    def _take(self, call: PendingCall, index: int, payload: Any) -> None:
        """One worker's answer, or a part of it."""
        if call.mended is None or self.mending is None:
            call.payloads[index] = payload
            call.missing.discard(index)
        else:
            self.mending.take(call, call.mended, index, payload)

    def _resume(self) -> None:
        """The last act of a callback that may have brought replies: resumes who waits for them."""
        answered = self._answered
        if len(answered) == 1:
            answered.pop().resume()
        elif answered:
            self._answered = []
            for future in answered:
                future.resume_later()

    def _died(self, index: int, death: Death) -> None:
        """Tells every call that waits for this worker; its envs are built anew, or need a reset."""
        self._together, self._apart_since = False, self._seq
        concerned = [call for call in self._calls.values() if index in call.missing]
        for call in concerned:  # who had ended the step, the dead one perhaps, has answered
            self._take_reply_areas(call, call.missing)
        waiting = [call for call in concerned if index in call.missing]
        if self.mending is not None and self._blueprints:  # else it is still the start
            self._mend_death(self.mending, index, death, waiting)
        else:
            self._tell_death(index, death, waiting)
        for call in concerned:
            if not call.missing:
                self._complete(call)
            for other in call.missing - {index}:  # those that would have answered by the tally
                self.workers[other].post(FrameKind.ECHO, call.seq, HOME, b"")

    def _tell_death(self, index: int, death: Death, waiting: Sequence[PendingCall]) -> None:
        for env_index in self.workers[index].env_ids:
            self.states.break_(env_index, "must be built anew, since the worker died")
        told_to = [call for call in waiting if not (call.is_abandoned or call.is_dropped)]
        if told_to:
            death = death.during(told_to[0].command)
        else:
            self._untold.append(death)
        self._deaths[index] = death
        for call in waiting:
            self._fail(call, index, death.during(call.command))

    def _mend_death(self, mending: Mending, index: int, death: Death, waiting: Sequence[PendingCall]) -> None:
        """With `on_failure="restart"`: the next rows of its envs tell it, and another worker starts."""
        batches = [(call, call.mended) for call in waiting if call.mended is not None]
        self._deaths[index] = death  # until another worker has its place
        death, given_up = mending.died(index, death, waiting[0].command if waiting else None, batches)
        if given_up:
            self._deaths[index] = death
        for call in waiting:
            if call.mended is None:
                self._fail(call, index, death.during(call.command, is_rebuilt=not given_up))
        for env_index in given_up:
            self.states.break_(env_index, GIVEN_UP)
        if all(call.is_dropped for call, _ in batches):
            self._untold += mending.restarts.crash_loops(given_up)

    def _fail(self, call: PendingCall, index: int, death: Death) -> None:
        call.missing.discard(index)
        call.deaths.append(death)
        call.future.resume_later()

    # ---- end

    async def close(self, grace: float, ask: bool) -> list[Any]:
        """Ends every worker within some `grace` seconds: asked, then SIGTERM, then SIGKILL.

        Args:
            grace: How long to wait for each of the first two.
            ask: Whether to let the envs close at all.

        Returns:
            The replies of the workers that closed their envs.
        """
        replies: list[Any] = []
        if ask and any(worker.alive for worker in self.workers):
            alive = [worker.index for worker in self.workers if worker.alive]
            call = self.post(FrameKind.CLOSE, "close", self.prepare(dict.fromkeys(alive)))
            for worker in self.workers:
                worker.alive = False  # its end is expected from here on
            call.is_dropped = True  # its replies are read from it, nobody waits for its future
            await asyncio.sleep(0)  # the reply of a worker in this process comes by the next turn
            # A worker that has answered ends; one that dies instead does, too: its end is what to wait for.
            await self._ended(grace)
            replies = [self.workers[index].unpack(payload) for index, payload in call.payloads.items()]
            if any(not worker.ended.is_set() for worker in self.workers):
                for worker in self.workers:
                    worker.signal(signal.SIGTERM)
                await self._ended(grace)
        for worker in self.workers:
            if not worker.ended.is_set():
                worker.kill()
        await self._ended(None)
        self._release()
        return replies

    async def _ended(self, timeout: float | None) -> None:
        waiting = [asyncio.ensure_future(worker.ended.wait()) for worker in self.workers if not worker.ended.is_set()]
        if waiting:
            try:
                await asyncio.wait(waiting, timeout=timeout)
            finally:
                for future in waiting:
                    future.cancel()

    def terminate(self) -> None:
        """Ends every worker now, from anywhere, also without a loop."""
        if threading.get_ident() != self._thread and self.loop.is_running():
            for worker in self.workers:
                worker.kill()
            self.loop.call_soon_threadsafe(self.terminate)  # descriptors are taken off the loop in its own thread
            return
        for worker in self.workers:
            if not worker.ended.is_set():
                worker.terminate()
        self._release()

    def _close_slab_file(self) -> None:
        if self._slab_fd >= 0:
            os.close(self._slab_fd)
            self._slab_fd = -1

    def _close_tally(self) -> None:
        if self._tally is not None:
            self._tally.close()
            self._tally = None

    def _release(self) -> None:
        self._close_slab_file()
        self._close_tally()
        if self._watch is not None:
            self._watch.end()
        for deadline in self._rebuilding.values():
            deadline.cancel()
        self._rebuilding.clear()
        self.slab = self.ring = None
        self._reply_areas = []
        calls, self._calls = self._calls, {}
        for call in calls.values():
            if not (call.future.done() or call.is_dropped or self.loop.is_closed()):
                call.future.set_exception(ClosedEnvironmentError(f"{call.command}()"))
