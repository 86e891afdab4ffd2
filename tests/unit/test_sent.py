"""Sent envs: each answer is taken once, in the order of completion, and nobody waits for one that was overlooked."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiovec.exchange.answer_slots import AnswerSlots, answer_slots_nbytes
from aiovec.exchange.wanted import Wanted, take_wanted
from aiovec.pool.sent import Sent

NUM_ENVS = 4


def new_slots() -> AnswerSlots:
    return AnswerSlots(np.zeros(answer_slots_nbytes(NUM_ENVS), np.uint8), NUM_ENVS)


@pytest.fixture
def wanted() -> Iterator[Wanted]:
    wanted = Wanted()
    yield wanted
    wanted.close()


def test_answers_are_taken_once_in_the_order_of_completion(wanted: Wanted) -> None:
    slots = new_slots()
    sent = Sent(slots, wanted, NUM_ENVS)
    assert not sent
    sent.ask([3, 1, 0], 10)
    assert repr(sent) == "<Sent asked=3 waiting=False>"
    assert sent.take() == []
    slots.leave(1, 11, b"one")
    slots.leave(3, 10, b"")
    assert sent.has_left(1, 11)
    assert not sent.has_left(0, 12)
    assert sent.take() == [(11, b"one"), (10, b"")]
    assert sent
    assert sent.take() == []
    slots.leave(0, 12, b"")
    assert sent.take() == [(12, b"")]
    assert not sent


def test_an_answer_to_an_earlier_request_is_none(wanted: Wanted) -> None:
    """Of an env whose answer came by the socket, or whose worker died, too."""
    slots = new_slots()
    sent = Sent(slots, wanted, NUM_ENVS)
    slots.leave(2, 5, b"old")
    sent.ask([2], 6)
    assert sent.take() == []
    sent.forget(2, 5)
    assert sent
    sent.forget(2, 6)
    assert not sent
    sent.forget(2, 6)
    assert not sent
    slots.leave(2, 6, b"late")
    assert sent.take() == []


def test_who_waits_for_nobody_has_no_tokens(wanted: Wanted) -> None:
    """What is to come comes otherwise."""
    sent = Sent(new_slots(), wanted, NUM_ENVS)
    sent.want(1)
    assert not take_wanted(wanted.worker_fd)
    sent.ask([0, 1], 1)
    sent.want(1)
    sent.want(2)  # the first ones are taken back
    assert [take_wanted(wanted.worker_fd) for _ in range(3)] == [False, True, False]
    sent.want(1)
    sent.give_up()
    sent.give_up()
    assert not take_wanted(wanted.worker_fd)


@given(st.data())
def test_nobody_waits_for_ever(data: st.DataObject) -> None:
    """However the answers fall between looks and tokens: who still waits is woken by those that are to come."""
    wanted, slots = Wanted(), new_slots()
    try:
        sent = Sent(slots, wanted, NUM_ENVS)
        order = data.draw(st.permutations(range(NUM_ENVS)))
        count = data.draw(st.integers(1, NUM_ENVS))
        sent.ask(range(NUM_ENVS), 1)
        is_awake, left, ready = False, list(order), 0

        def answers() -> None:
            """Some are left, and each takes its token, or does so only later."""
            nonlocal is_awake
            for _ in range(data.draw(st.integers(0, len(left)))):
                env_index = left.pop()
                slots.leave(env_index, env_index + 1, b"")
                if data.draw(st.booleans()):
                    is_awake |= take_wanted(wanted.worker_fd)
                else:
                    late.append(env_index)

        late: list[int] = []
        while True:  # as `Calls._must_wait`
            answers()
            ready += len(sent.take())
            if ready >= count:
                return
            sent.want(count - ready)
            answers()
            came = len(sent.take())
            ready += came
            if not came:
                break
        is_awake = False  # whoever woke us before was seen
        for _ in late:
            is_awake |= take_wanted(wanted.worker_fd)
        while left and not is_awake:
            env_index = left.pop()
            slots.leave(env_index, env_index + 1, b"")
            is_awake |= take_wanted(wanted.worker_fd)
        assert is_awake
    finally:
        wanted.close()
