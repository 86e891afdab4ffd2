"""An env's exception arrives as itself, or as what stands for it; reading a reply never fails."""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import os
import pickle
import threading
import traceback
from collections.abc import Callable
from typing import Any

import pytest

from aiovec.errors import InvalidEnvResultError, RemoteError, failures
from aiovec.exchange.failures import FailureRecord, as_one_exception, capture, restore


class TwoArguments(Exception):
    """Its constructor takes what its `args` do not tell."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(f"{code}: {reason}")
        self.code = code
        self.reason = reason


class KeywordOnly(Exception):
    """Its constructor takes no positional argument."""

    def __init__(self, *, joint: str) -> None:
        super().__init__(f"joint {joint} is broken")
        self.joint = joint


def raised(exception: BaseException) -> BaseException:
    """The exception with a traceback."""
    try:
        raise exception
    except BaseException as caught:
        return caught


def travelled(exception: BaseException) -> Any:
    """Captured in a worker, sent, restored."""
    record = capture(raised(exception), 3, 42, "step")
    return restore(pickle.loads(pickle.dumps(record)))


def with_attributes() -> Exception:
    error = ValueError("bad", 5)
    error.joint = "knee"  # type: ignore[attr-defined]
    error.where = {"x": [1, 2]}  # type: ignore[attr-defined]
    return error


EXCEPTIONS: dict[str, Callable[[], Exception]] = {
    "attributes": with_attributes,
    "two arguments": lambda: TwoArguments(404, "no such block"),
    "keyword only": lambda: KeywordOnly(joint="knee"),
    "OSError": lambda: FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "/no/such/file"),
    "OSError of two files": lambda: OSError(errno.EXDEV, "cross-device", "/from", None, "/to"),
    "UnicodeDecodeError": lambda: UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
    "KeyError": lambda: KeyError("missing"),
    "no text": AssertionError,
    "ours": lambda: InvalidEnvResultError(3, "reward", "a scalar", "a list"),
    "UnicodeEncodeError": lambda: UnicodeEncodeError("utf-8", "\udc00", 0, 1, "surrogates not allowed"),
    "SyntaxError": lambda: SyntaxError("invalid syntax", ("env.py", 3, 2, "x =", 3, 4)),
    "ImportError": lambda: ImportError("no module", name="mujoco", path="/x"),
}


@pytest.mark.parametrize("name", EXCEPTIONS)
def test_an_exception_arrives_as_itself(name: str) -> None:
    """Type, `args`, text and every attribute."""
    original = EXCEPTIONS[name]()
    arrived = travelled(EXCEPTIONS[name]())
    assert type(arrived) is type(original)
    assert arrived.args == original.args
    assert str(arrived) == str(original)
    for key, value in vars(original).items():
        assert getattr(arrived, key) == value
    for key in ("errno", "filename", "filename2", "strerror", "start", "object", "name", "path", "lineno", "text"):
        assert getattr(arrived, key, None) == getattr(original, key, None)


def test_an_exception_is_tied_to_its_env() -> None:
    """By a note, and for `failures`."""
    arrived = travelled(ValueError("x"))
    assert arrived.__notes__ == ["raised by env 3 during step, worker pid 42"]
    [failure] = failures(arrived)
    assert (failure.env_index, failure.pid, failure.command, failure.exception) == (3, 42, "step", arrived)


def test_notes_come_before_ours() -> None:
    """What the env noted is kept."""
    error = ValueError("x")
    error.add_note("the left knee")
    assert travelled(error).__notes__ == ["the left knee", "raised by env 3 during step, worker pid 42"]


def fail_deep(depth: int) -> None:
    """Raises below some frames."""
    if depth:
        fail_deep(depth - 1)
    raise ValueError("deep")


def caught_from(function: Callable[[], Any]) -> BaseException:
    """What a function raises."""
    with pytest.raises(BaseException) as caught:
        function()
    return caught.value


@pytest.mark.parametrize("depth", [0, 3, 850])
def test_the_traceback_has_the_workers_frames(depth: int) -> None:
    """File, line and function, of as many frames as Python allows."""
    error = caught_from(lambda: fail_deep(depth))
    arrived = restore(pickle.loads(pickle.dumps(capture(error, 0, 1, "step"))))
    assert type(arrived) is ValueError
    there = [(frame.filename, frame.lineno, frame.name) for frame in traceback.extract_tb(error.__traceback__)]
    here = [(frame.filename, frame.lineno, frame.name) for frame in traceback.extract_tb(arrived.__traceback__)]
    assert here == there
    assert sum(name == "fail_deep" for _, _, name in here) == depth + 1
    assert 'raise ValueError("deep")' in "".join(traceback.format_exception(arrived))


def test_endless_recursion_arrives() -> None:
    """A thousand frames, caught with no stack to spare."""

    def endless(depth: int) -> int:
        return endless(depth + 1) + 1

    arrived: Any = travelled(caught_from(lambda: endless(0)))
    assert type(arrived) is RecursionError
    assert len(traceback.extract_tb(arrived.__traceback__)) > 500


def test_the_chain_of_raise_from() -> None:
    """The cause, its own context, and whether contexts are shown."""

    def chain() -> None:
        try:
            try:
                {}["missing"]
            except KeyError:
                raise OSError(errno.EIO, "I/O", "/dev/arm")  # noqa: B904
        except OSError as error:
            raise TwoArguments(1, "arm") from error

    arrived = travelled(caught_from(chain))
    cause = arrived.__cause__
    assert type(arrived) is TwoArguments
    assert type(cause) is OSError
    assert (cause.errno, cause.filename) == (errno.EIO, "/dev/arm")
    assert cause.__traceback__ is not None
    assert type(cause.__context__) is KeyError
    assert cause.__context__.args == ("missing",)
    assert arrived.__suppress_context__


def test_raise_from_none_stays_quiet() -> None:
    """The context is there, and not shown."""

    def quiet() -> None:
        try:
            {}["missing"]
        except KeyError:
            raise ValueError("told") from None

    arrived = travelled(caught_from(quiet))
    assert arrived.__suppress_context__
    assert "KeyError" not in "".join(traceback.format_exception(arrived))


def test_exception_groups_arrive_whole() -> None:
    """Members, nesting, notes and the members' own tracebacks."""
    member = raised(TwoArguments(1, "a"))
    member.add_note("of a member")
    arrived = travelled(ExceptionGroup("two", [member, ExceptionGroup("inner", [KeywordOnly(joint="hip")])]))
    assert type(arrived) is ExceptionGroup
    assert arrived.message == "two"
    first, inner = arrived.exceptions
    assert (first.code, first.reason, first.__notes__) == (1, "a", ["of a member"])
    assert traceback.extract_tb(first.__traceback__)[-1].name == "raised"
    assert inner.exceptions[0].joint == "hip"


def test_classes_of_a_function_arrive() -> None:
    """As notebooks make them: no module holds them, and `except` still knows them."""

    class Local(Exception):
        pass

    arrived = travelled(Local("here"))
    assert type(arrived) is Local
    assert str(arrived) == "here"


# ---- what cannot travel


class WithLock(Exception):
    """Holds what no pickler takes."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.lock = threading.Lock()


class BadText(Exception):
    """Cannot even say what happened."""

    def __str__(self) -> str:
        raise RuntimeError("no text")


class BadReduce(Exception):
    """Refuses to be pickled."""

    def __reduce__(self) -> Any:
        raise RuntimeError("no pickle")

    __reduce_ex__ = __reduce__  # type: ignore[assignment]


class BadLoad(Exception):
    """Is pickled, and cannot be built again."""

    def __reduce__(self) -> Any:
        return _refuse_to_load, ()


def _refuse_to_load() -> None:
    raise RuntimeError("not here")


class OtherLoad(Exception):
    """Comes back as something else, without a word."""

    def __reduce__(self) -> Any:
        return ValueError, ("not what it was",)


@pytest.mark.parametrize("cls", [WithLock, BadReduce, BadLoad, OtherLoad])
def test_what_cannot_travel_arrives_as_its_description(cls: type[Exception]) -> None:
    """Type name, text and the worker's traceback; an `except` for the type does not catch it, ours does."""
    arrived = travelled(cls("the arm is stuck"))
    if cls is OtherLoad and type(arrived) is OtherLoad:
        return  # it is pickled by its attributes, not by its own reduction: itself is better than a description
    assert type(arrived) is RemoteError
    assert arrived.type_name == f"{cls.__module__}.{cls.__qualname__}"
    assert arrived.text == "the arm is stuck"
    assert "raise exception" in arrived.formatted
    assert f"{arrived.type_name}: the arm is stuck" in str(arrived)
    assert [failure.env_index for failure in failures(arrived)] == [3]


def test_an_exception_without_a_text_arrives() -> None:
    """Its `__str__` raises, in the worker and here."""
    arrived = travelled(BadText("x"))
    assert type(arrived) is BadText
    record = capture(raised(BadText("x")), 0, 1, "step")
    assert record.travelling is not None
    assert record.travelling.text == "<its __str__ raised RuntimeError>"
    assert record.travelling.type_name.endswith("BadText")


def test_a_lock_deep_in_the_chain_does_not_hide_the_exception() -> None:
    """Neither the cause nor the exception can travel: the description has both."""
    error = raised(ValueError("told"))
    error.__cause__ = WithLock("the cause")
    arrived = travelled(error)
    assert "told" in str(arrived)
    if type(arrived) is RemoteError:
        assert arrived.type_name == "ValueError"
        assert "the cause" in arrived.formatted


def test_bytes_that_load_there_but_not_here() -> None:
    """The module is gone, the class was renamed: the facts are still told."""
    record = capture(raised(ValueError("x")), 3, 42, "step")
    assert record.travelling is not None
    garbled = record.travelling._replace(pickled=b"\x80\x05no pickle")
    arrived: Any = restore(pickle.loads(pickle.dumps(dataclasses.replace(record, travelling=garbled))))
    assert type(arrived) is RemoteError
    assert (arrived.type_name, arrived.text) == ("ValueError", "x")
    assert "raise exception" in arrived.formatted


@dataclasses.dataclass(frozen=True)
class Frozen(Exception):
    """As a user writes it who likes frozen dataclasses; nothing can be set on it."""

    joint: str


class Falsy(Exception):
    """An error that counts its causes, and has none."""

    def __len__(self) -> int:
        return 0


@pytest.mark.parametrize("make", [lambda: Frozen("knee"), lambda: Falsy("x")], ids=["frozen", "falsy"])
@pytest.mark.parametrize("in_process", [False, True])
def test_strange_classes_are_told(make: Callable[[], Exception], in_process: bool) -> None:
    """As themselves, or described: never as another error."""
    original = make()
    record = (
        FailureRecord.of(raised(original), 3, 42, "step") if in_process else capture(raised(original), 3, 42, "step")
    )
    arrived: Any = restore(record if in_process else pickle.loads(pickle.dumps(record)))
    if in_process:
        assert arrived is original
    else:
        assert type(arrived) is type(original) or arrived.type_name.endswith(type(original).__qualname__)


# ---- what must not end the parent's task


class Stop(BaseException):
    """A user's own; its text cannot be had."""

    def __str__(self) -> str:
        raise RuntimeError("no text")


@pytest.mark.parametrize("in_process", [False, True])
@pytest.mark.parametrize(
    "exception",
    [
        SystemExit(3),
        KeyboardInterrupt(),
        GeneratorExit(),
        asyncio.CancelledError("enough"),
        StopIteration(7),
        StopAsyncIteration(),
        Stop(),
        BaseExceptionGroup("of an env", [KeyboardInterrupt()]),
    ],
    ids=lambda exception: type(exception).__name__,
)
def test_what_would_end_the_task_is_wrapped(exception: BaseException, in_process: bool) -> None:
    """`RemoteError` is raised, the original is its cause; neither `except SystemExit` nor a loop sees it."""
    record = (FailureRecord.of if in_process else capture)(raised(exception), 3, 42, "step")
    arrived: Any = restore(record if in_process else pickle.loads(pickle.dumps(record)))
    assert type(arrived) is RemoteError
    assert arrived.type_name.rpartition(".")[2] == type(exception).__qualname__
    assert type(arrived.__cause__) is type(exception)
    assert repr(arrived.__cause__.args) == repr(exception.args)
    [failure] = failures(arrived)
    assert failure.env_index == 3
    assert failure.exception is arrived.__cause__


def test_the_code_of_an_exit_is_kept() -> None:
    """As is the value of a `StopIteration`."""
    assert travelled(SystemExit(3)).__cause__.code == 3
    assert travelled(StopIteration(7)).__cause__.value == 7


def test_one_failure_is_itself_and_several_are_a_group() -> None:
    """In the order of the envs."""
    first, second = ValueError("a"), KeyError("b")
    records = [FailureRecord.of(first, 0, 1, "reset"), FailureRecord.of(second, 1, 1, "reset")]
    assert as_one_exception("reset", records[:1]) is first
    group: Any = as_one_exception("reset", records)
    assert type(group) is ExceptionGroup
    assert group.exceptions == (first, second)
    assert group.message == "2 envs failed in reset"


def test_in_process_the_exception_is_the_very_one() -> None:
    """With its own traceback."""
    error = raised(WithLock("x"))
    assert restore(FailureRecord.of(error, 0, 1, "step")) is error
    assert traceback.extract_tb(error.__traceback__)[-1].name == "raised"


class Unshowable:
    def __repr__(self) -> str:
        raise RuntimeError("no text")


def test_local_variables_are_shown_as_text() -> None:
    """Whatever they are; long ones are cut."""

    def fail() -> None:
        odd, long = Unshowable(), "x" * 1000
        raise ValueError(f"{type(odd)} {len(long)}")

    try:
        fail()
    except ValueError as caught:
        record = capture(caught, 3, 42, "step", traceback_locals=True)
    (_, note) = restore(pickle.loads(pickle.dumps(record))).__notes__
    assert "    odd = <its __repr__ raised RuntimeError>" in note
    assert f"    long = '{'x' * 199}..." in note
    assert f'  File "{__file__}", line ' in note


def test_no_frame_of_ours_is_behind_those_of_the_worker() -> None:
    """It would be kept as long as the exception, with all that its variables hold."""
    frames = [frame for frame, _ in traceback.walk_tb(travelled(caught_from(lambda: fail_deep(3))).__traceback__)]
    assert len(frames) > 3
    assert {frame.f_back for frame in frames} == {None}
