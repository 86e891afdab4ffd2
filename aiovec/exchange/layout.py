"""How a space becomes leaves, and a batch becomes columns of rows.

A space is a tree of `Dict` and `Tuple`; its leaves have a fixed size (`Box`, `Discrete`, `MultiDiscrete`,
`MultiBinary`) and live in the slab as an array `[num_envs, *shape]`, or have none (`Text`, `Graph`,
`Sequence`, `OneOf`, custom spaces) and travel by pickle. This is decided leaf by leaf, so an image beside a
text is still not sent. The batch has the types that `gymnasium.vector.utils.concatenate` gives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from gymnasium.vector.utils import batch_space, concatenate, create_empty_array

__all__ = ["ALIGNMENT", "Layout", "Leaf", "align"]

ALIGNMENT = 64  # bytes: a cache line, so that two leaves never share one

_FIXED_SIZE_SPACES = (gym.spaces.Box, gym.spaces.Discrete, gym.spaces.MultiDiscrete, gym.spaces.MultiBinary)
_BATCHED_AS_TUPLE = concatenate.dispatch(gym.Space)


def align(nbytes: int) -> int:
    """The next multiple of `ALIGNMENT`."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class Leaf:
    """One leaf of a space.

    Attributes:
        path: The keys and indices that lead to it from the root, in order.
        space: The leaf's own space.
        fixed: Whether it has a fixed size, and so a place in the slab.
        shape: Of one env's value; empty for a scalar and for a leaf without a fixed size.
        dtype: Of one env's value; `object` for a leaf without a fixed size.
    """

    path: tuple[str | int, ...]
    space: gym.Space[Any]
    fixed: bool
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def name(self, root: str) -> str:
        """As a user would write it: ``observation['camera'][0]``."""
        return root + "".join(f"[{key!r}]" for key in self.path)

    def nbytes(self, num_rows: int) -> int:
        """Of `num_rows` rows in the slab, aligned."""
        if not self.fixed:
            return 0
        return align(num_rows * math.prod(self.shape) * self.dtype.itemsize)

    def column(self, values: Iterable[Any]) -> Sequence[Any]:
        """This leaf of many envs' values; raises `KeyError`, `IndexError`, `TypeError` where one has none."""
        for key in self.path:
            values = [value[key] for value in values]
        return values if isinstance(values, (list, tuple)) else list(values)

    def batch_dynamic(self, column: Sequence[Any]) -> Any:
        """A leaf without a fixed size, batched as `gymnasium.vector.utils.concatenate` does it."""
        if concatenate.dispatch(type(self.space)) is _BATCHED_AS_TUPLE:
            return tuple(column)
        out: Any = create_empty_array(self.space, n=len(column))
        return concatenate(self.space, column, out)


class Layout:
    """The leaves of one env's space, in one order for both sides.

    Args:
        space: The space of a single env.
    """

    def __init__(self, space: gym.Space[Any]) -> None:
        self.space = space
        self.leaves: tuple[Leaf, ...] = tuple(_leaves(space, ()))
        self.fixed: tuple[Leaf, ...] = tuple(leaf for leaf in self.leaves if leaf.fixed)
        self.dynamic: tuple[Leaf, ...] = tuple(leaf for leaf in self.leaves if not leaf.fixed)
        self.is_array: bool = len(self.leaves) == 1 and self.leaves[0].fixed and not self.leaves[0].path
        self._assemble = _assembler(space)
        self._batch_spaces: dict[int, gym.Space[Any]] = {}

    def __repr__(self) -> str:
        return f"<Layout fixed={len(self.fixed)} dynamic={len(self.dynamic)}>"

    def batch_space(self, num_rows: int) -> gym.Space[Any]:
        """Of so many envs."""
        if num_rows not in self._batch_spaces:
            self._batch_spaces[num_rows] = batch_space(self.space, num_rows)
        return self._batch_spaces[num_rows]

    def nbytes(self, num_rows: int) -> int:
        """Of the fixed leaves of `num_rows` rows, each aligned."""
        return sum(leaf.nbytes(num_rows) for leaf in self.fixed)

    def arrays(self, memory: npt.NDArray[np.uint8], *lead: int) -> list[npt.NDArray[Any]]:
        """The fixed leaves as arrays `[*lead, *leaf.shape]` over `memory`, without a copy."""
        arrays: list[npt.NDArray[Any]] = []
        offset, num_rows = 0, math.prod(lead)
        for leaf in self.fixed:
            nbytes = num_rows * math.prod(leaf.shape) * leaf.dtype.itemsize
            arrays.append(memory[offset : offset + nbytes].view(leaf.dtype).reshape(*lead, *leaf.shape))
            offset += leaf.nbytes(num_rows)
        return arrays

    def assemble(self, fixed: Sequence[Any], dynamic: Sequence[Sequence[Any]] = ()) -> Any:
        """A batch in the space's structure, from its leaves in order.

        Args:
            fixed: An array for each leaf of fixed size.
            dynamic: For each other leaf the values of the rows.
        """
        if self.is_array:
            return fixed[0]
        arrays, columns = iter(fixed), iter(dynamic)
        return self._assemble(
            [next(arrays) if leaf.fixed else leaf.batch_dynamic(next(columns)) for leaf in self.leaves]
        )

    def structure(self, leaves: Sequence[Any]) -> Any:
        """The space's structure, with these values in place of its leaves, in order."""
        return self._assemble(list(leaves))

    def row(self, fixed: Sequence[Any], dynamic: Sequence[Sequence[Any]], row: int) -> Any:
        """One env's observation, copied from the leaves of a batch."""
        arrays, columns = iter(fixed), iter(dynamic)
        leaves = [_item(leaf, next(arrays), row) if leaf.fixed else next(columns)[row] for leaf in self.leaves]
        return leaves[0] if self.is_array else self._assemble(leaves)


def _item(leaf: Leaf, array: npt.NDArray[Any], row: int) -> Any:
    """A number where it is one to Gymnasium, too; else an array, also one without axes."""
    return array[row] if isinstance(leaf.space, gym.spaces.Discrete) else array[row, ...].copy()


def _leaves(space: gym.Space[Any], path: tuple[str | int, ...]) -> Iterable[Leaf]:
    if isinstance(space, gym.spaces.Dict):
        for key, subspace in space.spaces.items():
            yield from _leaves(subspace, (*path, key))
    elif isinstance(space, gym.spaces.Tuple):
        for index, subspace in enumerate(space.spaces):
            yield from _leaves(subspace, (*path, index))
    elif isinstance(space, _FIXED_SIZE_SPACES) and space.dtype is not None and space.dtype.kind in "biuf":
        yield Leaf(path, space, True, tuple(space.shape or ()), np.dtype(space.dtype))
    else:
        yield Leaf(path, space, False, (), np.dtype(object))


def _assembler(space: gym.Space[Any]) -> Callable[[list[Any]], Any]:
    """A function that takes the leaves of a structure off the front of a list."""

    def take(space: gym.Space[Any], leaves: list[Any]) -> Any:
        if isinstance(space, gym.spaces.Dict):
            return {key: take(subspace, leaves) for key, subspace in space.spaces.items()}
        if isinstance(space, gym.spaces.Tuple):
            return tuple(take(subspace, leaves) for subspace in space.spaces)
        return leaves.pop(0)

    return lambda leaves: take(space, leaves)
