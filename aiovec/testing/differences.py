"""Strict equality of results: where and how two of them differ. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

__all__ = ["Difference", "difference"]


class Difference(NamedTuple):
    """The first place in which two results differ.

    Attributes:
        at: The way to it, as Python would write it: ``[0]['camera'][2]``.
        got: What is there.
        expected: What should be there.
    """

    at: str
    got: str
    expected: str

    def __str__(self) -> str:
        return f"{self.at}: {self.got} instead of {self.expected}"


def difference(got: Any, expected: Any) -> Difference | None:
    """Compares types, dtypes, shapes, keys and values, bit by bit, at every depth: NaN equals itself, and -0 is not 0.

    Returns:
        The first difference, or `None`.
    """
    if type(got) is not type(expected):
        return Difference("", f"{type(got)} {got!r}", f"{type(expected)} {expected!r}")
    if isinstance(expected, np.ndarray):
        if got.dtype != expected.dtype or got.shape != expected.shape:
            return Difference("", _described(got), _described(expected))
        if expected.dtype == object:
            return _first((str(list(at)), got[at], expected[at]) for at in np.ndindex(expected.shape))
        if got.tobytes() == expected.tobytes():
            return None
        if not expected.shape:
            return Difference("", repr(got), repr(expected))
        return _first((f"[{row}]", got[row], expected[row]) for row in range(len(expected)))
    if isinstance(expected, dict):
        if got.keys() != expected.keys():
            return Difference("", f"the keys {sorted(map(str, got))}", f"the keys {sorted(map(str, expected))}")
        return _first((f"[{key!r}]", got[key], value) for key, value in expected.items())
    if isinstance(expected, (tuple, list)):
        if len(got) != len(expected):
            return Difference("", f"{len(got)} items", f"{len(expected)} items")
        return _first((f"[{index}]", got[index], value) for index, value in enumerate(expected))
    if isinstance(expected, (np.generic, float)):
        same = np.asarray(got).tobytes() == np.asarray(expected).tobytes()
    else:
        same = bool(got == expected)
    return None if same else Difference("", repr(got), repr(expected))


def _first(members: Iterable[tuple[str, Any, Any]]) -> Difference | None:
    for at, got, expected in members:
        if (found := difference(got, expected)) is not None:
            return found._replace(at=f"{at}{found.at}")
    return None


def _described(array: Any) -> str:
    return f"{array.dtype}{array.shape} {array}"
