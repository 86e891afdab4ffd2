"""What travels: by value to the workers, by name back."""

from __future__ import annotations

import inspect
import sys
import threading
import traceback
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from aiovec.exchange import pickles


@pytest.fixture
def main_class() -> Iterator[type[Exception]]:
    """An exception class of `__main__`, as a script or a notebook defines it."""
    main = sys.modules["__main__"]
    cls: type[Exception] = types.new_class("OfMain", (Exception,))
    cls.__module__ = "__main__"
    main.OfMain = cls  # type: ignore[attr-defined]
    yield cls
    del main.OfMain  # type: ignore[attr-defined]
    pickles._main_classes.clear()


DUMPS = [pickles.dumps_to_worker, pickles.dumps_to_parent, pickles.dumps_with_tracebacks]


@pytest.mark.parametrize("dumps", DUMPS)
@pytest.mark.parametrize("value", [None, 1, "x", [1, {"a": (2,)}], {"array": np.arange(3).tolist()}, range(3)])
def test_values_go_through(dumps: Callable[[Any], bytes], value: Any) -> None:
    """Whichever way they go."""
    assert pickles.loads(dumps(value)) == value
    assert pickles.loads(memoryview(dumps(value))) == value


def test_functions_go_to_the_worker_by_value() -> None:
    """A lambda with what it closes over: an env_fn."""
    length = 5
    assert pickles.loads(pickles.dumps_to_worker(lambda: length + 1))() == 6


def test_code_keeps_the_file_of_its_source() -> None:
    """In nested code too: without it a traceback from a worker shows no source."""
    function = pickles.loads(pickles.dumps_to_worker(lambda: lambda: None))
    assert function.__code__.co_filename == __file__
    assert function().__code__.co_filename == __file__


def test_functions_come_back_too() -> None:
    """An info may hold a lambda; the slower pickler takes it."""
    got = pickles.loads(pickles.dumps_to_parent({"f": lambda x: x + 1}))
    assert got["f"](1) == 2


@pytest.mark.parametrize("dumps", DUMPS)
def test_what_no_pickler_takes_is_an_error(dumps: Callable[[Any], bytes]) -> None:
    """Raised by the one who pickles: before a worker is touched, or in the worker."""
    with pytest.raises(TypeError, match="cannot pickle"):
        dumps(threading.Lock())


def test_a_class_of_main_comes_back_as_the_very_class(main_class: type[Exception]) -> None:
    """By name: the parent's `except` and `isinstance` know it."""
    error = main_class("x")
    got = pickles.loads(pickles.dumps_with_tracebacks(error))
    assert type(got) is main_class
    assert pickles.loads(pickles.dumps_with_tracebacks(main_class)) is main_class


def test_a_class_that_main_does_not_have_is_found_where_it_was_sent(main_class: type[Exception]) -> None:
    """A worker never imports the parent's `__main__`: its own trial load finds the class all the same."""
    dumped = pickles.dumps_with_tracebacks(main_class("x"))
    del sys.modules["__main__"].OfMain  # type: ignore[attr-defined]
    try:
        assert type(pickles.loads(dumped)) is main_class
    finally:
        sys.modules["__main__"].OfMain = main_class  # type: ignore[attr-defined]


def test_a_class_of_main_that_nobody_has_is_an_error(main_class: type[Exception]) -> None:
    """Which `restore` turns into a description."""
    dumped = pickles.dumps_with_tracebacks(main_class("x"))
    pickles._main_classes.clear()
    del sys.modules["__main__"].OfMain  # type: ignore[attr-defined]
    try:
        with pytest.raises(AttributeError):
            pickles.loads(dumped)
    finally:
        sys.modules["__main__"].OfMain = main_class  # type: ignore[attr-defined]


def test_exceptions_in_a_value_keep_their_traceback() -> None:
    """An info may hold an exception that the env caught."""
    try:
        raise ValueError("inside")
    except ValueError as error:
        dumped = pickles.dumps_with_tracebacks({"error": [error]})
    [got] = pickles.loads(dumped)["error"]
    assert [frame.name for frame in traceback.extract_tb(got.__traceback__)] == [
        "test_exceptions_in_a_value_keep_their_traceback"
    ]


def looked_up(table: dict[str, int], key: str) -> int:
    return table["known"] if key == "known" else table[key]


def over_two_lines() -> tuple[int, int]:
    return (
        1,
        looked_up({"known": 1}, "unknown") + looked_up({"known": 1}, "known"),
    )


@pytest.mark.parametrize("function", [over_two_lines, lambda: 1 + looked_up({}, "x"), lambda: 1 + int("no number")])
def test_a_traceback_prints_as_the_original(function: Callable[[], object]) -> None:
    """The marks under the part of a line that failed are where they were."""
    with pytest.raises((KeyError, ValueError)) as caught:
        function()
    loaded = pickles.loads(pickles.dumps_with_tracebacks(caught.value))
    assert traceback.format_exception(loaded) == traceback.format_exception(caught.value)


def long_before_it_fails(key: str) -> int:
    """Whose first line is far from the one that fails."""
    table = {"known": 1}
    for line in range(70):
        table[f"line {line}"] = line
    return looked_up(
        table,
        key,
    )


def test_the_frames_of_a_traceback_are_at_the_place_themselves() -> None:
    """IPython shows cells by these, not by the traceback's own lines."""
    with pytest.raises(KeyError) as caught:
        long_before_it_fails("unknown")
    loaded = pickles.loads(pickles.dumps_with_tracebacks(caught.value))
    assert traceback.format_exception(loaded) == traceback.format_exception(caught.value)
    there, here = (list(traceback.walk_tb(error.__traceback__)) for error in (caught.value, loaded))
    assert len(there) == len(here) == 3
    for (original, lineno), (frame, its_lineno) in zip(there[1:], here[1:], strict=True):  # the first one has gone on
        assert frame.f_lineno == original.f_lineno == lineno == its_lineno
        for name in ("co_name", "co_qualname", "co_filename", "co_firstlineno"):
            assert getattr(frame.f_code, name) == getattr(original.f_code, name)
        assert inspect.getsourcelines(frame) == inspect.getsourcelines(original)
        assert frame.f_back is None


def test_a_traceback_of_thousands_of_frames() -> None:
    """A flat list: no recursion, neither there nor here."""

    def deep(depth: int) -> None:
        if depth:
            deep(depth - 1)
        raise ValueError("deep")

    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(5000)
    try:
        with pytest.raises(ValueError, match="deep") as caught:
            deep(3000)
    finally:
        sys.setrecursionlimit(limit)
    got = pickles.loads(pickles.dumps_with_tracebacks(caught.value))
    assert len(traceback.extract_tb(got.__traceback__)) == len(traceback.extract_tb(caught.value.__traceback__))


def test_an_exception_that_was_never_raised() -> None:
    """Has no traceback, before and after."""
    assert pickles.loads(pickles.dumps_with_tracebacks(ValueError("x"))).__traceback__ is None
