"""`SubEnv`: one env of a vector, for a task of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import gymnasium as gym

from aiovec.batches import Batches, Transition
from aiovec.errors import NotStartedError

if TYPE_CHECKING:
    from aiovec.vector_env import AsyncVectorEnv

__all__ = ["SubEnv"]


class SubEnv:
    """One env of a vector, with Gymnasium's single-env results: one task for each env, at its own pace.

    Different envs of a vector may be driven from different tasks, and by calls of the vector in between. An env that
    fails, and a call that is cancelled, do not touch the others. There is no autoreset: after the end of an episode
    `step` raises `ResetNeeded`. A batch call of the vector goes on with such an env as the autoreset mode says.

    Args:
        envs: The vector.
        ready: Gives what calls go through, if one may be made.
        env_index: Which env.
    """

    __slots__ = ("_env_index", "_envs", "_ready")

    def __init__(self, envs: AsyncVectorEnv, ready: Callable[[str], Batches], env_index: int) -> None:
        self._envs = envs
        self._ready = ready
        self._env_index = env_index

    def __repr__(self) -> str:
        return f"<SubEnv {self._env_index} of {self._envs!r}>"

    @property
    def env_index(self) -> int:
        """Which env of the vector it is."""
        return self._env_index

    @property
    def observation_space(self) -> gym.Space[Any]:
        """Of this env; known after the start of the vector."""
        return self._envs.single_observation_space

    @property
    def action_space(self) -> gym.Space[Any]:
        """Of this env; known after the start of the vector."""
        return self._envs.single_action_space

    async def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Resets the env; starts the vector if it is not. What is owed to the env is waited out and discarded.

        Args:
            seed: For this env as it is: the index is not added.
            options: For the env's own `reset`.

        Returns:
            Its observation, which is yours, and its info.

        Raises:
            AlreadyPendingCallError: Another task awaits the env; nothing was changed.
            WorkerDied: The worker of the env ended; another reset builds it anew.
            EnvTimeoutError: The env, or another one of its worker, took too long; likewise.
            Exception: What the env's `reset` raised; it needs another reset.
            asyncio.CancelledError: The env goes on, and its row is owed.
        """
        try:
            batches = self._ready("reset()")
        except NotStartedError:
            await self._envs
            batches = self._ready("reset()")
        return await batches.reset_one(self._env_index, seed, options)

    async def step(self, action: Any) -> Transition:
        """Steps the env once.

        Args:
            action: As `action_space` says. Taken before the first `await`.

        Returns:
            Observation, reward, terminated, truncated, info; reward and flags are Python's, all of it is yours.

        Raises:
            InvalidActionsError: The action does not fit; the env was not stepped.
            AlreadyPendingCallError: The env is awaited by another task, or owed; it was not stepped.
            ResetNeeded: Its episode has ended, it has failed, or was never reset; it was not stepped.
            WorkerDied: The worker of the env ended; a reset builds it anew.
            EnvTimeoutError: The env, or another one of its worker, took too long; likewise.
            Exception: What the env's `step` raised; it needs a reset.
            asyncio.CancelledError: The env goes on with the step, and its row is owed: `recv` of the vector collects
                it, a reset discards it.
        """
        return await self._ready("step()").step_one(self._env_index, action)

    async def call(self, name: str, /, *args: Any, **kwargs: Any) -> Any:
        """Calls a method of the env, through its wrappers; the value of an attribute that is not callable.

        Any task may call at any time: the call is served in order, behind what the env's worker is doing.
        """
        (result,) = await self._envs.call(name, *args, env_ids=[self._env_index], **kwargs)
        return result

    async def get_attr(self, name: str) -> Any:
        """An attribute of the env; as in Gymnasium, a callable one is called."""
        return await self.call(name)

    async def set_attr(self, name: str, value: Any) -> None:
        """Sets an attribute of the env, through its wrappers."""
        await self._envs.set_attr(name, [value], env_ids=[self._env_index])

    async def render(self) -> Any:
        """What the env renders."""
        return await self.call("render")
