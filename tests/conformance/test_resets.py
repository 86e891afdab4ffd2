"""Seeds, options and part resets, as each env sees them."""

from __future__ import annotations

import copy
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import pytest
from conformance.comparing import CELLS, AwaitedSync, assert_same, cell_arguments, loops_in_turn
from gymnasium.vector import AutoresetMode
from space_envs import OBSERVATION_SPACES, DefaultsEnv, InfoEnv, Recorder, SpaceEnv

import aiovec

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

NUM_ENVS = 4

SEEDS: tuple[Any, ...] = (3, [5, 6, 7, 8], [None, 1, None, 2], (9, None, 9, 9), 0, [0, 0, 0, 0])


@loops_in_turn("mode", product(AutoresetMode))
async def test_envs_get_the_seeds_and_options_of_gymnasium(mode: AutoresetMode) -> None:
    """Also the autoreset's, which has neither; compared are the arguments themselves and what is drawn after."""
    env_fns = [partial(Recorder, name=str(env_index)) for env_index in range(NUM_ENVS)]
    mask = np.array([False, True, True, False])
    asked: list[dict[str, Any]] = [
        *({"seed": seed} for seed in SEEDS),
        {"options": {}},
        {"options": {"level": 2}},
        {"seed": 4, "options": {"level": {"a": [1]}}},
        {"options": {"reset_mask": mask}},
        {"seed": 11, "options": {"reset_mask": mask, "level": 3}},
        {"seed": [1, 2, None, 4], "options": {"level": 4, "reset_mask": mask}},
        {"seed": [1, 2, None, 4], "options": {"reset_mask": np.ones(NUM_ENVS, np.bool_)}},
        {},
    ]

    async def drive(envs: Any) -> list[Any]:
        results = []
        for number, arguments in enumerate(asked):
            results.append(await envs.reset(**arguments))
            steps = 0 if number != 1 else 4 if mode is AutoresetMode.DISABLED else 8
            results.extend([await envs.step(np.zeros(NUM_ENVS, np.int64)) for _ in range(steps)])
        return results

    async with AwaitedSync(env_fns, autoreset_mode=mode) as sync:
        await sync.reset(seed=1)
        expected = await drive(sync)
        told = sync.get_attr("told")
        draws = sync.call("np_random")
    for cell in CELLS:
        before = copy.deepcopy(asked)
        async with aiovec.AsyncVectorEnv(env_fns, autoreset_mode=mode, **cell_arguments(*cell)) as envs:
            await envs.reset(seed=1)
            assert_same(await drive(envs), expected, f"{cell}")
            assert_same(await envs.get_attr("told"), told, f"{cell}: told to the envs")
            generators = await envs.get_attr("np_random")
            assert [each.bit_generator.state for each in generators] == [each.bit_generator.state for each in draws]
            assert await envs.get_attr("np_random_seed") == sync.np_random_seed
        assert_same(asked, before, f"{cell}: the caller's arguments")


@loops_in_turn("mode", product(AutoresetMode))
async def test_reset_without_arguments_tells_the_env_none(mode: AutoresetMode) -> None:
    """As in Gymnasium: `reset()` of the vector passes `None` to the envs, only an autoreset passes nothing."""
    steps = 4 if mode is AutoresetMode.DISABLED else 8

    async def drive(envs: Any) -> list[Any]:
        results = [await envs.reset(), await envs.reset(options={}), await envs.reset(seed=1)]
        return results + [await envs.step(np.zeros(NUM_ENVS, np.int64)) for _ in range(steps)]

    async with AwaitedSync([DefaultsEnv] * NUM_ENVS, autoreset_mode=mode) as sync:
        # An explicit None draws a seed by chance: what is compared is what the envs were told.
        expected = [infos_of(result) for result in await drive(sync)]
    for cell in CELLS:
        async with aiovec.AsyncVectorEnv(
            [DefaultsEnv] * NUM_ENVS, autoreset_mode=mode, **cell_arguments(*cell)
        ) as envs:
            assert_same([infos_of(result) for result in await drive(envs)], expected, f"{cell}")


def infos_of(result: tuple[Any, ...]) -> Any:
    """The last item."""
    return result[-1]


@loops_in_turn("cell", product(CELLS))
async def test_env_that_takes_from_its_options(cell: tuple[int, bool]) -> None:
    """Each env has its own dict: what one takes out, the next one still has, and so has the caller."""
    options = {"level": 1, "taken": 2}
    async with aiovec.AsyncVectorEnv([Recorder] * NUM_ENVS, **cell_arguments(*cell)) as envs:
        await envs.reset(options=options)
        await envs.reset(options=options | {"reset_mask": np.ones(NUM_ENVS, np.bool_)})
        await envs.reset(options=options, env_ids=[0, 1, 2, 3])
        told = await envs.get_attr("told")
    assert options == {"level": 1, "taken": 2}
    assert [[seen for _, seen in of_env] for of_env in told] == [[repr(options)] * 3] * NUM_ENVS


@loops_in_turn("name", product(["box_float32", "dict", "text", "nested"]))
async def test_part_resets_are_the_rows_of_a_masked_reset(name: str) -> None:
    """`reset(env_ids=…)` gives dense rows, in the order asked for; an int seeds by env index."""
    await _compare_part_resets([partial(SpaceEnv, OBSERVATION_SPACES[name])] * NUM_ENVS)


async def test_infos_of_part_resets_are_the_rows_of_a_masked_reset() -> None:
    await _compare_part_resets([partial(InfoEnv, env_index) for env_index in range(NUM_ENVS)])


async def _compare_part_resets(env_fns: list[Any]) -> None:
    asked: list[tuple[list[int], Any]] = [
        ([2], 5),
        ([3, 0], None),
        ([3, 1, 2], [7, None, 9]),
        ([0, 1, 2, 3], 3),
        ([1, 3, 0, 2], [4, 3, 2, 1]),
    ]
    actions = np.zeros(NUM_ENVS, np.int64)
    expected = []
    async with AwaitedSync(env_fns) as sync:
        expected.append(await sync.reset(seed=1))
        for env_ids, seed in asked:
            mask = np.zeros(NUM_ENVS, np.bool_)
            mask[env_ids] = True
            by_env = seed
            if isinstance(seed, list):
                by_env = [dict(zip(env_ids, seed, strict=True)).get(env_index) for env_index in range(NUM_ENVS)]
            options = {"reset_mask": mask, "level": 1}
            expected.append(rows_of(await sync.reset(seed=by_env, options=options), env_ids))
            expected.append(await sync.step(actions))
    for cell in CELLS:
        async with aiovec.AsyncVectorEnv(env_fns, **cell_arguments(*cell)) as envs:
            results = [await envs.reset(seed=1)]
            for env_ids, seed in asked:
                given, options = copy.copy(env_ids), {"level": 1}
                results.append(await envs.reset(seed=seed, options=options, env_ids=env_ids))
                assert (env_ids, options) == (given, {"level": 1})
                results.append(await envs.step(actions))
        assert_same(results, expected, f"{cell}")


def rows_of(value: Any, env_ids: list[int]) -> Any:
    """The rows of some envs of a batch of observations and infos."""
    if isinstance(value, np.ndarray):
        return value[env_ids]
    if isinstance(value, dict):
        return {key: rows_of(item, env_ids) for key, item in value.items()}
    if len(value) == NUM_ENVS:  # no space in this file has as many parts as there are envs
        return tuple(value[env_index] for env_index in env_ids)
    return tuple(rows_of(item, env_ids) for item in value)
