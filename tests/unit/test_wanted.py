"""Tokens: whoever gives the last answer that is wanted wakes the parent; nobody does where nothing is wanted."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

import pytest

from aiovec.exchange.wanted import Wanted, take_wanted


@pytest.fixture
def wanted() -> Iterator[Wanted]:
    wanted = Wanted()
    yield wanted
    wanted.close()


def taken(wanted: Wanted, count: int) -> list[int]:
    """Which of so many answers wake the parent, counted from 1."""
    return [number for number in range(1, count + 1) if take_wanted(wanted.worker_fd)]


@pytest.mark.parametrize(
    ("count", "to_come", "waking"),
    [
        (1, 1, [1]),
        (1, 9, [1, 2, 4, 8, 9]),
        (3, 3, [3]),
        (3, 13, [3, 6, 12, 13]),
        (5, 3, [5]),  # some of it comes another way: too many tokens wake nobody
    ],
)
def test_who_wakes_the_parent(wanted: Wanted, count: int, to_come: int, waking: list[int]) -> None:
    """The last that is wanted; behind it few, in case that this one was stopped before it could."""
    wanted.want(count, to_come)
    assert taken(wanted, 20) == waking


def test_nobody_is_woken_where_nothing_is_wanted(wanted: Wanted) -> None:
    assert taken(wanted, 3) == []
    wanted.want(2, 10)
    assert taken(wanted, 1) == []
    wanted.take_back()
    assert taken(wanted, 3) == []
    wanted.take_back()
    wanted.want(1, 1)
    assert taken(wanted, 3) == [1]


@pytest.mark.parametrize("to_come", [4095, 4096, 4097, 100_000])
def test_more_than_the_pipe_holds(wanted: Wanted, to_come: int) -> None:
    """It is woken in between, and never blocked."""
    wanted.want(to_come, to_come)
    assert taken(wanted, to_come) == [min(to_come, 4096)]
    wanted.want(to_come, to_come)
    wanted.take_back()
    assert taken(wanted, 5) == []


def test_close() -> None:
    wanted = Wanted()
    assert repr(wanted).startswith("<Wanted fd=")
    fd = wanted.worker_fd
    wanted.close()
    with pytest.raises(OSError) as caught:
        os.fstat(fd)
    assert caught.value.errno == errno.EBADF
