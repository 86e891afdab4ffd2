"""`make_vec`: a vector of a registered environment, with Gymnasium's argument names."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import EnvSpec

from aiovec.async_env import AsyncEnv, AsyncTimeLimit
from aiovec.vector_env import AsyncVectorEnv

__all__ = ["VECTOR_OPTIONS", "env_maker", "find_spec", "make_vec"]

VECTOR_OPTIONS = frozenset(inspect.signature(AsyncVectorEnv).parameters) - {"env_fns"}


def make_vec(
    id_or_spec: str | EnvSpec,
    num_envs: int = 1,
    *,
    vector_kwargs: Mapping[str, Any] | None = None,
    wrappers: Sequence[Callable[[gym.Env[Any, Any]], gym.Env[Any, Any]]] = (),
    **env_kwargs: Any,
) -> AsyncVectorEnv:
    """Builds an `AsyncVectorEnv` of one registered environment; nothing is started yet.

    Args:
        id_or_spec: An id, such as ``"CartPole-v1"`` or ``"module:Env-v0"``, or a spec. It is looked up here,
            and travels as its spec: a worker need not know the id.
        num_envs: How many envs.
        vector_kwargs: For `AsyncVectorEnv`: ``{"num_workers": 2}``.
        wrappers: Applied to each env, the first one first. (For an `AsyncEnv`: what gives an `AsyncEnv` again; it is
            built without Gymnasium's single-env wrappers, which cannot await, but for a limit of steps.)
        **env_kwargs: For the env's own constructor, as in `gymnasium.make`.

    Raises:
        gymnasium.error.UnregisteredEnv: Nobody registered that id.
        TypeError: An option of the vector stands among those of the env, `num_envs` is no int, or `id_or_spec` neither a
            text nor a spec.
        ValueError: `num_envs` is below one.
    """
    given_id: object = id_or_spec
    if not isinstance(given_id, (str, EnvSpec)):
        raise TypeError(
            f"{given_id!r}: expected an id, or a spec; a class or a function goes into `AsyncVectorEnv([…] * n)`"
        )
    misplaced = sorted(VECTOR_OPTIONS & set(env_kwargs))
    if misplaced:
        given = ", ".join(f"{name!r}: {env_kwargs[name]!r}" for name in misplaced)
        raise TypeError(f"{', '.join(misplaced)}: an option of the vector; pass `vector_kwargs={{{given}}}`")
    if isinstance(num_envs, bool) or not isinstance(num_envs, (int, np.integer)):
        raise TypeError(f"num_envs={num_envs!r}: expected an int")
    if num_envs < 1:
        raise ValueError(f"num_envs={num_envs!r}: expected a number of envs from 1")
    spec = id_or_spec if isinstance(id_or_spec, EnvSpec) else find_spec(id_or_spec)
    maker = env_maker(spec, wrappers, env_kwargs)
    envs = AsyncVectorEnv([maker] * num_envs, **(vector_kwargs or {}))
    envs.spec = copy.deepcopy(maker.spec)
    envs.spec.kwargs = dict(maker.env_kwargs)
    return envs


def env_maker(
    spec: EnvSpec, wrappers: Sequence[Callable[[gym.Env[Any, Any]], gym.Env[Any, Any]]], env_kwargs: Mapping[str, Any]
) -> EnvMaker:
    """An env_fn of a spec, with what is added to the arguments that the spec itself has."""
    spec = copy.deepcopy(spec)
    env_kwargs = {**spec.kwargs, **env_kwargs}
    spec.kwargs = {}
    return EnvMaker(spec, env_kwargs, tuple(wrappers))


def find_spec(env_id: str) -> EnvSpec:
    """The spec of a registered id, whose module is imported where the id names one."""
    module, _, name = env_id.rpartition(":")
    if module:
        __import__(module)
    return gym.spec(name)


class EnvMaker:
    """An env_fn that travels as a spec."""

    def __init__(
        self,
        spec: EnvSpec,
        env_kwargs: dict[str, Any],
        wrappers: tuple[Callable[[gym.Env[Any, Any]], gym.Env[Any, Any]], ...],
    ) -> None:
        self.spec = spec
        self.env_kwargs = env_kwargs
        self.wrappers = wrappers

    def __repr__(self) -> str:
        return f"<env_fn of {self.spec.id}>"

    def __call__(self) -> gym.Env[Any, Any] | AsyncEnv[Any, Any]:
        env: Any = gym.make(self.spec, **self.env_kwargs)
        if isinstance(env.unwrapped, AsyncEnv):  # Gymnasium's own wrappers cannot await
            env = env.unwrapped
            limit = self.env_kwargs.get("max_episode_steps") or self.spec.max_episode_steps
            if limit is not None and limit != -1:  # as in `gymnasium.make`
                env = AsyncTimeLimit(env, limit)
        for wrapper in self.wrappers:
            env = wrapper(env)
        return env  # type: ignore[no-any-return]  # one of the two
