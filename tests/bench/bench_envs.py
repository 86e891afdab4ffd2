"""The envs of the table."""

from __future__ import annotations

import asyncio
import random
import time
from typing import Any

import gymnasium as gym
import numpy as np

import aiovec


def cartpole() -> gym.Env[Any, Any]:
    """CartPole as `gymnasium.make` wraps it."""
    return gym.make("CartPole-v1")


def breakout() -> gym.Env[Any, Any]:
    """Raw Breakout frames, 210×160×3."""
    import ale_py

    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
    gym.register_envs(ale_py)
    return gym.make("BreakoutNoFrameskip-v4")


class Trivial(gym.Env[Any, Any]):
    """Costs nothing; with `num_infos` scalars in each info."""

    observation_space = gym.spaces.Box(-1, 1, (4,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def __init__(self, num_infos: int = 0) -> None:
        self._observation = np.zeros(4, np.float32)
        self._keys = [f"key{index}" for index in range(num_infos)]

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        return self._observation, {}

    def step(self, action: Any) -> Any:
        return self._observation, 0.0, False, False, {key: 0.5 for key in self._keys} if self._keys else {}


def with_infos() -> gym.Env[Any, Any]:
    """Four scalars in each info."""
    return Trivial(4)


class Sleeps(Trivial):
    """Waits, some seconds or as many in the mean, as a simulator does that works elsewhere."""

    def __init__(self, seconds: float, exponential: bool = False) -> None:
        super().__init__()
        self._seconds = seconds
        self._random = random.Random(0) if exponential else None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        if self._random is not None:
            self._random.seed(seed)
        return super().reset(seed=seed, options=options)

    def step(self, action: Any) -> Any:
        time.sleep(self._random.expovariate(1 / self._seconds) if self._random is not None else self._seconds)
        return super().step(action)


class Frames(Trivial):
    """Random frames of Atari's size, 210×160×3."""

    observation_space = gym.spaces.Box(0, 255, (210, 160, 3), np.uint8)

    def __init__(self) -> None:
        super().__init__()
        self._observation = np.random.default_rng(0).integers(0, 256, (210, 160, 3), np.uint8)


class AsyncSleeps(aiovec.AsyncEnv[Any, Any]):
    """Waits under await."""

    observation_space = Trivial.observation_space
    action_space = Trivial.action_space

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._observation = np.zeros(4, np.float32)

    async def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        return self._observation, {}

    async def step(self, action: Any) -> Any:
        await asyncio.sleep(self._seconds)
        return self._observation, 0.0, False, False, {}


def exponential() -> gym.Env[Any, Any]:
    """10 ms in the mean."""
    return Sleeps(0.01, exponential=True)


def async_sleeps() -> AsyncSleeps:
    """10 ms."""
    return AsyncSleeps(0.01)
