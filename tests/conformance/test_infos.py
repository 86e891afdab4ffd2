"""Infos: dicts of arrays with `_key` masks, equal to `SyncVectorEnv`; where that raises, the very values."""

from __future__ import annotations

from functools import partial
from itertools import product

import numpy as np
import pytest
from conformance.comparing import (
    AUTORESET_MODES,
    CELLS,
    NUM_ENVS,
    AwaitedSync,
    assert_same,
    assert_same_cells,
    cell_arguments,
    expected_trajectory,
    loops_in_turn,
)
from gymnasium.vector import AutoresetMode
from space_envs import RAGGED, InfoEnv, InfoSizesEnv

import aiovec

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


@loops_in_turn("mode", product(AUTORESET_MODES))
async def test_infos_of_every_kind(mode: AutoresetMode) -> None:
    """None, scalars, arrays, objects, nested dicts, casts; keys of some envs at some steps; and no infos."""
    env_fns = [partial(InfoEnv, env_index) for env_index in range(NUM_ENVS)]
    expected = await expected_trajectory(env_fns, mode)
    all_infos = [result[-1] for _, result in expected[1]]
    assert {} in all_infos
    masks = [infos["_int"] for infos in all_infos if "_int" in infos]
    assert any(mask.all() for mask in masks)
    assert not all(mask.all() for mask in masks)
    await assert_same_cells(env_fns, mode, expected, 0)


@loops_in_turn("mode", product(AUTORESET_MODES))
async def test_infos_of_every_size(mode: AutoresetMode) -> None:
    """What a worker has to say may be nothing, little, or more than fits into shared memory, at each step anew."""
    env_fns = [partial(InfoSizesEnv, env_index) for env_index in range(NUM_ENVS)]
    expected = await expected_trajectory(env_fns, mode)
    await assert_same_cells(env_fns, mode, expected, 0)


@loops_in_turn("kind", product(RAGGED))
async def test_infos_that_fit_no_array(kind: str) -> None:
    """Where Gymnasium raises, there is an object array of the very values, also within a nested dict."""
    env_fns = [partial(InfoEnv, env_index, kind) for env_index in range(NUM_ENVS)]
    actions = np.zeros(NUM_ENVS, np.int64)
    async with AwaitedSync(env_fns) as sync:
        await sync.reset()
        if kind == "dict_or_text":  # here it does not raise, but takes the number of an env for a key of its dict
            assert (await sync.step(actions))[-1]["value"][1] == "text"
        else:
            with pytest.raises((TypeError, ValueError, OverflowError, AttributeError)):
                await sync.step(actions)
    values = np.empty(NUM_ENVS, object)
    for env_index in range(NUM_ENVS):
        values[env_index] = RAGGED[kind](env_index)
    everyone = np.ones(NUM_ENVS, np.bool_)
    for cell in CELLS:
        async with aiovec.AsyncVectorEnv(env_fns, **cell_arguments(*cell)) as envs:
            await envs.reset()
            infos = (await envs.step(actions))[-1]
        where = f"{cell}: infos"
        inside = {"value": values, "_value": everyone}
        assert_same(infos, inside | {"inside": inside, "_inside": everyone}, where)


@loops_in_turn("kind", product(RAGGED))
async def test_final_infos_that_fit_no_array(kind: str) -> None:
    """The same within `final_info`, in which only some envs have a row."""
    env_fns = [partial(InfoEnv, env_index, kind) for env_index in range(NUM_ENVS)]
    for num_workers in (0, 2):
        async with aiovec.AsyncVectorEnv(
            env_fns, autoreset_mode=AutoresetMode.SAME_STEP, **cell_arguments(num_workers, shared_memory=True)
        ) as envs:
            await envs.reset()
            found = 0
            for _ in range(40):
                *_, terminations, truncations, infos = await envs.step(np.zeros(NUM_ENVS, np.int64))
                ended = terminations | truncations
                assert ended.any() == ("final_info" in infos)
                if ended.all() or ended[:2].all():
                    found += 1
                    got = infos["final_info"]["value"]
                    for env_index in np.flatnonzero(ended).tolist():
                        assert_same(got[env_index], RAGGED[kind](env_index), "final_info")
                    assert got.dtype == object
                    np.testing.assert_array_equal(infos["final_info"]["_value"], ended)
        assert found
