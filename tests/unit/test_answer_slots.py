"""Answer slots: an answer is there whole or not at all, for its own request, with the time when it was left."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiovec.exchange.answer_slots import AnswerSlots, answer_slots_nbytes

NUM_ENVS = 3
LARGEST = 512


@pytest.fixture
def slots() -> AnswerSlots:
    return AnswerSlots(np.zeros(answer_slots_nbytes(NUM_ENVS), np.uint8), NUM_ENVS)


def test_both_sides_see_the_same_memory() -> None:
    memory = np.zeros(answer_slots_nbytes(NUM_ENVS), np.uint8)
    worker, parent = AnswerSlots(memory, NUM_ENVS), AnswerSlots(memory, NUM_ENVS)
    assert worker.leave(1, 7, b"said")
    assert parent.seqs.tolist() == [0, 7, 0]
    assert parent.take(1) == b"said"


def test_the_order_of_completion(slots: AnswerSlots) -> None:
    for env_index in (2, 0, 1):
        assert slots.leave(env_index, 1, b"")
    assert slots.ended.argsort(kind="stable").tolist() == [2, 0, 1]
    assert [slots.take(env_index) for env_index in range(NUM_ENVS)] == [b""] * NUM_ENVS


def test_what_is_too_large_is_not_left(slots: AnswerSlots) -> None:
    """The slot is as it was: the answer goes another way."""
    assert slots.leave(0, 1, b"x" * LARGEST)
    assert not slots.leave(0, 2, b"x" * (LARGEST + 1))
    assert slots.seqs[0] == 1
    assert slots.take(0) == b"x" * LARGEST


@given(st.lists(st.tuples(st.integers(0, NUM_ENVS - 1), st.binary(max_size=LARGEST))))
def test_no_slot_touches_another(answers: list[tuple[int, bytes]]) -> None:
    slots = AnswerSlots(np.zeros(answer_slots_nbytes(NUM_ENVS), np.uint8), NUM_ENVS)
    last: dict[int, bytes] = {}
    for seq, (env_index, answer) in enumerate(answers, 1):
        slots.leave(env_index, seq, answer)
        last[env_index] = answer
    assert {env_index: slots.take(env_index) for env_index in last} == last
