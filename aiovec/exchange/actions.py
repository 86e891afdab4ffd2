"""Actions: checked whole in the parent, handed out row by row in the worker.

Each env receives what `gymnasium.vector.utils.iterate` would give it. Arrays of the space's own dtype travel
in the slab. Everything else (a list, an array of another dtype, a `Text` action) travels by pickle in the
step's own frame, since writing it into the slab would change its type on the way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from gymnasium.vector.utils import batch_space, iterate

from aiovec.errors import InvalidActionsError
from aiovec.exchange.layout import Layout, Leaf

__all__ = ["ActionReader", "ActionWriter"]


class ActionWriter:
    """The parent's side.

    Args:
        space: The action space of a single env.
        num_envs: How many envs a batch of actions has.
    """

    def __init__(self, space: gym.Space[Any], num_envs: int) -> None:
        self.layout: Layout = Layout(space)
        self._num_envs = num_envs
        self._batch_space = batch_space(space, num_envs)
        self._shapes = [(num_envs, *leaf.shape) for leaf in self.layout.fixed]
        self._slab_arrays: list[npt.NDArray[Any]] | None = None

    def map(self, slab_arrays: list[npt.NDArray[Any]]) -> None:
        """Gives the arrays `[num_envs, *leaf.shape]` that `write` fills, one for each leaf of fixed size."""
        self._slab_arrays = slab_arrays

    def write(self, actions: Any) -> Sequence[Any] | npt.NDArray[Any] | None:
        """Writes a batch of actions into the slab, or returns the rows that must travel by pickle.

        Raises:
            InvalidActionsError: Number, structure, shape or dtype do not fit; nothing was written.
        """
        slab_arrays = self._slab_arrays
        if self.layout.is_array and slab_arrays is not None:  # the step path: a comparison each, one copy
            array = slab_arrays[0]
            if type(actions) is np.ndarray and actions.dtype == array.dtype and actions.shape == array.shape:
                array[...] = actions
                return None
        leaves = [self._leaf(leaf, actions) for leaf in self.layout.leaves]
        if (
            slab_arrays is not None
            and not self.layout.dynamic
            and all(
                isinstance(value, np.ndarray) and value.dtype == leaf.dtype
                for leaf, value in zip(self.layout.leaves, leaves, strict=True)
            )
        ):
            for array, value in zip(slab_arrays, leaves, strict=True):
                array[...] = value
            return None
        if self.layout.is_array and hasattr(actions, "__array__"):
            return np.asarray(actions)  # rows of an array are sent as one array
        return list(iterate(self._batch_space, _without_foreign_arrays(actions)))

    def _leaf(self, leaf: Leaf, actions: Any) -> Any:
        name = leaf.name("actions")
        value: Any = actions
        for key in leaf.path:
            try:
                value = value[key]
            except (KeyError, IndexError, TypeError):
                got = f"a {type(value).__name__} without {key!r}"
                raise InvalidActionsError(name, "a value for every leaf of the action space", got) from None
        if not leaf.fixed:
            if not hasattr(value, "__len__") or len(value) != self._num_envs:
                count = len(value) if hasattr(value, "__len__") else f"a single {type(value).__name__}"
                raise InvalidActionsError(name, f"{self._num_envs} values, one an env", str(count))
            return value
        expected = f"shape {(self._num_envs, *leaf.shape)} of {leaf.dtype}"
        try:
            array = np.asarray(value)
        except ValueError as error:  # a ragged list
            raise InvalidActionsError(name, expected, f"a ragged {type(value).__name__}") from error
        # Integers fit integers of any width: rows of another dtype travel as they are, so nothing is cast.
        integers = array.dtype.kind in "iu" and leaf.dtype.kind in "iu"
        fits = integers or np.can_cast(array.dtype, leaf.dtype, "same_kind")
        if array.shape != (self._num_envs, *leaf.shape) or not fits:
            raise InvalidActionsError(name, expected, f"shape {array.shape} of {array.dtype}")
        return array if hasattr(value, "__array__") else value


def _without_foreign_arrays(actions: Any) -> Any:
    """Arrays of other libraries as numpy arrays: an env must not need PyTorch or JAX for its action."""
    if isinstance(actions, Mapping):
        return {key: _without_foreign_arrays(value) for key, value in actions.items()}
    if type(actions) is tuple:
        return tuple(_without_foreign_arrays(value) for value in actions)
    if hasattr(actions, "__array__") and not isinstance(actions, (np.ndarray, np.generic)):
        return np.asarray(actions)
    return actions


class ActionReader:
    """The worker's side.

    Args:
        layout: Of the action space of a single env.
        slab_arrays: This worker's rows `[rows, *leaf.shape]` of each leaf of fixed size.
        num_rows: How many envs the worker holds.
    """

    def __init__(self, layout: Layout, slab_arrays: list[npt.NDArray[Any]], num_rows: int) -> None:
        self._layout = layout
        self._slab_arrays = slab_arrays
        self._batch_space = batch_space(layout.space, num_rows)

    def rows(self) -> list[Any]:
        """One action an env; copies, so an env may keep or change its own."""
        if self._layout.is_array:
            return list(self._slab_arrays[0].copy())
        batch = self._layout.assemble([array.copy() for array in self._slab_arrays])
        return list(iterate(self._batch_space, batch))
