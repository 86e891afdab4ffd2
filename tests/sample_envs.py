"""Small environments that tests of every kind step."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np


class Counter(gym.Env[Any, Any]):
    """Bears its step counter in observation, reward and info; its episodes last `length` steps."""

    def __init__(self, length: int = 5, offset: int = 0) -> None:
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float32)
        self.action_space = gym.spaces.Discrete(4)
        self.length = length
        self.offset = offset
        self.steps = 0
        self.episodes = 0
        self.actions: list[Any] = []

    def _observation(self) -> Any:
        return np.array([self.offset, self.episodes, self.steps], np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.steps = 0
        self.episodes += 1
        return self._observation(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        self.actions.append(action)
        return self._observation(), float(self.steps), self.steps >= self.length, False, {"steps": self.steps}


class Raises(Counter):
    """Raises `ValueError("An error occurred.")` for action 1."""

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        if action == 1:
            raise ValueError("An error occurred.")
        return super().step(action)
