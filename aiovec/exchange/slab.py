"""The slab: the one mapping that parent and workers share, and where everything lies in it.

The owner of the memory. The slab holds the actions of all envs, then *buffers*, then what each worker has to
say beside them. A buffer is what one batch
call writes: observations, rewards, terminations, truncations, each an array over all envs, of which every
worker has its contiguous rows. Buffer 0 is *home*: its rows are copied out. Buffers 1, 2, … form the ring
from which large batches are lent without a copy.

On Linux the memory is a `memfd`: no name, no limit by `/dev/shm`, gone with the last process. Elsewhere it
is an unlinked temporary file. It is reserved by `posix_fallocate`, since with a sparse file the lack of
memory shows only as a SIGBUS later.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from aiovec.errors import SlabMemoryError
from aiovec.exchange.answer_slots import AnswerSlots, answer_slots_nbytes
from aiovec.exchange.layout import Layout, align
from aiovec.exchange.reply_area import ReplyArea, reply_area_nbytes

__all__ = ["Buffer", "Geometry", "Slab", "create_memory_file", "map_memory"]


@dataclass(frozen=True)
class Geometry:
    """Where everything lies in a slab; a pure function of the spaces and the number of envs.

    Attributes:
        num_envs: How many rows each array has.
        num_buffers: Home and the ring.
        observations: Layout of one env's observation.
        actions: Layout of one env's action.
        num_workers: How many reply areas; none, and no answer slots either, where no memory is shared.
    """

    num_envs: int
    num_buffers: int
    observations: Layout
    actions: Layout
    num_workers: int = 0
    rewards_offset: int = field(init=False)
    flags_offset: int = field(init=False)
    buffer_nbytes: int = field(init=False)
    replies_offset: int = field(init=False)
    reply_area_nbytes: int = field(init=False)
    slots_offset: int = field(init=False)
    nbytes: int = field(init=False)

    def __post_init__(self) -> None:
        set_ = object.__setattr__  # the dataclass is frozen for everyone else
        set_(self, "rewards_offset", self.observations.nbytes(self.num_envs))
        set_(self, "flags_offset", self.rewards_offset + align(8 * self.num_envs))
        set_(self, "buffer_nbytes", self.flags_offset + 2 * align(self.num_envs))
        actions_nbytes = self.actions.nbytes(self.num_envs)
        set_(self, "replies_offset", actions_nbytes + self.num_buffers * self.buffer_nbytes)
        rows_of_a_worker = -(-self.num_envs // self.num_workers) if self.num_workers else 0
        set_(self, "reply_area_nbytes", reply_area_nbytes(rows_of_a_worker))
        set_(self, "slots_offset", self.replies_offset + self.num_workers * self.reply_area_nbytes)
        slots_nbytes = answer_slots_nbytes(self.num_envs) if self.num_workers else 0
        set_(self, "nbytes", self.slots_offset + slots_nbytes)

    def action_arrays(self, memory: npt.NDArray[np.uint8]) -> list[npt.NDArray[Any]]:
        """The actions of all envs, an array for each leaf of fixed size."""
        return self.actions.arrays(memory, self.num_envs)

    def buffer(self, memory: npt.NDArray[np.uint8], index: int) -> Buffer:
        """The arrays of one buffer over all envs, without a copy."""
        start = self.actions.nbytes(self.num_envs) + index * self.buffer_nbytes
        memory = memory[start : start + self.buffer_nbytes]
        n, flags = self.num_envs, self.flags_offset
        return Buffer(
            self.observations.arrays(memory, n),
            memory[self.rewards_offset : self.rewards_offset + 8 * n].view(np.float64),
            memory[flags : flags + n].view(np.bool_),
            memory[flags + align(n) : flags + align(n) + n].view(np.bool_),
        )

    def reply_area(self, memory: npt.NDArray[np.uint8], worker_index: int) -> ReplyArea:
        """Where one worker leaves its replies."""
        start = self.replies_offset + worker_index * self.reply_area_nbytes
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


def map_memory(fd: int, nbytes: int) -> mmap.mmap:
    """The first bytes of a file as shared memory; the mapping does not need the descriptor afterwards."""
    if sys.version_info >= (3, 13):
        return mmap.mmap(fd, nbytes, trackfd=False)
    return mmap.mmap(fd, nbytes)


def _available_nbytes() -> int:
    """What this process may still use; without a limit that could be read, more than anyone asks for.

    Asked before the memory is reserved: a memfd has no size of its own, so too much of it would end in the
    kernel's out-of-memory killer rather than in an error.
    """
    available = sys.maxsize
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]) * 1024
    with contextlib.suppress(OSError, ValueError):  # cgroup v2, as seen from inside a container
        group = Path("/sys/fs/cgroup")
        limit, used = (group / "memory.max").read_text(), (group / "memory.current").read_text()
        available = min(available, int(limit) - int(used))
    return available


class Slab:
    """The memory of a vector in one process.

    Args:
        geometry: What lies where.
        memory: All of it, as bytes.
    """

    def __init__(self, geometry: Geometry, memory: npt.NDArray[np.uint8]) -> None:
        self.geometry = geometry
        self.memory = memory

    def __repr__(self) -> str:
        return f"<Slab nbytes={self.geometry.nbytes}>"

    @classmethod
    def private(cls, geometry: Geometry) -> Slab:
        """Memory of this process alone: for `num_workers=0` and `shared_memory=False`."""
        if geometry.nbytes > (available := _available_nbytes()):
            raise SlabMemoryError(geometry.nbytes, f"{available:,} bytes are available")
        return cls(geometry, np.zeros(geometry.nbytes, np.uint8))

    @classmethod
    def allocate(cls, geometry: Geometry, fd: int) -> Slab:
        """Reserves the memory behind `fd` and maps it. Blocks for large slabs: call it in a thread.

        Raises:
            SlabMemoryError: The system has not that much; the file is empty again.
        """
        if geometry.nbytes > (available := _available_nbytes()):
            raise SlabMemoryError(geometry.nbytes, f"{available:,} bytes are available")
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(fd, 0, geometry.nbytes)
            else:
                os.ftruncate(fd, geometry.nbytes)
            return cls.attach(geometry, fd)
        except (OSError, ValueError, OverflowError) as error:
            os.ftruncate(fd, 0)
            raise SlabMemoryError(geometry.nbytes, str(error)) from error

    @classmethod
    def attach(cls, geometry: Geometry, fd: int) -> Slab:
        """Maps memory that the other side allocated. The mapping lives as long as an array over it."""
        return cls(geometry, np.frombuffer(map_memory(fd, geometry.nbytes), np.uint8))

    def action_arrays(self) -> list[npt.NDArray[Any]]:
        """The actions of all envs, an array for each leaf of fixed size."""
        return self.geometry.action_arrays(self.memory)

    def buffer(self, index: int) -> Buffer:
        """One buffer over all envs."""
        return self.geometry.buffer(self.memory, index)

    def reply_area(self, worker_index: int) -> ReplyArea:
        """Where one worker leaves its replies."""
        return self.geometry.reply_area(self.memory, worker_index)

    def answer_slots(self) -> AnswerSlots:
        """Where the answers of sent envs wait; only where memory is shared."""
        return self.geometry.answer_slots(self.memory)
