"""Writes what envs returned into a worker's rows of a buffer, never by a silent broadcast.

The step path writes a whole column at once: one check, one copy for all rows. Only where that fails is each
row looked at, to name the env, the leaf and both shapes, and to keep the rows of the envs that were right.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from aiovec.errors import InvalidEnvResultError
from aiovec.exchange.layout import Layout, Leaf
from aiovec.exchange.slab import Buffer, StripArrays

__all__ = ["RowWriter"]


class RowWriter:
    """One worker's rows of one buffer of a strip; `move` goes to another one.

    It moves since a rollout has a buffer for each step: as many writers would be found in no cache of the CPU.

    Args:
        layout: Of one env's observation.
        arrays: The strip.
        own: The worker's rows.
        env_ids: The envs they belong to.
        group: Those of its rows that whole columns are about, if not all.
        index: Of the buffer in the strip.
    """

    def __init__(
        self,
        layout: Layout,
        arrays: StripArrays,
        own: range,
        env_ids: range,
        group: range | None = None,
        index: int = 0,
    ) -> None:
        group = range(len(env_ids)) if group is None else group
        self._layout = layout
        self._arrays = arrays
        self._own = slice(own.start, own.stop)
        self._env_ids = env_ids
        self._group = group
        self._first = own.start + group.start
        self._width = arrays.rewards.shape[1]
        rows = slice(self._first, self._first + len(group))
        self._columns = [
            _Column(leaf, array[:, rows]) for leaf, array in zip(layout.fixed, arrays.observations, strict=True)
        ]
        self._pack_floats, self._pack_flags = _packers(len(group))
        self._flags = [memoryview(flags.view(np.uint8).reshape(-1)) for flags in arrays[2:4]]  # type: ignore[arg-type]
        self.move(index)

    def move(self, index: int) -> None:
        """Goes to a buffer of the strip."""
        self._index = index
        self._offset = index * self._width + self._first  # of the group, in rows
        self._cached_rows: Buffer | None = None
        for column in self._columns:
            column.move(index)

    @property
    def _rows(self) -> Buffer:
        """All of the worker's; not for the step path."""
        if self._cached_rows is None:
            self._cached_rows = self._arrays.buffer(self._index).rows(self._own)
        return self._cached_rows

    def write_observations(self, observations: Sequence[Any]) -> dict[int, InvalidEnvResultError]:
        """Writes one observation a row of the group; the wrong ones are returned by row, and their rows hold nothing."""
        try:
            for column in self._columns:
                column.write(column.leaf.column(observations))
            for leaf in self._layout.dynamic:
                leaf.column(observations)  # it has a value in every observation
        except (ValueError, TypeError, KeyError, IndexError):
            return self.write_some(self._group, observations)
        return {}

    def write_some(self, rows: Sequence[int], observations: Sequence[Any]) -> dict[int, InvalidEnvResultError]:
        """Like `write_observations`, for some rows, each looked at by itself."""
        errors: dict[int, InvalidEnvResultError] = {}
        for row, observation in zip(rows, observations, strict=True):
            try:
                values = [_checked(leaf, observation, self._env_ids[row]) for leaf in self._layout.fixed]
                for leaf in self._layout.dynamic:
                    _value(leaf, observation, self._env_ids[row])
            except InvalidEnvResultError as error:
                errors[row] = error
            else:
                for array, value in zip(self._rows.observations, values, strict=True):
                    array[row] = value
        return errors

    def write_outcomes(
        self, rewards: Sequence[Any], terminations: Sequence[Any], truncations: Sequence[Any]
    ) -> dict[int, InvalidEnvResultError]:
        """Writes the other three columns of the group; the wrong ones are returned by row."""
        try:
            _, rewards_of_all, terminations_of_all, truncations_of_all, _ = self._arrays
            self._pack_floats(rewards_of_all, 8 * self._offset, *rewards)
            self._pack_flags(terminations_of_all, self._offset, *terminations)
            self._pack_flags(truncations_of_all, self._offset, *truncations)
        except (struct.error, TypeError, ValueError):
            return self._write_outcomes_by_row(rewards, terminations, truncations)
        return {}

    def set_outcome(self, row: int, reward: Any, terminated: Any, truncated: Any) -> None:
        """Writes those of one row; raises `InvalidEnvResultError`."""
        for what, array, value in (
            ("reward", self._rows.rewards, reward),
            ("terminated", self._rows.terminations, terminated),
            ("truncated", self._rows.truncations, truncated),
        ):
            try:
                array[row] = value
            except (TypeError, ValueError):
                expected = f"a scalar that fits {array.dtype}"
                raise InvalidEnvResultError(self._env_ids[row], what, expected, _describe(value)) from None

    def set_observation(self, row: int, observation: Any) -> None:
        """Writes one observation; raises `InvalidEnvResultError`, and then the row holds nothing."""
        if self._layout.is_array:  # the usual case: a comparison each, one copy
            leaf, rows = self._layout.leaves[0], self._rows.observations[0]
            if type(observation) is np.ndarray and observation.shape == leaf.shape and observation.dtype == leaf.dtype:
                rows[row] = observation
                return
        errors = self.write_some([row], [observation])
        if errors:
            raise errors[row]

    def has_ended(self, row: int) -> bool:
        """Whether the last written outcome of a row ends an episode."""
        return bool(self._rows.terminations[row] or self._rows.truncations[row])

    def _write_outcomes_by_row(
        self, rewards: Sequence[Any], terminations: Sequence[Any], truncations: Sequence[Any]
    ) -> dict[int, InvalidEnvResultError]:
        errors: dict[int, InvalidEnvResultError] = {}
        for row, *outcome in zip(self._group, rewards, terminations, truncations, strict=True):
            try:
                self.set_outcome(row, *outcome)
            except InvalidEnvResultError as error:
                errors[row] = error
        return errors

    def ended(self) -> Sequence[int]:
        """The rows of the group whose last written outcome ends an episode."""
        start, stop = self._offset, self._offset + len(self._group)
        both = [flags[start:stop].tobytes() for flags in self._flags]
        if not (1 in both[0] or 1 in both[1]):
            return ()
        rows: set[int] = set()
        for flags in both:
            place = flags.find(1)
            while place >= 0:
                rows.add(self._group[place])
                place = flags.find(1, place + 1)
        return sorted(rows)

    def arrays(self) -> list[npt.NDArray[Any]]:
        """The rows, for a reply where no memory is shared."""
        return self._rows.arrays()


@functools.cache
def _packers(count: int) -> tuple[Any, Any]:
    """Functions that write so many numbers, and so many flags, into memory."""
    return struct.Struct(f"{count}d").pack_into, struct.Struct(f"{count}?").pack_into


class _Column:
    """One leaf of the group's rows, `[buffers, rows, *leaf.shape]`."""

    def __init__(self, leaf: Leaf, rows: npt.NDArray[Any]) -> None:
        self.leaf = leaf
        num_buffers, self._count = rows.shape[:2]
        # The rows end to end: joining observations along their first axis is the cheapest way to write many.
        self._joined = rows.reshape(num_buffers, self._count * leaf.shape[0], *leaf.shape[1:]) if leaf.shape else rows
        self._now = self._joined[0]

    def move(self, index: int) -> None:
        self._now = self._joined[index]

    def write(self, values: Sequence[Any]) -> None:
        """Raises `ValueError` or `TypeError` if any value does not fit; rows may then be half written."""
        shape = self.leaf.shape
        if not shape:
            self._write_scalars(values)
            return
        if list(map(len, values)).count(shape[0]) != self._count:
            raise ValueError
        # Checks all other dimensions; casts as np.stack does in Gymnasium's SyncVectorEnv (same_kind).
        np.concatenate(values, out=self._now)

    def _write_scalars(self, values: Sequence[Any]) -> None:
        array = np.array(values)
        if array.shape != self._now.shape or not np.can_cast(array.dtype, self.leaf.dtype, "same_kind"):
            raise ValueError
        self._now[...] = array


def _value(leaf: Leaf, observation: Any, env_index: int) -> Any:
    value = observation
    for key in leaf.path:
        try:
            value = value[key]
        except (KeyError, IndexError, TypeError):
            raise InvalidEnvResultError(
                env_index, "observation", f"a value at {leaf.name('observation')}", _describe(observation)
            ) from None
    return value


def _checked(leaf: Leaf, observation: Any, env_index: int) -> npt.NDArray[Any]:
    value = _value(leaf, observation, env_index)
    expected = f"shape {leaf.shape} of {leaf.dtype}"
    try:
        array = np.asarray(value)
    except ValueError as error:  # a ragged list
        raise InvalidEnvResultError(env_index, leaf.name("observation"), expected, _describe(value)) from error
    if array.shape != leaf.shape or not np.can_cast(array.dtype, leaf.dtype, "same_kind"):
        raise InvalidEnvResultError(env_index, leaf.name("observation"), expected, _describe(value))
    return array


def _describe(value: Any) -> str:
    if isinstance(value, (np.ndarray, np.generic)):
        return f"shape {value.shape} of {value.dtype}"
    if isinstance(value, dict):
        return f"a dict with the keys {list(value)}"
    if isinstance(value, (list, tuple)):
        return f"a {type(value).__name__} of length {len(value)}"
    return f"{value!r} ({type(value).__name__})"[:200]
