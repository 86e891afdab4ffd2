"""Programs that run out of processes: ``python process_limit.py PROGRAM LOOP``; see `tests/faults/test_limits.py`.

The kernel lets root start processes beyond `ulimit -u`, and whoever has one of two capabilities. So the program gives
these up, becomes, for this count alone, a user that nobody else is, and begins anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sample_envs import Counter

from aiovec import AsyncVectorEnv, CrashLoopError, WorkerDied, WorkerStartError

NOT_POSSIBLE = 77  # exit code: the system does not let us
FIRST_UNUSED_UID = 1_000_000_000

# From linux/prctl.h and linux/capability.h.
PR_CAPBSET_DROP = 24
CAP_SYS_ADMIN = 21
CAP_SYS_RESOURCE = 24

SOFT, HARD = resource.getrlimit(resource.RLIMIT_NPROC)


def begin_anew_as_another_user() -> None:
    """Who still is root as far as files are concerned."""
    try:
        for capability in (CAP_SYS_ADMIN, CAP_SYS_RESOURCE):
            if ctypes.CDLL(None, use_errno=True).prctl(PR_CAPBSET_DROP, capability, 0, 0, 0):
                raise OSError(ctypes.get_errno(), "no capability is given up")
        os.setresuid(FIRST_UNUSED_UID + os.getpid(), 0, 0)
    except OSError as error:
        print(error)
        sys.exit(NOT_POSSIBLE)
    os.execv(sys.executable, sys.orig_argv)  # noqa: S606  ourselves


@contextmanager
def processes_up_to(number: int) -> Iterator[None]:
    """This user may not have more, threads included."""
    resource.setrlimit(resource.RLIMIT_NPROC, (number, HARD))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NPROC, (SOFT, HARD))


async def count() -> int:
    """How many this user has, once there is no vector and its threads have ended, for the kernel, too."""
    while len(os.listdir("/proc/self/task")) > 2:  # ourselves, and the one to pickle in
        await asyncio.sleep(0.01)
    total = 0
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            status = (process / "status").read_text()
            if f"\nUid:\t{os.getuid()}\t" in status:
                total += int(re.findall(r"^Threads:\t(\d+)", status, re.MULTILINE)[0])
    return total


def held() -> tuple[list[str], str]:
    """The descriptors of this process, and its children."""
    children = (process.read_text() for process in Path("/proc/self/task").glob("*/children"))
    return sorted(os.listdir("/proc/self/fd")), "".join(children)


async def use(envs: AsyncVectorEnv) -> None:
    """They are as ever."""
    await envs.reset()
    observations, *_ = await envs.step([0] * len(envs))
    assert observations[:, 2].tolist() == [1] * len(envs)


async def start() -> None:
    """Wherever they run out, it is said and nothing is left; the same vector starts once there are enough."""
    async with AsyncVectorEnv([Counter, Counter], num_workers=2) as envs:  # after it there is a thread to pickle in
        await use(envs)
    envs = AsyncVectorEnv([Counter, Counter], num_workers=2)
    before, first = held(), await count()
    told: list[WorkerStartError] = []
    for number in range(first, first + 40):
        with processes_up_to(number):
            try:
                await envs
            except WorkerStartError as error:
                told.append(error)
            except WorkerDied as error:  # it was the last one, and could not start its own thread
                assert "can't start new thread" in error.stderr
            else:
                break
        assert held() == before
    assert all(error.errno == errno.EAGAIN and "`ulimit -u`" in str(error) for error in told)
    for env_index in (0, 1):
        assert any(f"no worker for env {env_index}: " in str(error) for error in told)
    await use(envs)
    await envs.close()


async def start_without_a_thread() -> None:
    """The first start of all needs a thread, too: the same is said."""
    envs = AsyncVectorEnv([Counter, Counter], num_workers=2)
    before = held()
    with processes_up_to(1):
        with pytest.raises(WorkerStartError, match="`ulimit -u`") as caught:
            await envs
    assert caught.value.errno == errno.EAGAIN
    assert held() == before
    await use(envs)
    await envs.close()


async def replace() -> None:
    """In the place of a worker that died: nothing is changed, and later there may be one."""
    async with AsyncVectorEnv([Counter] * 4, num_workers=2) as envs:
        await use(envs)
        worker: Any = envs._started.pool.workers[1]  # type: ignore[union-attr]
        os.kill(worker.pid, signal.SIGKILL)
        await worker.ended.wait()
        with pytest.raises(WorkerDied):
            await envs.step([0] * 4)
        before = held()
        for env_ids in (None, [3]):
            with processes_up_to(1):
                with pytest.raises(WorkerStartError, match="no worker for envs 2, 3: .*`ulimit -u`") as caught:
                    await envs.reset(env_ids=env_ids)
            assert caught.value.errno == errno.EAGAIN
            assert held() == before
            assert await envs.get_attr("steps", env_ids=[0, 1]) == (1, 1)
        await use(envs)


async def restart() -> None:
    """Without a worker in the place of one that died its envs are given up, with the reason; a reset tries again."""
    async with AsyncVectorEnv([Counter] * 4, num_workers=2, on_failure="restart") as envs:
        await use(envs)
        worker: Any = envs._started.pool.workers[1]  # type: ignore[union-attr]
        with processes_up_to(1):
            os.kill(worker.pid, signal.SIGKILL)
            await worker.ended.wait()
            with pytest.raises(
                CrashLoopError, match=r"WorkerStartError: no worker for envs 2, 3: .*`ulimit -u`"
            ) as caught:
                await envs.step([0] * 4)
            assert caught.value.env_ids == (2, 3)
            assert [type(error) for error in caught.value.exceptions] == [WorkerDied, WorkerStartError]
            assert isinstance(caught.value.__cause__, WorkerStartError)
            with pytest.raises(WorkerStartError, match="no worker for envs 2, 3: .*`ulimit -u`"):
                await envs.reset()
        await use(envs)


PROGRAMS: dict[str, Callable[[], Any]] = {
    "start": start,
    "start without a thread": start_without_a_thread,
    "replace": replace,
    "restart": restart,
}


def main(program: str, event_loop: str) -> None:
    if os.getuid() == 0:
        begin_anew_as_another_user()
    with processes_up_to(1), contextlib.suppress(BlockingIOError):
        subprocess.run(["true"], check=True)
        print("the limit does not bind")
        sys.exit(NOT_POSSIBLE)
    if event_loop == "uvloop":
        import uvloop

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(PROGRAMS[program]())
    else:
        asyncio.run(PROGRAMS[program]())


if __name__ == "__main__":
    main(*sys.argv[1:])
