"""`threads_per_worker`: the envs of a worker overlap, each in a thread of its own for its life, and give the same."""

from __future__ import annotations

import asyncio
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from async_envs import WAIT, AsyncCounter, Awaited, InOneThread, MeetsInThreads, RunsALoop
from conformance.comparing import (
    AUTORESET_MODES,
    FEW_STEPS,
    assert_same_trajectory,
    cell_arguments,
    expected_trajectory,
    loops_in_turn,
)
from conformance.test_async_envs import assert_same as assert_same_results
from conformance.test_async_envs import part_script
from fault_envs import BOUND_SECONDS
from gymnasium.vector import AutoresetMode
from space_envs import OBSERVATION_SPACES, InfoEnv, SpaceEnv

from aiovec import AsyncVectorEnv

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

NUM_ENVS = 5  # of three threads one has a single env


@loops_in_turn("mode,what", product(AUTORESET_MODES, ["spaces", "infos", "beside async envs"]))
async def test_trajectories_are_those_without_threads(mode: AutoresetMode, what: str) -> None:
    env_fns: list[Any] = [partial(SpaceEnv, OBSERVATION_SPACES["nested"])] * NUM_ENVS
    if what == "infos":
        env_fns = [partial(InfoEnv, index) for index in range(NUM_ENVS)]
    expected = await expected_trajectory(env_fns, mode, FEW_STEPS)
    if what == "beside async envs":
        env_fns = [partial(Awaited, env_fn) if index in (1, 4) else env_fn for index, env_fn in enumerate(env_fns)]
    for cell in ((1, True), (2, False)):
        vector = AsyncVectorEnv(env_fns, autoreset_mode=mode, threads_per_worker=3, **cell_arguments(*cell))
        async with vector as envs:
            await assert_same_trajectory(envs, mode, expected, f"{cell}")


@loops_in_turn("cell", product([(1, True), (1, False), (2, True)]))
async def test_parts_single_envs_calls_and_attributes(cell: tuple[int, bool]) -> None:
    env_fns = [partial(SpaceEnv, OBSERVATION_SPACES["dict"], "rgb_array")] * 3
    async with AsyncVectorEnv(env_fns, num_workers=0) as plain:
        expected = await part_script(plain)
    vector = AsyncVectorEnv(env_fns, threads_per_worker=2, **cell_arguments(*cell))
    async with asyncio.timeout(BOUND_SECONDS), vector as envs:
        told = await part_script(envs)
    for (_, ours), (what, theirs) in zip(told, expected, strict=True):
        assert_same_results(ours, theirs, what)


@pytest.mark.parametrize(("num_workers", "threads"), [(1, 4), (2, 2)])
async def test_the_envs_of_a_worker_overlap(num_workers: int, threads: int) -> None:
    """They meet within their construction, reset, step and call: one after the other they would never end."""
    env_fns = [partial(MeetsInThreads, threads, offset=index) for index in range(4)]
    vector = AsyncVectorEnv(env_fns, num_workers=num_workers, context="fork", threads_per_worker=threads)
    async with asyncio.timeout(BOUND_SECONDS), vector as envs:
        observations, _ = await envs.reset()
        assert observations[:, 0].tolist() == [0, 1, 2, 3]
        observations, *_ = await envs.step([WAIT] * 4)
        assert observations[:, 2].tolist() == [1] * 4
        assert await envs.call("work") == (1,) * 4
        await envs.send([WAIT] * 4)
        assert sorted((await envs.recv(min_envs=4)).env_ids) == [0, 1, 2, 3]


@pytest.mark.parametrize("mode", AUTORESET_MODES[:2], ids=lambda mode: mode.name)
@pytest.mark.parametrize(("num_workers", "threads"), [(1, 3), (2, 2), (1, 9)])
async def test_each_env_has_one_thread_for_its_life(
    num_workers: int, threads: int, mode: AutoresetMode, tmp_path: Path
) -> None:
    """Its construction and its end included; and as many threads as there can be are used."""
    log = tmp_path / "log"
    env_fns = [partial(InOneThread, str(log), offset=index) for index in range(NUM_ENVS)]
    vector = AsyncVectorEnv(
        env_fns, num_workers=num_workers, context="fork", threads_per_worker=threads, autoreset_mode=mode
    )
    async with asyncio.timeout(BOUND_SECONDS), vector as envs:
        await envs.reset()
        for _ in range(4):
            await envs.step([0] * NUM_ENVS)
        await envs.call("say", "call")
        await envs[3].reset()
        await envs.send([0], env_ids=[2])
        await envs.recv()
        shares = [worker.env_ids for worker in envs._started.pool.workers]  # type: ignore[union-attr]
        loops = [has_loop for _, has_loop in await envs.call("say", "call")]
        assert not any(loops)
    lines = [line.split() for line in log.read_text().splitlines()]
    assert {what for _, what, _ in lines} == {"init", "reset", "step", "call", "close"}
    of_env: dict[int, set[str]] = {}
    for env_index, _, ident in lines:
        of_env.setdefault(int(env_index), set()).add(ident)
    assert all(len(idents) == 1 for idents in of_env.values())
    for share in shares:
        idents = {ident for env_index in share for ident in of_env[env_index]}
        assert len(idents) == min(threads, len(share))


async def test_beside_async_envs_no_thread_has_a_loop() -> None:
    env_fns = [AsyncCounter, RunsALoop, RunsALoop, AsyncCounter, RunsALoop]
    async with asyncio.timeout(BOUND_SECONDS), AsyncVectorEnv(env_fns, num_workers=1, threads_per_worker=2) as envs:
        await envs.reset()
        for number in (1, 2):
            *_, infos = await envs.step([0] * 5)
            np.testing.assert_array_equal(infos["steps"], [number] * 5)


def test_not_in_this_process() -> None:
    with pytest.raises(ValueError, match=r"threads_per_worker=2 with num_workers=0.*Use a worker"):
        AsyncVectorEnv([AsyncCounter], num_workers=0, threads_per_worker=2)
