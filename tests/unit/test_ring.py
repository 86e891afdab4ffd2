"""A lent buffer comes back when nobody can see it any more, and never before."""

from __future__ import annotations

import ctypes
import gc
import sys
import threading
import weakref
from collections.abc import Callable
from types import FrameType
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces
from hypothesis import given
from hypothesis import strategies as st

from aiovec.exchange.layout import Layout
from aiovec.exchange.slab import Geometry, Slab, Strip, private_memory
from aiovec.pool.ring import HOME, Lease, Ring, RolloutStrips

SPACE = spaces.Dict(image=spaces.Box(0, 255, (4, 4), np.uint8), speed=spaces.Box(0, 1, (), np.float32))


def make_ring(num_buffers: int = 3, max_buffers: int | None = None) -> tuple[Slab, Ring]:
    """A slab of two envs, and a ring of so many buffers, to which the test itself adds what is asked for."""
    slab = Slab.private(Geometry(2, Layout(SPACE), Layout(spaces.Discrete(2))))
    ring = Ring(slab, num_buffers if max_buffers is None else max_buffers, lambda: None)
    for _ in range(num_buffers):
        add(slab, ring)
    return slab, ring


def add(slab: Slab, ring: Ring) -> None:
    """One more buffer, in a strip of its own."""
    number = slab.num_buffers
    slab.add(Strip(number, 1), private_memory(slab.geometry.strip_nbytes(1, 0)))
    ring.add(number)


def test_buffers_are_taken_once_then_home() -> None:
    """Nobody waits for a buffer, and no two calls share one."""
    _, ring = make_ring()
    assert repr(ring) == "<Ring free=3 of 3>"
    assert [ring.take() for _ in range(5)] == [3, 2, 1, HOME, HOME]
    assert repr(ring) == "<Ring free=0 of 3>"


def test_without_a_ring_everything_goes_home() -> None:
    """Where observations are small, or copies were asked for."""
    _, ring = make_ring(0)
    assert [ring.take(), ring.take()] == [HOME, HOME]


def test_a_ring_asks_for_more_once_and_goes_home_meanwhile() -> None:
    """Until it has come; and again when all are lent again, up to the bound."""
    asked: list[int] = []
    slab, _ = make_ring(0)
    ring = Ring(slab, 2, lambda: asked.append(1))
    assert [ring.take(), ring.take(), len(asked)] == [HOME, HOME, 1]
    add(slab, ring)
    assert [ring.take(), ring.take(), len(asked)] == [1, HOME, 2]
    add(slab, ring)
    assert [ring.take(), ring.take(), len(asked)] == [2, HOME, 2]


def test_a_ring_without_memory_asks_no_more() -> None:
    """Copies do as well."""
    asked: list[int] = []
    slab, _ = make_ring(0)
    ring = Ring(slab, 2, lambda: asked.append(1))
    ring.take()
    ring.give_up_growing()
    assert [ring.take(), len(asked)] == [HOME, 1]


def test_give_back_frees_a_buffer_but_never_home() -> None:
    """A call that failed gives back what it took."""
    _, ring = make_ring(1)
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
    assert np.shares_memory(image, slab.strip_of(2).memory)
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
    _, ring = make_ring(1)
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
    _, ring = make_ring(1)
    ring.take()
    image, speed = ring.lend(1)
    del image
    assert ring.take() == HOME
    del speed
    assert ring.take() == 1


def test_a_copy_does_not_keep_the_buffer() -> None:
    """Nor does the result of a calculation."""
    _, ring = make_ring(1)
    ring.take()
    arrays = ring.lend(1)
    kept = (arrays[0].copy(), arrays[1] + 1, arrays[0][[1]])
    del arrays
    assert ring.take() == 1
    assert len(kept) == 3


def test_a_kept_array_never_changes() -> None:
    """While later batches are written into every buffer that the ring gives."""
    slab, ring = make_ring(3)
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
    _, ring = make_ring(3)
    loans = [ring.lend(ring.take()) for _ in range(3)]
    threads = [threading.Thread(target=loans.pop) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(ring.take() for _ in range(4)) == [HOME, 1, 2, 3]


def test_a_loan_outlives_the_ring_and_the_slab() -> None:
    """What was returned is the user's, also after close."""
    slab, ring = make_ring(1)
    slab.buffer(1).observations[0][...] = 9
    image = ring.lend(ring.take())[0]
    del slab, ring
    gc.collect()
    assert np.all(image == 9)


@given(st.lists(st.one_of(st.just("call"), st.just("fail"), st.integers(0, 5)), max_size=40))
def test_no_buffer_is_given_out_twice(events: list[Any]) -> None:
    """Calls, failed calls and arrays dropped in any order: what is lent or taken is never taken again."""
    slab, ring = make_ring(3)
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
    assert slab.num_buffers == 4


# ---- of rollouts


def make_strips(max_strips: int) -> tuple[Slab, RolloutStrips]:
    """Strips for two envs, none yet."""
    slab = Slab.private(Geometry(2, Layout(SPACE), Layout(spaces.Discrete(2))))
    return slab, RolloutStrips(slab, max_strips)


def lease(slab: Slab, strips: RolloutStrips, num_steps: int) -> Lease:
    """Takes a strip as the pool does: where there is none, another one is added."""
    while (taken := strips.take(num_steps)) is None:
        strip = Strip(slab.num_buffers, num_steps + 1, num_steps)
        slab.add(strip, private_memory(slab.geometry.strip_nbytes(strip.num_buffers, strip.num_actions)))
        strips.add(strip)
    return taken


def test_a_strip_comes_back_with_the_lease_and_all_arrays() -> None:
    """Those of a call that is still in flight hold the lease, a user holds arrays."""
    slab, strips = make_strips(3)
    first = lease(slab, strips, 4)
    number, rewards = first.strip.first, first.arrays.rewards[1:]
    assert not first.is_home
    assert lease(slab, strips, 4).strip.first != number
    del first
    assert lease(slab, strips, 4).strip.first != number
    del rewards
    gc.collect()
    assert {taken.strip.first for taken in [lease(slab, strips, 4), lease(slab, strips, 4)]} == {1, 6}
    assert repr(strips) == "<RolloutStrips free=2 of 2>"


def test_a_lease_may_end_while_another_begins() -> None:
    """In another thread, wherever Python lets that in: here within every comparison that is written in Python."""
    slab, strips = make_strips(4)
    held = [lease(slab, strips, 1)]
    short, long = lease(slab, strips, 9), lease(slab, strips, 10)
    del short
    del long

    def end_one(frame: FrameType, event: str, _arg: Any) -> None:
        if event == "call" and frame.f_code.co_name == "__eq__":
            held.clear()

    sys.setprofile(end_one)
    try:
        taken = strips.take(10)
    finally:
        sys.setprofile(None)
    assert taken is not None
    assert taken.strip.num_actions == 10


def test_beyond_the_bound_a_strip_is_home() -> None:
    """It is not lent, and comes back with its lease alone; nothing is ever shared."""
    slab, strips = make_strips(2)
    held = [lease(slab, strips, 1) for _ in range(3)]
    assert [taken.is_home for taken in held] == [False, False, True]
    kept = held.pop().arrays.rewards
    again = lease(slab, strips, 1)
    assert again.is_home
    assert np.shares_memory(kept, again.arrays.rewards)
    assert not any(np.shares_memory(again.arrays.rewards, taken.arrays.rewards) for taken in held)


def test_without_loans_there_is_one_strip() -> None:
    """With `copy=True` or `copy=False`."""
    slab, strips = make_strips(0)
    assert [lease(slab, strips, 3).is_home for _ in range(5)] == [True] * 5
    assert repr(strips) == "<RolloutStrips free=1 of 1>"


def test_a_longer_strip_serves_a_shorter_rollout() -> None:
    """The one that wastes least."""
    slab, strips = make_strips(4)
    long, short = lease(slab, strips, 9), lease(slab, strips, 20)
    del long, short
    assert lease(slab, strips, 5).strip.num_actions == 9
    assert lease(slab, strips, 10).strip.num_actions == 20
    assert lease(slab, strips, 21).strip.num_actions == 21


def test_poison_shows_who_looks_at_what_is_gone() -> None:
    """A pointer that numpy does not know of, kept after the last array."""
    slab = Slab.private(Geometry(2, Layout(SPACE), Layout(spaces.Discrete(2))))
    ring = Ring(slab, 1, lambda: None, poisons=True)
    add(slab, ring)
    slab.buffer(1).observations[1][...] = 0.5
    speed = ring.lend(ring.take())[1]
    pointer = ctypes.cast(speed.ctypes.data, ctypes.POINTER(ctypes.c_float))
    assert pointer[0] == 0.5
    del speed
    assert np.isnan(pointer[0])
    view = slab.buffer(HOME).observations[1]  # with `copy=False`
    assert not view.any()
    assert [ring.take(), ring.take()] == [1, HOME]
    assert np.all(np.isnan(view))
    strips = RolloutStrips(slab, 1, poisons=True)
    taken = lease(slab, strips, 2)
    taken.arrays.rewards[...] = 1
    rewards = slab.geometry.strip_arrays(slab.strip_of(taken.strip.first).memory, 3, 2).rewards
    del taken
    assert np.all(np.isnan(rewards))


@pytest.mark.parametrize("of", ["batch", "rollout"])
def test_what_is_kept_does_not_keep_the_rest_of_the_slab(of: str) -> None:
    """After the end of a vector a kept array holds its own strip alone."""
    slab, strips = make_strips(2)
    ring = Ring(slab, 1, lambda: None)
    add(slab, ring)
    kept = ring.lend(ring.take()) if of == "batch" else lease(slab, strips, 2).arrays
    gone = weakref.ref(slab)
    del slab, ring, strips
    gc.collect()
    assert gone() is None
    assert len(kept) > 0
