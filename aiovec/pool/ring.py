"""Who writes into which buffer, and when a lent one comes back.

The owner of the buffers. A whole-batch call takes a buffer from the ring; its observations are then lent
without a copy, and the buffer comes back when the last array or tensor over it is gone. When all are lent,
calls use the home buffer, which is copied out: nobody waits, and no two batches share memory.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from aiovec.exchange.slab import Slab

__all__ = ["HOME", "LENT_FROM_NBYTES", "Ring"]

HOME = 0

# Observations of a batch that are larger than this are lent rather than copied. Measured on 2 cores: a loan
# costs some 4 µs, a copy of 64 KiB as much, and a copy of 800 KiB with its page faults 100 µs and more.
LENT_FROM_NBYTES = 1 << 16


class Ring:
    """The buffers of one slab.

    Args:
        slab: The memory.
        lend: Whether observations are lent at all.
    """

    def __init__(self, slab: Slab, lend: bool) -> None:
        self._slab = slab
        # A deque: loans end in whichever thread drops the last array.
        self._free = deque(range(1, slab.geometry.num_buffers)) if lend else deque[int]()

    def __repr__(self) -> str:
        return f"<Ring free={len(self._free)} of {self._slab.geometry.num_buffers - 1}>"

    def take(self) -> int:
        """A buffer for a whole-batch call: a free one of the ring, else home."""
        # The one that came back last: it is still in the CPU's caches, which is worth 100 µs for 8 Atari frames.
        return self._free.pop() if self._free else HOME

    def give_back(self, buffer: int) -> None:
        """A buffer that nobody will read."""
        if buffer != HOME:
            self._free.append(buffer)

    def lend(self, buffer: int) -> list[npt.NDArray[Any]]:
        """The observations of a buffer; it comes back by itself when nobody holds them any more."""
        geometry = self._slab.geometry
        start = geometry.actions.nbytes(geometry.num_envs) + buffer * geometry.buffer_nbytes
        loan = _Loan(self._slab.memory[start : start + geometry.buffer_nbytes], buffer, self._free.append)
        return geometry.observations.arrays(np.asarray(loan), geometry.num_envs)


class _Loan:
    """Lives as long as any array over a lent buffer: numpy keeps it as the base of all views."""

    def __init__(self, memory: npt.NDArray[np.uint8], buffer: int, give_back: Callable[[int], None]) -> None:
        self.__array_interface__ = memory.__array_interface__
        self._memory = memory  # keeps the mapping, also after close
        self._buffer = buffer
        self._give_back = give_back

    def __del__(self) -> None:
        self._give_back(self._buffer)
