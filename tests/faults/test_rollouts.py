"""What goes wrong in a rollout: who is told, what is owed afterwards, and that the next one is right."""

from __future__ import annotations

import asyncio
import functools
import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fault_envs import (
    BOUND_SECONDS,
    PASS_GATE,
    Faulty,
    Gate,
    Gated,
    GateKey,
    Mortal,
    an_error,
    context_of_loop,
    end_with_sigkill,
    hang_in_c,
    turns,
)
from flaky_envs import Flaky, raise_an_error
from gymnasium.vector import AutoresetMode
from sample_envs import Counter

import aiovec
from aiovec import (
    AlreadyPendingCallError,
    AsyncVectorEnv,
    ClosedEnvironmentError,
    CrashLoopError,
    EnvTimeoutError,
    InvalidActionsError,
    InvalidExtrasError,
    ResetNeeded,
    SlabMemoryError,
    WorkerDied,
    failures,
)

NUM_ENVS = 4
LONG = functools.partial(Counter, 1000)
WAYS = [(num_workers, shared, groups) for num_workers in (0, 1, 2) for shared in (True, False) for groups in (1, 2)]
ways = pytest.mark.parametrize(("num_workers", "shared", "groups"), WAYS)


def zeros(observations: Any) -> Any:
    return np.zeros(len(observations), np.int64)


def acting(call: int, action: int, row: int = 0) -> Callable[[Any], Any]:
    """A policy that in one call gives one row another action than 0."""
    calls = 0

    def policy(observations: Any) -> Any:
        nonlocal calls
        actions = zeros(observations)
        if calls == call:
            actions[row] = action
        calls += 1
        return actions

    return policy


def gated(key: GateKey) -> list[Any]:
    return [functools.partial(Gated, key, offset=env_index) for env_index in range(NUM_ENVS)]


async def assert_goes_on(envs: AsyncVectorEnv, groups: int = 1) -> None:
    """After a reset the next rollout, the same again in groups, and a step are those of new episodes."""
    await envs.reset()
    first = await envs.rollout(zeros, 3, groups=groups)
    second = await envs.rollout(zeros, 2)
    assert first.observations[:, :, 2].tolist() == [[step] * len(envs) for step in range(4)]
    assert second.observations[:, :, 2].tolist() == [[step] * len(envs) for step in range(3, 6)]
    assert (await envs.step(np.zeros(len(envs), np.int64)))[0][:, 2].tolist() == [6] * len(envs)


# ---- envs


@ways
async def test_an_env_that_raises(num_workers: int, shared: bool, groups: int) -> None:
    """Its exception, with its place; the envs of its step have theirs for `recv`, what was under way is owed."""
    async with asyncio.timeout(BOUND_SECONDS):
        env_fns = [functools.partial(Faulty, "step", an_error)] * NUM_ENVS
        async with AsyncVectorEnv(env_fns, num_workers=num_workers, shared_memory=shared) as envs:
            await envs.reset()
            call = 3 * groups + groups - 1  # the last group's fourth
            with pytest.raises(ValueError, match=r"An error occurred\.") as caught:
                await envs.rollout(acting(call, 1), 8, groups=groups)
            (failure,) = failures(caught.value)
            assert failure.command == "step"
            assert failure.env_index == (0 if groups == 1 else 2 if num_workers < 2 else 1)
            with pytest.raises((AlreadyPendingCallError, ResetNeeded)):
                await envs.rollout(zeros, 2, groups=groups)
            rest = []
            async for batch in envs.batches():
                rest += zip(batch.env_ids.tolist(), batch.observations[:, 2].tolist(), strict=True)
            # The other group had been asked for one more step.
            ahead = {env_index for env_index in range(NUM_ENVS) if groups == 2 and not in_group_of(failure, env_index)}
            expected = [(i, 5.0 if i in ahead else 4.0) for i in range(NUM_ENVS) if i != failure.env_index]
            assert sorted(rest) == expected
            with pytest.raises(ResetNeeded):
                await envs.rollout(zeros, 2)
            await assert_goes_on(envs, groups)


def in_group_of(failure: aiovec.Failure, env_index: int) -> bool:
    """With two groups: of one worker the halves, of two workers every second env."""
    assert failure.env_index is not None
    return (
        env_index // 2 == failure.env_index // 2 if failure.env_index == 2 else env_index % 2 == failure.env_index % 2
    )


async def test_envs_of_both_workers_in_one_group() -> None:
    """Several in one step are a group of exceptions."""

    def policy(observations: Any) -> Any:
        return (observations[:, 2] == 2).astype(np.int64)

    async with asyncio.timeout(BOUND_SECONDS):
        async with AsyncVectorEnv([functools.partial(Faulty, "step", an_error)] * NUM_ENVS, num_workers=2) as envs:
            await envs.reset()
            with pytest.raises(ExceptionGroup) as caught:
                await envs.rollout(policy, 8, groups=2)
            assert [failure.env_index for failure in failures(caught.value)] == [0, 2]
            await assert_goes_on(envs, 2)


# ---- cancelled


@ways
async def test_a_cancelled_rollout(gate: Gate, num_workers: int, shared: bool, groups: int) -> None:
    """Nothing is returned, what was under way is owed, and no answer meets another call."""
    if num_workers == 0:
        pytest.skip("an env at its gate holds the loop itself")
    async with asyncio.timeout(BOUND_SECONDS):
        async with AsyncVectorEnv(gated(gate.key), num_workers=num_workers, shared_memory=shared) as envs:
            await envs.reset()
            task = asyncio.create_task(envs.rollout(acting(2 * groups, PASS_GATE), 8, groups=groups))
            await gate.arrived()
            with pytest.raises(AlreadyPendingCallError):
                await envs.step(np.zeros(NUM_ENVS, np.int64))
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            with pytest.raises(AlreadyPendingCallError, match=r"recv\(\).*reset\(\).*close\(\)"):
                await envs.rollout(zeros, 1)
            gate.open()
            rows: dict[int, float] = {}
            async for batch in envs.batches():
                rows.update(zip(batch.env_ids.tolist(), batch.observations[:, 2].tolist(), strict=True))
            assert rows[0] == 3.0
            # The other group may not have been asked for as many steps yet when the first one came to the gate.
            assert set(rows.values()) <= ({3.0} if groups == 1 else {2.0, 3.0})
            rollout = await envs.rollout(zeros, 2, groups=groups)  # goes on from there
            assert {env_index: rollout.observations[0, env_index, 2] for env_index in rows} == rows
            await assert_goes_on(envs, groups)
            assert "free=0" not in repr(envs._started.pool.rollout_strips)  # type: ignore[union-attr]


async def test_a_cancelled_rollout_is_waited_out_by_reset(gate: Gate) -> None:
    """Its memory is not given to the next one before nobody writes there."""
    async with asyncio.timeout(BOUND_SECONDS):
        async with AsyncVectorEnv(gated(gate.key), num_workers=2, max_buffers=1) as envs:
            await envs.reset()
            task = asyncio.create_task(envs.rollout(acting(1, PASS_GATE), 8, groups=2))
            await gate.arrived()
            task.cancel()
            await asyncio.wait([task])
            resetting = asyncio.create_task(envs.reset())
            await turns()
            assert not resetting.done()
            gate.open()
            await resetting
            await assert_goes_on(envs, 2)


async def test_a_vector_is_closed_with_a_cancelled_rollout_under_way(gate: Gate) -> None:
    """The other group's step was never awaited by itself: nobody is to miss what becomes of it."""
    async with asyncio.timeout(BOUND_SECONDS):
        async with AsyncVectorEnv(gated(gate.key), num_workers=2, close_grace=0.2) as envs:
            await envs.reset()
            task = asyncio.create_task(envs.rollout(lambda _: np.full(2, PASS_GATE), 8, groups=2))
            await gate.arrived(2)
            await turns(3)
            task.cancel()
            await asyncio.wait([task])
    del task
    gc.collect()
    await turns(3)  # what was never retrieved is told now, and fails the test


async def test_a_policy_may_be_cancelled() -> None:
    """While it awaits; the envs of the other group are owed."""
    is_waiting = asyncio.Event()

    async def policy(observations: Any) -> Any:
        if observations[0, 2] == 2:
            is_waiting.set()
            await asyncio.sleep(BOUND_SECONDS)
        return zeros(observations)

    async with asyncio.timeout(BOUND_SECONDS):
        async with AsyncVectorEnv([LONG] * NUM_ENVS, num_workers=2) as envs:
            await envs.reset()
            task = asyncio.create_task(envs.rollout(policy, 8, groups=2))
            await is_waiting.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            batch = await envs.recv(min_envs=2)
            assert batch.env_ids.tolist() in ([1, 3], [3, 1])
            assert batch.observations[:, 2].tolist() == [2, 2]
            await assert_goes_on(envs, 2)


# ---- the policy


POLICIES: dict[str, tuple[Any, type[Exception], str]] = {
    "raises": (lambda: 1 / 0, ZeroDivisionError, "division by zero"),
    "too few actions": (lambda: np.zeros(1, np.int64), InvalidActionsError, r"actions: expected shape \(2,\)"),
    "of another kind": (lambda: np.zeros(2, np.float32), InvalidActionsError, "got shape .* of float32"),
    "nothing": (lambda: None, InvalidActionsError, "actions: expected shape"),
    "three": (lambda: (1, 2, 3), InvalidActionsError, "or a pair of it and extras, got a tuple of length 3"),
    "no extras": (lambda: np.zeros(2, np.int64), InvalidExtrasError, "expected float64 of shape .*, got nothing"),
    "wrong extras": (lambda: (np.zeros(2, np.int64), np.zeros(3)), InvalidExtrasError, r"float64 of shape \(2,\)"),
}


@pytest.mark.parametrize("what", POLICIES)
@pytest.mark.parametrize("num_workers", [0, 2])
async def test_a_policy_that_is_wrong(what: str, num_workers: int) -> None:
    """Its own exception, or one that says what was expected; no env is lost."""
    wrong, error, message = POLICIES[what]
    calls = 0

    def policy(observations: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 6:
            return wrong()
        return (zeros(observations), np.zeros(2)) if "extras" in what else zeros(observations)

    async with asyncio.timeout(BOUND_SECONDS):
        async with AsyncVectorEnv([LONG] * NUM_ENVS, num_workers=num_workers) as envs:
            await envs.reset()
            with pytest.raises(error, match=message):
                await envs.rollout(policy, 8, groups=2)
            batch = await envs.recv(min_envs=2)  # of the group that was under way
            assert batch.observations[:, 2].tolist() == [3, 3]
            await assert_goes_on(envs, 2)


@pytest.mark.parametrize("wrong_at", [1, 2, 3])
@pytest.mark.parametrize("wrong", [np.zeros(3, np.int64), (1, 2, 3)])
async def test_wrong_actions_say_whether_an_env_was_stepped(wrong: Any, wrong_at: int) -> None:
    """Behind the first group of the first step some were."""
    calls = 0

    def policy(observations: Any) -> Any:
        nonlocal calls
        calls += 1
        return wrong if calls == wrong_at else zeros(observations)

    async with asyncio.timeout(BOUND_SECONDS), AsyncVectorEnv([LONG] * NUM_ENVS, num_workers=0) as envs:
        await envs.reset()
        with pytest.raises(InvalidActionsError) as caught:
            await envs.rollout(policy, 8, groups=2)
        assert str(caught.value).endswith("No env was stepped.") is (wrong_at == 1)
        assert ("steps before them were taken" in str(caught.value)) is (wrong_at > 1)
        if wrong_at > 1:
            await envs.recv(min_envs=2)
        await assert_goes_on(envs, 2)


async def test_a_policy_cannot_drive_the_vector_itself() -> None:
    """All envs are the rollout's until its end."""

    async def policy(observations: Any) -> Any:
        with pytest.raises(AlreadyPendingCallError):
            await envs.step(np.zeros(NUM_ENVS, np.int64))
        with pytest.raises(AlreadyPendingCallError):
            await envs.rollout(zeros, 1)
        with pytest.raises(AlreadyPendingCallError):
            await envs[3].step(0)
        with pytest.raises(AlreadyPendingCallError):
            await envs.reset()
        assert (await envs.call("get_wrapper_attr", "steps")) is not None  # any time, behind what is running
        return zeros(observations)

    async with asyncio.timeout(BOUND_SECONDS):
        async with AsyncVectorEnv([LONG] * NUM_ENVS, num_workers=2) as envs:
            await envs.reset()
            await envs.rollout(policy, 3, groups=2)
            await assert_goes_on(envs, 2)


# ---- bad arguments


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((zeros, 0), ValueError, "num_steps=0: expected a number of steps from 1"),
        ((zeros, 2.5), ValueError, "num_steps=2.5"),
        ((zeros, True), ValueError, "num_steps=True"),
        ((None, 4), TypeError, "policy=None: expected a function"),
        ((zeros, 4, 0), ValueError, "groups=0: expected a number of groups, 1 to 2"),
        ((zeros, 4, 3), ValueError, "groups=3.*each worker must have an env in each group"),
        ((zeros, 1 << 40), SlabMemoryError, r"no memory for the [\d,]+ bytes"),
    ],
)
async def test_bad_arguments(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    """Before anything is started; nothing is changed."""
    policy, num_steps, *groups = arguments
    async with asyncio.timeout(BOUND_SECONDS):
        async with AsyncVectorEnv([LONG] * NUM_ENVS, num_workers=2) as envs:
            await envs.reset()
            with pytest.raises(error, match=message):
                await envs.rollout(policy, num_steps, **{"groups": groups[0]} if groups else {})
            rollout = await envs.rollout(zeros, 2)
            assert rollout.observations[:, 0, 2].tolist() == [0, 1, 2]


async def test_before_a_reset_and_without_autoreset() -> None:
    async with asyncio.timeout(BOUND_SECONDS):
        async with AsyncVectorEnv([LONG] * 2, num_workers=1) as envs:
            with pytest.raises(ResetNeeded):
                await envs.rollout(zeros, 2)
            await envs.reset()
            assert len((await envs.rollout(zeros, 2)).infos) == 2
        with pytest.raises(ClosedEnvironmentError):
            await envs.rollout(zeros, 2)
        async with AsyncVectorEnv([LONG] * 2, num_workers=1, autoreset_mode=AutoresetMode.DISABLED) as envs:
            await envs.reset()
            with pytest.raises(ValueError, match="autoreset_mode=DISABLED"):
                await envs.rollout(zeros, 2)
            await envs.step([0, 0])


# ---- the vector ends


@pytest.mark.parametrize("how", ["close", "terminate"])
@pytest.mark.parametrize("groups", [1, 2])
async def test_the_vector_ends_under_a_rollout(gate: Gate, how: str, groups: int) -> None:
    """Who waits is told; nothing is left."""
    async with asyncio.timeout(BOUND_SECONDS):
        envs = AsyncVectorEnv(gated(gate.key), num_workers=2, close_grace=0.2)
        await envs.reset()
        task = asyncio.create_task(envs.rollout(acting(3, PASS_GATE), 8, groups=groups))
        await gate.arrived()
        if how == "close":
            await envs.close()
        else:
            envs.terminate()
        with pytest.raises((ClosedEnvironmentError, WorkerDied)):
            await task


@pytest.mark.parametrize("how_long", [0, 1, 2, 4, 8])
async def test_a_rollout_goes_on_while_the_vector_is_being_closed(how_long: int) -> None:
    """Its answers still come, since workers end in order; it asks for nothing more."""

    async def policy(observations: Any) -> Any:
        nonlocal closing
        if observations[0, 2] == 3 and closing is None:
            closing = asyncio.create_task(envs.close())
        if closing is not None:
            await turns(how_long)
        return zeros(observations)

    async with asyncio.timeout(BOUND_SECONDS):
        closing: asyncio.Task[None] | None = None
        envs = AsyncVectorEnv([LONG] * NUM_ENVS, num_workers=2, context=context_of_loop())
        await envs.reset()
        with pytest.raises(ClosedEnvironmentError):
            await envs.rollout(policy, 1000, groups=2)
        assert closing is not None
        await closing


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("calls", [1, 2, 5])
async def test_a_policy_may_close_the_vector(num_workers: int, calls: int) -> None:
    """In the first step, with another group under way, or later."""
    left = calls

    async def policy(observations: Any) -> Any:
        nonlocal left
        left -= 1
        if not left:
            await envs.close()
        return zeros(observations)

    async with asyncio.timeout(BOUND_SECONDS):
        envs = AsyncVectorEnv([LONG] * NUM_ENVS, num_workers=num_workers, context=context_of_loop())
        await envs.reset()
        with pytest.raises(ClosedEnvironmentError):
            await envs.rollout(policy, 8, groups=2)


async def test_the_vector_ends_while_its_memory_grows() -> None:
    """The thread that reserves it has a descriptor of its own."""
    async with asyncio.timeout(BOUND_SECONDS):
        for _ in range(5):
            envs = AsyncVectorEnv([LONG] * NUM_ENVS, num_workers=1, context=context_of_loop())
            await envs.reset()
            task = asyncio.create_task(envs.rollout(zeros, 20_000))
            await turns(3)
            envs.terminate()
            with pytest.raises((ClosedEnvironmentError, asyncio.CancelledError)):
                await task


async def test_the_vector_ends_while_memory_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rollout, which had not begun, is told."""
    async with asyncio.timeout(BOUND_SECONDS):
        envs = AsyncVectorEnv([LONG] * NUM_ENVS, num_workers=2, context=context_of_loop())
        await envs.reset()
        monkeypatch.setattr("aiovec.rollouts.pin", lambda _memory: envs.terminate())
        with pytest.raises(ClosedEnvironmentError):
            await envs.rollout(zeros, 3, pin_memory=True)


# ---- deaths


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("how", ["SIGKILL", "stuck"])
async def test_a_worker_that_dies(tmp_path: Path, how: str, shared: bool, groups: int) -> None:
    """At once, with its envs; a reset builds them anew, and the next rollout has both workers in step."""
    end = end_with_sigkill if how == "SIGKILL" else hang_in_c
    env_fns = [functools.partial(Mortal, end, "step", env_index == 3) for env_index in range(NUM_ENVS)]
    async with asyncio.timeout(BOUND_SECONDS):
        async with AsyncVectorEnv(env_fns, num_workers=2, shared_memory=shared, step_timeout=0.6) as envs:
            await envs.reset()
            with pytest.raises((WorkerDied, EnvTimeoutError)) as caught:
                await envs.rollout(acting(2 * groups + groups - 1, 1, row=3 // groups), 8, groups=groups)
            assert {failure.env_index for failure in failures(caught.value)} >= {3}
            for _ in range(2):
                await envs.reset()
                rollout = await envs.rollout(zeros, 30, groups=groups)
                assert rollout.observations[1, :, 2].tolist() == [1] * NUM_ENVS
                assert np.all(rollout.rewards[rollout.autoresets] == 0)


# ---- without a reset of the user


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("how", ["raises", "dies"])
async def test_a_failed_env_is_built_anew_within_a_rollout(
    tmp_path: Path, how: str, groups: int, mode: AutoresetMode
) -> None:
    """Its row says so; what it bears, and what comes next, is as in `step`. Also at the border of two rollouts."""
    failing = raise_an_error if how == "raises" else end_with_sigkill
    for fails_at in (1, 3, 4):  # the last one is the last step of the first rollout
        log = tmp_path / f"{how}{fails_at}"
        env_fns = [functools.partial(Flaky, failing, index, str(log)) for index in range(NUM_ENVS)]
        async with asyncio.timeout(BOUND_SECONDS):
            async with AsyncVectorEnv(
                env_fns, num_workers=2, on_failure="restart", autoreset_mode=mode, context=context_of_loop()
            ) as envs:
                await envs.reset()
                row = 2 // groups  # env 2: the first of the second worker
                policy = acting(groups * fails_at, 1, row)
                first = await envs.rollout(policy, 5, groups=groups)
                second = await envs.rollout(zeros, 4, groups=groups)
        rewards = np.concatenate([first.rewards, second.rewards])
        autoresets = np.concatenate([first.autoresets, second.autoresets])
        observations = np.concatenate([first.observations[:-1], second.observations])
        infos = (*first.infos, *second.infos)
        lost = [2, 3] if how == "dies" else [2]
        for env_index in range(NUM_ENVS):
            if env_index not in lost:
                assert observations[:, env_index, 2].tolist() == list(range(10))
                continue
            failed = np.flatnonzero(np.isnan(rewards[:, env_index]))
            assert len(failed) == 1
            (step,) = failed
            # Of a worker that dies, the group that was under way tells it then, the other one with its next step.
            assert step in ((fails_at,) if env_index == 2 or groups == 1 else (fails_at - 1, fails_at))
            assert infos[step]["_failure"][env_index]
            assert isinstance(infos[step]["failure"][env_index], ValueError if how == "raises" else WorkerDied)
            assert infos[step]["generation"][env_index] == 1
            if mode is AutoresetMode.NEXT_STEP:
                assert observations[step + 1, env_index].tolist() == observations[step, env_index].tolist()
                assert observations[step + 2 :, env_index, 2].tolist() == list(range(8 - step))
                assert np.flatnonzero(autoresets[:, env_index]).tolist() == [step + 1]
            else:
                assert observations[step + 1 :, env_index, 2].tolist() == list(range(9 - step))
                assert infos[step]["final_obs"][env_index].tolist() == observations[step, env_index].tolist()
                assert not autoresets.any()
        assert np.array_equal(first.observations[-1], second.observations[0])


async def test_an_env_that_fails_too_often_ends_the_rollout(tmp_path: Path) -> None:
    """The story of all its failures; the others are owed, or there for `recv`."""
    env_fns = [functools.partial(Flaky, raise_an_error, index, str(tmp_path / "log")) for index in range(NUM_ENVS)]

    def policy(observations: Any) -> Any:
        return (observations[:, 0] == 3).astype(np.int64)  # env 3 fails in each step that is no reset

    async with asyncio.timeout(BOUND_SECONDS):
        async with AsyncVectorEnv(env_fns, num_workers=2, on_failure="restart", max_restarts=2) as envs:
            await envs.reset()
            with pytest.raises(CrashLoopError) as caught:
                await envs.rollout(policy, 50, groups=2)
            assert [failure.env_index for failure in failures(caught.value)] == [3]
            await envs.reset()
            assert not np.isnan((await envs.rollout(zeros, 5, groups=2)).rewards).any()


# ---- memory


@pytest.mark.not_on_ray("no memory is shared")
async def test_no_memory_for_another_lent_batch_is_no_failure(caplog: pytest.LogCaptureFixture) -> None:
    """Then batches are copied, which is said once."""
    import resource

    env_fns = [functools.partial(Gated, GateKey("", ""), at="never", size=1 << 16)] * NUM_ENVS
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    async with asyncio.timeout(BOUND_SECONDS):
        async with AsyncVectorEnv(env_fns, num_workers=1, max_buffers=50) as envs:
            await envs.reset()
            resource.setrlimit(resource.RLIMIT_FSIZE, (os.fstat(envs._started.pool.memory.fd).st_size, hard))  # type: ignore[union-attr]
            try:
                kept = []
                for _ in range(8):
                    kept.append((await envs.step(np.zeros(NUM_ENVS, np.int64)))[0])
                    await asyncio.sleep(0.02)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            assert [int(observations[0, 2]) for observations in kept] == list(range(1, 9))
    assert [record.message.split(":")[0] for record in caplog.records] == ["large batches are copied from now on"]


async def test_the_ring_grows_on_demand_to_its_bound() -> None:
    """Every kept batch stays; so many are the shared memory itself, the others copies."""
    env_fns = [functools.partial(Gated, GateKey("", ""), at="never", size=1 << 15)] * NUM_ENVS
    async with asyncio.timeout(BOUND_SECONDS):
        async with AsyncVectorEnv(env_fns, num_workers=2, max_buffers=5) as envs:
            kept = [(await envs.reset())[0]]
            for _ in range(20):
                kept.append((await envs.step(np.zeros(NUM_ENVS, np.int64)))[0])
                await asyncio.sleep(0.02)  # it grows in a thread
            assert [int(observations[3, 2]) for observations in kept] == list(range(21))
            assert sum(observations.base is not None for observations in kept) == 5
            assert repr(envs._started.pool.ring) == "<Ring free=0 of 5>"  # type: ignore[union-attr]


async def test_a_worker_that_takes_a_dead_ones_place_has_the_memory_that_was_added() -> None:
    """Strips of rollouts and of lent batches."""
    env_fns = [functools.partial(Mortal, end_with_sigkill, "step", env_index == 3) for env_index in range(NUM_ENVS)]
    async with asyncio.timeout(BOUND_SECONDS):
        async with AsyncVectorEnv(env_fns, num_workers=2) as envs:
            await envs.reset()
            kept = [await envs.rollout(zeros, steps, groups=2) for steps in (3, 5, 9)]
            with pytest.raises(WorkerDied):
                await envs.step([0, 0, 0, 1])
            await envs.reset()
            del kept
            for steps in (9, 5, 3, 12):
                assert len((await envs.rollout(zeros, steps, groups=2)).rewards) == steps
