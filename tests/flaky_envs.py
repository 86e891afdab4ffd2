"""An env that fails in the ways that `on_failure="restart"` is for."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np

SPACE = gym.spaces.Dict({"numbers": gym.spaces.Box(-np.inf, np.inf, (3,), np.float32), "text": gym.spaces.Text(20)})


SLOW = 2


def raise_an_error() -> None:
    raise ValueError("An error occurred.")


class Flaky(gym.Env[Any, Any]):
    """Fails in the step with action 1, or in the reset with the option `fail`, as often as `log` allows.

    Its observation bears its index, how often it was built, and its steps: as an array, and as a text if asked.
    """

    def __init__(self, failing: Callable[[], object], index: int, log: str, is_dict: bool = False) -> None:
        self.action_space = gym.spaces.Discrete(3)
        self.observation_space = SPACE if is_dict else SPACE["numbers"]
        self.is_dict = is_dict
        self.failing = failing
        self.index = index
        self.steps = 0
        with open(log, "a+") as file:
            file.write(f"{index}\n")
            file.seek(0)
            self.built = file.read().split().count(str(index))
        if os.path.exists(f"{log}.{index}.broken"):
            failing()
        if os.path.exists(f"{log}.{index}.stuck"):
            time.sleep(60)

    def _observation(self) -> Any:
        numbers = np.array([self.index, self.built, self.steps], np.float32)
        return {"numbers": numbers, "text": f"{self.built} {self.steps}"} if self.is_dict else numbers

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        if options is not None and self.index == options.get("fail") and self.built <= options["until"]:
            self.failing()
        self.steps = 0
        return self._observation(), {"built": self.built}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        if action == 1:
            self.failing()
        if action == SLOW:
            time.sleep(0.5)
        self.steps += 1
        return self._observation(), float(self.steps), False, False, {"steps": self.steps}

    def fail(self) -> None:
        self.failing()


class Unlucky(Flaky):
    """Its second one cannot be reset either."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        if self.built == 2:
            raise RuntimeError("This one neither.")
        return super().reset(seed=seed)
