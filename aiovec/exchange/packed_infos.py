"""Infos of the usual kind, as bytes: every env has the same keys, with a Python number under each.

So they are with Atari, MuJoCo and most envs. Pickled and merged key by key they cost 8 Breakout a sixth of a
step; packed, the parent joins all keys of a kind at once. What differs in any way takes the general path of
`exchange.infos`, with the same result.
"""

from __future__ import annotations

import operator
import struct
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from aiovec.exchange import pickles

__all__ = ["MARK", "PackedInfos", "merge", "pack", "pack_one"]

MARK = b"\0"  # no pickle begins with it; nor with the mark of failures, see `exchange.replies`

_HEAD = struct.Struct("<cII")  # mark, nbytes of the schema, rows; then the schema, and a block for each kind
_KINDS = (int, float, bool)
_CODES = "qd?"
_DTYPES = (np.dtype("<i8"), np.dtype("<f8"), np.dtype(np.bool_))
_MOST_SCHEMAS = 256  # an env whose keys change all the time must not fill the memory


class PackedInfos(NamedTuple):
    """The infos of all envs of a worker; the bytes are the whole reply."""

    data: bytes

    def columns(self) -> dict[str, tuple[None, tuple[Any, ...]]]:
        """As `exchange.infos.collect` gives them."""
        _, nbytes, num_rows = _HEAD.unpack_from(self.data)
        schema = _schema_of(self.data[_HEAD.size : _HEAD.size + nbytes])
        values = schema.struct(num_rows).unpack_from(self.data, _HEAD.size + nbytes)
        in_order = {index: values[at * num_rows : (at + 1) * num_rows] for at, index in enumerate(schema.order)}
        return {key: (None, in_order[index]) for index, key in enumerate(schema.keys)}


class _Schema:
    """Keys and kinds, in order, and what follows from them: where each key lies in the block of its kind."""

    def __init__(self, keys: tuple[str, ...], kinds: tuple[int, ...]) -> None:
        self.keys = keys
        self.types = [_KINDS[kind] for kind in kinds]
        self.pickled = pickles.dumps_to_parent((keys, kinds))
        self._kinds = sorted(set(kinds))
        by_kind = [[index for index, of in enumerate(kinds) if of == kind] for kind in self._kinds]
        self._counts = [len(indices) for indices in by_kind]
        self.order = list(chain.from_iterable(by_kind))  # of the keys, as they are packed
        blocks = [self._kinds.index(kind) for kind in kinds]
        self._places = [
            (key, f"_{key}", block, by_kind[block].index(index))
            for index, (key, block) in enumerate(zip(keys, blocks, strict=True))
        ]
        self.values_of: Callable[[dict[str, Any]], tuple[Any, ...]] = (
            operator.itemgetter(*keys) if len(keys) > 1 else lambda info: tuple([info[key] for key in keys])
        )
        self._structs: dict[int, struct.Struct] = {}
        self._plans: dict[tuple[int, ...], _Plan] = {}

    def struct(self, num_rows: int) -> struct.Struct:
        """Of the blocks of so many rows."""
        if num_rows not in self._structs:
            codes = [_CODES[kind] for kind in self._kinds]
            blocks = "".join(f"{count * num_rows}{code}" for count, code in zip(self._counts, codes, strict=True))
            self._structs[num_rows] = struct.Struct(f"<{blocks}")
        return self._structs[num_rows]

    def merge(self, packed: Sequence[bytes], rows: tuple[int, ...]) -> dict[str, Any]:
        """The infos of a batch, from what workers with so many `rows` packed."""
        plan = self._plans.get(rows)
        if plan is None:
            plan = self._plans[rows] = self._plan(rows)
        blocks = [
            np.concatenate(
                [np.ndarray(shape, dtype, data, at) for data, (shape, dtype, at) in zip(packed, of, strict=True)],
                axis=1,
            )
            for of in plan.blocks
        ]
        return self._named(blocks, plan.masks.copy())

    def merge_rows(self, packed: Sequence[bytes]) -> dict[str, Any]:
        """The same, from one row each; of any number, without a plan for each."""
        num_rows = len(packed)
        rows = np.frombuffer(b"".join(packed), np.uint8).reshape(num_rows, -1)
        blocks: list[npt.NDArray[Any]] = []
        at = _HEAD.size + len(self.pickled)
        for count, kind in zip(self._counts, self._kinds, strict=True):
            end = at + count * _DTYPES[kind].itemsize
            blocks.append(np.ascontiguousarray(rows[:, at:end].copy().view(_DTYPES[kind]).T))
            at = end
        masks = np.ones((len(self.keys), num_rows), dtype=np.bool_)
        return self._named(blocks, masks)

    def _named(self, blocks: Sequence[npt.NDArray[Any]], masks: npt.NDArray[np.bool_]) -> dict[str, Any]:
        infos: dict[str, Any] = {}
        for position, (key, mask_key, block, index) in enumerate(self._places):
            infos[key] = blocks[block][index]
            infos[mask_key] = masks[position]
        return infos

    def _plan(self, rows: tuple[int, ...]) -> _Plan:
        offsets = [_HEAD.size + len(self.pickled)] * len(rows)
        blocks: list[list[tuple[tuple[int, int], np.dtype[Any], int]]] = []
        for count, kind in zip(self._counts, self._kinds, strict=True):
            dtype = _DTYPES[kind]
            blocks.append([((count, n), dtype, offset) for n, offset in zip(rows, offsets, strict=True)])
            offsets = [offset + count * n * dtype.itemsize for n, offset in zip(rows, offsets, strict=True)]
        return _Plan(blocks, np.ones((len(self.keys), sum(rows)), dtype=np.bool_))


class _Plan(NamedTuple):
    """How replies with so many rows each are read: for each kind the shape, dtype and offset in each of them."""

    blocks: list[list[tuple[tuple[int, int], np.dtype[Any], int]]]
    masks: npt.NDArray[np.bool_]


# By keys and types in a worker, `None` for those that do not pack; by their pickled form in the parent.
_schemas: dict[Any, _Schema | None] = {}
_UNKNOWN: Any = object()


def pack(infos: Sequence[dict[str, Any]]) -> PackedInfos | None:
    """The infos of all envs of a worker, none of them empty; `None` if they are not of the usual kind."""
    num_rows = len(infos)
    if list(map(type, infos)).count(dict) != num_rows:
        return None  # what an env should not have returned is told elsewhere
    first = infos[0]
    known = (*first, *map(type, first.values()))
    schema = _schemas.get(known, _UNKNOWN)
    if schema is _UNKNOWN:
        schema = _remember(known, _new_schema(tuple(first), tuple(map(type, first.values()))))
    if schema is None or list(map(len, infos)).count(len(first)) != num_rows:
        return None
    try:
        columns = list(zip(*map(schema.values_of, infos), strict=True))
        for kind, column in zip(schema.types, columns, strict=True):
            if list(map(type, column)).count(kind) != num_rows:
                return None
        values = chain.from_iterable([columns[index] for index in schema.order])
        data = schema.struct(num_rows).pack(*values)
    except (KeyError, struct.error):  # other keys, or an int beyond 64 bits
        return None
    return PackedInfos(_HEAD.pack(MARK, len(schema.pickled), num_rows) + schema.pickled + data)


def pack_one(info: dict[str, Any]) -> PackedInfos | None:
    """The same for one env."""
    if type(info) is not dict:
        return None
    known = (*info, *map(type, info.values()))
    schema = _schemas.get(known, _UNKNOWN)
    if schema is None or schema is _UNKNOWN:
        return pack([info])
    values = list(info.values())  # of the very keys and kinds of the schema
    try:
        data = schema.struct(1).pack(*[values[index] for index in schema.order])
    except struct.error:  # an int beyond 64 bits
        return None
    return PackedInfos(_HEAD.pack(MARK, len(schema.pickled), 1) + schema.pickled + data)


def merge(parts: Sequence[PackedInfos], num_rows: int) -> dict[str, Any] | None:
    """The infos of a batch, as `exchange.infos.merge` gives them; `None` if workers differ in keys or kinds.

    Args:
        parts: Of each worker, in ascending order of its envs.
        num_rows: Of the batch.
    """
    schemas: set[bytes] = set()
    packed: list[bytes] = []
    rows: list[int] = []
    for (data,) in parts:
        _, nbytes, n = _HEAD.unpack_from(data)
        schemas.add(data[_HEAD.size : _HEAD.size + nbytes])
        packed.append(data)
        rows.append(n)
    if len(schemas) > 1 or sum(rows) != num_rows:
        return None
    schema = _schema_of(schemas.pop())
    return schema.merge_rows(packed) if len(packed) == num_rows else schema.merge(packed, tuple(rows))


def _schema_of(pickled: bytes) -> _Schema:
    schema = _schemas.get(pickled)
    if schema is None:
        schema = _Schema(*pickles.loads(pickled))
        _remember(pickled, schema)
    return schema


def _new_schema(keys: tuple[Any, ...], types: tuple[type, ...]) -> _Schema | None:
    # Gymnasium treats `final_obs` in a way of its own.
    if set(map(type, keys)) != {str} or "final_obs" in keys or not set(types) <= set(_KINDS):
        return None
    return _Schema(keys, tuple(map(_KINDS.index, types)))


def _remember(known: Any, schema: _Schema | None) -> _Schema | None:
    if len(_schemas) >= _MOST_SCHEMAS:
        _schemas.clear()
    _schemas[known] = schema
    return schema
