"""The rows of envs that failed and are built anew (`on_failure="restart"`): what a batch says of them.

A broken transition never looks like an ordinary one: its reward is NaN, it is truncated, and its info has the
exception. Its observation is the last valid one, or under SAME_STEP that of the new env.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode

from aiovec.exchange import infos as infos_
from aiovec.exchange.layout import Layout
from aiovec.exchange.messages import BatchReply, ResetRequest
from aiovec.exchange.slab import Buffer
from aiovec.pool.mended import Mended
from aiovec.pool.restarts import Restarts

__all__ = ["Answered", "FailedRows"]

Answered = tuple[Sequence[int], BatchReply]  # the envs of a reply's rows, in order, and the reply


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

    def repeat(self, buffer: Buffer) -> list[list[Any]]:
        """Writes all last observations into a buffer; those of leaves without a fixed size are returned."""
        for array, last in zip(buffer.observations, self._last, strict=True):
            np.copyto(array, last)
        return copy.deepcopy(self._last_dynamic)

    def complete(
        self,
        mended: Mended,
        resets: Mapping[int, ResetRequest],
        answers: Sequence[Answered],
        own_env_ids: Sequence[range],
        buffer: Buffer,
        env_ids: Iterable[int] | None,
    ) -> tuple[list[list[Any]], dict[int, dict[str, Any]]]:
        """Completes a batch, its buffer included.

        Args:
            mended: What the call remembers.
            resets: See `PendingCall`.
            answers: What workers answered as a whole.
            own_env_ids: The envs of each worker.
            buffer: Of the call.
            env_ids: Whose rows are completed, if not all.

        Returns:
            For each leaf without a fixed size the values by env, and the info of each env that has one.
        """
        dynamic = [list(column) for column in self._last_dynamic]
        entries: dict[int, dict[str, Any]] = {}
        wanted = set(range(self._num_envs) if env_ids is None else env_ids)
        for answered, reply in [*answers, *((part.env_ids, part.reply) for part in mended.parts)]:
            _take_part(answered, reply, wanted, buffer, dynamic, entries)
        self._repeat_lost(mended, resets, own_env_ids, buffer)
        for env_index, failing in sorted(mended.failures.items()):
            if env_index not in wanted:
                continue
            entry: dict[str, Any] = {}
            if not resets:  # a step
                buffer.rewards[env_index] = np.nan
                buffer.terminations[env_index], buffer.truncations[env_index] = False, True
                if self._same_step:
                    entry = {"final_obs": self._layout.row(self._last, self._last_dynamic, env_index), "final_info": {}}
                else:
                    for array, last in zip(buffer.observations, self._last, strict=True):
                        array[env_index] = last[env_index]
            failure = {
                "failure": _one([read() for read in failing]),
                "generation": self.restarts.generation(env_index),
            }
            entries[env_index] = {**entry, **entries.get(env_index, {}), **failure}
        return copy.deepcopy(dynamic), dict(sorted(entries.items()))

    def _repeat_lost(
        self, mended: Mended, resets: Mapping[int, ResetRequest], own_env_ids: Sequence[range], buffer: Buffer
    ) -> None:
        """Under a `reset_mask` the other rows of a worker that died repeat their last observation."""
        for index in mended.in_parts:
            request = resets.get(index)
            if request is None or request.rows is None or not request.whole_batch:
                continue
            own = own_env_ids[index]
            others = [own[row] for row in range(len(own)) if row not in request.rows]
            for array, last in zip(buffer.observations, self._last, strict=True):
                array[others] = last[others]


def _take_part(
    env_ids: Sequence[int],
    reply: BatchReply,
    wanted: AbstractSet[int],
    buffer: Buffer,
    dynamic: list[list[Any]],
    entries: dict[int, dict[str, Any]],
) -> None:
    failed = {record.env_index for record in reply.failures}
    good = [position for position, env_index in enumerate(env_ids) if env_index in wanted and env_index not in failed]
    if reply.arrays and good:
        for array, sent in zip(buffer.arrays(), reply.arrays, strict=True):
            array[[env_ids[position] for position in good]] = sent[good]
    for column, values in zip(dynamic, reply.dynamic, strict=False):
        for position in good:
            column[env_ids[position]] = values[position]
    if reply.infos:
        in_order = sorted(env_ids)
        of_envs = zip(in_order, infos_.as_dicts(in_order, reply.infos), strict=True)
        entries.update({env_index: info for env_index, info in of_envs if info and env_index in wanted})


def _one(exceptions: list[Exception]) -> Exception:
    if len(exceptions) == 1:
        return exceptions[0]
    return ExceptionGroup(f"{len(exceptions)} failures before the env could be reset", exceptions)
