"""The slab's file and what is reserved in it: the owner of the descriptor, and of the slab's growth.

The slab only grows: each strip is reserved and mapped in a thread, behind those before it, and then announced to the
workers. They read that before any request that is about it, so nobody waits for them.
"""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from aiovec.errors import ClosedEnvironmentError, SlabMemoryError
from aiovec.exchange.slab import Geometry, Slab, Strip, create_memory_file, mapped, private_memory, reserve_memory
from aiovec.pool.threads import in_thread

__all__ = ["SlabMemory"]

_LARGE_NBYTES = 1 << 26


class SlabMemory:
    """What a vector has reserved.

    Args:
        shared: Whether workers share it; else it is this process's alone.
        announce: Called with each strip that is added.
    """

    def __init__(self, shared: bool, announce: Callable[[Strip], None]) -> None:
        self.fd: int = -1  # workers inherit it, whether they use it or not
        self._shared = shared
        self.strips: list[Strip] = []  # all but home
        self._announce = announce
        self._slab: Slab | None = None
        self._end = 0
        self._growing: set[asyncio.Task[Strip]] = set()
        self._turn = asyncio.Lock()  # strips lie one behind the other
        self._is_closed = False

    def __repr__(self) -> str:
        return f"<SlabMemory nbytes={self._end} strips={len(self.strips)}>"

    def open(self) -> None:
        """Makes the file, still empty, for the workers to inherit; without workers there is none."""
        self.fd = create_memory_file()

    async def allocate(self, geometry: Geometry) -> Slab:
        """Reserves what is there from the start, now that its size is known.

        Raises:
            SlabMemoryError: The system has not that much.
        """
        if self._shared and self.fd >= 0:
            self._slab = await in_thread(Slab.allocate, geometry, self.fd)
        else:
            self._slab = Slab.private(geometry)
        self._end = _aligned(geometry.nbytes)
        return self._slab

    async def grow(self, num_buffers: int, num_actions: int) -> Strip:
        """Adds a strip; one that is begun is finished, whatever becomes of who asked for it.

        Raises:
            SlabMemoryError: The system has not that much; all is as it was.
            ClosedEnvironmentError: The vector was closed meanwhile.
        """
        task = asyncio.get_running_loop().create_task(self._grow(num_buffers, num_actions), name="aiovec slab grows")
        self._growing.add(task)
        task.add_done_callback(self._has_grown)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            own = asyncio.current_task()
            if task.cancelled() and own is not None and not own.cancelling():  # by `close`, and not who waits for it
                raise ClosedEnvironmentError("rollout()") from None
            raise

    async def _grow(self, num_buffers: int, num_actions: int) -> Strip:
        async with self._turn:
            slab = self._slab
            if slab is None or self._is_closed:
                raise ClosedEnvironmentError("rollout()")
            nbytes = slab.geometry.strip_nbytes(num_buffers, num_actions)
            strip = Strip(slab.num_buffers, num_buffers, num_actions, self._end)
            # A copy of the descriptor, since the vector may be closed meanwhile, and the number used anew. Whoever takes
            # it out of the list closes it: the thread, or we where there never was one.
            try:
                fds = [os.dup(self.fd)] if self._shared and self.fd >= 0 else []
            except OSError as error:
                raise SlabMemoryError(nbytes, str(error)) from error
            try:
                if fds:
                    memory = await in_thread(_reserved, fds, nbytes, strip.offset)
                else:
                    memory = await in_thread(private_memory, nbytes)
            finally:
                with contextlib.suppress(IndexError):
                    os.close(fds.pop())
            if self._is_closed:
                raise ClosedEnvironmentError("rollout()")
            self._end += _aligned(nbytes)
            slab.add(strip, memory)
            self.strips.append(strip)
            self._announce(strip)
            return strip

    def _has_grown(self, task: asyncio.Task[Strip]) -> None:
        self._growing.discard(task)
        if not task.cancelled():
            task.exception()  # who asked for it may be gone

    @property
    def is_large(self) -> bool:
        """Whether it takes long to `forget`: the system frees it page by page."""
        return self._end >= _LARGE_NBYTES

    def forget(self) -> None:
        """Unmaps the memory, but where arrays over it are left; behind `close`."""
        self._slab = None

    def close(self) -> None:
        """Ends what is growing; nobody uses the memory any more."""
        self._is_closed = True
        for task in self._growing:
            with contextlib.suppress(RuntimeError):  # the loop is closed, and the task goes with it
                task.cancel()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _reserved(fds: list[int], nbytes: int, offset: int) -> npt.NDArray[np.uint8]:
    fd = fds.pop()
    try:
        reserve_memory(fd, nbytes, offset)
        return mapped(fd, nbytes, offset)
    finally:
        os.close(fd)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
