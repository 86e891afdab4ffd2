"""Where everything lies in the slab, and that both sides see the same memory."""

from __future__ import annotations

import mmap
import os
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces
from hypothesis import given
from hypothesis import strategies as st
from unit.strategies import fixed_spaces

from aiovec.errors import SlabMemoryError
from aiovec.exchange import slab as slab_module
from aiovec.exchange.groups import split_evenly
from aiovec.exchange.layout import ALIGNMENT, Layout
from aiovec.exchange.slab import Geometry, Slab, Strip, create_memory_file, mapped, private_memory, reserve_memory

SMALL = Geometry(6, Layout(spaces.Box(0, 1, (4,))), Layout(spaces.Discrete(3)))


@pytest.fixture
def slab_fd() -> Iterator[int]:
    """An empty slab file."""
    fd = create_memory_file()
    yield fd
    os.close(fd)


geometries = st.builds(Geometry, st.integers(1, 70), fixed_spaces.map(Layout), fixed_spaces.map(Layout))
sizes = st.tuples(st.integers(1, 5), st.integers(0, 4))  # buffers and batches of actions of a strip


def with_strips(geometry: Geometry, sizes: list[tuple[int, int]]) -> Slab:
    """A private slab with these strips behind home."""
    slab, first = Slab.private(geometry), 1
    for num_buffers, num_actions in sizes:
        memory = private_memory(geometry.strip_nbytes(num_buffers, num_actions))
        slab.add(Strip(first, num_buffers, num_actions), memory)
        first += num_buffers
    return slab


def actions_for(slab: Slab, number: int) -> list[np.ndarray[Any, Any]]:
    """The actions of all envs for the call that writes a buffer."""
    arrays, index = slab.actions_for(number)
    return [array[index] for array in arrays]


def all_arrays(slab: Slab, num_buffers: int) -> list[np.ndarray[Any, Any]]:
    """The actions at home, then each buffer's arrays."""
    buffers = [slab.buffer(index) for index in range(num_buffers)]
    return [*actions_for(slab, 0), *(array for buffer in buffers for array in buffer.arrays())]


@given(geometries, sizes)
def test_arrays_are_aligned_disjoint_and_within(geometry: Geometry, size: tuple[int, int]) -> None:
    """All arrays of a strip: each at a cache line of its own, in order, none beyond the end."""
    memory = private_memory(geometry.strip_nbytes(*size))
    arrays = geometry.strip_arrays(memory, *size)
    end_before = 0
    for array in (*arrays.observations, arrays.rewards, arrays.terminations, arrays.truncations, *arrays.actions):
        assert array.shape[1] == geometry.num_envs
        if not array.size:
            continue
        start = array.ctypes.data - memory.ctypes.data
        assert start % ALIGNMENT == 0
        assert start >= end_before
        end_before = start + array.nbytes
    assert end_before <= len(memory)


@given(geometries, st.lists(sizes, max_size=3))
def test_each_array_keeps_what_was_written(geometry: Geometry, strips: list[tuple[int, int]]) -> None:
    """Every array filled with its own bytes, then all of them read."""
    slab = with_strips(geometry, strips)
    arrays = all_arrays(slab, 1 + sum(num_buffers for num_buffers, _ in strips))
    for number, array in enumerate(arrays):
        array.view(np.uint8)[...] = number % 2 if array.dtype == np.bool_ else number % 251
    for number, array in enumerate(arrays):
        expected = number % 2 if array.dtype == np.bool_ else number % 251
        assert np.all(np.ascontiguousarray(array).view(np.uint8) == expected)


@given(geometries, st.integers(1, 8))
def test_workers_rows_are_disjoint_and_cover(geometry: Geometry, num_workers: int) -> None:
    """Each row of each array belongs to exactly one worker, and is written through its slice."""
    buffer = Slab.private(geometry).buffer(0)
    for ids in split_evenly(geometry.num_envs, min(num_workers, geometry.num_envs)):
        for array in buffer.rows(slice(ids.start, ids.stop)).arrays():
            array += True if array.dtype == np.bool_ else np.ones((), array.dtype)
    for array in buffer.arrays():
        assert np.all(array == 1)


def test_rewards_and_flags_have_their_dtypes() -> None:
    """Gymnasium's dtypes, in each buffer."""
    buffer = with_strips(SMALL, [(1, 0), (3, 2)]).buffer(2)
    assert [array.dtype for array in buffer.arrays()] == [np.float32, np.float64, np.bool_, np.bool_]
    assert [array.shape for array in buffer.arrays()] == [(6, 4), (6,), (6,), (6,)]


def test_private_memory_is_zero_and_of_this_slab_alone() -> None:
    """Two slabs of one geometry share nothing."""
    slab, other = Slab.private(SMALL), Slab.private(SMALL)
    slab.memory.fill(7)
    assert not other.memory.any()
    assert repr(slab) == f"<Slab nbytes={SMALL.nbytes} strips=1>"


def test_the_buffers_of_a_strip_are_rows_of_its_arrays() -> None:
    """So what a rollout returns is what was written, step by step; numbers go on from strip to strip."""
    slab = with_strips(SMALL, [(1, 0), (4, 3), (2, 1)])
    strip, _, memory = slab.strip_of(5)
    assert (strip.first, strip.num_buffers) == (2, 4)
    arrays = SMALL.strip_arrays(memory, 4, 3)
    for index in range(4):
        slab.buffer(2 + index).rewards[...] = index
        slab.buffer(2 + index).observations[0][...] = index
    assert arrays.rewards[:, 0].tolist() == arrays.observations[0][:, 5, 3].tolist() == [0, 1, 2, 3]
    assert slab.strip_of(6).strip.first == slab.strip_of(7).strip.first == 6


def test_each_step_of_a_rollout_has_its_own_actions() -> None:
    """The first buffer is what it begins with; a strip without actions has those at home."""
    slab = with_strips(SMALL, [(1, 0), (4, 3)])
    actions_for(slab, 0)[0][...] = 2
    assert actions_for(slab, 1)[0].tolist() == [2] * 6
    for step in range(3):
        actions_for(slab, 3 + step)[0][...] = step
    assert SMALL.strip_arrays(slab.strip_of(2).memory, 4, 3).actions[0][:, 0].tolist() == [0, 1, 2]
    assert actions_for(slab, 0)[0].tolist() == [2] * 6


def test_allocate_and_attach_show_the_same_memory(slab_fd: int) -> None:
    """What one mapping writes, the other reads; also once the descriptor is closed for both."""
    mine = Slab.allocate(SMALL, slab_fd)
    theirs = Slab.attach(SMALL, slab_fd)
    assert os.fstat(slab_fd).st_size == SMALL.nbytes
    theirs.buffer(0).rows(slice(2, 4)).observations[0][...] = 0.5
    actions_for(mine, 0)[0][...] = np.arange(6)
    assert mine.buffer(0).observations[0].tolist() == [[0.0] * 4] * 2 + [[0.5] * 4] * 2 + [[0.0] * 4] * 2
    assert actions_for(theirs, 0)[0].tolist() == list(range(6))


def test_a_strip_behind_the_others_shows_the_same_memory(slab_fd: int) -> None:
    """Reserved by one side, mapped by both by its offset; what was there before stays."""
    mine = Slab.allocate(SMALL, slab_fd)
    mine.buffer(0).rewards[...] = 3
    theirs = Slab.attach(SMALL, slab_fd)
    nbytes, offset = SMALL.strip_nbytes(3, 2), mmap.ALLOCATIONGRANULARITY * 4
    strip = Strip(1, 3, 2, offset)
    reserve_memory(slab_fd, nbytes, offset)
    mine.add(strip, mapped(slab_fd, nbytes, offset))
    theirs.attach_strip(strip, slab_fd)
    theirs.buffer(3).observations[0][...] = 0.25
    assert mine.buffer(3).observations[0].tolist() == [[0.25] * 4] * 6
    assert not mine.buffer(2).observations[0].any()
    assert theirs.buffer(0).rewards.tolist() == [3.0] * 6


def test_above_4_gib_every_offset_is_of_64_bits(slab_fd: int) -> None:
    """A strip that begins beyond, and is itself larger; of a file with holes, so that it takes no memory."""
    geometry = Geometry(4, Layout(spaces.Box(0, 255, (1 << 20,), np.uint8)), Layout(spaces.Discrete(2)))
    strip = Strip(7, 1100, 1099, 5 << 30)
    os.ftruncate(slab_fd, strip.offset + geometry.strip_nbytes(strip.num_buffers, strip.num_actions))
    mine, theirs = Slab.attach(geometry, slab_fd), Slab.attach(geometry, slab_fd)
    for slab in (mine, theirs):
        slab.attach_strip(strip, slab_fd)
    assert mine.strip_of(7).memory.nbytes > 1 << 32
    last = 7 + 1099
    theirs.buffer(last).observations[0][3, -3:] = 9
    theirs.buffer(last).truncations[3] = True
    actions_for(mine, last)[0][3] = 1
    assert mine.buffer(last).observations[0][3, -4:].tolist() == [0, 9, 9, 9]
    assert mine.buffer(last).truncations.tolist() == [False, False, False, True]
    assert actions_for(theirs, last)[0].tolist() == [0, 0, 0, 1]
    assert not mine.buffer(last - 1).observations[0][3, -4:].any()


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
    geometry = Geometry(num_envs, Layout(spaces.Box(0, 1, (4,))), Layout(spaces.Discrete(2)))
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
    geometry = Geometry(1 << 54, Layout(spaces.Box(0, 1, (4,))), Layout(spaces.Discrete(2)))
    with pytest.raises(SlabMemoryError, match="no memory for the"):
        Slab.private(geometry)


AVAILABLE: dict[str, tuple[dict[str, str], int]] = {
    "nothing is known": ({}, sys.maxsize),
    "the machine's": ({"proc/meminfo": "MemTotal: 99 kB\nMemAvailable: 5 kB\n"}, 5 * 1024),
    "of a container": ({"sys/fs/cgroup/memory.max": "900\n", "sys/fs/cgroup/memory.current": "300\n"}, 600),
    "no limit": ({"sys/fs/cgroup/memory.max": "max\n", "sys/fs/cgroup/memory.current": "300\n"}, sys.maxsize),
    "version 2, of a job": (
        {
            "proc/meminfo": "MemAvailable: 5 kB\n",
            "proc/self/cgroup": "0::/system.slice/slurm/job_1/step_0\n",
            "sys/fs/cgroup/system.slice/slurm/job_1/memory.max": "900",
            "sys/fs/cgroup/system.slice/slurm/job_1/memory.current": "300",
            "sys/fs/cgroup/system.slice/slurm/job_1/step_0/memory.max": "max",
        },
        600,
    ),
    "version 1, of a job": (
        {
            "proc/self/cgroup": "4:memory:/job\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "5000",
            "sys/fs/cgroup/memory/job/memory.limit_in_bytes": "900",
            "sys/fs/cgroup/memory/job/memory.usage_in_bytes": "300",
        },
        600,
    ),
    "version 2, full of files' pages": (
        {
            "sys/fs/cgroup/memory.max": "900",
            "sys/fs/cgroup/memory.current": "899",
            "sys/fs/cgroup/memory.stat": "anon 99\ninactive_anon 99\nactive_file 300\ninactive_file 400\n",
        },
        701,
    ),
    "version 1, full of files' pages": (
        {
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "900",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "899",
            "sys/fs/cgroup/memory/memory.stat": (
                "cache 9\nactive_file 1\ninactive_file 2\ntotal_active_file 30\ntotal_inactive_file 40\n"
            ),
        },
        71,
    ),
}


@pytest.mark.parametrize("where", AVAILABLE)
def test_what_is_available(where: str, tmp_path: Path) -> None:
    """The least that the machine and each cgroup above this process leave."""
    files, nbytes = AVAILABLE[where]
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert slab_module._available_nbytes(tmp_path) == nbytes
