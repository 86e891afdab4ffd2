"""Where the answers of envs that were sent an action wait for the parent, without waking it.

A slot for each env. Beside it stands when the env ended, since the order of completion runs through all workers, and the
number of the request, which is written last and read first: in order on x86, and elsewhere with thousands of instructions
of Python between, more than any CPU reorders. What is too large for a slot goes by the socket.
"""

from __future__ import annotations

import time

import numpy as np
import numpy.typing as npt

from aiovec.exchange.layout import align

__all__ = ["AnswerSlots", "answer_slots_nbytes"]

_SLOT_NBYTES = 1 << 9  # some thirty scalars in an info


def answer_slots_nbytes(num_envs: int) -> int:
    """How much memory the slots of so many envs take."""
    return 3 * align(8 * num_envs) + num_envs * _SLOT_NBYTES


class AnswerSlots:
    """The slots of all envs of a vector.

    Args:
        memory: The shared bytes.
        num_envs: How many envs.

    Attributes:
        seqs: `[num_envs]`, uint64: which request the slot answers.
        ended: `[num_envs]`, float64: when the env ended, in seconds of the clock that all processes share.
    """

    def __init__(self, memory: npt.NDArray[np.uint8], num_envs: int) -> None:
        column = align(8 * num_envs)
        self.seqs: npt.NDArray[np.uint64] = memory[: 8 * num_envs].view(np.uint64)
        self.ended: npt.NDArray[np.float64] = memory[column : column + 8 * num_envs].view(np.float64)
        self._nbytes = memory[2 * column : 2 * column + 8 * num_envs].view(np.uint64)
        self._answers = memoryview(memory[3 * column :])  # type: ignore[arg-type]  # an array has the buffer protocol

    def leave(self, env_index: int, seq: int, answer: bytes) -> bool:
        """Leaves an answer, empty where there is nothing to say; false if it is too large and must be sent."""
        nbytes = len(answer)
        if nbytes > _SLOT_NBYTES:
            return False
        if nbytes:
            start = env_index * _SLOT_NBYTES
            self._answers[start : start + nbytes] = answer
        self._nbytes[env_index] = nbytes
        self.ended[env_index] = time.monotonic()
        self.seqs[env_index] = seq
        return True

    def take(self, env_index: int) -> bytes:
        """A copy of the answer in a slot."""
        start = env_index * _SLOT_NBYTES
        return bytes(self._answers[start : start + int(self._nbytes[env_index])])
