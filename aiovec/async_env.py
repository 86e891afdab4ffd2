"""`AsyncEnv`: an env whose methods are awaited; and its limit of steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, SupportsFloat, TypeVar

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import EnvSpec

__all__ = ["AsyncEnv", "AsyncTimeLimit"]

_Observation = TypeVar("_Observation")
_Action = TypeVar("_Action")

if TYPE_CHECKING:
    # For type checkers it is no `gymnasium.Env`: there, no method may be `async def`, nor in a user's subclass.
    class _Env(Generic[_Observation, _Action]):
        metadata: dict[str, Any]
        render_mode: str | None
        spec: EnvSpec | None
        action_space: gym.Space[_Action]
        observation_space: gym.Space[_Observation]

        @property
        def np_random(self) -> np.random.Generator: ...
        @np_random.setter
        def np_random(self, value: np.random.Generator) -> None: ...

        @property
        def np_random_seed(self) -> int | None: ...
        @property
        def unwrapped(self) -> gym.Env[_Observation, _Action]: ...
        def has_wrapper_attr(self, name: str) -> bool: ...
        def get_wrapper_attr(self, name: str) -> Any: ...
        def set_wrapper_attr(self, name: str, value: Any, *, force: bool = True) -> bool: ...
else:
    _Env = gym.Env


class AsyncEnv(_Env[_Observation, _Action], Generic[_Observation, _Action]):
    """Base class of an env whose `reset`, `step`, `render` and `close` are `async def`.

    For envs that wait: for tools, browsers, remote simulators, other services. The envs of a worker run concurrently,
    on an event loop that the worker has beside its main thread; with `num_workers=0` on the caller's own. Each has a
    task for its life, so it may use task groups and time-outs, and context variables that `reset` sets are seen by
    `step`. One env's calls never overlap. `__init__` is an ordinary function, and runs outside of that loop.

    A `step_timeout`, a reset while its step is owed, and a close end what it is doing by cancellation: `finally` blocks
    run. The cancellation of the task that awaits the vector does not reach it.

    Further methods, for `call`, may be `async def` or not. Gymnasium's single-env wrappers cannot await, and so do not
    take it.
    """

    async def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[_Observation, dict[str, Any]]:
        """Begins an episode.

        An env calls `await super().reset(seed=seed)` first, which seeds `np_random`.

        Args:
            seed: For `np_random`; `None` leaves it as it is.
            options: What the user gave.

        Returns:
            The first observation, and an info.
        """
        gym.Env.reset(self, seed=seed, options=options)  # type: ignore[arg-type]  # see above
        return None, {}  # type: ignore[return-value]  # Gymnasium's base returns nothing either

    async def step(self, action: _Action) -> tuple[_Observation, SupportsFloat, bool, bool, dict[str, Any]]:
        """Steps once.

        Args:
            action: As `action_space` says.

        Returns:
            Observation, reward, terminated, truncated, info.
        """
        raise NotImplementedError

    async def render(self) -> Any:
        """A frame, as `render_mode` says."""
        raise NotImplementedError

    async def close(self) -> None:
        """Frees what the env holds."""


class AsyncTimeLimit(AsyncEnv[Any, Any]):
    """Truncates the episodes of an async env; `gymnasium.wrappers.TimeLimit` cannot await.

    Args:
        env: The env.
        max_episode_steps: How many steps an episode may have.
    """

    def __init__(self, env: AsyncEnv[Any, Any], max_episode_steps: int) -> None:
        self.env: AsyncEnv[Any, Any] = env
        self.observation_space: gym.Space[Any] = env.observation_space
        self.action_space: gym.Space[Any] = env.action_space
        self.metadata: dict[str, Any] = env.metadata
        self.render_mode: str | None = env.render_mode
        self.spec: EnvSpec | None = env.spec
        self._max_episode_steps = max_episode_steps
        self._elapsed_steps = 0

    def __repr__(self) -> str:
        return f"<AsyncTimeLimit of {self._max_episode_steps} steps, {self.env!r}>"

    def __getattr__(self, name: str) -> Any:
        if name == "env":  # not there yet, or no more
            raise AttributeError(name)
        return getattr(self.env, name)

    @property
    def unwrapped(self) -> gym.Env[Any, Any]:
        """The env itself."""
        return self.env.unwrapped

    @property
    def np_random(self) -> np.random.Generator:
        """Of the env."""
        return self.env.np_random

    @np_random.setter
    def np_random(self, value: np.random.Generator) -> None:
        self.env.np_random = value

    @property
    def np_random_seed(self) -> int | None:
        """Of the env."""
        return self.env.np_random_seed

    def set_wrapper_attr(self, name: str, value: Any, *, force: bool = True) -> bool:
        """Sets an attribute of the env."""
        return self.env.set_wrapper_attr(name, value, force=force)

    async def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        self._elapsed_steps = 0
        return await self.env.reset(seed=seed, options=options)

    async def step(self, action: Any) -> tuple[Any, SupportsFloat, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = await self.env.step(action)
        self._elapsed_steps += 1
        return observation, reward, terminated, truncated or self._elapsed_steps >= self._max_episode_steps, info

    async def render(self) -> Any:
        return await self.env.render()

    async def close(self) -> None:
        await self.env.close()
