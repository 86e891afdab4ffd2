"""`send`, `recv` and single envs when things go wrong: what is owed, what is told, to whom, and that nobody waits for ever."""

from __future__ import annotations

import asyncio
import functools
import itertools
import os
import signal
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest
from fault_envs import (
    BOUND_SECONDS,
    PASS_GATE,
    Faulty,
    Gate,
    Gated,
    GateKey,
    InfoOfOwnType,
    Mortal,
    an_error,
    end_with_sigkill,
    turns,
)
from fault_envs import hang_in_python as hang
from flaky_envs import Flaky, raise_an_error
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from sample_envs import Counter, Raises
from space_envs import Recorder

from aiovec import (
    AlreadyPendingCallError,
    AsyncVectorEnv,
    ClosedEnvironmentError,
    CrashLoopError,
    EnvTimeoutError,
    NoAsyncCallError,
    NotStartedError,
    ResetNeeded,
    StepBatch,
    WorkerDied,
    WrongLoopError,
    failures,
)
from aiovec.exchange.frames import FrameKind
from aiovec.pool import calls as calls_module

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

FAIL = 1  # the action with which `Gated` and others raise


def gated(key: GateKey, *, gates: tuple[int, ...] = (1,), num_envs: int = 3, at: str = "step", size: int = 3) -> Any:
    """These envs have the gate, the others never wait."""
    return [
        functools.partial(Gated, key, at=at if index in gates else "never", offset=index, size=size)
        for index in range(num_envs)
    ]


def vector(env_fns: Any, num_workers: int, **options: Any) -> AsyncVectorEnv:
    return AsyncVectorEnv(env_fns, num_workers=num_workers, context="fork" if num_workers else None, **options)


def steps_of(batch: StepBatch) -> dict[int, list[float]]:
    """By env its episode, steps and reward, after all of its row was found to agree."""
    assert batch.env_ids.dtype == np.int64
    assert batch.rewards.dtype == np.float64
    assert batch.infos["env_id"].tolist() == batch.env_ids.tolist() == batch.observations[:, 0].tolist()
    assert len(set(batch.env_ids.tolist())) == len(batch.env_ids)
    rows = zip(batch.observations[:, 1:3].tolist(), batch.rewards.tolist(), strict=True)
    return {env_index: [*row, reward] for env_index, (row, reward) in zip(batch.env_ids.tolist(), rows, strict=True)}


async def until_ready(envs: AsyncVectorEnv, count: int) -> None:
    """Waits until so many rows or failures are there."""
    calls: Any = envs._batches.calls  # type: ignore[union-attr]
    while calls.look() or len([*calls.inbox]) < count:
        await asyncio.sleep(0)


async def nothing_pending(envs: AsyncVectorEnv) -> None:
    """Nothing is owed, and no call is kept for ever."""
    with pytest.raises(NoAsyncCallError):
        await envs.recv()
    assert not envs._batches.calls.pending  # type: ignore[union-attr]


def kill(envs: AsyncVectorEnv, index: int) -> Any:
    """Kills a worker of this vector."""
    worker = envs._started.pool.workers[index]  # type: ignore[union-attr]
    os.kill(worker.pid, signal.SIGKILL)
    return worker


# ---- who is ready


async def test_a_slow_env_does_not_hide_its_neighbours(gate: Gate) -> None:
    """With several envs in a worker each reports as it ends."""
    async with asyncio.timeout(BOUND_SECONDS), vector(gated(gate.key), 1) as envs:
        await envs.reset()
        await envs.send([0, PASS_GATE, 0])
        assert steps_of(await envs.recv()) == {0: [1, 1, 1]}
        for _ in range(3):  # and goes round, behind the slow one: another request to its worker waits
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.01):
                    await envs.recv()
        gate.open()
        batch = await envs.recv(min_envs=2)
        assert batch.env_ids.tolist() == [1, 2]
        assert steps_of(batch) == {1: [1, 1, 1], 2: [1, 1, 1]}
        await nothing_pending(envs)


async def test_a_slow_worker_does_not_hide_the_others(gate: Gate) -> None:
    """They go on, as often as they like; rows come in the order in which they ended."""
    async with asyncio.timeout(BOUND_SECONDS), vector(gated(gate.key, gates=(0,)), 3) as envs:
        await envs.reset()
        await envs.send([PASS_GATE], [0])
        for step in range(1, 20):
            for env_index in (2, 1):
                await envs.send([0], [env_index])
                await until_ready(envs, 1 if env_index == 2 else 2)
            batch = await envs.recv(min_envs=2)
            assert batch.env_ids.tolist() == [2, 1]
            assert steps_of(batch) == {2: [1, step, step], 1: [1, step, step]}
        gate.open()
        assert steps_of(await envs.recv()) == {0: [1, 1, 1]}


@pytest.mark.not_on_ray("each reply wakes the parent, where no memory is shared")
async def test_the_last_one_that_recv_waits_for_wakes_it(gate: Gate) -> None:
    """Nobody else: the others leave their answers in shared memory, and nothing comes by the sockets."""
    async with asyncio.timeout(BOUND_SECONDS), vector(gated(gate.key, gates=tuple(range(6)), num_envs=6), 2) as envs:
        await envs.reset()
        received: list[int] = []
        for worker in envs._started.pool.workers:  # type: ignore[union-attr]
            replied: Any = worker._replied  # type: ignore[union-attr]
            worker._replied = lambda index, frame, replied=replied: (received.append(frame.kind), replied(index, frame))  # type: ignore[union-attr]
        await envs.send([PASS_GATE] * 6)
        receiving = asyncio.create_task(envs.recv(min_envs=6))
        await gate.arrived(2)
        await turns()
        gate.open(6)
        assert steps_of(await receiving) == {env_index: [1, 1, 1] for env_index in range(6)}
        assert received == [FrameKind.AWAKE]
        await nothing_pending(envs)


async def test_what_is_ready_leaves_the_loop_its_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Although neither `send` nor `recv` would have to wait, others go on, as often as was decided: always, here."""
    monkeypatch.setattr(calls_module, "_LONGEST_TURN_SECONDS", -1)
    async with asyncio.timeout(BOUND_SECONDS), vector([functools.partial(Counter, 9999)] * 8, 2) as envs:
        await envs.reset()
        await envs.send([0] * 8)
        await until_ready(envs, 8)
        turns_of_others: list[int] = []
        other = asyncio.create_task(count_turns(turns_of_others))
        for _ in range(8):
            await envs.recv(max_envs=1)
        other.cancel()
        assert len(turns_of_others) >= 8


async def count_turns(seen: list[int]) -> None:
    """Says each turn of the loop."""
    while True:
        seen.append(len(seen))
        await asyncio.sleep(0)


@pytest.mark.parametrize("num_workers", [0, 2])
async def test_no_env_starves(num_workers: int) -> None:
    """Who is sent again takes its place behind those that are ready."""
    async with asyncio.timeout(BOUND_SECONDS), vector([functools.partial(Counter, 9999)] * 5, num_workers) as envs:
        await envs.reset()
        await envs.send([0] * 5)
        seen: list[int] = []
        for _ in range(50):
            await until_ready(envs, 5)
            batch = await envs.recv(max_envs=1)
            seen += batch.env_ids.tolist()
            await envs.send([0], batch.env_ids)
        assert seen == seen[:5] * 10
        assert sorted(seen[:5]) == [0, 1, 2, 3, 4]


async def test_what_recv_asks_for(gate: Gate) -> None:
    """Its numbers are checked, and a refusal takes nothing."""
    async with asyncio.timeout(BOUND_SECONDS), vector(gated(gate.key), 2) as envs:
        await envs.reset()
        await nothing_pending(envs)
        await envs.send([0, 0], [2, 0])
        for arguments in ((0, None), (None, 0), (-1, 2), (3, 2), (1.5, None), (True, None)):
            with pytest.raises(ValueError, match="_envs="):
                await envs.recv(*arguments)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="min_envs=3, but only 2 envs"):
            await envs.recv(min_envs=3)
        await until_ready(envs, 2)
        first = await envs.recv(max_envs=1)
        assert len(first.env_ids) == 1
        assert {**steps_of(first), **steps_of(await envs.recv())} == {0: [1, 1, 1], 2: [1, 1, 1]}
        with pytest.raises(NoAsyncCallError):
            await envs.recv(min_envs=5)


async def test_one_recv_at_a_time(gate: Gate) -> None:
    """The second is refused, the first goes on."""
    async with asyncio.timeout(BOUND_SECONDS), vector(gated(gate.key), 2) as envs:
        await envs.reset()
        await envs.send([PASS_GATE], [1])
        first = asyncio.create_task(envs.recv())
        await gate.arrived()
        for _ in range(2):
            with pytest.raises(AlreadyPendingCallError, match="recv"):
                await envs.recv()
        gate.open()
        assert steps_of(await first) == {1: [1, 1, 1]}


# ---- cancellation


async def by_cancel(call: Callable[[], Awaitable[Any]], arrived: Callable[[], Awaitable[None]]) -> None:
    task = asyncio.ensure_future(call())
    await arrived()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def by_time_out(call: Callable[[], Awaitable[Any]], arrived: Callable[[], Awaitable[None]]) -> None:
    task = asyncio.ensure_future(call())  # what is awaited below ends by the time-out only
    await arrived()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0):
            await task


async def by_move_on(call: Callable[[], Awaitable[Any]], arrived: Callable[[], Awaitable[None]]) -> None:
    task = asyncio.ensure_future(call())
    await arrived()
    with anyio.move_on_after(0) as scope:
        await task
    assert scope.cancelled_caught


Cancel = Callable[[Callable[[], Awaitable[Any]], Callable[[], Awaitable[None]]], Awaitable[None]]
CANCELLATIONS: dict[str, Cancel] = {"cancel": by_cancel, "timeout": by_time_out, "anyio": by_move_on}
each_cancellation = pytest.mark.parametrize("cancel", CANCELLATIONS.values(), ids=CANCELLATIONS.keys())


@each_cancellation
async def test_a_cancelled_recv_has_taken_nothing(cancel: Cancel, gate: Gate) -> None:
    """Also of the rows that were there already."""
    async with asyncio.timeout(BOUND_SECONDS), vector(gated(gate.key), 2) as envs:
        await envs.reset()
        await envs.send([0, PASS_GATE, 0])
        for _ in range(2):
            await cancel(lambda: envs.recv(min_envs=3), turns)
        gate.open()
        assert steps_of(await envs.recv(min_envs=3)) == {index: [1, 1, 1] for index in range(3)}
        await nothing_pending(envs)


async def test_a_recv_cancelled_at_any_turn_of_the_loop() -> None:
    """Its rows were given, or they are still there: each once."""
    async with (
        asyncio.timeout(BOUND_SECONDS),
        vector([functools.partial(Counter, 9999, i) for i in range(2)], 2) as envs,
    ):
        await envs.reset()
        outcomes = set()
        for step, (num_turns, spin_seconds) in enumerate(itertools.product(range(7), (0, 0.0002, 0.002)), 1):
            await envs.send([0, 0])
            task = asyncio.create_task(envs.recv(min_envs=2))
            await turns(num_turns)
            time.sleep(spin_seconds)  # the loop does not look while the answers come
            task.cancel()
            await asyncio.wait([task])
            outcomes.add(task.cancelled())
            batch = await envs.recv(min_envs=2) if task.cancelled() else task.result()
            assert steps_of(batch) == {0: [1, step, step], 1: [1, step, step]}
            await nothing_pending(envs)
        assert True in outcomes


@each_cancellation
@pytest.mark.parametrize(("num_workers", "shared_memory"), [(2, True), (3, True), (2, False)])
async def test_recv_collects_a_cancelled_step(
    cancel: Cancel, num_workers: int, shared_memory: bool, gate: Gate
) -> None:
    """Worker by worker, as they answer; then the envs may step."""
    env_fns = gated(gate.key, gates=(2,))
    async with asyncio.timeout(BOUND_SECONDS), vector(env_fns, num_workers, shared_memory=shared_memory) as envs:
        await envs.reset()
        await cancel(lambda: envs.step([0, 0, PASS_GATE]), gate.arrived)
        assert steps_of(await envs.recv(min_envs=2)) == {0: [1, 1, 1], 1: [1, 1, 1]}
        await envs.send([0], [1])
        assert steps_of(await envs.recv()) == {1: [1, 2, 2]}
        with pytest.raises(AlreadyPendingCallError, match=r"recv\(\)"):
            await envs.step([0, 0, 0])
        gate.open()
        batch = await envs.recv()
        assert steps_of(batch) == {2: [1, 1, 1]}
        assert batch.infos["steps"].tolist() == [1]
        await nothing_pending(envs)
        assert (await envs.step([0, 0, 0]))[1].tolist() == [2, 3, 2]


@each_cancellation
@pytest.mark.parametrize("env_ids", [None, [1], [1, 0]])
async def test_recv_collects_a_cancelled_reset(cancel: Cancel, env_ids: list[int] | None, gate: Gate) -> None:
    """With reward 0, both flags false, and its infos."""
    async with asyncio.timeout(BOUND_SECONDS), vector(gated(gate.key, at="reset"), 2) as envs:
        await envs.reset()
        await envs.step([0, 0, 0])
        await cancel(lambda: envs.reset(options={"gate": True}, env_ids=env_ids), gate.arrived)
        gate.open()
        asked = env_ids or [0, 1, 2]
        batch = await envs.recv(min_envs=len(asked))
        assert steps_of(batch) == {index: [2, 0, 0] for index in asked}
        assert not (batch.terminations | batch.truncations).any()
        assert batch.infos["episodes"].tolist() == [2] * len(asked)
        await nothing_pending(envs)


@each_cancellation
@pytest.mark.parametrize("what", ["step", "reset"])
async def test_recv_collects_what_a_single_env_owes(cancel: Cancel, what: str, gate: Gate) -> None:
    """Meanwhile its neighbours go on; then it does."""
    async with asyncio.timeout(BOUND_SECONDS), vector(gated(gate.key, at=what), 3) as envs:
        await envs.reset()
        sub = envs[1]
        await cancel(lambda: sub.step(PASS_GATE) if what == "step" else sub.reset(options={"gate": True}), gate.arrived)
        for refused in (sub.step(0), envs.step([0] * 3), envs.send([0], [1])):
            with pytest.raises(AlreadyPendingCallError, match="env 1"):
                await refused
        assert (await envs[0].step(0))[1] == 1
        gate.open()
        assert steps_of(await envs.recv()) == ({1: [1, 1, 1]} if what == "step" else {1: [2, 0, 0]})
        await nothing_pending(envs)
        assert (await sub.step(0))[1] == (2 if what == "step" else 1)


async def test_a_single_env_cancelled_at_any_turn_of_the_loop() -> None:
    """It was answered, or it is owed; a reset that discards what is owed gives its own row."""
    async with asyncio.timeout(BOUND_SECONDS), vector([functools.partial(Counter, 9999)] * 2, 2) as envs:
        await envs.reset()
        for number, (num_turns, spin_seconds) in enumerate(itertools.product(range(7), (0, 0.0002, 0.002))):
            await envs[1].reset()
            task = asyncio.create_task(envs[1].step(0))
            await turns(num_turns)
            time.sleep(spin_seconds)
            task.cancel()
            await asyncio.wait([task])
            if task.cancelled() and num_turns:
                if number % 2:
                    observation, _ = await envs[1].reset()
                    assert observation[2] == 0
                else:
                    assert (await envs.recv()).rewards.tolist() == [1]
            await nothing_pending(envs)
            before = await envs[1].get_attr("steps")
            assert (await envs[1].step(0))[1] == before + 1


# ---- what is left of a call that raised


NEXT_CALLS: dict[str, tuple[Callable[[AsyncVectorEnv], Awaitable[Any]], list[int]]] = {
    "nothing": (lambda envs: asyncio.sleep(0), [0, 2]),
    "reset of the failed one": (lambda envs: envs[1].reset(), [0, 2]),
    "reset of one": (lambda envs: envs.reset(env_ids=[0]), [2]),
    "single step": (lambda envs: envs[2].step(0), [0]),
    "single reset": (lambda envs: envs[2].reset(), [0]),
    "reset": (lambda envs: envs.reset(), []),
    "call": (lambda envs: envs.get_attr("steps"), [0, 2]),
}


@pytest.mark.parametrize("next_call", NEXT_CALLS)
@pytest.mark.parametrize(("num_workers", "shared_memory", "size"), [(2, True, 3), (2, False, 3), (0, True, 1 << 14)])
async def test_the_rows_of_those_that_did_their_part(
    next_call: str, num_workers: int, shared_memory: bool, size: int
) -> None:
    """They are there until these envs are asked for something else; in buffers of a ring or not."""
    env_fns = gated(GateKey("", ""), size=size)
    async with asyncio.timeout(BOUND_SECONDS), vector(env_fns, num_workers, shared_memory=shared_memory) as envs:
        await envs.reset()
        with pytest.raises(ValueError, match="An error occurred"):
            await envs.step([0, FAIL, 0])
        call, left = NEXT_CALLS[next_call]
        await call(envs)
        if left:
            batch = await envs.recv(min_envs=len(left))
            assert steps_of(batch) == {index: [1, 1, 1] for index in left}
            assert batch.infos["steps"].tolist() == [1] * len(left)
        await nothing_pending(envs)
        await envs.reset()
        assert (await envs.step([0] * 3))[1].tolist() == [1, 1, 1]


async def test_a_next_step_drops_what_was_left() -> None:
    """Of all, or of those that are sent."""
    async with asyncio.timeout(BOUND_SECONDS), vector(gated(GateKey("", "")), 2) as envs:
        for by_send in (False, True):
            await envs.reset()
            with pytest.raises(ValueError, match="An error occurred"):
                await envs.step([0, FAIL, 0])
            await envs.reset(env_ids=[1])
            if by_send:
                await envs.send([0, 0, 0])
                rewards = [row[2] for _, row in sorted(steps_of(await envs.recv(min_envs=3)).items())]
            else:
                rewards = (await envs.step([0, 0, 0]))[1].tolist()
            assert rewards == [2, 1, 2]
            await nothing_pending(envs)


async def test_a_masked_reset_does_not_spoil_what_was_left() -> None:
    """It writes a row of every env: what an env gave in the step before is not given with reward 0 then."""
    async with asyncio.timeout(BOUND_SECONDS), vector(gated(GateKey("", "")), 2) as envs:
        await envs.reset()
        with pytest.raises(ValueError, match="An error occurred"):
            await envs.step([0, FAIL, 0])
        await envs.reset(env_ids=[1])
        await envs.reset(options={"reset_mask": np.array([False, True, False])})
        await nothing_pending(envs)


@pytest.mark.parametrize("ending", [an_error, end_with_sigkill])
async def test_a_masked_reset_that_fails_leaves_the_rows_of_those_that_were_reset(ending: Any) -> None:
    """Not of those whose observation it would have repeated; whether an env has raised, or its worker has ended."""
    env_fns: list[Any] = [functools.partial(Counter, 9, index) for index in range(3)]
    failing = functools.partial(Mortal, ending, "reset", 3) if ending is end_with_sigkill else None
    env_fns.append(failing or functools.partial(Faulty, "reset", ending, 3))
    async with asyncio.timeout(BOUND_SECONDS), vector(env_fns, 4) as envs:
        await envs.reset()
        mask = np.array([False, True, False, True])
        with pytest.raises((ValueError, WorkerDied)):
            await envs.reset(options={"reset_mask": mask, "fail": True, "die": True})
        await envs.get_attr("steps", env_ids=[0, 1, 2])
        assert steps_of(await envs.recv()) == {1: [2, 0, 0]}
        await nothing_pending(envs)


async def test_a_failed_reset_of_one_env_leaves_nothing() -> None:
    """Not even in the list of calls, where it would stay for ever."""
    env_fns = [functools.partial(Faulty, "reset", an_error, index) for index in range(2)]
    async with asyncio.timeout(BOUND_SECONDS), vector(env_fns, 2) as envs:
        await envs.reset()
        for call in (envs[1].reset(options={"fail": True}), envs.reset(env_ids=[1], options={"fail": True})):
            with pytest.raises(ValueError, match="An error occurred"):
                await call
        await nothing_pending(envs)


async def test_what_is_left_of_a_death(gate: Gate) -> None:
    """Those that answered before can be collected; those that had not are owed."""
    env_fns = [*gated(gate.key, gates=(0,), num_envs=2), functools.partial(Mortal, end_with_sigkill, "step", 2)]
    async with asyncio.timeout(BOUND_SECONDS), vector(env_fns, 3) as envs:
        await envs.reset()
        with pytest.raises(WorkerDied):
            await envs.step([PASS_GATE, 0, 1])
        await gate.arrived()
        assert steps_of(await envs.recv()) == {1: [1, 1, 1]}
        gate.open()
        assert steps_of(await envs.recv()) == {0: [1, 1, 1]}
        await nothing_pending(envs)
        await envs[2].reset()
        assert (await envs.step([0, 0, 0]))[1].tolist() == [2, 2, 1]


# ---- failures


@pytest.mark.parametrize("num_workers", [0, 1, 3])
async def test_recv_raises_a_failure_once_and_takes_no_rows_with_it(num_workers: int) -> None:
    """The failed env needs a reset; the rows of the others are there then."""
    async with asyncio.timeout(BOUND_SECONDS), vector(gated(GateKey("", "")), num_workers) as envs:
        await envs.reset()
        await envs.send([0, FAIL, 0])
        await until_ready(envs, 3)
        with pytest.raises(ValueError, match="An error occurred") as caught:
            await envs.recv(min_envs=3)
        assert [(failure.env_index, failure.command) for failure in failures(caught.value)] == [(1, "step")]
        assert steps_of(await envs.recv(min_envs=2)) == {0: [1, 1, 1], 2: [1, 1, 1]}
        await nothing_pending(envs)
        for refused in (envs.send([0], [1]), envs[1].step(0), envs.step([0] * 3)):
            with pytest.raises(ResetNeeded, match="env 1 failed in step"):
                await refused
        await envs[1].reset()
        assert (await envs.step([0] * 3))[1].tolist() == [2, 1, 2]


async def test_a_failure_does_not_wait_for_more_rows(gate: Gate) -> None:
    """It is raised as soon as it is there."""
    async with asyncio.timeout(BOUND_SECONDS), vector(gated(gate.key), 3) as envs:
        await envs.reset()
        await envs.send([PASS_GATE], [1])
        receiving = asyncio.create_task(envs.recv(min_envs=1))
        await gate.arrived()
        await envs.send([FAIL, FAIL], [0, 2])
        with pytest.raises((ValueError, ExceptionGroup)):
            await receiving
        gate.open()


@pytest.mark.parametrize("num_workers", [0, 1, 2])
async def test_several_failures_are_one_flat_group(num_workers: int) -> None:
    """Of sends, of a cancelled step, of both; in ascending env index, also where they are the same object."""
    async with (
        asyncio.timeout(BOUND_SECONDS),
        vector([functools.partial(Faulty, "step", an_error, index) for index in range(4)], num_workers) as envs,
    ):
        await envs.reset()
        await envs.send([1, 1, 1, 1], [3, 0, 2, 1])
        await until_ready(envs, 4)
        with pytest.raises(ExceptionGroup) as caught:
            await envs.recv()
        assert [type(error) for error in caught.value.exceptions] == [ValueError] * 4
        assert [failure.env_index for failure in failures(caught.value)] == [0, 1, 2, 3]
        await nothing_pending(envs)
        if num_workers:
            await envs.reset()
            step = asyncio.create_task(envs.step([1, 0, 1, 1]))
            await turns(2)
            step.cancel()
            await asyncio.wait([step])
            await until_ready(envs, 4)
            with pytest.raises(ExceptionGroup) as caught:
                await envs.recv()
            assert [type(error) for error in caught.value.exceptions] == [ValueError] * 3
            assert [failure.env_index for failure in failures(caught.value)] == [0, 2, 3]
            assert (await envs.recv()).env_ids.tolist() == [1]
            await nothing_pending(envs)


class FailsToLoad:
    """An action that pickles, but does not load in the worker."""

    def __reduce__(self) -> Any:
        return _refuse_to_load, ()


def _refuse_to_load() -> Any:
    raise LookupError("an action that does not load")


@pytest.mark.parametrize("how", ["send", "step of one", "step of all"])
async def test_actions_that_do_not_load(how: str) -> None:
    """The envs of that request have failed in their step; the others have not."""
    env_fns = [functools.partial(Recorder, spaces.Text(9), length=99)] * 3
    async with asyncio.timeout(BOUND_SECONDS), vector(env_fns, 2) as envs:
        await envs.reset()
        with pytest.raises(LookupError, match="an action that does not load") as caught:
            if how == "send":
                await envs.send(("x", "y"), [0, 1])
                await envs.send((FailsToLoad(),), [2])
                await until_ready(envs, 3)
                await envs.recv()
            elif how == "step of one":
                await envs[2].step(FailsToLoad())
            else:
                await envs.step(("x", "y", FailsToLoad()))
        assert [(failure.env_index, failure.command) for failure in failures(caught.value)] == [(2, "step")]
        with pytest.raises(ResetNeeded, match="env 2 failed in step"):
            await envs[2].step("x")
        if how != "step of one":
            assert sorted((await envs.recv(min_envs=2)).env_ids.tolist()) == [0, 1]
        await envs[2].reset()
        await envs.step(("x", "y", "z"))
        await nothing_pending(envs)


_SHARED_ERROR = ValueError("one object for all")


def the_same_error() -> ValueError:
    return _SHARED_ERROR


async def test_envs_of_this_process_that_raise_one_object() -> None:
    """Each of them is named."""
    async with (
        asyncio.timeout(BOUND_SECONDS),
        vector([functools.partial(Faulty, "step", the_same_error, index) for index in range(3)], 0) as envs,
    ):
        await envs.reset()
        await envs.send([1, 0, 1])
        await until_ready(envs, 3)
        with pytest.raises(ExceptionGroup) as caught:
            await envs.recv()
        assert [failure.env_index for failure in failures(caught.value)] == [0, 2]


@pytest.mark.parametrize("num_workers", [0, 2])
async def test_infos_do_not_depend_on_the_order_of_arrival(num_workers: int) -> None:
    """Of a key that is an int here and a float there, the lowest env says the dtype."""
    env_fns = [functools.partial(InfoOfOwnType, value) for value in (1, 2.5, 3)]
    async with asyncio.timeout(BOUND_SECONDS), vector(env_fns, num_workers) as envs:
        await envs.reset()
        for order in itertools.permutations(range(3)):
            for count, env_index in enumerate(order, 1):
                await envs.send([0], [env_index])
                await until_ready(envs, count)
            batch = await envs.recv(min_envs=3)
            assert batch.env_ids.tolist() == list(order)
            assert batch.infos["value"].dtype == np.int64
            assert batch.infos["value"].tolist() == [[1, 2, 3][env_index] for env_index in order]
            assert batch.infos["own_0"].tolist() == [int(env_index == 0) for env_index in order]
            assert batch.infos["_own_0"].tolist() == [env_index == 0 for env_index in order]


# ---- deaths


@pytest.mark.not_on_ray("in which env an actor ended is not known")
async def test_a_death_while_recv_waits(gate: Gate) -> None:
    """It is told at once; what others gave, or will give, can still be collected."""
    async with asyncio.timeout(BOUND_SECONDS), vector(gated(gate.key, gates=(0, 3), num_envs=4), 2) as envs:
        await envs.reset()
        await envs.send([PASS_GATE, PASS_GATE], [0, 3])
        receiving = asyncio.create_task(envs.recv(min_envs=2))
        await gate.arrived(2)
        worker = kill(envs, 1)
        with pytest.raises(WorkerDied, match="during send|during step") as caught:
            await receiving
        assert (caught.value.env_ids, caught.value.env_index, caught.value.pid) == ((2, 3), 3, worker.pid)
        with pytest.raises(ResetNeeded, match="env 3 must be built anew"):
            await envs.send([0], [3])
        with pytest.raises(ResetNeeded, match="env 2 must be built anew"):
            await envs[2].step(0)
        gate.open()
        assert steps_of(await envs.recv()) == {0: [1, 1, 1]}
        await nothing_pending(envs)
        await envs.reset(env_ids=[2, 3])
        assert (await envs.step([0] * 4))[1].tolist() == [2, 1, 1, 1]


async def test_rows_that_came_before_the_death_of_their_worker(gate: Gate) -> None:
    """They were given: they can be collected, and their envs need a reset all the same."""
    async with asyncio.timeout(BOUND_SECONDS), vector(gated(gate.key, num_envs=4, gates=(3,)), 2) as envs:
        await envs.reset()
        await envs.send([0, PASS_GATE], [2, 3])
        await until_ready(envs, 1)
        await gate.arrived()
        await kill(envs, 1).ended.wait()
        with pytest.raises(WorkerDied):
            await envs.recv()
        assert steps_of(await envs.recv()) == {2: [1, 1, 1]}
        await nothing_pending(envs)
        with pytest.raises(ResetNeeded):
            await envs.send([0], [2])


@pytest.mark.parametrize("waiting", [True, False])
async def test_a_death_that_a_single_env_and_recv_are_told(waiting: bool, gate: Gate) -> None:
    """Each who lost something, once; a single env of another worker goes on."""
    async with asyncio.timeout(BOUND_SECONDS), vector(gated(gate.key, gates=(1, 2, 3), num_envs=4), 2) as envs:
        await envs.reset()
        mine, others = (asyncio.create_task(envs[index].step(PASS_GATE)) for index in (3, 1))
        await gate.arrived(2)
        receiving = None
        if waiting:
            await envs.send([PASS_GATE], [2])
            receiving = asyncio.create_task(envs.recv())
        await turns()
        kill(envs, 1)
        with pytest.raises(WorkerDied, match="during step"):
            await mine
        if receiving is not None:
            with pytest.raises(WorkerDied):
                await receiving
        gate.open()
        assert (await others)[1] == 1
        await nothing_pending(envs)
        assert (await envs[0].step(0))[1] == 1


@pytest.mark.not_on_ray("it stops the channel of a local worker")
async def test_a_death_right_behind_an_answer() -> None:
    """The single env has its result, but nobody takes it for idle: who steps it again is not left waiting."""
    async with asyncio.timeout(BOUND_SECONDS), vector([Counter] * 2, 2) as envs:
        await envs.reset()
        worker: Any = envs._started.pool.workers[1]  # type: ignore[union-attr]
        # The loop hears of the end first, and finds the answer then.
        asyncio.get_running_loop().remove_reader(worker._channel._connection.fileno())
        step = asyncio.create_task(envs[1].step(0))
        while not _is_readable(worker._channel._connection):
            await asyncio.sleep(0)
        kill(envs, 1)
        assert (await step)[1] == 1
        await worker.ended.wait()
        with pytest.raises(WorkerDied, match="the worker of env 1 .* was killed by SIGKILL"):
            await envs[1].step(0)
        with pytest.raises(ResetNeeded, match="must be built anew"):  # it is told once
            await envs[1].step(0)
        await envs[1].reset()
        assert (await envs[1].step(0))[1] == 1


def _is_readable(connection: Any) -> bool:
    import select

    return bool(select.select([connection], [], [], 0)[0])


@pytest.mark.parametrize("by_send", [True, False])
async def test_a_stuck_env(by_send: bool) -> None:
    """It is named; the others go on."""
    env_fns = [functools.partial(Mortal, hang, "step" if index == 2 else "never", index) for index in range(4)]
    async with asyncio.timeout(BOUND_SECONDS), vector(env_fns, 2, step_timeout=0.4) as envs:
        await envs.reset()
        with pytest.raises(EnvTimeoutError, match="env 2 did not end step") as caught:
            if by_send:
                await envs.send([1, 1], [1, 2])
                assert steps_of(await envs.recv()) == {1: [1, 1, 1]}
                await envs.recv()
            else:
                await envs[2].step(1)
        assert (caught.value.env_ids, caught.value.lost_env_ids) == ((2,), (2, 3))
        assert "fault_envs.py" in caught.value.stack
        await nothing_pending(envs)
        await envs.send([0], [0])
        assert (await envs.recv()).env_ids.tolist() == [0]
        await envs.reset(env_ids=[3, 2])
        assert (await envs[2].step(0))[1] == 1


async def test_step_timeout_counts_each_env_by_itself() -> None:
    """Many that are sent at once, in one worker, together take longer."""
    env_fns = [functools.partial(Flaky, raise_an_error, index, os.devnull) for index in range(4)]
    async with asyncio.timeout(BOUND_SECONDS), vector(env_fns, 1, step_timeout=1.2) as envs:
        await envs.reset()
        await envs.send([2] * 4)  # each half a second
        batch = await envs.recv(min_envs=4)
        assert batch.env_ids.tolist() == [0, 1, 2, 3]


# ---- on_failure="restart"


MODES = pytest.mark.parametrize("mode", list(AutoresetMode), ids=lambda mode: mode.name)
ENDINGS = {"raise": (raise_an_error, ValueError), "SIGKILL": (end_with_sigkill, WorkerDied)}


def flaky(failure: str, tmp_path: Path, mode: AutoresetMode, num_workers: int = 2, **options: Any) -> AsyncVectorEnv:
    """Four envs; of two workers the last two are in one."""
    env_fns = [functools.partial(Flaky, ENDINGS[failure][0], index, str(tmp_path / "log")) for index in range(4)]
    return vector(env_fns, num_workers, autoreset_mode=mode, on_failure="restart", **options)


@MODES
@pytest.mark.parametrize("failure", ENDINGS)
async def test_a_row_says_that_its_env_was_built_anew(failure: str, mode: AutoresetMode, tmp_path: Path) -> None:
    """NaN, truncated, the exception and the generation; the next row is the fresh one's; others do not notice."""
    async with asyncio.timeout(BOUND_SECONDS), flaky(failure, tmp_path, mode) as envs:
        await envs.reset()
        await envs.send([0, 0, 0, 0])
        await envs.recv(min_envs=4)
        await envs.send([0, 1], [0, 2])
        rows: dict[int, tuple[Any, ...]] = {}
        while len(rows) < 2:
            batch = await envs.recv()
            for row, env_index in enumerate(batch.env_ids.tolist()):
                info = {key: value[row] for key, value in batch.infos.items() if key != "final_info"}
                rows[env_index] = (*(array[row] for array in batch[1:5]), info)
        observation, reward, terminated, truncated, info = rows[0]
        assert (observation.tolist(), reward, truncated, info.get("_failure", False)) == ([0, 1, 2], 2, False, False)
        observation, reward, terminated, truncated, info = rows[2]
        assert np.isnan(reward)
        assert truncated
        assert not terminated
        assert isinstance(info["failure"], ENDINGS[failure][1])
        assert info["generation"] == 1
        assert observation.tolist() == ([2, 2, 0] if mode is AutoresetMode.SAME_STEP else [2, 1, 1])
        if mode is AutoresetMode.SAME_STEP:
            assert info["final_obs"].tolist() == [2, 1, 1]
        elif mode is AutoresetMode.DISABLED:
            with pytest.raises(ResetNeeded, match="env 2 ended its episode"):
                await envs.send([0], [2])
            await envs.reset(env_ids=[2])
        else:
            await envs.send([0], [2])
            batch = await envs.recv()
            assert (batch.observations.tolist(), batch.rewards.tolist()) == ([[2, 2, 0]], [0])
        await envs.send([0], [2])
        batch = await envs.recv()
        assert (batch.observations.tolist(), batch.rewards.tolist()) == ([[2, 2, 1]], [1])
        assert "failure" not in batch.infos


@MODES
@pytest.mark.parametrize("failure", ENDINGS)
async def test_a_single_env_is_built_anew(failure: str, mode: AutoresetMode, tmp_path: Path) -> None:
    """The transition says so, and then it asks for a reset, as after every end of an episode."""
    async with asyncio.timeout(BOUND_SECONDS), flaky(failure, tmp_path, mode, 4) as envs:
        await envs.reset()
        sub, other = envs[2], asyncio.create_task(envs[0].step(0))
        for generation in (1, 2, 3, 4):
            await sub.step(0)
            observation, reward, terminated, truncated, info = await sub.step(1)
            assert np.isnan(reward)
            assert (terminated, truncated) == (False, True)
            assert isinstance(info["failure"], ENDINGS[failure][1])
            assert info["generation"] == generation
            with pytest.raises(ResetNeeded, match="ended its episode"):
                await sub.step(0)
            observation, info = await sub.reset()
            assert observation.tolist() == [2, generation + 1, 0]
            assert "failure" not in info
        assert (await other)[1] == 1


@MODES
@pytest.mark.parametrize("failure", ENDINGS)
@pytest.mark.parametrize("waiting", [True, False])
async def test_recv_raises_a_crash_loop(failure: str, waiting: bool, mode: AutoresetMode, tmp_path: Path) -> None:
    """Nobody waits for ever for an env that is given up, and it is told once."""
    async with asyncio.timeout(BOUND_SECONDS), flaky(failure, tmp_path, mode, max_restarts=1) as envs:
        await envs.reset()
        with pytest.raises(CrashLoopError) as caught:
            for _ in range(4):
                await envs.send([1], [2])
                receiving = asyncio.create_task(envs.recv())
                if not waiting:
                    receiving.cancel()
                    await asyncio.wait([receiving])
                    await until_ready(envs, 1)
                batch = await (receiving if waiting else envs.recv())
                assert batch.env_ids.tolist() == [2]
                if mode is AutoresetMode.DISABLED:
                    await envs.reset(env_ids=[2])
        assert 2 in caught.value.env_ids
        assert [type(error) for error in caught.value.exceptions] == [ENDINGS[failure][1]] * 2
        await nothing_pending(envs)
        with pytest.raises(ResetNeeded, match="env 2 failed too often"):
            await envs.send([0], [2])
        await envs.send([0], [0])
        assert (await envs.recv()).rewards.tolist() == [1]
        await envs.reset()
        await envs.send([0] * 4)
        assert sorted((await envs.recv(min_envs=4)).env_ids.tolist()) == [0, 1, 2, 3]


async def test_an_env_that_waits_is_not_given_up_for_its_neighbour(tmp_path: Path) -> None:
    """The deaths of a worker whose other env goes on in between are one failure of an env that does nothing."""
    async with (
        asyncio.timeout(BOUND_SECONDS),
        flaky("SIGKILL", tmp_path, AutoresetMode.NEXT_STEP, max_restarts=2) as envs,
    ):
        await envs.reset()
        for generation in range(1, 6):
            await envs[2].step(0)
            *_, info = await envs[2].step(1)
            assert info["generation"] == generation
            await envs[2].reset()
        _, reward, _, truncated, info = await envs[3].step(0)
        assert np.isnan(reward)
        assert truncated
        assert isinstance(info["failure"], WorkerDied)
        assert info["generation"] == 5
        observation, _ = await envs[3].reset()
        assert observation.tolist() == [3, 6, 0]


async def test_envs_that_are_given_up_together_share_one_error(tmp_path: Path) -> None:
    """They ended with one worker: it is one story, with many indices."""
    async with (
        asyncio.timeout(BOUND_SECONDS),
        flaky("SIGKILL", tmp_path, AutoresetMode.NEXT_STEP, max_restarts=1) as envs,
    ):
        await envs.reset()
        with pytest.raises(CrashLoopError) as caught:
            for _ in range(4):
                await envs.send([1, 0], [2, 3])
                await envs.recv(min_envs=2)
        assert caught.value.env_ids == (2, 3)
        await nothing_pending(envs)


@pytest.mark.parametrize("failure", ENDINGS)
async def test_a_single_env_raises_a_crash_loop(failure: str, tmp_path: Path) -> None:
    """Another one of its worker, which waits too, is told as well."""
    async with (
        asyncio.timeout(BOUND_SECONDS),
        flaky(failure, tmp_path, AutoresetMode.NEXT_STEP, max_restarts=1) as envs,
    ):
        await envs.reset()
        with pytest.raises(CrashLoopError):
            for _ in range(3):
                await envs[2].step(1)
                await envs.step([0] * 4)  # a reset of one's own begins the count anew only when it was exhausted
        with pytest.raises(ResetNeeded, match="env 2 failed too often"):
            await envs[2].step(0)
        await envs[2].reset()
        assert (await envs[2].step(0))[1] == 1


@MODES
async def test_nobody_waits_for_the_answer_of_a_worker_that_died(mode: AutoresetMode, tmp_path: Path) -> None:
    """With another in its place, too: what is to come is known for as long as the vector lives."""
    async with asyncio.timeout(BOUND_SECONDS), flaky("SIGKILL", tmp_path, mode) as envs:
        await envs.reset()
        for _ in range(2):
            await envs.send([1, 0], [2, 0])
            await envs.recv(min_envs=2)
            if mode is AutoresetMode.DISABLED:
                await envs.reset()
            await envs.send([0] * 4)
            await envs.recv(min_envs=4)
            if mode is AutoresetMode.DISABLED:
                await envs.reset()
            assert not envs._batches.calls._sent  # type: ignore[union-attr]
        await nothing_pending(envs)


@pytest.mark.parametrize("cancelled", ["before the death", "after it"])
async def test_a_cancelled_step_whose_worker_is_given_up(cancelled: str, gate: Gate) -> None:
    """`recv` raises for its envs, and gives the rows of the others."""
    gates = (0, 2) if cancelled == "before the death" else (0,)
    env_fns = [*gated(gate.key, gates=gates, num_envs=3), functools.partial(Mortal, end_with_sigkill, "step", offset=3)]
    async with asyncio.timeout(BOUND_SECONDS), vector(env_fns, 2, on_failure="restart", max_restarts=1) as envs:
        await envs.reset()
        await envs.step([0, 0, 0, 1])
        await envs.step([0] * 4)  # the row of the reset clears nothing
        worker: Any = envs._started.pool.workers[1]  # type: ignore[union-attr]
        step = asyncio.create_task(envs.step([PASS_GATE, 0, PASS_GATE, 1]))
        await gate.arrived(len(gates))
        if cancelled == "after it":
            await worker.ended.wait()
        step.cancel()
        await asyncio.wait([step])
        assert step.cancelled()
        gate.open(2)
        with pytest.raises(CrashLoopError) as caught:
            await envs.recv(min_envs=4)
        assert caught.value.env_ids == (2, 3)
        assert (await envs.recv(min_envs=2)).env_ids.tolist() == [0, 1]
        await nothing_pending(envs)


# ---- whoever waits in `recv` always goes on


@pytest.mark.parametrize("end", ["close", "terminate"])
async def test_the_end_while_recv_waits(end: str, gate: Gate) -> None:
    """It says so, and so does a single env that waits."""
    async with asyncio.timeout(BOUND_SECONDS), vector(gated(gate.key, gates=(0, 1)), 3, close_grace=0.1) as envs:
        await envs.reset()
        await envs.send([PASS_GATE], [1])
        receiving = asyncio.create_task(envs.recv())
        stepping = asyncio.create_task(envs[0].step(PASS_GATE))
        await gate.arrived(2)
        if end == "close":
            await envs.close()
        else:
            envs.terminate()
        for task in (receiving, stepping):
            with pytest.raises(ClosedEnvironmentError):
                await task


@pytest.mark.not_on_ray("it waits for what lies in shared memory")
@pytest.mark.parametrize("num_turns", [0, 1, 2, 5])
async def test_the_end_while_recv_reads(num_turns: int) -> None:
    """What is large is read in a thread: an end meanwhile is no reason to wait for ever."""
    async with (
        asyncio.timeout(BOUND_SECONDS),
        vector(gated(GateKey("", ""), size=1 << 18), 3, shared_memory=False) as envs,
    ):
        await envs.reset()
        await envs.send([0, 0, 0])
        receiving = asyncio.create_task(envs.recv(min_envs=3))
        await until_ready(envs, 3)
        await turns(num_turns)
        envs.terminate()
        await asyncio.wait([receiving])
        assert isinstance(receiving.exception(), (ClosedEnvironmentError, type(None)))


async def test_a_reset_of_all_that_recv_waits_for(gate: Gate) -> None:
    """There is nothing to wait for any more."""
    async with asyncio.timeout(BOUND_SECONDS), vector(gated(gate.key), 2) as envs:
        await envs.reset()
        await envs.send([0, PASS_GATE, 0])
        receiving = asyncio.create_task(envs.recv(min_envs=3))
        await gate.arrived()
        resetting = asyncio.create_task(envs.reset())
        with pytest.raises(NoAsyncCallError):
            await receiving
        gate.open()
        observations, _ = await resetting
        assert observations[:, 1:].tolist() == [[2, 0]] * 3
        await nothing_pending(envs)


@pytest.mark.parametrize("single", [True, False])
async def test_a_reset_of_some_that_recv_waits_for(single: bool, gate: Gate) -> None:
    """It waits for the others alone."""
    async with asyncio.timeout(BOUND_SECONDS), vector(gated(gate.key), 3) as envs:
        await envs.reset()
        await envs.send([0, PASS_GATE, 0])
        receiving = asyncio.create_task(envs.recv(min_envs=3))
        await gate.arrived()
        await until_ready(envs, 2)
        resetting = asyncio.create_task(envs[1].reset() if single else envs.reset(env_ids=[1]))
        assert set(steps_of(await receiving)) == {0, 2}
        gate.open()
        await resetting
        await nothing_pending(envs)


async def test_a_single_step_of_an_env_that_recv_waits_for(gate: Gate) -> None:
    """What was left of its last call is dropped: `recv` waits for one less."""
    async with asyncio.timeout(BOUND_SECONDS), vector(gated(gate.key), 3) as envs:
        await envs.reset()
        with pytest.raises(ValueError, match="An error occurred"):
            await envs.step([0, FAIL, 0])
        await envs.reset(env_ids=[1])
        await envs.send([PASS_GATE], [1])
        receiving = asyncio.create_task(envs.recv(min_envs=3))
        await gate.arrived()
        assert (await envs[0].step(0))[1] == 2
        gate.open()
        assert steps_of(await receiving) == {2: [1, 1, 1], 1: [2, 1, 1]}


async def test_what_is_left_of_a_failed_call_wakes_recv(gate: Gate) -> None:
    """There is a row now, although no reply brings it."""
    env_fns = [*gated(gate.key, num_envs=2), functools.partial(Faulty, "reset", an_error, 2)]
    async with asyncio.timeout(BOUND_SECONDS), vector(env_fns, 3) as envs:
        await envs.reset()
        await envs.send([PASS_GATE], [1])
        receiving = asyncio.create_task(envs.recv())
        await gate.arrived()
        with pytest.raises(ValueError, match="An error occurred"):
            await envs.reset(env_ids=[2, 0], options={"fail": True})
        assert steps_of(await receiving) == {0: [2, 0, 0]}
        gate.open()


async def test_what_a_cancelled_task_had_been_answered_wakes_recv(gate: Gate) -> None:
    """Its answer was there, and is read in a thread, when it gives up."""
    async with asyncio.timeout(BOUND_SECONDS), vector(gated(gate.key), 3) as envs:
        await envs.reset()
        await envs.send([PASS_GATE], [1])
        receiving = asyncio.create_task(envs.recv())
        await gate.arrived()
        for _ in range(50):
            step = asyncio.create_task(envs[0].step(FAIL))
            await turns(1)
            (call,) = [call for call in envs._batches.calls.pending.values() if not call.is_abandoned]  # type: ignore[union-attr]
            while not call.is_complete:
                await asyncio.sleep(0)
            step.cancel()
            await asyncio.wait([step])
            if step.cancelled():
                break
            await envs[0].reset()
        with pytest.raises(ValueError, match="An error occurred"):
            await receiving
        gate.open()


# ---- several tasks, and the rules between them


async def test_a_task_for_each_of_256_envs() -> None:
    """In 2 workers; those that fail or are cancelled do not touch the rest."""
    num_envs, num_steps = 256, 20
    env_fns = [functools.partial(Raises, 1000, index) for index in range(num_envs)]

    async def run(index: int) -> list[tuple[list[float], float]]:
        sub = envs[index]
        await sub.reset()
        rows = []
        for step in range(num_steps):
            if step == 9 and index % 11 == 5:
                asyncio.get_running_loop().call_soon(tasks[index].cancel)
            observation, reward, *_ = await sub.step(FAIL if index % 7 == 3 and step == 9 else 0)
            rows.append((observation.tolist(), reward))
        return rows

    async with asyncio.timeout(BOUND_SECONDS), vector(env_fns, 2) as envs:
        tasks = [asyncio.create_task(run(index)) for index in range(num_envs)]
        await asyncio.wait(tasks)
        outcomes = {"failed": 0, "cancelled": 0, "done": 0}
        for index, task in enumerate(tasks):
            if task.cancelled():
                assert index % 11 == 5
                outcomes["cancelled"] += 1
            elif task.exception() is not None:
                assert index % 7 == 3
                assert [failure.env_index for failure in failures(task.exception())] == [index]  # type: ignore[arg-type]
                outcomes["failed"] += 1
            else:
                expected = [([float(index), 1.0, float(step)], float(step)) for step in range(1, num_steps + 1)]
                assert task.result() == expected
                outcomes["done"] += 1
        assert min(outcomes.values()) > 10
        await envs.reset()
        await envs.step([0] * num_envs)
        await nothing_pending(envs)


ASKED: dict[str, Callable[[AsyncVectorEnv], Awaitable[Any]]] = {
    "step": lambda envs: envs.step([0] * 3),
    "send": lambda envs: envs.send([0], [1]),
    "send all": lambda envs: envs.send([0] * 3),
    "single step": lambda envs: envs[1].step(0),
    "single reset": lambda envs: envs[1].reset(),
    "reset": lambda envs: envs.reset(),
    "reset of it": lambda envs: envs.reset(env_ids=[1]),
    "masked reset of others": lambda envs: envs.reset(options={"reset_mask": np.array([True, False, True])}),
}
ALLOWED_WHILE_OWED = ("single reset", "reset", "reset of it")


@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("busy", ["sent", "owed", "awaited", "awaited in all"])
async def test_an_env_that_is_busy(busy: str, asked: str, gate: Gate) -> None:
    """It is refused at once, by name and with nothing changed; a reset waits out what is owed."""
    async with asyncio.timeout(BOUND_SECONDS), vector(gated(gate.key), 3) as envs:
        await envs.reset()
        task = None
        if busy == "sent":
            await envs.send([PASS_GATE], [1])
        else:
            step = envs.step([0, PASS_GATE, 0]) if busy == "awaited in all" else envs[1].step(PASS_GATE)
            task = asyncio.create_task(step)
        await gate.arrived()
        if busy == "owed" and task is not None:
            task.cancel()
            await asyncio.wait([task])
        if asked in ALLOWED_WHILE_OWED and busy in ("sent", "owed"):
            resetting = asyncio.ensure_future(ASKED[asked](envs))
            await turns()
            assert not resetting.done()
            gate.open()
            observation, _ = await resetting
            assert observation[..., 2].max() == 0
            await nothing_pending(envs)
            return
        with pytest.raises(AlreadyPendingCallError) as refused:
            await ASKED[asked](envs)
        assert 1 in refused.value.env_ids
        assert refused.value.env_ids == (1,) or busy == "awaited in all"
        if busy != "awaited in all":
            assert (await envs[0].step(0))[1] == 1  # the others are free
        gate.open()
        if task is not None and busy != "owed":
            result = await task
            assert np.max(result[1]) == 1
        else:
            assert steps_of(await envs.recv()) == {1: [1, 1, 1]}
        assert await envs[1].get_attr("steps") == 1
        await nothing_pending(envs)


async def test_where_nothing_may_be_asked() -> None:
    """Before the start, after the end, in another loop; a single env's reset starts the vector."""

    async def iterate(envs: AsyncVectorEnv) -> None:
        async for _ in envs.batches():
            pass

    def calls(envs: AsyncVectorEnv) -> list[Callable[[], Awaitable[Any]]]:
        return [
            lambda: envs.send([0, 0]),
            envs.recv,
            lambda: iterate(envs),
            lambda: envs[0].step(0),
            lambda: envs[0].call("steps"),
        ]

    async def all_refused(envs: AsyncVectorEnv, error: type[Exception]) -> None:
        for call in [*calls(envs), *([] if error is NotStartedError else [envs[0].reset])]:
            with pytest.raises(error):
                await call()

    envs = vector([Counter, Counter], 2)
    await all_refused(envs, NotStartedError)
    with pytest.raises(NotStartedError):
        _ = envs[0].observation_space
    async with asyncio.timeout(BOUND_SECONDS):
        observation, _ = await envs[1].reset()
        assert observation.tolist() == [0, 1, 0]
        assert (await envs[1].step(0))[1] == 1
        with pytest.raises(ResetNeeded, match="env 0 has not been reset yet"):
            await envs[0].step(0)
        await asyncio.to_thread(lambda: asyncio.run(all_refused(envs, WrongLoopError)))
        await envs.close()
    await all_refused(envs, ClosedEnvironmentError)


def test_which_envs_there_are() -> None:
    """Indices count from the end too; what does not exist is an `IndexError`."""
    envs = vector([Counter] * 3, 0)
    assert [sub.env_index for sub in envs] == [0, 1, 2]
    assert envs[-1].env_index == 2
    for index in (3, -4):
        with pytest.raises(IndexError):
            envs[index]
    assert repr(envs[1]).startswith("<SubEnv 1 of AsyncVectorEnv(")


async def test_batches_end_when_nothing_is_owed() -> None:
    """Where fewer are owed than asked for, the rest is given; a failure is raised, and the loop may go on."""
    async with asyncio.timeout(BOUND_SECONDS), vector(gated(GateKey("", "")), 2) as envs:
        await envs.reset()
        await envs.send([0] * 3)
        turn = [0, 0, 0]
        async for batch in envs.batches(min_envs=2):
            again = []
            for env_index, row in steps_of(batch).items():
                turn[env_index] += 1
                assert row == [1, turn[env_index], turn[env_index]]
                if turn[env_index] < 10:
                    again.append(env_index)
            if again:
                await envs.send([0] * len(again), again)
        assert turn == [10, 10, 10]
        await envs.send([FAIL, 0], [1, 2])
        await until_ready(envs, 2)
        with pytest.raises(ValueError, match="An error occurred"):
            async for _ in envs.batches():
                pass
        assert [batch.env_ids.tolist() async for batch in envs.batches()] == [[2]]


async def test_a_refused_step_of_a_single_env_that_was_cancelled() -> None:
    """`recv` tells that it needs a reset, once; then nothing is owed."""
    async with (
        asyncio.timeout(BOUND_SECONDS),
        AsyncVectorEnv([functools.partial(Counter, 1)] * 2, num_workers=1) as envs,
    ):
        await envs.reset()
        await envs.send([0], [0])
        assert (await envs.recv()).terminations.tolist() == [True]
        step = asyncio.create_task(envs[0].step(0))
        await asyncio.sleep(0)
        step.cancel()
        await asyncio.wait([step])
        with pytest.raises(ResetNeeded, match="env 0 ended its episode"):
            await envs.recv()
        with pytest.raises(NoAsyncCallError):
            await envs.recv()
        await envs.step([0, 0])
