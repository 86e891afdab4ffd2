"""`BlockingVectorEnv` when calls time out, fail, are interrupted or come at a wrong moment."""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from fault_envs import BOUND_SECONDS, PASS_GATE, Gate, Gated, Mortal, end_with_sigkill, hang_in_python, is_running
from sample_envs import Counter, Raises

import aiovec
from aiovec.pool.local import LocalWorker

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


def blocking(env_fns: list[Any], num_workers: int = 2, **kwargs: Any) -> aiovec.BlockingVectorEnv:
    return aiovec.BlockingVectorEnv(env_fns, num_workers=num_workers, context="fork", **kwargs)


def timed_out(gate: Gate, envs: aiovec.BlockingVectorEnv) -> aiovec.CallTimeoutError:
    """Begins a step that waits at the gate, and waits for it in vain."""
    envs.step_async([0, PASS_GATE])
    with pytest.raises(aiovec.CallTimeoutError) as caught:
        envs.step_wait(timeout=0.1)
    return caught.value


def forget(held: list[Any]) -> None:
    """Lets go of what only a list, and tracebacks, still hold."""
    held.clear()
    gc.collect()


def test_a_step_that_times_out_is_waited_for_again(gate: Gate) -> None:
    """Gymnasium's class, too; the very step is answered, and no later one gets its answer."""
    envs = blocking([Counter, partial(Gated, gate.key)])
    envs.reset()
    error = timed_out(gate, envs)
    assert isinstance(error, multiprocessing.TimeoutError)
    assert isinstance(error, TimeoutError)
    assert (error.command, error.seconds, error.env_ids) == ("step", 0.1, (1,))
    assert "step_wait() has timed out after 0.1 s: it still waits for env 1. `step_wait()` waits again" in str(error)
    with pytest.raises(aiovec.CallTimeoutError):
        envs.step_wait(timeout=0)
    for refused in (lambda: envs.step([0, 0]), lambda: envs.call("work", 1), lambda: envs.recv()):
        with pytest.raises(gym.error.AlreadyPendingCallError, match=r"refused: the answer of an earlier step .*_wait"):
            refused()
    gate.open()
    observations, rewards, *_ = envs.step_wait()
    assert (observations[:, 2].tolist(), rewards.tolist()) == ([1, 1], [1, 1])
    for step in range(2, 5):
        observations, rewards, *_ = envs.step([0, 0])
        assert (observations[:, 2].tolist(), rewards.tolist()) == ([step] * 2, [step] * 2)
    envs.close()


def test_a_step_that_times_out_is_discarded_by_a_reset(gate: Gate) -> None:
    """Which waits it out."""
    envs = blocking([Counter, partial(Gated, gate.key)])
    envs.reset()
    timed_out(gate, envs)
    opener = threading.Timer(0.2, gate.open)
    opener.start()
    observations, _ = envs.reset()
    opener.join()
    assert observations[:, 2].tolist() == [0, 0]
    observations, rewards, *_ = envs.step([0, 0])
    assert (observations[:, 2].tolist(), rewards.tolist()) == ([1, 1], [1, 1])
    envs.close()


@pytest.mark.parametrize("command", ["reset", "call"])
def test_other_calls_that_time_out(gate: Gate, command: str) -> None:
    """They go on, too, and can be waited for again."""
    envs = blocking([Counter, partial(Gated, gate.key, at="reset" if command == "reset" else "work")])
    envs.reset()
    wait: Callable[..., Any]
    if command == "reset":
        envs.reset_async(options={"gate": True})
        wait = envs.reset_wait
    else:
        envs.call_async("get_wrapper_attr", "steps")
        envs.call_wait()
        envs.set_attr("at", "work")
        envs.call_async("work", 7, env_ids=[1])
        wait = envs.call_wait
    with pytest.raises(aiovec.CallTimeoutError, match=rf"{command}_wait\(\) has timed out"):
        wait(timeout=0.1)
    gate.open()
    assert len(wait(timeout=BOUND_SECONDS)) == (2 if command == "reset" else 1)
    envs.close()


def test_close_ends_a_step_that_timed_out(gate: Gate) -> None:
    """Within its time; the worker that is stuck is killed."""
    envs = blocking([Counter, partial(Gated, gate.key)])
    envs.reset()
    timed_out(gate, envs)
    began = time.monotonic()
    envs.close(timeout=0.1)
    assert time.monotonic() - began < BOUND_SECONDS
    with pytest.raises(gym.error.ClosedEnvironmentError):
        envs.step_wait()


@pytest.mark.parametrize("how", [{"terminate": True}, {"timeout": 0}, {}])
def test_close_in_the_middle_of_a_step(gate: Gate, how: dict[str, Any]) -> None:
    """However it is closed, it ends, and nothing is left."""
    envs = blocking([Counter, partial(Gated, gate.key)], close_grace=0.2)
    envs.reset()
    envs.step_async([0, PASS_GATE])
    envs.close(**how)
    assert envs.closed
    envs.close()
    for closed in (envs.reset, lambda: envs.step([0, 0]), lambda: envs.call("work"), envs.render, envs.statistics):
        with pytest.raises(gym.error.ClosedEnvironmentError):
            closed()


def test_wrong_moments() -> None:
    """As Gymnasium's classes; nothing is changed."""
    envs = blocking([Counter] * 2)
    envs.reset()
    for wait, name in ((envs.step_wait, "step"), (envs.reset_wait, "reset"), (envs.call_wait, "call")):
        with pytest.raises(gym.error.NoAsyncCallError, match=rf"{name}_wait\(\) refused: there is no {name}") as caught:
            wait()
        assert caught.value.name == name
    envs.step_async([0, 0])
    with pytest.raises(gym.error.NoAsyncCallError):
        envs.reset_wait()
    for refused in (envs.reset, lambda: envs.step_async([0, 0]), envs.render, lambda: envs.set_attr("a", 1)):
        with pytest.raises(gym.error.AlreadyPendingCallError) as pending:
            refused()
        assert pending.value.name == "step"
    observations, *_ = envs.step_wait()
    assert observations[:, 2].tolist() == [1, 1]
    with pytest.raises(gym.error.InvalidAction):
        envs.step_async([0])
    with pytest.raises(gym.error.InvalidAction):
        envs.step([0, 0, 0])
    with pytest.raises(gym.error.NoAsyncCallError):
        envs.step_wait()
    with pytest.raises(ValueError, match="values has length 3"):
        envs.set_attr("name", [1, 2, 3])
    observations, *_ = envs.step([0, 0])
    assert observations[:, 2].tolist() == [2, 2]
    envs.close()


def test_failures_of_envs() -> None:
    """As under `await`: the env's own exception, the others whole, a reset mends it."""
    envs = blocking([Raises] * 3)
    envs.reset()
    envs.step_async([0, 1, 0])
    with pytest.raises(ValueError, match="An error occurred.") as caught:
        envs.step_wait(timeout=BOUND_SECONDS)
    assert [failure.env_index for failure in aiovec.failures(caught.value)] == [1]
    with pytest.raises(gym.error.ResetNeeded):
        envs.step([0, 0, 0])
    envs.reset(env_ids=[1])
    with pytest.raises(ExceptionGroup) as group:
        envs.step([1, 0, 1])
    assert [failure.env_index for failure in aiovec.failures(group.value)] == [0, 2]
    envs.reset()
    with pytest.raises(AttributeError):
        envs.call("nothing", env_ids=[1])
    envs.close()


def test_a_death_and_a_time_limit() -> None:
    """A worker that is killed, and one that is stuck."""
    envs = blocking([partial(Mortal, end_with_sigkill, "step"), Counter], step_timeout=BOUND_SECONDS)
    envs.reset()
    with pytest.raises(aiovec.WorkerDied):
        envs.step([1, 0])
    observations, _ = envs.reset()
    assert observations[:, 2].tolist() == [0, 0]
    envs.step([0, 0])
    envs.close()
    envs = blocking([partial(Mortal, hang_in_python, "step"), Counter], step_timeout=0.3)
    envs.reset()
    with pytest.raises(aiovec.EnvTimeoutError):
        envs.step([1, 0])
    envs.reset()
    envs.step([0, 0])
    envs.close()


def test_restarts() -> None:
    """The failed row says so."""
    envs = blocking([Raises] * 2, on_failure="restart")
    envs.reset()
    _, rewards, _, truncations, infos = envs.step([1, 0])
    assert np.isnan(rewards).tolist() == [True, False]
    assert truncations.tolist() == [True, False]
    assert isinstance(infos["failure"][0], ValueError)
    envs.step([0, 0])
    envs.close()


def test_a_start_that_fails_leaves_nothing() -> None:
    """The env's own exception comes from the constructor."""

    def fails() -> Any:
        raise LookupError("no env")

    with pytest.raises(LookupError, match="no env"):
        blocking([Counter, fails])


@pytest.mark.blocks_loop
async def test_inside_a_running_loop() -> None:
    """It says what to use; in a thread of its own it works, start to end."""
    with pytest.raises(aiovec.RunningLoopError, match="Use `AsyncVectorEnv` with `await`"):
        blocking([Counter])

    def in_a_thread() -> float:
        envs = blocking([Counter] * 2)
        envs.reset()
        _, rewards, *_ = envs.step([0, 0])
        envs.close()
        return float(rewards.sum())

    assert await asyncio.to_thread(in_a_thread) == 2
    envs = await asyncio.to_thread(blocking, [Counter] * 2)
    for call in (envs.reset, lambda: envs.step([0, 0]), lambda: envs.send([0, 0]), envs.close):
        with pytest.raises(aiovec.RunningLoopError):
            call()
    await asyncio.to_thread(envs.reset)
    await asyncio.to_thread(envs.close)


@pytest.mark.not_on_ray("it looks for local processes")
@pytest.mark.blocks_loop
@pytest.mark.parametrize("moment", ["idle", "begun"])
async def test_terminate_inside_a_running_loop(moment: str) -> None:
    """It waits for nothing, so it need not be refused: the workers end, everything is freed."""
    envs = await asyncio.to_thread(blocking, [Counter] * 2)
    await asyncio.to_thread(envs.reset)
    if moment == "begun":
        await asyncio.to_thread(envs.step_async, [0, 0])
    pids = [child.pid or 0 for child in multiprocessing.active_children() if child.name.startswith("aiovec")]
    assert pids
    for _ in range(2):
        envs.terminate()
        assert envs.closed
    assert not any(map(is_running, pids))
    with pytest.raises(gym.error.ClosedEnvironmentError):
        await asyncio.to_thread(envs.reset)
    envs.close()


@pytest.mark.blocks_loop
async def test_terminate_inside_a_running_loop_while_another_thread_waits(gate: Gate) -> None:
    """That one is told at once, and can close then."""
    envs = await asyncio.to_thread(blocking, [partial(Gated, gate.key), Counter])
    await asyncio.to_thread(envs.reset)
    step = asyncio.create_task(asyncio.to_thread(envs.step, [PASS_GATE, 0]))
    await gate.arrived()
    while not envs._in_use.locked():
        await asyncio.sleep(0.001)
    envs.terminate()
    with pytest.raises(gym.error.ClosedEnvironmentError):
        await step
    await asyncio.to_thread(envs.close)


@pytest.mark.blocks_loop
async def test_forgotten_inside_a_running_loop() -> None:
    """The collector may find it anywhere."""
    envs: list[Any] = []
    thread = threading.Thread(target=lambda: envs.append(blocking([Counter] * 2)))
    thread.start()
    thread.join()
    with pytest.warns(ResourceWarning, match="never closed"):
        forget(envs)


@pytest.mark.parametrize("moment", ["idle", "begun", "late"])
def test_forgotten(gate: Gate, moment: str) -> None:
    """A warning, and nothing is left."""
    envs = blocking([Counter, partial(Gated, gate.key)])
    envs.reset()
    if moment == "begun":
        envs.step_async([0, PASS_GATE])
    if moment == "late":
        timed_out(gate, envs)
    held = [envs]
    del envs
    with pytest.warns(ResourceWarning, match="never closed"):
        forget(held)


def test_advice_names_no_await() -> None:
    """There is no loop here that would take one."""
    envs = blocking([Counter] * 2)
    with pytest.raises(aiovec.ResetNeeded, match=r"`envs.reset\(\)` for all") as reset_needed:
        envs.step([0, 0])
    envs.reset()
    envs.send([0, 0])
    with pytest.raises(aiovec.AlreadyPendingCallError, match=r"`envs.recv\(\)` collects it") as owed:
        envs.step([0, 0])
    assert not any("await " in str(refused.value) for refused in (reset_needed, owed))
    envs.close()


def test_one_thread_at_a_time(gate: Gate) -> None:
    """Another thread is refused while one waits; afterwards it may go on."""
    envs = blocking([partial(Gated, gate.key), Counter])
    envs.reset()
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(envs.step([PASS_GATE, 0])))
    thread.start()
    asyncio.run(gate.arrived())
    while not envs._in_use.locked():  # between `step_async` and `step_wait`
        time.sleep(0.001)
    with pytest.raises(gym.error.AlreadyPendingCallError, match="another thread"):
        envs.reset()
    gate.open()
    thread.join()
    assert results[0][1].tolist() == [1, 1]
    envs.step([0, 0])
    envs.close()


def test_terminate_while_another_thread_waits(gate: Gate) -> None:
    """It is told at once; a close is refused, as it would have to wait."""
    envs = blocking([partial(Gated, gate.key), Counter])
    envs.reset()
    raised: list[BaseException] = []

    def step() -> None:
        try:
            envs.step([PASS_GATE, 0])
        except aiovec.ClosedEnvironmentError as error:
            raised.append(error)

    thread = threading.Thread(target=step)
    thread.start()
    asyncio.run(gate.arrived())
    while not envs._in_use.locked():  # between `step_async` and `step_wait`
        time.sleep(0.001)
    with pytest.raises(gym.error.AlreadyPendingCallError):
        envs.close()
    envs.terminate()
    thread.join()
    assert len(raised) == 1
    for closed in (envs.reset, lambda: envs.step([0, 0]), envs.step_wait):
        with pytest.raises(gym.error.ClosedEnvironmentError):
            closed()
    envs.close()
    assert envs.closed


def handled(_signal_number: int, _frame: Any) -> None:
    raise LookupError("the user's own handler")


def test_signal_handlers_are_left_as_they_are() -> None:
    """Of the user, and Python's own, whatever a call raises; in any thread."""
    envs = blocking([Raises] * 2)
    envs.reset()
    before = signal.getsignal(signal.SIGINT)
    try:
        for handler in (handled, signal.SIG_IGN, signal.default_int_handler):
            signal.signal(signal.SIGINT, handler)
            with pytest.raises(ValueError, match="An error occurred."):
                envs.step([1, 0])
            assert signal.getsignal(signal.SIGINT) is handler
            envs.reset()
        thread = threading.Thread(target=envs.reset)
        thread.start()
        thread.join()
        signal.signal(signal.SIGINT, handled)
        envs.step_async([0, 0])
        envs.step_wait()
        assert signal.getsignal(signal.SIGINT) is handled
    finally:
        signal.signal(signal.SIGINT, before)
    envs.close()


FORKS = """
    import gc, os, sys
    import gymnasium as gym
    import aiovec

    envs = aiovec.BlockingVectorEnv([lambda: gym.make("CartPole-v1")] * 4, num_workers=2)
    envs.reset()
    pid = os.fork()
    if pid == 0:
        del envs
        gc.collect()
        sys.exit(0)
    os.waitpid(pid, 0)
    print(envs.step([0] * 4)[1].sum())
    envs.close()
"""


def test_a_fork_of_the_program_does_not_touch_the_vector(tmp_path: Path) -> None:
    """It forgets the vector, and the program's own goes on."""
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(FORKS))
    environment = os.environ | {"PYTHONPATH": str(Path(aiovec.__file__).parents[1])}
    command = [sys.executable, "-W", "ignore::DeprecationWarning", str(program)]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=False)
    assert (ended.stdout, ended.stderr, ended.returncode) == ("4.0\n", "", 0)


@pytest.mark.not_on_ray("it is about how local workers are sent a request")
@pytest.mark.parametrize("again", ["step_wait", "reset"])
def test_ctrl_c_while_a_request_is_sent(monkeypatch: pytest.MonkeyPatch, again: str) -> None:
    """It comes through once all workers have theirs: the step goes on, as after one in the middle of the wait."""
    envs = blocking([Counter] * 2)
    envs.reset()
    post = LocalWorker.post

    def interrupted(worker: LocalWorker, *args: Any) -> None:
        post(worker, *args)
        if worker.index == 0:
            signal.raise_signal(signal.SIGINT)

    for begin in (envs.step, envs.step_async):
        with monkeypatch.context() as patched:
            patched.setattr(LocalWorker, "post", interrupted)
            with pytest.raises(KeyboardInterrupt):
                begin([0, 0])
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if again == "step_wait":
            assert envs.step_wait()[1].tolist() == [1, 1]
        observations, _ = envs.reset()
        assert observations[:, 2].tolist() == [0, 0]
        assert envs.step([0, 0])[1].tolist() == [1, 1]
        envs.reset()
    envs.close()


@pytest.mark.not_on_ray("it is about how local workers are sent a request")
def test_a_second_ctrl_c_leaves_pythons_own_handler(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is raised where it comes; the one after that, too, is heard."""
    envs = blocking([Counter] * 2)
    envs.reset()

    def interrupted_twice(_worker: LocalWorker, *_args: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr(LocalWorker, "post", interrupted_twice)
        with pytest.raises(KeyboardInterrupt):
            envs.step([0, 0])
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    envs.close(terminate=True)


@pytest.mark.not_on_ray("Ray itself hangs now and then in a process that was forked")
@pytest.mark.parametrize("shared_memory", [True, False])
@pytest.mark.parametrize("moment", ["idle", "begun"])
def test_collected_in_a_fork(moment: str, shared_memory: bool) -> None:
    """A process that somebody forks, and in which the collector finds it, takes nothing from us."""
    envs = blocking([Counter] * 2, shared_memory=shared_memory)
    envs.reset()
    if moment == "begun":
        envs.step_async([0, 0])
    held = [envs]
    del envs
    pid = os.fork()
    if not pid:
        try:
            warnings.simplefilter("ignore")
            forget(held)
        finally:
            os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    envs = held[0]
    if moment == "idle":
        envs.step_async([0, 0])
    assert envs.step_wait(timeout=BOUND_SECONDS)[1].tolist() == [1, 1]
    assert envs.step([0, 0])[1].tolist() == [2, 2]
    envs.close()


UNCLOSED = """
    import sys
    import gymnasium as gym
    import aiovec

    envs = aiovec.BlockingVectorEnv([lambda: gym.make("CartPole-v1")] * 4, num_workers=2)
    envs = gym.wrappers.vector.RecordEpisodeStatistics(envs)
    envs.reset(seed=1)
    envs.step(envs.action_space.sample())
    if sys.argv[1] == "begun":
        envs.unwrapped.step_async(envs.action_space.sample())
    if sys.argv[1] == "raises":
        raise SystemExit("an end")
    print("ends")
"""


@pytest.mark.parametrize("how", ["returns", "begun", "raises"])
def test_a_program_that_never_closes(tmp_path: Path, how: str) -> None:
    """It ends, quietly, as Gymnasium's users are used to."""
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(UNCLOSED))
    environment = os.environ | {"PYTHONPATH": str(Path(aiovec.__file__).parents[1])}
    ended = subprocess.run(
        [sys.executable, str(program), how], capture_output=True, text=True, env=environment, timeout=60, check=False
    )
    assert ended.stderr == ("an end\n" if how == "raises" else "")
    assert ended.returncode == (how == "raises")


PROGRAM = """
    import sys
    import gymnasium as gym
    import numpy as np
    import aiovec

    class Slow(gym.Env):
        observation_space = gym.spaces.Box(0, 1, (1,), np.float32)
        action_space = gym.spaces.Discrete(2)
        steps = 0
        mark = sys.argv[2]

        def reset(self, *, seed=None, options=None):
            self.steps = 0
            return np.zeros(1, np.float32), {}

        def step(self, action):
            self.steps += 1
            if action:
                import pathlib, time
                pathlib.Path(self.mark).touch()
                time.sleep(1.0)
            return np.zeros(1, np.float32), float(self.steps), False, False, {}

    envs = aiovec.BlockingVectorEnv([Slow] * 2, num_workers=int(sys.argv[1]))
    envs.reset()
    print("ready", flush=True)
    try:
        while True:
            envs.step([1, 1])
    except KeyboardInterrupt:
        print("interrupted", flush=True)
    if int(sys.argv[1]):
        print(envs.step_wait()[1].tolist() == envs.step([0, 0])[1].tolist(), flush=True)
    envs.reset()
    print(envs.step([0, 0])[1].tolist(), flush=True)
    envs.close()
    print("closed", flush=True)
"""


@pytest.mark.parametrize("num_workers", ["0", "2"])
def test_ctrl_c(tmp_path: Path, num_workers: str) -> None:
    """A real one, in the middle of a step: quiet, and the vector goes on; the step's own answer is still there."""
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(PROGRAM))
    environment = os.environ | {"PYTHONPATH": str(Path(aiovec.__file__).parents[1])}
    with subprocess.Popen(
        [sys.executable, str(program), num_workers, str(tmp_path / "stepping")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    ) as running:
        too_late = threading.Timer(60, running.kill)
        too_late.start()
        assert running.stdout is not None
        assert running.stdout.readline() == "ready\n"
        while not (tmp_path / "stepping").exists():
            assert running.poll() is None
            time.sleep(0.005)
        running.send_signal(signal.SIGINT)
        printed, errors = running.communicate()
        too_late.cancel()
        too_late.join()
    lines = printed.splitlines()
    if num_workers == "2":
        assert lines == ["interrupted", "False", "[1.0, 1.0]", "closed"], errors
    else:
        assert lines == ["interrupted", "[1.0, 1.0]", "closed"], errors
    assert errors == ""
    assert running.returncode == 0
