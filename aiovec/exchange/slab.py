"""The slab: the memory that parent and workers share, and where everything lies in it.

It is made of *strips*. A strip is reserved and mapped as a whole, and holds buffers end to end, array by array. A
*buffer* is what one batch call writes: observations, rewards, terminations, truncations, each an array over all envs,
of which every worker has its contiguous rows. So in a strip of many buffers each of these is one array
`[buffers, envs, …]`, which is what a rollout returns. Buffers are numbered through all strips.

Buffer 0 is *home*: its rows are copied out. Behind it, in the same piece of memory, lies what each worker has to say
beside the rows. All other strips are added later, one behind the other, and none is ever given back: strips of one
buffer, from which large batches are lent without a copy, and strips of as many as a rollout has steps.

On Linux the memory is a `memfd`: no name, no limit by `/dev/shm`, gone with the last process. Elsewhere it
is an unlinked temporary file. It is reserved by `posix_fallocate`, since with a sparse file the lack of
memory shows only as a SIGBUS later.
"""

from __future__ import annotations

import bisect
import contextlib
import mmap
import os
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from aiovec.errors import SlabMemoryError
from aiovec.exchange.answer_slots import AnswerSlots, answer_slots_nbytes
from aiovec.exchange.cgroups import memory_limit
from aiovec.exchange.layout import Layout, align
from aiovec.exchange.reply_area import ReplyArea, reply_area_nbytes
from aiovec.exchange.tally import NUM_TALLIES

__all__ = [
    "Buffer",
    "Geometry",
    "PlacedStrip",
    "Slab",
    "Strip",
    "StripArrays",
    "create_memory_file",
    "map_memory",
    "mapped",
    "private_memory",
    "reserve_memory",
]


# Compared by identity: a `deque` of them is searched while loans end in other threads or in the collector, and a comparison
# in Python would let them in between.
@dataclass(frozen=True, eq=False)
class Strip:
    """Buffers end to end.

    Attributes:
        first: The number of the first of them.
        num_buffers: How many.
        num_actions: For how many batches of actions there is room beside them: none where workers read them at home.
        offset: Where it begins in the memory file, in bytes.
    """

    first: int
    num_buffers: int
    num_actions: int = 0
    offset: int = 0


class StripArrays(NamedTuple):
    """The arrays of a strip.

    Attributes:
        observations: For each leaf of fixed size an array `[buffers, envs, *leaf.shape]`.
        rewards: `[buffers, envs]`, float64.
        terminations: `[buffers, envs]`, bool.
        truncations: `[buffers, envs]`, bool.
        actions: For each leaf of fixed size an array `[num_actions, envs, *leaf.shape]`.
    """

    observations: list[npt.NDArray[Any]]
    rewards: npt.NDArray[np.float64]
    terminations: npt.NDArray[np.bool_]
    truncations: npt.NDArray[np.bool_]
    actions: list[npt.NDArray[Any]]

    def buffer(self, index: int) -> Buffer:
        """One of the buffers, without a copy."""
        return Buffer(
            [array[index] for array in self.observations],
            self.rewards[index],
            self.terminations[index],
            self.truncations[index],
        )


class PlacedStrip(NamedTuple):
    """A strip of the slab.

    Attributes:
        strip: Which.
        arrays: Over its memory.
        memory: All of it, as bytes.
    """

    strip: Strip
    arrays: StripArrays
    memory: npt.NDArray[np.uint8]


HOME_STRIP = Strip(first=0, num_buffers=1, num_actions=1)


@dataclass(frozen=True)
class Geometry:
    """Where everything lies in a slab; a pure function of the spaces and the number of envs.

    Attributes:
        num_envs: How many rows each array has.
        observations: Layout of one env's observation.
        actions: Layout of one env's action.
        num_workers: Who has reply areas; none, and no answer slots either, where no memory is shared.
        nbytes: Of what is there from the start.
    """

    num_envs: int
    observations: Layout
    actions: Layout
    num_workers: int = 0
    replies_offset: int = field(init=False)
    reply_area_nbytes: int = field(init=False)
    slots_offset: int = field(init=False)
    nbytes: int = field(init=False)

    def __post_init__(self) -> None:
        set_ = object.__setattr__  # the dataclass is frozen for everyone else
        set_(self, "replies_offset", self.strip_nbytes(HOME_STRIP.num_buffers, HOME_STRIP.num_actions))
        rows_of_a_worker = -(-self.num_envs // self.num_workers) if self.num_workers else 0
        set_(self, "reply_area_nbytes", reply_area_nbytes(rows_of_a_worker))
        num_areas = self.num_workers * NUM_TALLIES
        set_(self, "slots_offset", self.replies_offset + num_areas * self.reply_area_nbytes)
        slots_nbytes = answer_slots_nbytes(self.num_envs) if self.num_workers else 0
        set_(self, "nbytes", self.slots_offset + slots_nbytes)

    def strip_nbytes(self, num_buffers: int, num_actions: int) -> int:
        """How much a strip takes."""
        rows = num_buffers * self.num_envs
        outcomes = align(8 * rows) + 2 * align(rows)
        return self.observations.nbytes(rows) + outcomes + self.actions.nbytes(num_actions * self.num_envs)

    def strip_arrays(self, memory: npt.NDArray[np.uint8], num_buffers: int, num_actions: int) -> StripArrays:
        """The arrays of a strip over its memory, without a copy."""
        shape = (num_buffers, self.num_envs)
        rows = num_buffers * self.num_envs
        rewards = self.observations.nbytes(rows)
        terminations = rewards + align(8 * rows)
        truncations = terminations + align(rows)
        return StripArrays(
            self.observations.arrays(memory, *shape),
            memory[rewards : rewards + 8 * rows].view(np.float64).reshape(shape),
            memory[terminations : terminations + rows].view(np.bool_).reshape(shape),
            memory[truncations : truncations + rows].view(np.bool_).reshape(shape),
            self.actions.arrays(memory[truncations + align(rows) :], num_actions, self.num_envs),
        )

    def reply_area(self, memory: npt.NDArray[np.uint8], worker_index: int, tally: int) -> ReplyArea:
        """Where one worker leaves its replies to what is answered by one of the tallies."""
        start = self.replies_offset + (worker_index * NUM_TALLIES + tally) * self.reply_area_nbytes
        return ReplyArea(memory[start : start + self.reply_area_nbytes])

    def answer_slots(self, memory: npt.NDArray[np.uint8]) -> AnswerSlots:
        """Where the answers of sent envs wait."""
        return AnswerSlots(memory[self.slots_offset : self.nbytes], self.num_envs)


@dataclass(frozen=True)
class Buffer:
    """The arrays of one buffer, or of a worker's rows of it.

    Attributes:
        observations: For each leaf of fixed size an array `[rows, *leaf.shape]`.
        rewards: `[rows]`, float64.
        terminations: `[rows]`, bool.
        truncations: `[rows]`, bool.
    """

    observations: list[npt.NDArray[Any]]
    rewards: npt.NDArray[np.float64]
    terminations: npt.NDArray[np.bool_]
    truncations: npt.NDArray[np.bool_]

    def rows(self, rows: slice) -> Buffer:
        """The rows of one worker, without a copy."""
        return Buffer(
            [array[rows] for array in self.observations],
            self.rewards[rows],
            self.terminations[rows],
            self.truncations[rows],
        )

    def arrays(self) -> list[npt.NDArray[Any]]:
        """All of them, in one order."""
        return [*self.observations, self.rewards, self.terminations, self.truncations]


def create_memory_file(name: str = "aiovec-slab") -> int:
    """An empty file without a name, to be inherited by workers before its size is known.

    Args:
        name: As it shows in ``/proc``.

    Returns:
        A descriptor that the caller owns.
    """
    if hasattr(os, "memfd_create"):
        return os.memfd_create(name, os.MFD_CLOEXEC)
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def map_memory(fd: int, nbytes: int, offset: int = 0) -> mmap.mmap:
    """A piece of a file as shared memory; the mapping does not need the descriptor afterwards."""
    if sys.version_info >= (3, 13):
        return mmap.mmap(fd, nbytes, offset=offset, trackfd=False)
    return mmap.mmap(fd, nbytes, offset=offset)


def reserve_memory(fd: int, nbytes: int, offset: int = 0) -> None:
    """Reserves a piece of a file behind all that was reserved before. Blocks for large ones: call it in a thread.

    Raises:
        SlabMemoryError: The system has not that much; the file ends where it did before.
    """
    _check_available(nbytes)
    size = os.fstat(fd).st_size
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(fd, offset, nbytes)
        else:
            os.ftruncate(fd, offset + nbytes)
    except (OSError, ValueError, OverflowError) as error:
        os.ftruncate(fd, size)
        raise SlabMemoryError(nbytes, str(error)) from error


def _check_available(nbytes: int) -> None:
    if nbytes > (available := _available_nbytes()):
        raise SlabMemoryError(nbytes, f"{available:,} bytes are available")


def _available_nbytes(root: Path = Path("/")) -> int:
    """What this process may still use; without a limit that could be read, more than anyone asks for.

    Asked before the memory is reserved: a memfd has no size of its own, so too much of it would end in the
    kernel's out-of-memory killer rather than in an error.

    Args:
        root: Where the system's files are.
    """
    available = sys.maxsize
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = (root / "proc/meminfo").read_text().splitlines()
        available = int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]) * 1024
    if (of_group := memory_limit(root)) is not None:
        limit, used = of_group
        available = min(available, limit - used)
    return available


class Slab:
    """The memory of a vector in one process.

    Args:
        geometry: What lies where.
        memory: What is there from the start, as bytes.
    """

    def __init__(self, geometry: Geometry, memory: npt.NDArray[np.uint8]) -> None:
        self.geometry = geometry
        self.memory = memory
        self._first: list[int] = []  # the number of each strip's first buffer
        self._strips: list[PlacedStrip] = []
        self._buffers: dict[int, Buffer] = {}
        self.add(HOME_STRIP, memory)

    def __repr__(self) -> str:
        return f"<Slab nbytes={self.geometry.nbytes} strips={len(self._strips)}>"

    @classmethod
    def private(cls, geometry: Geometry) -> Slab:
        """Memory of this process alone: for `num_workers=0` and `shared_memory=False`.

        Raises:
            SlabMemoryError: The system has not that much.
        """
        return cls(geometry, private_memory(geometry.nbytes))

    @classmethod
    def allocate(cls, geometry: Geometry, fd: int) -> Slab:
        """Reserves the memory behind `fd` and maps it. Blocks for large slabs: call it in a thread.

        Raises:
            SlabMemoryError: The system has not that much; the file is empty again.
        """
        reserve_memory(fd, geometry.nbytes)
        return cls.attach(geometry, fd)

    @classmethod
    def attach(cls, geometry: Geometry, fd: int) -> Slab:
        """Maps memory that was reserved. The mapping lives as long as an array over it."""
        return cls(geometry, mapped(fd, geometry.nbytes))

    def attach_strip(self, strip: Strip, fd: int) -> None:
        """Maps another strip, and adds it."""
        nbytes = self.geometry.strip_nbytes(strip.num_buffers, strip.num_actions)
        self.add(strip, mapped(fd, nbytes, strip.offset))

    def add(self, strip: Strip, memory: npt.NDArray[np.uint8]) -> None:
        """Adds a strip behind the others, over its memory."""
        self._first.append(strip.first)
        arrays = self.geometry.strip_arrays(memory, strip.num_buffers, strip.num_actions)
        self._strips.append(PlacedStrip(strip, arrays, memory))

    @property
    def num_buffers(self) -> int:
        """How many there are, in all strips: the number of the next one."""
        strip = self._strips[-1].strip
        return strip.first + strip.num_buffers

    def buffer(self, number: int) -> Buffer:
        """One buffer over all envs."""
        buffer = self._buffers.get(number)
        if buffer is None:
            strip, arrays, _ = self.strip_of(number)
            buffer = self._buffers[number] = arrays.buffer(number - strip.first)
        return buffer

    def actions_for(self, number: int) -> tuple[list[npt.NDArray[Any]], int]:
        """Where the actions are for the call that writes a buffer.

        Returns:
            For each leaf of fixed size an array `[batches, envs, *leaf.shape]`, and which batch.
        """
        strip, arrays, _ = self.strip_of(number)
        if not strip.num_actions:
            strip, arrays, _ = self._strips[0]
        # The first buffer of a rollout is what it begins with: no step writes it.
        index = max(number - strip.first - 1, 0) if strip.num_buffers > 1 else 0
        return arrays.actions, index

    def strip_of(self, number: int) -> PlacedStrip:
        """The strip that a buffer is in."""
        return self._strips[bisect.bisect_right(self._first, number) - 1]

    def reply_area(self, worker_index: int, tally: int = 0) -> ReplyArea:
        """Where one worker leaves its replies to what is answered by one of the tallies."""
        return self.geometry.reply_area(self.memory, worker_index, tally)

    def answer_slots(self) -> AnswerSlots:
        """Where the answers of sent envs wait; only where memory is shared."""
        return self.geometry.answer_slots(self.memory)


def private_memory(nbytes: int) -> npt.NDArray[np.uint8]:
    """Memory of this process alone; raises `SlabMemoryError`."""
    _check_available(nbytes)
    return np.zeros(nbytes, np.uint8)


def mapped(fd: int, nbytes: int, offset: int = 0) -> npt.NDArray[np.uint8]:
    """Shared memory that was reserved, as an array of bytes.

    Raises:
        SlabMemoryError: It does not fit into this process.
    """
    try:
        return np.frombuffer(map_memory(fd, nbytes, offset), np.uint8)
    except (OSError, ValueError, OverflowError) as error:
        raise SlabMemoryError(nbytes, str(error)) from error
