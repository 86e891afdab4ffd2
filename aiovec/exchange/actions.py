"""Actions: checked whole in the parent, handed out row by row in the worker.

Each env receives what `gymnasium.vector.utils.iterate` would give it. Arrays of the space's own dtype travel
in the slab, or as columns of it where it is not shared. Everything else (a list, an array of another dtype, a `Text`
action) travels by pickle in the step's own frame, since writing it into the slab would change its type on the way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from gymnasium.vector.utils import iterate

from aiovec.errors import InvalidActionsError
from aiovec.exchange.layout import Layout, Leaf

__all__ = ["ActionColumns", "ActionReader", "ActionWriter"]


class ActionColumns(NamedTuple):
    """The actions of some envs on their way to a worker that has not the slab.

    Attributes:
        arrays: `[rows, *leaf.shape]` for each leaf of fixed size; there are no others.
    """

    arrays: Sequence[npt.NDArray[Any]]


class ActionWriter:
    """The parent's side.

    Args:
        space: The action space of a single env.
        num_envs: How many envs a batch of actions has.
    """

    def __init__(self, space: gym.Space[Any], num_envs: int) -> None:
        self.layout: Layout = Layout(space)
        self._num_envs = num_envs
        self._slab_arrays: list[npt.NDArray[Any]] | None = None

    def map(self, slab_arrays: list[npt.NDArray[Any]]) -> None:
        """Gives the arrays `[num_envs, *leaf.shape]` that `write` fills, one for each leaf of fixed size."""
        self._slab_arrays = slab_arrays

    def unmap(self) -> None:
        """Lets go of these arrays."""
        self._slab_arrays = None

    def write(self, actions: Any, env_ids: Sequence[int] | None = None) -> Sequence[Any] | npt.NDArray[Any] | None:
        """Writes a batch of actions into the slab, or returns the rows that must travel by pickle.

        Args:
            actions: One an env.
            env_ids: The envs, in order, if not all.

        Raises:
            InvalidActionsError: Number, structure, shape or dtype do not fit; nothing was written.
        """
        slab_arrays = self._slab_arrays
        count = self._num_envs if env_ids is None else len(env_ids)
        if self.layout.is_array and slab_arrays is not None and type(actions) is np.ndarray:
            array = slab_arrays[0]  # the step path: a comparison each, one copy
            if actions.dtype == array.dtype and actions.shape == (count, *array.shape[1:]):
                array[... if env_ids is None else env_ids] = actions
                return None
        leaves = [self._leaf(leaf, actions, "actions", (count,)) for leaf in self.layout.leaves]
        if (
            slab_arrays is not None
            and not self.layout.dynamic
            and all(
                isinstance(value, np.ndarray) and value.dtype == leaf.dtype
                for leaf, value in zip(self.layout.leaves, leaves, strict=True)
            )
        ):
            for array, value in zip(slab_arrays, leaves, strict=True):
                array[... if env_ids is None else list(env_ids)] = value
            return None
        if self.layout.is_array and hasattr(actions, "__array__"):
            return np.asarray(actions)  # rows of an array are sent as one array
        return list(iterate(self.layout.batch_space(count), _without_foreign_arrays(actions)))

    def write_one(self, action: Any, env_index: int) -> Sequence[Any] | None:
        """The same for the action of one env, which has no axis for envs."""
        slab_arrays = self._slab_arrays
        if self.layout.is_array and slab_arrays is not None:  # the usual case
            array = slab_arrays[0]
            if type(action) is int and array.ndim == 1 and array.dtype == np.int64 and -(1 << 63) <= action < 1 << 63:
                array[env_index] = action
                return None
            is_array = isinstance(action, (np.ndarray, np.generic))
            if is_array and action.dtype == array.dtype and action.shape == array.shape[1:]:
                array[env_index] = action
                return None
        leaves = [self._leaf(leaf, action, "action", ()) for leaf in self.layout.leaves]
        values = [np.asarray(value) for leaf, value in zip(self.layout.leaves, leaves, strict=True) if leaf.fixed]
        fits = all(value.dtype == leaf.dtype for leaf, value in zip(self.layout.fixed, values, strict=True))
        if slab_arrays is None or self.layout.dynamic or not fits:
            return [_without_foreign_arrays(action)]
        for array, value in zip(slab_arrays, values, strict=True):
            array[env_index] = value
        return None

    def columns(self, env_ids: Sequence[int]) -> ActionColumns:
        """What `write` has left in the slab for these envs; a copy."""
        assert self._slab_arrays is not None  # noqa: S101
        return ActionColumns([array.take(env_ids, axis=0) for array in self._slab_arrays])

    def store(
        self, actions: Any, arrays: Sequence[npt.NDArray[Any]], env_ids: npt.NDArray[np.int64] | None
    ) -> list[list[Any]]:
        """Writes a batch of actions into other arrays `[num_envs, *leaf.shape]`, cast to the dtypes of the space.

        Args:
            actions: One an env.
            arrays: One for each leaf of fixed size.
            env_ids: The envs, in order, if not all.

        Returns:
            For each leaf without a fixed size the values.

        Raises:
            InvalidActionsError: Number, structure, shape or dtype do not fit; nothing was written.
        """
        count = self._num_envs if env_ids is None else len(env_ids)
        rows = ... if env_ids is None else env_ids
        if self.layout.is_array and type(actions) is np.ndarray:
            array = arrays[0]  # the step path: a comparison each, one copy
            if actions.dtype == array.dtype and actions.shape == (count, *array.shape[1:]):
                array[rows] = actions
                return []
        values = [self._leaf(leaf, actions, "actions", (count,)) for leaf in self.layout.leaves]
        fixed = [value for leaf, value in zip(self.layout.leaves, values, strict=True) if leaf.fixed]
        for array, value in zip(arrays, fixed, strict=True):
            array[rows] = value
        return [list(value) for leaf, value in zip(self.layout.leaves, values, strict=True) if not leaf.fixed]

    def rows(
        self, arrays: Sequence[npt.NDArray[Any]], dynamic: Sequence[Sequence[Any]], env_ids: Sequence[int]
    ) -> list[Any]:
        """What `store` has taken, row by row, to travel by pickle.

        Args:
            arrays: One for each leaf of fixed size, with the rows of all envs.
            dynamic: For each other leaf the values of these envs.
            env_ids: The envs, in order.
        """
        fixed = [array[env_ids] for array in arrays]
        return list(iterate(self.layout.batch_space(len(env_ids)), self.layout.assemble(fixed, dynamic)))

    def _leaf(self, leaf: Leaf, actions: Any, root: str, lead: tuple[int, ...]) -> Any:
        """One leaf, checked; `lead` is the length of the axis for envs, if there is one."""
        name = leaf.name(root)
        value: Any = actions
        for key in leaf.path:
            try:
                value = value[key]
            except (KeyError, IndexError, TypeError):
                got = f"a {type(value).__name__} without {key!r}"
                raise InvalidActionsError(name, "a value for every leaf of the action space", got) from None
        if not leaf.fixed:
            if lead and (not hasattr(value, "__len__") or len(value) != lead[0]):
                count = len(value) if hasattr(value, "__len__") else f"a single {type(value).__name__}"
                raise InvalidActionsError(name, f"{lead[0]} values, one an env", str(count))
            return value
        expected = f"shape {(*lead, *leaf.shape)} of {leaf.dtype}"
        try:
            array = np.asarray(value)
        except ValueError as error:  # a ragged list
            raise InvalidActionsError(name, expected, f"a ragged {type(value).__name__}") from error
        # Integers fit integers of any width: rows of another dtype travel as they are, so nothing is cast.
        integers = array.dtype.kind in "iu" and leaf.dtype.kind in "iu"
        fits = integers or np.can_cast(array.dtype, leaf.dtype, "same_kind")
        if array.shape != (*lead, *leaf.shape) or not fits:
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
    """The worker's side, of one batch of actions of a strip; `move` goes to another one.

    Args:
        layout: Of the action space of a single env.
        arrays: This worker's rows `[batches, rows, *leaf.shape]` of each leaf of fixed size.
        index: Of the batch.
    """

    def __init__(self, layout: Layout, arrays: list[npt.NDArray[Any]], index: int = 0) -> None:
        self._layout = layout
        self._arrays = arrays
        self.move(index)

    def move(self, index: int) -> None:
        """Goes to a batch of the strip."""
        self._now = [array[index] for array in self._arrays]

    def rows(self) -> list[Any]:
        """One action an env; copies, so an env may keep or change its own."""
        if self._layout.is_array:
            return list(self._now[0].copy())
        return self._apart([array.copy() for array in self._now])

    def rows_of(self, rows: Sequence[int]) -> list[Any]:
        """The actions of some envs, in their order; copies."""
        if self._layout.is_array:
            return list(self._now[0][list(rows)])
        return self._apart([array[list(rows)] for array in self._now])

    def _apart(self, arrays: list[npt.NDArray[Any]]) -> list[Any]:
        count = len(arrays[0]) if arrays else 0
        return list(iterate(self._layout.batch_space(count), self._layout.assemble(arrays)))
