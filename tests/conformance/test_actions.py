"""Actions: each env receives the value, of the type and dtype, that `SyncVectorEnv` hands it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import pytest
from conformance.comparing import NUM_ENVS, AwaitedSync, assert_same, cell_arguments, difference, loops_in_turn
from gymnasium import spaces
from gymnasium.vector.utils import batch_space
from space_envs import ACTION_SPACES, Recorder

import aiovec

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

OTHER_DTYPES = {"i": np.int32, "u": np.int64, "f": np.float64, "b": np.bool_}


def of_arrays(change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A function that changes each array of a batch of actions, and the rest not."""

    def changed(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return change(value)
        if type(value) is dict:
            return {key: changed(item) for key, item in value.items()}
        return tuple(changed(item) for item in value) if type(value) is tuple else value

    return changed


def lists(value: Any) -> Any:
    """A batch of actions of Python lists and numbers."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    if type(value) is dict:
        return {key: lists(item) for key, item in value.items()}
    return [lists(item) for item in value] if type(value) is tuple else value


def other_dtype(array: Any) -> Any:
    """int32 for int64, float64 for float32, …"""
    dtype = np.int32 if array.dtype == np.int64 else np.float32 if array.dtype == np.float64 else None
    return array.astype(dtype or OTHER_DTYPES[array.dtype.kind])


def strided(array: Any) -> Any:
    """The same values, not contiguous."""
    return np.repeat(array, 2, axis=0)[::2]


def frozen(array: Any) -> Any:
    """The same values, in an array that cannot be written."""
    array = array.copy()
    array.flags.writeable = False
    return array


FORMS: dict[str, Callable[[Any], Any]] = {
    "sampled": lambda actions: actions,
    "lists": lists,
    "other dtype": of_arrays(other_dtype),
    "strided": of_arrays(strided),
    "frozen": of_arrays(frozen),
    "Fortran order": of_arrays(np.asfortranarray),
    "lists of arrays": of_arrays(list),
    "tuples of arrays": of_arrays(tuple),
}


def batches_of(space: spaces.Space[Any]) -> list[tuple[str, Any]]:
    """A batch in each form, each from other samples."""
    batched = batch_space(copy.deepcopy(space), NUM_ENVS)
    batched.seed(4)
    return [(form, change(batched.sample())) for form, change in FORMS.items()]


# In the slab or by pickle; with two workers, one holds two envs and one a single one.
ACTION_CELLS = [(0, True), (2, True), (2, False)]


@loops_in_turn("name", product(ACTION_SPACES))
async def test_actions_reach_the_env_as_in_gymnasium(name: str) -> None:
    """Samples, lists, arrays of another dtype or layout; and what the caller gave is not changed."""
    env_fns = [partial(Recorder, ACTION_SPACES[name], length=1000)] * NUM_ENVS
    batches = batches_of(ACTION_SPACES[name])
    expected = []
    async with AwaitedSync(env_fns) as sync:
        await sync.reset()
        for _, actions in batches:
            await sync.step(actions)
            expected.append(sync.call("last_action"))
    found = []
    for cell in ACTION_CELLS:
        where = f"{cell}"
        async with aiovec.AsyncVectorEnv(env_fns, **cell_arguments(*cell)) as envs:
            await envs.reset()
            for (form, actions), taken in zip(batches, expected, strict=True):
                before = copy.deepcopy(actions)
                try:
                    await envs.step(actions)
                except aiovec.InvalidActionsError as error:
                    found.append(f"{where}: {form}: {error}")
                    continue
                assert_same(actions, before, f"{where}: {form}: the caller's actions")
                if differs := difference(await envs.call("last_action"), taken):
                    found.append(f"{where}: {form}{differs}")
    assert not found, "\n".join(found)


@pytest.mark.parametrize("cell", ACTION_CELLS)
async def test_actions_are_taken_when_step_is_called(cell: tuple[int, bool]) -> None:
    """One array that the caller fills anew for each step: what an env kept of the last one stays as it was."""
    space = spaces.Box(-99, 99, (2,), np.float32)
    actions = np.zeros((NUM_ENVS, 2), np.float32)
    async with aiovec.AsyncVectorEnv([partial(Recorder, space)] * NUM_ENVS, **cell_arguments(*cell)) as envs:
        await envs.reset()
        for number in range(4):
            actions[:] = number
            await envs.step(actions)
        kept = await envs.get_attr("kept")
    assert_same(kept, ([np.full(2, number, np.float32) for number in range(4)],) * NUM_ENVS, "kept")
