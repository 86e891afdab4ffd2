"""The public types, as a user meets them. Never run: mypy and pyright read it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, assert_type

import gymnasium as gym
import numpy as np
import numpy.typing as npt

import aiovec
from aiovec.testing import ContractError, FaultyEnv, check_vector_env


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


async def seen(envs: aiovec.AsyncVectorEnv) -> None:
    frames = await envs.frames(env_ids=[0, 1], columns=2)
    assert_type(frames, aiovec.Frames)
    assert_type(frames.frames, tuple[npt.NDArray[np.uint8], ...])
    assert_type(frames.env_ids, tuple[int, ...])
    assert_type(frames.mosaic, npt.NDArray[np.uint8])
    assert_type(frames.save("frames.png"), None)
    assert_type(envs.statistics().steps_per_second, float)


async def rolled_out(envs: aiovec.AsyncVectorEnv) -> None:
    def plain(observations: Any) -> npt.NDArray[np.int64]:
        return np.zeros(len(observations), np.int64)

    async def with_extras(observations: Any) -> tuple[npt.NDArray[np.int64], dict[str, Any]]:
        return plain(observations), {"value": observations}

    rollout = await envs.rollout(plain, 128)
    assert_type(rollout, aiovec.Rollout)
    assert_type(rollout.observations, Any)
    assert_type(rollout.rewards, npt.NDArray[np.float64])
    assert_type(rollout.autoresets, npt.NDArray[np.bool_])
    assert_type(rollout.infos, tuple[dict[str, Any], ...])
    assert_type(rollout.episode_lengths, npt.NDArray[np.int64])
    async for following in envs.rollouts(with_extras, 128, groups=2, pin_memory=False):
        assert_type(following, aiovec.Rollout)


class Tool(aiovec.AsyncEnv[npt.NDArray[np.float32], int]):
    """A user's async env: every method `async def`, its own among them."""

    def __init__(self) -> None:
        self.observation_space = gym.spaces.Box(-1, 1, (3,), np.float32)
        self.action_space = gym.spaces.Discrete(2)  # type: ignore[assignment]  # of int64, which is no int

    async def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[npt.NDArray[np.float32], dict[str, Any]]:
        assert_type(await super().reset(seed=seed), tuple[npt.NDArray[np.float32], dict[str, Any]])
        assert_type(self.np_random, np.random.Generator)
        return np.zeros(3, np.float32), {}

    async def step(self, action: int) -> tuple[npt.NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        return np.full(3, action, np.float32), 1.0, False, False, {}

    async def render(self) -> str:
        return f"{self.render_mode}"

    async def close(self) -> None:
        assert_type(await self.ask("bye"), str)

    async def ask(self, question: str) -> str:
        return question


async def async_envs(tool: Tool) -> None:
    async with aiovec.AsyncVectorEnv([Tool, lambda: gym.make("CartPole-v1")], num_workers=1) as envs:
        assert_type(envs, aiovec.AsyncVectorEnv)
    aiovec.AsyncVectorEnv([Tool] * 4, num_workers=0, step_timeout=5)
    aiovec.AsyncVectorEnv([lambda: gym.make("CartPole-v1")] * 4, threads_per_worker=4)
    observation, info = await tool.reset(seed=1)
    assert_type(observation, npt.NDArray[np.float32])
    assert_type(info, dict[str, Any])
    assert_type(await tool.step(1), tuple[npt.NDArray[np.float32], float, bool, bool, dict[str, Any]])
    assert_type(await tool.render(), str)


async def batched(policy: Callable[[Any], Any]) -> None:
    async with aiovec.Batcher(policy, max_batch_size=64, max_wait=0.002, max_pending=256) as batcher:
        assert_type(batcher, aiovec.Batcher)
        assert_type(await batcher(np.zeros(4)), Any)
        assert_type(batcher.statistics(), aiovec.BatcherStatistics)
        assert_type(batcher.statistics().mean_fill, float)
    assert_type(await batcher.aclose(), None)
    assert_type(batcher.closed, bool)


async def annotated(
    env_fns: list[aiovec.EnvFn], mode: aiovec.ObservationMode, policy: aiovec.Policy, wrapper: aiovec.VectorWrapperFn
) -> None:
    async with aiovec.AsyncVectorEnv(env_fns, observation_mode=mode) as envs:
        result: aiovec.ResetResult = await envs.reset()
        step: aiovec.StepResult = await envs.step([0])
        transition: aiovec.Transition = await envs[0].step(0)
        assert_type((result[0], step[0], transition[1]), tuple[Any, Any, float])
        assert_type(await envs.rollout(policy, 8), aiovec.Rollout)
        wrapped: aiovec.WrappedVectorEnv = aiovec.wrap(envs, wrapper)
        assert_type(wrapped.unwrapped, aiovec.AsyncVectorEnv)


def failed(exception: Exception) -> None:
    assert_type(aiovec.failures(exception), list[aiovec.Failure])


def blocking() -> None:
    envs = aiovec.BlockingVectorEnv([lambda: gym.make("CartPole-v1")], copy=True, num_workers=2)
    assert_type(envs.num_workers, int)
    assert_type(envs.reset(seed=1), tuple[Any, dict[str, Any]])
    envs.step_async([0])
    _, rewards, _, _, infos = envs.step_wait(timeout=1.0)
    assert_type(rewards, npt.NDArray[np.float64])
    assert_type(infos, dict[str, Any])
    assert_type(envs.call("method", env_ids=[0]), tuple[Any, ...])
    assert_type(envs.recv(), aiovec.StepBatch)
    assert_type(envs.rollout(np.asarray, 8), aiovec.Rollout)
    wrapped: gym.vector.VectorEnv[Any, Any, Any] = gym.wrappers.vector.RecordEpisodeStatistics(envs)
    assert_type(wrapped.num_envs, int)
    assert_type(aiovec.register_vec("CartPole-v1"), str)


async def wrapped(envs: aiovec.AsyncVectorEnv) -> None:
    async with aiovec.wrap(envs, gym.wrappers.vector.RecordEpisodeStatistics) as wrapped:
        assert_type(wrapped.unwrapped, aiovec.AsyncVectorEnv)
        assert_type(await wrapped.reset(seed=1), tuple[Any, dict[str, Any]])
        _, rewards, *_ = await wrapped.step([0])
        assert_type(rewards, npt.NDArray[np.float64])
        assert_type(wrapped.return_queue, Any)


async def tested() -> None:
    made = await check_vector_env(
        functools.partial(aiovec.AsyncVectorEnv, num_workers=2),
        lambda: FaultyEnv("raise", "reset", after=1),
        skip=["render"],
    )
    assert_type(made, tuple[str, ...])
    await check_vector_env(aiovec.AsyncVectorEnv, Tool, seed=1, num_steps=100, seconds_per_check=10)
    async with aiovec.AsyncVectorEnv([FaultyEnv, functools.partial(FaultyEnv, "kill", after=3)]) as envs:
        await envs.call("fail", "hang", env_ids=[1])


def found(error: ContractError) -> None:
    assert_type((error.check, error.where, error.expected, error.got), tuple[str, str, str, str])
