"""What a policy gives beside its actions becomes arrays over all steps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from aiovec import InvalidExtrasError
from aiovec.extras import Extras


def test_each_leaf_becomes_an_array_over_all_steps() -> None:
    """Dicts and tuples keep their structure; rows lie where their envs are."""
    extras = Extras(2, 3)
    for step in range(2):
        for env_ids in ([0, 2], [1]):
            rows = np.array(env_ids, np.float32) + 10 * step
            values = {"value": rows, "pair": (rows[:, None] * np.ones(2), [f"{row:.0f}" for row in rows], None)}
            extras.store(step, np.array(env_ids), values)
    result = extras.result()
    assert result["value"].dtype == np.float32
    assert result["value"].tolist() == [[0, 1, 2], [10, 11, 12]]
    pair, texts, nothing = result["pair"]
    assert pair.shape == (2, 3, 2)
    assert pair[1, 2].tolist() == [12, 12]
    assert texts.tolist()[0] == ["0", "1", "2"]
    assert nothing is None


def test_rows_are_copied_at_once() -> None:
    """A policy may use its arrays again."""
    extras, reused = Extras(2, 2), np.zeros(2)
    for step in range(2):
        reused[...] = step
        extras.store(step, None, reused)
    assert extras.result().tolist() == [[0, 0], [1, 1]]


def test_nothing_is_nothing() -> None:
    assert Extras(1, 1).result() is None
    extras = Extras(1, 1)
    extras.store(0, None, None)
    assert extras.result() is None
    assert repr(extras) == "<Extras of 1 steps of 1 envs>"


WRONG: dict[str, tuple[Any, Any, str]] = {
    "another number of rows": (np.zeros(3), np.zeros(2), r"extras of the policy: expected float64 of shape \(3,\)"),
    "too many at first": (np.zeros(4), np.zeros(3), r"got float64 of shape \(4,\)"),
    "a number": (0.5, 0.5, r"expected float64 of shape \(3,\), a row for each env, got float64 of shape \(\)"),
    "another shape": (np.zeros((3, 2)), np.zeros((3, 1)), r"expected float64 of shape \(3, 2\)"),
    "another dtype": (np.zeros(3, np.float32), np.zeros(3), "got float64"),
    "other keys": ({"a": np.zeros(3)}, {"b": np.zeros(3)}, r"a dict with the keys \['a'\], got a dict .* \['b'\]"),
    "no dict": ({"a": np.zeros(3)}, np.zeros(3), "expected a dict"),
    "another length": ((np.zeros(3),), (), "expected a tuple of length 1, got a tuple of length 0"),
    "nothing": ({"a": np.zeros(3)}, {"a": None}, r"extras\['a'\] of the policy.*got nothing"),
    "something": ({"a": None}, {"a": np.zeros(3)}, r"extras\['a'\] of the policy: expected nothing, as at first"),
    "nested": (
        (np.zeros(3), {"a": np.zeros(3)}),
        (np.zeros(3), {"a": np.zeros(1)}),
        r"extras\[1\]\['a'\] of the policy",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_not_like_the_first_is_refused(what: str) -> None:
    """The message names the leaf, what was expected and what came."""
    first, then, message = WRONG[what]
    extras = Extras(2, 3)
    with pytest.raises(InvalidExtrasError, match=message):
        for step, value in enumerate((first, then)):
            extras.store(step, None, value)
