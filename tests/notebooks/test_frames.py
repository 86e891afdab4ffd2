"""`frames()` of environments that really draw, equal to what Gymnasium's own `SyncVectorEnv` renders."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest

import aiovec


@pytest.fixture(autouse=True)
def can_draw() -> None:
    pytest.importorskip("pygame", reason="CartPole is drawn by it: pip install 'aiovec[examples]'")


def rendered_by_gymnasium(steps: int, **env_kwargs: Any) -> tuple[Any, ...]:
    """What four CartPoles render after so many steps to the right."""
    envs = gym.make_vec("CartPole-v1", 4, vectorization_mode="sync", **env_kwargs)
    envs.reset(seed=3)
    for _ in range(steps):
        envs.step(np.ones(4, np.int64))
    rendered = envs.render()
    envs.close()
    assert rendered is not None
    return tuple(rendered)


@pytest.mark.parametrize("num_workers", [0, 2])
async def test_cartpole(num_workers: int) -> None:
    expected = rendered_by_gymnasium(5, render_mode="rgb_array")
    async with aiovec.make_vec(
        "CartPole-v1", 4, render_mode="rgb_array", vector_kwargs={"num_workers": num_workers}
    ) as envs:
        await envs.reset(seed=3)
        for _ in range(5):
            await envs.step([1] * 4)
        every = await envs.frames()
        some = await envs.frames(env_ids=[3, 1], columns=1)
    assert every.env_ids == (0, 1, 2, 3)
    assert every.mosaic.shape == (2 * 400 + 4, 2 * 600 + 4, 3)
    for frame, picture in zip(every.frames, expected, strict=True):
        np.testing.assert_array_equal(frame, picture)
    np.testing.assert_array_equal(some.mosaic[:400], expected[3])
    np.testing.assert_array_equal(some.mosaic[404:], expected[1])


async def test_of_the_pictures_since_the_last_time_the_newest_is_taken() -> None:
    expected = rendered_by_gymnasium(3, render_mode="rgb_array")
    async with aiovec.make_vec("CartPole-v1", 4, render_mode="rgb_array_list") as envs:
        await envs.reset(seed=3)
        for _ in range(3):
            await envs.step([1] * 4)
        frames = await envs.frames()
        for frame, picture in zip(frames.frames, expected, strict=True):
            np.testing.assert_array_equal(frame, picture)
        with pytest.raises(aiovec.InvalidEnvResultError, match="no step since the last"):
            await envs.frames()


async def test_without_a_render_mode_the_argument_is_named() -> None:
    async with aiovec.make_vec("CartPole-v1", 2) as envs:
        with pytest.raises(ValueError, match=r'render_mode="rgb_array", which `make_vec` takes'):
            await envs.frames()
        await envs.reset()
