"""An exception of an env reaches the awaiting task as itself; the other envs are whole."""

from __future__ import annotations

import asyncio
import functools
import inspect
import os
import sys
import traceback
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import sample_envs
from fault_envs import (
    BOUND_SECONDS,
    BadText,
    Deep,
    FailsToLoad,
    FailsToUnpickle,
    FailsWhile,
    Faulty,
    HoldsLock,
    HoldsSocket,
    Returns,
    TwoArguments,
    WithoutSpaces,
    an_error,
    error_with_everything,
    group_of_its_own,
    holds_itself,
    holds_itself_in_a_list,
    not_an_env,
    observes_a_lock,
    os_error,
    sealed_error,
    unloadable,
    with_a_generator,
    with_a_lock,
    without_a_result,
)
from sample_envs import Counter, Raises

from aiovec import (
    AsyncVectorEnv,
    InvalidEnvResultError,
    NotStartedError,
    RemoteError,
    ResetNeeded,
    failures,
)

pytestmark = pytest.mark.every_python


def counters(num_envs: int, **others: Any) -> list[Callable[[], gym.Env[Any, Any]]]:
    """So many counters that bear their index; `others` are env_fns in place of some: ``_1=...``."""
    env_fns: list[Callable[[], gym.Env[Any, Any]]] = [
        functools.partial(Counter, length=1000, offset=index) for index in range(num_envs)
    ]
    for index, env_fn in others.items():
        env_fns[int(index[1:])] = env_fn
    return env_fns


def raisers(num_envs: int) -> list[Callable[[], gym.Env[Any, Any]]]:
    return [functools.partial(Raises, length=1000, offset=index) for index in range(num_envs)]


def faulty(moment: str, make_error: Callable[[], BaseException], num_envs: int = 3, index: int = 1) -> list[Any]:
    """Counters, of which one raises at a moment; the others are the same class, so that they have its methods."""
    env_fns: list[Any] = [functools.partial(Faulty, "never", an_error, offset=i) for i in range(num_envs)]
    env_fns[index] = functools.partial(Faulty, moment, make_error, offset=index)
    return env_fns


def rows(*observations: Sequence[float]) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.array(observations, np.float32)


def assert_names(error: BaseException, env_index: int, command: str, in_parent: bool) -> None:
    """The exception says whose it is: in a note for people, by `failures` for programs."""
    assert any(f"env {env_index} " in note and command in note for note in error.__notes__)
    (failure,) = failures(error)
    assert (failure.env_index, failure.command) == (env_index, command)
    assert (failure.pid == os.getpid()) is in_parent


# ---- step


@pytest.mark.parametrize("num_workers", [0, 1, 2, 3])
async def test_step_raises_what_the_env_raised(num_workers: int) -> None:
    """The issue's own example: type, text, traceback, the env, and who went on."""
    async with asyncio.timeout(BOUND_SECONDS), AsyncVectorEnv(raisers(3), num_workers=num_workers) as envs:
        await envs.reset()
        with pytest.raises(ValueError) as caught:
            await envs.step([0, 0, 1])
        error = caught.value
        assert type(error) is ValueError
        assert error.args == ("An error occurred.",)
        assert_names(error, 2, "step", in_parent=num_workers == 0)
        assert failures(error)[0].exception is error

        text = "".join(traceback.format_exception(error))
        lines, first = inspect.getsourcelines(Raises.step)
        source = 'raise ValueError("An error occurred.")'
        number = first + next(index for index, line in enumerate(lines) if source in line)
        assert f'File "{sample_envs.__file__}", line {number}, in step' in text
        assert source in text
        assert "env 2" in text
        assert Path(__file__).name in text  # the frames under the await, too

        assert await envs.get_attr("steps") == (1, 1, 0)
        with pytest.raises(ResetNeeded, match=r"env 2 .*reset\(env_ids=\[2\]\)") as refused:
            await envs.step([0, 0, 0])
        assert refused.value.env_ids == (2,)
        assert await envs.get_attr("steps") == (1, 1, 0)

        observations, infos = await envs.reset(env_ids=[2])
        np.testing.assert_array_equal(observations, rows([2, 2, 0]))
        assert infos == {}
        observations, rewards, terminations, truncations, infos = await envs.step([0, 0, 0])
        np.testing.assert_array_equal(observations, rows([0, 1, 2], [1, 1, 2], [2, 2, 1]))
        np.testing.assert_array_equal(rewards, [2, 2, 1])
        assert not terminations.any()
        assert not truncations.any()
        np.testing.assert_array_equal(infos["steps"], [2, 2, 1])


@pytest.mark.parametrize("shared_memory", [True, False])
async def test_a_reset_mask_heals_the_failed_env(shared_memory: bool) -> None:
    """The rows of the others repeat their last observation, which is the one of the failed call."""
    vector = AsyncVectorEnv(raisers(3), num_workers=2, shared_memory=shared_memory)
    async with asyncio.timeout(BOUND_SECONDS), vector as envs:
        await envs.reset()
        await envs.step([0, 0, 0])
        with pytest.raises(ValueError, match="An error occurred"):
            await envs.step([0, 1, 0])
        observations, _ = await envs.reset(options={"reset_mask": np.array([False, True, False])})
        np.testing.assert_array_equal(observations, rows([0, 1, 2], [1, 2, 0], [2, 1, 2]))
        observations, *_ = await envs.step([0, 0, 0])
        np.testing.assert_array_equal(observations, rows([0, 1, 3], [1, 2, 1], [2, 1, 3]))


async def test_a_mask_without_the_failed_env_leaves_it_failed() -> None:
    """Resetting the others is no reset of the failed one."""
    async with asyncio.timeout(BOUND_SECONDS), AsyncVectorEnv(raisers(3), num_workers=2) as envs:
        await envs.reset()
        with pytest.raises(ValueError, match="An error occurred"):
            await envs.step([0, 1, 0])
        await envs.reset(env_ids=[0, 2])
        with pytest.raises(ResetNeeded) as refused:
            await envs.step([0, 0, 0])
        assert refused.value.env_ids == (1,)
        observations, _ = await envs.reset()
        np.testing.assert_array_equal(observations, rows([0, 3, 0], [1, 2, 0], [2, 3, 0]))


@pytest.mark.parametrize("num_workers", [0, 1, 2, 4])
async def test_several_failures_are_a_group_in_ascending_order(num_workers: int) -> None:
    """Whichever worker answers first."""
    async with asyncio.timeout(BOUND_SECONDS), AsyncVectorEnv(raisers(4), num_workers=num_workers) as envs:
        await envs.reset()
        with pytest.raises(ExceptionGroup) as caught:
            await envs.step([1, 0, 1, 1])
        group = caught.value
        assert [type(error) for error in group.exceptions] == [ValueError] * 3
        assert "3 envs failed in step" in str(group)
        assert [failure.env_index for failure in failures(group)] == [0, 2, 3]
        assert [failure.exception for failure in failures(group)] == list(group.exceptions)
        for error, env_index in zip(group.exceptions, (0, 2, 3), strict=True):
            assert_names(error, env_index, "step", in_parent=num_workers == 0)
        with pytest.raises(ResetNeeded) as refused:
            await envs.step([0, 0, 0, 0])
        assert refused.value.env_ids == (0, 2, 3)
        assert await envs.get_attr("steps") == (0, 1, 0, 0)
        with pytest.raises(ExceptionGroup, match=r"4 envs failed in call\('nope'\)"):
            await envs.call("nope")

        observations, _ = await envs.reset(env_ids=[3, 0, 2])
        np.testing.assert_array_equal(observations, rows([3, 2, 0], [0, 2, 0], [2, 2, 0]))
        observations, *_ = await envs.step([0, 0, 0, 0])
        np.testing.assert_array_equal(observations, rows([0, 2, 1], [1, 1, 2], [2, 2, 1], [3, 2, 1]))


async def test_one_except_star_serves_one_failure_and_many() -> None:
    """So a training loop needs one clause only."""
    seen: list[list[int]] = []
    async with asyncio.timeout(BOUND_SECONDS), AsyncVectorEnv(raisers(3), num_workers=2) as envs:
        for actions in ([0, 1, 0], [1, 0, 1]):
            await envs.reset()
            try:
                await envs.step(actions)
            except* ValueError as group:
                seen.append([failure.env_index for error in group.exceptions for failure in failures(error)])
    assert seen == [[1], [0, 2]]


# ---- which exceptions arrive, and as what


@pytest.mark.parametrize("num_workers", [0, 2])
async def test_everything_of_an_exception_arrives(num_workers: int) -> None:
    """Arguments, attributes, notes, cause, and the cause's own traceback."""
    envs_fns = faulty("step", error_with_everything)
    async with asyncio.timeout(BOUND_SECONDS), AsyncVectorEnv(envs_fns, num_workers=num_workers) as envs:
        await envs.reset()
        with pytest.raises(TwoArguments) as caught:
            await envs.step([1, 1, 1])
        error = caught.value
        assert type(error) is TwoArguments
        assert (error.what, error.code, error.args) == ("a socket", 7, ("a socket (7)",))
        assert error.__notes__[0] == "a note of the env"
        assert isinstance(error.__cause__, KeyError)
        assert error.__cause__.args == ("the cause",)
        assert 'raise KeyError("the cause")' in "".join(traceback.format_exception(error))
        assert_names(error, 1, "step", in_parent=num_workers == 0)


@pytest.mark.parametrize("num_workers", [0, 2])
async def test_local_variables_come_where_they_are_wanted(num_workers: int) -> None:
    """As text, since the values themselves may not travel; off by default."""
    for traceback_locals in (False, True):
        vector = AsyncVectorEnv(raisers(3), num_workers=num_workers, traceback_locals=traceback_locals)
        async with asyncio.timeout(BOUND_SECONDS), vector as envs:
            await envs.reset()
            with pytest.raises(ValueError) as caught:
                await envs.step([0, 1, 0])
            printed = "".join(traceback.format_exception(caught.value))
            assert ("    action = 1\n" in printed.replace("np.int64(1)", "1")) is traceback_locals
            assert ("    self = <sample_envs.Raises object" in printed) is traceback_locals


async def test_an_os_error_keeps_its_attributes() -> None:
    """They come from its arguments, and its text from both."""
    async with asyncio.timeout(BOUND_SECONDS), AsyncVectorEnv(faulty("step", os_error), num_workers=2) as envs:
        await envs.reset()
        with pytest.raises(FileNotFoundError) as caught:
            await envs.step([1, 1, 1])
        assert (caught.value.errno, caught.value.filename) == (2, "/nowhere")
        assert_names(caught.value, 1, "step", in_parent=False)


@pytest.mark.parametrize("num_workers", [0, 2])
async def test_a_group_of_the_env_is_one_failure(num_workers: int) -> None:
    """`failures` tells aiovec's group from an env's own."""
    env_fns = faulty("step", group_of_its_own)
    async with asyncio.timeout(BOUND_SECONDS), AsyncVectorEnv(env_fns, num_workers=num_workers) as envs:
        await envs.reset()
        with pytest.raises(ExceptionGroup, match="two at once") as caught:
            await envs.step([1, 1, 1])
        assert [type(error) for error in caught.value.exceptions] == [ValueError, TypeError]
        assert_names(caught.value, 1, "step", in_parent=num_workers == 0)
        parts = caught.value.split(ValueError)  # as `except*` does
        assert [failure.env_index for part in parts for failure in failures(part)] == [1, 1]


UNPICKLABLE = [(HoldsLock, "a lock"), (HoldsSocket, "a socket"), (FailsToLoad, "no load")]


@pytest.mark.parametrize(("make_error", "text"), UNPICKLABLE)
async def test_what_does_not_pickle_arrives_as_remote_error(make_error: Callable[[str], Exception], text: str) -> None:
    """With the type's name, the text, and the traceback as the worker printed it."""
    env_fns = faulty("step", functools.partial(make_error, text))
    async with asyncio.timeout(BOUND_SECONDS), AsyncVectorEnv(env_fns, num_workers=2) as envs:
        await envs.reset()
        with pytest.raises(RemoteError) as caught:
            await envs.step([1, 1, 1])
        error = caught.value
        assert error.type_name == f"fault_envs.{make_error.__name__}"
        assert error.text == text
        assert "fault_envs.py" in error.formatted
        assert "raise self.make_error()" in str(error)
        assert_names(error, 1, "step", in_parent=False)
        with pytest.raises(ResetNeeded, match="env 1"):
            await envs.step([0, 0, 0])


@pytest.mark.parametrize("moment", ["step", "reset"])
async def test_a_worker_frees_what_an_exception_held(moment: str) -> None:
    """With the exception and at once, not when the garbage collector comes: it may have held a GPU's memory."""
    env_fns = faulty(moment, functools.partial(HoldsSocket, "a socket"), num_envs=2)
    async with asyncio.timeout(BOUND_SECONDS), AsyncVectorEnv(env_fns, num_workers=1) as envs:
        await envs.reset()
        before = await envs.call("descriptors")
        for _ in range(3):
            with pytest.raises(RemoteError):
                await (envs.step([1, 1]) if moment == "step" else envs.reset(options={"fail": True}))
            await envs.reset()
        assert await envs.call("descriptors") == before


@pytest.mark.parametrize("num_workers", [1, 2])
async def test_an_exception_that_forbids_attributes_fails_its_env_alone(num_workers: int) -> None:
    """The worker cuts its traceback past its class."""
    env_fns = faulty("step", sealed_error)
    async with asyncio.timeout(BOUND_SECONDS), AsyncVectorEnv(env_fns, num_workers=num_workers) as envs:
        await envs.reset()
        with pytest.raises(RemoteError, match="Sealed: An error occurred") as caught:
            await envs.step([1, 1, 1])
        assert_names(caught.value, 1, "step", in_parent=False)
        assert (await envs.recv()).env_ids.tolist() == [0, 2]


async def test_an_exception_without_text_does_not_hide_the_failure() -> None:
    """Its `__str__` raises, in the worker and here."""
    async with asyncio.timeout(BOUND_SECONDS), AsyncVectorEnv(faulty("step", BadText), num_workers=2) as envs:
        await envs.reset()
        with pytest.raises(BadText) as caught:
            await envs.step([1, 1, 1])
        assert_names(caught.value, 1, "step", in_parent=False)


async def test_a_thousand_frames_arrive() -> None:
    """A traceback that deep does not pickle in its nested form."""
    env_fns = counters(2, _1=Deep)
    async with asyncio.timeout(BOUND_SECONDS), AsyncVectorEnv(env_fns, num_workers=2) as envs:
        await envs.reset()
        with pytest.raises(ValueError, match="from far below") as caught:
            await envs.step([0, 1])
        frames = [frame for frame in traceback.extract_tb(caught.value.__traceback__) if frame.name == "down"]
        assert len(frames) == 1001
        assert frames[-1].line == 'raise ValueError("from far below")'
        assert_names(caught.value, 1, "step", in_parent=False)


STOPPERS = [SystemExit, KeyboardInterrupt, GeneratorExit, StopIteration, StopAsyncIteration, asyncio.CancelledError]


@pytest.mark.parametrize("num_workers", [0, 2])
async def test_what_would_stop_the_task_is_wrapped(num_workers: int) -> None:
    """The original is the cause; the worker lives, and so does this task."""
    env_fns = faulty("step", an_error)
    async with asyncio.timeout(BOUND_SECONDS), AsyncVectorEnv(env_fns, num_workers=num_workers) as envs:
        await envs.reset()
        for stopper in STOPPERS:
            if num_workers == 0 and stopper is KeyboardInterrupt:
                continue  # a real Ctrl-C: see the next test
            await envs.set_attr("make_error", functools.partial(stopper, 7))
            (before,) = await envs.get_attr("steps", env_ids=[0])
            with pytest.raises(RemoteError, match=stopper.__name__) as caught:
                await envs.step([1, 1, 1])
            cause = caught.value.__cause__
            assert type(cause) is stopper
            assert cause.args == (7,)
            assert "raise self.make_error()" in "".join(traceback.format_exception(caught.value))
            assert_names(caught.value, 1, "step", in_parent=num_workers == 0)
            task = asyncio.current_task()
            assert task is not None
            assert not task.cancelling()
            with pytest.raises(ResetNeeded, match="env 1"):
                await envs.step([0, 0, 0])
            await envs.reset(env_ids=[1])
            observations, *_ = await envs.step([0, 0, 0])
            assert observations[:, 2].tolist() == [before + 2, 1, before + 2]


async def test_a_ctrl_c_in_process_stays_itself() -> None:
    """Without workers an env's KeyboardInterrupt may be the user's own; afterwards a reset makes all whole."""
    env_fns = faulty("step", KeyboardInterrupt)
    async with asyncio.timeout(BOUND_SECONDS), AsyncVectorEnv(env_fns, num_workers=0) as envs:
        await envs.reset()
        with pytest.raises(KeyboardInterrupt):
            await envs.step([1, 1, 1])
        with pytest.raises(ResetNeeded, match="interrupted"):
            await envs.step([0, 0, 0])
        await envs.reset()
        observations, *_ = await envs.step([0, 0, 0])
        np.testing.assert_array_equal(observations, rows([0, 2, 1], [1, 2, 1], [2, 2, 1]))


# ---- at the start


def gone_module() -> Callable[[], gym.Env[Any, Any]]:
    """A function of a module that only this process has: it travels by name, and the worker cannot import it."""
    module = types.ModuleType("only_in_the_parent")
    exec("def make(): raise AssertionError('built in the parent')", module.__dict__)  # noqa: S102
    sys.modules["only_in_the_parent"] = module
    function: Callable[[], gym.Env[Any, Any]] = module.make
    return function


START_FAILURES: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "init": (lambda: functools.partial(Faulty, "init", an_error), ValueError, "An error occurred"),
    "unpickling": (FailsToUnpickle, LookupError, "an env_fn that does not load"),
    "importing": (gone_module, ModuleNotFoundError, "only_in_the_parent"),
    "a dict": (lambda: not_an_env, TypeError, r"env_fns\[1\] returned .*not a gymnasium.Env"),
    "no spaces": (lambda: WithoutSpaces, TypeError, r"<.*WithoutSpaces.*> has no observation_space: set it"),
    "none": (lambda: without_a_result, TypeError, r"env_fns\[1\] returned None.*not a gymnasium.Env"),
}


@pytest.fixture
def start_failure(request: pytest.FixtureRequest) -> Any:
    make, error, text = START_FAILURES[request.param]
    yield make(), error, text
    sys.modules.pop("only_in_the_parent", None)


@pytest.mark.parametrize(
    ("start_failure", "num_workers"),
    [*((failure, 2) for failure in START_FAILURES), *((failure, 0) for failure in ("init", "a dict", "none"))],
    indirect=["start_failure"],
)
async def test_a_failed_start_raises_what_the_env_raised(start_failure: Any, num_workers: int) -> None:
    """And leaves nothing (see the fixture `nothing_left_behind`)."""
    env_fn, error, text = start_failure
    envs = AsyncVectorEnv(counters(3, _1=env_fn), num_workers=num_workers)
    async with asyncio.timeout(BOUND_SECONDS):
        for start in (envs.__aenter__, envs.reset):
            with pytest.raises(error, match=text) as caught:
                await start()
            assert type(caught.value) is error
            assert_names(caught.value, 1, "build", in_parent=num_workers == 0)
            assert not envs.closed
            with pytest.raises(NotStartedError):
                envs.observation_space
        await envs.close()
    assert envs.closed


async def test_several_envs_that_cannot_be_built_are_a_group() -> None:
    """All are tried, in every worker, so that all can be corrected at once."""
    fails = functools.partial(Faulty, "init", an_error)
    env_fns = counters(5, _1=fails, _2=fails, _4=not_an_env)
    async with asyncio.timeout(BOUND_SECONDS):
        with pytest.raises(ExceptionGroup) as caught:
            await AsyncVectorEnv(env_fns, num_workers=2)
    assert [failure.env_index for failure in failures(caught.value)] == [1, 2, 4]
    assert [type(error) for error in caught.value.exceptions] == [ValueError, ValueError, TypeError]


@pytest.mark.parametrize("num_workers", [0, 2])
async def test_the_same_vector_starts_again_after_a_failed_start(num_workers: int, tmp_path: Path) -> None:
    """Once what was in the way is gone."""
    obstacle = tmp_path / "obstacle"
    obstacle.touch()
    fails = functools.partial(FailsWhile, str(obstacle), offset=1)
    envs = AsyncVectorEnv(counters(3, _1=fails), num_workers=num_workers)
    async with asyncio.timeout(BOUND_SECONDS):
        for _ in range(2):
            with pytest.raises(RuntimeError, match="obstacle exists"):
                await envs
        obstacle.unlink()
        async with envs:
            await envs.reset()
            observations, *_ = await envs.step([0, 0, 0])
            np.testing.assert_array_equal(observations, rows([0, 1, 1], [1, 1, 1], [2, 1, 1]))


def test_a_vector_whose_start_failed_starts_in_another_loop(tmp_path: Path) -> None:
    """A failed start does not bind it."""
    obstacle = tmp_path / "obstacle"
    obstacle.touch()
    envs = AsyncVectorEnv([functools.partial(FailsWhile, str(obstacle))], num_workers=1)

    async def use() -> Any:
        async with asyncio.timeout(BOUND_SECONDS), envs:
            return (await envs.reset())[0]

    with pytest.raises(RuntimeError, match="obstacle exists"):
        asyncio.run(use())
    assert not envs.closed
    obstacle.unlink()
    np.testing.assert_array_equal(asyncio.run(use()), rows([0, 1, 0]))


# ---- the other commands


@pytest.mark.parametrize("num_workers", [0, 2])
async def test_reset_raises_what_the_env_raised(num_workers: int) -> None:
    """The others were reset; the failed one needs another."""
    env_fns = faulty("reset", an_error)
    async with asyncio.timeout(BOUND_SECONDS), AsyncVectorEnv(env_fns, num_workers=num_workers) as envs:
        with pytest.raises(ValueError, match="An error occurred") as caught:
            await envs.reset(options={"fail": True})
        assert_names(caught.value, 1, "reset", in_parent=num_workers == 0)
        assert await envs.get_attr("episodes") == (1, 0, 1)
        with pytest.raises(ResetNeeded) as refused:
            await envs.step([0, 0, 0])
        assert refused.value.env_ids == (1,)
        with pytest.raises(ValueError, match="An error occurred"):
            await envs.reset(options={"fail": True}, env_ids=[2, 1])
        assert await envs.get_attr("episodes") == (1, 0, 2)
        await envs.reset(env_ids=[1])
        observations, *_ = await envs.step([0, 0, 0])
        np.testing.assert_array_equal(observations, rows([0, 1, 1], [1, 1, 1], [2, 2, 1]))


Command = Callable[[AsyncVectorEnv], Any]
COMMANDS: dict[str, tuple[Command, str]] = {
    "render": (lambda envs: envs.render(), "render"),
    "work": (lambda envs: envs.call("work"), "call('work')"),
    "get_attr": (lambda envs: envs.get_attr("broken"), "call('broken')"),
    "set_attr": (lambda envs: envs.set_attr("guarded", 7), "set_attr('guarded')"),
}


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("moment", COMMANDS)
async def test_a_call_raises_what_the_env_raised(moment: str, num_workers: int) -> None:
    """The others were called, and no env needs a reset for it."""
    command, name = COMMANDS[moment]
    env_fns = faulty(moment, an_error)
    async with asyncio.timeout(BOUND_SECONDS), AsyncVectorEnv(env_fns, num_workers=num_workers) as envs:
        await envs.reset()
        with pytest.raises(ValueError, match="An error occurred") as caught:
            await command(envs)
        assert_names(caught.value, 1, name, in_parent=num_workers == 0)
        if moment == "set_attr":
            assert await envs.get_attr("guarded_value", env_ids=[2, 0]) == (7, 7)
        observations, *_ = await envs.step([0, 0, 0])
        np.testing.assert_array_equal(observations, rows([0, 1, 1], [1, 1, 1], [2, 1, 1]))


async def test_several_failures_of_a_call_are_a_group() -> None:
    """In ascending order, although the call named the envs in another one."""
    env_fns = [functools.partial(Faulty, "work", an_error)] * 4
    async with asyncio.timeout(BOUND_SECONDS), AsyncVectorEnv(env_fns, num_workers=2) as envs:
        with pytest.raises(ExceptionGroup) as caught:
            await envs.call("work", env_ids=[3, 0, 2])
        assert [failure.env_index for failure in failures(caught.value)] == [0, 2, 3]


@pytest.mark.parametrize("num_workers", [0, 1, 2])
async def test_close_raises_what_the_env_raised(num_workers: int) -> None:
    """Everything is freed all the same, and a second close has nothing to say."""
    async with asyncio.timeout(BOUND_SECONDS):
        envs = await AsyncVectorEnv(faulty("close", an_error), num_workers=num_workers)
        await envs.reset()
        with pytest.raises(ValueError, match="An error occurred") as caught:
            await envs.close()
        assert_names(caught.value, 1, "close", in_parent=num_workers == 0)
        assert envs.closed
        await envs.close()


async def test_several_failures_of_close_are_a_group() -> None:
    """One worker's failure does not keep another's from being told."""
    env_fns = [functools.partial(Faulty, "close", an_error)] * 3
    async with asyncio.timeout(BOUND_SECONDS):
        envs = await AsyncVectorEnv(env_fns, num_workers=2)
        with pytest.raises(ExceptionGroup, match="3 envs failed in close") as caught:
            await envs.close()
    assert [failure.env_index for failure in failures(caught.value)] == [0, 1, 2]


async def test_a_failed_step_inside_async_with_is_not_hidden_by_a_failed_close() -> None:
    """Both are told, the second with the first as its context."""
    fails_twice = functools.partial(Faulty, "close", os_error)
    async with asyncio.timeout(BOUND_SECONDS):
        with pytest.raises(FileNotFoundError) as caught:
            async with AsyncVectorEnv(counters(2, _1=fails_twice), num_workers=2):
                raise LookupError("of the training")
    assert isinstance(caught.value.__context__, LookupError)


# ---- what cannot travel, and what does not fit


@pytest.mark.parametrize("result", [with_a_lock, unloadable])
@pytest.mark.parametrize("num_workers", [1, 2])
async def test_an_info_that_cannot_travel_fails_its_env_alone(num_workers: int, result: Callable[[Any], Any]) -> None:
    """The failure names the env; the others of the same worker are whole."""
    env_fns = [functools.partial(Returns, result, offset=index) for index in range(3)]
    async with asyncio.timeout(BOUND_SECONDS), AsyncVectorEnv(env_fns, num_workers=num_workers) as envs:
        await envs.reset()
        with pytest.raises(Exception, match=r"(?i)pickle|load") as caught:
            await envs.step([0, 1, 0])
        assert_names(caught.value, 1, "step", in_parent=False)
        with pytest.raises(ResetNeeded) as refused:
            await envs.step([0, 0, 0])
        assert refused.value.env_ids == (1,)
        with pytest.raises(Exception, match=r"(?i)pickle|load") as caught:
            await envs.reset(options={"wrong": True}, env_ids=[1])
        assert_names(caught.value, 1, "reset", in_parent=False)
        await envs.reset(env_ids=[1])
        observations, *_ = await envs.step([0, 0, 0])
        assert observations[:, 2].tolist() == [2, 1, 2]


@pytest.mark.parametrize("num_workers", [0, 1, 2])
async def test_an_info_that_holds_itself_fails_its_env_alone(num_workers: int) -> None:
    """Gymnasium would descend into it for ever; the env is named, whoever is asked beside it."""
    env_fns = [functools.partial(Returns, holds_itself, offset=index) for index in range(3)]
    async with asyncio.timeout(BOUND_SECONDS), AsyncVectorEnv(env_fns, num_workers=num_workers) as envs:
        await envs.reset()
        for command, call in (
            ("step", lambda: envs.step([0, 1, 0])),
            ("reset", lambda: envs.reset(options={"wrong": True}, env_ids=[1])),
        ):
            with pytest.raises(InvalidEnvResultError, match="env 1 .*info 'endless'.*holds itself") as caught:
                await call()
            assert_names(caught.value, 1, command, in_parent=num_workers == 0)
        await envs.reset(env_ids=[1])
        with pytest.raises(ExceptionGroup) as group:
            await envs.step([1, 1, 1])
        assert [failure.env_index for failure in failures(group.value)] == [0, 1, 2]
        await envs.reset()
        observations, *_ = await envs.step([0, 0, 0])
        assert observations[:, 2].tolist() == [1, 1, 1]


@pytest.mark.parametrize("num_workers", [0, 2])
async def test_a_list_that_holds_itself_arrives(num_workers: int) -> None:
    """Nobody descends into a list."""
    env_fns = [functools.partial(Returns, holds_itself_in_a_list, offset=index) for index in range(3)]
    async with asyncio.timeout(BOUND_SECONDS), AsyncVectorEnv(env_fns, num_workers=num_workers) as envs:
        await envs.reset()
        *_, infos = await envs.step([0, 1, 0])
        endless = infos["endless"][1]
        assert endless[0] is endless


@pytest.mark.parametrize(("result", "key"), [(with_a_lock, "lock"), (with_a_generator, "generator")])
async def test_an_info_that_cannot_be_copied_fails_its_env_alone(result: Callable[[Any], Any], key: str) -> None:
    """Without workers infos are copied, not pickled."""
    env_fns = [functools.partial(Returns, result, offset=index) for index in range(3)]
    async with asyncio.timeout(BOUND_SECONDS), AsyncVectorEnv(env_fns, num_workers=0) as envs:
        await envs.reset()
        for command, call in (
            ("step", lambda: envs.step([0, 1, 0])),
            ("reset", lambda: envs.reset(options={"wrong": True}, env_ids=[1])),
        ):
            with pytest.raises(InvalidEnvResultError, match=rf"env 1 .*{key}") as caught:
                await call()
            assert isinstance(caught.value.__cause__, TypeError)
            assert_names(caught.value, 1, command, in_parent=True)
            with pytest.raises(ResetNeeded) as refused:
                await envs.step([0, 0, 0])
            assert refused.value.env_ids == (1,)
            assert await envs.get_attr("steps", env_ids=[0, 2]) == (1, 1)
        await envs.reset(env_ids=[1])
        observations, *_ = await envs.step([0, 0, 0])
        assert observations[:, 2].tolist() == [2, 1, 2]


@pytest.mark.parametrize("num_workers", [0, 2])
async def test_an_observation_that_cannot_travel_fails_its_env_alone(num_workers: int) -> None:
    """Of a space without a fixed size: pickled on its way from a worker, copied without workers."""
    env_fns = [
        functools.partial(Returns, observes_a_lock, offset=index, space=gym.spaces.Text(9)) for index in range(3)
    ]
    async with asyncio.timeout(BOUND_SECONDS), AsyncVectorEnv(env_fns, num_workers=num_workers) as envs:
        await envs.reset()
        with pytest.raises(InvalidEnvResultError, match="env 1 .*observation") as caught:
            await envs.step([0, 1, 0])
        assert isinstance(caught.value.__cause__, TypeError)
        assert_names(caught.value, 1, "step", in_parent=num_workers == 0)
        with pytest.raises(ResetNeeded) as refused:
            await envs.step([0, 0, 0])
        assert refused.value.env_ids == (1,)
        await envs.reset(env_ids=[1])
        observations, *_ = await envs.step([0, 0, 0])
        assert [observation[2] for observation in observations] == [2, 1, 2]


@pytest.mark.parametrize("result", [with_a_lock, unloadable])
async def test_a_result_that_cannot_travel_is_told_by_env(result: Callable[[Any], Any]) -> None:
    """One env's result cannot be pickled: that env is named, and nothing else is lost."""
    env_fns: list[Any] = [functools.partial(Returns, int, offset=index) for index in range(3)]
    env_fns[1] = functools.partial(Returns, result, offset=1)
    async with asyncio.timeout(BOUND_SECONDS), AsyncVectorEnv(env_fns, num_workers=1) as envs:
        await envs.reset()
        with pytest.raises(Exception, match=r"(?i)pickle|load") as caught:
            await envs.call("work")
        (failure,) = failures(caught.value)
        assert failure.env_index == 1
        assert await envs.call("work", env_ids=[0, 2]) == (0, 0)
        observations, *_ = await envs.step([0, 0, 0])
        np.testing.assert_array_equal(observations, rows([0, 1, 1], [1, 1, 1], [2, 1, 1]))


def replaced(position: int, value: Any) -> Callable[[Any], Any]:
    """The right result with something else in one place."""
    return lambda right: (*right[:position], value, *right[position + 1 :])


def with_leaf(key: str, value: Any) -> Callable[[Any], Any]:
    return lambda right: ({**right[0], key: value}, *right[1:])


def without_leaf(key: str) -> Callable[[Any], Any]:
    return lambda right: ({k: v for k, v in right[0].items() if k != key}, *right[1:])


DICT_SPACE = gym.spaces.Dict(
    {"camera": gym.spaces.Box(0, 255, (2, 2), np.uint8), "speed": gym.spaces.Box(-np.inf, np.inf, (3,), np.float32)}
)

# What an env makes of its right result, its space if not the plain one, and what the message must say.
WRONG_RESULTS: dict[str, tuple[Callable[[Any], Any], gym.Space[Any] | None, tuple[str, ...]]] = {
    "shape": (replaced(0, np.zeros(2, np.float32)), None, ("observation", "(3,)", "(2,)")),
    "a shape that would broadcast": (replaced(0, np.zeros(1, np.float32)), None, ("observation", "(3,)", "(1,)")),
    "a scalar that would broadcast": (replaced(0, np.float32(5)), None, ("observation", "(3,)", "()")),
    "one dimension more": (replaced(0, np.zeros((1, 3), np.float32)), None, ("observation", "(3,)", "(1, 3)")),
    "dtype": (replaced(0, np.zeros(3, complex)), None, ("observation", "float32", "complex128")),
    "text": (replaced(0, "three"), None, ("observation", "(3,)", "three")),
    "none": (replaced(0, None), None, ("observation", "(3,)", "None")),
    "shape of a leaf": (
        with_leaf("camera", np.zeros((3, 3), np.uint8)), DICT_SPACE, ("observation['camera']", "(2, 2)", "(3, 3)")
    ),
    "dtype of a leaf": (
        with_leaf("camera", np.zeros((2, 2), np.float32)), DICT_SPACE, ("observation['camera']", "uint8", "float32")
    ),
    "second leaf": (with_leaf("speed", np.zeros(4)), DICT_SPACE, ("observation['speed']", "(3,)", "(4,)")),
    "missing leaf": (without_leaf("speed"), DICT_SPACE, ("observation['speed']", "camera")),
    "info": (lambda right: (*right[:-1], ["no dict"]), None, ("info", "dict", "list")),
}  # fmt: skip
WRONG_STEPS: dict[str, tuple[Callable[[Any], Any], gym.Space[Any] | None, tuple[str, ...]]] = {
    "reward": (replaced(1, "much"), None, ("reward", "much")),
    "reward with a shape": (replaced(1, np.zeros(2)), None, ("reward", "(2,)")),
    "four values": (lambda right: right[:4], None, ("result of step", "terminated, truncated", "4")),
    "nothing": (lambda _right: None, None, ("result of step", "terminated, truncated", "None")),
}
WRONG_RESETS: dict[str, tuple[Callable[[Any], Any], gym.Space[Any] | None, tuple[str, ...]]] = {
    "no info": (lambda right: right[0], None, ("result of reset", "(observation, info)")),
}


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("space", [None, DICT_SPACE], ids=["array", "dict"])
async def test_a_wrong_result_of_step_is_told_and_harms_nobody_else(
    space: gym.Space[Any] | None, num_workers: int
) -> None:
    """The message has the env, the leaf, what was expected and what came; the rows of the others are right."""
    env_fns = [functools.partial(Returns, not_an_env, offset=index, space=space) for index in range(4)]
    async with asyncio.timeout(BOUND_SECONDS), AsyncVectorEnv(env_fns, num_workers=num_workers) as envs:
        for result, its_space, texts in (WRONG_RESULTS | WRONG_STEPS).values():
            if its_space is not space:
                continue
            await envs.set_attr("result", result)
            await envs.set_attr("episodes", 0)
            await envs.reset()
            with pytest.raises(InvalidEnvResultError) as caught:
                await envs.step([0, 0, 1, 0])
            assert caught.value.env_index == 2
            for text in ("env 2 ", *texts):
                assert text in str(caught.value)
            assert_names(caught.value, 2, "step", in_parent=num_workers == 0)
            with pytest.raises(ResetNeeded) as refused:
                await envs.step([0, 0, 0, 0])
            assert refused.value.env_ids == (2,)

            # Repeats the observations of the call that failed: those of the other envs were written, and rightly.
            observations, _ = await envs.reset(options={"reset_mask": np.array([False, False, True, False])})
            vectors = observations if space is None else observations["speed"]
            np.testing.assert_array_equal(vectors, rows([0, 1, 1], [1, 1, 1], [2, 2, 0], [3, 1, 1]))
            observations, rewards, *_ = await envs.step([0, 0, 0, 0])
            vectors = observations if space is None else observations["speed"]
            np.testing.assert_array_equal(vectors, rows([0, 1, 2], [1, 1, 2], [2, 2, 1], [3, 1, 2]))
            np.testing.assert_array_equal(rewards, [2, 2, 1, 2])


@pytest.mark.parametrize("wrong", [*WRONG_RESULTS, *WRONG_RESETS])
async def test_a_wrong_result_of_reset_is_told_and_harms_nobody_else(wrong: str) -> None:
    """The same for `reset`, of all envs and of some."""
    result, space, texts = (WRONG_RESULTS | WRONG_RESETS)[wrong]
    env_fns: list[Any] = [functools.partial(Returns, lambda right: right, offset=i, space=space) for i in range(4)]
    env_fns[2] = functools.partial(Returns, result, offset=2, space=space)
    async with asyncio.timeout(BOUND_SECONDS), AsyncVectorEnv(env_fns, num_workers=0) as envs:
        for env_ids in (None, [3, 2]):
            await envs.reset()
            with pytest.raises(InvalidEnvResultError) as caught:
                await envs.reset(options={"wrong": True}, env_ids=env_ids)
            for text in ("env 2 ", *texts):
                assert text in str(caught.value)
            assert_names(caught.value, 2, "reset", in_parent=True)
            with pytest.raises(ResetNeeded) as refused:
                await envs.step([0, 0, 0, 0])
            assert refused.value.env_ids == (2,)
        await envs.reset(env_ids=[2])
        observations, *_ = await envs.step([0, 0, 0, 0])
        vectors = observations if space is None else observations["speed"]
        assert vectors[:, 2].tolist() == [1, 1, 1, 1]
