"""`call`, `get_attr`, `set_attr` and `render`, equal to `SyncVectorEnv`."""

from __future__ import annotations

from functools import partial
from itertools import product
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from conformance.comparing import CELLS, NUM_ENVS, AwaitedSync, assert_same, cell_arguments, loops_in_turn
from space_envs import OBSERVATION_SPACES, Recorder, SpaceEnv

import aiovec

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


class Outer(gym.Wrapper[Any, Any, Any, Any]):
    """A wrapper with an attribute and a method of its own."""

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        super().__init__(env)
        self.outer_level = 5

    def twice(self) -> int:
        return 2 * self.outer_level


def make_wrapped(env_index: int) -> gym.Env[Any, Any]:
    """A `Recorder` under wrappers."""
    return gym.wrappers.TimeLimit(Outer(Recorder(name=f"env {env_index}")), 3)


SET: list[tuple[str, Any]] = [
    ("level", 2),
    ("level", [3, 4, 5]),
    ("level", (6, 7, 8)),
    ("level", np.array([1, 2, 3])),
    ("level", {"a": 1}),
    ("level", "abc"),
    ("level", [0.5, None, 2**70]),
    ("outer_level", [9, 8, 7]),
    ("new", [[1], [2], [3]]),
    ("level", 11),
]
GET = ("level", "outer_level", "name", "action_space", "metadata", "render_mode", "told", "actions", "spec", "twice")


@loops_in_turn("cell", product(CELLS))
async def test_calls_and_attributes(cell: tuple[int, bool]) -> None:
    """Attributes set for all or one each, found and set through wrappers; a callable one is called."""
    env_fns = [partial(make_wrapped, env_index) for env_index in range(NUM_ENVS)]
    async with AwaitedSync(env_fns) as sync, aiovec.AsyncVectorEnv(env_fns, **cell_arguments(*cell)) as envs:
        for vector in (sync, envs):
            await vector.reset(seed=1)
            await vector.step([0, 1, 2])
        for name, value in [("level", 1), *SET]:
            sync.set_attr(name, value)
            assert await envs.set_attr(name, value) is None
            for got in (*GET, name):
                assert_same(await envs.get_attr(got), sync.get_attr(got), f"{got} after set_attr({name!r}, {value!r})")
        for args, kwargs in (((1,), {}), ((1, 2), {"third": 3}), ((), {"first": 4})):
            ours, theirs = await envs.call("add", *args, **kwargs), sync.call("add", *args, **kwargs)
            assert_same(ours, theirs, f"add(*{args}, **{kwargs})")
        assert_same(await envs.render(), sync.render(), "render")
        assert_same(await envs.call("render"), sync.call("render"), "call('render')")
        some = await envs.call("add", 1, env_ids=[2, 0])
        assert_same(some, tuple(sync.call("add", 1)[env_index] for env_index in (2, 0)), "add of some envs")
        assert_same(await envs.render(env_ids=[1]), (sync.render()[1],), "render of one env")


@loops_in_turn("render_mode,cell", product(["rgb_array", None], CELLS))
async def test_render(cell: tuple[int, bool], render_mode: str | None) -> None:
    """Frames as each env gives them, in the course of an episode; without a mode `None` each."""
    env_fns = [partial(SpaceEnv, OBSERVATION_SPACES["discrete_start"], render_mode)] * NUM_ENVS
    async with AwaitedSync(env_fns) as sync, aiovec.AsyncVectorEnv(env_fns, **cell_arguments(*cell)) as envs:
        assert envs.render_mode == sync.render_mode == render_mode
        assert envs.metadata == sync.metadata
        for vector in (sync, envs):
            await vector.reset(seed=1)
        for _ in range(5):
            for vector in (sync, envs):
                await vector.step([0, -2, 1])
            assert_same(await envs.render(), sync.render(), "render")
