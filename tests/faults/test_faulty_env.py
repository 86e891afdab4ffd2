"""`FaultyEnv` in a vector: what the awaiting task is told of each fault, as its table says."""

from __future__ import annotations

import asyncio
import functools
import signal
import traceback
from typing import Any

import numpy as np
import pytest
from fault_envs import BOUND_SECONDS, context_of_loop

import aiovec
from aiovec import (
    AsyncVectorEnv,
    EnvTimeoutError,
    InvalidEnvResultError,
    RemoteError,
    ResetNeeded,
    WorkerDied,
    failures,
)
from aiovec.testing import FaultyEnv

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

TOLD: dict[str, type[Exception]] = {
    "raise": ValueError,
    "raise-unpicklable": RemoteError,
    "exit": RemoteError,
    "kill": WorkerDied,
    "segfault": WorkerDied,
    "hang": EnvTimeoutError,
    "hang-in-c": EnvTimeoutError,
    "wrong-shape": InvalidEnvResultError,
    "wrong-dtype": InvalidEnvResultError,
}
CALLS: dict[str, Any] = {
    "reset": lambda envs: envs.reset(),
    "step": lambda envs: envs.step([0, 1, 2]),
    "render": lambda envs: envs.render(),
}
STEP_TIMEOUT = 0.6


def vector(*env_fns: Any, **options: Any) -> AsyncVectorEnv:
    return AsyncVectorEnv(env_fns or [FaultyEnv] * 3, num_workers=2, context=context_of_loop(), **options)


@pytest.mark.parametrize("moment", list(CALLS))
@pytest.mark.parametrize("fault", list(TOLD))
async def test_what_the_task_is_told(fault: str, moment: str, on_ray: bool) -> None:
    """And after a reset everything is well."""
    if fault.startswith("wrong") and moment == "render":
        pytest.skip("frames have no space")
    options = {"step_timeout": STEP_TIMEOUT} if fault.startswith("hang") else {}
    async with asyncio.timeout(BOUND_SECONDS), vector(**options) as envs:
        await envs.reset(seed=1)
        await envs.call("fail", fault, moment, env_ids=[1])
        with pytest.raises(TOLD[fault]) as caught:
            await CALLS[moment](envs)
        assert 1 in {failure.env_index for failure in failures(caught.value)}
        match caught.value:
            case WorkerDied() as died:
                number = signal.SIGKILL if fault == "kill" else signal.SIGSEGV
                assert died.exitcode == (None if on_ray else -number)
            case EnvTimeoutError() as late:
                assert late.env_ids == (1,)
                assert "faulty_env.py" in late.stack
            case RemoteError() as remote:
                assert (
                    isinstance(remote.__cause__, SystemExit) if fault == "exit" else "UnpicklableError" in str(remote)
                )
        if moment == "step":  # of the other worker, another step may be owed after a death
            with pytest.raises(ResetNeeded):
                await envs[1].step(0)
        await envs.reset(seed=1)
        observations, *_ = await envs.step([0, 1, 2])
        assert observations[:, 0].tolist() == [1, 1, 1]


@pytest.mark.parametrize("num_workers", [0, 1])
async def test_its_own_frames_are_those_of_an_env(num_workers: int) -> None:
    """Although they lie in aiovec's folder, whose frames are left out."""
    async with AsyncVectorEnv([functools.partial(FaultyEnv, "raise", after=1)], num_workers=num_workers) as envs:
        await envs.reset(seed=1)
        await envs.step([0])
        with pytest.raises(ValueError, match="FaultyEnv failed in step") as caught:
            await envs.step([0])
        assert caught.value.args[1] == 1
        assert [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)][-2:] == ["step", "_come_to"]


@pytest.mark.parametrize("fault", ["raise", "exit", "kill", "segfault"])
async def test_the_start_fails(fault: Any) -> None:
    async with asyncio.timeout(BOUND_SECONDS):
        with pytest.raises(TOLD[fault]) as caught:
            await vector(FaultyEnv, functools.partial(FaultyEnv, fault, "init"), FaultyEnv)
        assert 1 in {failure.env_index for failure in failures(caught.value)}


async def test_a_start_hangs() -> None:
    async with asyncio.timeout(BOUND_SECONDS):
        with pytest.raises(EnvTimeoutError) as caught:
            await vector(FaultyEnv, FaultyEnv, functools.partial(FaultyEnv, "hang", "init"), start_timeout=2)
        assert caught.value.env_ids == (2,)


@pytest.mark.parametrize("fault", ["raise", "kill", "hang-in-c"])
async def test_a_close_is_one_all_the_same(fault: str) -> None:
    async with asyncio.timeout(BOUND_SECONDS):
        envs = await vector(close_grace=0.3)
        await envs.call("fail", fault, "close", env_ids=[1])
        if fault == "raise":
            with pytest.raises(ValueError, match="FaultyEnv failed in close"):
                await envs.close()
        else:
            await envs.close()
        assert envs.closed


async def test_slow_is_late_only_for_a_step_timeout() -> None:
    async with asyncio.timeout(BOUND_SECONDS), vector(step_timeout=STEP_TIMEOUT) as envs:
        await envs.reset(seed=1)
        await envs.call("fail", "slow", env_ids=[0], seconds=0.01)
        observations, *_ = await envs.step([0, 0, 0])
        assert observations[:, 0].tolist() == [1, 1, 1]
        await envs.call("fail", "slow", env_ids=[0], seconds=BOUND_SECONDS)
        with pytest.raises(EnvTimeoutError):
            await envs.step([0, 0, 0])


async def test_a_reward_may_be_nan() -> None:
    async with vector() as envs:
        await envs.reset(seed=1)
        await envs.call("fail", "nan-reward", env_ids=[2])
        _, rewards, _, truncations, infos = await envs.step([0, 0, 0])
        assert rewards[:2].tolist() == [1, 1]
        assert np.isnan(rewards[2])
        assert not truncations.any()
        assert "failure" not in infos


@pytest.mark.parametrize("fault", ["raise", "kill", "wrong-shape"])
async def test_restarts_have_what_the_constructor_was_told(fault: Any) -> None:
    """So each new env fails at its third step; what `fail` asked for is gone with the old one."""
    env_fns = [FaultyEnv, FaultyEnv, functools.partial(FaultyEnv, fault, after=2)]
    async with asyncio.timeout(BOUND_SECONDS), vector(*env_fns, on_failure="restart") as envs:
        await envs.reset(seed=1)
        await envs.call("fail", "raise", "render", env_ids=[2])
        failed = []
        for _ in range(8):
            _, rewards, _, _, infos = await envs.step([0, 0, 0])
            failed.append(bool(np.isnan(rewards[2])))
            assert not np.isnan(rewards[:2]).any()
            if failed[-1]:
                assert isinstance(infos["failure"][2], TOLD[fault])
        assert failed == [False, False, True, False, False, False, True, False]
        assert len(await envs.render()) == 3


def test_aiovec_has_no_name_of_it() -> None:
    assert not {"FaultyEnv", "ContractError", "check_vector_env"} & set(aiovec.__all__)
