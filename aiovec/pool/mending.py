"""What becomes of failed envs with `on_failure="restart"`: who is built anew, and when a call is complete.

A failed env is built anew by its worker when it is reset next. Under NEXT_STEP that is the next step, under
DISABLED the user's reset; a reset, and a step under SAME_STEP, wait for the new env: its worker is asked to reset
it, under the number of the same call, as often as the budget allows. With a worker all its envs fail; another one
starts at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

from aiovec.errors import CrashLoopError, WorkerStartError
from aiovec.exchange.failures import restore
from aiovec.exchange.frames import FrameKind
from aiovec.exchange.messages import BatchReply, EnvLost, ResetRequest
from aiovec.pool.in_process import InProcessWorker
from aiovec.pool.local import Death, LocalWorker
from aiovec.pool.pending_call import PendingCall
from aiovec.pool.restarts import Restarts

__all__ = ["Mending"]


class Mending:
    """The failed envs of a vector.

    Args:
        restarts: The budget.
        workers: The pool's own list: a worker that takes a dead one's place is found there.
        replace: Starts another worker: which, after how many seconds, and which envs are to tell the loss.
    """

    def __init__(
        self,
        restarts: Restarts,
        workers: Sequence[LocalWorker | InProcessWorker],
        replace: Callable[[int, float, Sequence[int]], None],
    ) -> None:
        self.restarts: Restarts = restarts
        self._workers = workers
        self._replace = replace
        self._losses: dict[int, Exception] = {}  # by env: what its worker ended with, until a row tells it

    def __repr__(self) -> str:
        return f"<Mending {self.restarts!r} losses={sorted(self._losses)}>"

    def begin(self, call: PendingCall, resets: Mapping[int, ResetRequest]) -> None:
        """A batch is asked for."""
        call.resets = dict(resets)
        for index in call.missing:
            own, request = self._workers[index].env_ids, resets.get(index)
            rows = request.rows if request is not None else None
            asked = list(own) if rows is None else [own[row] for row in rows]
            call.asked[index] = asked
            if request is not None:  # what was not told yet is told with the reset, which is what it needs
                self.restarts.was_reset(asked)
                for env_index in asked:
                    if env_index in self._losses:
                        call.failures[env_index] = [self._losses.pop(env_index)]

    @property
    def lost_env_ids(self) -> list[int]:
        """Envs that ended with their worker, which no row has told yet."""
        return list(self._losses)

    def stepped(self, failed: AbstractSet[int]) -> None:
        """A step was answered in which these failed; who was lost since has not succeeded either."""
        self.restarts.stepped({*failed, *self._losses})

    def is_whole(self, call: PendingCall, index: int, payload: Any) -> bool:
        """Whether an answer is all that there is of this worker."""
        if call.is_dropped:
            return True
        return index not in call.mended and not self._workers[index].bears_failures(payload)

    def take(self, call: PendingCall, index: int, payload: Any) -> None:
        """An answer that bears failures, or one that follows such."""
        worker = self._workers[index]
        reply: BatchReply = worker.unpack(payload) or BatchReply({})
        request = call.resets.get(index)
        is_whole = index not in call.mended and (request is None or request.whole_batch)
        call.mended.add(index)
        call.parts.append((list(worker.env_ids) if is_whole else call.asked[index], reply))
        failed: list[int] = []
        for record in reply.failures:
            if record.env_index not in call.asked[index]:  # a request that could not be read names them all
                continue
            exception = restore(record)
            if isinstance(exception, EnvLost):
                loss = self._losses.pop(record.env_index, None)
                if loss is None:  # a reset has told it since: this call was cancelled before
                    continue
                exception = loss
            else:
                self.restarts.failed(record.env_index, exception)
            call.failures.setdefault(record.env_index, []).append(exception)
            failed.append(record.env_index)
        again = [env_index for env_index in failed if not self.restarts.is_exhausted(env_index)]
        if again and self._waits(call):
            self._ask_again(call, index, again)
        else:
            call.missing.discard(index)

    def died(self, index: int, death: Death, waiting: Sequence[PendingCall]) -> list[CrashLoopError]:
        """A worker has ended: calls that wait for it go on without it, or wait for another.

        Returns:
            Errors of envs that are given up.
        """
        lost = list(self._workers[index].env_ids)
        told: set[int] = set()
        for env_index in lost:
            self.restarts.failed(env_index, death)
            self._losses[env_index] = death
        for call in waiting:
            if call.is_dropped or call.is_abandoned:  # nobody would hear of it
                continue
            for env_index in call.asked[index]:
                if env_index not in told:
                    call.failures.setdefault(env_index, []).append(death)
                    self._losses.pop(env_index, None)
                    told.add(env_index)
        given_up = any(self.restarts.is_exhausted(env_index) for env_index in lost)
        if not given_up:
            try:
                self._replace(index, self.restarts.delay(lost), sorted(set(lost) - told))
            except WorkerStartError as error:
                given_up = True
                for env_index in lost:
                    self.restarts.failed(env_index, error)
        if given_up:
            self.restarts.give_up(lost)
            for env_index in lost:
                self._losses.pop(env_index, None)
        for call in waiting:
            if self._waits(call) and not given_up:
                self._ask_again(call, index, call.asked[index])
            else:
                call.missing.discard(index)
        return self.restarts.crash_loops(lost) if given_up else []

    def _waits(self, call: PendingCall) -> bool:
        return not call.is_dropped and (bool(call.resets) or self.restarts.waits_in_step)

    def _ask_again(self, call: PendingCall, index: int, env_ids: list[int]) -> None:
        worker = self._workers[index]
        own, request = worker.env_ids, call.resets.get(index)
        rows = [env_index - own.start for env_index in env_ids]
        seeds: list[int | None] = [None] * len(rows)
        options = None
        if request is not None:
            first = range(len(own)) if request.rows is None else request.rows
            by_row = dict(zip(first, request.seeds, strict=True))
            seeds, options = [by_row.get(row) for row in rows], request.options
        call.asked[index] = env_ids
        call.mended.add(index)
        prepared = worker.prepare(ResetRequest(rows, seeds, options, whole_batch=False))
        worker.post(FrameKind.RESET, call.seq, call.buffer, prepared)
