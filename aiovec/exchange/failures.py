"""An env's exception, from the worker that caught it to the task that awaits.

`capture` runs in the worker, `restore` in the parent. Whether an exception survives the way is tried in the
worker, load included, so the parent never fails to read a reply; what does not survive arrives as
`RemoteError` with the type's name, the text and the formatted traceback.
"""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from aiovec.errors import Failure, RemoteError, mark_failure, mark_group
from aiovec.exchange import pickles

__all__ = ["FailureRecord", "as_one_exception", "capture", "restore", "wrap"]


@dataclass(frozen=True)
class FailureRecord:
    """What travels of one env's exception.

    Attributes:
        env_index: The env.
        pid: The worker's.
        command: What the env was asked for.
        pickled: The exception, or empty where it did not survive the trial.
        type_name: Its qualified name, for the fall-back.
        text: Its text, for the fall-back.
        formatted: Its traceback as text, for the fall-back.
        original: The exception itself, where nothing had to travel.
    """

    env_index: int
    pid: int
    command: str
    pickled: bytes
    type_name: str
    text: str
    formatted: str
    original: BaseException | None = None

    @classmethod
    def of(cls, exception: BaseException, env_index: int, pid: int, command: str) -> FailureRecord:
        """An exception that need not travel."""
        return cls(env_index, pid, command, b"", "", "", "", exception)


def capture(exception: BaseException, env_index: int, pid: int, command: str) -> FailureRecord:
    """Turns an exception into bytes and facts; never raises for what the exception holds or does."""
    try:
        text = str(exception)
    except Exception as error:  # noqa: BLE001  a __str__ that raises is the user's, and must not hide the failure
        text = f"<its __str__ raised {type(error).__name__}>"
    cls = type(exception)
    name = cls.__qualname__ if cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__qualname__}"
    try:
        formatted = "".join(traceback.format_exception(exception))
    except Exception as error:  # noqa: BLE001
        formatted = f"<its traceback could not be formatted: {type(error).__name__}>"
    try:
        pickled = pickles.dumps_with_tracebacks(exception)
        if type(pickles.loads(pickled)) is not cls:
            pickled = b""
    except Exception:  # noqa: BLE001  this is the trial
        pickled = b""
    return FailureRecord(env_index, pid, command, pickled, name, text, formatted)


def restore(record: FailureRecord) -> Exception:
    """The exception to raise in the awaiting task, with a note and marked for `aiovec.failures`."""
    exception = record.original or _load(record)
    return wrap(exception, Failure(record.env_index, record.pid, record.command, exception))


def _load(record: FailureRecord) -> BaseException:
    if record.pickled:
        try:
            return pickles.loads(record.pickled)  # type: ignore[no-any-return]
        except Exception:  # noqa: BLE001, S110  what loads in a worker may not load here: a class that is gone
            pass
    return RemoteError(record.type_name, record.text, record.formatted)


def wrap(exception: BaseException, failure: Failure) -> Exception:
    """An exception that a task may raise: others than `Exception`, and the stop signals of iterators, are wrapped."""
    if isinstance(exception, Exception) and not isinstance(exception, (StopIteration, StopAsyncIteration)):
        raised = exception
    else:
        raised = RemoteError(type(exception).__qualname__, str(exception))
        raised.__cause__ = exception
    mark_failure(raised, failure)
    return raised


def as_one_exception(command: str, exceptions: Sequence[Exception]) -> Exception:
    """One failure is itself; several are a group in ascending env index."""
    if len(exceptions) == 1:
        return exceptions[0]
    group: Any = ExceptionGroup(f"{len(exceptions)} envs failed in {command}", list(exceptions))
    mark_group(group)
    return group  # type: ignore[no-any-return]
