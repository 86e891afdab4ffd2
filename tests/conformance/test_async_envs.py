"""Envs under `await` give what the same envs give without it, however they are held."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from async_envs import WAIT, AsyncCounter, Awaited, HasContext, InOrder, MeetsOnLoop, RunsALoop
from conformance.comparing import (
    AUTORESET_MODES,
    CELLS,
    FEW_STEPS,
    NUM_ENVS,
    assert_same,
    assert_same_trajectory,
    cell_arguments,
    expected_trajectory,
    loops_in_turn,
)
from fault_envs import BOUND_SECONDS
from gymnasium.vector import AutoresetMode
from sample_envs import Counter
from space_envs import OBSERVATION_SPACES, InfoEnv, ReusingEnv, SpaceEnv

import aiovec
from aiovec import AsyncVectorEnv

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

SPACES = ("box_float32", "nested", "custom")
SOME_CELLS = [(0, True), (1, True), (2, False)]


def awaited(env_fns: Sequence[Callable[[], gym.Env[Any, Any]]], which: str) -> list[Callable[[], Any]]:
    """The same envs under `await`: ``"all"``, or every second one, the ````"even"```` or not."""
    rows = {"all": (0, 1), "even": (0,), "odd": (1,)}[which]
    return [partial(Awaited, env_fn, i) if i % 2 in rows else env_fn for i, env_fn in enumerate(env_fns)]


# ---- equal to the envs without await


async def assert_same_in_some_cells(env_fns: Sequence[Callable[[], Any]], mode: AutoresetMode, expected: Any) -> None:
    """What is held by workers and what is not, what is shared and what is pickled."""
    for cell in SOME_CELLS:
        async with AsyncVectorEnv(env_fns, autoreset_mode=mode, **cell_arguments(*cell)) as envs:
            await assert_same_trajectory(envs, mode, expected, f"{cell}")


@loops_in_turn("mode,space", product(AUTORESET_MODES, SPACES))
async def test_spaces(mode: AutoresetMode, space: str) -> None:
    """Every kind of leaf, in each autoreset mode, in every cell of workers and memory."""
    env_fns = [partial(SpaceEnv, OBSERVATION_SPACES[space])] * NUM_ENVS
    expected = await expected_trajectory(env_fns, mode, FEW_STEPS)
    await assert_same_in_some_cells(awaited(env_fns, "all"), mode, expected)


@loops_in_turn("which,mode", product(["even", "odd"], AUTORESET_MODES))
async def test_sync_and_async_envs_in_one_vector_and_one_worker(which: str, mode: AutoresetMode) -> None:
    env_fns = [partial(SpaceEnv, OBSERVATION_SPACES["nested"])] * NUM_ENVS
    expected = await expected_trajectory(env_fns, mode, FEW_STEPS)
    await assert_same_in_some_cells(awaited(env_fns, which), mode, expected)


@loops_in_turn("mode", product(AUTORESET_MODES))
async def test_infos_and_arrays_that_are_used_again(mode: AutoresetMode) -> None:
    """In the order of the envs, whatever order they end in."""
    reusing = [partial(ReusingEnv, 4 + index, bool(index % 2)) for index in range(NUM_ENVS)]
    for env_fns in (
        [partial(InfoEnv, index) for index in range(NUM_ENVS)],
        *([reusing] if mode is not AutoresetMode.SAME_STEP else []),  # Gymnasium overwrites its final_obs
    ):
        expected = await expected_trajectory(env_fns, mode, FEW_STEPS)
        await assert_same_in_some_cells(awaited(env_fns, "all"), mode, expected)


async def part_script(envs: AsyncVectorEnv) -> list[tuple[str, Any]]:
    """Everything but whole batches."""
    told: list[tuple[str, Any]] = []
    every = list(range(len(envs)))
    told.append(("reset", await envs.reset(seed=5)))
    for number in range(12):
        await envs.send([number % 3] * len(every))
        batch = await envs.recv(min_envs=len(every))
        order = np.argsort(batch.env_ids)
        told.append((f"recv {number}", [np.asarray(column)[order] for column in (batch.env_ids, *batch[2:5])]))
    told.append(("reset of some", await envs.reset(env_ids=[2, 0], seed=[7, 8], options={"level": 1})))
    for sub in envs:
        told.append((f"{sub.env_index} reset", await sub.reset(seed=sub.env_index)))
        ended = False
        while not ended:
            told.append((f"{sub.env_index} step", await sub.step(np.int64(number % 3))))
            ended = told[-1][1][2] or told[-1][1][3]
    told.append(("render", await envs.render()))
    told.append(("attributes", (await envs.get_attr("render_mode"), await envs.get_attr("metadata", env_ids=[1]))))
    await envs.set_attr("level", [1, 2, 3])
    told.append(("set", await envs.get_attr("level")))
    told.append(("masked", await envs.reset(seed=9, options={"reset_mask": np.array([True, False, True])})))
    told.append(("step", await envs.step([0, 1, 2])))
    return told


@loops_in_turn("which,cell", zip(["all", "odd"] * 4, CELLS, strict=True))
async def test_parts_single_envs_calls_and_attributes(which: str, cell: tuple[int, bool]) -> None:
    env_fns = [partial(SpaceEnv, OBSERVATION_SPACES["dict"], "rgb_array")] * NUM_ENVS
    async with AsyncVectorEnv(env_fns, num_workers=0) as plain:
        expected = await part_script(plain)
    async with asyncio.timeout(BOUND_SECONDS), AsyncVectorEnv(awaited(env_fns, which), **cell_arguments(*cell)) as envs:
        told = await part_script(envs)
    for (_, ours), (what, theirs) in zip(told, expected, strict=True):
        assert_same(ours, theirs, what)


# ---- concurrently, each in its order


@pytest.mark.parametrize(("num_workers", "num_envs"), [(0, 256), (1, 256), (2, 8)])
async def test_the_envs_of_a_worker_overlap(num_workers: int, num_envs: int) -> None:
    """They meet in the middle of a call: one after the other they would never end. Two hundred and fifty-six do."""
    parties = num_envs // (num_workers or 1)
    env_fns = [partial(MeetsOnLoop, parties, offset=index) for index in range(num_envs)]
    async with asyncio.timeout(BOUND_SECONDS), AsyncVectorEnv(env_fns, **cell_arguments(num_workers, True)) as envs:
        observations, _ = await envs.reset()
        np.testing.assert_array_equal(observations[:, 0], range(num_envs))
        observations, rewards, *_, infos = await envs.step([WAIT] * num_envs)
        np.testing.assert_array_equal(observations[:, 2], np.ones(num_envs))
        np.testing.assert_array_equal(rewards, np.ones(num_envs))
        np.testing.assert_array_equal(infos["steps"], np.ones(num_envs))
        assert await envs.call("work", "x") == (("x", 1),) * num_envs
        await envs.send([WAIT] * num_envs)
        batch = await envs.recv(min_envs=num_envs)
        assert sorted(batch.env_ids) == list(range(num_envs))


@pytest.mark.parametrize("num_workers", [0, 1])
async def test_a_sync_env_that_is_in_the_way_does_not_keep_them_apart(num_workers: int) -> None:
    """Async envs begin first; they meet although sync envs stand between them."""
    env_fns = [partial(MeetsOnLoop, 2) if index % 2 else partial(Counter, length=9) for index in range(4)]
    async with asyncio.timeout(BOUND_SECONDS), AsyncVectorEnv(env_fns, **cell_arguments(num_workers, True)) as envs:
        await envs.reset()
        *_, infos = await envs.step([WAIT] * 4)
        assert infos["steps"].tolist() == [1] * 4


@pytest.mark.parametrize("num_workers", [0, 1, 2])
async def test_the_calls_of_one_env_keep_their_order(num_workers: int) -> None:
    """Whatever tasks make them, and never overlap."""
    generator = random.Random(3)
    env_fns = [partial(InOrder, offset=index) for index in range(3)]
    async with asyncio.timeout(BOUND_SECONDS), AsyncVectorEnv(env_fns, **cell_arguments(num_workers, True)) as envs:
        await envs.reset()
        made: list[list[Any]] = [[], [], []]
        tasks = []
        for number in range(60):
            env_ids = generator.sample(range(3), generator.randint(1, 3))
            for env_index in env_ids:
                made[env_index].append(f"call {number}")
            tasks.append(asyncio.create_task(envs.call("work", f"call {number}", env_ids=env_ids)))
            if number % 7 == 0:
                await asyncio.sleep(0)
                for told in made:
                    told.append(number % 4)
                await envs.step([number % 4] * 3)
        await asyncio.gather(*tasks)
        assert await envs.get_attr("told") == tuple(made)


@pytest.mark.parametrize("num_workers", [0, 1, 2])
async def test_context_variables_and_task_groups(num_workers: int) -> None:
    """What `reset` sets is seen by `step`, by the tasks that it starts, and by calls; not by other envs, nor by us."""
    env_fns = [partial(HasContext, offset=index) for index in range(4)]
    async with asyncio.timeout(BOUND_SECONDS), AsyncVectorEnv(env_fns, **cell_arguments(num_workers, True)) as envs:
        await envs.reset()
        for _ in range(2):
            *_, infos = await envs.step([0] * 4)
            assert infos["seen"].tolist() == infos["in_task"].tolist() == [0, 1, 2, 3]
        assert await envs.call("work") == (0, 1, 2, 3)
        assert await envs.call("count") == (0, 1, 2, 3)


@pytest.mark.parametrize("num_workers", [1, 2])
async def test_a_sync_env_beside_async_ones_meets_no_loop(num_workers: int) -> None:
    """So it may run one of its own."""
    env_fns = [RunsALoop, AsyncCounter, RunsALoop, AsyncCounter]
    async with asyncio.timeout(BOUND_SECONDS), AsyncVectorEnv(env_fns, **cell_arguments(num_workers, True)) as envs:
        await envs.reset()
        *_, infos = await envs.step([0] * 4)
        assert infos["steps"].tolist() == [1] * 4
        assert await envs.call("has_loop", env_ids=[1, 3]) == (True, True)


@pytest.mark.parametrize("num_workers", [0, 1])
async def test_methods_for_calls_are_async_or_not(num_workers: int) -> None:
    async with (
        asyncio.timeout(BOUND_SECONDS),
        AsyncVectorEnv([AsyncCounter] * 2, **cell_arguments(num_workers, True)) as envs,
    ):
        await envs.reset()
        await envs.step([0, 0])
        assert await envs.call("work", value=(1, 2)) == (((1, 2), 1),) * 2
        assert await envs.call("count") == (1, 1)
        assert await envs.get_attr("steps") == (1, 1)
        assert await envs.render() == (1, 1)
        assert await envs[1].call("work", 3) == (3, 1)
        assert await envs[1].render() == 1
        await envs.set_attr("steps", [5, 6])
        assert (await envs.step([0, 0]))[1].tolist() == [6, 7]


# ---- registered


@pytest.fixture
def registered() -> Any:
    """An id, known as long as the test takes."""
    env_id = "AiovecTestsAsync-v0"
    gym.register(env_id, entry_point="async_envs:AsyncCounter", max_episode_steps=5)
    yield env_id
    del gym.registry[env_id]


@pytest.mark.parametrize("num_workers", [0, 2])
async def test_make_vec(num_workers: int, registered: str) -> None:
    """Built without Gymnasium's wrappers, truncated all the same; its spec is there, here and in the env."""
    arguments: dict[str, Any] = {"num_envs": 2, "vector_kwargs": {"num_workers": num_workers}}
    async with asyncio.timeout(BOUND_SECONDS), aiovec.make_vec(registered, offset=4, **arguments) as envs:
        assert envs.spec is not None
        assert (envs.spec.id, envs.spec.kwargs) == (registered, {"offset": 4})
        await envs.reset(seed=1)
        flags = []
        for _ in range(7):
            observations, _, terminations, truncations, _ = await envs.step([0, 0])
            assert not terminations.any()
            flags.append(truncations.tolist())
        assert [any(both) for both in flags] == [False] * 4 + [True] + [False] * 2
        assert observations[:, 0].tolist() == [4, 4]
        assert await envs.call("work", 1) == ((1, 1),) * 2
        assert [spec.id for spec in await envs.get_attr("spec")] == [registered] * 2
        seeds = await envs.get_attr("np_random_seed")
        assert seeds == (1, 2)


@pytest.mark.parametrize(("limit", "ends"), [(3, 3), (-1, None), (None, 5)])
async def test_make_vec_with_a_limit_of_its_own(limit: int | None, ends: int | None, registered: str) -> None:
    """As `gymnasium.make` takes it: -1 is none."""
    given = {} if limit is None else {"max_episode_steps": limit}
    async with aiovec.make_vec(registered, vector_kwargs={"num_workers": 0}, **given) as envs:
        await envs.reset()
        truncated = [bool((await envs.step([0]))[3][0]) for _ in range(6)]
        assert (truncated.index(True) + 1 if True in truncated else None) == ends


class OneMore(AsyncCounter):
    """Adds one to the reward."""

    def __init__(self, env: Any) -> None:
        super().__init__()
        self.env = env

    async def step(self, action: Any) -> Any:
        observation, reward, *rest = await self.env.step(action)
        return (observation, reward + 1, *rest)


async def test_make_vec_with_a_wrapper(registered: str) -> None:
    """One that gives an `AsyncEnv` again, around the limit of steps."""
    async with aiovec.make_vec(registered, vector_kwargs={"num_workers": 0}, wrappers=[OneMore]) as envs:
        await envs.reset()
        results = [await envs.step([0]) for _ in range(5)]
        assert [result[1][0] for result in results] == [2, 3, 4, 5, 6]
        assert results[-1][3][0]


async def test_a_wrapper_of_gymnasium_around_an_async_env_is_refused(registered: str) -> None:
    """It cannot await: what it would return is not taken for a result."""
    for env_fn in (partial(gym.make, registered), partial(gym.Wrapper, AsyncCounter())):
        with pytest.raises(TypeError, match=r"env_fns\[0\].*cannot await.*AsyncEnv"):
            await AsyncVectorEnv([env_fn], num_workers=0)


@contextlib.asynccontextmanager
async def both(num_workers: int, **options: Any) -> Any:
    """Two vectors of the same."""
    async with AsyncVectorEnv([AsyncCounter] * 2, num_workers=num_workers, **options) as one:
        async with AsyncVectorEnv([AsyncCounter] * 2, num_workers=num_workers, **options) as other:
            yield one, other


async def test_a_vector_within_the_tasks_of_another() -> None:
    """Several on one loop share it, and one that is closed leaves the other."""
    async with asyncio.timeout(BOUND_SECONDS), both(0) as (one, other):
        await asyncio.gather(one.reset(), other.reset())
        await asyncio.gather(one.step([0, 0]), other.step([0, 0]))
        await one.close()
        assert (await other.step([0, 0]))[1].tolist() == [2, 2]
