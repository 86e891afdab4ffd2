"""Infos, collected by workers and merged by the parent, equal Gymnasium's own, env by env."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from gymnasium.vector import VectorEnv
from hypothesis import given
from hypothesis import strategies as st
from unit.strategies import same

from aiovec.errors import InvalidEnvResultError
from aiovec.exchange.infos import collect, merge, of_rows

Info = dict[str, Any]


class Reference(VectorEnv[Any, Any, Any]):
    """Gymnasium's own merge."""

    def __init__(self, num_envs: int) -> None:
        self.num_envs = num_envs

    def merged(self, infos: list[Info]) -> Info:
        """All infos, added in ascending env index."""
        merged: Info = {}
        for env_index, info in enumerate(infos):
            merged = self._add_info(merged, info, env_index)
        return merged


def through_workers(infos: list[Info], bounds: list[int]) -> Info:
    """The infos collected by workers that end at `bounds`, then merged."""
    parts = []
    for start, stop in zip([0, *bounds], [*bounds, len(infos)], strict=True):
        ids = range(start, stop)
        parts.append((ids, collect([(index, infos[index]) for index in ids if infos[index]], len(ids))))
    return merge(parts, len(infos))


numbers = st.one_of(
    st.integers(-(2**70), 2**70),
    st.integers(-5, 5),
    st.floats(),
    st.booleans(),
    st.builds(np.float32, st.floats(width=32)),
    st.builds(np.int8, st.integers(-128, 127)),
    st.builds(np.uint64, st.integers(0, 2**64 - 1)),
    st.builds(np.bool_, st.booleans()),
)
arrays = st.builds(
    lambda shape, dtype, value: np.full(shape, value).astype(dtype),
    st.sampled_from([(), (1,), (2,), (2, 3), (0,)]),
    st.sampled_from([np.float32, np.int64, np.uint8, np.bool_, "<U3", object]),
    st.integers(0, 9),
)
others = st.one_of(st.none(), st.text(max_size=3), st.lists(st.integers(), max_size=2), st.tuples(st.integers()))
keys = st.sampled_from(["steps", "lives", "episode", "final_obs", "final_info"])


def dicts(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Info]:
    """Infos with some of the keys, in any order."""
    return st.dictionaries(keys, values, max_size=4)


any_values = st.recursive(st.one_of(numbers, arrays, others), dicts, max_leaves=5)

# What tidy envs give: each key has one kind of value, here and there missing, in any order.
tidy_values = {
    "steps": st.integers(-(2**63), 2**63 - 1),
    "lives": st.floats(),
    "won": st.booleans(),
    "name": st.one_of(st.none(), st.text(max_size=3)),
    "position": st.builds(lambda value: np.full((2,), value, np.float32), st.integers(0, 9)),
    "speed": st.builds(np.float32, st.floats(width=32)),
    "final_obs": st.builds(lambda value: np.full((2,), value, np.float32), st.integers(0, 9)),
}


def tidy_infos(nested: bool) -> st.SearchStrategy[Info]:
    """Infos of tidy envs."""
    values = dict(tidy_values)
    if nested:
        values |= {"episode": tidy_infos(nested=False), "final_info": tidy_infos(nested=False)}
    return st.fixed_dictionaries({}, optional=values).flatmap(
        lambda info: st.permutations(list(info.items())).map(dict)
    )


def with_bounds(infos: st.SearchStrategy[Info]) -> st.SearchStrategy[tuple[list[Info], list[int]]]:
    """Infos of some envs, and where one worker ends and the next begins."""
    return st.lists(infos, min_size=1, max_size=6).flatmap(
        lambda infos: st.tuples(st.just(infos), st.lists(st.integers(0, len(infos)), max_size=3).map(sorted))
    )


@given(with_bounds(tidy_infos(nested=True)))
def test_tidy_infos_equal_gymnasium(drawn: tuple[list[Info], list[int]]) -> None:
    """Values, dtypes, masks and the order of keys, however the envs are split into workers."""
    infos, bounds = drawn
    assert same(through_workers(infos, bounds), Reference(len(infos)).merged(infos))


def has_dict_beside_others(infos: list[Info]) -> bool:
    """Whether some key is a dict here and something else there, which Gymnasium mixes up without a word."""
    for key in {key for info in infos for key in info if key != "final_obs"}:
        values = [info[key] for info in infos if key in info]
        nested = [value for value in values if isinstance(value, dict)]
        if nested and (len(nested) < len(values) or has_dict_beside_others(nested)):
            return True
    return False


@given(with_bounds(dicts(any_values)))
def test_any_infos_equal_gymnasium_or_are_objects(drawn: tuple[list[Info], list[int]]) -> None:
    """Where Gymnasium raises: the values themselves in arrays of objects. Never an error, in no split."""
    infos, bounds = drawn
    merged = through_workers(infos, bounds)
    if not has_dict_beside_others(infos):
        try:
            expected = Reference(len(infos)).merged(infos)
        except (TypeError, ValueError, OverflowError):
            pass
        else:
            assert same(merged, expected)
            return
    keys = list(dict.fromkeys(key for info in infos for key in info))
    assert list(merged) == [name for key in keys for name in (key, f"_{key}")]
    for key in keys:
        assert merged[f"_{key}"].tolist() == [key in info for info in infos]


ONE_AND_NONE = [
    ([1, "x"], "a number, then a word"),
    ([1, None], "an int, then None"),
    ([2**63, -1], "too large for int64"),
    ([1, 2**64], "too large for int64 later"),
    ([np.zeros(2), np.zeros(3)], "ragged arrays"),
    ([np.zeros((2, 2)), np.zeros((2, 3))], "ragged arrays of one length"),
    ([np.zeros(2), {"x": 1}], "an array, then a dict"),
    ([{"x": 1}, np.zeros(2)], "a dict, then an array"),
    ([{"x": 1}, 3], "a dict, then a number"),
    ([{"x": {"y": np.ones(2)}}, "none"], "a nested dict, then a word"),
    ([0.5, np.zeros(2)], "a number, then an array"),
]


@pytest.mark.parametrize("split", [[], [1]], ids=["one worker", "two workers"])
@pytest.mark.parametrize("values", [values for values, _ in ONE_AND_NONE], ids=[why for _, why in ONE_AND_NONE])
def test_values_that_fit_no_array_are_kept_as_objects(values: list[Any], split: list[int]) -> None:
    """Each env's own value, unchanged, and `None` for an env without it."""
    infos = [{"key": values[0]}, {"key": values[1]}, {}]
    merged = through_workers(infos, split)
    assert merged["key"].dtype == object
    assert merged["_key"].tolist() == [True, True, False]
    assert same(merged["key"][0], values[0])
    assert same(merged["key"][1], values[1])
    assert merged["key"][2] is None


@pytest.mark.parametrize("split", [[], [1]], ids=["one worker", "two workers"])
@pytest.mark.parametrize("value", [np.array(True), np.array("x"), np.array(3, np.uint8), np.array(0.5)], ids=repr)
def test_arrays_without_a_dimension_equal_gymnasium(value: np.ndarray[Any, Any], split: list[int]) -> None:
    """What a calculation with arrays leaves: they are stacked like any others."""
    infos = [{"won": value}, {"won": value}]
    assert same(through_workers(infos, split), Reference(2).merged(infos))


def test_one_untidy_key_does_not_spoil_the_others() -> None:
    """Only the key that does not fit becomes objects."""
    merged = through_workers([{"good": 1, "bad": 1}, {"good": 2, "bad": "x"}], [1])
    assert merged["good"].dtype == np.int64
    assert merged["bad"].dtype == object


def test_an_env_may_come_twice() -> None:
    """As under SAME_STEP: its last observation and info, then the info of its reset."""
    entries = [(0, {"final_obs": "end", "final_info": {"steps": 5}}), (0, {"steps": 0}), (1, {"steps": 3})]
    merged = merge([(range(2), collect(entries, 2))], 2)
    assert merged["steps"].tolist() == [0, 3]
    assert merged["final_obs"].tolist() == ["end", None]
    assert merged["final_info"]["steps"].tolist() == [5, 0]
    assert merged["_final_info"].tolist() == [True, False]


def test_arrays_of_one_shape_travel_as_one_array() -> None:
    """A worker stacks them, so the parent copies once; other values stay as they are."""
    columns = collect([(4, {"a": np.zeros(2), "b": "x"}), (5, {"a": np.ones(2), "c": {"d": 1}})], 2)
    assert columns["a"][0] is None
    assert same(columns["a"][1], np.array([[0.0, 0.0], [1.0, 1.0]]))
    assert columns["b"] == ([4], ["x"])
    assert columns["c"] == ([5], {"d": ([5], (1,))})


def test_infos_of_some_rows() -> None:
    """In the order of the rows, also in nested dicts; who has none is masked out."""
    merged = of_rows({4: {"a": 1, "n": {"x": 1}}, 7: {"a": 2}, 9: {"n": {"x": 2}}}, [7, 9, 4])
    assert merged["a"].tolist() == [2, 0, 1]
    assert merged["_a"].tolist() == [True, False, True]
    assert merged["n"]["x"].tolist() == [0, 2, 1]
    assert merged["_n"].tolist() == [False, True, True]
    assert of_rows({}, [3, 1]) == {}


@given(with_bounds(tidy_infos(nested=True)), st.randoms(use_true_random=False))
def test_part_batches_are_the_whole_batch_in_another_order(drawn: tuple[list[Info], list[int]], random: Any) -> None:
    """They hold, row by row, what the envs said, with the dtypes of ascending env index."""
    infos, _ = drawn
    env_ids = random.sample(range(len(infos)), len(infos))
    merged = of_rows({index: info for index, info in enumerate(infos) if info}, env_ids)
    assert same(merged, reordered(Reference(len(infos)).merged(infos), env_ids))


def reordered(infos: Info, env_ids: list[int]) -> Info:
    """The rows of a whole batch in another order."""
    return {
        key: reordered(value, env_ids) if isinstance(value, dict) else value[env_ids] for key, value in infos.items()
    }


def nested(depth: int) -> Info:
    """Dicts within dicts."""
    info: Info = {"value": 1}
    for _ in range(depth):
        info = {"inner": info}
    return info


@pytest.mark.parametrize("others", [[], [(3, {"inner": 1})], [(3, nested(4))], [(1, {"inner": 1}), (3, {"own": 1})]])
def test_dicts_nested_without_end_are_told_by_env(others: list[tuple[int, Info]]) -> None:
    """Whatever the others have under the same key; in another batch it might be merged."""
    endless: Info = {}
    endless["inner"] = endless
    for info in (endless, nested(200)):
        with pytest.raises(InvalidEnvResultError, match="env 2 returned a wrong info 'inner'"):
            collect(sorted([(2, info), *others], key=lambda item: item[0]), 4)


def test_deeply_nested_dicts_equal_gymnasium() -> None:
    """As far as anybody would nest them."""
    infos = [nested(90), nested(90), {}]
    assert same(through_workers(infos, [1]), Reference(3).merged(infos))


def test_no_infos_are_an_empty_dict() -> None:
    """As Gymnasium gives it."""
    assert merge([(range(2), collect([], 2))], 2) == {}
    assert merge([], 2) == {}
