"""Lanes: who drives which row, in which order, and who answers."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
from fault_envs import BOUND_SECONDS

from aiovec.exchange.black_box import IDLE, Phase, doing_code
from aiovec.worker.clock import StepClock
from aiovec.worker.lanes import InlineLane, Lanes, ThreadLane
from aiovec.worker.turns import EnvCall, Turn

CLOCK = StepClock([0.0] * 100)


def calls(function: Any) -> Turn[None]:
    """A turn of one call."""
    yield EnvCall(Phase.STEP, function)


class Kept:
    """A lane that drives nothing until it is told."""

    def __init__(self) -> None:
        self.items: list[tuple[int, Any, bool]] = []

    def put(self, row: int, turn: Any, ended: Any, may_be_cancelled: bool) -> None:
        self.items.append((row, ended, may_be_cancelled))

    def end_one(self) -> None:
        _, ended, _ = self.items.pop(0)
        ended()


class Threads:
    """Lanes of threads that end with the test."""

    def __init__(self) -> None:
        self.lanes: list[ThreadLane] = []

    def __call__(self, count: int) -> list[ThreadLane]:
        self.lanes = [ThreadLane([IDLE, 0], CLOCK) for _ in range(count)]
        for lane in self.lanes:
            lane.start()
        return self.lanes


@pytest.fixture
def threads() -> Iterator[Threads]:
    """Starts threads, and ends them."""
    before = set(threading.enumerate())
    made = Threads()
    yield made
    for lane in made.lanes:
        lane.stop()
    for thread in set(threading.enumerate()) - before:
        thread.join(BOUND_SECONDS)
        assert not thread.is_alive()


def no_turn() -> Turn[None]:
    yield from ()


def turns_of(rows: Any) -> list[tuple[int, Turn[None]]]:
    return [(row, no_turn()) for row in rows]


# ---- who drives whom


def test_rows_are_dealt_out_in_turn_and_always_in_the_same_way() -> None:
    kept = [Kept(), Kept(), Kept()]
    lanes = Lanes([*kept], {})
    for rows in (range(7), [5, 3], [6]):
        lanes.do(turns_of(rows), lambda: None, may_be_cancelled=False)
    assert [[row for row, *_ in lane.items] for lane in kept] == [[0, 3, 6, 3, 6], [1, 4], [2, 5, 5]]


def test_rows_with_a_lane_of_their_own_are_put_first() -> None:
    """The others may be driven on the spot: they would keep them waiting."""
    order: list[int] = []
    own = Kept()

    def told(row: int) -> Turn[None]:
        yield EnvCall(Phase.STEP, lambda: order.append(len(own.items) * 10 + row))

    lanes = Lanes([InlineLane([IDLE, 0], CLOCK)], {1: own, 3: own})
    lanes.do([(row, told(row)) for row in range(4)], lambda: None, may_be_cancelled=True)
    assert [(row, may_be_cancelled) for row, _, may_be_cancelled in own.items] == [(1, True), (3, True)]
    assert order == [20, 22]


# ---- who answers


def test_nothing_to_do_is_answered_at_once() -> None:
    ended: list[int] = []
    Lanes([Kept()], {}).do([], lambda: ended.append(1), may_be_cancelled=False)
    assert ended == [1]


def test_the_last_one_answers_once_in_whichever_lane() -> None:
    kept, own, ended = Kept(), Kept(), []
    lanes = Lanes([kept], {1: own})
    lanes.do(turns_of([0, 1, 2]), lambda: ended.append(1), may_be_cancelled=False)
    kept.end_one()
    own.end_one()
    assert not ended
    kept.end_one()
    assert ended == [1]


def test_requests_are_counted_each_for_itself() -> None:
    kept, ended = Kept(), []
    lanes = Lanes([kept], {})
    for number in range(2):
        lanes.do(turns_of([0, 1]), lambda number=number: ended.append(number), may_be_cancelled=False)
    for _ in range(3):
        kept.end_one()
    assert ended == [0]
    kept.end_one()
    assert ended == [0, 1]


def test_a_count_down_from_many_threads_ends_once(threads: Threads) -> None:
    ended = threading.Semaphore(0)
    lanes = Lanes([*threads(4)], {})
    for _ in range(200):
        lanes.do(turns_of(range(8)), ended.release, may_be_cancelled=False)
    for _ in range(200):
        assert ended.acquire(timeout=BOUND_SECONDS)
    assert not ended.acquire(blocking=False)


# ---- inline


def test_inline_all_is_done_when_it_returns() -> None:
    doing, seen, ended = [IDLE, 0], [], []
    lane = InlineLane(doing, CLOCK)
    lane.put(5, calls(lambda: seen.append((doing[0], threading.get_ident()))), lambda: ended.append(list(doing)), True)
    assert seen == [(doing_code(5, Phase.STEP), threading.get_ident())]
    assert ended == [[IDLE, 1]]


# ---- threads


def test_a_thread_keeps_the_order_and_is_always_the_same(threads: Threads) -> None:
    told: list[tuple[int, int]] = []
    done = threading.Event()
    lanes = Lanes([*threads(1)], {})
    for number in range(50):
        turn = calls(lambda number=number: told.append((number, threading.get_ident())))
        lanes.do([(number % 3, turn)], done.set if number == 49 else lambda: None, may_be_cancelled=False)
    assert done.wait(BOUND_SECONDS)
    assert [number for number, _ in told] == list(range(50))
    (ident,) = {ident for _, ident in told}
    assert ident != threading.get_ident()


def test_threads_overlap(threads: Threads) -> None:
    """They meet: one after the other would never end."""
    barrier, done = threading.Barrier(3), threading.Event()
    lanes = Lanes([*threads(3)], {})
    turns = [(row, calls(lambda: barrier.wait(BOUND_SECONDS))) for row in range(3)]
    lanes.do(turns, done.set, may_be_cancelled=False)
    assert done.wait(BOUND_SECONDS)
    assert not barrier.broken


def test_one_that_waits_keeps_nobody_but_its_own(threads: Threads) -> None:
    go_on, other, own = threading.Event(), threading.Event(), threading.Event()
    lanes = Lanes([*threads(2)], {})
    lanes.do([(0, calls(lambda: go_on.wait(BOUND_SECONDS)))], lambda: None, may_be_cancelled=False)
    lanes.do([(2, calls(lambda: None))], own.set, may_be_cancelled=False)
    lanes.do([(1, calls(lambda: None))], other.set, may_be_cancelled=False)
    assert other.wait(BOUND_SECONDS)
    assert not own.is_set()
    go_on.set()
    assert own.wait(BOUND_SECONDS)


def test_stopped_it_ends_behind_what_was_put() -> None:
    lane, told = ThreadLane([IDLE, 0], CLOCK), []
    for number in range(3):
        lane.put(0, calls(lambda number=number: told.append(number)), lambda: None, False)
    lane.stop()
    lane.put(0, calls(lambda: told.append("too late")), lambda: None, False)
    lane.run()  # in this thread: it returns
    assert told == [0, 1, 2]
