"""Many observations as one batch, and a batch as rows again: pure.

A structure is what Gymnasium's spaces make: a dict (`Dict`), a tuple (`Tuple`), and at the leaves arrays and
scalars, which stack. What does not stack (`Text`, `Graph`, a list, any other object) becomes a tuple of the rows'
values, as `gymnasium.vector.utils.concatenate` makes it. No space is asked: the first observation says what the
others must be, so a `Sequence` or a `OneOf`, whose values look like those of a `Tuple`, has to go as a list.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from gymnasium.spaces import GraphInstance

from aiovec.errors import InvalidBatchResultError, InvalidObservationError

__all__ = ["Structure", "rows_of"]

_Mismatch = tuple[str, str, str]  # where, what was expected, what came


class Structure:
    """What all observations of a batch have in common.

    Args:
        observation: The one that the others are compared with.
    """

    def __init__(self, observation: Any) -> None:
        self._root = _node_of(observation)
        self.nbytes: int = self._root.nbytes

    def __repr__(self) -> str:
        return f"<Structure {self._root!r}>"

    def check(self, observation: Any) -> None:
        """Raises `InvalidObservationError` where an observation differs: in keys, length, shape or dtype."""
        mismatch = self._root.mismatch(observation)
        if mismatch is not None:
            path, expected, got = mismatch
            raise InvalidObservationError(f"observation{path}", expected, got)

    def stack(self, observations: Sequence[Any]) -> Any:
        """The batch: new arrays `[len(observations), *shape]` in the structure of one observation."""
        return self._root.stack(observations)


class _Rows(tuple[Any, ...]):
    """A batch of what does not stack; `rows_of` knows it again, where any other tuple is a structure."""

    __slots__ = ()


class _Node(Protocol):
    nbytes: int  # of one row; 0 for what does not stack

    def mismatch(self, value: Any) -> _Mismatch | None: ...

    def stack(self, values: Sequence[Any]) -> Any: ...


class _Array:
    def __init__(self, array: npt.NDArray[Any]) -> None:
        self.shape, self.dtype, self.nbytes = array.shape, array.dtype, array.nbytes

    def __repr__(self) -> str:
        return f"{self.dtype} of shape {self.shape}"

    def mismatch(self, value: Any) -> _Mismatch | None:
        array = _as_array(value)
        if array is not None and array.shape == self.shape and array.dtype == self.dtype:
            return None
        return "", repr(self), repr(_node_of(value))

    def stack(self, values: Sequence[Any]) -> npt.NDArray[Any]:
        return np.array(values, dtype=self.dtype)  # a third of the time of numpy.stack, for small rows


class _Object:
    nbytes = 0

    def __init__(self, value: Any) -> None:
        self._type = type(value)

    def __repr__(self) -> str:
        return f"an object that does not stack, {self._type.__name__}"

    def mismatch(self, value: Any) -> _Mismatch | None:
        node = _node_of(value)
        return None if isinstance(node, _Object) else ("", repr(self), repr(node))

    def stack(self, values: Sequence[Any]) -> _Rows:
        return _Rows(values)


class _Dict:
    def __init__(self, value: dict[Any, Any]) -> None:
        self._nodes = {key: _node_of(member) for key, member in value.items()}
        self.nbytes = sum(node.nbytes for node in self._nodes.values())

    def __repr__(self) -> str:
        return f"a dict with the keys {list(self._nodes)}"

    def mismatch(self, value: Any) -> _Mismatch | None:
        if not isinstance(value, dict) or value.keys() != self._nodes.keys():
            return "", repr(self), repr(_node_of(value))
        for key, node in self._nodes.items():
            mismatch = node.mismatch(value[key])
            if mismatch is not None:
                return _within(key, mismatch)
        return None

    def stack(self, values: Sequence[Any]) -> dict[Any, Any]:
        return {key: node.stack([value[key] for value in values]) for key, node in self._nodes.items()}


class _Tuple:
    def __init__(self, value: tuple[Any, ...]) -> None:
        self._nodes = [_node_of(member) for member in value]
        self._make = _maker_of(value)
        self.nbytes = sum(node.nbytes for node in self._nodes)

    def __repr__(self) -> str:
        return f"a tuple of length {len(self._nodes)}"

    def mismatch(self, value: Any) -> _Mismatch | None:
        if not _is_structure(value) or len(value) != len(self._nodes):
            return "", repr(self), repr(_node_of(value))
        for index, node in enumerate(self._nodes):
            mismatch = node.mismatch(value[index])
            if mismatch is not None:
                return _within(index, mismatch)
        return None

    def stack(self, values: Sequence[Any]) -> Any:
        return self._make(node.stack([value[index] for value in values]) for index, node in enumerate(self._nodes))


def _within(key: Any, mismatch: _Mismatch) -> _Mismatch:
    path, expected, got = mismatch
    return f"[{key!r}]{path}", expected, got


def _node_of(value: Any) -> _Node:
    if isinstance(value, dict):
        return _Dict(value)
    if _is_structure(value):
        return _Tuple(value)
    array = _as_array(value)
    return _Object(value) if array is None else _Array(array)


def _is_structure(value: Any) -> bool:
    return isinstance(value, tuple) and not isinstance(value, (GraphInstance, _Rows))


def _maker_of(value: tuple[Any, ...]) -> Callable[[Iterable[Any]], Any]:
    """A named tuple stays one."""
    make: Callable[[Iterable[Any]], Any] = getattr(type(value), "_make", tuple)
    return make


def _as_array(value: Any) -> npt.NDArray[Any] | None:
    """An array or a number as an array; `None` for what does not stack, a string's array too: its length is its dtype."""
    if not isinstance(value, np.ndarray):
        if not isinstance(value, (np.generic, int, float, complex)):
            return None
        value = np.asarray(value)
    return value if value.dtype.kind in "biufc" else None


def rows_of(result: Any, num_rows: int, name: str = "result") -> list[Any]:
    """The rows of what a function returned for a batch.

    Args:
        result: An array, a list, or anything else with a length that is indexed by row (a tensor); a dict or a
            tuple of such is a structure, and each row has it.
        num_rows: How many there must be.
        name: As a message names `result`.

    Returns:
        The rows. Those of a numpy array are copies, which the next batch cannot change.

    Raises:
        InvalidBatchResultError: There is another number of rows, or none at all; the message says where.
    """
    if isinstance(result, dict):
        keys = list(result)
        return [dict(zip(keys, row, strict=True)) for row in _transposed(result.items(), num_rows, name)]
    if _is_structure(result):
        make = _maker_of(result)
        return [make(row) for row in _transposed(enumerate(result), num_rows, name)]
    got = _num_rows(result)
    if got != num_rows:
        raise InvalidBatchResultError(name, num_rows, f"{got} rows" if got is not None else _described(result))
    if isinstance(result, np.ndarray) and result.ndim > 1:
        return [row.copy() for row in result]
    if isinstance(result, (np.ndarray, list)):
        return list(result)
    return [result[row] for row in range(num_rows)]


def _transposed(members: Iterable[tuple[Any, Any]], num_rows: int, name: str) -> Iterable[tuple[Any, ...]]:
    columns = [rows_of(member, num_rows, f"{name}[{key!r}]") for key, member in members]
    return zip(*columns, strict=True) if columns else [()] * num_rows


def _num_rows(result: Any) -> int | None:
    if isinstance(result, (str, bytes)) or not hasattr(type(result), "__getitem__"):
        return None
    try:
        return len(result)
    except TypeError:  # an array without a dimension has no length
        return None


def _described(result: Any) -> str:
    if inspect.iscoroutine(result):
        result.close()  # else Python warns that nobody awaited it
        return "a coroutine: make the function itself an `async def`"
    shape = f" of shape {result.shape}" if isinstance(result, (np.ndarray, np.generic)) else ""
    return f"{type(result).__name__}{shape}"
