"""Ways to start workers, registered envs, and trajectories that do not depend on how many workers there are."""

from __future__ import annotations

from functools import partial
from itertools import product
from typing import Any, Literal

import gymnasium as gym
import numpy as np
import pytest
from conformance.comparing import (
    NUM_ENVS,
    AwaitedSync,
    assert_same,
    assert_same_spaces,
    assert_same_trajectory,
    expected_trajectory,
    loops_in_turn,
    trajectory,
)
from gymnasium.vector import AutoresetMode
from space_envs import OBSERVATION_SPACES, SpaceEnv

import aiovec

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

Context = Literal["fork", "forkserver", "spawn"]


@loops_in_turn("shared_memory,context", product([True, False], [None, "fork", "forkserver", "spawn"]))
async def test_contexts(shared_memory: bool, context: Context | None) -> None:
    """However the workers were started, they do the same."""
    env_fns = [partial(SpaceEnv, OBSERVATION_SPACES["nested"])] * NUM_ENVS
    mode = AutoresetMode.SAME_STEP
    expected = await expected_trajectory(env_fns, mode)
    async with aiovec.AsyncVectorEnv(
        env_fns, num_workers=2, shared_memory=shared_memory, autoreset_mode=mode, context=context
    ) as envs:
        await assert_same_trajectory(envs, mode, expected, f"{context}")


@loops_in_turn("shared_memory", product([True, False]))
async def test_trajectories_do_not_depend_on_num_workers(shared_memory: bool) -> None:
    """Even and uneven shares, more workers than envs, and none."""
    env_fns = [partial(SpaceEnv, OBSERVATION_SPACES["nested_tuple"])] * 5
    mode = AutoresetMode.NEXT_STEP
    expected = None
    for num_workers in (0, 1, 2, 3, 4, 5, 9, None):
        context: Any = "fork" if num_workers else None
        async with aiovec.AsyncVectorEnv(
            env_fns, num_workers=num_workers, shared_memory=shared_memory, context=context
        ) as envs:
            results = [asked async for asked in trajectory(envs, mode, 50)]
        expected = results if expected is None else expected
        assert_same(results, expected, f"num_workers={num_workers}")


REGISTERED = (
    "CartPole-v1",
    "Pendulum-v1",
    "MountainCarContinuous-v0",
    "Acrobot-v1",
    "FrozenLake-v1",
    "Blackjack-v1",
    "Taxi-v4",
)


@loops_in_turn("num_workers,env_id", product([0, 2], REGISTERED))
async def test_registered_envs(num_workers: int, env_id: str) -> None:
    """`make_vec` gives what `gymnasium.make_vec` gives."""
    kwargs = {"max_episode_steps": 30}
    sync = gym.make_vec(env_id, num_envs=4, vectorization_mode="sync", **kwargs)
    async with aiovec.make_vec(env_id, num_envs=4, vector_kwargs={"num_workers": num_workers}, **kwargs) as envs:
        assert_same_spaces(envs, sync, env_id)
        assert_same(await envs.reset(seed=3), sync.reset(seed=3), "reset")
        sync.action_space.seed(4)
        ended = np.zeros(4, np.bool_)
        for number in range(200):
            actions = sync.action_space.sample()
            result = await envs.step(actions)
            assert_same(result, sync.step(actions), f"step {number}")
            ended |= result[2] | result[3]
        assert ended.all()
    sync.close()


async def test_autoreset_mode_by_name() -> None:
    for mode in AutoresetMode:
        async with AwaitedSync([SpaceEnvOfDiscrete], autoreset_mode=mode.value) as sync:
            async with aiovec.AsyncVectorEnv([SpaceEnvOfDiscrete], num_workers=0, autoreset_mode=mode.value) as envs:
                assert_same(envs.metadata, sync.metadata, "metadata")


def SpaceEnvOfDiscrete() -> SpaceEnv:
    return SpaceEnv(OBSERVATION_SPACES["discrete_start"])
