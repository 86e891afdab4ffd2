"""What becomes of failed envs with `on_failure="restart"`: who is built anew, and when a call is complete.

A failed env is built anew by its worker when it is reset next. Under NEXT_STEP that is the next step, under
DISABLED the user's reset; a reset, and a step under SAME_STEP, wait for the new env: its worker is asked to reset
it, under the number of the same call, as often as the budget allows. With a worker all its envs fail; another one
starts at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from collections.abc import Set as AbstractSet
from functools import partial
from typing import Any

from aiovec.errors import WorkerStartError
from aiovec.exchange.failures import Failed
from aiovec.exchange.frames import FrameKind
from aiovec.exchange.messages import ResetRequest
from aiovec.pool.mended import Failing, Mended, Part
from aiovec.pool.pending_call import PendingCall
from aiovec.pool.restarts import Restarts
from aiovec.pool.worker import Death, Worker

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
        workers: Sequence[Worker],
        replace: Callable[[int, float, Sequence[int]], None],
    ) -> None:
        self.restarts: Restarts = restarts
        self._workers = workers
        self._replace = replace
        self._losses: dict[int, Failing] = {}  # by env: what its worker ended with, until a row tells it

    def __repr__(self) -> str:
        return f"<Mending {self.restarts!r} losses={sorted(self._losses)}>"

    def begin(self, call: PendingCall) -> None:
        """A batch is asked for."""
        mended = call.mended = Mended()
        for index in call.missing:
            own, request = self._workers[index].env_ids, call.resets.get(index)
            rows = request.rows if request is not None else None
            asked = list(call.answered_by(own)) if rows is None else [own[row] for row in rows]
            mended.asked[index] = asked
            if request is not None:  # what was not told yet is told with the reset, which is what it needs
                self.restarts.was_reset(asked)
                for env_index in asked:
                    if env_index in self._losses:
                        mended.failures[env_index] = [self._losses.pop(env_index)]

    @property
    def lost_env_ids(self) -> list[int]:
        """Envs that ended with their worker, which no row has told yet."""
        return list(self._losses)

    def stepped(self, failed: AbstractSet[int], env_ids: Iterable[int] | None) -> None:
        """A step of all, or of these, was answered in which some failed; who was lost since has not succeeded either."""
        self.restarts.stepped({*failed, *self._losses}, env_ids)

    def discard(self, owed: Iterable[PendingCall], env_ids: Iterable[int]) -> None:
        """These will not be asked how an owed call ended: what they failed with there is told with their reset."""
        discarded = set(env_ids)
        for call in owed:
            failures = call.mended.failures if call.mended is not None else {}
            for env_index in discarded & failures.keys():
                self._losses[env_index] = failures.pop(env_index)[-1]

    def take(self, call: PendingCall, mended: Mended, index: int, payload: Any) -> None:
        """A worker's answer, or a part of it where envs have failed in it."""
        worker = self._workers[index]
        failed_envs = [failed for failed in worker.failed_envs(payload) if failed[1] in (Failed.RAISED, Failed.LOST)]
        if call.is_dropped or not (failed_envs or index in mended.in_parts):
            call.payloads[index] = payload
            call.missing.discard(index)
            return
        is_whole = index not in mended.in_parts
        mended.in_parts.add(index)
        part = Part(call.answered_by(worker.env_ids) if is_whole else mended.asked[index], payload, worker.unpack)
        mended.parts.append(part)
        failed: list[int] = []
        for env_index, how in failed_envs:
            if env_index not in mended.asked[index]:  # a request that could not be read names them all
                continue
            if how == Failed.RAISED:
                failing: Failing = partial(part.exception, env_index)
                self.restarts.failed(env_index, failing)
            elif (loss := self._losses.pop(env_index, None)) is not None:
                failing = loss
            else:  # a reset has told it since: this call was cancelled before
                continue
            mended.failures.setdefault(env_index, []).append(failing)
            failed.append(env_index)
        again = [env_index for env_index in failed if not self.restarts.is_exhausted(env_index)]
        if again and self._waits(call):
            self._ask_again(call, mended, index, again)
        else:
            call.missing.discard(index)

    def died(
        self, index: int, death: Death, command: str | None, waiting: Sequence[tuple[PendingCall, Mended]]
    ) -> tuple[Death, list[int]]:
        """A worker has ended: batches that wait for it go on without it, or wait for another.

        Args:
            index: Which.
            death: How it ended.
            command: The call that is told of it.
            waiting: The batches that wait for it.

        Returns:
            The death as it is told, and the envs that are given up.
        """
        lost = list(self._workers[index].env_ids)
        told_to = [(call, mended) for call, mended in waiting if not call.is_dropped]
        told = {env_index for _, mended in told_to for env_index in mended.asked[index]}
        # Who has not told the loss before this one, while others of its worker go on, has not failed twice.
        beside = {env_index for env_index in lost if told and env_index not in told and env_index in self._losses}
        given_up = any(self.restarts.is_last(env_index) for env_index in lost if env_index not in beside)
        death = death.during(command, is_rebuilt=not given_up)
        for env_index in lost:
            self.restarts.failed(env_index, _known(death), is_counted=env_index not in beside)
        if not given_up:
            try:
                self._replace(index, self.restarts.delay(lost), sorted(set(lost) - told))
            except WorkerStartError as error:
                given_up = True
                for env_index in lost:
                    self.restarts.failed(env_index, _known(error))
        self._losses.update(dict.fromkeys(() if given_up else set(lost) - told, _known(death)))
        for env_index in told if not given_up else lost:
            self._losses.pop(env_index, None)
        for _, mended in told_to:
            for env_index in mended.asked[index]:
                mended.failures.setdefault(env_index, []).append(_known(death))
        if given_up:
            self.restarts.give_up(lost)
        for call, mended in waiting:
            if self._waits(call) and not given_up:
                self._ask_again(call, mended, index, mended.asked[index])
            else:
                call.missing.discard(index)
        return death, lost if given_up else []

    def _waits(self, call: PendingCall) -> bool:
        return not call.is_dropped and (bool(call.resets) or self.restarts.waits_in_step)

    def _ask_again(self, call: PendingCall, mended: Mended, index: int, env_ids: list[int]) -> None:
        worker = self._workers[index]
        own, request = worker.env_ids, call.resets.get(index)
        rows = [env_index - own.start for env_index in env_ids]
        seeds: list[int | None] = [None] * len(rows)
        options = None
        if request is not None:
            first = range(len(own)) if request.rows is None else request.rows
            by_row = dict(zip(first, request.seeds, strict=True))
            seeds, options = [by_row.get(row) for row in rows], request.options
        mended.asked[index] = env_ids
        mended.in_parts.add(index)
        prepared = worker.prepare(ResetRequest(rows, seeds, options, whole_batch=False))
        worker.post(FrameKind.RESET, call.seq, call.buffer, prepared)


def _known(exception: Exception) -> Failing:
    return lambda: exception
