"""The start: how many constructions, where, side by side, and nothing left of it after the end."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from fault_envs import BOUND_SECONDS, Faulty, Gate, Gated, Recorded, Slow, an_error, is_running, raises_timeout
from sample_envs import Counter

from aiovec import AsyncVectorEnv, ClosedEnvironmentError, EnvTimeoutError, make_vec
from aiovec.exchange.slab import Geometry
from aiovec.pool.cpus import usable_cpus
from aiovec.pool.pool import Pool

CONTEXTS = [None, "fork", "forkserver", "spawn"]


def recorded(log: Path, num_envs: int, together: int = 0) -> list[Callable[[], gym.Env[Any, Any]]]:
    return [functools.partial(Recorded, str(log), index, together) for index in range(num_envs)]


def constructions(log: Path) -> list[tuple[int, int]]:
    """Pid and env index of each, in ascending order of the envs."""
    lines = (tuple(map(int, line.split())) for line in log.read_text().splitlines())
    return sorted(((pid, index) for pid, index in lines), key=lambda pair: pair[1])


@pytest.mark.parametrize(
    ("num_workers", "expected"),
    [(0, 0), (1, 1), (2, 2), (3, 3), (7, 5), (None, min(5, usable_cpus()))],
)
async def test_exactly_num_envs_constructions_in_contiguous_rows(
    num_workers: int | None, expected: int, tmp_path: Path
) -> None:
    """None of them in the parent, unless there are no workers; no worker without an env."""
    log = tmp_path / "log"
    vector = AsyncVectorEnv(recorded(log, 5), num_workers=num_workers)
    assert vector.num_workers == expected
    assert not log.exists()
    async with asyncio.timeout(BOUND_SECONDS), vector as envs:
        built = constructions(log)
        assert [index for _, index in built] == [0, 1, 2, 3, 4]
        pids = [pid for pid, _ in built]
        assert len(set(pids)) == max(expected, 1)
        assert (os.getpid() in pids) is (expected == 0)
        # Contiguous: along the envs the pid changes only as often as there are workers.
        assert sum(pid != following for pid, following in itertools.pairwise(pids)) == max(expected, 1) - 1
        shares = [pids.count(pid) for pid in dict.fromkeys(pids)]
        assert max(shares) - min(shares) <= 1
        assert list(await envs.get_attr("pid")) == pids
        observations, _ = await envs.reset()
        assert observations[:, 0].tolist() == [0, 1, 2, 3, 4]
        assert len(constructions(log)) == 5


@pytest.mark.not_on_ray("it is about local processes")
@pytest.mark.parametrize("context", CONTEXTS)
async def test_every_way_to_start_workers(context: Any, tmp_path: Path) -> None:
    """Not in the parent, with the parent's pid as their parent's or the fork server's, gone after close."""
    log = tmp_path / "log"
    vector = AsyncVectorEnv(recorded(log, 3), num_workers=2, context=context)
    async with asyncio.timeout(BOUND_SECONDS), vector as envs:
        pids = [pid for pid, _ in constructions(log)]
        assert len(pids) == 3
        assert os.getpid() not in pids
        assert (set(await envs.get_attr("parent")) == {os.getpid()}) is (context != "forkserver")
        await envs.reset()
        observations, *_ = await envs.step([0, 0, 0])
        np.testing.assert_array_equal(observations, [[0, 1, 1], [1, 1, 1], [2, 1, 1]])
    assert not any(is_running(pid) for pid in pids)


@pytest.mark.parametrize("context", [None, "spawn"])
async def test_workers_build_side_by_side(context: Any, tmp_path: Path) -> None:
    """Each construction waits until another has begun: one after the other they would wait for ever."""
    log = tmp_path / "log"
    vector = AsyncVectorEnv(recorded(log, 3, together=3), num_workers=3, context=context)
    async with asyncio.timeout(BOUND_SECONDS), vector as envs:
        assert len({pid for pid, _ in constructions(log)}) == 3
        await envs.reset()


async def test_the_loop_goes_on_during_start_and_close() -> None:
    """Constructions and closes that take a second do not keep another task from its turn."""
    beats: list[float] = []
    loop = asyncio.get_running_loop()

    async def beat() -> None:
        while True:
            beats.append(loop.time())
            await asyncio.sleep(0.005)

    async with asyncio.timeout(BOUND_SECONDS):
        beating = asyncio.create_task(beat())
        began = loop.time()
        async with AsyncVectorEnv([functools.partial(Slow, 1.0)] * 2, num_workers=2) as envs:
            await envs.reset()
        ended = loop.time()
        beating.cancel()
    assert ended - began > 2
    gaps = [after - before for before, after in itertools.pairwise(beats)]
    assert max(gaps) < 0.5  # a blocked loop would show a whole second


@pytest.mark.not_on_ray("an actor that is killed ends soon, not at once")
async def test_a_start_that_takes_too_long(gate: Gate) -> None:
    """The envs that were not built are named; nothing is left, and a later start may do."""
    env_fns = [functools.partial(Gated, gate.key, at="init" if index == 1 else "never") for index in range(3)]
    envs = AsyncVectorEnv(env_fns, num_workers=3, start_timeout=4)  # the others need one of them on a loaded machine
    async with asyncio.timeout(BOUND_SECONDS):
        with pytest.raises(EnvTimeoutError, match=r"env 1 did not end build within 4 s") as caught:
            await envs.reset()
        assert isinstance(caught.value, TimeoutError)
        assert caught.value.env_ids == (1,)
        assert not envs.closed
        gate.open()
        await envs.reset()
        await envs.close()


@pytest.mark.not_on_ray("it is about local processes")
@pytest.mark.parametrize("stage", ["map", "start"])
async def test_a_start_that_takes_too_long_once_all_is_built(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that does not map the slab is named by its envs; where it is none of them, all are."""
    original = Pool.map_slab

    async def map_slab(pool: Pool, geometry: Geometry) -> None:
        if stage == "start":
            await asyncio.Event().wait()
        pool.workers[1].signal(signal.SIGSTOP)
        await original(pool, geometry)

    monkeypatch.setattr(Pool, "map_slab", map_slab)
    envs = AsyncVectorEnv([Counter] * 3, num_workers=3, start_timeout=4)
    late = "env 1" if stage == "map" else "envs 0-2"
    async with asyncio.timeout(BOUND_SECONDS):
        with pytest.raises(EnvTimeoutError, match=f"{late} did not end {stage} within 4 s") as caught:
            await envs
        assert caught.value.env_ids == ((1,) if stage == "map" else (0, 1, 2))
        monkeypatch.undo()
        await envs.reset()
        await envs.close()


@pytest.mark.parametrize("num_workers", [0, 2])
async def test_a_timeout_of_an_env_itself_is_no_start_that_takes_too_long(num_workers: int) -> None:
    """It is raised as every failure of a construction."""
    async with asyncio.timeout(BOUND_SECONDS):
        with pytest.raises(TimeoutError, match="no simulator") as caught:
            await AsyncVectorEnv([Counter, raises_timeout], num_workers=num_workers)
    assert not isinstance(caught.value, EnvTimeoutError)


def open_files() -> list[str]:
    """What this process holds open."""
    files = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the descriptor of the listing itself
            files.append(f"{fd}: {os.readlink(f'/proc/self/fd/{fd}')}")
    return sorted(files)


@pytest.mark.not_on_ray("Ray's own descriptors come and go")
async def test_twenty_cycles_leave_no_descriptor_although_the_vectors_are_kept(tmp_path: Path) -> None:
    """What is closed is freed then, not when Python forgets it."""
    log = tmp_path / "log"
    before = open_files()
    kept = []
    async with asyncio.timeout(3 * BOUND_SECONDS):
        for _ in range(20):
            async with AsyncVectorEnv(recorded(log, 2), num_workers=1) as envs:
                await envs.reset()
                await envs.step([0, 0])
            kept.append(envs)
            assert open_files() == before
    built = constructions(log)
    assert len(built) == 40
    assert not any(is_running(pid) for pid, _ in built)


async def test_many_vectors_at_once(tmp_path: Path, on_ray: bool) -> None:
    """Started side by side in one loop, closed in another order: nobody holds another's ends."""
    log = tmp_path / "log"
    contexts = [None, "fork", None, "spawn", "fork"]
    vectors = [AsyncVectorEnv(recorded(log, 1), num_workers=1, context=context) for context in contexts]  # type: ignore[arg-type]
    async with asyncio.timeout(BOUND_SECONDS):
        await asyncio.gather(*(envs.reset() for envs in vectors))
        for envs in (vectors[2], vectors[0], vectors[4], vectors[1], vectors[3]):
            pids = await envs.get_attr("pid")
            await envs.close()
            assert on_ray or not is_running(pids[0])  # an actor ends soon, not at once
            for other in vectors:
                if not other.closed:
                    await other.step([0])


async def test_make_vec_starts_what_the_spec_says() -> None:
    """The id need not be known in a worker."""
    gym.register("aiovec-tests/Counter-v0", entry_point="sample_envs:Counter", max_episode_steps=3)
    try:
        vector = make_vec("aiovec-tests/Counter-v0", num_envs=2, vector_kwargs={"num_workers": 2}, offset=4)
        assert vector.spec is not None
        assert vector.spec.kwargs == {"offset": 4}
        async with asyncio.timeout(BOUND_SECONDS), vector as envs:
            observations, _ = await envs.reset(seed=1)
            np.testing.assert_array_equal(observations, [[4, 1, 0], [4, 1, 0]])
            for _ in range(3):
                *_, truncations, _ = await envs.step([0, 0])
            assert truncations.tolist() == [True, True]
    finally:
        del gym.registry["aiovec-tests/Counter-v0"]


# ---- who owns a start


async def wait_for(envs: AsyncVectorEnv) -> AsyncVectorEnv:
    """As a task of its own."""
    return await envs


async def at_the_end_of_a_start(envs: AsyncVectorEnv, act: Callable[[asyncio.Task[Any]], object]) -> asyncio.Task[Any]:
    """Acts in the very turn of the loop in which a start has ended, before the task that waits for it goes on."""
    waiter = asyncio.create_task(wait_for(envs))
    await asyncio.sleep(0)
    start = envs._start_task
    assert start is not None
    start.add_done_callback(lambda _: act(waiter))
    await asyncio.wait([waiter])
    return waiter


async def test_a_waiter_cancelled_as_the_start_ends(tmp_path: Path) -> None:
    """The vector owns what was started: it is used, or closed, as ever."""
    envs = AsyncVectorEnv(recorded(tmp_path / "log", 2), num_workers=1)
    async with asyncio.timeout(BOUND_SECONDS):
        waiter = await at_the_end_of_a_start(envs, lambda waiter: waiter.cancel())
        assert waiter.cancelled()
        assert "started" in repr(envs)
        assert "not started" not in repr(envs)
        await envs.close()


async def test_terminate_as_the_start_ends(tmp_path: Path) -> None:
    """Nothing is left behind, which the fixtures check, and who waited is told."""
    envs = AsyncVectorEnv(recorded(tmp_path / "log", 2), num_workers=1)
    async with asyncio.timeout(BOUND_SECONDS):
        waiter = await at_the_end_of_a_start(envs, lambda _: envs.terminate())
        with pytest.raises(ClosedEnvironmentError):
            await waiter


async def test_a_waiter_that_comes_while_another_takes_the_start_back(gate: Gate) -> None:
    """Nobody has cancelled this one: it begins the start anew."""
    env_fns = [functools.partial(Gated, gate.key, "init")]
    async with asyncio.timeout(BOUND_SECONDS):
        envs = AsyncVectorEnv(env_fns, num_workers=1, close_grace=0.1)
        first = asyncio.create_task(wait_for(envs))
        await gate.arrived()
        first.cancel()
        await asyncio.sleep(0)  # it has cancelled the start, and waits for its end
        second = asyncio.create_task(wait_for(envs))
        await asyncio.wait([first])
        assert first.cancelled()
        gate.open(2)
        assert await second is envs
        await envs.close()


async def test_a_close_that_is_not_to_wait_behind_one_that_does(gate: Gate) -> None:
    """The workers end at once; both callers see the end."""
    env_fns = [functools.partial(Gated, gate.key, "close")]
    async with asyncio.timeout(BOUND_SECONDS):
        envs = AsyncVectorEnv(env_fns, num_workers=1, close_grace=2 * BOUND_SECONDS)
        await envs.reset()
        graceful = asyncio.create_task(envs.close())
        await gate.arrived()
        await envs.close(terminate=True)
        await graceful


async def test_a_kept_exception_keeps_no_memory() -> None:
    """It has our frames, as every exception that a notebook keeps; the fixtures look for the descriptors of the slab."""
    env_fns = [functools.partial(Faulty, "step", an_error) for _ in range(2)]
    async with asyncio.timeout(BOUND_SECONDS):
        async with AsyncVectorEnv(env_fns, num_workers=1) as envs:
            await envs.reset()
            with pytest.raises(ExceptionGroup) as caught:
                await envs.step([1, 1])
        assert caught.value.__traceback__ is not None
        maps = Path("/proc/self/maps").read_text()
        assert "aiovec-slab" not in maps
