"""The envs of the table."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np


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
