"""Returns and lengths of episodes across rollouts: equal to a count step by step."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from aiovec.episodes import Episodes


@st.composite
def rollouts(draw: st.DrawFn) -> list[tuple[Any, Any, Any, list[int]]]:
    """Rewards, ends, and envs that were reset before."""
    num_envs = draw(st.integers(1, 4))
    found = []
    for _ in range(draw(st.integers(1, 4))):
        shape = (draw(st.integers(1, 6)), num_envs)
        flags = st.lists(
            st.lists(st.booleans(), min_size=num_envs, max_size=num_envs), min_size=shape[0], max_size=shape[0]
        )
        numbers = st.sampled_from([0.0, 1.0, 2.5, -3.0, np.nan, np.inf, -np.inf])
        rewards = draw(st.lists(numbers, min_size=shape[0] * num_envs, max_size=shape[0] * num_envs))
        ended = np.array(draw(flags))
        restarted = draw(st.lists(st.integers(0, num_envs - 1), unique=True))
        found.append((np.array(rewards).reshape(shape), ended, np.array(draw(flags)) & ~ended, restarted))
    return found


@given(rollouts())
def test_equal_to_a_count_step_by_step(rollouts: list[tuple[Any, Any, Any, list[int]]]) -> None:
    """A NaN or an infinity stays within its episode."""
    num_envs = rollouts[0][0].shape[1]
    episodes = Episodes(num_envs)
    returns, lengths = np.zeros(num_envs), np.zeros(num_envs, int)
    for rewards, ended, autoresets, restarted in rollouts:
        if restarted:
            episodes.restart(restarted)
            returns[restarted], lengths[restarted] = 0, 0
        expected: list[tuple[float, int]] = []
        for step in range(len(rewards)):
            with np.errstate(invalid="ignore"):
                returns += np.where(autoresets[step], 0, rewards[step])
            lengths += ~autoresets[step]
            for env_index in np.flatnonzero(ended[step]):
                expected.append((returns[env_index], lengths[env_index]))
                returns[env_index], lengths[env_index] = 0, 0
        found_returns, found_lengths = episodes.add(rewards, ended, autoresets)
        np.testing.assert_allclose(found_returns, [of_one for of_one, _ in expected])
        assert found_lengths.tolist() == [of_one for _, of_one in expected]
    assert repr(episodes) == f"<Episodes of {num_envs} envs>"


def test_restart_of_all() -> None:
    episodes = Episodes(2)
    never = np.zeros((1, 2), np.bool_)
    episodes.add(np.ones((1, 2)), never, never)
    episodes.restart()
    assert episodes.add(np.ones((1, 2)), ~never, never)[0].tolist() == [1, 1]
