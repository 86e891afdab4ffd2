"""`statistics()`, and what is done meanwhile for a call that waits for long: a log line, and the loop is woken."""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import threading
from typing import Any

import pytest
from fault_envs import BOUND_SECONDS, PASS_GATE, Gate, Gated
from sample_envs import Counter, Raises

from aiovec import AsyncVectorEnv, ClosedEnvironmentError, NotStartedError
from aiovec.pool import slow_calls

WAYS = {
    "workers": {"num_workers": 2},
    "threads": {"num_workers": 2, "threads_per_worker": 2},
    "not shared": {"num_workers": 1, "shared_memory": False},
    "in process": {"num_workers": 0},
}


@pytest.mark.parametrize("way", WAYS)
async def test_what_was_done_is_counted(way: str) -> None:
    """Batches, part batches and single envs; every env was timed, and the times fit together."""
    options: dict[str, Any] = WAYS[way]
    async with AsyncVectorEnv([functools.partial(Counter, length=1000)] * 4, **options) as envs:
        await envs.reset()
        before = envs.statistics()
        assert (before.steps, before.pending, before.restarts) == (0, (), 0)
        for _ in range(20):
            await envs.step([0] * 4)
        await envs.send([0, 0], [1, 3])
        await envs.recv(min_envs=2)
        await envs[2].step(0)
        after = envs.statistics()
    assert after.steps == 20 * 4 + 2 + 1
    assert len(after.env_last_seconds) == len(after.env_mean_seconds) == 4
    assert min(after.env_last_seconds) > 0
    assert min(after.env_mean_seconds) > 0
    assert after.env_seconds > 0
    assert before.waiting_seconds < after.waiting_seconds < BOUND_SECONDS
    assert 0 <= after.overhead < 1
    assert json.loads(json.dumps(after.as_dict()))["steps"] == after.steps
    assert str(after).startswith("83 steps; ")


async def test_what_is_pending_is_named(gate: Gate, on_ray: bool) -> None:
    """The env that is in its step, and no other; and all that are asked where none is."""
    env_fns = [functools.partial(Gated, gate.key, offset=index) for index in range(4)]
    async with asyncio.timeout(BOUND_SECONDS), AsyncVectorEnv(env_fns, num_workers=2) as envs:
        await envs.reset()
        step = asyncio.create_task(envs.step([0, PASS_GATE, 0, 0]))
        await gate.arrived()
        call = asyncio.create_task(envs.get_attr("offset", env_ids=[0]))
        await asyncio.sleep(0)
        while on_ray and envs.statistics().pending[0].env_ids != (1,):  # an actor is asked once a second
            await asyncio.sleep(0.005)
        stuck, behind = envs.statistics().pending
        assert stuck.env_ids[0] == 1  # the other worker may not have answered yet
        assert stuck.command == "step"
        assert 0 < stuck.seconds < BOUND_SECONDS
        assert behind.command == "offset"
        assert "step has waited for env" in str(envs.statistics())
        gate.open()
        await step
        assert await call == (0,)
        assert envs.statistics().pending == ()


async def test_a_worker_that_has_ended_is_not_waited_for(gate: Gate) -> None:
    """Although it has woken nobody, since the other one has not."""
    env_fns = [functools.partial(Gated, gate.key, offset=index) for index in range(4)]
    async with asyncio.timeout(BOUND_SECONDS), AsyncVectorEnv(env_fns, num_workers=2) as envs:
        await envs.reset()
        step = asyncio.create_task(envs.step([0, PASS_GATE, 0, 0]))
        await gate.arrived()
        while envs.statistics().pending[0].env_ids != (1,):
            await asyncio.sleep(0.005)
        gate.open()
        await step


async def test_restarts_are_counted() -> None:
    async with AsyncVectorEnv([Raises] * 3, num_workers=1, on_failure="restart") as envs:
        await envs.reset()
        await envs.step([0, 1, 0])
        assert envs.statistics().restarts == 1
        assert "; 1 restarts" in str(envs.statistics())


async def test_a_call_that_waits_for_long_is_logged_once(
    gate: Gate, caplog: pytest.LogCaptureFixture, on_ray: bool
) -> None:
    """With the env that it waits for."""
    env_fns = [functools.partial(Gated, gate.key, offset=index) for index in range(3)]
    async with asyncio.timeout(BOUND_SECONDS), AsyncVectorEnv(env_fns, num_workers=1) as envs:
        assert envs.slow_call_seconds == 10
        envs.slow_call_seconds = 0.01
        await envs.reset()
        step = asyncio.create_task(envs.step([0, 0, PASS_GATE]))
        await gate.arrived()
        while not caplog.records:
            await asyncio.sleep(0.05)
        slow_calls._look_at_all()  # it is found again
        gate.open()
        await step
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("aiovec", logging.WARNING)
    # An actor was not asked before.
    assert record.getMessage().startswith(f"step has waited for {'envs 0-2' if on_ray else 'env 2'} for ")


@pytest.mark.timeout(BOUND_SECONDS)
def test_the_loop_is_woken_while_a_call_is_pending(gate: Gate) -> None:
    """So that what only a signal's handler has put on it is done. No heartbeat here, nor `asyncio.timeout`: they wake it."""

    async def wait_for_what_comes_without_a_wake() -> None:
        async with AsyncVectorEnv([functools.partial(Gated, gate.key)], num_workers=1) as envs:
            await envs.reset()
            step = asyncio.create_task(envs.step([PASS_GATE]))
            await gate.arrived()
            came = asyncio.Event()
            handler = threading.Timer(
                0.1, asyncio.get_running_loop().call_soon, [came.set]
            )  # not thread-safe, as theirs
            handler.start()
            await came.wait()
            handler.join()
            gate.open()
            await step

    asyncio.run(wait_for_what_comes_without_a_wake())


async def test_before_the_start_and_after_the_end() -> None:
    envs = AsyncVectorEnv([Counter], num_workers=0)
    with pytest.raises(NotStartedError, match="statistics"):
        envs.statistics()
    await envs
    assert (envs.statistics().waiting_seconds, envs.statistics().overhead) == (0, 0)  # the start is no work
    await envs.close()
    with pytest.raises(ClosedEnvironmentError, match="statistics"):
        envs.statistics()
