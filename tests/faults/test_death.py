"""Workers that end by themselves, or get stuck: in every moment, and what is true afterwards.

The table: how a worker ends × in what it ends × how many workers there are, each on both event loops.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import io
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fault_envs import (
    BOUND_SECONDS,
    PASS_GATE,
    FailsWhile,
    Gate,
    Gated,
    Mortal,
    context_of_loop,
    end_inside_a_frame,
    end_with_a_child_that_holds_the_socket,
    end_with_sigkill,
    exit_with_3,
    hang_in_c,
    hang_in_python,
    is_running,
    say_something,
    segfault,
    stop,
    turns,
)

from aiovec import (
    AlreadyPendingCallError,
    AsyncVectorEnv,
    ClosedEnvironmentError,
    EnvTimeoutError,
    ResetNeeded,
    WorkerDied,
    WorkerStartError,
    failures,
)

STEP_TIMEOUT = 0.6
START_TIMEOUT = 4  # seconds: on a loaded machine a worker needs one of them for its own start

DEATHS: dict[str, tuple[Callable[[], object], int]] = {
    "SIGKILL": (end_with_sigkill, -signal.SIGKILL),
    "exit": (exit_with_3, 3),
    "segfault": (segfault, -signal.SIGSEGV),
    "inside a frame": (end_inside_a_frame, 3),
    "a child holds the socket": (end_with_a_child_that_holds_the_socket, 3),
}
STUCK: dict[str, Callable[[], object]] = {"python": hang_in_python, "C": hang_in_c, "stopped": stop}

CALLS: dict[str, Callable[[AsyncVectorEnv, list[int]], Any]] = {
    "reset": lambda envs, _actions: envs.reset(options={"die": True}),
    "step": lambda envs, actions: envs.step(actions),
    "render": lambda envs, _actions: envs.render(),
    "work": lambda envs, _actions: envs.call("work"),
}

NUM_ENVS = 4
MORTAL = 2  # the env that ends its worker

# The moments of a death, and how many workers there are: as many as envs only where that may differ.
TABLE = [(death, moment, num_workers) for death in DEATHS for moment in CALLS for num_workers in (1, 2)]
TABLE += [(death, "step", NUM_ENVS) for death in DEATHS]
TABLE += [(death, moment, NUM_ENVS) for death in ("SIGKILL", "exit", "segfault") for moment in ("reset", "work")]
STUCK_TABLE = [(stuck, moment, num_workers) for stuck in STUCK for moment in CALLS for num_workers in (1, 2)]
STUCK_TABLE += [("C", moment, NUM_ENVS) for moment in ("reset", "step", "work")]
CLOSE_TABLE = [(ending, 2) for ending in (*DEATHS, *STUCK)]
CLOSE_TABLE += [(ending, NUM_ENVS) for ending in ("SIGKILL", "exit", "segfault", "C")]


def vector(ending: Callable[[], object], at: str, num_workers: int, **options: Any) -> AsyncVectorEnv:
    """Four envs, one of which may end its worker."""
    env_fns = [
        functools.partial(Mortal, ending, at if index == MORTAL else "never", offset=index) for index in range(NUM_ENVS)
    ]
    options.setdefault("context", context_of_loop())
    return AsyncVectorEnv(env_fns, num_workers=num_workers, **options)


def mortal_worker(envs: AsyncVectorEnv) -> Any:
    """The one that ends."""
    return next(worker for worker in envs._started.pool.workers if MORTAL in worker.env_ids)  # type: ignore[union-attr]


async def check_afterwards(envs: AsyncVectorEnv, lost: tuple[int, ...]) -> None:
    """The lost envs ask for a reset, the others have lost nothing; after a reset all is as ever."""
    others = [index for index in range(NUM_ENVS) if index not in lost]
    if others:
        assert await envs.get_attr("offset", env_ids=others) == tuple(others)
    with pytest.raises((ResetNeeded, AlreadyPendingCallError)) as refused:  # what the others did is owed, or was taken
        await envs.step([0] * NUM_ENVS)
    if isinstance(refused.value, ResetNeeded):
        assert refused.value.env_ids == lost
    observations, _ = await envs.reset(env_ids=lost)
    np.testing.assert_array_equal(observations, np.array([[index, 1, 0] for index in lost], np.float32))
    await envs.reset()
    for step in range(1, 4):
        observations, rewards, *_, infos = await envs.step([0] * NUM_ENVS)
        np.testing.assert_array_equal(observations[:, 2], [step] * NUM_ENVS)
        np.testing.assert_array_equal(rewards, [step] * NUM_ENVS)
        np.testing.assert_array_equal(infos["steps"], [step] * NUM_ENVS)
    assert await envs.get_attr("steps") == (3,) * NUM_ENVS


def may_be_heard_of(death: str, on_ray: bool) -> None:
    """Ray hears of an actor's end by its sockets alone."""
    if on_ray and death == "a child holds the socket":
        pytest.skip("Ray does not hear of the end of an actor whose child holds its sockets")


def check_of_an_actor(error: WorkerDied) -> None:
    """It takes with it in which env it was, and Ray does not tell its exit code; but where it was, and what Ray knows."""
    assert (error.env_index, error.exitcode, error.stack) == (None, None, "")
    assert "Ray node" in error.place
    assert "worker process has died" in error.cause
    assert error.cause in str(error)


async def not_running(pid: int) -> None:
    """Ray ends a process soon, not at once."""
    while is_running(pid):
        await asyncio.sleep(0.005)


@pytest.mark.parametrize(("death", "moment", "num_workers"), TABLE)
async def test_a_worker_that_ends(death: str, moment: str, num_workers: int, on_ray: bool) -> None:
    """The awaiting task has the whole story at once; a reset builds the lost envs anew."""
    ending, exitcode = DEATHS[death]
    may_be_heard_of(death, on_ray)
    async with asyncio.timeout(BOUND_SECONDS), vector(ending, moment, num_workers) as envs:
        await envs.reset()
        worker = mortal_worker(envs)
        lost = tuple(worker.env_ids)
        with pytest.raises(WorkerDied) as caught:
            await CALLS[moment](envs, [1] * NUM_ENVS)
        error = caught.value
        assert (error.env_ids, error.pid, error.command) == (lost, worker.pid, moment)
        assert [failure.env_index for failure in failures(error)] == list(lost)
        if on_ray:
            check_of_an_actor(error)
            await not_running(worker.pid)
        else:
            assert (error.env_index, error.exitcode) == (MORTAL, exitcode)
            assert (f"inside env {MORTAL}" in str(error)) is (len(lost) > 1)
            assert ("fault_envs.py" in error.stack) is (death == "segfault")
            assert not is_running(worker.pid)
        await check_afterwards(envs, lost)


@pytest.mark.parametrize(("stuck", "moment", "num_workers"), STUCK_TABLE)
async def test_a_stuck_env(stuck: str, moment: str, num_workers: int, on_ray: bool) -> None:
    """It is named, with the worker's stack of that moment; its worker is ended, the others go on."""
    async with (
        asyncio.timeout(BOUND_SECONDS),
        vector(STUCK[stuck], moment, num_workers, step_timeout=STEP_TIMEOUT) as envs,
    ):
        await envs.reset()
        worker = mortal_worker(envs)
        lost = tuple(worker.env_ids)
        # An actor that is in C, or stopped, does not say in which env it is.
        is_silent = on_ray and stuck != "python"
        late = lost if is_silent else (MORTAL,)
        with pytest.raises(EnvTimeoutError, match=r"envs? .* did not end .* within 0.6 s") as caught:
            await CALLS[moment](envs, [1] * NUM_ENVS)
        error = caught.value
        assert (error.env_ids, error.lost_env_ids, error.pid) == (late, lost, worker.pid)
        assert error.seconds == STEP_TIMEOUT
        assert error.command == (moment if moment in ("step", "reset") else "call")
        assert [failure.env_index for failure in failures(error)] == list(lost)
        assert ("fault_envs.py" in error.stack) is not is_silent
        assert error.stack in str(error)
        assert ("Ray node" in error.place) is on_ray
        assert "aiovec/worker" not in error.stack
        if on_ray:
            await not_running(worker.pid)
        assert not is_running(worker.pid)
        await check_afterwards(envs, lost)


@pytest.mark.parametrize(("ending", "num_workers"), CLOSE_TABLE)
async def test_close_ends_with_a_worker_that_does_not(ending: str, num_workers: int) -> None:
    """Its end was asked for: nothing to raise, and `close_grace` bounds the rest."""
    end = DEATHS[ending][0] if ending in DEATHS else STUCK[ending]
    envs = await vector(end, "close", num_workers, close_grace=0.3)
    async with asyncio.timeout(BOUND_SECONDS):
        await envs.close()
    assert envs.closed


@pytest.mark.parametrize("on_failure", ["raise", "restart"])
@pytest.mark.parametrize("ending", [*DEATHS, *STUCK])
async def test_the_start_of_a_worker_that_ends(ending: str, on_failure: Any, on_ray: bool) -> None:
    """Nothing is left of the start; what is stuck is told with its stack."""
    may_be_heard_of(ending, on_ray)
    end = DEATHS[ending][0] if ending in DEATHS else STUCK[ending]
    env_fns = [functools.partial(Mortal, end, "init" if index == 1 else "never", offset=index) for index in range(2)]
    start_timeout = BOUND_SECONDS if ending in DEATHS else START_TIMEOUT
    envs = AsyncVectorEnv(
        env_fns, num_workers=2, context=context_of_loop(), start_timeout=start_timeout, on_failure=on_failure
    )
    async with asyncio.timeout(BOUND_SECONDS):
        if ending in DEATHS:
            with pytest.raises(WorkerDied, match="during build") as died:
                await envs
            assert died.value.env_ids == (1,)
            if on_ray:
                check_of_an_actor(died.value)
            else:
                assert died.value.exitcode == DEATHS[ending][1]
            assert "reset" not in str(died.value)
        else:
            with pytest.raises(EnvTimeoutError, match="env 1 did not end build within 4 s") as late:
                await envs
            assert ("fault_envs.py" in late.value.stack) is not (on_ray and ending != "python")


@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.parametrize("abandoned", [False, True], ids=["idle", "owed"])
async def test_a_worker_that_ends_while_nobody_waits(abandoned: bool, num_workers: int, on_ray: bool) -> None:
    """The next step says it, once; a reset does not need to."""
    async with asyncio.timeout(BOUND_SECONDS), vector(stop, "step", num_workers) as envs:
        for told in (True, False):
            await envs.reset()
            worker = mortal_worker(envs)
            if abandoned:
                step = asyncio.create_task(envs.step([1] * NUM_ENVS))
                await turns()
                step.cancel()
                await asyncio.wait([step])
            os.kill(worker.pid, signal.SIGKILL)
            await worker.ended.wait()
            if told:
                with pytest.raises(WorkerDied, match="died" if on_ray else "was killed by SIGKILL"):
                    await envs.step([0] * NUM_ENVS)
                await check_afterwards(envs, tuple(worker.env_ids))
            else:
                await envs.reset()
                await envs.step([0] * NUM_ENVS)


@pytest.mark.parametrize("group", [False, True], ids=["same group", "own group"])
@pytest.mark.parametrize("end", ["close", "terminate", "death"])
async def test_what_an_env_started_ends_with_its_worker(end: str, group: bool) -> None:
    """Also in a process group of its own, as a shell puts its jobs."""
    async with asyncio.timeout(BOUND_SECONDS), vector(end_with_sigkill, "step", 2) as envs:
        await envs.reset()
        (child,) = await envs.call("start_a_child", group, env_ids=[MORTAL])
        assert is_running(child)
        if end == "close":
            await envs.close()
        elif end == "terminate":
            envs.terminate()
        else:
            with pytest.raises(WorkerDied):
                await envs.step([1] * NUM_ENVS)
        while is_running(child):
            await asyncio.sleep(0.005)


async def test_workers_that_end_at_once_are_all_told(gate: Gate) -> None:
    """One by the step, the other by the next call; each exception is one of its own."""
    async with asyncio.timeout(BOUND_SECONDS), at_the_gate(gate) as envs:
        await envs.reset()
        step = asyncio.create_task(envs.step([0, PASS_GATE, PASS_GATE, 0]))
        await gate.arrived(2)
        workers = envs._started.pool.workers  # type: ignore[union-attr]
        for worker in workers:
            os.kill(worker.pid, signal.SIGKILL)
        told: set[tuple[int, ...]] = set()
        with pytest.raises(WorkerDied) as caught:
            await step
        told.add(caught.value.env_ids)
        for worker in workers:
            await worker.ended.wait()
        with pytest.raises(WorkerDied) as caught:
            await envs.step([0] * NUM_ENVS)
        told.add(caught.value.env_ids)
        assert told == {(0, 1), (2, 3)}
        with pytest.raises(ResetNeeded):
            await envs.step([0] * NUM_ENVS)
        again: list[WorkerDied] = []
        for _ in range(3):
            with pytest.raises(WorkerDied, match="during steps") as caught:
                await envs.get_attr("steps", env_ids=[0])
            again.append(caught.value)
        lengths = {len(traceback.extract_tb(error.__traceback__)) for error in again}
        assert len({id(error) for error in again}) == 3
        assert len(lengths) == 1
        await envs.reset()
        await envs.step([0] * NUM_ENVS)


async def test_a_death_that_a_call_has_told_is_not_told_again() -> None:
    """The next step says what is to be done."""
    async with asyncio.timeout(BOUND_SECONDS), vector(stop, "never", 2) as envs:
        await envs.reset()
        await killed(envs)
        with pytest.raises(ResetNeeded):
            await envs.step([0] * NUM_ENVS)


@pytest.mark.not_on_ray("Ray shows what actors print")
@pytest.mark.parametrize("session", [False, True], ids=["same session", "own session"])
@pytest.mark.parametrize("end", ["close", "terminate", "death"])
async def test_what_an_env_started_writes_for_ever(end: str, session: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not keep the loop with the end of its worker; in a session of its own it outlives that."""
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    async with asyncio.timeout(BOUND_SECONDS), vector(end_with_sigkill, "step", 2) as envs:
        await envs.reset()
        (child,) = await envs.call("start_a_flood", session, env_ids=[MORTAL])
        try:
            if end == "close":
                await envs.close()
            elif end == "terminate":
                envs.terminate()
            else:
                with pytest.raises(WorkerDied):
                    await envs.step([0, 0, 1, 0])
        finally:
            if session:
                with contextlib.suppress(ProcessLookupError):  # our end of its pipe is closed, and so it may have ended
                    os.kill(child, signal.SIGKILL)
        while is_running(child):
            await asyncio.sleep(0.005)


class Interrupted(io.StringIO):
    """A Ctrl-C comes while it is written."""

    def write(self, _text: str) -> int:
        raise KeyboardInterrupt


@pytest.mark.not_on_ray("Ray shows what actors print")
@pytest.mark.parametrize("end", ["death", "close", "terminate", "interrupted"])
async def test_an_end_whose_last_words_cannot_be_shown(end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On an ASCII stdout, or with a Ctrl-C meanwhile: the end is told, and the worker is reaped."""
    stream = Interrupted() if end == "interrupted" else io.TextIOWrapper(io.BytesIO(), "ascii")
    async with asyncio.timeout(BOUND_SECONDS), vector(say_something, "step", 2) as envs:
        await envs.reset()
        await envs.step([0, 0, 1, 0])
        worker = mortal_worker(envs)
        with monkeypatch.context() as patched:
            patched.setattr(sys, "stdout", stream)
            if end == "death":
                os.kill(worker.pid, signal.SIGKILL)
                with pytest.raises(WorkerDied, match="SIGKILL"):
                    await envs.step([0] * NUM_ENVS)
            elif end == "close":
                await envs.close()
            elif end == "terminate":
                envs.terminate()
                await worker.ended.wait()
            else:
                with pytest.raises(KeyboardInterrupt):
                    worker.terminate()
        assert worker.ended.is_set()
        assert not is_running(worker.pid)
        envs.terminate()


@pytest.mark.not_on_ray("it is about local processes")
@pytest.mark.parametrize("why", [errno.ENOSYS, errno.EPERM], ids=["old kernel", "seccomp"])
@pytest.mark.parametrize("context", [None, "fork", "forkserver", "spawn"])
async def test_without_pidfds(why: int, context: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Python knows the call and the system refuses it: a thread waits for each worker instead, of whatever context."""

    def refused(_pid: int, _flags: int = 0) -> int:
        raise OSError(why, os.strerror(why))

    source = f"import os\ndef refused(*_):\n    raise OSError({why}, os.strerror({why}))\nos.pidfd_open = refused\n"
    (tmp_path / "sitecustomize.py").write_text(source)
    monkeypatch.setattr(os, "pidfd_open", refused)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    async with asyncio.timeout(BOUND_SECONDS), vector(exit_with_3, "step", 2, context=context) as envs:
        await envs.reset()
        for _ in range(2):
            with pytest.raises(WorkerDied) as caught:
                await envs.step([0, 0, 1, 0])
            assert (caught.value.env_ids, caught.value.exitcode) == ((2, 3), 3)
            await envs.reset()
        await envs.step([0] * NUM_ENVS)
        worker = mortal_worker(envs)
        envs.terminate()
        await worker.ended.wait()
        assert worker.exitcode == -signal.SIGKILL
        assert not is_running(worker.pid)


# ---- the worker that takes the place of one that died


async def killed(envs: AsyncVectorEnv) -> None:
    """After the worker of the last two envs was killed, and that was told."""
    worker = mortal_worker(envs)
    os.kill(worker.pid, signal.SIGKILL)
    await worker.ended.wait()
    with pytest.raises(WorkerDied):
        await envs.get_attr("steps", env_ids=[MORTAL])


@pytest.mark.parametrize("context", [None, "fork", "forkserver", "spawn"])
@pytest.mark.parametrize("shared_memory", [True, False])
async def test_a_reset_starts_another_worker(shared_memory: bool, context: Any) -> None:
    """As often as it takes; only the envs that are meant are reset, and the others of the new worker ask for it."""
    options = {"context": context, "shared_memory": shared_memory}
    async with asyncio.timeout(2 * BOUND_SECONDS), vector(stop, "never", 2, **options) as envs:
        await envs.reset()
        for _ in range(3):
            await killed(envs)
            observations, _ = await envs.reset(env_ids=[3])
            np.testing.assert_array_equal(observations, np.array([[3, 1, 0]], np.float32))
            with pytest.raises((ResetNeeded, WorkerDied)):
                await envs.step([0] * NUM_ENVS)
            with pytest.raises(ResetNeeded, match="env 2 must be reset, after the death of its worker"):
                await envs.step([0] * NUM_ENVS)
            await envs.reset(env_ids=[2])
            observations, *_ = await envs.step([0] * NUM_ENVS)
            np.testing.assert_array_equal(observations[2:, 2], [1, 1])


@pytest.mark.parametrize("ending", [end_with_sigkill, segfault, hang_in_c])
async def test_a_reset_after_a_step_in_which_both_workers_end(ending: Callable[[], object]) -> None:
    """The step tells one of them, as soon as it has ended; a reset takes care of both, whenever the other one ends."""
    env_fns = [functools.partial(Mortal, ending, "step", offset=index) for index in range(NUM_ENVS)]
    envs = AsyncVectorEnv(env_fns, num_workers=2, step_timeout=STEP_TIMEOUT, context=context_of_loop())
    async with asyncio.timeout(2 * BOUND_SECONDS), envs:
        await envs.reset()
        for episodes in range(1, 4):
            with pytest.raises((WorkerDied, EnvTimeoutError)):
                await envs.step([0, 1, 1, 0])
            observations, _ = await envs.reset(seed=episodes)
            np.testing.assert_array_equal(observations, [[index, 1, 0] for index in range(NUM_ENVS)])
            observations, *_ = await envs.step([0] * NUM_ENVS)
            np.testing.assert_array_equal(observations[:, 2], [1] * NUM_ENVS)


async def first_dies_second_waits(envs: AsyncVectorEnv, gate: Gate) -> Any:
    """The first worker was killed in a step, which has told it; the second one, which is returned, is at the gate in it."""
    await envs.reset()
    step = asyncio.create_task(envs.step([0, PASS_GATE, PASS_GATE, 0]))
    await gate.arrived(2)
    first, second = envs._started.pool.workers  # type: ignore[union-attr]
    os.kill(first.pid, signal.SIGKILL)
    with pytest.raises(WorkerDied) as caught:
        await step
    assert caught.value.env_ids == (0, 1)
    return second


def at_the_gate(gate: Gate) -> AsyncVectorEnv:
    """Four envs in two workers, which wait at the gate when they are told to."""
    env_fns = [functools.partial(Gated, gate.key, offset=index) for index in range(NUM_ENVS)]
    return AsyncVectorEnv(env_fns, num_workers=2, context=context_of_loop())


@pytest.mark.parametrize("env_ids", [None, [3, 0]])
@pytest.mark.parametrize("is_cancelled", [False, True])
async def test_a_worker_that_ends_in_what_a_reset_waits_out(
    gate: Gate, env_ids: list[int] | None, is_cancelled: bool
) -> None:
    """It had not begun the reset, which another worker does: nobody is told of an end that is of no use to anybody."""
    async with asyncio.timeout(BOUND_SECONDS), at_the_gate(gate) as envs:
        second = await first_dies_second_waits(envs, gate)
        reset = asyncio.create_task(envs.reset(env_ids=env_ids))
        await turns()
        if is_cancelled:
            reset.cancel()
            await asyncio.wait([reset])
        os.kill(second.pid, signal.SIGKILL)
        asked = range(NUM_ENVS) if env_ids is None else env_ids
        rows = {index: [index, 1, 0] for index in asked}
        if is_cancelled:
            batch = await envs.recv(min_envs=len(rows))
            np.testing.assert_array_equal(batch.observations, [rows[index] for index in batch.env_ids])
        else:
            observations, _ = await reset
            np.testing.assert_array_equal(observations, [*rows.values()])
        for env_index in set(range(NUM_ENVS)) - {*rows}:
            with pytest.raises(ResetNeeded):
                await envs[env_index].step(0)
            await envs[env_index].reset()
        observations, *_ = await envs.step([0] * NUM_ENVS)
        np.testing.assert_array_equal(observations, [[index, 1, 1] for index in range(NUM_ENVS)])


async def test_a_worker_that_ends_before_a_reset_with_a_mask(gate: Gate) -> None:
    """Another one has no last row of the envs that are not reset: the reset tells its end."""
    env_fns = [functools.partial(Gated, gate.key, at="work", offset=index) for index in range(NUM_ENVS)]
    async with (
        asyncio.timeout(BOUND_SECONDS),
        AsyncVectorEnv(env_fns, num_workers=2, context=context_of_loop()) as envs,
    ):
        await envs.reset()
        work = asyncio.create_task(envs.call("work", 1, env_ids=[2]))
        await gate.arrived()
        mask = np.array([False, False, False, True])
        reset = asyncio.create_task(envs.reset(options={"reset_mask": mask}))
        await turns()
        os.kill(mortal_worker(envs).pid, signal.SIGKILL)
        for task in (work, reset):
            with pytest.raises(WorkerDied):
                await task
        await check_afterwards(envs, (2, 3))


@pytest.mark.not_on_ray("it takes descriptors from Ray, too")
async def test_no_worker_for_a_reset_that_waited(gate: Gate) -> None:
    """The reset tells the end that it could not mend; the next one mends it."""
    async with asyncio.timeout(BOUND_SECONDS), at_the_gate(gate) as envs:
        second = await first_dies_second_waits(envs, gate)
        reset = asyncio.create_task(envs.reset(env_ids=[2, 3]))
        await turns()
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
        try:
            os.kill(second.pid, signal.SIGKILL)
            with pytest.raises(WorkerDied, match="during reset"):
                await reset
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        observations, _ = await envs.reset()
        np.testing.assert_array_equal(observations, [[index, 1, 0] for index in range(NUM_ENVS)])


async def test_an_env_that_cannot_be_built_anew(tmp_path: Path) -> None:
    """It raises what it raised, also in the next reset; its neighbour goes on."""
    flag = tmp_path / "broken"
    env_fns = [functools.partial(FailsWhile, str(flag) if index == 3 else "/none", index) for index in range(NUM_ENVS)]
    async with asyncio.timeout(BOUND_SECONDS), AsyncVectorEnv(env_fns, num_workers=2) as envs:
        await envs.reset()
        flag.touch()
        await killed(envs)
        for _ in range(2):
            with pytest.raises(RuntimeError, match="exists") as caught:
                await envs.reset()
            assert [(failure.env_index, failure.command) for failure in failures(caught.value)] == [(3, "reset")]
            assert await envs.get_attr("steps", env_ids=[2]) == (0,)
            with pytest.raises(ResetNeeded, match="failed, and was not built anew yet"):
                await envs.get_attr("steps", env_ids=[3])
            with pytest.raises(ResetNeeded, match="failed in reset"):
                await envs.step([0] * NUM_ENVS)
        flag.unlink()
        await envs.reset()
        await envs.step([0] * NUM_ENVS)


@pytest.mark.parametrize("ending", ["SIGKILL", "C"])
async def test_a_new_worker_that_ends_too(ending: str, tmp_path: Path, on_ray: bool) -> None:
    """The reset says so, and the next one tries again."""
    armed = tmp_path / "armed"
    end = DEATHS[ending][0] if ending in DEATHS else STUCK[ending]
    env_fns = [functools.partial(Mortal, end, "init", index, str(armed)) for index in range(NUM_ENVS)]
    start_timeout = BOUND_SECONDS if ending in DEATHS else START_TIMEOUT
    async with (
        asyncio.timeout(BOUND_SECONDS),
        AsyncVectorEnv(env_fns, num_workers=2, start_timeout=start_timeout) as envs,
    ):
        await envs.reset()
        armed.touch()
        await killed(envs)
        for _ in range(2):
            with pytest.raises((WorkerDied, EnvTimeoutError)) as caught:
                await envs.reset(env_ids=[2, 3])
            if isinstance(caught.value, EnvTimeoutError):
                assert (caught.value.env_ids, caught.value.command) == ((2, 3) if on_ray else (2,), "build")
                assert ("fault_envs.py" in caught.value.stack) is not on_ray
            else:
                assert (caught.value.env_ids, caught.value.command) == ((2, 3), "reset")
        armed.unlink()
        await envs.reset()
        await envs.step([0] * NUM_ENVS)


def built_at_the_gate(gate: Gate, **options: Any) -> AsyncVectorEnv:
    """Four envs; the construction of one waits at the gate, which is open once, for the start."""
    gate.open()
    env_fns: list[Any] = [functools.partial(Mortal, stop, "never", offset=index) for index in range(NUM_ENVS)]
    env_fns[MORTAL] = functools.partial(Gated, gate.key, at="init", offset=MORTAL)
    return AsyncVectorEnv(env_fns, num_workers=2, context=context_of_loop(), **options)


async def reset_that_starts_a_worker(envs: AsyncVectorEnv, gate: Gate) -> asyncio.Task[Any]:
    """It has started one in the place of one that was killed, and waits for its envs."""
    await envs.reset()
    await gate.arrived()  # that of the start
    await killed(envs)
    reset = asyncio.create_task(envs.reset())
    await gate.arrived()
    return reset


async def test_a_cancelled_reset_that_starts_a_worker(gate: Gate) -> None:
    """What was begun goes on; the next reset finds the new worker."""
    async with asyncio.timeout(BOUND_SECONDS), built_at_the_gate(gate) as envs:
        reset = await reset_that_starts_a_worker(envs, gate)
        reset.cancel()
        await asyncio.wait([reset])
        assert reset.cancelled()
        pid = mortal_worker(envs).pid
        with pytest.raises(AlreadyPendingCallError, match="is still owed"):
            await envs.step([0] * NUM_ENVS)
        gate.open()
        observations, _ = await envs.reset()
        assert mortal_worker(envs).pid == pid
        np.testing.assert_array_equal(observations[:, 1], [3, 3, 2, 2])


@pytest.mark.not_on_ray("an actor that is killed ends soon, not at once")
async def test_close_while_a_worker_is_replaced(gate: Gate) -> None:
    """The new worker is ended, too."""
    async with asyncio.timeout(BOUND_SECONDS), built_at_the_gate(gate, close_grace=0.3) as envs:
        reset = await reset_that_starts_a_worker(envs, gate)
        worker = mortal_worker(envs)
        await envs.close()
        assert not is_running(worker.pid)
        await asyncio.wait([reset])
        assert isinstance(reset.exception(), (ClosedEnvironmentError, type(None)))  # it may have ended in time


@pytest.mark.not_on_ray("it takes descriptors from Ray, too")
async def test_no_worker_for_lack_of_descriptors() -> None:
    """A clear error, with nothing changed: later there may be some."""
    async with asyncio.timeout(BOUND_SECONDS), vector(stop, "never", 2) as envs:
        await envs.reset()
        await killed(envs)
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
        try:
            with pytest.raises(WorkerStartError, match="no worker for envs 2, 3: Too many open files.*ulimit -n"):
                await envs.reset()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert await envs.get_attr("steps", env_ids=[0, 1]) == (0, 0)
        await envs.reset()
        await envs.step([0] * NUM_ENVS)


async def test_rows_of_a_worker_that_has_answered_and_died(gate: Gate) -> None:
    """The others still step while another task resets its envs: the step has its own rows all the same."""
    async with asyncio.timeout(BOUND_SECONDS), at_the_gate(gate) as envs:
        await envs.reset()
        await envs.step([0] * NUM_ENVS)
        step = asyncio.create_task(envs.step([0, PASS_GATE, 0, 0]))
        await gate.arrived()
        assert await envs.get_attr("steps", env_ids=[2]) == (2,)  # behind the step
        worker = mortal_worker(envs)
        os.kill(worker.pid, signal.SIGKILL)
        await worker.ended.wait()
        observations, _ = await envs.reset(env_ids=[2, 3])
        np.testing.assert_array_equal(observations, [[2, 1, 0], [3, 1, 0]])
        gate.open()
        observations, rewards, *_ = await step
        np.testing.assert_array_equal(observations, [[index, 1, 2] for index in range(NUM_ENVS)])
        np.testing.assert_array_equal(rewards, [2] * NUM_ENVS)
        observations, *_ = await envs.step([0] * NUM_ENVS)
        np.testing.assert_array_equal(observations[:, 2], [3, 3, 1, 1])


@pytest.mark.parametrize("end", ["death", "terminate"])
@pytest.mark.not_on_ray("it takes descriptors from Ray, too")
async def test_an_end_without_a_descriptor(end: str) -> None:
    """What else lives in the worker's session cannot be looked for then; the worker has ended all the same."""
    async with asyncio.timeout(BOUND_SECONDS), vector(end_with_sigkill, "step", 2) as envs:
        await envs.reset()
        worker = mortal_worker(envs)
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
        try:
            if end == "death":
                with pytest.raises(WorkerDied, match="SIGKILL"):
                    await envs.step([0, 0, 1, 0])
            else:
                envs.terminate()
                await worker.ended.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert worker.ended.is_set()
        assert not is_running(worker.pid)
