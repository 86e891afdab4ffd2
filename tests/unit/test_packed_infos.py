"""Packed infos give what the general path gives, or are refused."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
from conformance.comparing import assert_same
from hypothesis import given
from hypothesis import strategies as st

from aiovec.exchange import infos, packed_infos
from aiovec.exchange.packed_infos import MARK, PackedInfos

int64s = st.integers(-(2**63), 2**63 - 1)
VALUES: dict[type, st.SearchStrategy[Any]] = {int: int64s, float: st.floats(), bool: st.booleans()}


@st.composite
def usual_infos(draw: st.DrawFn) -> list[list[dict[str, Any]]]:
    """Of one to three workers with one to four envs each."""
    kinds = draw(st.dictionaries(st.text(max_size=4), st.sampled_from(list(VALUES)), min_size=1, max_size=6))
    kinds.pop("final_obs", None)
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    return [
        [{key: draw(VALUES[kind]) for key, kind in kinds.items()} if kinds else {"x": 1} for _ in range(size)]
        for size in sizes
    ]


def general(by_worker: list[list[dict[str, Any]]]) -> tuple[dict[str, Any], int]:
    """What the general path makes of them."""
    parts, start = [], 0
    for own in by_worker:
        rows = range(start, start + len(own))
        parts.append((rows, infos.collect(zip(rows, own, strict=True), len(own))))
        start = rows.stop
    return infos.merge(parts, start), start


@given(usual_infos())
def test_the_same_as_the_general_path(by_worker: list[list[dict[str, Any]]]) -> None:
    """Keys in their order, dtypes, values and masks; all workers packed, or only the first."""
    expected, num_rows = general(by_worker)
    packed = [packed_infos.pack(own) for own in by_worker]
    merged = packed_infos.merge([part for part in packed if part is not None], num_rows)
    assert merged is not None
    assert list(merged) == list(expected)
    assert_same(merged, expected, "packed")
    parts: list[Any] = []
    start = 0
    for position, (own, part) in enumerate(zip(by_worker, packed, strict=True)):
        rows = range(start, start + len(own))
        parts.append((rows, infos.collect(zip(rows, own, strict=True), len(own)) if position else part))
        start = rows.stop
    assert_same(infos.merge(parts, num_rows), expected, "mixed")


@given(st.lists(st.tuples(int64s, st.floats(), st.booleans(), int64s), min_size=1, max_size=9))
def test_rows_of_any_number_one_by_one(values: list[tuple[Any, ...]]) -> None:
    """As `recv` has them: the same result, and nothing is remembered for each number."""
    own = [dict(zip("abcd", row, strict=True)) for row in values]
    packed = [packed_infos.pack_one(info) for info in own]
    assert packed == [packed_infos.pack([info]) for info in own]
    merged = packed_infos.merge([part for part in packed if part is not None], len(own))
    assert merged is not None
    assert_same(merged, general([[info] for info in own])[0], "one by one")
    schema = packed_infos._schemas[(*own[0], *map(type, own[0].values()))]
    assert schema is not None
    assert not schema._plans


@pytest.mark.parametrize("sizes", [(1,), (1, 1), (2,), (2, 1)])
def test_what_is_merged_is_writable_and_apart(sizes: tuple[int, ...]) -> None:
    packed = [packed_infos.pack([{"a": 1, "b": 2}] * size) for size in sizes]
    merged = packed_infos.merge([part for part in packed if part is not None], sum(sizes))
    assert merged is not None
    merged["a"][:] = 9
    merged["_a"][:] = False
    assert merged["b"].tolist() == [2] * sum(sizes)
    assert merged["_b"].tolist() == [True] * sum(sizes)


@pytest.mark.parametrize(
    "unusual",
    [
        [{"a": 1}, {"a": 1.0}],
        [{"a": 1}, {"b": 1}],
        [{"a": 1}, {"a": 1, "b": 1}],
        [{"a": 1}, {}],
        [{"a": 1}, {"a": True}],
        [{"a": 1}, [1]],
        [[1], {"a": 1}],
        [[1]],
        [{"a": "text"}],
        [{"a": np.float32(1)}],
        [{"a": {"b": 1}}],
        [{"a": 2**63}],
        [{"a": None}],
        [{1: 1}],
        [{"final_obs": 1}],
    ],
    ids=repr,
)
def test_anything_else_is_for_the_general_path(unusual: list[Any]) -> None:
    assert packed_infos.pack(unusual) is None
    if len(unusual) == 1:
        assert packed_infos.pack_one(unusual[0]) is None
        assert packed_infos.pack_one(unusual[0]) is None  # once it is known, too


def test_workers_that_differ_are_merged_by_the_general_path() -> None:
    ours, theirs = [{"a": 1, "b": 2.0}], [{"a": 3}]
    packed = [packed_infos.pack(own) for own in (ours, theirs)]
    assert packed[0] is not None
    assert packed[1] is not None
    assert packed_infos.merge([packed[0], packed[1]], 2) is None
    merged = infos.merge([(range(1), packed[0]), (range(1, 2), packed[1])], 2)
    assert_same(merged, general([ours, theirs])[0], "differ")


def test_keys_in_another_order_are_the_same_keys() -> None:
    packed = packed_infos.pack([{"a": 1, "b": 2.0}, {"b": 3.0, "a": 4}])
    assert packed is not None
    assert packed.columns() == {"a": (None, (1, 4)), "b": (None, (2.0, 3.0))}


def test_no_pickle_looks_packed() -> None:
    packed = packed_infos.pack([{"a": 1}])
    assert packed is not None
    assert packed.data.startswith(MARK)
    assert not pickle.dumps(packed, protocol=pickle.HIGHEST_PROTOCOL).startswith(MARK)
    assert pickle.loads(pickle.dumps(packed)) == packed


def test_keys_that_change_all_the_time_do_not_fill_the_memory() -> None:
    for number in range(2000):
        packed = packed_infos.pack([{f"key {number}": number}])
        assert isinstance(packed, PackedInfos)
        assert packed_infos.merge([packed], 1) is not None
    assert len(packed_infos._schemas) <= packed_infos._MOST_SCHEMAS
