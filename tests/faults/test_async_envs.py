"""Async envs that fail, hang, are cancelled, die or are left behind."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import async_envs
import numpy as np
import pytest
from async_envs import (
    FAIL,
    WAIT,
    AsyncCounter,
    AsyncFaulty,
    AsyncFlaky,
    AsyncGated,
    Awaited,
    BlocksAtGate,
    BlocksInATask,
    ClosesBadly,
    ClosesNever,
    EndsIts,
    FailsInTasks,
    Forgetful,
    OwnTimeout,
    Swallows,
    WaitsForEver,
    build_later,
    raise_lookup_error,
)
from fault_envs import (
    BOUND_SECONDS,
    Gate,
    Mortal,
    TwoArguments,
    an_error,
    end_with_sigkill,
    error_with_everything,
    group_of_its_own,
    hang_in_c,
    hang_in_python,
    segfault,
    turns,
)
from gymnasium.vector import AutoresetMode
from sample_envs import Counter

from aiovec import (
    AlreadyPendingCallError,
    AsyncVectorEnv,
    ClosedEnvironmentError,
    CrashLoopError,
    EnvTimeoutError,
    InvalidEnvResultError,
    RemoteError,
    ResetNeeded,
    WorkerDied,
    failures,
)

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

NUM_WORKERS = pytest.mark.parametrize("num_workers", [0, 1])


def of(*env_fns: Any, num_workers: int = 1, **options: Any) -> AsyncVectorEnv:
    """A vector of these; a class has its index as offset."""
    made = [partial(env_fn, offset=index) for index, env_fn in enumerate(env_fns)]
    return AsyncVectorEnv(made, num_workers=num_workers, context="fork" if num_workers else None, **options)


def lines(log: Path) -> list[str]:
    return log.read_text().splitlines() if log.exists() else []


async def until(condition: Callable[[], Any]) -> None:
    """Looks again and again, where there is no event to wait for."""
    async with asyncio.timeout(BOUND_SECONDS):
        while not condition():
            await asyncio.sleep(0.005)


# ---- what envs raise


@NUM_WORKERS
@pytest.mark.parametrize("moment", ["init", "reset", "step", "render", "work", "close"])
async def test_an_error_is_told_as_itself(moment: str, num_workers: int) -> None:
    """With its frames, and none of ours between the await and the env."""
    with pytest.raises(TwoArguments) as caught:
        vector = of(AsyncCounter, partial(AsyncFaulty, moment, error_with_everything), num_workers=num_workers)
        async with asyncio.timeout(BOUND_SECONDS), vector as envs:
            await envs.reset(options={"fail": True})
            if moment == "step":
                await envs.step([0, FAIL])
            if moment in ("render", "work"):
                await envs.call(moment)
    error: Any = caught.value
    assert (error.what, error.code) == ("a socket", 7)
    assert isinstance(error.__cause__, KeyError)
    (failure,) = failures(error)
    assert failure.env_index == 1
    assert (failure.pid == os.getpid()) is (num_workers == 0)
    frames = [entry for entry in caught.traceback if "/aiovec/worker/" in str(entry.path)]
    assert not frames
    assert [entry for entry in caught.traceback if str(entry.path) == async_envs.__file__]


@NUM_WORKERS
async def test_a_failed_env_needs_a_reset_and_the_others_have_their_row(num_workers: int) -> None:
    env_fns = [partial(AsyncFaulty, "step", an_error)] * 3
    async with asyncio.timeout(BOUND_SECONDS), of(*env_fns, num_workers=num_workers) as envs:
        await envs.reset()
        with pytest.raises(ExceptionGroup) as caught:
            await envs.step([FAIL, 0, FAIL])
        assert [failure.env_index for failure in failures(caught.value)] == [0, 2]
        batch = await envs.recv()
        assert batch.env_ids.tolist() == [1]
        with pytest.raises(ResetNeeded):
            await envs.step([0, 0, 0])
        await envs.reset(env_ids=[2, 0])
        assert (await envs.step([0, 0, 0]))[1].tolist() == [1, 2, 1]


WRAPPED: list[tuple[BaseException, str]] = [
    (KeyboardInterrupt("own"), "KeyboardInterrupt"),
    (SystemExit(3), "SystemExit"),
    (StopIteration("own"), "RuntimeError"),  # as Python does to any coroutine
    (asyncio.CancelledError("own"), "CancelledError"),
    (TimeoutError("own"), "TimeoutError"),
    (GeneratorExit("own"), "GeneratorExit"),
]


@pytest.mark.parametrize(("error", "name"), WRAPPED, ids=[type(error).__name__ for error, _ in WRAPPED])
@NUM_WORKERS
async def test_errors_that_would_stop_or_cancel_others_are_told(
    error: BaseException, name: str, num_workers: int
) -> None:
    """Wrapped, where a task may not raise them; the worker and the env's task live."""
    if num_workers == 0 and isinstance(error, KeyboardInterrupt):
        pytest.skip("there it is a real one")
    vector = of(
        partial(AsyncFaulty, "step", partial(_itself, error)),
        AsyncCounter,
        num_workers=num_workers,
        step_timeout=60,
    )
    async with asyncio.timeout(BOUND_SECONDS), vector as envs:
        await envs.reset()
        with pytest.raises(Exception) as caught:
            await envs.step([FAIL, 0])
        raised = caught.value
        assert not isinstance(raised, EnvTimeoutError)
        told = raised.__cause__ if isinstance(raised, RemoteError) else raised
        assert type(told).__name__ == name
        assert not isinstance(told, Exception) or told is raised
        await envs.reset(env_ids=[0])
        assert (await envs.step([0, 0]))[1].tolist() == [1, 2]


def _itself(error: BaseException) -> BaseException:
    return error


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
async def test_an_error_in_a_task_of_an_env(error: type[BaseException]) -> None:
    """Of a group as its group, without frames of ours in any part; of the two that end a loop as it is."""
    async with asyncio.timeout(BOUND_SECONDS), of(partial(FailsInTasks, error), AsyncCounter) as envs:
        await envs.reset()
        with pytest.raises(Exception) as caught:
            await envs.step([FAIL, 0])
        raised: Any = caught.value
        if error is ValueError:
            assert type(raised) is ExceptionGroup
            (inner,) = raised.exceptions
            assert type(inner) is ValueError
            names = [frame.name for frame in traceback.extract_tb(inner.__traceback__)]
            assert names == ["child"]
        else:
            assert type(raised.__cause__) is error
        assert [failure.env_index for failure in failures(raised)] == [0]
        await envs.reset(env_ids=[0])
        assert (await envs.step([0, 0]))[1].tolist() == [1, 2]


@NUM_WORKERS
async def test_groups_of_envs_and_groups_of_ours(num_workers: int) -> None:
    env_fns = [partial(AsyncFaulty, "step", group_of_its_own), partial(AsyncFaulty, "step", an_error)]
    async with asyncio.timeout(BOUND_SECONDS), of(*env_fns, num_workers=num_workers) as envs:
        await envs.reset()
        with pytest.raises(ExceptionGroup) as caught:
            await envs.step([FAIL, FAIL])
        assert [type(failure.exception) for failure in failures(caught.value)] == [ExceptionGroup, ValueError]


@pytest.mark.parametrize("moment", ["reset", "step", "work", "close"])
@pytest.mark.parametrize("beside", [Counter, AsyncCounter])
@NUM_WORKERS
async def test_a_plain_env_that_would_have_to_be_awaited(
    moment: str, beside: Any, num_workers: int, capfd: pytest.CaptureFixture[str]
) -> None:
    """A clear error instead of a coroutine that nobody awaits."""
    with pytest.raises(InvalidEnvResultError, match=r"env 0 .*coroutine.*aiovec\.AsyncEnv"):
        async with of(partial(Forgetful, moment), beside, num_workers=num_workers) as envs:
            await envs.reset()
            if moment == "step":
                await envs.step([FAIL, 0])
            if moment == "work":
                await envs.call("work", env_ids=[0])
    gc.collect()
    assert "never awaited" not in capfd.readouterr().err


@NUM_WORKERS
async def test_an_env_fn_that_would_have_to_be_awaited(num_workers: int, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(TypeError, match=r"env_fns\[0\] returned a coroutine"):
        await AsyncVectorEnv([build_later], num_workers=num_workers)
    gc.collect()
    assert "never awaited" not in capfd.readouterr().err


# ---- the start


@pytest.mark.parametrize("num_workers", [0, 1, 2])
async def test_a_start_that_fails_closes_what_was_built(
    num_workers: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Under await."""
    log = tmp_path / "log"
    bad = partial(AsyncFaulty, "init", an_error)
    with pytest.raises(ValueError, match="An error occurred"):
        await of(partial(AsyncCounter, log=str(log)), Counter, bad, num_workers=num_workers)
    if num_workers != 2:  # the second worker may be ended while it builds
        assert lines(log) == ["close 0"]
    assert "never awaited" not in capfd.readouterr().err
    assert not [task for task in asyncio.all_tasks() if task.get_name().startswith("aiovec")]


async def test_a_limit_that_cannot_be_kept_is_refused_at_the_start() -> None:
    """And the same without the sync env is taken."""
    with pytest.raises(ValueError, match=r"step_timeout=5 with num_workers=0"):
        await of(AsyncCounter, Counter, num_workers=0, step_timeout=5)
    await turns()
    assert not [task for task in asyncio.all_tasks() if task.get_name().startswith("aiovec")]
    async with of(AsyncCounter, AsyncCounter, num_workers=0, step_timeout=5) as envs:
        await envs.reset()


# ---- time-outs


@NUM_WORKERS
@pytest.mark.parametrize("moment", ["step", "work"])
async def test_too_long_is_a_time_out_of_that_env_alone(moment: str, num_workers: int, tmp_path: Path) -> None:
    """Its `finally` has run, its worker lives, and so do the others."""
    log = tmp_path / "log"
    vector = of(AsyncCounter, partial(WaitsForEver, log=str(log)), num_workers=num_workers, step_timeout=0.2)
    async with asyncio.timeout(BOUND_SECONDS), vector as envs:
        await envs.reset()
        pids = await envs.get_attr("pid")
        with pytest.raises(EnvTimeoutError) as caught:
            await (envs.step([0, WAIT]) if moment == "step" else envs.call("work", WAIT))
        error = caught.value
        assert (error.env_ids, error.lost_env_ids, error.seconds) == ((1,), (), 0.2)
        assert [failure.env_index for failure in failures(error)] == [1]
        assert error.__cause__ is not None
        assert "waits" not in str(error)
        assert lines(log) == ["begin 1", "end 1"]
        if moment == "step":
            assert (await envs.recv()).env_ids.tolist() == [0]
            with pytest.raises(ResetNeeded):
                await envs.step([0, 0])
            await envs.reset(env_ids=[1])
        await envs.step([0, 0])
        assert await envs.get_attr("pid") == pids


@NUM_WORKERS
async def test_a_time_out_of_the_envs_own_is_its_own(num_workers: int) -> None:
    async with asyncio.timeout(BOUND_SECONDS), of(OwnTimeout, num_workers=num_workers, step_timeout=60) as envs:
        await envs.reset()
        with pytest.raises(TimeoutError) as caught:
            await envs.step([FAIL])
        assert type(caught.value) is TimeoutError


STUCK: dict[str, Any] = {
    "blocks the loop in Python": partial(EndsIts, hang_in_python),
    "blocks the loop in C": partial(EndsIts, hang_in_c),
    "blocks the loop in a task": BlocksInATask,
    "swallows the cancellation": Swallows,
}


@pytest.mark.parametrize("how", STUCK)
async def test_a_stuck_env_is_named_and_ended_with_its_worker(how: str, on_ray: bool) -> None:
    """By the parent; all envs of the worker are built anew, async ones again."""
    vector = of(AsyncCounter, STUCK[how], Counter, step_timeout=0.4, close_grace=0.2)
    async with asyncio.timeout(BOUND_SECONDS), vector as envs:
        await envs.reset()
        with pytest.raises(EnvTimeoutError) as caught:
            await envs.step([0, FAIL, 0])
        assert caught.value.lost_env_ids == (0, 1, 2)
        # An actor that is in C does not say in which env.
        assert caught.value.env_ids == ((0, 1, 2) if on_ray and how == "blocks the loop in C" else (1,))
        await envs.reset()
        *_, infos = await envs.step([0, 0, 0])
        assert infos["steps"].tolist() == [1, 1, 1]


async def test_an_env_that_blocks_its_loop_does_not_block_the_sync_envs_of_its_worker(gate: Gate) -> None:
    """They have a thread of their own, and what they are asked for reaches it."""
    async with asyncio.timeout(BOUND_SECONDS), of(partial(BlocksAtGate, gate.key), Counter) as envs:
        await envs.reset()
        await envs.send([WAIT], [0])
        await gate.arrived()
        for step in range(1, 4):
            observation, *_ = await envs[1].step(0)
            assert observation.tolist() == [1, 1, step]
        gate.open()
        assert (await envs.recv()).env_ids.tolist() == [0]


async def test_many_envs_that_wait_are_not_stuck() -> None:
    """Each is counted for itself: all together they take longer than one may."""
    async with asyncio.timeout(BOUND_SECONDS), of(*[AsyncCounter] * 64, step_timeout=0.5) as envs:
        await envs.reset()
        for _ in range(20):
            await envs.step([0] * 64)


# ---- cancellation


async def cancelled_at_the_gate(envs: AsyncVectorEnv, gate: Gate, call: Any, count: int = 1) -> None:
    """A call whose task is cancelled once so many of its envs are at the gate."""
    task = asyncio.create_task(call)
    await gate.arrived(count)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize("num_workers", [0, 1, 2])
async def test_the_callers_cancellation_does_not_reach_an_env(num_workers: int, gate: Gate, tmp_path: Path) -> None:
    """It goes on, and its row is owed."""
    log = tmp_path / "log"
    env_fns = [partial(AsyncGated, gate.key, str(log))] * 2
    async with asyncio.timeout(BOUND_SECONDS), of(*env_fns, num_workers=num_workers) as envs:
        await envs.reset()
        await cancelled_at_the_gate(envs, gate, envs.step([WAIT, 0]))
        with pytest.raises(AlreadyPendingCallError):
            await envs.step([0, 0])
        assert lines(log) == []
        gate.open()
        batch = await envs.recv(min_envs=2)
        assert sorted(batch.env_ids) == [0, 1]
        assert batch.rewards.tolist() == [1, 1]
        assert lines(log) == ["passed 0"]


@pytest.mark.parametrize("num_workers", [0, 1, 2])
@pytest.mark.parametrize("moment", ["step", "reset"])
async def test_a_reset_of_an_owed_env_reaches_it(num_workers: int, moment: str, gate: Gate, tmp_path: Path) -> None:
    """As a cancellation: its `finally` has run before it is reset. Who is not meant goes on."""
    log = tmp_path / "log"
    env_fns = [partial(AsyncGated, gate.key, str(log), moment)] * 2
    async with asyncio.timeout(BOUND_SECONDS), of(*env_fns, num_workers=num_workers) as envs:
        await envs.reset()
        call = envs.step([WAIT, WAIT]) if moment == "step" else envs.reset(options={"gate": True})
        await cancelled_at_the_gate(envs, gate, call, 2)
        observations, _ = await envs.reset(env_ids=[1], seed=3)
        assert observations.tolist() == [[1, 2, 0]]
        assert lines(log) == ["cancelled 1"]
        gate.open()
        batch = await envs.recv()
        assert batch.env_ids.tolist() == [0]
        assert sorted(lines(log)) == ["cancelled 1", "passed 0"]
        assert (await envs.step([0, 0]))[0][:, 2].tolist() == [2 if moment == "step" else 1, 1]


@NUM_WORKERS
async def test_a_reset_of_all_that_is_owed(num_workers: int, gate: Gate, tmp_path: Path) -> None:
    """Again and again, sent or awaited; a call is not ended by it, but waited out."""
    log = tmp_path / "log"
    env_fns = [partial(AsyncGated, gate.key, str(log))] * 3
    async with asyncio.timeout(BOUND_SECONDS), of(*env_fns, num_workers=num_workers) as envs:
        await envs.reset()
        for number in range(3):
            await envs.send([WAIT, WAIT], env_ids=[0, 2])
            await gate.arrived(2)
            observations, _ = await envs.reset()
            assert observations[:, 1].tolist() == [number + 2] * 3
            assert sorted(lines(log)[-2:]) == ["cancelled 0", "cancelled 2"]
            assert (await envs.step([0, 0, 0]))[1].tolist() == [1, 1, 1]


@NUM_WORKERS
async def test_a_reset_does_not_end_a_call(num_workers: int, gate: Gate, tmp_path: Path) -> None:
    log = tmp_path / "log"
    vector = of(partial(AsyncGated, gate.key, str(log), "work"), num_workers=num_workers)
    async with asyncio.timeout(BOUND_SECONDS), vector as envs:
        await envs.reset()
        call = asyncio.create_task(envs.call("work", 5))
        await gate.arrived()
        reset = asyncio.create_task(envs.reset())
        await turns()
        assert lines(log) == []
        gate.open()
        assert await call == ((5, 0),)
        await reset


@pytest.mark.parametrize("num_workers", [0, 1, 2])
@pytest.mark.parametrize("moment", ["step", "reset", "work"])
async def test_a_close_reaches_an_env(num_workers: int, moment: str, gate: Gate, tmp_path: Path) -> None:
    """As a cancellation: its `finally` has run, and then its `close`, when it returns. Who waits is told."""
    log = tmp_path / "log"
    env_fns = [partial(AsyncGated, gate.key, str(log), moment), partial(AsyncCounter, log=str(log))]
    envs = of(*env_fns, num_workers=num_workers)
    async with asyncio.timeout(BOUND_SECONDS):
        await envs.reset()
        calls = {
            "step": lambda: envs.step([WAIT, 0]),
            "reset": lambda: envs.reset(options={"gate": True}),
            "work": lambda: envs.call("work"),
        }
        task = asyncio.create_task(calls[moment]())
        await gate.arrived()
        await envs.close()
        with pytest.raises(ClosedEnvironmentError, match=r"^(step\(\)|reset\(\)|work\(\)|call\('work'\)) on"):
            await task
    assert sorted(lines(log)) == ["cancelled 0", "close 0", "close 1"]
    assert lines(log).index("cancelled 0") < lines(log).index("close 0")


# ---- close


@pytest.mark.parametrize("bad", [ClosesBadly, partial(AsyncFaulty, "close", partial(ValueError, "does not close"))])
@pytest.mark.parametrize("num_workers", [0, 1, 2])
async def test_a_close_that_raises(num_workers: int, bad: Any, tmp_path: Path) -> None:
    """At once or behind an await: it is told, and the others are closed."""
    log = tmp_path / "log"
    envs = of(bad, partial(AsyncCounter, log=str(log)), num_workers=num_workers)
    async with asyncio.timeout(BOUND_SECONDS):
        await envs.reset()
        with pytest.raises(ValueError, match="does not close") as caught:
            await envs.close()
    assert [failure.env_index for failure in failures(caught.value)] == [0]
    assert lines(log) == ["close 1"]
    assert envs.closed


@pytest.mark.parametrize("num_workers", [0, 1, 2])
async def test_a_close_that_hangs_is_bounded(num_workers: int, tmp_path: Path) -> None:
    log = tmp_path / "log"
    env_fns = [partial(ClosesNever, log=str(log)), partial(AsyncCounter, log=str(log))]
    envs = of(*env_fns, num_workers=num_workers, close_grace=0.2)
    async with asyncio.timeout(BOUND_SECONDS):
        await envs.reset()
        await envs.close()
        await turns()
    assert sorted(lines(log))[:2] == ["close 1", "closing 0"]
    assert ("end 0" in lines(log)) is (num_workers == 0)  # the worker's own end is a signal
    assert not [task for task in asyncio.all_tasks() if task.get_name().startswith("aiovec env")]


@NUM_WORKERS
async def test_terminate_ends_what_runs(num_workers: int, gate: Gate, tmp_path: Path) -> None:
    """In this process its `finally` runs; no task and no warning is left."""
    log = tmp_path / "log"
    envs = of(partial(AsyncGated, gate.key, str(log)), Counter, num_workers=num_workers)
    async with asyncio.timeout(BOUND_SECONDS):
        await envs.reset()
        step = asyncio.create_task(envs.step([WAIT, 0]))
        await gate.arrived()
        envs.terminate()
        with pytest.raises(ClosedEnvironmentError):
            await step
        await turns()
    if not num_workers:
        assert lines(log) == ["cancelled 0"]
    assert not [task for task in asyncio.all_tasks() if task.get_name().startswith("aiovec env")]


# ---- left behind, in this process


@pytest.fixture
def silent(caplog: pytest.LogCaptureFixture) -> Any:
    """Fails a test in which asyncio has something to complain about."""
    with caplog.at_level(logging.WARNING):
        yield
        gc.collect()
    assert not [record.getMessage() for record in caplog.records]


async def left_waiting(log: Path, kept: list[Any]) -> None:
    envs = await of(partial(WaitsForEver, log=str(log)), AsyncCounter, Counter, num_workers=0)
    kept.append(envs)
    await envs.reset()
    await envs.send([WAIT, 0], env_ids=[0, 1])
    await envs.recv()


def collect(kept: list[Any]) -> None:
    """Forgets them."""
    kept.clear()
    gc.collect()


def test_forgotten_when_the_loop_ends(silent: None, tmp_path: Path) -> None:
    """`asyncio.run` cancels every task: those of the envs end, and so does it."""
    log, kept = tmp_path / "log", []
    asyncio.run(left_waiting(log, kept))
    assert lines(log) == ["begin 0", "end 0"]
    with pytest.warns(ResourceWarning, match="was never closed"):
        collect(kept)


def test_terminated_after_the_loop(silent: None, tmp_path: Path) -> None:
    log, kept = tmp_path / "log", []
    asyncio.run(left_waiting(log, kept))
    kept[0].terminate()
    kept[0].terminate()
    assert kept[0].closed
    kept.clear()


def test_terminated_while_the_loop_does_not_run(silent: None, tmp_path: Path) -> None:
    """Without a word about tasks that were destroyed."""
    loop = asyncio.new_event_loop()
    envs = of(partial(AsyncCounter, log=str(tmp_path / "log")), Counter, num_workers=0)
    loop.run_until_complete(envs.reset())
    envs.terminate()
    loop.close()
    del envs
    gc.collect()


def test_forgotten_with_a_loop_that_was_just_closed(silent: None, tmp_path: Path) -> None:
    loop = asyncio.new_event_loop()
    kept = [of(AsyncCounter, Counter, num_workers=0)]
    loop.run_until_complete(kept[0].reset())
    loop.close()
    with pytest.warns(ResourceWarning, match="was never closed"):
        collect(kept)


def test_forgotten_while_the_loop_runs(silent: None, tmp_path: Path) -> None:
    """Freed at once: what runs is cancelled."""
    log, kept = tmp_path / "log", []

    async def main() -> None:
        await left_waiting(log, kept)
        with pytest.warns(ResourceWarning, match="was never closed"):
            collect(kept)
        await until(lambda: lines(log) == ["begin 0", "end 0"])
        await turns()
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(main())


def test_a_real_interrupt_in_an_env_of_this_process(silent: None) -> None:
    """Stays one, and the vector is closed on the way."""
    closed: list[AsyncVectorEnv] = []

    async def main() -> None:
        async with of(partial(AsyncFaulty, "step", KeyboardInterrupt), AsyncCounter, num_workers=0) as envs:
            closed.append(envs)
            await envs.reset()
            await envs.step([FAIL, 0])

    with pytest.raises(KeyboardInterrupt):
        asyncio.run(main())
    assert closed[0].closed


async def test_who_cancels_all_tasks_may_go_on(tmp_path: Path) -> None:
    """With the envs in this process, a shutdown that cancels every task meets theirs, too: `close` works all the same."""
    log = tmp_path / "log"
    envs = of(*[partial(AsyncCounter, log=str(log))] * 2, num_workers=0)
    async with asyncio.timeout(BOUND_SECONDS):
        await envs.reset()
        for task in asyncio.all_tasks():
            if task.get_name().startswith("aiovec env"):
                task.cancel()
        await turns()
        assert (await envs.step([0, 0]))[1].tolist() == [1, 1]
        await envs.close()
    assert sorted(lines(log)) == ["close 0", "close 1"]


# ---- death


@pytest.mark.parametrize("ending", [end_with_sigkill, segfault])
async def test_a_death_of_a_worker_with_async_envs(ending: Callable[[], object], on_ray: bool) -> None:
    """It is told at once; the other worker's rows are there; a reset builds them anew."""
    env_fns = [AsyncCounter, AsyncCounter, Counter, partial(EndsIts, ending)]
    async with asyncio.timeout(BOUND_SECONDS), of(*env_fns, num_workers=2) as envs:
        await envs.reset()
        with pytest.raises(WorkerDied) as caught:
            await envs.step([0, 0, 0, FAIL])
        assert caught.value.env_ids == (2, 3)
        assert caught.value.env_index == (None if on_ray else 3)  # an actor takes with it what it did
        assert sorted((await envs.recv(min_envs=2)).env_ids) == [0, 1]
        await envs.reset(env_ids=[2, 3])
        observations, *_ = await envs.step([0] * 4)
        assert observations[:, 2].tolist() == [2, 2, 1, 1]
        assert await envs.call("work", env_ids=[3]) == ((None, 1),)


async def test_killed_from_outside_while_its_envs_wait(gate: Gate, tmp_path: Path) -> None:
    log = tmp_path / "log"
    env_fns = [partial(AsyncGated, gate.key, str(log))] * 2
    async with asyncio.timeout(BOUND_SECONDS), of(*env_fns) as envs:
        await envs.reset()
        (pid, _) = await envs.get_attr("pid")
        step = asyncio.create_task(envs.step([WAIT, WAIT]))
        await gate.arrived(2)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(WorkerDied):
            await step
        await envs.reset()
        assert (await envs.step([0, 0]))[1].tolist() == [1, 1]


# ---- restart

ACTIONS = [0, FAIL, 0]
RESTARTS = [("raise", 0), ("raise", 1), ("late", 0), ("late", 1), ("blocks", 1), ("dies", 1)]
ERRORS = {"raise": ValueError, "late": EnvTimeoutError, "blocks": EnvTimeoutError, "dies": WorkerDied}


def flaky(how: str, log: Path, num_workers: int, **options: Any) -> AsyncVectorEnv:
    env_fns = [partial(AsyncFlaky, how, index, str(log)) for index in range(3)]
    timeout = {"late": 0.2, "blocks": 0.4}.get(how)
    return AsyncVectorEnv(
        env_fns,
        num_workers=num_workers,
        context="fork" if num_workers else None,
        on_failure="restart",
        step_timeout=timeout,
        close_grace=0.5,
        **options,
    )


@pytest.mark.parametrize("mode", list(AutoresetMode), ids=lambda mode: mode.name)
@pytest.mark.parametrize(("how", "num_workers"), RESTARTS)
async def test_restart_of_a_step(how: str, num_workers: int, mode: AutoresetMode, tmp_path: Path) -> None:
    """Its row says so, and it is built anew: in its worker, or with all of a worker that ended."""
    lost = [1] if how in ("raise", "late") else [0, 1, 2]
    vector = flaky(how, tmp_path / "log", num_workers, autoreset_mode=mode)
    async with asyncio.timeout(BOUND_SECONDS), vector as envs:
        await envs.reset()
        await envs.step([0] * 3)
        observations, rewards, _, truncations, infos = await envs.step(ACTIONS)
        is_lost = np.isin(range(3), lost)
        np.testing.assert_array_equal(truncations, is_lost)
        np.testing.assert_array_equal(rewards, np.where(is_lost, np.nan, 2))
        assert isinstance(infos["failure"][1], ERRORS[how])
        np.testing.assert_array_equal(infos["generation"], is_lost.astype(int))
        if mode is AutoresetMode.DISABLED:
            observations, _ = await envs.reset(options={"reset_mask": truncations})
        elif mode is AutoresetMode.NEXT_STEP:
            observations, *_, infos = await envs.step([0] * 3)
            assert "failure" not in infos
        np.testing.assert_array_equal(observations[is_lost, 1:], [[2, 0]] * len(lost))
        observations, rewards, *_, infos = await envs.step([0] * 3)
        assert "failure" not in infos
        np.testing.assert_array_equal(observations[is_lost, 1:], [[2, 1]] * len(lost))
        assert await envs.call("work", 4, env_ids=[1]) == ((4, 1),)


@pytest.mark.parametrize(("how", "num_workers"), RESTARTS)
async def test_restart_of_a_reset(how: str, num_workers: int, tmp_path: Path) -> None:
    """It is repeated with a new env."""
    async with asyncio.timeout(BOUND_SECONDS), flaky(how, tmp_path / "log", num_workers) as envs:
        await envs.reset()
        observations, infos = await envs.reset(options={"fail": 1, "until": 1})
        assert observations[1].tolist() == [1, 2, 0]
        assert isinstance(infos["failure"][1], ERRORS[how])
        await envs.step([0] * 3)


@NUM_WORKERS
async def test_a_crash_loop(num_workers: int, tmp_path: Path) -> None:
    async with asyncio.timeout(BOUND_SECONDS), flaky("raise", tmp_path / "log", num_workers, max_restarts=1) as envs:
        await envs.reset()
        with pytest.raises(CrashLoopError) as caught:
            await envs.reset(options={"fail": 1, "until": 9})
        assert caught.value.env_ids == (1,)
        await envs.reset()
        await envs.step([0] * 3)


async def test_an_env_that_is_stuck_while_it_is_built_anew(tmp_path: Path) -> None:
    """In a worker that lives: `start_timeout` bounds it."""
    vector = flaky("raise", tmp_path / "log", 1, start_timeout=2)
    async with asyncio.timeout(BOUND_SECONDS), vector as envs:
        await envs.reset()
        stuck = tmp_path / "log.1.stuck"
        stuck.touch()
        await envs.step(ACTIONS)
        *_, infos = await envs.step([0] * 3)
        error = infos["failure"][1]
        assert isinstance(error, EnvTimeoutError)
        assert (error.command, error.env_ids) == ("build", (1,))
        stuck.unlink()
        await envs.reset()
        await envs.step([0] * 3)


@NUM_WORKERS
async def test_a_cancelled_turn_is_no_failure(num_workers: int, tmp_path: Path) -> None:
    """An env whose step was ended by a reset is not built anew."""
    async with asyncio.timeout(BOUND_SECONDS), flaky("raise", tmp_path / "log", num_workers) as envs:
        await envs.reset()
        await envs.send([WAIT, 0, 0])
        await envs.recv(min_envs=2)
        observations, infos = await envs.reset()
        assert observations[:, 1].tolist() == [1, 1, 1]
        assert "failure" not in infos
        *_, infos = await envs.step([0] * 3)
        assert "failure" not in infos


# ---- the loop of the caller


@NUM_WORKERS
async def test_async_envs_beside_sync_ones_that_fail(num_workers: int) -> None:
    """A mixed vector tells both in the order of the envs."""
    env_fns: list[Any] = [
        partial(AsyncFaulty, "step", an_error),
        partial(Mortal, partial(raise_lookup_error, "sync"), "step", 1),
        partial(Awaited, partial(Counter, 1000)),
    ]
    async with asyncio.timeout(BOUND_SECONDS), AsyncVectorEnv(env_fns, num_workers=num_workers) as envs:
        await envs.reset()
        with pytest.raises(ExceptionGroup) as caught:
            await envs.step([FAIL, FAIL, 0])
        assert [str(failure.exception) for failure in failures(caught.value)] == ["An error occurred.", "sync"]
        assert (await envs.recv()).env_ids.tolist() == [2]
