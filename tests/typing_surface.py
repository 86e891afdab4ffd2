"""The public types, as a user meets them. Never run: mypy and pyright read it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, assert_type

import gymnasium as gym
import numpy as np
import numpy.typing as npt

import aiovec


async def lifetime() -> None:
    async with aiovec.make_vec("CartPole-v1", num_envs=4, vector_kwargs={"num_workers": 2}) as envs:
        assert_type(envs, aiovec.AsyncVectorEnv)
    assert_type(await aiovec.AsyncVectorEnv([lambda: gym.make("CartPole-v1")], num_workers=0), aiovec.AsyncVectorEnv)
    assert_type(await envs.close(), None)
    assert_type(envs.closed, bool)


async def batches(envs: aiovec.AsyncVectorEnv) -> None:
    observations, infos = await envs.reset(seed=1, options={}, env_ids=[0])
    assert_type(observations, Any)
    assert_type(infos, dict[str, Any])
    _, rewards, terminations, truncations, _ = await envs.step([0, 1])
    assert_type(rewards, npt.NDArray[np.float64])
    assert_type(terminations, npt.NDArray[np.bool_])
    assert_type(truncations, npt.NDArray[np.bool_])
    assert_type(await envs.call("method", 1, keyword=2, env_ids=[0]), tuple[Any, ...])
    assert_type(envs.action_space, gym.Space[Any])


async def batched(policy: Callable[[Any], Any]) -> None:
    async with aiovec.Batcher(policy, max_batch_size=64, max_wait=0.002, max_pending=256) as batcher:
        assert_type(batcher, aiovec.Batcher)
        assert_type(await batcher(np.zeros(4)), Any)
        assert_type(batcher.statistics(), aiovec.BatcherStatistics)
        assert_type(batcher.statistics().mean_fill, float)
    assert_type(await batcher.aclose(), None)
    assert_type(batcher.closed, bool)


def failed(exception: Exception) -> None:
    assert_type(aiovec.failures(exception), list[aiovec.Failure])
