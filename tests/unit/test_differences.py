"""Where and how two results differ."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from aiovec.testing.differences import difference

NAN = float("nan")
RAGGED = np.array([{"a": 1}, None], object)


@pytest.mark.parametrize(
    "value",
    [1, NAN, np.float32(NAN), "text", None, (1, [2.0, {"a": np.arange(3)}]), np.array(1.5), np.zeros((0, 3)), RAGGED],
)
def test_what_is_equal(value: Any) -> None:
    assert difference(value, value) is None


@pytest.mark.parametrize(
    ("got", "expected", "text"),
    [
        (1, 1.0, ": <class 'int'> 1 instead of <class 'float'> 1.0"),
        (-0.0, 0.0, ": -0.0 instead of 0.0"),
        ("a", "b", ": 'a' instead of 'b'"),
        (np.float32(1), np.float64(1), ": <class 'numpy.float32'>"),
        ((1, 2), (1, 2, 3), ": 2 items instead of 3 items"),
        ({"a": 1}, {"b": 1}, ": the keys ['a'] instead of the keys ['b']"),
        ((0, {"a": [1, 2]}), (0, {"a": [1, 3]}), "[1]['a'][1]: 2 instead of 3"),
        (np.zeros(2, np.int8), np.zeros(2, np.int16), ": int8(2,) [0 0] instead of int16(2,) [0 0]"),
        (np.zeros(2), np.zeros((2, 1)), ": float64(2,)"),
        (np.array([[1, 2], [3, 4]]), np.array([[1, 2], [3, 5]]), "[1][1]: "),
        (np.array(1), np.array(2), ": array(1) instead of array(2)"),
        (np.array([None, {"a": 1}], object), np.array([None, {"a": 2}], object), "[1]['a']: 1 instead of 2"),
    ],
)
def test_the_first_difference_is_named(got: Any, expected: Any, text: str) -> None:
    assert str(difference(got, expected)).startswith(text)
