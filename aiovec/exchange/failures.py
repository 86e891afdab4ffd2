"""An env's exception, from the worker that caught it to the task that awaits.

`capture` runs in the worker, `restore` in the parent. Whether an exception survives the way is tried in the
worker, load included, so the parent never fails to read a reply; what does not survive arrives as
`RemoteError` with the type's name, the text and the formatted traceback.
"""

from __future__ import annotations

import enum
import os
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from aiovec.errors import ClosedEnvironmentError, Failure, RemoteError, add_note, mark_failures, name_command
from aiovec.exchange import pickles

__all__ = [
    "EnvLost",
    "Failed",
    "FailureRecord",
    "StepRefused",
    "TurnCancelled",
    "as_one_exception",
    "capture",
    "restore",
    "without_our_frames",
    "wrap",
]

_OUR_FOLDER = f"{Path(__file__).parents[1]}{os.sep}"
_TESTING_FOLDER = f"{_OUR_FOLDER}testing{os.sep}"  # its envs are envs: their frames are what a user looks for
_MOST_FRAMES = 20
_LONGEST_VALUE = 200  # characters
_LONGEST_TEXT = 10_000


class EnvLost(Exception):  # noqa: N818  it never leaves the parent
    """Stands for the death of the worker that an env had, in the first step after it; the parent knows the rest."""


class StepRefused(Exception):  # noqa: N818  it never leaves the parent
    """An env was to be stepped by itself, but its episode has ended, and the next batch resets it."""


class TurnCancelled(BaseException):
    """What an async env was doing was ended by a reset, or a close, that came meanwhile: nobody asks for it."""


class Failed(enum.IntEnum):
    """What happened to an env that did not give its row."""

    RAISED = 0
    LOST = 1  # its worker had died before: see `EnvLost`
    REFUSED = 2  # nothing: see `StepRefused`
    CANCELLED = 3  # see `TurnCancelled`


_KINDS: dict[type[BaseException], Failed] = {
    EnvLost: Failed.LOST,
    StepRefused: Failed.REFUSED,
    TurnCancelled: Failed.CANCELLED,
}


@dataclass(frozen=True)
class FailureRecord:
    """One env's exception. It travels as bytes and text, and arrives with the exception loaded.

    Attributes:
        env_index: The env.
        pid: The worker's.
        command: What the env was asked for.
        kind: What happened.
        exception: What it raised, or what stands for it where it could not travel; `None` as long as it travels: a
            worker must not keep it, with all that its frames hold.
        local_variables: Of its frames, as text, where that is wanted.
        travelling: What of it is sent.
    """

    env_index: int
    pid: int
    command: str
    kind: Failed
    exception: BaseException | None
    local_variables: str = ""
    travelling: Travelling | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        assert self.travelling is not None  # noqa: S101  one that need not travel is not pickled
        facts = (self.env_index, self.pid, self.command, self.kind, self.local_variables)
        return _arrive, (*facts, self.travelling)

    @classmethod
    def of(
        cls, exception: BaseException, env_index: int, pid: int, command: str, traceback_locals: bool = False
    ) -> FailureRecord:
        """An exception that need not travel."""
        local_variables = _local_variables(exception) if traceback_locals else ""
        return cls(env_index, pid, command, _KINDS.get(type(exception), Failed.RAISED), exception, local_variables)


class Travelling(NamedTuple):
    """An exception on its way.

    Attributes:
        pickled: The exception, or empty where it did not survive the trial.
        type_name: Its qualified name; this and what follows is for the fall-back.
        text: Its text.
        formatted: Its traceback as text.
    """

    pickled: bytes
    type_name: str
    text: str
    formatted: str


def capture(
    exception: BaseException, env_index: int, pid: int, command: str, traceback_locals: bool = False
) -> FailureRecord:
    """Turns an exception into what can be sent; never raises for what the exception holds or does."""
    record = FailureRecord.of(exception, env_index, pid, command, traceback_locals)
    return replace(record, exception=None, travelling=_travelling(exception))


def _travelling(exception: BaseException) -> Travelling:
    cls = type(exception)
    try:
        formatted = "".join(traceback.format_exception(exception))
    except Exception as error:  # noqa: BLE001  the user's own __str__ again
        formatted = f"<its traceback could not be formatted: {type(error).__name__}>"
    pickled = _pickled(exception)
    if not pickled and isinstance(exception, BaseExceptionGroup):
        pickled = _pickled(_with_leaves_that_travel(exception))
    return Travelling(pickled, _name(cls), _bounded(_text(exception)), _bounded(formatted))


def _pickled(exception: BaseException) -> bytes:
    """Empty if it cannot be pickled, or cannot be loaded as what it is."""
    try:
        pickled = pickles.dumps_with_tracebacks(exception)
        return pickled if type(pickles.loads(pickled)) is type(exception) else b""
    except Exception:  # noqa: BLE001  this is the trial
        return b""


def _with_leaves_that_travel(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The same group, with what stands for those of its members that cannot be pickled: `except*` finds the others."""
    members: list[BaseException] = []
    for member in group.exceptions:
        if isinstance(member, BaseExceptionGroup):
            members.append(_with_leaves_that_travel(member))
        else:
            travelling = _travelling(member)
            members.append(member if travelling.pickled else _load(travelling))
    derived = group.derive(members)
    derived.__traceback__, derived.__cause__ = group.__traceback__, group.__cause__
    derived.__context__, derived.__suppress_context__ = group.__context__, group.__suppress_context__
    for note in getattr(group, "__notes__", ()):
        derived.add_note(note)
    return derived


def _bounded(text: str) -> str:
    """The text of an exception that bears 100 MB is 400 MB; its end tells as much as its beginning."""
    half = _LONGEST_TEXT // 2
    return text if len(text) <= _LONGEST_TEXT else f"{text[:half]}\n[...]\n{text[-half:]}"


def _arrive(
    env_index: int, pid: int, command: str, kind: Failed, local_variables: str, travelling: Travelling
) -> FailureRecord:
    """The other end of `FailureRecord.__reduce__`: whoever reads a reply need not load anything any more."""
    return FailureRecord(env_index, pid, command, kind, _load(travelling), local_variables)


def _load(travelling: Travelling) -> BaseException:
    if travelling.pickled:
        try:
            return pickles.loads(travelling.pickled)  # type: ignore[no-any-return]
        except Exception:  # noqa: BLE001, S110  what loads in a worker may not load here: a class that is gone
            pass
    return RemoteError(travelling.type_name, travelling.text, travelling.formatted)


def _local_variables(exception: BaseException) -> str:
    """The innermost frames with their variables, outermost first, as a traceback has them."""
    lines = ["local variables of its frames:"]
    for frame, lineno in list(traceback.walk_tb(exception.__traceback__))[-_MOST_FRAMES:]:
        lines.append(f'  File "{frame.f_code.co_filename}", line {lineno}, in {frame.f_code.co_name}')
        lines += [f"    {name} = {_shown(value)}" for name, value in frame.f_locals.items()]
    return "\n".join(lines)


def _shown(value: object) -> str:
    try:
        text = repr(value)
    except Exception as error:  # noqa: BLE001  the user's own __repr__
        return f"<its __repr__ raised {type(error).__name__}>"
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}..."


def restore(record: FailureRecord) -> Exception:
    """The exception to raise in the awaiting task, with a note and marked for `aiovec.failures`."""
    assert record.exception is not None  # noqa: S101  it has arrived
    if record.kind is Failed.CANCELLED:
        return ClosedEnvironmentError(name_command(record.command))
    raised = wrap(record.exception)
    add_note(raised, f"raised by env {record.env_index} during {record.command}, worker pid {record.pid}")
    if record.local_variables:
        add_note(raised, record.local_variables)
    mark_failures(raised, [_failure(record, record.exception)])
    return raised


def wrap(exception: BaseException) -> Exception:
    """An exception that a task may raise: others than `Exception`, and the stop signals of iterators, are wrapped."""
    if isinstance(exception, Exception) and not isinstance(exception, (StopIteration, StopAsyncIteration)):
        return exception
    raised = RemoteError(_name(type(exception)), _text(exception))
    raised.__cause__ = exception
    return raised


def without_our_frames(traceback: TracebackType | None) -> TracebackType | None:
    """A traceback from the first frame on that is not aiovec's own."""
    while traceback is not None and _is_ours(traceback.tb_frame.f_code.co_filename):
        traceback = traceback.tb_next
    return traceback


def _is_ours(filename: str) -> bool:
    return filename.startswith(_OUR_FOLDER) and not filename.startswith(_TESTING_FOLDER)


def as_one_exception(command: str, records: Sequence[FailureRecord]) -> Exception:
    """What to raise for failed envs: one exception is itself, several are a group in ascending env index."""
    records = sorted(records, key=lambda record: record.env_index)
    if all(record.kind is Failed.CANCELLED for record in records):
        return restore(records[0])  # the vector was closed: that is one thing, however many envs were at work
    exceptions = [restore(record) for record in records]
    if len(exceptions) == 1:
        return exceptions[0]
    group = ExceptionGroup(f"{len(exceptions)} envs failed in {command}", exceptions)
    # Of the group itself too: several envs of one process may have raised the very same object.
    mark_failures(group, [_failure(record, raised) for record, raised in zip(records, exceptions, strict=True)])
    return group


def _failure(record: FailureRecord, exception: BaseException) -> Failure:
    return Failure(record.env_index, record.pid, record.command, exception)


def _name(cls: type[BaseException]) -> str:
    return cls.__qualname__ if cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__qualname__}"


def _text(exception: BaseException) -> str:
    try:
        return str(exception)
    except Exception as error:  # noqa: BLE001  a __str__ that raises is the user's, and must not hide the failure
        return f"<its __str__ raised {type(error).__name__}>"
