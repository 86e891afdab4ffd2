"""What a policy gives beside its actions, in each step of a rollout, as arrays over all steps: pure.

The first step says what the structure is: dicts and tuples, and at the leaves whatever numpy makes an array of, with
one row for each env that the policy was shown. Rows are copied at once, so a policy may use its arrays again.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from aiovec.errors import InvalidExtrasError

__all__ = ["Extras"]


class Extras:
    """The extras of one rollout.

    Args:
        num_steps: How many steps.
        num_envs: How many envs.
    """

    def __init__(self, num_steps: int, num_envs: int) -> None:
        self._lead = (num_steps, num_envs)
        self._root: Any = None
        self.are_expected: bool = True  # until the first are nothing

    def __repr__(self) -> str:
        return f"<Extras of {self._lead[0]} steps of {self._lead[1]} envs>"

    def store(self, step: int, env_ids: npt.NDArray[np.int64] | None, extras: Any) -> None:
        """Takes what was given for these envs, or all.

        Raises:
            InvalidExtrasError: It is not like what was given first, or has another number of rows.
        """
        if self._root is None:
            self._root = _node_of("extras", extras, self._lead)
            self.are_expected = extras is not None
        num_rows = self._lead[1] if env_ids is None else len(env_ids)
        self._root.store(step, slice(None) if env_ids is None else env_ids, num_rows, extras)

    def result(self) -> Any:
        """The structure, each leaf an array `[num_steps, num_envs, …]`; `None` if nothing was ever given."""
        return None if self._root is None else self._root.result()


class _Nothing:
    def __init__(self, name: str) -> None:
        self._name = name

    def store(self, _step: int, _rows: Any, _num_rows: int, value: Any) -> None:
        if value is not None:
            raise InvalidExtrasError(self._name, "nothing, as at first", _described(value))

    def result(self) -> None:
        return None


class _Leaf:
    def __init__(self, name: str, value: Any, lead: tuple[int, int]) -> None:
        first = _as_array(value)
        self._name = name
        self._array = np.empty((*lead, *first.shape[1:]), first.dtype)

    def store(self, step: int, rows: Any, num_rows: int, value: Any) -> None:
        array, out = _as_array(value), self._array
        if array.shape != (num_rows, *out.shape[2:]) or array.dtype != out.dtype:
            expected = f"{out.dtype} of shape {(num_rows, *out.shape[2:])}, a row for each env"
            raise InvalidExtrasError(self._name, expected, _described(value))
        out[step][rows] = array

    def result(self) -> npt.NDArray[Any]:
        return self._array


class _Dict:
    def __init__(self, name: str, value: dict[Any, Any], lead: tuple[int, int]) -> None:
        self._name = name
        self._nodes = {key: _node_of(f"{name}[{key!r}]", member, lead) for key, member in value.items()}

    def store(self, step: int, rows: Any, num_rows: int, value: Any) -> None:
        if not isinstance(value, dict) or value.keys() != self._nodes.keys():
            raise InvalidExtrasError(self._name, f"a dict with the keys {list(self._nodes)}", _described(value))
        for key, node in self._nodes.items():
            node.store(step, rows, num_rows, value[key])

    def result(self) -> dict[Any, Any]:
        return {key: node.result() for key, node in self._nodes.items()}


class _Tuple:
    def __init__(self, name: str, value: tuple[Any, ...], lead: tuple[int, int]) -> None:
        self._name = name
        self._nodes = [_node_of(f"{name}[{index}]", member, lead) for index, member in enumerate(value)]

    def store(self, step: int, rows: Any, num_rows: int, value: Any) -> None:
        if not isinstance(value, tuple) or len(value) != len(self._nodes):
            raise InvalidExtrasError(self._name, f"a tuple of length {len(self._nodes)}", _described(value))
        for node, member in zip(self._nodes, value, strict=True):
            node.store(step, rows, num_rows, member)

    def result(self) -> tuple[Any, ...]:
        return tuple(node.result() for node in self._nodes)


def _node_of(name: str, value: Any, lead: tuple[int, int]) -> Any:
    if value is None:
        return _Nothing(name)
    if isinstance(value, dict):
        return _Dict(name, value, lead)
    if isinstance(value, tuple):
        return _Tuple(name, value, lead)
    return _Leaf(name, value, lead)


def _as_array(value: Any) -> npt.NDArray[Any]:
    array = np.asarray(value)
    return array.astype(object) if array.dtype.kind in "US" else array  # else their length would be their dtype


def _described(value: Any) -> str:
    if isinstance(value, dict):
        return f"a dict with the keys {list(value)}"
    if isinstance(value, tuple):
        return f"a tuple of length {len(value)}"
    if value is None:
        return "nothing"
    array = _as_array(value)
    return f"{array.dtype} of shape {array.shape}"
