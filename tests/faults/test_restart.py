"""`on_failure="restart"`: failed envs are built anew, their rows say so, and nobody else notices."""

from __future__ import annotations

import asyncio
import functools
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from fault_envs import BOUND_SECONDS, context_of_loop, end_with_sigkill, hang_in_c, segfault
from flaky_envs import SLOW, Flaky, Unlucky, raise_an_error
from gymnasium.vector import AutoresetMode
from sample_envs import Counter

from aiovec import (
    AsyncVectorEnv,
    CrashLoopError,
    EnvTimeoutError,
    InvalidActionsError,
    ResetNeeded,
    WorkerDied,
    failures,
)

NUM_ENVS = 4
FAILING = 2


FAILURES: dict[str, tuple[Callable[[], object], type[Exception]]] = {
    "raise": (raise_an_error, ValueError),
    "SIGKILL": (end_with_sigkill, WorkerDied),
    "segfault": (segfault, WorkerDied),
    "stuck": (hang_in_c, EnvTimeoutError),
}


def vector(failure: str, tmp_path: Path, mode: AutoresetMode, num_workers: int, **options: Any) -> AsyncVectorEnv:
    """Four of them."""
    log, is_dict = str(tmp_path / "log"), options.pop("is_dict", False)
    env_fns = [functools.partial(Flaky, FAILURES[failure][0], index, log, is_dict) for index in range(NUM_ENVS)]
    if failure == "stuck":
        options["step_timeout"] = 0.6
    options["context"] = context_of_loop() if num_workers else None
    return AsyncVectorEnv(env_fns, num_workers=num_workers, autoreset_mode=mode, on_failure="restart", **options)


def lost_envs(envs: AsyncVectorEnv, failure: str) -> list[int]:
    """Those that fail with the failing one."""
    if failure == "raise":
        return [FAILING]
    return next(list(worker.env_ids) for worker in envs._started.pool.workers if FAILING in worker.env_ids)  # type: ignore[union-attr]


def numbers(observations: Any) -> Any:
    return observations["numbers"] if isinstance(observations, dict) else observations


ACTIONS = [1 if index == FAILING else 0 for index in range(NUM_ENVS)]
CASES = [
    (failure, num_workers)
    for failure in FAILURES
    for num_workers in (0, 1, 2, 4)
    if failure == "raise" or (num_workers and (failure == "SIGKILL" or num_workers == 2))
]
SHAPES = [(*case, "array") for case in CASES] + [(f, 2, shape) for f in FAILURES for shape in ("dict", "not shared")]


@pytest.mark.parametrize("mode", list(AutoresetMode), ids=lambda mode: mode.name)
@pytest.mark.parametrize(("failure", "num_workers", "shape"), SHAPES)
async def test_a_failed_step(failure: str, num_workers: int, mode: AutoresetMode, shape: str, tmp_path: Path) -> None:
    """Its row says so in every way; the next one, or the user's reset, is that of the new env; the others go on."""
    options = {"is_dict": shape == "dict", "shared_memory": shape != "not shared"}
    vectors = vector(failure, tmp_path, mode, num_workers, **options)
    async with asyncio.timeout(BOUND_SECONDS), vectors as envs:
        await envs.reset(seed=1)
        await envs.step([0] * NUM_ENVS)
        lost = lost_envs(envs, failure)
        others = [index for index in range(NUM_ENVS) if index not in lost]
        observations, rewards, terminations, truncations, infos = await envs.step(ACTIONS)
        is_lost = np.isin(range(NUM_ENVS), lost)
        np.testing.assert_array_equal(rewards, np.where(is_lost, np.nan, 2))
        np.testing.assert_array_equal(truncations, is_lost)
        assert not terminations.any()
        np.testing.assert_array_equal(infos["_failure"], is_lost)
        np.testing.assert_array_equal(infos["_generation"], is_lost)
        np.testing.assert_array_equal(infos["generation"], is_lost.astype(int))
        for index in lost:
            assert isinstance(infos["failure"][index], FAILURES[failure][1])
            assert FAILING in [one.env_index for one in failures(infos["failure"][index])]
            after = [2, 0] if mode is AutoresetMode.SAME_STEP else [1, 1]
            assert numbers(observations)[index].tolist() == [index, *after]
            if shape == "dict":
                assert observations["text"][index] == "{} {}".format(*after)
        if others:
            np.testing.assert_array_equal(numbers(observations)[others], [[index, 1, 2] for index in others])
            np.testing.assert_array_equal(infos["steps"], np.where(is_lost, 0, 2))
        if mode is AutoresetMode.SAME_STEP:
            for index in lost:
                assert numbers(infos["final_obs"][index]).tolist() == [index, 1, 1]
            np.testing.assert_array_equal(infos["built"], np.where(is_lost, 2, 0))
        elif mode is AutoresetMode.NEXT_STEP:
            observations, rewards, _, truncations, infos = await envs.step([0] * NUM_ENVS)
            np.testing.assert_array_equal(numbers(observations)[:, 1:], np.where(is_lost[:, None], [2, 0], [1, 3]))
            np.testing.assert_array_equal(rewards, np.where(is_lost, 0, 3))
            assert not truncations.any()
            assert "failure" not in infos
        else:
            observations, infos = await envs.reset(options={"reset_mask": truncations})
            np.testing.assert_array_equal(numbers(observations)[:, 1:], np.where(is_lost[:, None], [2, 0], [1, 2]))
            assert "failure" not in infos
        for step in (1, 2):
            observations, rewards, *_, infos = await envs.step([0] * NUM_ENVS)
            np.testing.assert_array_equal(numbers(observations)[is_lost, 1:], [[2, step]] * len(lost))
            np.testing.assert_array_equal(rewards[is_lost], [step] * len(lost))
            assert "failure" not in infos


@pytest.mark.parametrize(("failure", "num_workers"), CASES)
@pytest.mark.parametrize("env_ids", [None, [3, 2]], ids=["all", "some"])
async def test_a_failed_reset(failure: str, env_ids: list[int] | None, num_workers: int, tmp_path: Path) -> None:
    """It is repeated with a new env, and says what had happened."""
    async with asyncio.timeout(BOUND_SECONDS), vector(failure, tmp_path, AutoresetMode.NEXT_STEP, num_workers) as envs:
        await envs.reset()
        observations, infos = await envs.reset(options={"fail": FAILING, "until": 2}, env_ids=env_ids, seed=5)
        rows = list(env_ids or range(NUM_ENVS))
        failing = rows.index(FAILING)
        assert observations[failing].tolist() == [FAILING, 3, 0]
        assert infos["generation"][failing] == 2
        assert isinstance(infos["failure"][failing], ExceptionGroup)
        assert all(isinstance(error, FAILURES[failure][1]) for error in infos["failure"][failing].exceptions)
        np.testing.assert_array_equal(infos["built"], observations[:, 1])
        if env_ids is not None:
            await envs.reset()
        observations, *_, infos = await envs.step([0] * NUM_ENVS)
        assert "failure" not in infos or env_ids is not None
        np.testing.assert_array_equal(observations[rows, 0], rows)


@pytest.mark.parametrize("mode", list(AutoresetMode), ids=lambda mode: mode.name)
@pytest.mark.parametrize("moment", ["idle", "call"])
async def test_a_worker_that_ends_between_two_steps(moment: str, mode: AutoresetMode, tmp_path: Path) -> None:
    """The next step tells it, with no step of the new env behind that row."""
    async with asyncio.timeout(BOUND_SECONDS), vector("SIGKILL", tmp_path, mode, 2) as envs:
        await envs.reset()
        await envs.step([0] * NUM_ENVS)
        worker = envs._started.pool.workers[1]  # type: ignore[union-attr]
        if moment == "idle":
            os.kill(worker.pid, signal.SIGKILL)
            await worker.ended.wait()
        else:
            with pytest.raises(WorkerDied, match="during fail"):
                await envs.call("fail", env_ids=[FAILING])
        observations, rewards, _, truncations, infos = await envs.step([0] * NUM_ENVS)
        np.testing.assert_array_equal(rewards, [2, 2, np.nan, np.nan])
        np.testing.assert_array_equal(truncations, [False, False, True, True])
        assert all(isinstance(error, WorkerDied) for error in infos["failure"][2:])
        after = [2, 0] if mode is AutoresetMode.SAME_STEP else [1, 1]
        np.testing.assert_array_equal(observations[2:, 1:], [after] * 2)
        if mode is AutoresetMode.DISABLED:
            await envs.reset(env_ids=[2, 3])
        elif mode is AutoresetMode.NEXT_STEP:
            observations, rewards, *_ = await envs.step([0] * NUM_ENVS)
            np.testing.assert_array_equal(observations[2:, 1:], [[2, 0]] * 2)
        observations, rewards, *_, infos = await envs.step([0] * NUM_ENVS)
        np.testing.assert_array_equal(observations[2:, 1:], [[2, 1]] * 2)
        assert "failure" not in infos


@pytest.mark.parametrize("mode", list(AutoresetMode), ids=lambda mode: mode.name)
@pytest.mark.parametrize("failure", FAILURES)
async def test_a_crash_loop(failure: str, mode: AutoresetMode, tmp_path: Path) -> None:
    """It ends in an error that tells the story; a reset begins anew, with the whole budget."""
    async with asyncio.timeout(2 * BOUND_SECONDS), vector(failure, tmp_path, mode, 2, max_restarts=2) as envs:
        for _ in range(2):
            await envs.reset()
            rows = 0
            with pytest.raises(CrashLoopError) as caught:
                while True:
                    *_, truncations, infos = await envs.step(ACTIONS)
                    rows += bool(infos.get("_failure", np.zeros(NUM_ENVS, bool))[FAILING])
                    if mode is AutoresetMode.DISABLED and truncations.any():
                        await envs.reset(options={"reset_mask": truncations})
            assert rows == 2
            error = caught.value
            assert list(error.env_ids) == lost_envs(envs, failure)
            assert [type(one) for one in error.exceptions] == [FAILURES[failure][1]] * 3
            assert error.__cause__ is error.exceptions[-1]
            assert "failed 3 times without a successful step in between (max_restarts=2)" in str(error)
            assert [one.env_index for one in failures(error)] == list(error.env_ids)
            assert await envs.get_attr("index", env_ids=[0, 1]) == (0, 1)
        await envs.reset()
        for _ in range(3):
            await envs.step([0] * NUM_ENVS)


@pytest.mark.parametrize("failure", ["raise", "SIGKILL"])
async def test_an_env_that_cannot_be_built_anew(failure: str, tmp_path: Path) -> None:
    """Its failures count, too."""
    async with (
        asyncio.timeout(2 * BOUND_SECONDS),
        vector(failure, tmp_path, AutoresetMode.NEXT_STEP, 2, max_restarts=2) as envs,
    ):
        await envs.reset()
        broken = tmp_path / f"log.{FAILING}.broken"
        broken.touch()
        await envs.step(ACTIONS)
        with pytest.raises(CrashLoopError):
            for _ in range(10):
                await envs.step([0] * NUM_ENVS)
        broken.unlink()
        await envs.reset()
        await envs.step([0] * NUM_ENVS)


async def test_a_success_clears_the_budget(tmp_path: Path) -> None:
    """Failures far apart never add up; the generation rises for life."""
    async with (
        asyncio.timeout(2 * BOUND_SECONDS),
        vector("raise", tmp_path, AutoresetMode.NEXT_STEP, 2, max_restarts=1) as envs,
    ):
        await envs.reset()
        for generation in range(1, 5):
            *_, infos = await envs.step(ACTIONS)
            assert infos["generation"][FAILING] == generation
            await envs.step([0] * NUM_ENVS)  # the reset of the new env
            await envs.step([0] * NUM_ENVS)


@pytest.mark.parametrize("failure", ["raise", "SIGKILL"])
async def test_a_cancelled_step_in_which_an_env_fails(failure: str, tmp_path: Path) -> None:
    """It goes on, and a reset discards what it says."""
    bound = 3 * BOUND_SECONDS  # six workers are started, which takes Ray a second each
    async with asyncio.timeout(bound), vector(failure, tmp_path, AutoresetMode.SAME_STEP, 2) as envs:
        await envs.reset()
        for turns in range(6):
            step = asyncio.create_task(envs.step(ACTIONS))
            for _ in range(turns):
                await asyncio.sleep(0.002)
            step.cancel()
            await asyncio.wait([step])
            observations, _ = await envs.reset()
            assert observations[:, 2].tolist() == [0] * NUM_ENVS
            await envs.step([0] * NUM_ENVS)
            observations, *_ = await envs.step([0] * NUM_ENVS)
            assert observations[:2, 2].tolist() == [2, 2]
            await envs.reset()


async def trajectory(make: Callable[[], AsyncVectorEnv], fails: bool) -> Any:
    """Of the CartPoles of the first worker, while those of the second are killed now and then, or not."""
    rows = []
    async with make() as envs:
        observations, _ = await envs.reset(seed=7)
        for step in range(60):
            if fails and step % 20 == 10:
                os.kill(envs._started.pool.workers[1].pid, signal.SIGKILL)  # type: ignore[union-attr]
            observations, rewards, terminations, truncations, _ = await envs.step([step % 2] * 6)
            rows.append((observations[:3], rewards[:3], terminations[:3], truncations[:3]))
    return rows


@pytest.mark.parametrize("mode", list(AutoresetMode)[:2], ids=lambda mode: mode.name)
async def test_envs_of_other_workers_do_not_notice(mode: AutoresetMode) -> None:
    """Their trajectories are the same, bit by bit."""

    def make() -> AsyncVectorEnv:
        env_fns = [functools.partial(gym.make, "CartPole-v1")] * 6
        context = context_of_loop()
        return AsyncVectorEnv(env_fns, num_workers=2, context=context, on_failure="restart", autoreset_mode=mode)

    async with asyncio.timeout(2 * BOUND_SECONDS):
        undisturbed, disturbed = await trajectory(make, False), await trajectory(make, True)
    for before, after in zip(undisturbed, disturbed, strict=True):
        for one, other in zip(before, after, strict=True):
            assert one.tobytes() == other.tobytes()


# ---- several things at once: each of these was found by an attack


async def test_a_new_env_that_fails_beside_a_death(tmp_path: Path) -> None:
    """Each failure is counted once, and each env is reset as often as it needs."""
    log = str(tmp_path / "log")
    env_fns: list[Any] = [functools.partial(Unlucky, raise_an_error, 0, log)]
    env_fns += [functools.partial(Flaky, end_with_sigkill, index, log) for index in (1, 2, 3)]
    vectors = AsyncVectorEnv(
        env_fns, num_workers=2, on_failure="restart", autoreset_mode=AutoresetMode.SAME_STEP, max_restarts=2
    )
    async with asyncio.timeout(BOUND_SECONDS), vectors as envs:
        await envs.reset()
        _, rewards, *_, infos = await envs.step([1, 0, 1, 0])
        np.testing.assert_array_equal(rewards, [np.nan, 1, np.nan, np.nan])
        np.testing.assert_array_equal(infos["generation"], [2, 0, 1, 1])
        observations, rewards, *_, infos = await envs.step([0] * NUM_ENVS)
        np.testing.assert_array_equal(observations[:, 1:], [[3, 1], [1, 2], [2, 1], [2, 1]])
        assert "failure" not in infos


async def test_a_death_behind_an_answer_counts(tmp_path: Path) -> None:
    """The step in which it had answered is no success that came after it."""
    async with (
        asyncio.timeout(2 * BOUND_SECONDS),
        vector("SIGKILL", tmp_path, AutoresetMode.NEXT_STEP, 2, max_restarts=1) as envs,
    ):
        await envs.reset()
        await envs.step(ACTIONS)
        await envs.step([0] * NUM_ENVS)
        worker = envs._started.pool.workers[1]  # type: ignore[union-attr]
        step = asyncio.create_task(envs.step([SLOW, SLOW, 0, 0]))
        while await envs.get_attr("steps", env_ids=[3]) == (0,):
            await asyncio.sleep(0)
        os.kill(worker.pid, signal.SIGKILL)
        await worker.ended.wait()
        observations, *_ = await step
        assert observations[:, 2].tolist() == [3, 3, 1, 1]
        with pytest.raises(CrashLoopError, match="envs 2, 3 failed 2 times"):
            await envs.step([0] * NUM_ENVS)
        await envs.reset()
        await envs.step([0] * NUM_ENVS)


async def test_a_loss_that_a_reset_tells_before_a_cancelled_step_could(tmp_path: Path) -> None:
    """It is told once, by whoever comes first to somebody."""
    async with asyncio.timeout(BOUND_SECONDS), vector("SIGKILL", tmp_path, AutoresetMode.NEXT_STEP, 2) as envs:
        await envs.reset()
        worker = envs._started.pool.workers[1]  # type: ignore[union-attr]
        os.kill(worker.pid, signal.SIGKILL)
        await worker.ended.wait()
        step = asyncio.create_task(envs.step([0] * NUM_ENVS))
        await asyncio.sleep(0)
        step.cancel()
        await asyncio.wait([step])
        _, infos = await envs.reset(env_ids=[2])
        assert isinstance(infos["failure"][0], WorkerDied)
        await envs.reset()
        await envs.step([0] * NUM_ENVS)


@pytest.mark.parametrize("is_dict", [False, True])
async def test_a_death_during_a_reset_behind_a_cancelled_step(is_dict: bool, tmp_path: Path) -> None:
    """The reset that somebody awaits tells it."""
    async with (
        asyncio.timeout(BOUND_SECONDS),
        vector("SIGKILL", tmp_path, AutoresetMode.NEXT_STEP, 2, is_dict=is_dict) as envs,
    ):
        await envs.reset()
        step = asyncio.create_task(envs.step([0, 0, SLOW, 0]))
        await asyncio.sleep(0)
        step.cancel()
        reset = asyncio.create_task(envs.reset(env_ids=[3, 0]))
        await asyncio.sleep(0)
        os.kill(envs._started.pool.workers[1].pid, signal.SIGKILL)  # type: ignore[union-attr]
        observations, infos = await reset
        np.testing.assert_array_equal(numbers(observations), [[3, 2, 0], [0, 1, 0]])
        assert isinstance(infos["failure"][0], WorkerDied)


async def test_an_env_that_is_stuck_while_it_is_built_anew(tmp_path: Path) -> None:
    """In a worker that lives, `start_timeout` bounds it."""
    async with (
        asyncio.timeout(BOUND_SECONDS),
        vector("raise", tmp_path, AutoresetMode.NEXT_STEP, 2, start_timeout=4) as envs,
    ):
        await envs.reset()
        stuck = tmp_path / f"log.{FAILING}.stuck"
        stuck.touch()
        await envs.step(ACTIONS)
        *_, infos = await envs.step([0] * NUM_ENVS)
        assert isinstance(infos["failure"][FAILING], EnvTimeoutError)
        assert infos["failure"][FAILING].command == "build"
        stuck.unlink()
        await envs.reset()
        await envs.step([0] * NUM_ENVS)


@pytest.mark.not_on_ray("an actor that is killed ends soon, not at once")
async def test_a_refused_step_gives_no_env_an_observation() -> None:
    """One that was lost has none to repeat, before and after actions that do not fit."""
    async with (
        asyncio.timeout(BOUND_SECONDS),
        AsyncVectorEnv(
            [Counter] * 2, num_workers=2, on_failure="restart", autoreset_mode=AutoresetMode.DISABLED
        ) as envs,
    ):
        await envs.reset()
        worker = envs._started.pool.workers[0]  # type: ignore[union-attr]
        os.kill(worker.pid, signal.SIGKILL)
        await worker.ended.wait()
        masked = {"reset_mask": np.array([False, True])}
        for _ in range(2):
            with pytest.raises(ResetNeeded):
                await envs.reset(options=masked)
            with pytest.raises(InvalidActionsError):
                await envs.step([0, 0, 0])
        await envs.reset()
