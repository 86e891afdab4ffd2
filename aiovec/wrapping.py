"""`wrap`: Gymnasium's vector wrappers around an `AsyncVectorEnv`, unchanged, under `await`."""

from __future__ import annotations

import warnings

from aiovec.vector_env import AsyncVectorEnv
from aiovec.wrapped_env import VectorWrapperFn, WrappedVectorEnv

__all__ = ["wrap"]


def wrap(envs: AsyncVectorEnv, *wrappers: VectorWrapperFn) -> WrappedVectorEnv:
    """Puts Gymnasium's vector wrappers, or your own, around a vector; nothing is started yet.

        envs = aiovec.wrap(aiovec.make_vec("CartPole-v1", num_envs=8), RecordEpisodeStatistics)
        async with envs:
            observations, infos = await envs.reset(seed=42)

    Args:
        envs: The vector, which belongs to the wrapped one from now on: who closes that closes it.
        *wrappers: Each takes a `gymnasium.vector.VectorEnv` and gives one: a class, or a function such as
            ``lambda envs: ClipReward(envs, -1, 1)``; the first one is the innermost. They are called at the start.

    Raises:
        TypeError: It is no `AsyncVectorEnv`.
        ImportError: greenlet is not there (``pip install 'aiovec[wrappers]'``).

    Warns:
        UserWarning: The vector has ``on_failure="restart"``, whose failed rows have NaN for a reward: wrappers that sum
            or normalise rewards take these as they are.
    """
    given: object = envs
    if not isinstance(given, AsyncVectorEnv):
        raise TypeError(
            f"wrap: expected an AsyncVectorEnv, got {given!r}; Gymnasium's vectors take their wrappers directly"
        )
    try:
        wrapped = WrappedVectorEnv(envs, wrappers)
    except ImportError as error:
        raise ImportError("aiovec.wrap needs greenlet: pip install 'aiovec[wrappers]'") from error
    if envs._plan.on_failure == "restart":  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]  two faces of one house
        warnings.warn(
            'wrap: with on_failure="restart" the row of a failed env has the reward NaN, which wrappers that sum or '
            "normalise rewards take as it is",
            stacklevel=2,
        )
    return wrapped
