"""Where everything lies in the slab, and that both sides see the same memory."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces
from hypothesis import given
from hypothesis import strategies as st
from unit.strategies import fixed_spaces

from aiovec.errors import SlabMemoryError
from aiovec.exchange.layout import ALIGNMENT, Layout
from aiovec.exchange.slab import Geometry, Slab, create_memory_file
from aiovec.pool.pool import split_envs

SMALL = Geometry(6, 3, Layout(spaces.Box(0, 1, (4,))), Layout(spaces.Discrete(3)))


@pytest.fixture
def slab_fd() -> Iterator[int]:
    """An empty slab file."""
    fd = create_memory_file()
    yield fd
    os.close(fd)


geometries = st.builds(
    Geometry, st.integers(1, 70), st.integers(1, 4), fixed_spaces.map(Layout), fixed_spaces.map(Layout)
)


def all_arrays(slab: Slab) -> list[np.ndarray[Any, Any]]:
    """The actions, then each buffer's arrays."""
    buffers = [slab.buffer(index) for index in range(slab.geometry.num_buffers)]
    return [*slab.action_arrays(), *(array for buffer in buffers for array in buffer.arrays())]


@given(geometries)
def test_arrays_are_aligned_disjoint_and_within(geometry: Geometry) -> None:
    """Actions and all buffers: each array at a cache line of its own, in order, none beyond the end."""
    slab = Slab.private(geometry)
    base = slab.memory.ctypes.data
    end_before = 0
    for array in all_arrays(slab):
        assert len(array) == geometry.num_envs
        if not array.size:
            continue
        start = array.ctypes.data - base
        assert start % ALIGNMENT == 0
        assert start >= end_before
        end_before = start + array.nbytes
    assert end_before <= geometry.nbytes == len(slab.memory)


@given(geometries)
def test_each_array_keeps_what_was_written(geometry: Geometry) -> None:
    """Every array filled with its own bytes, then all of them read."""
    slab = Slab.private(geometry)
    arrays = all_arrays(slab)
    for number, array in enumerate(arrays):
        array.view(np.uint8)[...] = number % 2 if array.dtype == np.bool_ else number % 251
    for number, array in enumerate(arrays):
        expected = number % 2 if array.dtype == np.bool_ else number % 251
        assert np.all(np.ascontiguousarray(array).view(np.uint8) == expected)


@given(geometries, st.integers(1, 8))
def test_workers_rows_are_disjoint_and_cover(geometry: Geometry, num_workers: int) -> None:
    """Each row of each array belongs to exactly one worker, and is written through its slice."""
    slab = Slab.private(geometry)
    buffer = slab.buffer(geometry.num_buffers - 1)
    for ids in split_envs(geometry.num_envs, min(num_workers, geometry.num_envs)):
        for array in buffer.rows(slice(ids.start, ids.stop)).arrays():
            array += True if array.dtype == np.bool_ else np.ones((), array.dtype)
    for array in buffer.arrays():
        assert np.all(array == 1)


@given(st.integers(1, 300), st.data())
def test_split_envs_is_contiguous_and_even(num_envs: int, data: st.DataObject) -> None:
    """All envs once, in order; no worker has more than one env above another."""
    shares = split_envs(num_envs, data.draw(st.integers(1, num_envs)))
    assert [index for ids in shares for index in ids] == list(range(num_envs))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_rewards_and_flags_have_their_dtypes() -> None:
    """Gymnasium's dtypes, in each buffer."""
    buffer = Slab.private(SMALL).buffer(2)
    assert [array.dtype for array in buffer.arrays()] == [np.float32, np.float64, np.bool_, np.bool_]
    assert [array.shape for array in buffer.arrays()] == [(6, 4), (6,), (6,), (6,)]


def test_private_memory_is_zero_and_of_this_slab_alone() -> None:
    """Two slabs of one geometry share nothing."""
    slab, other = Slab.private(SMALL), Slab.private(SMALL)
    slab.memory.fill(7)
    assert not other.memory.any()
    assert repr(slab) == f"<Slab nbytes={SMALL.nbytes}>"


def test_allocate_and_attach_show_the_same_memory(slab_fd: int) -> None:
    """What one mapping writes, the other reads; also once the descriptor is closed for both."""
    mine = Slab.allocate(SMALL, slab_fd)
    theirs = Slab.attach(SMALL, slab_fd)
    assert os.fstat(slab_fd).st_size == SMALL.nbytes
    theirs.buffer(1).rows(slice(2, 4)).observations[0][...] = 0.5
    mine.action_arrays()[0][...] = np.arange(6)
    assert mine.buffer(1).observations[0].tolist() == [[0.0] * 4] * 2 + [[0.5] * 4] * 2 + [[0.0] * 4] * 2
    assert not mine.buffer(0).observations[0].any()
    assert theirs.action_arrays()[0].tolist() == list(range(6))


def test_the_mapping_lives_as_long_as_an_array(slab_fd: int) -> None:
    """An array that a user kept outlives the slab."""
    kept = Slab.allocate(SMALL, slab_fd).buffer(0).rewards
    kept[...] = 3
    assert kept.sum() == 18


def test_a_slab_file_is_empty_and_not_inherited() -> None:
    """Workers get it by name of its number; no other child of the parent has it."""
    fd = create_memory_file()
    try:
        assert os.fstat(fd).st_size == 0
        assert not os.get_inheritable(fd)
    finally:
        os.close(fd)


@pytest.mark.parametrize("num_envs", [1 << 60, 1 << 28])
def test_no_memory_is_an_error_and_leaves_the_file_empty(slab_fd: int, num_envs: int, max_file_nbytes: None) -> None:
    """More than a file's size can say, and more than the system gives."""
    geometry = Geometry(num_envs, 1, Layout(spaces.Box(0, 1, (4,))), Layout(spaces.Discrete(2)))
    with pytest.raises(SlabMemoryError) as caught:
        Slab.allocate(geometry, slab_fd)
    assert isinstance(caught.value, MemoryError)
    assert caught.value.nbytes == geometry.nbytes
    assert f"{geometry.nbytes:,}" in str(caught.value)
    assert os.fstat(slab_fd).st_size == 0


@pytest.fixture
def max_file_nbytes() -> Iterator[None]:
    """A system that gives files of 1 GiB and no more, so that no test takes the machine's memory."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 30, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_no_private_memory_is_the_same_error() -> None:
    """More than an address space has."""
    geometry = Geometry(1 << 54, 1, Layout(spaces.Box(0, 1, (4,))), Layout(spaces.Discrete(2)))
    with pytest.raises(SlabMemoryError, match="no memory for the"):
        Slab.private(geometry)
