"""Infos: from one dict an env to one dict of arrays, as Gymnasium's vector environments give it.

Workers `collect` columns, the parent `merge`s them, so that the costly walk through every env's dict is done
in parallel. The result equals `gymnasium.vector.VectorEnv._add_info` (Gymnasium 1.4) called env by env in
ascending index, with one difference: where Gymnasium raises because values of one key do not fit one array,
the array has dtype `object` here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import numpy as np
import numpy.typing as npt

from aiovec.errors import InvalidEnvResultError
from aiovec.exchange import packed_infos
from aiovec.exchange.packed_infos import PackedInfos

__all__ = ["Column", "Columns", "as_dicts", "collect", "merge", "of_rows", "values_of", "without"]

# The envs that have the key (`None`: all of this worker), and a value each: a list, or a tuple where they are
# Python numbers of one type, their stack as one array where they are arrays of one shape and dtype, or the
# columns of nested dicts.
Column = tuple[list[int] | None, "list[Any] | tuple[Any, ...] | npt.NDArray[Any] | Columns"]
Columns = dict[str, Column]

_EXACT_NUMBERS = (int, float, bool)
_DEEPEST = 100  # dicts within dicts: one that is nested deeper, most often, holds itself


def collect(entries: Iterable[tuple[int, dict[str, Any]]], num_rows: int, path: tuple[str, ...] = ()) -> Columns:
    """The columns of one worker.

    Args:
        entries: Env index and info, ascending; an env may come twice if its keys differ.
        num_rows: How many envs the worker holds.
        path: The keys that have led here.

    Raises:
        InvalidEnvResultError: An env's dicts are nested without end.
    """
    gathered: dict[str, tuple[list[int], list[Any]]] = {}
    for env_index, info in entries:
        for key, value in info.items():
            column = gathered.get(key)
            if column is None:
                gathered[key] = ([env_index], [value])
            else:
                column[0].append(env_index)
                column[1].append(value)
    columns: Columns = {}
    for key, (env_ids, values) in gathered.items():
        columns[key] = (None if len(env_ids) == num_rows else env_ids, _compact((*path, key), env_ids, values))
    return columns


def _compact(
    path: tuple[str, ...], env_ids: list[int], values: list[Any]
) -> list[Any] | tuple[Any, ...] | npt.NDArray[Any] | Columns:
    first = values[0]
    if type(first) in _EXACT_NUMBERS and set(map(type, values)) == {type(first)}:
        return tuple(values)
    if path[-1] == "final_obs":
        return values
    if type(first) is np.ndarray and first.ndim and first.dtype.kind != "O":
        shape, dtype = first.shape, first.dtype
        if all(type(value) is np.ndarray and value.shape == shape and value.dtype == dtype for value in values):
            return np.stack(values)
    dicts = [(env_index, value) for env_index, value in zip(env_ids, values, strict=True) if isinstance(value, dict)]
    if dicts and len(path) > _DEEPEST:
        expected, got = f"dicts nested at most {_DEEPEST} deep", "deeper ones, or one that holds itself"
        raise InvalidEnvResultError(dicts[0][0], f"info {path[0]!r}", expected, got)
    if len(dicts) == len(values):
        return collect(dicts, -1, path)
    for item in dicts:  # beside something else they stay as they are, but in another batch they may be merged
        collect([item], -1, path)
    return values


def merge(parts: Sequence[tuple[Sequence[int], Columns | PackedInfos]], num_rows: int) -> dict[str, Any]:
    """The infos of a batch.

    Args:
        parts: For each worker, in ascending order of its envs, the rows of all its envs and its columns, in
            which env indices have been replaced by rows already.
        num_rows: Of the batch.

    Returns:
        For each key an array `[num_rows, …]` or a nested dict, and under ``_key`` the mask `[num_rows]` of
        the rows that have it.
    """
    packed = [columns for _, columns in parts if type(columns) is PackedInfos]
    if packed and len(packed) == len(parts) and (merged := packed_infos.merge(packed, num_rows)) is not None:
        return merged
    by_key: dict[str, list[tuple[Sequence[int], Any]]] = {}
    for all_rows, part in parts:
        columns = _columns_of(part)
        for key, (some_rows, values) in columns.items():
            column = (all_rows if some_rows is None else some_rows, values)
            if key in by_key:
                by_key[key].append(column)
            else:
                by_key[key] = [column]
    infos: dict[str, Any] = {}
    for key, columns_of_key in by_key.items():
        infos[key] = _merge_column(key, columns_of_key, num_rows)
        if sum([len(rows) for rows, _ in columns_of_key]) == num_rows:
            infos[f"_{key}"] = np.ones(num_rows, dtype=np.bool_)
            continue
        mask = np.zeros(num_rows, dtype=np.bool_)
        for rows, _ in columns_of_key:
            mask[_index(rows)] = True
        infos[f"_{key}"] = mask
    return infos


def of_rows(entries: Mapping[int, dict[str, Any]], env_ids: Sequence[int]) -> dict[str, Any]:
    """The infos of a batch with these rows, from those of its envs; no dtype depends on the order of the rows."""
    in_order = sorted(env_ids)
    place = {env_index: row for row, env_index in enumerate(in_order)}
    columns = collect([(place[env_index], entries[env_index]) for env_index in in_order if env_index in entries], -1)
    merged = merge([(range(len(in_order)), columns)], len(in_order)) if columns else {}
    return merged if in_order == list(env_ids) else _permuted(merged, [place[env_index] for env_index in env_ids])


def _permuted(infos: dict[str, Any], order: list[int]) -> dict[str, Any]:
    return {
        key: _permuted(values, order) if isinstance(values, dict) else values[order] for key, values in infos.items()
    }


def values_of(columns: Columns, env_ids: Sequence[int], path: str = "") -> Iterator[tuple[int, str, Any]]:
    """Each env's value of each key, as (env index, key, value)."""
    for key, (some_ids, values) in columns.items():
        of_envs = env_ids if some_ids is None else some_ids
        if isinstance(values, dict):
            yield from values_of(values, of_envs, f"{path}{key}.")
        else:
            for env_index, value in zip(of_envs, values, strict=True):
                yield env_index, path + key, value


def without(columns: Columns, env_ids: Sequence[int], dropped: AbstractSet[int]) -> Columns:
    """The columns without what some envs gave."""
    rest: Columns = {}
    for key, (some_ids, values) in columns.items():
        of_envs = env_ids if some_ids is None else some_ids
        kept = [position for position, env_index in enumerate(of_envs) if env_index not in dropped]
        if kept:
            ids = [of_envs[position] for position in kept]
            if isinstance(values, dict):
                rest[key] = (ids, without(values, of_envs, dropped))
            else:
                rest[key] = (ids, [values[position] for position in kept])
    return rest


def _columns_of(part: Columns | PackedInfos) -> Columns:
    return {**part.columns()} if isinstance(part, PackedInfos) else part


def _index(rows: Sequence[int]) -> Any:
    return slice(rows.start, rows.stop) if type(rows) is range else rows


def _merge_column(key: str, parts: list[tuple[Sequence[int], Any]], num_rows: int) -> Any:
    first = parts[0][1]
    if type(first) is tuple and key != "final_obs" and (numbers := _numbers_of_all(parts, num_rows)) is not None:
        return numbers
    if isinstance(first, dict) and all(isinstance(values, dict) for _, values in parts):
        return merge(parts, num_rows)
    if any(isinstance(values, dict) for _, values in parts):  # dicts here, something else there
        parts = [(rows, as_dicts(rows, values) if isinstance(values, dict) else values) for rows, values in parts]
    first = parts[0][1][0]
    try:
        if key == "final_obs":
            return _objects(parts, num_rows)
        if type(first) in _EXACT_NUMBERS or isinstance(first, np.number):
            return _numbers(parts, type(first), num_rows)
        if isinstance(first, np.ndarray):
            return _arrays(parts, first.shape, first.dtype, num_rows)
    except (TypeError, ValueError, OverflowError):  # values that do not fit one array: Gymnasium raises
        pass
    return _objects(parts, num_rows)


def _numbers_of_all(parts: list[tuple[Sequence[int], Any]], num_rows: int) -> npt.NDArray[Any] | None:
    """The usual case on the step path: every env has the key, with a Python number of one type; else `None`."""
    numbers: list[Any] = []
    kind = type(parts[0][1][0])
    for rows, values in parts:
        if type(rows) is not range or type(values) is not tuple or type(values[0]) is not kind:
            return None
        numbers += values
    if len(numbers) != num_rows:
        return None
    try:
        return np.array(numbers, dtype=kind)
    except OverflowError:  # an int beyond 64 bits
        return None


def _numbers(parts: list[tuple[Sequence[int], Any]], kind: type, num_rows: int) -> npt.NDArray[Any]:
    array: npt.NDArray[Any] = np.zeros(num_rows, dtype=kind)
    for rows, values in parts:
        if type(values) is tuple and type(values[0]) is kind:
            array[_index(rows)] = values
        else:
            for row, value in zip(rows, values, strict=True):
                array[row] = value
    return array


def _arrays(
    parts: list[tuple[Sequence[int], Any]], shape: tuple[int, ...], dtype: np.dtype[Any], num_rows: int
) -> npt.NDArray[Any]:
    array = np.zeros((num_rows, *shape), dtype=dtype)
    for rows, values in parts:
        if isinstance(values, np.ndarray) and values.shape[1:] == shape and values.dtype == dtype:
            array[_index(rows)] = values
        else:
            for row, value in zip(rows, values, strict=True):
                array[row] = value
    return array


def _objects(parts: list[tuple[Sequence[int], Any]], num_rows: int) -> npt.NDArray[Any]:
    array = np.full(num_rows, fill_value=None, dtype=object)
    for rows, values in parts:
        for row, value in zip(rows, values, strict=True):
            array[row] = value
    return array


def as_dicts(rows: Sequence[int], part: Columns | PackedInfos) -> list[dict[str, Any]]:
    """The dicts that `collect` took apart, one for each of these rows."""
    columns = _columns_of(part)
    dicts: dict[int, dict[str, Any]] = {row: {} for row in rows}
    for key, (some_rows, values) in columns.items():
        of_rows = rows if some_rows is None else some_rows
        column = as_dicts(of_rows, values) if isinstance(values, dict) else values
        for row, value in zip(of_rows, column, strict=True):
            dicts[row][key] = value
    return list(dicts.values())
