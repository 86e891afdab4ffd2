"""What is asked of envs without aiovec, and what they give: synchronous, for a thread.

A *tape* is the list of what was asked and what came. A vector that is asked the same must give the same.
"""

from __future__ import annotations

import asyncio
import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from aiovec.async_env import AsyncEnv

__all__ = [
    "FEWEST_STEPS",
    "VECTOR_FACTS",
    "Asked",
    "BatchTape",
    "EnvFn",
    "record_batches",
    "record_env",
    "without_await",
]

EnvFn = Callable[[], Any]

FEWEST_STEPS = 40  # within them there is a reset of each kind

VECTOR_FACTS = (
    "num_envs",
    "single_observation_space",
    "observation_space",
    "single_action_space",
    "action_space",
    "metadata",
    "render_mode",
)


class Asked(NamedTuple):
    """One call and its result.

    Attributes:
        what: As messages name it.
        method: ``"reset"`` or ``"step"``.
        arguments: Positional ones.
        keywords: The others.
        result: What came.
    """

    what: str
    method: str
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    result: Any


@dataclass(frozen=True)
class BatchTape:
    """What `SyncVectorEnv` does.

    Attributes:
        facts: What it shows of itself, by the names of `VECTOR_FACTS`.
        asked: Call by call.
        frames: What it renders in the end, where the render mode is ``"rgb_array"``.
    """

    facts: dict[str, Any]
    asked: tuple[Asked, ...]
    frames: Any

    @property
    def has_ended_episodes(self) -> bool:
        """Whether any autoreset is in it."""
        return any((asked.result[2] | asked.result[3]).any() for asked in self.asked if asked.method == "step")


class _Blocking(gym.Env[Any, Any]):
    """An `AsyncEnv` whose methods block."""

    def __init__(self, env: Any) -> None:
        self.env: Any = env
        self.observation_space: gym.Space[Any] = env.observation_space
        self.action_space: gym.Space[Any] = env.action_space
        self.metadata: dict[str, Any] = env.metadata
        self.render_mode: str | None = env.render_mode
        self._runner = asyncio.Runner()

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        result: tuple[Any, dict[str, Any]] = self._runner.run(self.env.reset(seed=seed, options=options))
        return result

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        result: tuple[Any, Any, bool, bool, dict[str, Any]] = self._runner.run(self.env.step(action))
        return result

    def render(self) -> Any:
        return self._runner.run(self.env.render())

    def close(self) -> None:
        with self._runner:  # which is closed, too
            self._runner.run(self.env.close())


def without_await(env_fn: EnvFn) -> gym.Env[Any, Any]:
    """Builds an env, of which no method need be awaited."""
    env = env_fn()
    return _Blocking(env) if isinstance(env, AsyncEnv) else env


def record_batches(
    env_fns: Sequence[EnvFn], mode: AutoresetMode, seed: int, num_steps: int, *, resets_between: bool = True
) -> BatchTape:
    """Drives a `SyncVectorEnv` by sampled actions.

    Args:
        env_fns: The envs.
        mode: Under DISABLED, what ended is reset by a mask, since that vector does not do it.
        seed: Of the envs, and of the actions.
        num_steps: How many steps.
        resets_between: Whether some or all are also reset in the middle of episodes.
    """
    envs = SyncVectorEnv([functools.partial(without_await, env_fn) for env_fn in env_fns], autoreset_mode=mode)
    try:
        asked: list[Asked] = []

        def ask(what: str, method: str, *arguments: Any, **keywords: Any) -> Any:
            # Copies: Gymnasium takes the mask out of the caller's own dict, and gives arrays that envs may write into.
            given = copy.deepcopy((arguments, keywords))
            result = getattr(envs, method)(*arguments, **keywords)
            asked.append(Asked(f"{what} ({mode.name})", method, *given, copy.deepcopy(result)))
            return result

        num_envs = len(env_fns)
        envs.action_space.seed(seed)
        ask("reset", "reset", seed=seed)
        ended = np.zeros(num_envs, np.bool_)
        for number in range(num_steps):
            if resets_between and number % FEWEST_STEPS == 14:
                mask = ended | (np.arange(num_envs) != number // FEWEST_STEPS % num_envs)
                seeds = [seed + number + env_index for env_index in range(num_envs)]
                ask(f"masked reset before step {number}", "reset", seed=seeds, options={"reset_mask": mask})
            elif resets_between and number % FEWEST_STEPS == 35:
                ask(f"reset before step {number}", "reset", seed=[seed + number, *[None] * (num_envs - 1)])
            elif mode is AutoresetMode.DISABLED and ended.any():
                ask(f"masked reset before step {number}", "reset", options={"reset_mask": ended})
            result = ask(f"step {number}", "step", envs.action_space.sample())
            ended = result[2] | result[3]
        frames = copy.deepcopy(envs.render()) if envs.render_mode == "rgb_array" else None
        return BatchTape({name: copy.deepcopy(getattr(envs, name)) for name in VECTOR_FACTS}, tuple(asked), frames)
    finally:
        envs.close()


def record_env(
    env_fn: EnvFn, seed: int, num_steps: int, look: Callable[[Asked], None] = lambda _asked: None
) -> tuple[Asked, ...]:
    """Drives one env by sampled actions, and resets it where an episode ended; `look` sees each result, not copied."""
    env = without_await(env_fn)
    try:
        asked: list[Asked] = []

        def ask(what: str, method: str, *arguments: Any, **keywords: Any) -> Any:
            result = getattr(env, method)(*arguments, **keywords)
            look(Asked(what, method, arguments, keywords, result))
            asked.append(Asked(what, method, arguments, keywords, copy.deepcopy(result)))
            return result

        env.action_space.seed(seed)
        ask("reset", "reset", seed=seed)
        for number in range(num_steps):
            result = ask(f"step {number}", "step", env.action_space.sample())
            if result[2] or result[3]:
                ask(f"reset after step {number}", "reset")
        return tuple(asked)
    finally:
        env.close()
