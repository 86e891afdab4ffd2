"""The spaces of the vector: equal to Gymnasium's, or an error that names the env."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import SyncVectorEnv

from aiovec.errors import SpaceMismatchError
from aiovec.exchange.messages import SpaceFacts
from aiovec.pool.spaces import ObservationMode, vector_spaces

BOX, WIDER, LONGER = spaces.Box(0, 1, (2,)), spaces.Box(0, 9, (2,)), spaces.Box(0, 1, (3,))
DOUBLE = spaces.Box(0, 1, (2,), np.float64)
ACTION = spaces.Discrete(2)


class Bare(gym.Env[Any, Any]):
    """Nothing but its spaces."""

    def __init__(self, observation_space: gym.Space[Any], action_space: gym.Space[Any]) -> None:
        self.observation_space = observation_space
        self.action_space = action_space


def facts_of(*observation_spaces: gym.Space[Any]) -> list[SpaceFacts]:
    """As workers tell them: one for each distinct space, with the envs that have it."""
    facts: list[SpaceFacts] = []
    for index, space in enumerate(observation_spaces):
        known = next((fact for fact in facts if fact.observation_space == space), None)
        if known is None:
            facts.append(SpaceFacts([index], space, ACTION))
        else:
            known.env_ids.append(index)
    return facts


@pytest.mark.parametrize(
    ("mode", "own"),
    [
        ("same", [BOX, BOX, BOX]),
        ("different", [BOX, WIDER, BOX]),
        ("different", [WIDER, BOX, BOX]),
        ((spaces.Box(0, 9, (3, 2)), WIDER), [BOX, WIDER, BOX]),
    ],
    ids=["same", "different", "different first", "given"],
)
def test_spaces_equal_gymnasium(mode: ObservationMode, own: list[gym.Space[Any]]) -> None:
    """All four of them, in every mode."""
    got = vector_spaces(mode, len(own), facts_of(*own))
    theirs = SyncVectorEnv([lambda space=space: Bare(space, ACTION) for space in own], observation_mode=mode)  # type: ignore[arg-type, misc]
    assert got.single_observation_space == theirs.single_observation_space
    assert got.observation_space == theirs.observation_space
    assert got.single_action_space == theirs.single_action_space
    assert got.action_space == theirs.action_space


def test_the_same_space_of_two_workers_is_told_twice() -> None:
    """Each worker tells its own; rows are still by env."""
    facts = [SpaceFacts([0, 2], BOX, ACTION), SpaceFacts([1], WIDER, ACTION), SpaceFacts([3], BOX, ACTION)]
    batched: Any = vector_spaces("different", 4, facts).observation_space
    assert batched.high[:, 0].tolist() == [1, 9, 1, 1]


@pytest.mark.parametrize(
    ("mode", "own", "culprit", "advice"),
    [
        ("same", [BOX, BOX, WIDER], 2, "observation_mode='different'"),
        ("same", [BOX, LONGER, LONGER], 1, "Shapes and dtypes must agree"),
        ("different", [BOX, WIDER, LONGER], 2, "Shapes and dtypes must agree"),
        ("different", [BOX, DOUBLE], 1, "Shapes and dtypes must agree"),
        ((spaces.Box(0, 1, (2, 2)), BOX), [LONGER, BOX], 0, "Shapes and dtypes must agree"),
    ],
)
def test_a_space_that_differs_is_named(
    mode: ObservationMode, own: list[gym.Space[Any]], culprit: int, advice: str
) -> None:
    """The first env that differs, both spaces, and what to do."""
    with pytest.raises(SpaceMismatchError) as caught:
        vector_spaces(mode, len(own), facts_of(*own))
    text = str(caught.value)
    assert caught.value.env_index == culprit
    assert f"the observation space of env {culprit} is {own[culprit]}" in text
    assert advice in text
    assert isinstance(caught.value, RuntimeError)


@pytest.mark.parametrize("mode", ["same", "different"])
def test_action_spaces_must_be_equal(mode: str) -> None:
    """In every mode: actions come in one batch."""
    facts = [SpaceFacts([0], BOX, ACTION), SpaceFacts([1], BOX, spaces.Discrete(3))]
    with pytest.raises(SpaceMismatchError, match=r"the action space of env 1 is Discrete\(3\)") as caught:
        vector_spaces(mode, 2, facts)
    assert caught.value.env_index == 1
