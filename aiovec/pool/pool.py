"""The workers of one started vector: their start, their end, and who takes the place of one that died."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from aiovec.errors import ClosedEnvironmentError, SlabMemoryError
from aiovec.exchange.black_box import TIMES_PER_ROW, Doing
from aiovec.exchange.frames import Frame, FrameKind
from aiovec.exchange.groups import split_evenly
from aiovec.exchange.messages import RebuildRequest
from aiovec.exchange.slab import Geometry, Slab, Strip
from aiovec.exchange.tally import NUM_TALLIES
from aiovec.pool.calls import Calls
from aiovec.pool.in_process import InProcess
from aiovec.pool.local import LocalProcesses
from aiovec.pool.lock_step import LockStep
from aiovec.pool.memory import SlabMemory
from aiovec.pool.mending import Mending
from aiovec.pool.ray_cluster import RayCluster
from aiovec.pool.restarts import Restarts
from aiovec.pool.ring import HOME, Lease, Ring, RolloutStrips
from aiovec.pool.sent import Sent
from aiovec.pool.slow_calls import log_slow_calls, stop_logging
from aiovec.pool.watch import Watch, end_stuck
from aiovec.pool.worker import Backend, Death, Told, Worker
from aiovec.statistics import PendingStatistics

__all__ = ["Pool"]

_log = logging.getLogger("aiovec")

# Set to 1, memory that comes back from the user is overwritten.
POISON_VARIABLE = "AIOVEC_POISON_BUFFERS"

# So many batches are lent from the start: who steps holds one, while the next one is written.
_LENT_AT_FIRST = 2


def _env_seconds(times: Sequence[float]) -> float:
    return sum(times[:1]) + sum(times[TIMES_PER_ROW::TIMES_PER_ROW])


class Pool:
    """The workers of one vector.

    Args:
        loop: The running loop; everything here happens on it.
        num_envs: How many envs.
        num_workers: How many processes; 0 for none.
        context: See `AsyncVectorEnv`.
        worker_options: See `AsyncVectorEnv`.
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
        worker_options: Mapping[str, Any],
        shared_memory: bool,
        start_timeout: float,
        step_timeout: float | None,
        restarts: Restarts | None,
    ) -> None:
        self.loop = loop
        self.workers: list[Worker] = []
        self._env_ids = split_evenly(num_envs, num_workers or 1)
        shares_memory = num_workers == 0 or (shared_memory and context != "ray")
        self.memory: SlabMemory = SlabMemory(shares_memory, self._announce)
        self.backend: Backend
        if num_workers == 0:
            self.backend = InProcess(loop, self._in_process_slab)
        elif context == "ray":
            self.backend = RayCluster(loop, self._env_ids, worker_options)
        else:
            self.backend = LocalProcesses(loop, context, num_envs, num_workers, self.memory, shares_memory)
        self.shared: bool = self.backend.shares_memory
        self._start_timeout = start_timeout
        self._watch: Watch | None = None
        if step_timeout is not None or restarts is not None:
            self._watch = Watch(loop, step_timeout or float("inf"), start_timeout, self._stuck)
        # What a worker is sent at its start, and which of its rows are async: BUILD, MAP, rows.
        self._blueprints: list[tuple[Any, Any, Sequence[int]]] = []
        self._rebuilding: dict[int, asyncio.TimerHandle] = {}  # by the number of the request; ends what takes too long
        self._mapping: set[int] = set()
        self._growing_ring: asyncio.Task[None] | None = None
        self.slow_call_seconds: float = float("inf")  # a start may take long
        self._past_env_seconds = 0.0  # of workers whose place another one has taken
        self.slab: Slab | None = None
        self.ring: Ring | None = None
        self.rollout_strips: RolloutStrips | None = None
        mending = None if restarts is None else Mending(restarts, self.workers, self._replace)
        began = None if self._watch is None else self._look_for_stuck
        self.calls: Calls = Calls(loop, self.workers, num_envs, mending, self._replace, self._replied_to_start, began)

    def __repr__(self) -> str:
        return f"<Pool workers={len(self.workers)} {self.calls!r}>"

    # ---- start

    async def start_workers(self) -> None:
        """Starts every process, one after the other without waiting for any, and connects to it."""
        log_slow_calls(self)
        await self.backend.open()
        for index in range(len(self._env_ids)):
            self.workers.append(self._start_worker(index))
            await asyncio.sleep(0)

    def _start_worker(self, index: int) -> Worker:
        told = Told(self.calls.replied, self.calls.resume, self._died)
        return self.backend.start_worker(index, self._env_ids[index], told)

    def worker_of(self, env_index: int) -> Worker:
        """The worker that holds an env."""
        return next(worker for worker in self.workers if env_index in worker.env_ids)

    def keep_blueprints(
        self, builds: Mapping[int, Any], maps: Mapping[int, Any], asynchronous: Sequence[Sequence[int]]
    ) -> None:
        """Takes what each worker was sent at its start, and which of its rows are async, for one that takes its place."""
        self._blueprints = [
            (builds[worker.index], maps[worker.index], rows)
            for worker, rows in zip(self.workers, asynchronous, strict=True)
        ]

    def replace_dead(self, indices: Iterable[int]) -> None:
        """Starts a worker in the place of each of these that died; what is posted next is served once it is there.

        Raises:
            WorkerStartError: The system gave none; the rest is as it was.
        """
        for index in indices:
            if not (self.workers[index].alive or self.calls.are_ending):
                self._replace(index)

    def _replace(self, index: int, delay: float = 0.0, lost: Sequence[int] = ()) -> None:
        worker = self._start_worker(index)
        self._past_env_seconds += _env_seconds(self.workers[index].times)
        self.workers[index] = worker
        map_seq = self.calls.replaced(index)
        build, mapping, asynchronous = self._blueprints[index]
        rows = [env_index - worker.env_ids.start for env_index in lost]
        request = worker.prepare(RebuildRequest(build, delay, rows, asynchronous))
        seq, timeout = self.calls.next_seq(), self._start_timeout + delay
        self._rebuilding[seq] = self.loop.call_later(timeout, self._rebuilds_too_long, seq, worker)
        worker.post(FrameKind.REBUILD, seq, HOME, request)
        self._mapping.add(map_seq)
        worker.post(FrameKind.MAP, map_seq, HOME, mapping)
        for strip in self.memory.strips if self.backend.maps_memory else ():
            self._post_strip(worker, strip)

    def _rebuilds_too_long(self, seq: int, worker: Worker) -> None:
        if self._rebuilding.pop(seq, None) is not None and worker.alive:
            rows = [doing.row for doing in worker.doing]
            late = [worker.env_ids[row] for row in rows] or worker.env_ids
            end_stuck(self.loop, worker, late, "build", self._start_timeout, has_begun=bool(rows))

    def _stuck(self, index: int, stuck: Sequence[Doing], seconds: float) -> None:
        worker = self.workers[index]
        late = sorted({worker.env_ids[doing.row] for doing in stuck})
        end_stuck(self.loop, worker, late, stuck[0].phase.name.lower(), seconds, has_begun=True)

    def _look_for_stuck(self) -> None:
        if self._watch is not None:
            self._watch.begin(self.workers, self.calls.pending)

    async def map_slab(self, geometry: Geometry) -> None:
        """Reserves what is there from the start, now that its size is known.

        Raises:
            SlabMemoryError: The system has not that much.
        """
        self.slab = await self.memory.allocate(geometry)

    async def open_calls(self, max_batches: int, max_rollouts: int) -> None:
        """The workers have mapped it: from here on batches may be asked for.

        Args:
            max_batches: How many are lent at most; 0: they are copied.
            max_rollouts: The same of rollouts.

        Raises:
            SlabMemoryError: The system has not as much as is lent from the start.
        """
        slab = self.slab
        assert slab is not None  # noqa: S101
        poisons = os.environ.get(POISON_VARIABLE, "") not in ("", "0")
        self.ring = Ring(slab, max_batches, self._grow_ring, poisons)
        self.rollout_strips = RolloutStrips(slab, max_rollouts, poisons)
        for _ in range(min(max_batches, _LENT_AT_FIRST)):
            await self.memory.grow(1, 0)
        num_workers = slab.geometry.num_workers
        areas = [[slab.reply_area(index, tally) for tally in range(NUM_TALLIES)] for index in range(num_workers)]
        sent = None
        if areas:
            assert self.backend.wanted is not None  # noqa: S101
            sent = Sent(slab.answer_slots(), self.backend.wanted, slab.geometry.num_envs)
        # One worker has nobody to wait for.
        lock_step = LockStep(areas, self.backend.tallies if num_workers > 1 else ())
        self.calls.open(self.ring, lock_step, sent)

    async def lease(self, num_steps: int) -> Lease:
        """Memory for a rollout of so many steps.

        Raises:
            SlabMemoryError: There is none.
            ClosedEnvironmentError: The vector was closed meanwhile.
        """
        while self.rollout_strips is not None:
            lease = self.rollout_strips.take(num_steps)
            if lease is not None:
                return lease
            await self.memory.grow(num_steps + 1, num_steps)
        raise ClosedEnvironmentError("rollout()")

    def memory_of(self, lease: Lease) -> npt.NDArray[np.uint8]:
        """All of a lease, as bytes."""
        assert self.slab is not None  # noqa: S101
        return self.slab.strip_of(lease.strip.first).memory

    def _grow_ring(self) -> None:
        """All buffers are lent: one more, while the calls go on with copies."""

        async def grow() -> None:
            try:
                await self.memory.grow(1, 0)
            except SlabMemoryError as error:
                _log.warning("large batches are copied from now on: %s", str(error))  # not what it holds
                if self.ring is not None:
                    self.ring.give_up_growing()

        task = self._growing_ring = self.loop.create_task(grow(), name="aiovec ring grows")
        task.add_done_callback(lambda _: setattr(self, "_growing_ring", None))

    def _announce(self, strip: Strip) -> None:
        """There is another strip."""
        for worker in self.workers if self.backend.maps_memory else ():
            if worker.alive:
                self._post_strip(worker, strip)
        if strip.num_actions:
            assert self.rollout_strips is not None  # noqa: S101
            self.rollout_strips.add(strip)
        else:
            assert self.ring is not None  # noqa: S101
            self.ring.add(strip.first)

    def _post_strip(self, worker: Worker, strip: Strip) -> None:
        seq = self.calls.next_seq()
        self._mapping.add(seq)  # one that has no room for it ends
        worker.post(FrameKind.GROW, seq, HOME, worker.prepare(strip))

    def _in_process_slab(self, _geometry: Geometry) -> Slab:
        assert self.slab is not None  # noqa: S101
        return self.slab

    # ---- what is told of it

    def env_seconds(self) -> float:
        """Spent inside envs."""
        return self._past_env_seconds + sum(_env_seconds(worker.times) for worker in self.workers)

    def pending(self) -> list[tuple[int, PendingStatistics]]:
        """The calls that are not answered yet, with their numbers; from any thread.

        Which env of a worker on Ray is at work is what it said when it was asked last.
        """
        now = time.perf_counter()
        pending: list[tuple[int, PendingStatistics]] = []
        for call in list(self.calls.pending.values()):
            env_ids: list[int] = []
            for index in sorted(call.missing):
                if self.calls.has_ended(call, index):
                    continue
                worker = self.workers[index]
                asked = call.answered_by(worker.env_ids)
                called = {worker.env_ids[doing.row] for doing in worker.doing} & {*asked}
                env_ids += sorted(called) or asked
            if env_ids and not call.is_dropped and not self.calls.is_answered(call):
                pending.append((call.seq, PendingStatistics(call.command, tuple(env_ids), now - call.began)))
        return pending

    def look(self) -> None:
        """Has `pending` tell of this moment, or soon."""
        for worker in self.workers:
            worker.look()

    def _replied_to_start(self, index: int, frame: Frame) -> None:
        """What a worker that takes a dead one's place says of its start."""
        deadline = self._rebuilding.pop(frame.seq, None)
        if deadline is not None:
            deadline.cancel()
        is_of_start = deadline is not None or frame.seq in self._mapping
        self._mapping.discard(frame.seq)
        if is_of_start and frame.payload:  # it has failed as a whole, and told why on its stderr
            self.workers[index].signal(signal.SIGKILL)

    def _died(self, index: int, death: Death) -> None:
        self.calls.died(index, death, is_started=bool(self._blueprints))

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
        self.calls.are_ending = True
        if ask and any(worker.alive for worker in self.workers):
            alive = [worker.index for worker in self.workers if worker.alive]
            call = self.calls.post(FrameKind.CLOSE, "close", self.calls.prepare(dict.fromkeys(alive)))
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
        self.kill()
        await self._ended(None)
        self._release()
        await self.backend.close()  # behind those who read its pipes
        return replies

    def kill(self) -> None:
        """Ends every worker at once, from anywhere; `close`, which may be under way, or `terminate` frees the rest."""
        self.calls.are_ending = True
        for worker in self.workers:
            if not worker.ended.is_set():
                worker.kill()

    async def _ended(self, timeout: float | None) -> None:
        waiting = [asyncio.ensure_future(worker.ended.wait()) for worker in self.workers if not worker.ended.is_set()]
        if waiting:
            try:
                await asyncio.wait(waiting, timeout=timeout)
            finally:
                for future in waiting:
                    future.cancel()

    def terminate(self) -> None:
        """Ends every worker and frees everything, also without a loop; where one runs, in a callback of it."""
        for worker in self.workers:
            if not worker.ended.is_set():
                worker.terminate()
        self._release()
        self.backend.terminate()  # behind those who read its pipes
        self.memory.forget()

    def _release(self) -> None:
        stop_logging(self)
        self.memory.close()
        if self._growing_ring is not None and not self.loop.is_closed():
            self._growing_ring.cancel()
        if self._watch is not None:
            self._watch.end()
        for deadline in self._rebuilding.values():
            deadline.cancel()
        self._rebuilding.clear()
        self.slab = self.ring = self.rollout_strips = None
        self.calls.close()
