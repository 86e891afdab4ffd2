"""Where a worker leaves what it has to say about a step, without waking the parent.

A few KB of the slab for each worker. What does not fit goes by the socket. Written before the worker takes
its token (`exchange.tally`), and read when the last has been taken; or after the death of a worker, to see who
had ended. So it bears the number of the step, which is written last and read first.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from aiovec.exchange.layout import align

__all__ = ["ReplyArea", "reply_area_nbytes"]

_HEADER_NBYTES = 16  # the number of the step, and the reply's nbytes: each stored at once
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
        shared = memoryview(memory)  # type: ignore[arg-type]  # an array has the buffer protocol
        self._header = shared[:_HEADER_NBYTES].cast("Q")  # a third of what an array's element costs
        self._reply = shared[_HEADER_NBYTES:]

    def leave(self, seq: int, reply: bytes) -> bool:
        """Leaves a reply, empty where there is nothing to say; false if it is too large and must be sent."""
        nbytes = len(reply)
        fits = nbytes <= len(self._reply)
        if nbytes and fits:
            self._reply[:nbytes] = reply
        self._header[1] = nbytes if fits else _ELSEWHERE
        self._header[0] = seq
        return fits

    def has(self, seq: int) -> bool:
        """Whether the worker has ended step `seq`; from any thread."""
        return bool(self._header[0] == seq)

    def take(self, seq: int) -> bytes | None:
        """A copy of the reply to step `seq`; `None` if it is not there: not yet, or sent."""
        if self._header[0] != seq or (nbytes := self._header[1]) == _ELSEWHERE:
            return None
        return bytes(self._reply[:nbytes]) if nbytes else b""
