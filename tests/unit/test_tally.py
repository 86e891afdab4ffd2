"""Exactly one worker of a step takes the last token, whatever the order."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from aiovec.exchange.tally import Tally, take_last


@pytest.fixture(params=[2, 3, 64, 5000])
def num_workers(request: pytest.FixtureRequest) -> int:
    number: int = request.param
    return number


@pytest.fixture
def tally(num_workers: int) -> Iterator[Tally]:
    tally = Tally(num_workers)
    yield tally
    tally.close()


def test_the_last_of_each_step_is_told_so(tally: Tally, num_workers: int) -> None:
    assert repr(tally) == f"<Tally of {num_workers} workers>"
    for _ in range(70):
        tally.begin_step()
        taken = [take_last(tally.worker_fd) for _ in range(num_workers)]
        assert taken == [False] * (num_workers - 1) + [True]


def test_workers_that_end_at_once(tally: Tally, num_workers: int) -> None:
    with ThreadPoolExecutor(8) as threads:
        for _ in range(20):
            tally.begin_step()
            assert sum(threads.map(take_last, [tally.worker_fd] * num_workers)) == 1


def test_without_a_token_a_worker_answers_aloud() -> None:
    tally = Tally(2)
    assert take_last(tally.worker_fd)
    tally.close()


def test_close_closes_both_ends() -> None:
    tally = Tally(2)
    fd = tally.worker_fd
    tally.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_after_a_death_it_begins_anew() -> None:
    """Tokens that a dead worker has left are taken back."""
    tally = Tally(3)
    try:
        tally.begin_step()
        assert not take_last(tally.worker_fd)
        tally.begin_anew()
        tally.begin_step()
        assert [take_last(tally.worker_fd) for _ in range(3)] == [False, False, True]
    finally:
        tally.close()
