"""What goes wrong in one thread of a worker concerns its env alone; or all of the worker, if that has to end."""

from __future__ import annotations

import asyncio
import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from async_envs import FailsAndWaits
from fault_envs import (
    BOUND_SECONDS,
    PASS_GATE,
    Faulty,
    Gate,
    Gated,
    Mortal,
    an_error,
    end_with_sigkill,
    hang_in_python,
    turns,
)
from flaky_envs import Flaky, raise_an_error
from gymnasium.vector import AutoresetMode

from aiovec import AsyncVectorEnv, EnvTimeoutError, WorkerDied, failures

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


def gated(gate: Gate, num_envs: int = 4, **options: Any) -> AsyncVectorEnv:
    """Envs in two threads of one worker."""
    env_fns = [functools.partial(Gated, gate.key, offset=index, **options) for index in range(num_envs)]
    return AsyncVectorEnv(env_fns, num_workers=1, context="fork", threads_per_worker=2)


def rows(*observations: Any) -> Any:
    return np.array(observations, np.float32)


async def test_who_waits_keeps_only_its_own_thread(gate: Gate) -> None:
    """The others are served, also while one is at its gate; and those behind it, once it is let through."""
    async with asyncio.timeout(BOUND_SECONDS), gated(gate) as envs:
        await envs.reset()
        await envs.send([PASS_GATE], env_ids=[0])
        await gate.arrived()
        assert (await envs[1].step(0))[1] == 1
        assert (await envs.call("work", "x", env_ids=[3])) == (("x", 0),)
        behind = asyncio.create_task(envs.call("work", "y", env_ids=[2]))
        assert (await envs[3].step(0))[1] == 1
        await turns()
        assert not behind.done()
        gate.open()
        assert await behind == (("y", 0),)
        assert (await envs.recv()).env_ids.tolist() == [0]


@pytest.mark.parametrize("moment", ["init", "reset", "step", "render", "work", "close"])
async def test_an_error_in_one_thread(moment: str) -> None:
    """Is told as ever, with its frames and nothing of ours above them; the others go on."""
    env_fns: list[Any] = [functools.partial(Faulty, "never", an_error, offset=index) for index in range(4)]
    env_fns[3] = functools.partial(Faulty, moment, an_error, offset=3)
    envs = AsyncVectorEnv(env_fns, num_workers=1, context="fork", threads_per_worker=2)
    with pytest.raises(ValueError, match=r"An error occurred\.") as caught:
        async with asyncio.timeout(BOUND_SECONDS), envs:
            await envs.reset(options={"fail": True})
            if moment == "step":
                await envs.step([0, 0, 0, 1])
            if moment in ("render", "work"):
                await envs.call(moment)
    (failure,) = failures(caught.value)
    assert failure.env_index == 3
    assert not [entry for entry in caught.traceback if "/aiovec/worker/" in str(entry.path)]
    assert [entry for entry in caught.traceback if entry.name == "_raise_at"]


async def test_errors_in_several_threads() -> None:
    """In the order of the envs; who did its part has its row."""
    env_fns = [functools.partial(Faulty, "step", an_error, offset=index) for index in range(5)]
    async with (
        asyncio.timeout(BOUND_SECONDS),
        AsyncVectorEnv(env_fns, num_workers=1, context="fork", threads_per_worker=3) as envs,
    ):
        await envs.reset()
        with pytest.raises(ExceptionGroup) as caught:
            await envs.step([0, 1, 1, 0, 1])
        assert [failure.env_index for failure in failures(caught.value)] == [1, 2, 4]
        batch = await envs.recv(min_envs=2)
        np.testing.assert_array_equal(batch.observations, rows([0, 1, 1], [3, 1, 1]))
        await envs.reset(env_ids=[1, 2, 4])
        observations, *_ = await envs.step([0] * 5)
        assert observations[:, 2].tolist() == [2, 1, 1, 2, 1]


async def test_a_stuck_thread_is_named(gate: Gate) -> None:
    """It alone, with its stack; the worker ends, and its envs are built anew."""
    env_fns: list[Any] = [functools.partial(Mortal, hang_in_python, "step", offset=index) for index in range(4)]
    vector = AsyncVectorEnv(env_fns, num_workers=1, context="fork", threads_per_worker=2, step_timeout=0.5)
    async with asyncio.timeout(BOUND_SECONDS), vector as envs:
        await envs.reset()
        with pytest.raises(EnvTimeoutError) as caught:
            await envs.step([0, 0, 0, 1])
        assert caught.value.env_ids == (3,)
        assert caught.value.lost_env_ids == (0, 1, 2, 3)
        assert "hang_in_python" in caught.value.stack
        await envs.reset()
        observations, *_ = await envs.step([0] * 4)
        assert observations[:, 2].tolist() == [1] * 4


async def test_two_stuck_threads_are_named() -> None:
    env_fns: list[Any] = [functools.partial(Mortal, hang_in_python, "reset", offset=index) for index in range(3)]
    vector = AsyncVectorEnv(env_fns, num_workers=1, context="fork", threads_per_worker=3, step_timeout=0.5)
    async with asyncio.timeout(BOUND_SECONDS), vector as envs:
        await envs.reset()
        with pytest.raises(EnvTimeoutError) as caught:
            await envs.reset(options={"die": True}, env_ids=[2, 0])
        assert caught.value.env_ids == (0, 2)


async def test_a_death_in_one_thread() -> None:
    """Concerns the worker; the rebuilt one has its threads again."""
    env_fns: list[Any] = [functools.partial(Mortal, end_with_sigkill, "step", offset=index) for index in range(4)]
    async with (
        asyncio.timeout(BOUND_SECONDS),
        AsyncVectorEnv(env_fns, num_workers=2, context="fork", threads_per_worker=2) as envs,
    ):
        await envs.reset()
        with pytest.raises(WorkerDied) as caught:
            await envs.step([0, 0, 0, 1])
        assert caught.value.env_ids == (2, 3)
        await envs.reset()
        observations, *_ = await envs.step([0] * 4)
        assert observations[:, 2].tolist() == [1] * 4


@pytest.mark.parametrize("mode", list(AutoresetMode), ids=lambda mode: mode.name)
async def test_restart(mode: AutoresetMode, tmp_path: Path) -> None:
    """The failed one is built anew, in its thread; the others do not notice."""
    env_fns = [functools.partial(Flaky, raise_an_error, index, str(tmp_path / "log")) for index in range(4)]
    vector = AsyncVectorEnv(
        env_fns, num_workers=1, context="fork", threads_per_worker=2, autoreset_mode=mode, on_failure="restart"
    )
    async with asyncio.timeout(BOUND_SECONDS), vector as envs:
        await envs.reset()
        _, rewards, _, truncations, infos = await envs.step([0, 1, 0, 0])
        np.testing.assert_array_equal(rewards, [1, np.nan, 1, 1])
        assert isinstance(infos["failure"][1], ValueError)
        if mode is AutoresetMode.DISABLED:
            await envs.reset(options={"reset_mask": truncations})
        elif mode is AutoresetMode.NEXT_STEP:
            await envs.step([0] * 4)
        observations, *_, infos = await envs.step([0] * 4)
        assert observations[:, 1].tolist() == [1, 2, 1, 1]
        assert "failure" not in infos


async def test_a_failed_env_that_is_reset_before_the_others_have_answered(gate: Gate, tmp_path: Path) -> None:
    """With `on_failure="restart"`: its reset builds it anew, and the step behind that is a step."""
    env_fns: list[Any] = [functools.partial(FailsAndWaits, gate.key, i, str(tmp_path / "log")) for i in range(2)]
    vector = AsyncVectorEnv(env_fns, num_workers=1, context="fork", threads_per_worker=2, on_failure="restart")
    async with asyncio.timeout(BOUND_SECONDS), vector as envs:
        await envs.reset()
        step = asyncio.create_task(envs.step([1, 1]))
        await gate.arrived()
        step.cancel()
        await asyncio.wait([step])
        reset = asyncio.create_task(envs.reset())
        while len((tmp_path / "log").read_text().split()) < 3:  # env 0 is built anew
            await asyncio.sleep(0.005)
        gate.open()
        observations, _ = await reset
        np.testing.assert_array_equal(observations, rows([0, 2, 0], [1, 1, 0]))
        observations, rewards, *_ = await envs.step([0, 0])
        np.testing.assert_array_equal(observations, rows([0, 2, 1], [1, 1, 1]))
        assert rewards.tolist() == [1, 1]


async def test_a_close_that_meets_a_stuck_thread_is_bounded(gate: Gate) -> None:
    """The envs in other threads are closed."""
    log = gate.key.passes + ".log"
    env_fns: list[Any] = [functools.partial(Gated, gate.key, "close" if i else "step", i, 3, log) for i in range(2)]
    envs = AsyncVectorEnv(env_fns, num_workers=1, context="fork", threads_per_worker=2, close_grace=0.3)
    async with asyncio.timeout(BOUND_SECONDS):
        await envs.reset()
        await envs.close()
    assert Path(log).read_text() == "close 0\n"


@pytest.mark.parametrize("how", ["a mask", "an error"])
async def test_a_late_reset_writes_no_row_of_a_later_step(how: str, gate: Gate) -> None:
    """It was cancelled, and env 1, which is not in it any more, has been stepped meanwhile."""
    env_fns: list[Any] = [
        functools.partial(Gated, gate.key, at="reset"),
        functools.partial(Faulty, "reset", an_error, offset=1),
    ]
    async with (
        asyncio.timeout(BOUND_SECONDS),
        AsyncVectorEnv(env_fns, num_workers=1, context="fork", threads_per_worker=2) as envs,
    ):
        await envs.reset()
        options: dict[str, Any] = {"gate": True}
        options |= {"reset_mask": np.array([True, False])} if how == "a mask" else {"fail": True}
        reset = asyncio.create_task(envs.reset(options=options))
        await gate.arrived()
        reset.cancel()
        await asyncio.wait([reset])
        if how == "an error":
            await envs.reset(env_ids=[1])
        for _ in range(3):
            await envs.send([0], [1])
            await envs.recv()
        await envs.send([0], [1])
        while envs.statistics().pending[-1].env_ids != (0,):
            await asyncio.sleep(0.001)
        gate.open()
        await envs.get_attr("steps")  # behind the reset
        batch = await envs.recv(2)
        row = batch.env_ids.tolist().index(1)
        assert (batch.rewards[row], batch.observations[row, 2]) == (4, 4)


@pytest.mark.parametrize("shared_memory", [True, False])
async def test_a_step_that_ends_while_the_vector_is_being_closed(shared_memory: bool, gate: Gate) -> None:
    """Whatever it gives, it is no error of ours."""
    env_fns = [functools.partial(Gated, gate.key, offset=index) for index in range(2)]
    async with asyncio.timeout(BOUND_SECONDS):
        envs = AsyncVectorEnv(env_fns, num_workers=1, context="fork", threads_per_worker=2, shared_memory=shared_memory)
        await envs.reset()
        step = asyncio.create_task(envs.step([PASS_GATE, 0]))
        await gate.arrived()
        close = asyncio.create_task(envs.close())
        await turns()
        gate.open()
        await close
        _, rewards, *_ = await step
        np.testing.assert_array_equal(rewards, [1, 1])
