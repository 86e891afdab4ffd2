"""The request to step some envs, as bytes: what goes in comes out, and the actions are loaded later, or never."""

from __future__ import annotations

from typing import Any, NoReturn

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiovec.exchange import pickles, step_each
from aiovec.exchange.frames import FrameKind, FrameReader, pack_frame
from aiovec.exchange.step_each import StepEachRequest

rows = st.lists(st.integers(0, 2**32 - 1), max_size=40)
actions = st.one_of(
    st.integers(),
    st.text(max_size=5),
    st.lists(st.floats(allow_nan=False), max_size=3),
    st.dictionaries(st.sampled_from("ab"), st.binary(max_size=4)),
)


@given(rows, st.booleans(), st.booleans(), st.data())
def test_what_goes_in_comes_out(rows: list[int], autoreset: bool, is_sent: bool, data: st.DataObject) -> None:
    """Rows in their order, with actions or without; from bytes or from a part of a buffer."""
    asked = data.draw(st.lists(actions, min_size=len(rows), max_size=len(rows))) if is_sent else None
    payload = step_each.dumps(StepEachRequest(rows, autoreset, asked))
    for given_ in (payload, memoryview(b"before" + payload)[6:]):
        request, rest = step_each.loads(given_)
        assert request == StepEachRequest(tuple(rows), autoreset, None)
        assert (pickles.loads(rest) if len(rest) else None) == asked


@given(st.lists(st.integers(0, 99), min_size=1, max_size=9), st.integers(1, 9))
def test_through_a_stream(rows: list[int], cut: int) -> None:
    """As the payload of a frame, whichever way it was cut."""
    payload = step_each.dumps(StepEachRequest(rows, True, [np.full(2, row) for row in rows]))
    stream, reader, frames = pack_frame(FrameKind.STEP_EACH, 7, 3, payload), FrameReader(), []
    while stream:
        piece, stream = stream[:cut], stream[cut:]
        reader.space()[: len(piece)] = piece
        reader.received(len(piece))
        frames += list(reader.frames())
    (frame,) = frames
    assert (frame.kind, frame.seq, frame.buffer) == (FrameKind.STEP_EACH, 7, 3)
    request, rest = step_each.loads(frame.payload)
    assert request.rows == tuple(rows)
    assert [action.tolist() for action in pickles.loads(rest)] == [[row, row] for row in rows]


@pytest.mark.parametrize("rows", [[], [0], [5, 1, 2]])
def test_a_request_without_actions_is_a_head_and_its_rows(rows: list[int]) -> None:
    """Nothing is pickled on the path of a single step."""
    assert len(step_each.dumps(StepEachRequest(rows, False, None))) == 5 + 4 * len(rows)


class DoesNotLoad:
    def __reduce__(self) -> Any:
        return _refuse, ()


def _refuse() -> NoReturn:
    raise LookupError("an action that does not load")


def test_whose_they_are_is_known_before_the_actions_are_loaded() -> None:
    """So that a worker can answer for these envs, whatever their actions do."""
    request, rest = step_each.loads(step_each.dumps(StepEachRequest([4, 2], True, [DoesNotLoad(), 0])))
    assert request.rows == (4, 2)
    with pytest.raises(LookupError, match="does not load"):
        pickles.loads(rest)


class DoesNotPickle:
    def __reduce__(self) -> Any:
        raise TypeError("an action that does not pickle")


def test_what_does_not_pickle_is_told_at_once() -> None:
    """Before anything was sent."""
    with pytest.raises(TypeError, match="does not pickle"):
        step_each.dumps(StepEachRequest([0], True, [DoesNotPickle()]))
