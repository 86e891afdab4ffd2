"""Checks of how a vector bears failures, by envs that fail on demand."""

from __future__ import annotations

import functools
import math
import os
import signal
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from gymnasium import error as gymnasium_error

from aiovec.errors import EnvTimeoutError, RemoteError, WorkerDied, failures
from aiovec.testing.faulty_env import FaultyEnv, UnpicklableError
from aiovec.testing.subject import Subject

__all__ = [
    "exception",
    "exit_in_env",
    "failed_close",
    "failed_reset",
    "failed_start",
    "others_whole",
    "restart",
    "several_failures",
    "stuck_env",
    "unpicklable_exception",
    "worker_died",
    "wrong_result",
]

_STEP_TIMEOUT = 1.0
_ONE = 1  # the env that fails
_ACTIONS = (0, 1, 2)
_Death = Literal["kill", "segfault"]


async def exception(subject: Subject) -> None:
    """An env's exception is raised in the awaiting task as itself, and says whose it is."""
    async with subject.started() as envs:
        await _reset_and_ask(subject, envs, "raise", [_ONE])
        meaning = "What an env raises is raised at the `await` as itself: its `except` must find it."
        error = await subject.expect_raised(ValueError, lambda: envs.step(_ACTIONS), "a step that raises", meaning)
        _expect_itself(subject, error, "step", "a step that raises")
        (failure,) = failures(error) or (None,)
        where = "failures(exception)"
        meaning = "`aiovec.failures` tells a program which env failed, in what, and in which process."
        subject.expect(failure is not None, where, f"one failure, of env {_ONE}", "none", meaning)
        assert failure is not None  # noqa: S101  just seen
        told = (failure.env_index, failure.command, failure.exception is error, failure.pid == os.getpid())
        subject.expect_same(told, (_ONE, "step", True, not subject.has_workers), where, meaning)
        note = "".join(getattr(error, "__notes__", []))
        says_whose = f"env {_ONE} " in note and "step" in note
        subject.expect(says_whose, "notes of the exception", f"one that names env {_ONE} and step", repr(note), meaning)


def _expect_itself(subject: Subject, error: BaseException, moment: str, where: str) -> None:
    meaning = "An exception keeps its type, its `args` and its notes on the way."
    subject.expect_same(type(error), ValueError, f"{where}, type", meaning)
    subject.expect_same(error.args, (f"FaultyEnv failed in {moment}", 0), f"{where}, args", meaning)
    notes = getattr(error, "__notes__", [])
    subject.expect("a note of the env" in notes, f"{where}, notes", "'a note of the env' among them", notes, meaning)
    # By its end: on another machine aiovec may lie elsewhere.
    ending = str(Path("aiovec", "testing", "faulty_env.py"))
    frames = [frame.name for frame in traceback.extract_tb(error.__traceback__) if frame.filename.endswith(ending)]
    meaning = "A traceback that ends in the vector says nothing of where the env failed: send its frames, too."
    subject.expect(moment in frames, f"{where}, traceback", f"the env's own frame, in {moment}", frames, meaning)


async def others_whole(subject: Subject) -> None:
    """One env fails; the others were stepped, and it answers `ResetNeeded` until it is reset alone."""
    others = [env_index for env_index in range(subject.num_envs) if env_index != _ONE]
    async with subject.started() as envs:
        await _reset_and_ask(subject, envs, "raise", [_ONE])
        meaning = "An env that fails fails its call."
        await subject.expect_raised(ValueError, lambda: envs.step(_ACTIONS), "a step that raises", meaning)
        subject.where = "recv() after a step in which one env failed"
        batch = await envs.recv(min_envs=len(others))
        got = {int(i): float(steps) for i, steps in zip(batch.env_ids, batch.observations[:, 0], strict=True)}
        meaning = "The envs that did not fail did their step, and `recv` gives their rows."
        subject.expect_same(got, dict.fromkeys(others, 1.0), f"{subject.where}, steps by env", meaning)
        meaning = "An env that failed is in no state to be stepped: it must be reset before."
        where = "the step after a failed one"
        await subject.expect_raised(gymnasium_error.ResetNeeded, lambda: envs.step(_ACTIONS), where, meaning)
        subject.where = f"reset(env_ids=[{_ONE}])"
        await envs.reset(env_ids=[_ONE])
        await _expect_steps(
            subject, envs, [1.0 if i == _ONE else 2.0 for i in range(subject.num_envs)], "a reset of one"
        )


async def several_failures(subject: Subject) -> None:
    """Several failed envs are one `ExceptionGroup`, in the order of the envs."""
    failing = [0, subject.num_envs - 1]
    async with subject.started() as envs:
        await _reset_and_ask(subject, envs, "raise", failing)
        meaning = (
            "Each failure is to be seen: several in one call are an `ExceptionGroup`, which `except*` takes apart."
        )
        where = "a step in which two envs raise"
        group = await subject.expect_raised(ExceptionGroup, lambda: envs.step(_ACTIONS), where, meaning)
        types = [type(member) for member in group.exceptions]
        subject.expect_same(types, [ValueError] * 2, f"{where}, the exceptions of the group", meaning)
        told = [failure.env_index for failure in failures(group)]
        subject.expect_same(told, failing, f"{where}, envs of failures(exception)", meaning)


async def unpicklable_exception(subject: Subject) -> None:
    """An exception that cannot leave its process arrives as `RemoteError`, with its text and traceback."""
    await _expect_told(subject, "raise-unpicklable")


async def exit_in_env(subject: Subject) -> None:
    """`sys.exit` in an env ends neither the awaiting task nor the worker."""
    await _expect_told(subject, "exit")


async def _expect_told(subject: Subject, fault: Literal["raise-unpicklable", "exit"]) -> None:
    where = f"a step with the fault {fault!r}"
    async with subject.started() as envs:
        await _reset_and_ask(subject, envs, fault, [_ONE])
        if fault == "exit":
            meaning = "An env's `SystemExit` must not end the task that awaits: wrap it, as `__cause__`."
            try:
                await subject.expect_raised(RemoteError, lambda: envs.step(_ACTIONS), where, meaning)
            except SystemExit as error:
                raise subject.violation(where, "RemoteError", "SystemExit itself", meaning) from error
        else:
            meaning = "What does not pickle is told all the same, by a stand-in that bears its text and its traceback."
            # Without a process between them it need not pickle.
            expected: type[Exception] = RemoteError if subject.has_workers else UnpicklableError
            told = await subject.expect_raised(expected, lambda: envs.step(_ACTIONS), where, meaning)
            subject.expect("FaultyEnv failed in step" in str(told), f"{where}, text", "that of the env", told, meaning)
        await _expect_mended(subject, envs, where)


async def wrong_result(subject: Subject) -> None:
    """An observation of the wrong shape or kind is an error, and never a row that looks right."""
    for fault in ("wrong-shape", "wrong-dtype"):
        async with subject.started() as envs:
            await _reset_and_ask(subject, envs, fault, [_ONE])
            where = f"a step with the fault {fault!r}"
            meaning = "What does not fit the space must be refused: broadcast or cast it is a wrong observation."
            error = await subject.expect_raised(ValueError, lambda: envs.step(_ACTIONS), where, meaning)
            told = [failure.env_index for failure in failures(error)]
            subject.expect_same(told, [_ONE], f"{where}, envs of failures(exception)", "It says whose result it was.")
            await _expect_mended(subject, envs, where)


async def failed_start(subject: Subject) -> None:
    """An env that cannot be built fails the start with its exception, and a close is possible."""
    env_fns = list(subject.env_fns)
    env_fns[_ONE] = functools.partial(FaultyEnv, "raise", "init")
    envs = subject.build(env_fns)

    async def begin() -> Any:
        return await envs

    try:
        where, meaning = "a start in which an env cannot be built", "A start that fails says why."
        error = await subject.expect_raised(ValueError, begin, where, meaning)
        subject.expect_same(error.args, ("FaultyEnv failed in init", 0), f"{where}, args", meaning)
        subject.where = "the close after a failed start"
        await envs.close()
    finally:
        envs.terminate()


async def failed_reset(subject: Subject) -> None:
    """An env whose reset raises needs another one; the others were reset."""
    async with subject.started() as envs:
        await envs.reset(seed=subject.seed)
        await envs.step(_ACTIONS)
        await envs.call("fail", "raise", "reset", env_ids=[_ONE])
        where, meaning = "a reset that raises", "What an env raises is raised at the `await` as itself."
        await subject.expect_raised(ValueError, envs.reset, where, meaning)
        step, reset_needed = functools.partial(envs.step, _ACTIONS), gymnasium_error.ResetNeeded
        meaning = "An env whose reset failed was not reset."
        await subject.expect_raised(reset_needed, step, "a step after the failed reset", meaning)
        subject.where = f"reset(env_ids=[{_ONE}]) after the failed reset"
        await envs.reset(env_ids=[_ONE])
        await _expect_steps(subject, envs, [1.0] * subject.num_envs, "the other reset")


async def failed_close(subject: Subject) -> None:
    """An env whose close raises is told, once; the vector is closed."""
    envs = await subject.build()
    try:
        await _reset_and_ask(subject, envs, "raise", [_ONE], "close")
        where, meaning = (
            "a close that raises",
            "What an env's close raises is raised by the close, after all have closed.",
        )
        await subject.expect_raised(ValueError, envs.close, where, meaning)
        subject.expect_same(envs.closed, True, f"{where}, closed", "It is closed all the same.")
        subject.where = "another close after one that raised"
        await envs.close()
    finally:
        envs.terminate()


async def worker_died(subject: Subject) -> None:
    """A worker that is killed, or crashes in C, is told at once; a reset builds its envs anew."""
    deaths: dict[_Death, int] = {"kill": signal.SIGKILL, "segfault": signal.SIGSEGV}
    for fault, number in deaths.items():
        async with subject.started() as envs:
            await _reset_and_ask(subject, envs, fault, [_ONE])
            where = f"a step with the fault {fault!r}"
            meaning = "A worker that ends must wake who awaits it, and say which envs were in it."
            error = await subject.expect_raised(WorkerDied, lambda: envs.step(_ACTIONS), where, meaning)
            subject.expect(_ONE in error.env_ids, f"{where}, env_ids", f"{_ONE} among them", error.env_ids, meaning)
            if error.place:  # on Ray, which knows no exit code of a process that is gone
                subject.expect(bool(error.cause), f"{where}, cause", "what Ray says of it", error.cause, meaning)
            else:
                subject.expect_same(
                    error.exitcode, -int(number), f"{where}, exitcode", "It says how the process ended."
                )
            told = tuple(failure.env_index for failure in failures(error))
            subject.expect_same(told, error.env_ids, f"{where}, envs of failures(exception)", meaning)
            await _expect_mended(subject, envs, where)


async def stuck_env(subject: Subject) -> None:
    """An env that is stuck, also in C, is ended by `step_timeout`, which the maker must accept."""
    for fault in ("hang", "hang-in-c"):
        async with subject.started(step_timeout=_STEP_TIMEOUT) as envs:
            await _reset_and_ask(subject, envs, fault, [_ONE])
            where = f"a step with the fault {fault!r} and step_timeout={_STEP_TIMEOUT}"
            meaning = "`step_timeout` must end what is stuck, whatever it is stuck in, and say which env it was."
            error = await subject.expect_raised(EnvTimeoutError, lambda: envs.step(_ACTIONS), where, meaning)
            if error.place and fault == "hang-in-c":  # an actor on Ray that is in C says nothing
                subject.expect(_ONE in error.env_ids, f"{where}, env_ids", f"{_ONE} among them", error.env_ids, meaning)
            else:
                subject.expect_same(error.env_ids, (_ONE,), f"{where}, env_ids", meaning)
                is_shown, where_it_hangs = "faulty_env.py" in error.stack, "the place where it hangs"
                subject.expect(
                    is_shown, f"{where}, stack", where_it_hangs, repr(error.stack), "It shows where it hangs."
                )
            await _expect_mended(subject, envs, where)


async def restart(subject: Subject) -> None:
    """With `on_failure="restart"`, which the maker must accept, a failure is a row that says so."""
    async with subject.started(on_failure="restart") as envs:
        await _reset_and_ask(subject, envs, "raise", [_ONE])
        where, meaning = (
            'a step that raises, on_failure="restart"',
            "A broken transition must never look like an ordinary one.",
        )
        subject.where = where
        _, rewards, _, truncations, infos = await envs.step(_ACTIONS)
        expected = [math.nan if i == _ONE else 1.0 for i in range(subject.num_envs)]
        subject.expect_same(rewards.tolist(), expected, f"{where}, rewards", meaning)
        subject.expect_same(bool(truncations[_ONE]), True, f"{where}, truncations[{_ONE}]", meaning)
        failure = infos.get("failure", [None] * subject.num_envs)[_ONE]
        is_told = isinstance(failure, ValueError)
        subject.expect(is_told, f"{where}, infos['failure'][{_ONE}]", "the env's ValueError", failure, meaning)
        subject.where = "the step after a failed one that was mended"
        observations, rewards, *_ = await envs.step(_ACTIONS)
        got = (observations[:, 0].tolist(), float(rewards[_ONE]))
        counted = [0.0 if i == _ONE else 2.0 for i in range(subject.num_envs)]
        meaning = "The next row is the reset of the new env, and the other envs do not notice."
        subject.expect_same(got, (counted, 0.0), f"{subject.where}, steps and reward", meaning)


# ---- what they share


async def _reset_and_ask(subject: Subject, envs: Any, fault: str, env_ids: Sequence[int], moment: str = "step") -> None:
    subject.where = f"reset, and the demand of {fault!r}"
    await envs.reset(seed=subject.seed)
    await envs.call("fail", fault, moment, env_ids=env_ids)


async def _expect_mended(subject: Subject, envs: Any, where: str) -> None:
    """A reset of all, and a step, go well."""
    subject.where = f"the reset after {where}"
    await envs.reset(seed=subject.seed)
    await _expect_steps(subject, envs, [1.0] * subject.num_envs, where)


async def _expect_steps(subject: Subject, envs: Any, steps: Sequence[float], after: str) -> None:
    subject.where = f"the step after {after}"
    observations, *_ = await envs.step(_ACTIONS)
    meaning = "After a failure and a reset each env goes on: those that were reset anew, the others where they were."
    subject.expect_same(observations[:, 0].tolist(), list(steps), f"{subject.where}, steps by env", meaning)
