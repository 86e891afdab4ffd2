"""A reply that a worker leaves is the one that the parent takes."""

from __future__ import annotations

import numpy as np
import pytest
from gymnasium import spaces
from hypothesis import given
from hypothesis import strategies as st

from aiovec.exchange.layout import ALIGNMENT, Layout
from aiovec.exchange.reply_area import ReplyArea, reply_area_nbytes
from aiovec.exchange.slab import Geometry, Slab
from aiovec.exchange.tally import NUM_TALLIES

NBYTES = 64
LARGEST = NBYTES - 16


@given(st.lists(st.binary(max_size=LARGEST + 20), min_size=1, max_size=8))
def test_each_replaces_the_one_before(replies: list[bytes]) -> None:
    memory = np.zeros(NBYTES, np.uint8)
    theirs, ours = ReplyArea(memory), ReplyArea(memory)
    for seq, reply in enumerate(replies, start=1):
        fits = len(reply) <= LARGEST
        assert not ours.has(seq)
        assert ours.take(seq) is None  # the one before is still there
        assert theirs.leave(seq, reply) == fits
        assert ours.has(seq)
        assert ours.take(seq) == (reply if fits else None)


def test_what_was_taken_does_not_change() -> None:
    area = ReplyArea(np.zeros(NBYTES, np.uint8))
    area.leave(1, b"first")
    taken = area.take(1)
    area.leave(2, b"other")
    assert taken == b"first"


def test_areas_of_a_slab_are_apart_from_everything_else() -> None:
    """As large as the most envs that a worker has, at the slab's end."""
    layout, actions = Layout(spaces.Box(0, 1, (3,))), Layout(spaces.Discrete(2))
    slab = Slab.private(Geometry(7, layout, actions, num_workers=3))
    areas = [slab.reply_area(index, tally) for index in range(3) for tally in range(NUM_TALLIES)]
    largest = slab.geometry.reply_area_nbytes - 16
    assert slab.geometry.reply_area_nbytes == reply_area_nbytes(3)
    for index, area in enumerate(areas):
        assert area.leave(1, bytes([index + 1]) * largest)
    assert [area.take(1) for area in areas] == [bytes([index + 1]) * largest for index in range(6)]
    assert not any(array.any() for array in slab.buffer(0).arrays())
    assert not any(array.any() for array in slab.actions_for(0)[0])


@pytest.mark.parametrize("num_rows", [1, 3, 64, 2048])
def test_more_envs_get_more(num_rows: int) -> None:
    nbytes = reply_area_nbytes(num_rows)
    assert nbytes % ALIGNMENT == 0
    assert nbytes >= 4096 + 256 * num_rows
