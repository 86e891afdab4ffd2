"""How the answers of workers become a batch: states settled, failures raised, rows and infos put together."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
from gymnasium.vector import AutoresetMode

from aiovec.exchange import infos as infos_
from aiovec.exchange.actions import ActionWriter
from aiovec.exchange.failures import as_one_exception
from aiovec.exchange.messages import BatchReply
from aiovec.exchange.slab import Buffer
from aiovec.failed_rows import Answered, FailedRows
from aiovec.pool.mended import Mended
from aiovec.pool.pending_call import PendingCall
from aiovec.pool.restarts import GIVEN_UP
from aiovec.pool.ring import HOME
from aiovec.pool.start import Started

__all__ = ["Batches", "StepResult"]

StepResult = tuple[Any, npt.NDArray[np.float64], npt.NDArray[np.bool_], npt.NDArray[np.bool_], dict[str, Any]]
ResetResult = tuple[Any, dict[str, Any]]


class Batches:
    """The batches of a started vector.

    Args:
        started: The vector.
        num_envs: How many envs.
        copy: See `AsyncVectorEnv`.
        mode: The autoreset mode.
    """

    def __init__(self, started: Started, num_envs: int, copy: bool | None, mode: AutoresetMode) -> None:
        pool = started.pool
        assert pool.slab is not None  # noqa: S101
        assert pool.ring is not None  # noqa: S101
        geometry = pool.slab.geometry
        self.pool = pool
        self.actions = ActionWriter(started.spaces.single_action_space, num_envs)
        if pool.shared:
            self.actions.map(pool.slab.action_arrays())
        self.ring = pool.ring
        self._buffers: list[Buffer] = [pool.slab.buffer(index) for index in range(geometry.num_buffers)]
        self._num_envs = num_envs
        self._layout = geometry.observations
        self._is_lent_home = copy is False
        self._waits_for_reset = mode is AutoresetMode.DISABLED
        self._failed_rows: FailedRows | None = None
        if pool.mending is not None:
            self._failed_rows = FailedRows(self._layout, num_envs, mode, pool.mending.restarts)

    def __repr__(self) -> str:
        return f"<Batches of {self._num_envs} envs>"

    def step_result(self, call: PendingCall, replies: list[BatchReply | None]) -> StepResult:
        """What `step` returns, or raises."""
        buffer = self._buffers[call.buffer]
        answers = self._receive(call, replies, buffer) if replies else []
        if call.mended is not None and call.mended.is_needed:
            dynamic, infos = self._complete(call, call.mended, answers, buffer)
            self.pool.stepped(frozenset(call.mended.failures))
            self._settle_mended(call, call.mended, self._ended(buffer))
        else:
            self._settle(call, answers, self._ended(buffer))
            dynamic, infos = self._gather(call, answers)
            self.pool.stepped(frozenset())
        rewards, terminations, truncations = (
            buffer.rewards.copy(),
            buffer.terminations.copy(),
            buffer.truncations.copy(),
        )
        if self._failed_rows is not None:
            self._failed_rows.keep(None, buffer, dynamic)
        return self._whole(call, dynamic), rewards, terminations, truncations, infos

    def reset_result(self, call: PendingCall, replies: list[BatchReply | None]) -> ResetResult:
        """What `reset` returns, or raises."""
        buffer = self._buffers[call.buffer]
        answers = self._receive(call, replies, buffer) if replies else []
        if call.mended is not None and call.mended.is_needed:
            dynamic, infos = self._complete(call, call.mended, answers, buffer)
            self._settle_mended(call, call.mended, ())
        else:
            self._settle(call, answers, ())
            dynamic, infos = self._gather(call, answers)
        if self._failed_rows is not None:
            self.pool.forget_lost()
            self._failed_rows.keep(call.env_ids, buffer, dynamic)
        if call.env_ids is None:
            return self._whole(call, dynamic), infos
        return self._layout.assemble([array[call.env_ids] for array in buffer.observations], dynamic), infos

    # ---- states

    def _ended(self, buffer: Buffer) -> Sequence[int]:
        """The envs whose episode ended, where nobody resets them but the user."""
        if not self._waits_for_reset:
            return ()
        ended: list[int] = np.flatnonzero(buffer.terminations | buffer.truncations).tolist()
        return ended

    def _settle(self, call: PendingCall, answers: Sequence[Answered], ended: Sequence[int]) -> None:
        """Takes an answer: states, and the failures of envs raised."""
        pool = self.pool
        pool.done(call)
        if not answers and not ended:  # the step path: nobody has anything to say
            pool.states.settle(call.seq, {})
            return
        records = [record for _, reply in answers for record in reply.failures]
        failed = {record.env_index: f"failed in {record.command}" for record in records}
        pool.states.settle(call.seq, failed, ended)
        if records:
            self.ring.give_back(call.buffer)
            raise as_one_exception(call.command, records)

    def _settle_mended(self, call: PendingCall, mended: Mended, ended: Sequence[int]) -> None:
        """Takes an answer in which envs failed; raises for those that failed too often."""
        assert self._failed_rows is not None  # noqa: S101
        pool = self.pool
        pool.done(call)
        given_up = self._failed_rows.restarts.crash_loops(mended.failures)
        failed = {env_index: GIVEN_UP for error in given_up for env_index in error.env_ids}
        pool.states.settle(call.seq, failed, ended)
        pool.forget_lost()
        if not mended.resets:
            pool.states.forget(list(mended.failures))
        if given_up:
            self.ring.give_back(call.buffer)
            if len(given_up) == 1:
                raise given_up[0]
            raise ExceptionGroup(f"{len(given_up)} failures in {call.command}", given_up)

    # ---- rows

    def _receive(
        self, call: PendingCall, replies: Sequence[BatchReply | None], buffer: Buffer
    ) -> list[tuple[Sequence[int], BatchReply]]:
        """The replies that say something; rows that came in them, where no memory is shared, go into the buffer."""
        workers = self.pool.workers
        answers = [
            (call.answered_by(workers[index].env_ids), reply)
            for index, reply in zip(sorted(call.payloads), replies, strict=True)
            if reply is not None
        ]
        for env_ids, reply in answers:
            if reply.arrays:
                for array, sent in zip(buffer.arrays(), reply.arrays, strict=True):
                    array[env_ids] = sent
        return answers

    def _gather(self, call: PendingCall, answers: Sequence[Answered]) -> tuple[list[list[Any]], dict[str, Any]]:
        """The values of the leaves without a fixed size, row by row, and the infos."""
        if not answers:
            return [], {}
        with_infos = [(env_ids, reply.infos) for env_ids, reply in answers if reply.infos]
        if call.env_ids is None:
            dynamic = [list(chain.from_iterable(parts)) for parts in zip(*(r.dynamic for _, r in answers), strict=True)]
            return dynamic, infos_.merge(with_infos, self._num_envs) if with_infos else {}
        position = {env_index: row for row, env_index in enumerate(call.env_ids)}
        dynamic = [[None] * len(position) for _ in self._layout.dynamic]
        for env_ids, reply in answers:
            for column, values in zip(dynamic, reply.dynamic, strict=True):
                for env_index, value in zip(env_ids, values, strict=True):
                    column[position[env_index]] = value
        in_rows = [
            ([position[env_index] for env_index in sorted(env_ids)], infos_.renumber(columns, position))
            for env_ids, columns in with_infos
        ]
        return dynamic, infos_.merge(in_rows, len(position)) if in_rows else {}

    def _complete(
        self, call: PendingCall, mended: Mended, answers: Sequence[Answered], buffer: Buffer
    ) -> tuple[list[list[Any]], dict[str, Any]]:
        """The same, with the rows of envs that failed; the buffer has them, too."""
        assert self._failed_rows is not None  # noqa: S101
        own = [worker.env_ids for worker in self.pool.workers]
        dynamic, entries = self._failed_rows.complete(mended, answers, own, buffer)
        rows = range(self._num_envs) if call.env_ids is None else call.env_ids
        position = {env_index: row for row, env_index in enumerate(rows)}
        in_rows = sorted((position[env_index], info) for env_index, info in entries.items() if env_index in position)
        columns = infos_.collect(in_rows, -1)
        infos = infos_.merge([(range(len(rows)), columns)], len(rows)) if columns else {}
        return [[column[env_index] for env_index in rows] for column in dynamic], infos

    def _whole(self, call: PendingCall, dynamic: list[list[Any]]) -> Any:
        """The observations of a whole batch, theirs to keep who asked."""
        arrays: list[npt.NDArray[Any]]
        if call.buffer != HOME:
            arrays = self.ring.lend(call.buffer)
        elif self._is_lent_home:
            arrays = self._buffers[HOME].observations
        else:
            arrays = [array.copy() for array in self._buffers[HOME].observations]
        return self._layout.assemble(arrays, dynamic)
