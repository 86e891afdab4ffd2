"""A lent buffer comes back when nobody can see it any more, and never before."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces
from hypothesis import given
from hypothesis import strategies as st

from aiovec.exchange.layout import Layout
from aiovec.exchange.slab import Geometry, Slab
from aiovec.pool.ring import HOME, Ring

SPACE = spaces.Dict(image=spaces.Box(0, 255, (4, 4), np.uint8), speed=spaces.Box(0, 1, (), np.float32))


def make_ring(num_buffers: int = 4, *, lend: bool = True) -> tuple[Slab, Ring]:
    """A slab of two envs, and its ring."""
    slab = Slab.private(Geometry(2, num_buffers, Layout(SPACE), Layout(spaces.Discrete(2))))
    return slab, Ring(slab, lend)


def test_buffers_are_taken_once_then_home() -> None:
    """Nobody waits for a buffer, and no two calls share one."""
    _, ring = make_ring()
    assert repr(ring) == "<Ring free=3 of 3>"
    assert [ring.take() for _ in range(5)] == [3, 2, 1, HOME, HOME]
    assert repr(ring) == "<Ring free=0 of 3>"


@pytest.mark.parametrize(("num_buffers", "lend"), [(1, True), (4, False)])
def test_without_a_ring_everything_goes_home(num_buffers: int, lend: bool) -> None:
    """Where observations are small, or copies were asked for."""
    _, ring = make_ring(num_buffers, lend=lend)
    assert [ring.take(), ring.take()] == [HOME, HOME]


def test_give_back_frees_a_buffer_but_never_home() -> None:
    """A call that failed gives back what it took."""
    _, ring = make_ring(2)
    assert ring.take() == 1
    ring.give_back(1)
    ring.give_back(HOME)
    assert [ring.take(), ring.take(), ring.take()] == [1, HOME, HOME]


def test_a_loan_is_the_buffer_itself() -> None:
    """No copy, writable, with the shapes and dtypes of the space."""
    slab, ring = make_ring()
    own = slab.buffer(2).observations
    own[0][...] = 7
    image, speed = ring.lend(2)
    assert np.shares_memory(image, slab.memory)
    assert (image.shape, image.dtype, speed.shape, speed.dtype) == ((2, 4, 4), np.uint8, (2,), np.float32)
    assert np.all(image == 7)
    assert image.flags.writeable
    speed[...] = 0.5
    assert own[1].tolist() == [0.5, 0.5]
    assert not slab.buffer(1).observations[1].any()


VIEWS: dict[str, Callable[[Any], Any]] = {
    "the array": lambda array: array,
    "a slice": lambda array: array[1:],
    "a row": lambda array: array[0],
    "a reshape": lambda array: array.reshape(-1),
    "a dtype view": lambda array: array.view(np.int8),
    "a transpose": lambda array: array.T,
    "a memoryview": memoryview,
    "a memoryview of a row": lambda array: memoryview(array)[0:1],
    "np.asarray": np.asarray,
    "np.frombuffer": lambda array: np.frombuffer(memoryview(array).cast("B"), np.uint8),
    "a row of a row": lambda array: array[1][2][1:3],
    "in a tuple": lambda array: ({"image": (array[0],)},),
}


@pytest.mark.parametrize("view", VIEWS)
def test_a_buffer_comes_back_with_the_last_view(view: str) -> None:
    """Whatever a user kept of it; only then is the buffer used again."""
    _, ring = make_ring(2)
    assert ring.take() == 1
    arrays = ring.lend(1)
    kept = VIEWS[view](arrays[0])
    del arrays
    gc.collect()
    assert ring.take() == HOME
    del kept
    assert ring.take() == 1


def test_each_leaf_keeps_the_buffer() -> None:
    """The image is gone, the speed is kept."""
    _, ring = make_ring(2)
    ring.take()
    image, speed = ring.lend(1)
    del image
    assert ring.take() == HOME
    del speed
    assert ring.take() == 1


def test_a_copy_does_not_keep_the_buffer() -> None:
    """Nor does the result of a calculation."""
    _, ring = make_ring(2)
    ring.take()
    arrays = ring.lend(1)
    kept = (arrays[0].copy(), arrays[1] + 1, arrays[0][[1]])
    del arrays
    assert ring.take() == 1
    assert len(kept) == 3


def test_a_kept_array_never_changes() -> None:
    """While later batches are written into every buffer that the ring gives."""
    slab, ring = make_ring(4)
    kept = []
    for value in range(8):
        buffer = ring.take()
        slab.buffer(buffer).observations[0][...] = value
        if buffer != HOME:
            kept.append((value, ring.lend(buffer)[0]))
    assert len(kept) == 3
    assert all(np.all(array == value) for value, array in kept)


def test_loans_may_end_in_any_thread() -> None:
    """A learner's thread drops the last array."""
    _, ring = make_ring(4)
    loans = [ring.lend(ring.take()) for _ in range(3)]
    threads = [threading.Thread(target=loans.pop) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(ring.take() for _ in range(4)) == [HOME, 1, 2, 3]


def test_a_loan_outlives_the_ring_and_the_slab() -> None:
    """What was returned is the user's, also after close."""
    slab, ring = make_ring(2)
    slab.buffer(1).observations[0][...] = 9
    image = ring.lend(ring.take())[0]
    del slab, ring
    gc.collect()
    assert np.all(image == 9)


@given(st.lists(st.one_of(st.just("call"), st.just("fail"), st.integers(0, 5)), max_size=40))
def test_no_buffer_is_given_out_twice(events: list[Any]) -> None:
    """Calls, failed calls and arrays dropped in any order: what is lent or taken is never taken again."""
    slab, ring = make_ring(4)
    held: list[tuple[int, list[Any]]] = []
    for event in events:
        if isinstance(event, int):
            del held[event : event + 1]
            continue
        buffer = ring.take()
        assert buffer == HOME or buffer not in [other for other, _ in held]
        assert (buffer == HOME) == (len(held) == 3)
        if buffer == HOME:
            continue
        if event == "fail":
            ring.give_back(buffer)
        else:
            held.append((buffer, ring.lend(buffer)))
    del held
    assert sorted(ring.take() for _ in range(3)) == [1, 2, 3]
    assert slab.geometry.num_buffers == 4
