"""The rows of envs that failed and are built anew (`on_failure="restart"`): what a batch says of them.

A broken transition never looks like an ordinary one: its reward is NaN, it is truncated, and its info has the
exception. Its observation is the last valid one, or under SAME_STEP that of the new env.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode

from aiovec.exchange import infos as infos_
from aiovec.exchange.layout import Layout
from aiovec.exchange.messages import BatchReply
from aiovec.exchange.slab import Buffer
from aiovec.pool.pending_call import PendingCall
from aiovec.pool.pool import Pool
from aiovec.pool.restarts import Restarts

__all__ = ["FailedRows", "merged", "rows_of"]


class FailedRows:
    """Keeps each env's last valid observation, and completes batches in which some failed.

    Args:
        layout: Of one env's observation.
        num_envs: How many.
        mode: The autoreset mode.
        restarts: Who failed how often.
    """

    def __init__(self, layout: Layout, num_envs: int, mode: AutoresetMode, restarts: Restarts) -> None:
        self._layout = layout
        self._num_envs = num_envs
        self._same_step = mode is AutoresetMode.SAME_STEP
        self.restarts: Restarts = restarts
        self._last = [np.zeros((num_envs, *leaf.shape), leaf.dtype) for leaf in layout.fixed]
        self._last_dynamic: list[list[Any]] = [[None] * num_envs for _ in layout.dynamic]

    def keep(self, env_ids: Sequence[int] | None, buffer: Buffer, dynamic: Iterable[Sequence[Any]]) -> None:
        """Takes the observations of these rows, or of all, as the last valid ones; `dynamic` has these rows only."""
        for last, array in zip(self._last, buffer.observations, strict=True):
            if env_ids is None:
                np.copyto(last, array)
            else:
                last[env_ids] = array[env_ids]
        for column, values in zip(self._last_dynamic, dynamic, strict=True):
            for env_index, value in zip(range(self._num_envs) if env_ids is None else env_ids, values, strict=True):
                column[env_index] = copy.deepcopy(value)

    def complete(
        self, pool: Pool, call: PendingCall, replies: Sequence[BatchReply | None], buffer: Buffer
    ) -> tuple[list[list[Any]], dict[int, dict[str, Any]]]:
        """Completes a batch, its buffer included.

        Returns:
            For each leaf without a fixed size the values by env, and the info of each env that has one.
        """
        whole = zip(sorted(call.payloads), replies, strict=True) if replies else ()
        parts = [(_answered(pool, call, index), reply) for index, reply in whole if reply is not None] + call.parts
        dynamic = copy.deepcopy(self._last_dynamic)
        entries: dict[int, dict[str, Any]] = {}
        for env_ids, reply in parts:
            self._take_part(pool, env_ids, reply, buffer, dynamic, entries)
        is_step = not call.resets
        self._repeat_lost(pool, call, buffer)
        for env_index, exceptions in sorted(call.failures.items()):
            entry: dict[str, Any] = {}
            if is_step:
                buffer.rewards[env_index] = np.nan
                buffer.terminations[env_index], buffer.truncations[env_index] = False, True
                if self._same_step:
                    entry = {"final_obs": self._layout.row(self._last, self._last_dynamic, env_index), "final_info": {}}
                else:
                    for array, last in zip(buffer.observations, self._last, strict=True):
                        array[env_index] = last[env_index]
            failure = {"failure": _one(exceptions), "generation": self.restarts.generation(env_index)}
            entries[env_index] = {**entry, **entries.get(env_index, {}), **failure}
        return dynamic, dict(sorted(entries.items()))

    def _repeat_lost(self, pool: Pool, call: PendingCall, buffer: Buffer) -> None:
        """Under a `reset_mask` the other rows of a worker that died repeat their last observation."""
        for index in call.mended:
            request = call.resets.get(index)
            if request is None or request.rows is None or not request.whole_batch:
                continue
            own = pool.workers[index].env_ids
            others = [own[row] for row in range(len(own)) if row not in request.rows]
            for array, last in zip(buffer.observations, self._last, strict=True):
                array[others] = last[others]

    def _take_part(
        self,
        pool: Pool,
        env_ids: list[int],
        reply: BatchReply,
        buffer: Buffer,
        dynamic: list[list[Any]],
        entries: dict[int, dict[str, Any]],
    ) -> None:
        failed = {record.env_index for record in reply.failures}
        good = [env_index for env_index in env_ids if env_index not in failed]
        if reply.arrays and good:
            own = next(worker.env_ids for worker in pool.workers if good[0] in worker.env_ids)
            for array, sent in zip(buffer.arrays(), reply.arrays, strict=True):
                array[good] = sent[[env_index - own.start for env_index in good]]
        for column, values in zip(dynamic, reply.dynamic, strict=False):
            for env_index, value in zip(env_ids, values, strict=True):
                if env_index not in failed:
                    column[env_index] = value
        if reply.infos:
            in_order = sorted(env_ids)
            of_envs = zip(in_order, infos_.as_dicts(in_order, reply.infos), strict=True)
            entries.update({env_index: info for env_index, info in of_envs if info})


def _answered(pool: Pool, call: PendingCall, index: int) -> list[int]:
    """The envs that a worker's whole answer is about."""
    request = call.resets.get(index)
    return list(pool.workers[index].env_ids) if request is None or request.whole_batch else call.asked[index]


def _one(exceptions: list[Exception]) -> Exception:
    if len(exceptions) == 1:
        return exceptions[0]
    return ExceptionGroup(f"{len(exceptions)} failures before the env could be reset", exceptions)


def rows_of(dynamic: list[list[Any]], env_ids: Sequence[int]) -> list[list[Any]]:
    """The values of some envs, in their order."""
    return [[column[env_index] for env_index in env_ids] for column in dynamic]


def merged(entries: dict[int, dict[str, Any]], position: dict[int, int]) -> dict[str, Any]:
    """The infos of a batch from those of its envs."""
    rows = [(position[env_index], info) for env_index, info in entries.items() if env_index in position]
    columns = infos_.collect(sorted(rows, key=lambda row: row[0]), -1)
    return infos_.merge([(range(len(position)), columns)], len(position)) if columns else {}
