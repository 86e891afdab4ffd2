"""What Hypothesis draws in several files: spaces as nested as users make them."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from hypothesis import strategies as st

DTYPES = (np.float16, np.float32, np.float64, np.uint8, np.int8, np.int16, np.int32, np.int64, np.uint16)

shapes = st.lists(st.integers(0, 3), max_size=3).map(tuple)
boxes = st.builds(lambda shape, dtype: spaces.Box(0, 100, shape, dtype), shapes, st.sampled_from(DTYPES))
fixed_leaves: st.SearchStrategy[gym.Space[Any]] = st.one_of(
    boxes,
    st.integers(1, 9).map(spaces.Discrete),
    st.lists(st.integers(1, 9), min_size=1, max_size=3).map(spaces.MultiDiscrete),
    st.integers(1, 5).map(spaces.MultiBinary),
)
objects: st.SearchStrategy[gym.Space[Any]] = st.one_of(
    st.integers(1, 6).map(spaces.Text),
    st.integers(1, 5).map(lambda n: spaces.Graph(spaces.Box(0, 1, (n,)), spaces.Discrete(n))),
)
dynamic_leaves: st.SearchStrategy[gym.Space[Any]] = st.one_of(
    objects,
    st.integers(1, 5).map(lambda n: spaces.Sequence(spaces.Discrete(n))),
    st.integers(1, 5).map(lambda n: spaces.OneOf((spaces.Discrete(n), spaces.Box(0, 1, (n,))))),
)


def _nested(leaves: st.SearchStrategy[gym.Space[Any]]) -> st.SearchStrategy[gym.Space[Any]]:
    return st.recursive(
        leaves,
        lambda children: st.one_of(
            st.dictionaries(st.sampled_from("abcd"), children, min_size=1, max_size=3).map(spaces.Dict),
            st.lists(children, min_size=1, max_size=3).map(spaces.Tuple),
        ),
        max_leaves=6,
    )


fixed_spaces = _nested(fixed_leaves)
nested_spaces = _nested(st.one_of(fixed_leaves, dynamic_leaves))
stackable_spaces = _nested(st.one_of(fixed_leaves, objects))  # whose values show their structure


def same(left: Any, right: Any) -> bool:
    """Whether two values are equal in structure, type, dtype, shape, content and the order of keys."""
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        return list(left) == list(right) and all(same(left[key], right[key]) for key in left)
    if isinstance(left, (tuple, list)):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, np.ndarray):
        if left.dtype != right.dtype or left.shape != right.shape:
            return False
        if left.dtype == object:
            return all(map(same, left.ravel().tolist(), right.ravel().tolist()))
        return np.array_equal(left, right, equal_nan=left.dtype.kind == "f")
    if isinstance(left, (float, np.floating)):
        return bool(left == right or (np.isnan(left) and np.isnan(right)))
    return bool(left == right)
