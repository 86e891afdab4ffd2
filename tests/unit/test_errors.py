"""Every error keeps its text and its facts through pickle; `failures` finds every failed env."""

from __future__ import annotations

import asyncio
import copy
import errno
import inspect
import multiprocessing
import pickle
import signal
from collections.abc import Callable, Sequence
from typing import Any

import gymnasium.error
import pytest

from aiovec.errors import (
    AiovecError,
    AlreadyPendingCallError,
    BatcherClosedError,
    BatcherFullError,
    CallTimeoutError,
    ClosedEnvironmentError,
    CrashLoopError,
    EnvTimeoutError,
    Failure,
    InvalidActionsError,
    InvalidBatchResultError,
    InvalidEnvResultError,
    InvalidExtrasError,
    InvalidObservationError,
    NoAsyncCallError,
    NotStartedError,
    RemoteError,
    ResetNeeded,
    RunningLoopError,
    SlabMemoryError,
    SpaceMismatchError,
    WorkerDied,
    WorkerStartError,
    WrappedCallError,
    WrongLoopError,
    failures,
    name_command,
    name_envs,
)
from aiovec.exchange.failures import FailureRecord, as_one_exception

# Made when a test asks, so that one that cannot be made fails its own tests.
ERRORS: dict[
    str, tuple[Callable[[], AiovecError], tuple[type[BaseException], ...], dict[str, Any], tuple[str, ...]]
] = {
    "awaited": (
        lambda: AlreadyPendingCallError("step", [1, 2], owed=False),
        (gymnasium.error.AlreadyPendingCallError,),
        {"command": "step", "name": "step", "env_ids": (1, 2)},
        ("step() refused", "another task awaits envs 1, 2", "Await that call first"),
    ),
    "owed": (
        lambda: AlreadyPendingCallError("step", [3], owed=True),
        (gymnasium.error.AlreadyPendingCallError,),
        {"command": "step", "env_ids": (3,)},
        ("step() refused", "env 3 was sent an action", "recv()", "reset()", "close()"),
    ),
    "a second recv": (
        lambda: AlreadyPendingCallError("recv", (), owed=False),
        (gymnasium.error.AlreadyPendingCallError,),
        {"command": "recv", "env_ids": ()},
        ("recv() refused", "another task, or another thread, is in such a call"),
    ),
    "begun before": (
        lambda: AlreadyPendingCallError("reset", (), owed=True, begun="step"),
        (gymnasium.error.AlreadyPendingCallError,),
        {"command": "reset", "env_ids": (), "name": "step"},
        ("reset() refused: the answer of an earlier step was not taken yet.", "`step_wait()` takes it;"),
    ),
    "nothing begun": (
        lambda: NoAsyncCallError("step"),
        (gymnasium.error.NoAsyncCallError,),
        {"name": "step"},
        ("step_wait() refused: there is no step to wait for. `step_async(…)` first.",),
    ),
    "blocking call timed out": (
        lambda: CallTimeoutError("step", 0.5, [2, 3]),
        (TimeoutError, multiprocessing.TimeoutError),
        {"command": "step", "seconds": 0.5, "env_ids": (2, 3)},
        ("step_wait() has timed out after 0.5 s: it still waits for envs 2, 3.", "`reset()` waits it out"),
    ),
    "running loop": (
        lambda: RunningLoopError("step()"),
        (RuntimeError,),
        {"command": "step()"},
        ("step() inside a running event loop", "Use `AsyncVectorEnv` with `await`"),
    ),
    "past wrappers": (
        lambda: WrappedCallError("send", ["ClipReward", "Own"], "Use something else."),
        (TypeError,),
        {"name": "send", "wrappers": ("ClipReward", "Own")},
        ("`send` would go past ClipReward, Own. Use something else.",),
    ),
    "nothing to receive": (
        NoAsyncCallError,
        (gymnasium.error.NoAsyncCallError,),
        {"name": "recv"},
        ("recv() refused", "`envs.send(actions)` first"),
    ),
    "closed": (
        lambda: ClosedEnvironmentError("reset()"),
        (gymnasium.error.ClosedEnvironmentError,),
        {"command": "reset()"},
        ("reset() on a vector environment that is closed", "Build a new one"),
    ),
    "not started": (
        lambda: NotStartedError("observation_space"),
        (RuntimeError,),
        {"command": "observation_space"},
        ("`observation_space` is known after the start", "async with"),
    ),
    "wrong loop": (
        lambda: WrongLoopError("step()"),
        (RuntimeError,),
        {"command": "step()", "owner": "vector environment"},
        ("step() from another event loop", "one vector environment per loop; `envs.terminate()`"),
    ),
    "batcher's loop": (
        lambda: WrongLoopError("a call", "batcher"),
        (RuntimeError,),
        {"command": "a call", "owner": "batcher"},
        ("a call from another event loop than the one that started this batcher.", "one batcher per loop."),
    ),
    "batcher closed": (lambda: BatcherClosedError(waited=False), (RuntimeError,), {}, ("takes no call. Build a new",)),
    "batcher closed meanwhile": (
        lambda: BatcherClosedError(waited=True),
        (RuntimeError,),
        {},
        ("the batcher was closed before it answered this call",),
    ),
    "batcher full": (
        lambda: BatcherFullError(8),
        (RuntimeError,),
        {"max_pending": 8},
        ("8 callers wait", "Call again later"),
    ),
    "observation": (
        lambda: InvalidObservationError("observation['a']", "int64 of shape ()", "float64 of shape (2,)"),
        (ValueError,),
        {"leaf": "observation['a']", "expected": "int64 of shape ()", "got": "float64 of shape (2,)"},
        ("observation['a']: expected int64 of shape (), as", "got float64 of shape (2,). It was not queued."),
    ),
    "batch result": (
        lambda: InvalidBatchResultError("result[1]", 5, "4 rows"),
        (ValueError,),
        {"leaf": "result[1]", "num_rows": 5, "got": "4 rows"},
        ("a wrong result[1]: expected 5 rows, one for each observation, got 4 rows",),
    ),
    "reset needed": (
        lambda: ResetNeeded("step", range(20), "lost their worker"),
        (gymnasium.error.ResetNeeded,),
        {"command": "step", "env_ids": tuple(range(20)), "reason": "lost their worker"},
        ("envs 0-19 lost their worker", "`envs.reset(env_ids=[0, 1, 2, 3, 4, 5, 6, 7]...)`"),
    ),
    "actions": (
        lambda: InvalidActionsError("actions['a']", "shape (3,)", "shape (2,)"),
        (gymnasium.error.InvalidAction, ValueError),
        {"leaf": "actions['a']", "expected": "shape (3,)", "got": "shape (2,)"},
        ("actions['a']: expected shape (3,), got shape (2,). No env was stepped.",),
    ),
    "actions within a rollout": (
        lambda: InvalidActionsError("actions", "shape (3,)", "shape (2,)").behind_others(),
        (gymnasium.error.InvalidAction, ValueError),
        {"leaf": "actions", "expected": "shape (3,)", "got": "shape (2,)"},
        ("got shape (2,). No env was stepped by these; steps before them were taken.",),
    ),
    "env result": (
        lambda: InvalidEnvResultError(7, "reward", "a scalar", "shape (2,)"),
        (ValueError,),
        {"env_index": 7, "what": "reward", "expected": "a scalar", "got": "shape (2,)"},
        ("env 7 returned a wrong reward: expected a scalar, got shape (2,)", "Correct the env"),
    ),
    "extras": (
        lambda: InvalidExtrasError("extras['value']", "float32 of shape (4,)", "nothing"),
        (ValueError,),
        {"leaf": "extras['value']", "expected": "float32 of shape (4,)", "got": "nothing"},
        ("extras['value'] of the policy: expected float32 of shape (4,), got nothing. Each leaf",),
    ),
    "spaces": (
        lambda: SpaceMismatchError(2, "action", "Discrete(3)", "Discrete(2)", "Make them equal."),
        (RuntimeError,),
        {"env_index": 2, "kind": "action", "got": "Discrete(3)", "expected": "Discrete(2)"},
        ("the action space of env 2 is Discrete(3), that of the vector is Discrete(2). Make them equal.",),
    ),
    "memory": (
        lambda: SlabMemoryError(5_000_000, "No space left on device"),
        (MemoryError,),
        {"nbytes": 5_000_000, "reason": "No space left on device"},
        ("no memory for the 5,000,000 bytes", "No space left on device", "shorter rollouts"),
    ),
    "time-out": (
        lambda: EnvTimeoutError([4], "step", 2.5),
        (TimeoutError,),
        {"env_ids": (4,), "command": "step", "seconds": 2.5},
        ("env 4 did not end step within 2.5 s",),
    ),
    "stuck": (
        lambda: EnvTimeoutError([1], "step", 1, lost_env_ids=[0, 1], pid=9, stack='  File "a.py", line 3 in step'),
        (TimeoutError,),
        {"env_ids": (1,), "lost_env_ids": (0, 1), "pid": 9},
        (
            "env 1 did not end step within 1 s; the worker (pid 9) was killed.",
            "`envs.reset(env_ids=[0, 1])`",
            'Its Python stack, innermost call first:\n  File "a.py", line 3 in step',
        ),
    ),
    "no descriptors": (
        lambda: WorkerStartError.of([0, 1], OSError(errno.EMFILE, "Too many open files")),
        (RuntimeError,),
        {"errno": errno.EMFILE},
        ("no worker for envs 0, 1: Too many open files.", "ulimit -n"),
    ),
    "no place on Ray": (
        lambda: WorkerStartError([0, 1], "Ray has found no place for 1 of 1 workers."),
        (RuntimeError,),
        {"env_ids": (0, 1), "reason": "Ray has found no place for 1 of 1 workers.", "errno": None},
        ("no worker for envs 0, 1: Ray has found no place",),
    ),
    "no process": (
        lambda: WorkerStartError.of([0], BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")),
        (RuntimeError,),
        {"env_ids": (0,), "errno": errno.EAGAIN},
        ("no worker for env 0: Resource temporarily unavailable.", "ulimit -u"),
    ),
    "remote": (
        lambda: RemoteError("package.Strange", "it broke", "Traceback …"),
        (),
        {"type_name": "package.Strange", "text": "it broke", "formatted": "Traceback …"},
        ("package.Strange: it broke", "Traceback …"),
    ),
    "killed": (
        lambda: WorkerDied([0, 1, 2], 123, -signal.SIGSEGV, "step", "boom\n"),
        (),
        {"env_ids": (0, 1, 2), "pid": 123, "exitcode": -11, "command": "step", "stderr": "boom\n"},
        ("the worker of envs 0-2 (pid 123) was killed by SIGSEGV during step.", "The end of its stderr:\nboom"),
    ),
    "out of memory": (
        lambda: WorkerDied([0], 1, -9, None, ""),
        (),
        {"command": None},
        ("env 0 (pid 1) was killed by SIGKILL (out of memory?) while idle.",),
    ),
    "crashed": (
        lambda: WorkerDied(range(12), 1, -11, "step", "", env_index=4, stack='  File "a.py", line 3 in step'),
        (),
        {"env_index": 4, "stack": '  File "a.py", line 3 in step'},
        (
            "killed by SIGSEGV during step, inside env 4.",
            "A reset builds its envs anew: `envs.reset(env_ids=[0, 1, 2, 3, 4, 5, 6, 7, ...])`, or of all.",
            'Its Python stack, innermost call first:\n  File "a.py", line 3 in step',
        ),
    ),
    "crash loop": (
        lambda: CrashLoopError([2, 3], 1, [ValueError("first\nline"), KeyError("second")]),
        (),
        {"env_ids": (2, 3), "max_restarts": 1},
        (
            "envs 2, 3 failed 2 times without a successful step in between (max_restarts=1).",
            "\n  1. ValueError: first\n  2. KeyError: 'second'",
        ),
    ),
    "unknown signal": (lambda: WorkerDied([0], 1, -250, None, ""), (), {}, ("was killed by signal 250",)),
    "exited": (
        lambda: WorkerDied([0], 1, 3, "reset", " \n"),
        (),
        {"exitcode": 3},
        ("exited with code 3 during reset.",),
    ),
    "hung up": (lambda: WorkerDied([0], 1, None, "reset", ""), (), {}, ("closed its connection during reset.",)),
}

ONLY_FOR_THE_TEXT = {"advice", "begun", "is_behind_others", "is_rebuilt", "owed", "waited"}


@pytest.fixture(params=ERRORS)
def case(request: pytest.FixtureRequest) -> tuple[AiovecError, tuple[type[BaseException], ...], Any, tuple[str, ...]]:
    """One error, the other classes that catch it, its attributes, and what its text says."""
    make, classes, attributes, texts = ERRORS[request.param]
    return make(), classes, attributes, texts


def test_every_class_is_in_the_table() -> None:
    """A new error has its text tested, and its way through pickle."""
    made = {make().__class__ for name, (make, *_) in ERRORS.items() if name != "memory"}
    there = {cls for cls in AiovecError.__subclasses__() if cls.__module__ == "aiovec.errors"}
    assert there - {SlabMemoryError} == made


def test_errors_say_what_and_what_next(case: Any) -> None:
    """In the message, and as attributes."""
    error, _, attributes, texts = case
    for text in texts:
        assert text in str(error)
    for name, value in attributes.items():
        assert getattr(error, name) == value


def test_errors_keep_the_facts_that_they_are_given(case: Any) -> None:
    """Nobody has to read them out of the text."""
    error = case[0]
    given = inspect.signature(type(error).__init__).parameters.keys() - {"self"}
    assert given - ONLY_FOR_THE_TEXT <= vars(error).keys()


def test_errors_are_caught_as_what_users_already_catch(case: Any) -> None:
    """By our root, and by Gymnasium's or Python's class."""
    error, classes, _, _ = case
    for caught in (AiovecError, *classes):
        with pytest.raises(caught):
            raise error


@pytest.mark.parametrize(
    "through",
    [lambda error: pickle.loads(pickle.dumps(error)), copy.copy, copy.deepcopy],
    ids=["pickle", "copy", "deep"],
)
def test_errors_travel(case: Any, through: Callable[[Any], Any]) -> None:
    """Type, text, attributes and notes."""
    error, _, attributes, _ = case
    error.add_note("a note")
    travelled = through(error)
    assert type(travelled) is type(error)
    assert str(travelled) == str(error)
    for name in attributes:
        assert getattr(travelled, name) == getattr(error, name)
    assert travelled.__notes__ == ["a note"]


@pytest.mark.parametrize(
    ("env_ids", "text"),
    [
        ([3], "env 3"),
        ([3, 4], "envs 3, 4"),
        (range(16), "envs 0-15"),
        ([4, 5, 6], "envs 4-6"),
        ([1, 4, 9], "envs 1, 4, 9"),
        ([3, 2, 1], "envs 3, 2, 1"),
        (range(0, 40, 2), "envs 0, 2, 4, 6, 8, 10, 12, 14 and 12 more"),
    ],
)
def test_envs_are_named_briefly(env_ids: Sequence[int], text: str) -> None:
    """Also a thousand of them."""
    assert name_envs(env_ids) == text


@pytest.mark.parametrize(("command", "text"), [("step", "step()"), ("set_attr('gravity')", "set_attr('gravity')")])
def test_commands_are_named_as_calls(command: str, text: str) -> None:
    """As a user would write them, once."""
    assert name_command(command) == text


def record(exception: Exception, env_index: int) -> FailureRecord:
    """What a worker says of an env's exception."""
    return FailureRecord.of(exception, env_index, 100 + env_index, "step")


def failed(exception: Exception, env_index: int) -> Exception:
    """An env's exception, as a call raises it."""
    return as_one_exception("step", [record(exception, env_index)])


def test_one_failure() -> None:
    """The exception is the env's own; a note names the env, the command and the worker."""
    error = failed(ValueError("x"), 2)
    assert failures(error) == [Failure(2, 102, "step", error)]
    assert error.__notes__ == ["raised by env 2 during step, worker pid 102"]


def test_a_group_of_failures() -> None:
    """One each, in their order."""
    first, second = ValueError("x"), KeyError("y")
    group = as_one_exception("step", [record(second, 5), record(first, 0)])
    assert [(failure.env_index, failure.exception) for failure in failures(group)] == [(0, first), (5, second)]
    assert str(group) == "2 envs failed in step (2 sub-exceptions)"


def test_an_envs_own_group_is_one_failure() -> None:
    """An env may raise an `ExceptionGroup` itself, alone or beside another that failed."""
    own = failed(ExceptionGroup("its own", [ValueError("x"), failed(ValueError("y"), 9)]), 3)
    assert [failure.env_index for failure in failures(own)] == [3]
    group = as_one_exception("step", [record(own, 3), record(KeyError("z"), 4)])
    assert [failure.env_index for failure in failures(group)] == [3, 4]


def test_a_dead_worker_is_a_failure_of_each_of_its_envs() -> None:
    """One exception, many indices; also beside others."""
    died = WorkerDied([2, 3], 77, -9, "step", "")
    assert failures(died) == [Failure(2, 77, "step", died), Failure(3, 77, "step", died)]
    assert [failure.command for failure in failures(WorkerDied([1], 7, 0, None, ""))] == ["nothing"]
    group: Any = ExceptionGroup("", [failed(ValueError(), 0), died])
    assert [failure.env_index for failure in failures(group)] == [0, 2, 3]


@pytest.mark.parametrize("exception", [ValueError("x"), ExceptionGroup("", [ValueError("x")]), KeyboardInterrupt()])
def test_other_exceptions_have_no_failures(exception: BaseException) -> None:
    """They are not of an env."""
    assert failures(exception) == []


def test_failures_under_except_star() -> None:
    """`except*` makes a group of its own: of one exception, and of those of a group that it chose."""
    try:
        raise failed(ValueError("x"), 1)
    except* ValueError as chosen:
        assert [failure.env_index for failure in failures(chosen)] == [1]
    try:
        raise as_one_exception("step", [record(ValueError("x"), 1), record(KeyError("y"), 2), record(ValueError(), 3)])
    except* ValueError as chosen:
        assert [failure.env_index for failure in failures(chosen)] == [1, 3]
    except* KeyError as chosen:
        assert [failure.env_index for failure in failures(chosen)] == [2]


async def test_failures_out_of_a_task_group() -> None:
    """A task group wraps what its tasks raised."""

    async def call() -> None:
        raise failed(ValueError("x"), 4)

    with pytest.raises(ExceptionGroup) as caught:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(call())
    assert [failure.env_index for failure in failures(caught.value)] == [4]


def test_one_exception_object_of_two_envs_is_two_failures() -> None:
    """Envs of one process may raise the same object, such as a constant of their module."""
    shared = ValueError("x")
    group = as_one_exception("step", [record(shared, 0), record(shared, 1)])
    assert [failure.env_index for failure in failures(group)] == [0, 1]
