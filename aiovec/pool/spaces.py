"""The spaces of the vector, from those that the workers found. Pure, by the rules of Gymnasium's vectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import gymnasium as gym
from gymnasium.spaces.utils import is_space_dtype_shape_equiv
from gymnasium.vector.utils import batch_differing_spaces, batch_space

from aiovec.errors import SpaceMismatchError
from aiovec.exchange.messages import SpaceFacts

__all__ = ["ObservationMode", "VectorSpaces", "vector_spaces"]

ObservationMode = Literal["same", "different"] | tuple[gym.Space[Any], gym.Space[Any]]  # (of a batch, of one env)


@dataclass(frozen=True)
class VectorSpaces:
    """What `AsyncVectorEnv` shows."""

    single_observation_space: gym.Space[Any]
    observation_space: gym.Space[Any]
    single_action_space: gym.Space[Any]
    action_space: gym.Space[Any]


def vector_spaces(mode: ObservationMode, num_envs: int, facts: Sequence[SpaceFacts]) -> VectorSpaces:
    """Checks the spaces of all envs against each other and batches them.

    Args:
        mode: As in `AsyncVectorEnv`.
        num_envs: How many.
        facts: In ascending order of the first env of each.

    Raises:
        SpaceMismatchError: Some env differs in a way that `mode` does not allow.
    """
    first = facts[0]
    observation_space: gym.Space[Any] | None = None
    if isinstance(mode, tuple):
        observation_space, single = mode
    else:
        single = first.observation_space
        if mode == "same":
            observation_space = batch_space(single, num_envs)
    for fact in facts:
        if mode == "same":
            if fact.observation_space != single:
                raise SpaceMismatchError(
                    fact.env_ids[0],
                    "observation",
                    str(fact.observation_space),
                    str(single),
                    "If that is meant, use `observation_mode='different'`."
                    if is_space_dtype_shape_equiv(fact.observation_space, single)
                    else "Shapes and dtypes must agree in every observation mode.",
                )
        elif not is_space_dtype_shape_equiv(fact.observation_space, single):
            raise SpaceMismatchError(
                fact.env_ids[0],
                "observation",
                str(fact.observation_space),
                str(single),
                "Shapes and dtypes must agree in every observation mode.",
            )
        if fact.action_space != first.action_space:
            raise SpaceMismatchError(
                fact.env_ids[0],
                "action",
                str(fact.action_space),
                str(first.action_space),
                "Actions come in one batch, so all action spaces must be equal.",
            )
    if observation_space is None:
        by_env = {env_index: fact.observation_space for fact in facts for env_index in fact.env_ids}
        observation_space = batch_differing_spaces([by_env[index] for index in range(num_envs)])
    return VectorSpaces(single, observation_space, first.action_space, batch_space(first.action_space, num_envs))
