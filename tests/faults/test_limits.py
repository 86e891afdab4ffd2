"""What the system does not give, and what is too large to go at once: a clear error, or slower; never a hang."""

from __future__ import annotations

import asyncio
import functools
import os
import resource
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import process_limit
import pytest
from fault_envs import BOUND_SECONDS, Boundless, Echo, Mortal, use_up_memory
from sample_envs import Counter

import aiovec
from aiovec import AsyncVectorEnv, SlabMemoryError, WorkerDied, WorkerStartError

LARGE_NBYTES = 50_000_000
CONTROL_GROUPS = Path("/proc/self/cgroup")


@contextmanager
def descriptors_up_to(number: int) -> Iterator[None]:
    """This process may not open any above."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (number, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.not_on_ray("Ray's own descriptors come and go")
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


@pytest.mark.parametrize("event_loop", ["asyncio", "uvloop"])
@pytest.mark.parametrize("program", process_limit.PROGRAMS)
def test_without_enough_processes(program: str, event_loop: str) -> None:
    """In a process of its own, since the limit does not bind root; what is tested stands in the program."""
    if event_loop == "uvloop":
        pytest.importorskip("uvloop")
    path = os.pathsep.join([str(Path(aiovec.__file__).parents[1]), str(Path(process_limit.__file__).parent)])
    ended = subprocess.run(
        [sys.executable, "-W", "error", process_limit.__file__, program, event_loop],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=2 * BOUND_SECONDS,
        check=False,
    )
    if ended.returncode == process_limit.NOT_POSSIBLE:
        pytest.skip(ended.stdout)
    assert ended.returncode == 0, ended.stderr


def new_control_group(nbytes: int) -> Path | None:
    """One whose processes may not have more memory, if one can be made: of version 1, or of version 2."""
    own = {kind: path for _, kind, path in (line.split(":", 2) for line in CONTROL_GROUPS.read_text().splitlines())}
    versions = [
        ("/sys/fs/cgroup/memory", own.get("memory", "/"), {"memory.limit_in_bytes": nbytes}),
        ("/sys/fs/cgroup", own.get("", "/"), {"memory.max": nbytes, "memory.swap.max": 0}),
    ]
    for root, path, limits in versions:
        for parent in (Path(root + path), Path(root)):
            group = parent / f"aiovec-{uuid.uuid4().hex}"
            try:
                group.mkdir()
            except OSError:
                continue
            present = [name for name in limits if (group / name).exists()]  # not what limits swap, in some kernels
            try:
                for name in present:
                    (group / name).write_text(str(limits[name]))
            except OSError:
                present = []
            if present:
                return group
            group.rmdir()
    return None


@pytest.fixture
def control_group() -> Iterator[Path]:
    """One of `LARGE_NBYTES`."""
    group = new_control_group(LARGE_NBYTES)
    if group is None:
        pytest.skip("no control group with a limit of memory can be made here")
    yield group
    group.rmdir()


def killed_in(group: Path) -> int:
    """How many processes of a control group the kernel has ended for want of memory."""
    told = next(file for file in (group / "memory.oom_control", group / "memory.events") if file.exists())
    return int(dict(line.split() for line in told.read_text().splitlines())["oom_kill"])


@pytest.mark.not_on_ray("Ray does not tell how a process has ended")
async def test_a_worker_that_the_kernel_ends_for_want_of_memory(control_group: Path) -> None:
    """A death as any other, with the reason in its text; the new worker is not in that control group."""
    env_fns = [functools.partial(Mortal, use_up_memory, "step", offset=index) for index in range(4)]
    async with asyncio.timeout(BOUND_SECONDS), AsyncVectorEnv(env_fns, num_workers=2) as envs:
        await envs.reset()
        worker = envs._started.pool.workers[1]  # type: ignore[union-attr]
        try:
            (control_group / "cgroup.procs").write_text(str(worker.pid))
        except OSError as error:
            pytest.skip(f"no process can be put into a control group here: {error}")
        with pytest.raises(WorkerDied, match=r"was killed by SIGKILL \(out of memory\?\) during step") as caught:
            await envs.step([0, 0, 1, 0])
        error = caught.value
        assert killed_in(control_group) == 1
        assert (error.env_ids, error.env_index, error.pid) == ((2, 3), 2, worker.pid)
        assert error.exitcode == -signal.SIGKILL
        assert await envs.get_attr("steps", env_ids=[0, 1]) == (1, 1)
        await envs.reset()
        observations, *_ = await envs.step([0] * 4)
        assert observations[:, 2].tolist() == [1] * 4


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
    space = Boundless().observation_space
    envs = AsyncVectorEnv([Boundless] * 4, num_workers=num_workers, observation_mode=(space, space))
    async with asyncio.timeout(BOUND_SECONDS):
        with pytest.raises(SlabMemoryError, match=r"no memory for the [\d,]+ bytes"):
            await envs
    await envs.close()


def resident_nbytes() -> int:
    """Of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.not_on_ray("Ray's own descriptors come and go")
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
