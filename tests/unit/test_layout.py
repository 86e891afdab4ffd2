"""Spaces become leaves, leaves become arrays over memory, and arrays become the batch again."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector.utils import concatenate, create_empty_array
from hypothesis import given
from hypothesis import strategies as st
from unit.strategies import fixed_spaces, nested_spaces, same

from aiovec.exchange.layout import ALIGNMENT, Layout, Leaf, align


@given(st.integers(0, 10**12))
def test_align_is_the_next_multiple(nbytes: int) -> None:
    """Never less, never a whole cache line more."""
    aligned = align(nbytes)
    assert aligned % ALIGNMENT == 0
    assert nbytes <= aligned < nbytes + ALIGNMENT


def value_at(value: Any, leaf: Leaf) -> Any:
    """The leaf's part of a value of the whole space."""
    for key in leaf.path:
        value = value[key]
    return value


@given(nested_spaces)
def test_leaves_are_those_of_the_space_in_order(space: gym.Space[Any]) -> None:
    """Each path leads to its subspace; no leaf is a structure; fixed and dynamic share them out."""
    layout = Layout(space)
    assert sorted(map(id, layout.fixed + layout.dynamic)) == sorted(map(id, layout.leaves))
    for leaf in layout.leaves:
        subspace: Any = space
        for key in leaf.path:
            subspace = subspace[key]
        assert subspace is leaf.space
        assert not isinstance(subspace, (spaces.Dict, spaces.Tuple))
        if leaf.fixed:
            assert (leaf.shape, leaf.dtype) == (subspace.shape, subspace.dtype)
        else:
            assert (leaf.shape, leaf.dtype, leaf.nbytes(3)) == ((), np.dtype(object), 0)


@given(fixed_spaces, st.integers(1, 5))
def test_arrays_are_aligned_disjoint_and_within(space: gym.Space[Any], num_rows: int) -> None:
    """Filling one array changes nothing of another; each begins at a cache line; all lie within `nbytes`."""
    layout = Layout(space)
    memory = np.zeros(layout.nbytes(num_rows) + ALIGNMENT, np.uint8)  # more, to see a write behind the end
    base = memory.ctypes.data
    arrays = layout.arrays(memory, num_rows)
    assert len(arrays) == len(layout.fixed)
    spans = []
    for leaf, array in zip(layout.fixed, arrays, strict=True):
        assert array.shape == (num_rows, *leaf.shape)
        assert array.dtype == leaf.dtype
        if array.size:
            start = array.ctypes.data - base
            assert start % ALIGNMENT == 0
            assert np.shares_memory(array, memory)
            spans.append((start, start + array.nbytes))
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))
    assert not spans or spans[-1][1] <= layout.nbytes(num_rows)


@given(nested_spaces, st.integers(1, 4), st.integers(0, 100))
def test_assemble_gives_what_gymnasium_concatenates(space: gym.Space[Any], num_rows: int, seed: int) -> None:
    """Split into leaves and put together again: the types, dtypes and values of a Gymnasium vector's batch."""
    space.seed(seed)
    samples = [space.sample() for _ in range(num_rows)]
    layout = Layout(space)
    arrays = layout.arrays(np.zeros(layout.nbytes(num_rows), np.uint8), num_rows)
    for leaf, array in zip(layout.fixed, arrays, strict=True):
        column = leaf.column(samples)
        assert all(value is value_at(sample, leaf) for value, sample in zip(column, samples, strict=True))
        array[...] = np.stack(column)
    batch = layout.assemble(arrays, [leaf.column(samples) for leaf in layout.dynamic])
    expected = concatenate(space, samples, create_empty_array(space, num_rows))
    assert same_batch(batch, expected)


def same_batch(left: Any, right: Any) -> bool:
    """`same`, where a graph is compared field by field."""
    if isinstance(left, tuple) and hasattr(left, "_fields"):
        return type(left) is type(right) and all(map(same_batch, left, right))
    if isinstance(left, (tuple, list)):
        return type(left) is type(right) and len(left) == len(right) and all(map(same_batch, left, right))
    if isinstance(left, dict):
        return isinstance(right, dict) and {*left} == {*right} and all(same_batch(left[k], right[k]) for k in left)
    return same(left, right)


def test_a_batch_of_one_array_is_that_array() -> None:
    """Nothing is copied on the step path."""
    layout = Layout(spaces.Box(0, 1, (2,)))
    array = np.zeros((3, 2), np.float32)
    assert layout.is_array
    assert layout.assemble([array]) is array


@pytest.mark.parametrize(
    "space",
    [spaces.Text(3), spaces.Dict(a=spaces.Discrete(2)), spaces.Tuple([spaces.Box(0, 1, (2,))])],
    ids=lambda space: type(space).__name__,
)
def test_only_a_bare_leaf_of_fixed_size_is_an_array(space: gym.Space[Any]) -> None:
    """A structure of one leaf is still a structure."""
    assert not Layout(space).is_array


def test_a_box_whose_items_are_no_numbers_is_dynamic() -> None:
    """Memory of Python objects cannot be shared."""

    class Custom(gym.Space[Any]):
        """A space that Gymnasium knows nothing of."""

    leaf = Layout(spaces.Dict(custom=Custom())).leaves[0]
    assert not leaf.fixed
    assert leaf.batch_dynamic(["x", "y"]) == ("x", "y")


def test_a_leaf_is_named_as_a_user_writes_it() -> None:
    """Messages point at the value, in Python."""
    space = spaces.Dict(camera=spaces.Tuple([spaces.Discrete(2), spaces.Discrete(2)]))
    assert [leaf.name("observation") for leaf in Layout(space).leaves] == [
        "observation['camera'][0]",
        "observation['camera'][1]",
    ]
    assert Layout(spaces.Discrete(2)).leaves[0].name("actions") == "actions"


@pytest.mark.parametrize(
    ("values", "error"), [([{"a": (1,)}, {}], KeyError), ([{"a": ()}], IndexError), ([None], TypeError)]
)
def test_column_raises_where_a_value_is_missing(values: list[Any], error: type[Exception]) -> None:
    """The step path takes whole columns; these say that it must look at each row."""
    leaf = Layout(spaces.Dict(a=spaces.Tuple([spaces.Discrete(2)]))).leaves[0]
    with pytest.raises(error):
        leaf.column(values)
