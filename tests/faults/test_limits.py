"""What the system does not give, and what is too large to go at once: a clear error, or slower; never a hang."""

from __future__ import annotations

import asyncio
import functools
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from fault_envs import BOUND_SECONDS, Echo, Wide
from sample_envs import Counter

from aiovec import AsyncVectorEnv, SlabMemoryError, WorkerDied, WorkerStartError

LARGE_NBYTES = 50_000_000


@contextmanager
def descriptors_up_to(number: int) -> Iterator[None]:
    """This process may not open any above."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (number, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_a_start_without_enough_descriptors() -> None:
    """Wherever they run out, it is said and nothing is left; the same vector starts once there are enough."""
    envs = AsyncVectorEnv([Counter, Counter], num_workers=2)
    highest = max(map(int, os.listdir("/proc/self/fd")))
    told: list[Exception] = []
    async with asyncio.timeout(3 * BOUND_SECONDS):
        for number in range(3, highest + 40):
            before = set(os.listdir("/proc/self/fd"))
            with descriptors_up_to(number):
                try:
                    await envs
                except (WorkerStartError, SlabMemoryError, WorkerDied) as error:  # the last from a worker's own limit
                    told.append(error)
                else:
                    break
            assert set(os.listdir("/proc/self/fd")) == before
        assert any(isinstance(error, WorkerStartError) and "ulimit -n" in str(error) for error in told)
        await envs.reset()
        await envs.step([0, 0])
        await envs.close()


@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.blocks_loop  # arguments of `call` are pickled on the loop
async def test_fifty_megabytes_both_ways(num_workers: int) -> None:
    """Requests that the worker cannot read yet meet replies that the parent cannot read yet: neither waits."""
    value = np.arange(LARGE_NBYTES // 8)
    async with asyncio.timeout(3 * BOUND_SECONDS), AsyncVectorEnv([Echo] * 2, num_workers=num_workers) as envs:
        await envs.reset()
        calls = [envs.call("echo", value, env_ids=[index]) for index in (0, 1, 0, 1)]
        step = envs.step([0, 0])
        *echoes, (observations, *_) = await asyncio.gather(*calls, step)
        for (echo,) in echoes:
            np.testing.assert_array_equal(echo, value)
        assert observations[:, 2].tolist() == [1, 1]
        _, infos = await envs.reset(options={"padding": value})
        np.testing.assert_array_equal(infos["padding"][1], value)


@pytest.mark.parametrize("num_workers", [0, 2])
async def test_no_memory_for_the_slab(num_workers: int) -> None:
    """A clear error with the number of bytes; nothing is left."""
    env_fns = [functools.partial(Wide, 1 << 18)] * 4
    envs = AsyncVectorEnv(env_fns, num_workers=num_workers, max_buffers=1 << 20, copy=None)
    async with asyncio.timeout(BOUND_SECONDS):
        with pytest.raises(SlabMemoryError, match=r"no memory for the [\d,]+ bytes"):
            await envs
    await envs.close()


def resident_nbytes() -> int:
    """Of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def test_two_hundred_cycles_in_one_process() -> None:
    """No descriptor more, and no memory that grows with them."""

    async def cycle() -> None:
        async with AsyncVectorEnv([Counter, Counter], num_workers=1) as envs:
            await envs.reset()
            await envs.step([0, 0])

    await asyncio.gather(*[cycle() for _ in range(4)])
    descriptors, resident = len(os.listdir("/proc/self/fd")), resident_nbytes()
    async with asyncio.timeout(5 * BOUND_SECONDS):
        for _ in range(50):
            await asyncio.gather(*[cycle() for _ in range(4)])
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert resident_nbytes() - resident < 20_000_000
