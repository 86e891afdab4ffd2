"""Every space, autoreset mode and number of workers, with and without shared memory: 200 equal steps."""

from __future__ import annotations

from functools import partial
from itertools import cycle, product
from typing import Any

import pytest
from conformance.comparing import (
    AUTORESET_MODES,
    FEW_STEPS,
    NUM_ENVS,
    NUM_STEPS,
    AwaitedSync,
    assert_same,
    assert_same_cells,
    expected_trajectory,
    loops_in_turn,
)
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from space_envs import OBSERVATION_SPACES, RARE_SPACES, WIDENED, LooseEnv, SeededSpaceEnv, SpaceEnv, Widened

import aiovec

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

SPACES = OBSERVATION_SPACES | RARE_SPACES
# Every class of space with every autoreset mode; the rarer forms with one mode each, in turn.
TABLE = [
    *product(OBSERVATION_SPACES, AUTORESET_MODES),
    *zip(RARE_SPACES, cycle(AUTORESET_MODES), strict=False),
]


@loops_in_turn("number,name,mode", [(number, *case) for number, case in enumerate(TABLE)])
async def test_observation_space(number: int, name: str, mode: AutoresetMode) -> None:
    """All numbers of workers with and without shared memory, side by side."""
    env_fns = [partial(SpaceEnv, SPACES[name])] * NUM_ENVS
    expected = await expected_trajectory(env_fns, mode, NUM_STEPS if name in OBSERVATION_SPACES else FEW_STEPS)
    await assert_same_cells(env_fns, mode, expected, number)


@loops_in_turn("mode", product(AUTORESET_MODES))
async def test_observations_that_only_fit(mode: AutoresetMode) -> None:
    """Lists, wider dtypes, other key orders, NaN: cast or taken as Gymnasium does it."""
    env_fns = [LooseEnv] * NUM_ENVS
    expected = await expected_trajectory(env_fns, mode, FEW_STEPS)
    await assert_same_cells(env_fns, mode, expected, 0)


@loops_in_turn("kind", product(WIDENED))
async def test_observation_mode_different(kind: str) -> None:
    env_fns = [partial(Widened, env_index, kind) for env_index in range(NUM_ENVS)]
    mode = AutoresetMode.SAME_STEP
    expected = await expected_trajectory(env_fns, mode, FEW_STEPS, observation_mode="different")
    await assert_same_cells(env_fns, mode, expected, 0, observation_mode="different")


@loops_in_turn("kind", product(["box", "discrete", "nested"]))
async def test_observation_mode_pair_of_spaces(kind: str) -> None:
    """The given spaces are shown as they are, whatever the envs' own bounds."""
    env_fns = [partial(Widened, env_index, kind) for env_index in range(NUM_ENVS)]
    pair: tuple[spaces.Space[Any], spaces.Space[Any]] = (OBSERVATION_SPACES["dict"], WIDENED[kind](50))
    expected = await expected_trajectory(env_fns, AutoresetMode.NEXT_STEP, FEW_STEPS, observation_mode=pair)
    assert expected[0].observation_space is pair[0]
    await assert_same_cells(env_fns, AutoresetMode.NEXT_STEP, expected, 0, observation_mode=pair)


@loops_in_turn("name,num_workers", product(["dict", "dict_integer_keys", "nested", "nested_tuple"], [0, 2]))
async def test_batch_has_the_keys_in_order(name: str, num_workers: int) -> None:
    """A batch of `Dict` observations lists its keys as Gymnasium's does."""
    env_fns = [partial(SpaceEnv, SPACES[name])] * 2
    async with AwaitedSync(env_fns) as sync:
        theirs, _ = await sync.reset(seed=1)
    async with aiovec.AsyncVectorEnv(env_fns, num_workers=num_workers) as envs:
        ours, _ = await envs.reset(seed=1)
    assert keys_of(ours) == keys_of(theirs) != []


def keys_of(value: Any) -> list[Any]:
    """The keys of all dicts within, in their order."""
    if isinstance(value, dict):
        return [(key, keys_of(item)) for key, item in value.items()]
    return [keys_of(item) for item in value] if isinstance(value, tuple) else []


@loops_in_turn("name", product(["box_float32", "discrete_start", "dict", "text", "nested"]))
async def test_batched_spaces_sample_alike(name: str) -> None:
    """Spaces that were seeded in the env give the same samples, single and batched."""
    env_fns = [partial(SeededSpaceEnv, SPACES[name])] * NUM_ENVS
    async with AwaitedSync(env_fns) as sync, aiovec.AsyncVectorEnv(env_fns, num_workers=2) as envs:
        for space in ("observation_space", "action_space", "single_observation_space", "single_action_space"):
            theirs, ours = getattr(sync, space), getattr(envs, space)
            assert_same([ours.sample() for _ in range(3)], [theirs.sample() for _ in range(3)], space)
            theirs.seed(3)
            ours.seed(3)
            assert_same([ours.sample() for _ in range(3)], [theirs.sample() for _ in range(3)], f"{space} seeded")
