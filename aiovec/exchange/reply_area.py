"""Where a worker leaves what it has to say about a step, without waking the parent.

A few KB of the slab for each worker. What does not fit goes by the socket. Written before the worker takes
its token (`exchange.tally`), and read when the last has been taken, so never by both at once. It bears the
number of the step, so that after the death of one worker the parent sees which of the others had ended.
"""

from __future__ import annotations

import struct

import numpy as np
import numpy.typing as npt

from aiovec.exchange.layout import align

__all__ = ["ReplyArea", "reply_area_nbytes"]

_HEADER = struct.Struct("<QQ")  # the reply's nbytes, seq
_ELSEWHERE = (1 << 64) - 1
_BASE_NBYTES = 1 << 12
_NBYTES_PER_ENV = 1 << 8  # some thirty scalars in each info


def reply_area_nbytes(num_rows: int) -> int:
    """How much a worker of so many envs gets."""
    return align(_BASE_NBYTES + _NBYTES_PER_ENV * num_rows)


class ReplyArea:
    """One worker's.

    Args:
        memory: The shared bytes.
    """

    def __init__(self, memory: npt.NDArray[np.uint8]) -> None:
        self._memory = memoryview(memory)  # type: ignore[arg-type]  # a C-contiguous array has the buffer protocol
        self._largest = len(memory) - _HEADER.size

    def leave(self, seq: int, reply: bytes) -> bool:
        """Leaves a reply, empty where there is nothing to say; false if it is too large and must be sent."""
        nbytes = len(reply)
        if nbytes > self._largest:
            _HEADER.pack_into(self._memory, 0, _ELSEWHERE, seq)
            return False
        if nbytes:
            self._memory[_HEADER.size : _HEADER.size + nbytes] = reply
        _HEADER.pack_into(self._memory, 0, nbytes, seq)
        return True

    def take(self, seq: int) -> bytes | None:
        """A copy of the reply to step `seq`; `None` if it is not there: not yet, or sent."""
        nbytes, of = _HEADER.unpack_from(self._memory)
        if of != seq or nbytes == _ELSEWHERE:
            return None
        return bytes(self._memory[_HEADER.size : _HEADER.size + nbytes]) if nbytes else b""
