"""A cancelled call: what goes on in the workers, what is owed, and that no answer is ever matched to another call."""

from __future__ import annotations

import asyncio
import functools
import itertools
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest
from fault_envs import BOUND_SECONDS, PASS_GATE, Gate, Gated, GateKey, Recorded, Slow, is_running, turns
from sample_envs import Counter

from aiovec import AlreadyPendingCallError, AsyncVectorEnv, ClosedEnvironmentError, NotStartedError, ResetNeeded
from aiovec.batches import Batches

NUM_ENVS = 3
THE_WAYS_OUT = r"recv\(\).*reset\(\).*close\(\)"

# 3 rows of it are above what is copied: they are lent.
LARGE = 1 << 14


def gated(key: GateKey, at: str = "step", **others: Any) -> list[Any]:
    """Env 1 has the gate, the others never wait."""
    return [
        functools.partial(Gated, key, at=at if index == 1 else "never", offset=index, **others)
        for index in range(NUM_ENVS)
    ]


def rows(*observations: Any) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.array(observations, np.float32)


def pids_of(log: Path) -> list[int]:
    return [int(line.split()[0]) for line in log.read_text().splitlines()] if log.exists() else []


# ---- how a call is cancelled: each gives up as soon as `arrived` says so


async def by_task_cancel(call: Callable[[], Awaitable[Any]], arrived: Callable[[], Awaitable[None]]) -> None:
    async def run() -> None:
        await call()

    task = asyncio.create_task(run())
    await arrived()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def by_asyncio_timeout(call: Callable[[], Awaitable[Any]], arrived: Callable[[], Awaitable[None]]) -> None:
    async def expire() -> None:
        await arrived()
        timeout.reschedule(asyncio.get_running_loop().time())

    expiring = None
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(None) as timeout:
            expiring = asyncio.create_task(expire())
            await call()
    assert expiring is not None
    await expiring


async def by_anyio_scope(call: Callable[[], Awaitable[Any]], arrived: Callable[[], Awaitable[None]]) -> None:
    async def expire() -> None:
        await arrived()
        scope.deadline = anyio.current_time()

    with anyio.move_on_after(BOUND_SECONDS) as scope:
        expiring = asyncio.create_task(expire())
        await call()
    assert scope.cancelled_caught
    await expiring


CANCELLATIONS = {"task.cancel": by_task_cancel, "asyncio.timeout": by_asyncio_timeout, "anyio": by_anyio_scope}
Cancel = Callable[[Callable[[], Awaitable[Any]], Callable[[], Awaitable[None]]], Awaitable[None]]


# ---- step


@pytest.mark.parametrize(
    ("cancel", "num_workers"),
    [(by_task_cancel, 1), (by_task_cancel, 2), (by_asyncio_timeout, 3), (by_anyio_scope, 2)],
)
async def test_a_cancelled_step_is_owed(cancel: Cancel, num_workers: int, gate: Gate) -> None:
    """The next is refused and says the three ways out; `reset` waits it out, and then all counters agree."""
    vector = AsyncVectorEnv(gated(gate.key), num_workers=num_workers)
    async with asyncio.timeout(BOUND_SECONDS), vector as envs:
        await envs.reset()
        await cancel(lambda: envs.step([0, PASS_GATE, 0]), gate.arrived)
        for _ in range(2):
            with pytest.raises(AlreadyPendingCallError, match=THE_WAYS_OUT) as refused:
                await envs.step([0, 0, 0])
            assert refused.value.env_ids == (0, 1, 2)
        reset = asyncio.create_task(envs.reset())
        await turns()
        assert not reset.done()
        with pytest.raises(AlreadyPendingCallError, match="another task awaits"):
            await envs.step([0, 0, 0])
        gate.open()
        observations, infos = await reset
        np.testing.assert_array_equal(observations, rows([0, 2, 0], [1, 2, 0], [2, 2, 0]))
        assert infos["episodes"].tolist() == [2, 2, 2]
        for number in (1, 2):
            observations, rewards, *_, infos = await envs.step([0, 0, 0])
            np.testing.assert_array_equal(observations, rows([0, 2, number], [1, 2, number], [2, 2, number]))
            assert rewards.tolist() == [number] * 3
            assert infos["steps"].tolist() == [number] * 3


@pytest.mark.parametrize("ready", [False, True], ids=["running", "ready"])
async def test_resetting_some_of_the_owed_envs(ready: bool, gate: Gate) -> None:
    """The others stay owed, whether or not the answer has come meanwhile."""
    async with asyncio.timeout(BOUND_SECONDS), AsyncVectorEnv(gated(gate.key), num_workers=3) as envs:
        await envs.reset()
        await by_task_cancel(lambda: envs.step([0, PASS_GATE, 0]), gate.arrived)
        if ready:
            gate.open()
            await envs.get_attr("steps")  # served behind the step
        observations, infos = await envs.reset(env_ids=[2, 0])
        np.testing.assert_array_equal(observations, rows([2, 2, 0], [0, 2, 0]))
        assert infos["episodes"].tolist() == [2, 2]
        with pytest.raises(AlreadyPendingCallError, match=THE_WAYS_OUT) as refused:
            await envs.step([0, 0, 0])
        assert refused.value.env_ids == (1,)
        if not ready:
            gate.open()
        observations, _ = await envs.reset(env_ids=[1])
        np.testing.assert_array_equal(observations, rows([1, 2, 0]))
        observations, rewards, *_ = await envs.step([0, 0, 0])
        np.testing.assert_array_equal(observations, rows([0, 2, 1], [1, 2, 1], [2, 2, 1]))
        assert rewards.tolist() == [1, 1, 1]


async def test_a_reset_mask_does_not_repeat_what_is_owed(gate: Gate) -> None:
    """An owed env outside of the mask has no last observation that its task has seen."""
    async with asyncio.timeout(BOUND_SECONDS), AsyncVectorEnv(gated(gate.key), num_workers=2) as envs:
        await envs.reset()
        await by_task_cancel(lambda: envs.step([0, PASS_GATE, 0]), gate.arrived)
        with pytest.raises(AlreadyPendingCallError, match=THE_WAYS_OUT):
            await envs.reset(options={"reset_mask": np.array([False, True, False])})
        gate.open()
        observations, _ = await envs.reset(options={"reset_mask": np.array([True, True, True])})
        np.testing.assert_array_equal(observations, rows([0, 2, 0], [1, 2, 0], [2, 2, 0]))


@pytest.mark.parametrize("shared_memory", [True, False])
@pytest.mark.parametrize("size", [3, LARGE], ids=["copied", "lent"])
async def test_no_answer_is_matched_to_another_call(size: int, shared_memory: bool, gate: Gate) -> None:
    """Many cancelled calls one after the other: observation, reward and info always agree, and old batches hold."""
    vector = AsyncVectorEnv(gated(gate.key, size=size), num_workers=2, shared_memory=shared_memory)
    async with asyncio.timeout(BOUND_SECONDS), vector as envs:
        await envs.reset()
        kept: list[tuple[Any, Any]] = []
        for episode in range(2, 14):
            cancelled = 1 + episode % 3
            for number in range(1, cancelled):
                await envs.step([0, 0, 0])
                assert await envs.get_attr("steps") == (number,) * 3
            await by_task_cancel(lambda: envs.step([0, PASS_GATE, 0]), gate.arrived)
            if episode % 2:
                gate.open()
                await envs.call("work", 0)
                observations, infos = await envs.reset()
            else:
                reset = asyncio.create_task(envs.reset())
                await turns(3)
                gate.open()
                observations, infos = await reset
            np.testing.assert_array_equal(observations[:, :3], rows([0, episode, 0], [1, episode, 0], [2, episode, 0]))
            assert infos["episodes"].tolist() == [episode] * 3
            observations, rewards, *_, infos = await envs.step([0, 0, 0])
            np.testing.assert_array_equal(observations[:, :3], rows([0, episode, 1], [1, episode, 1], [2, episode, 1]))
            assert observations[:, -1].tolist() == [1, 1, 1]
            assert rewards.tolist() == [1, 1, 1]
            assert infos["steps"].tolist() == [1, 1, 1]
            kept.append((observations, observations.copy()))
            await envs.reset(env_ids=[0])  # each step of the next round is number 1 again
            await envs.reset()
            for env_index in range(NUM_ENVS):
                await envs.set_attr("episodes", episode, env_ids=[env_index])
        for observations, copy in kept:
            np.testing.assert_array_equal(observations, copy)


async def test_a_cancelled_step_that_fails(gate: Gate) -> None:
    """`reset` discards the failure too; nobody is told of it later."""
    async with asyncio.timeout(BOUND_SECONDS), AsyncVectorEnv(gated(gate.key), num_workers=3) as envs:
        await envs.reset()
        await by_task_cancel(lambda: envs.step([1, PASS_GATE, 0]), gate.arrived)
        with pytest.raises(AlreadyPendingCallError):
            await envs.step([0, 0, 0])
        gate.open()
        await envs.reset()
        observations, *_ = await envs.step([0, 0, 0])
        np.testing.assert_array_equal(observations, rows([0, 2, 1], [1, 2, 1], [2, 2, 1]))


async def test_a_step_cancelled_before_it_began() -> None:
    """A task that never ran has asked for nothing."""
    async with asyncio.timeout(BOUND_SECONDS), AsyncVectorEnv(gated(GateKey("", "")), num_workers=2) as envs:
        await envs.reset()
        task = asyncio.create_task(envs.step([0, 0, 0]))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        observations, *_ = await envs.step([0, 0, 0])
        np.testing.assert_array_equal(observations, rows([0, 1, 1], [1, 1, 1], [2, 1, 1]))


async def test_a_step_cancelled_at_any_turn_of_the_loop() -> None:
    """It was answered, or it is owed: nothing between, also when answer and cancellation meet."""
    env_fns = gated(GateKey("", ""))
    async with asyncio.timeout(BOUND_SECONDS), AsyncVectorEnv(env_fns, num_workers=2) as envs:
        for num_turns, spin_seconds in itertools.product(range(8), (0, 0.0002, 0.002)):
            await envs.reset()
            done = await envs.get_attr("episodes")
            task = asyncio.create_task(envs.step([0, 0, 0]))
            await turns(num_turns)
            time.sleep(spin_seconds)  # the loop does not look while the answer comes
            task.cancel()
            try:
                observations, *_ = await task
            except asyncio.CancelledError:
                if num_turns:
                    with pytest.raises(AlreadyPendingCallError, match=THE_WAYS_OUT):
                        await envs.step([0, 0, 0])
            else:
                assert observations[:, 2].tolist() == [1, 1, 1]
            observations, infos = await envs.reset()
            assert infos["episodes"].tolist() == [number + 1 for number in done]
            observations, rewards, *_ = await envs.step([0, 0, 0])
            assert observations[:, 2].tolist() == [1, 1, 1]
            assert rewards.tolist() == [1, 1, 1]


@pytest.mark.blocks_loop
async def test_a_timeout_around_a_step_that_takes_real_time_in_process() -> None:
    """Without workers the loop's thread steps: the time-out is noticed afterwards, and the step is owed or done."""
    env_fns = [functools.partial(Slow, 0.05), functools.partial(Slow, 0.05)]
    async with asyncio.timeout(BOUND_SECONDS), AsyncVectorEnv(env_fns, num_workers=0) as envs:
        await envs.reset()
        await envs.set_attr("step", _slow_step)
        try:
            async with asyncio.timeout(0.01):
                await envs.step([0, 0])
        except TimeoutError:
            with pytest.raises(AlreadyPendingCallError, match=THE_WAYS_OUT):
                await envs.step([0, 0])
        observations, _ = await envs.reset()
        assert observations[:, 2].tolist() == [0, 0]


def _slow_step(_action: Any) -> Any:
    time.sleep(0.05)
    return np.zeros(3, np.float32), 1.0, False, False, {}


# ---- reset and call


@pytest.mark.parametrize(
    ("cancel", "env_ids"),
    [(by_task_cancel, None), (by_task_cancel, [1, 2]), (by_asyncio_timeout, None), (by_anyio_scope, [1, 2])],
)
async def test_a_cancelled_reset_is_owed(cancel: Cancel, env_ids: list[int] | None, gate: Gate) -> None:
    """The next `reset` waits it out."""
    async with asyncio.timeout(BOUND_SECONDS), AsyncVectorEnv(gated(gate.key, at="reset"), num_workers=3) as envs:
        await envs.reset()
        await envs.step([0, 0, 0])
        await cancel(lambda: envs.reset(options={"gate": True}, env_ids=env_ids), gate.arrived)
        with pytest.raises(AlreadyPendingCallError, match=THE_WAYS_OUT) as refused:
            await envs.step([0, 0, 0])
        assert refused.value.env_ids == ((0, 1, 2) if env_ids is None else (1, 2))
        reset = asyncio.create_task(envs.reset())
        await turns()
        assert not reset.done()
        gate.open()
        observations, infos = await reset
        first = 3 if env_ids is None else 2
        np.testing.assert_array_equal(observations, rows([0, first, 0], [1, 3, 0], [2, 3, 0]))
        assert infos["episodes"].tolist() == [first, 3, 3]
        observations, rewards, *_ = await envs.step([0, 0, 0])
        np.testing.assert_array_equal(observations, rows([0, first, 1], [1, 3, 1], [2, 3, 1]))
        assert rewards.tolist() == [1, 1, 1]


@pytest.mark.parametrize("cancel", CANCELLATIONS.values(), ids=CANCELLATIONS.keys())
async def test_a_cancelled_call_owes_nothing(cancel: Cancel, gate: Gate) -> None:
    """Its answer is dropped; what was asked later gets its own."""
    async with asyncio.timeout(BOUND_SECONDS), AsyncVectorEnv(gated(gate.key, at="work"), num_workers=2) as envs:
        await envs.reset()
        await cancel(lambda: envs.call("work", "cancelled"), gate.arrived)
        later = asyncio.create_task(envs.call("work", "later"))
        step = asyncio.create_task(envs.step([0, 0, 0]))
        await turns()
        assert not later.done()
        assert not step.done()
        gate.open(2)
        assert await later == (("later", 0),) * 3
        observations, *_ = await step
        np.testing.assert_array_equal(observations, rows([0, 1, 1], [1, 1, 1], [2, 1, 1]))
        assert await envs.render() == (1, 1, 1)


async def test_calls_of_other_tasks_are_served_behind_a_running_step(gate: Gate) -> None:
    """Any task, any time, in order; calls to a worker that is free do not wait for another."""
    async with asyncio.timeout(BOUND_SECONDS), AsyncVectorEnv(gated(gate.key), num_workers=3) as envs:
        await envs.reset()
        step = asyncio.create_task(envs.step([0, PASS_GATE, 0]))
        await gate.arrived()
        first = asyncio.create_task(envs.call("work", "first"))
        setting = asyncio.create_task(envs.set_attr("steps", 10))
        rendering = asyncio.create_task(envs.render())
        getting = asyncio.create_task(envs.get_attr("steps"))
        assert await envs.get_attr("offset", env_ids=[2, 0]) == (2, 0)
        waiting = (step, first, setting, rendering, getting)
        assert not any(task.done() for task in waiting)
        gate.open()
        observations, *_ = await step
        np.testing.assert_array_equal(observations, rows([0, 1, 1], [1, 1, 1], [2, 1, 1]))
        assert await first == (("first", 1),) * 3
        await setting
        assert await rendering == (10, 10, 10)
        assert await getting == (10, 10, 10)
        observations, *_ = await envs.step([0, 0, 0])
        assert observations[:, 2].tolist() == [11, 11, 11]


# ---- start


async def test_a_start_cancelled_at_any_turn_of_the_loop(tmp_path: Path) -> None:
    """Nothing is left, and the same vector can be started again."""
    log = tmp_path / "log"
    envs = AsyncVectorEnv([functools.partial(Recorded, str(log), index) for index in range(2)], num_workers=2)
    async with asyncio.timeout(BOUND_SECONDS):
        for num_turns in (0, 1, 2, 3, 5, 10, 20, 50, 200, 1000):
            task = asyncio.create_task(envs.reset())
            await turns(num_turns)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert not envs.closed
            with pytest.raises(NotStartedError):
                await envs.step([0, 0])
            assert not any(is_running(pid) for pid in pids_of(log))
        before = len(pids_of(log))
        observations, _ = await envs.reset()
        np.testing.assert_array_equal(observations, rows([0, 1, 0], [1, 1, 0]))
        assert len(pids_of(log)) == before + 2
        await envs.close()


@pytest.mark.not_on_ray("an actor that is killed ends soon, not at once")
@pytest.mark.parametrize(
    ("cancel", "start"),
    [(by_task_cancel, "reset"), (by_asyncio_timeout, "__aenter__"), (by_anyio_scope, "reset")],
)
async def test_a_start_cancelled_while_envs_are_built(start: str, cancel: Cancel, gate: Gate) -> None:
    """One env is built, one is not: both workers are gone."""
    envs = AsyncVectorEnv(gated(gate.key, at="init"), num_workers=2)
    async with asyncio.timeout(BOUND_SECONDS):
        await cancel(getattr(envs, start), gate.arrived)
        assert not envs.closed
        with pytest.raises(NotStartedError):
            envs.action_space
        gate.open()  # the one of before is gone: this is for the next
        async with envs:
            await gate.arrived()
            observations, _ = await envs.reset()
            np.testing.assert_array_equal(observations, rows([0, 1, 0], [1, 1, 0], [2, 1, 0]))


async def test_two_tasks_that_start_the_same_vector(tmp_path: Path) -> None:
    """One start serves both: exactly `num_envs` constructions."""
    log = tmp_path / "log"
    envs = AsyncVectorEnv([functools.partial(Recorded, str(log), index) for index in range(3)], num_workers=2)
    async with asyncio.timeout(BOUND_SECONDS):
        await asyncio.gather(envs.__aenter__(), envs.__aenter__(), _awaited(envs))
        assert len(pids_of(log)) == 3
        await envs.reset()
        await envs.close()


async def _awaited(envs: AsyncVectorEnv) -> AsyncVectorEnv:
    return await envs


async def test_two_first_resets_at_the_same_time(gate: Gate) -> None:
    """Both start the vector, one resets it, the other is refused: not a hang, not two resets."""
    envs = AsyncVectorEnv(gated(gate.key, at="init"), num_workers=2)
    async with asyncio.timeout(BOUND_SECONDS):
        resets = [asyncio.create_task(envs.reset()) for _ in range(2)]
        await gate.arrived()
        gate.open()
        results = await asyncio.gather(*resets, return_exceptions=True)
        assert [type(result) for result in results] == [tuple, AlreadyPendingCallError]
        assert await envs.get_attr("episodes") == (1, 1, 1)
        await envs.close()


async def test_a_start_goes_on_while_one_task_still_waits_for_it(gate: Gate) -> None:
    """One of two gives up: the other's start is not harmed."""
    envs = AsyncVectorEnv(gated(gate.key, at="init"), num_workers=2)
    async with asyncio.timeout(BOUND_SECONDS):
        one, other = (asyncio.create_task(_awaited(envs)) for _ in range(2))
        await gate.arrived()
        one.cancel()
        with pytest.raises(asyncio.CancelledError):
            await one
        assert not other.done()
        gate.open()
        assert await other is envs
        await envs.reset()
        await envs.close()


@pytest.mark.not_on_ray("an actor that is killed ends soon, not at once")
async def test_a_start_is_cancelled_when_the_last_task_gives_up(gate: Gate) -> None:
    """Both give up: nothing goes on behind their backs."""
    envs = AsyncVectorEnv(gated(gate.key, at="init"), num_workers=2)
    async with asyncio.timeout(BOUND_SECONDS):
        tasks = [asyncio.create_task(_awaited(envs)) for _ in range(2)]
        await gate.arrived()
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(result) for result in results] == [asyncio.CancelledError] * 2
        with pytest.raises(NotStartedError):
            await envs.step([0, 0, 0])
        gate.open()
        await envs.reset()
        await envs.close()


@pytest.mark.parametrize("end", ["close", "terminate"])
async def test_close_while_it_starts(end: str, gate: Gate) -> None:
    """The task that waits for the start is told; nothing is left, and the vector is closed for good."""
    envs = AsyncVectorEnv(gated(gate.key, at="init"), num_workers=2)
    async with asyncio.timeout(BOUND_SECONDS):
        start = asyncio.create_task(_awaited(envs))
        await gate.arrived()
        if end == "close":
            await envs.close()
        else:
            envs.terminate()
        with pytest.raises(ClosedEnvironmentError, match=r"await.*Build a new one"):
            await start
        assert envs.closed
        with pytest.raises(ClosedEnvironmentError):
            await envs.reset()


# ---- close


@pytest.mark.parametrize("cancel", CANCELLATIONS.values(), ids=CANCELLATIONS.keys())
async def test_a_cancelled_close_ends_anyway(cancel: Cancel, gate: Gate, tmp_path: Path) -> None:
    """The caller sees the end, and then its own cancellation."""
    log = tmp_path / "closed"
    async with asyncio.timeout(BOUND_SECONDS):
        envs = await AsyncVectorEnv(gated(gate.key, at="close", log=str(log)), num_workers=2)

        async def arrived() -> None:
            await gate.arrived()
            asyncio.get_running_loop().call_later(0.05, gate.open)  # after the cancellation

        await cancel(envs.close, arrived)
        assert envs.closed
        assert sorted(log.read_text().splitlines()) == ["close 0", "close 1", "close 2"]
        await envs.close()


async def test_a_cancelled_close_of_a_stuck_env_is_bounded(gate: Gate) -> None:
    """After `close_grace` the worker is ended."""
    async with asyncio.timeout(BOUND_SECONDS):
        envs = await AsyncVectorEnv(gated(gate.key, at="close"), num_workers=2, close_grace=0.2)
        started = time.monotonic()
        await by_task_cancel(envs.close, gate.arrived)
        assert time.monotonic() - started < 5
        assert envs.closed


@pytest.mark.parametrize(("end", "num_workers"), [("close", 1), ("close", 3), ("close at once", 2), ("terminate", 2)])
async def test_close_during_a_running_step(end: str, num_workers: int, gate: Gate) -> None:
    """The task that awaits the step is told that the vector is closed; a stuck env does not keep it open."""
    async with asyncio.timeout(BOUND_SECONDS):
        envs = await AsyncVectorEnv(gated(gate.key), num_workers=num_workers, close_grace=0.2)
        await envs.reset()
        step = asyncio.create_task(envs.step([0, PASS_GATE, 0]))
        call = asyncio.create_task(envs.call("work", 0))
        change = asyncio.create_task(envs.set_attr("size", 3))
        await gate.arrived()
        if end == "terminate":
            envs.terminate()
        else:
            await envs.close(terminate=end == "close at once")
        for task, name in ((step, "step()"), (call, "work()"), (change, "set_attr('size')")):
            with pytest.raises(ClosedEnvironmentError) as caught:
                await task
            assert str(caught.value).startswith(f"{name} on a vector environment that is closed")
        with pytest.raises(ClosedEnvironmentError):
            await envs.step([0, 0, 0])


async def test_close_lets_a_step_end_that_ends_in_time(gate: Gate, tmp_path: Path) -> None:
    """The envs get to close themselves, behind what they are doing."""
    log = tmp_path / "closed"
    async with asyncio.timeout(BOUND_SECONDS):
        envs = await AsyncVectorEnv(gated(gate.key, log=str(log)), num_workers=2)
        await envs.reset()
        step = asyncio.create_task(envs.step([0, PASS_GATE, 0]))
        await gate.arrived()
        close = asyncio.create_task(envs.close())
        await turns()
        assert not close.done()
        gate.open()
        await close
        assert sorted(log.read_text().splitlines()) == ["close 0", "close 1", "close 2"]
        try:
            observations, *_ = await step
        except ClosedEnvironmentError:
            pass
        else:
            assert observations[:, 2].tolist() == [1, 1, 1]


async def test_close_after_a_cancelled_step(gate: Gate) -> None:
    """One of the three ways out, also when the env never comes back."""
    async with asyncio.timeout(BOUND_SECONDS):
        envs = await AsyncVectorEnv(gated(gate.key), num_workers=2, close_grace=0.2)
        await envs.reset()
        await by_task_cancel(lambda: envs.step([0, PASS_GATE, 0]), gate.arrived)
        await envs.close()
        assert envs.closed


@pytest.mark.parametrize("num_workers", [0, 2])
async def test_two_closes_at_the_same_time(num_workers: int, tmp_path: Path) -> None:
    """They share one: every env is closed once."""
    log = tmp_path / "closed"
    async with asyncio.timeout(BOUND_SECONDS):
        vector = AsyncVectorEnv(gated(GateKey("", ""), log=str(log)), num_workers=num_workers)
        envs = await vector
        await asyncio.gather(envs.close(), envs.close(), envs.aclose())
        assert envs.closed
        assert sorted(log.read_text().splitlines()) == ["close 0", "close 1", "close 2"]


async def test_one_of_two_closes_is_cancelled(gate: Gate) -> None:
    """The other ends well."""
    async with asyncio.timeout(BOUND_SECONDS):
        envs = await AsyncVectorEnv(gated(gate.key, at="close"), num_workers=2)
        one, other = asyncio.create_task(envs.close()), asyncio.create_task(envs.close())
        await gate.arrived()
        one.cancel()
        await turns()
        gate.open()
        with pytest.raises(asyncio.CancelledError):
            await one
        await other


async def test_terminate_during_close(gate: Gate) -> None:
    """Ends what waits; the close that runs returns."""
    async with asyncio.timeout(BOUND_SECONDS):
        envs = await AsyncVectorEnv(gated(gate.key, at="close"), num_workers=2, close_grace=10)
        started = time.monotonic()
        close = asyncio.create_task(envs.close())
        await gate.arrived()
        envs.terminate()
        await close
        assert time.monotonic() - started < 5


async def test_async_with_inside_a_cancelled_scope_still_closes(gate: Gate) -> None:
    """Cancelling the whole training leaves nothing, with native and with anyio's cancellation."""
    async with asyncio.timeout(BOUND_SECONDS):
        for cancel in CANCELLATIONS.values():
            seen: list[AsyncVectorEnv] = []

            async def train(seen: list[AsyncVectorEnv] = seen) -> None:
                async with AsyncVectorEnv(gated(gate.key), num_workers=2, close_grace=0.2) as envs:
                    seen.append(envs)
                    await envs.reset()
                    await envs.step([0, PASS_GATE, 0])

            await cancel(train, gate.arrived)
            assert seen[0].closed


# ---- nothing of this is a state of its own


async def test_a_failed_env_stays_failed_when_a_step_is_refused(gate: Gate) -> None:
    """Owed goes before failed; after a part reset the rest is as it was."""
    async with asyncio.timeout(BOUND_SECONDS), AsyncVectorEnv(gated(gate.key, at="reset"), num_workers=3) as envs:
        await envs.reset()
        with pytest.raises(ValueError, match="An error occurred"):
            await envs.step([1, 0, 0])
        await by_task_cancel(lambda: envs.reset(options={"gate": True}, env_ids=[1]), gate.arrived)
        with pytest.raises(AlreadyPendingCallError, match=THE_WAYS_OUT) as refused:
            await envs.step([0, 0, 0])
        assert refused.value.env_ids == (1,)
        gate.open()
        await envs.reset(env_ids=[1])
        with pytest.raises(ResetNeeded) as needed:
            await envs.step([0, 0, 0])
        assert needed.value.env_ids == (0,)
        await envs.reset(env_ids=[0])
        observations, *_ = await envs.step([0, 0, 0])
        np.testing.assert_array_equal(observations, rows([0, 2, 1], [1, 3, 1], [2, 1, 2]))


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("on_failure", ["raise", "restart"])
async def test_whatever_goes_wrong_in_the_parent_leaves_no_env_awaited(
    num_workers: int, on_failure: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Ctrl-C while a batch is put together, above all: nobody has seen that step, so a reset is needed."""

    def interrupted(*_args: Any) -> Any:
        raise KeyboardInterrupt

    env_fns = [functools.partial(Counter, length=100)] * 4
    async with AsyncVectorEnv(env_fns, num_workers=num_workers, on_failure=on_failure) as envs:
        await envs.reset()
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(Batches, "_gather", interrupted)
            patched.setattr(Batches, "_settle", interrupted)
            await envs.step(np.zeros(4, np.int64))
        with pytest.raises(ResetNeeded, match="was interrupted"):
            await envs.step(np.zeros(4, np.int64))
        await envs.reset()
        assert (await envs.step(np.zeros(4, np.int64)))[1].tolist() == [1.0] * 4
