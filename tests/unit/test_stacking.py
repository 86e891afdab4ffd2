"""Observations as a batch and its rows again: as Gymnasium batches them, and nothing is lost."""

from __future__ import annotations

from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector.utils import concatenate, create_empty_array
from hypothesis import given
from hypothesis import strategies as st
from unit.strategies import same, stackable_spaces

from aiovec.errors import InvalidBatchResultError, InvalidObservationError
from aiovec.stacking import Structure, rows_of


def samples(space: gym.Space[Any], seed: int, count: int) -> list[Any]:
    space.seed(seed)
    return [space.sample() for _ in range(count)]


def batch_of(observations: list[Any]) -> Any:
    structure = Structure(observations[0])
    for observation in observations:
        structure.check(observation)
    return structure.stack(observations)


def scalars_as_arrays(value: Any) -> Any:
    """An array without a dimension and a number of the same dtype are the same row."""
    if isinstance(value, dict):
        return {key: scalars_as_arrays(member) for key, member in value.items()}
    if isinstance(value, spaces.GraphInstance):
        return value
    if isinstance(value, tuple):
        return tuple(map(scalars_as_arrays, value))
    return np.asarray(value) if isinstance(value, np.generic) else value


def tuples(value: Any) -> Any:
    """What does not stack is a tuple of a class of ours."""
    if isinstance(value, dict):
        return {key: tuples(member) for key, member in value.items()}
    if isinstance(value, tuple) and not isinstance(value, spaces.GraphInstance):
        return tuple(map(tuples, value))
    return value


@given(stackable_spaces, st.integers(0, 2**31), st.integers(1, 4))
def test_row_i_of_the_batch_is_observation_i(space: gym.Space[Any], seed: int, count: int) -> None:
    observations = samples(space, seed, count)
    rows = rows_of(batch_of(observations), count)
    assert same(list(map(scalars_as_arrays, rows)), list(map(scalars_as_arrays, observations)))


@given(stackable_spaces, st.integers(0, 2**31), st.integers(1, 4))
def test_the_batch_is_gymnasiums(space: gym.Space[Any], seed: int, count: int) -> None:
    observations = samples(space, seed, count)
    expected = concatenate(space, observations, create_empty_array(space, n=count))
    assert same(tuples(batch_of(observations)), expected)


class Pair(NamedTuple):
    first: Any
    second: Any


class Tensor:
    """Has a length and rows, and is none of numpy's."""

    def __init__(self, *rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Any:
        return self.rows[row]


@pytest.mark.parametrize(
    ("observations", "batch"),
    [
        ([1, 2], np.array([1, 2])),
        ([1.5, 2], None),
        ([True, False], np.array([True, False])),
        ([np.float32(1), np.array(2, np.float32)], np.array([1, 2], np.float32)),
        ([np.zeros((0, 3)), np.zeros((0, 3))], np.zeros((2, 0, 3))),
        ([[1], [2, 3]], ([1], [2, 3])),
        ([None, "a"], (None, "a")),
        ([np.array(["a"]), np.array(["bc"])], None),
        ([Pair(1, "a"), Pair(2, "b")], Pair(np.array([1, 2]), ("a", "b"))),
        ([{"a": 1, "b": 2.0}, {"b": 3.0, "a": 4}], {"a": np.array([1, 4]), "b": np.array([2.0, 3.0])}),
        ([(), ()], ()),
    ],
)
def test_what_stacks_and_what_does_not(observations: list[Any], batch: Any) -> None:
    if batch is None and isinstance(observations[0], float):
        with pytest.raises(InvalidObservationError, match="expected float64 of shape"):
            batch_of(observations)
        return
    made = batch_of(observations)
    if batch is None:
        assert tuple(made) == tuple(observations)
    elif isinstance(batch, Pair):
        assert isinstance(made, Pair)
        assert same(tuples(made), tuples(batch))
    else:
        assert same(tuples(made), batch)


def test_a_batch_is_a_copy() -> None:
    """Also of a single row."""
    observation = np.zeros(3)
    batch = batch_of([observation])
    observation[:] = 1
    assert not batch.any()


FIRST = {"a": np.zeros(3, np.float32), "b": (np.int64(1), "text")}


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"a": np.zeros(4, np.float32)}, "observation['a']: expected float32 of shape (3,), as"),
        ({"a": np.zeros(4, np.float32)}, "got float32 of shape (4,). It was not queued."),
        ({"a": np.zeros(3)}, "observation['a']: expected float32 of shape (3,)"),
        ({"a": "text"}, "got an object that does not stack, str"),
        ({"a": {}}, "got a dict with the keys []"),
        ({"b": (np.int64(1),)}, "observation['b']: expected a tuple of length 2"),
        ({"b": [np.int64(1), "text"]}, "got an object that does not stack, list"),
        ({"b": (np.int64(1), 2)}, "observation['b'][1]: expected an object that does not stack, str"),
        ({"b": (1.5, "text")}, "observation['b'][0]: expected int64 of shape (), as"),
        ({"c": 1}, "observation: expected a dict with the keys ['a', 'b'], as"),
    ],
)
def test_an_observation_that_differs_is_told_where(changed: dict[str, Any], text: str) -> None:
    structure = Structure(FIRST)
    structure.check({"b": (7, "another"), "a": np.ones(3, np.float32)})
    with pytest.raises(InvalidObservationError) as caught:
        structure.check({**FIRST, **changed})
    assert text in str(caught.value)
    assert "keys ['a', 'b']" in repr(structure)


@pytest.mark.parametrize("observation", [np.zeros(3, np.float32), (np.zeros(3, np.float32),), {}, None, "text"])
def test_another_kind_altogether_is_told_too(observation: Any) -> None:
    with pytest.raises(InvalidObservationError, match="observation: expected a dict"):
        Structure(FIRST).check(observation)


@pytest.mark.parametrize(
    ("result", "rows"),
    [
        (np.arange(2), [np.int64(0), np.int64(1)]),
        (np.arange(4).reshape(2, 2), [np.array([0, 1]), np.array([2, 3])]),
        ([1, "a"], [1, "a"]),
        (Tensor(5, 6), [5, 6]),
        ((np.arange(2), [3, 4], Tensor(5, 6)), [(np.int64(0), 3, 5), (np.int64(1), 4, 6)]),
        ({"a": [1, 2], "b": ([3, 4],)}, [{"a": 1, "b": (3,)}, {"a": 2, "b": (4,)}]),
        (Pair([1, 2], [3, 4]), [Pair(1, 3), Pair(2, 4)]),
        ({}, [{}, {}]),
    ],
)
def test_rows_have_the_structure_of_the_result(result: Any, rows: list[Any]) -> None:
    assert same(rows_of(result, 2), rows)


def test_rows_of_an_array_are_copies() -> None:
    result = np.zeros((2, 3))
    rows = rows_of((result, result), 2)
    result[:] = 1
    rows[0][0][:] = 2
    assert not rows[0][1].any()
    assert not rows[1][0].any()
    assert rows[0][0].base is None


async def coroutine() -> None:
    """Never awaited."""


@pytest.mark.parametrize(
    ("result", "text"),
    [
        (np.zeros((3, 2)), "a wrong result: expected 2 rows, one for each observation, got 3 rows."),
        ([1], "got 1 rows"),
        ((np.zeros(2), {"a": Tensor(1)}), "a wrong result[1]['a']: expected 2 rows, one for each observation, got 1"),
        (None, "got NoneType"),
        (7, "got int"),
        (np.array(7), "got ndarray of shape ()"),
        (np.float32(7), "got float32"),
        ("ab", "got str"),
        (("a", "b"), "a wrong result[0]: expected 2 rows, one for each observation, got str"),
        ({1, 2}, "got set"),
    ],
)
def test_a_wrong_number_of_rows(result: Any, text: str) -> None:
    with pytest.raises(InvalidBatchResultError) as caught:
        rows_of(result, 2)
    assert text in str(caught.value)


def test_a_coroutine_is_no_batch() -> None:
    with pytest.raises(InvalidBatchResultError, match="got a coroutine: make the function itself an `async def`"):
        rows_of(coroutine(), 2)
