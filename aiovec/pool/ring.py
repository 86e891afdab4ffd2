"""Who writes into which buffer, and when a lent one comes back.

The owner of the buffers. A whole-batch call takes a buffer from the ring; its observations are then lent
without a copy, and the buffer comes back when the last array or tensor over it is gone. When all are lent,
calls use the home buffer, which is copied out, while the ring grows: nobody waits, and no two batches share memory.
A rollout takes a strip of buffers in the same way.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from aiovec.exchange.slab import Buffer, Slab, Strip, StripArrays

__all__ = ["HOME", "LENT_FROM_NBYTES", "Lease", "Ring", "RolloutStrips"]

HOME = 0

# Observations of a batch that are larger than this are lent rather than copied. Measured on 2 cores: a loan
# costs some 4 µs, a copy of 64 KiB as much, and a copy of 800 KiB with its page faults 100 µs and more.
LENT_FROM_NBYTES = 1 << 16

_POISON = 0xFF  # floats are NaN then, integers -1 or their largest
_EVERY_ROW = slice(None)


class Ring:
    """The buffers of single batches.

    Args:
        slab: The memory.
        max_buffers: How many to lend at most; 0 for none.
        ask_for_more: Called when all are lent, and more are allowed; answered by `add`, or by `give_up_growing`.
        poisons: Whether what comes back is overwritten, to find code that looks at what it has let go of.
    """

    def __init__(self, slab: Slab, max_buffers: int, ask_for_more: Callable[[], None], poisons: bool = False) -> None:
        self._slab = slab
        self._num_buffers = 0
        self._max_buffers = max_buffers
        self._ask_for_more = ask_for_more
        self._has_asked = False
        self._free = deque[int]()  # a deque: loans end in whichever thread drops the last array
        self._poisons = poisons

    def __repr__(self) -> str:
        return f"<Ring free={len(self._free)} of {self._num_buffers}>"

    def add(self, buffer: int) -> None:
        """Another buffer, in a strip of its own."""
        self._has_asked = False
        self._num_buffers += 1
        self._free.append(buffer)

    def give_up_growing(self) -> None:
        """There is no memory for more."""
        self._max_buffers = self._num_buffers

    def take(self) -> int:
        """A buffer for a whole-batch call: a free one of the ring, else home."""
        # The one that came back last: it is still in the CPU's caches, which is worth 100 µs for 8 Atari frames.
        if self._free:
            return self._free.pop()
        if self._num_buffers < self._max_buffers and not self._has_asked:
            self._has_asked = True
            self._ask_for_more()
        if self._poisons:  # with `copy=False` it was lent until now
            for array in self._slab.buffer(HOME).observations:
                array.view(np.uint8)[...] = _POISON
        return HOME

    def home(self, rows: slice = _EVERY_ROW) -> Buffer:
        """A copy of what the home buffer holds."""
        home = self._slab.buffer(HOME).rows(rows)
        observations = [array.copy() for array in home.observations]
        return Buffer(observations, home.rewards.copy(), home.terminations.copy(), home.truncations.copy())

    def give_back(self, buffer: int) -> None:
        """A buffer of a call whose answer nobody will read; those of rollouts come back by themselves."""
        if buffer != HOME and not self._slab.strip_of(buffer).strip.num_actions:
            self._free.append(buffer)

    def lend(self, buffer: int) -> list[npt.NDArray[Any]]:
        """The observations of a buffer; it comes back by itself when nobody holds them any more."""
        geometry = self._slab.geometry
        memory = self._slab.strip_of(buffer).memory
        loan = _Loan(memory, partial(self._free.append, buffer), self._poisons)
        return geometry.observations.arrays(np.asarray(loan), geometry.num_envs)


class Lease(NamedTuple):
    """A strip that is a rollout's, until nothing holds this lease nor, if they are lent, any of its arrays.

    Attributes:
        strip: Which.
        arrays: Over its memory.
        is_home: Not lent: whoever is to keep anything of it needs a copy.
        loan: What brings it back.
    """

    strip: Strip
    arrays: StripArrays
    is_home: bool
    loan: Any


class RolloutStrips:
    """The strips of rollouts.

    Args:
        slab: The memory.
        max_strips: How many to lend at most; 0 for none. When all are lent, one more is home: never lent.
        poisons: See `Ring`.
    """

    def __init__(self, slab: Slab, max_strips: int, poisons: bool = False) -> None:
        self._slab = slab
        self._max_strips = max_strips
        self._strips: list[Strip] = []
        self._free = deque[Strip]()
        self._poisons = poisons

    def __repr__(self) -> str:
        return f"<RolloutStrips free={len(self._free)} of {len(self._strips)}>"

    def add(self, strip: Strip) -> None:
        """Another strip."""
        self._strips.append(strip)
        self._free.append(strip)

    def take(self, num_steps: int) -> Lease | None:
        """A free strip for so many steps, or for more; `None`: another one must be added."""
        fitting = [strip for strip in self._free.copy() if strip.num_actions >= num_steps]
        if not fitting:
            return None
        strip = min(reversed(fitting), key=lambda strip: strip.num_actions)
        self._free.remove(strip)
        num_strips = sum(strip.num_actions >= num_steps for strip in self._strips)
        is_home = len(fitting) == 1 and num_strips > self._max_strips
        memory = self._slab.strip_of(strip.first).memory
        loan = _Loan(memory, partial(self._free.append, strip), self._poisons and not is_home)
        if not is_home:
            memory = np.asarray(loan)
        elif self._poisons:  # with `copy=False` it was lent until now
            memory[:] = _POISON
        arrays = self._slab.geometry.strip_arrays(memory, strip.num_buffers, strip.num_actions)
        return Lease(strip, arrays, is_home, loan)


class _Loan:
    """Lives as long as any array over what is lent: numpy keeps it as the base of all views.

    It holds its own piece of memory and no other: what a user keeps after the end must not keep the whole slab.
    """

    def __init__(self, memory: npt.NDArray[np.uint8], give_back: Callable[[], None], poisons: bool) -> None:
        self.__array_interface__ = memory.__array_interface__
        self._memory = memory  # keeps the mapping, also after close
        self._give_back = give_back
        self._poisons = poisons

    def __del__(self) -> None:
        if self._poisons:
            self._memory[:] = _POISON
        self._give_back()
