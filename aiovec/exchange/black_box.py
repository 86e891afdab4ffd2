"""What a worker leaves for the case that it dies or hangs: the env it is in, and its Python stack.

Some pages of shared memory and the file behind them, one for each worker. There the worker writes down, before
it calls an env, which one and what for: one store, some 30 ns; and how long envs take. Behind them `faulthandler`
writes the Python stack: by itself when the process crashes, and on SIGUSR1 when the parent asks, also while an env is
stuck in C and holds the GIL.
"""

from __future__ import annotations

import enum
import faulthandler
import mmap
import os
import signal
from collections.abc import Sequence
from typing import NamedTuple

from aiovec.exchange.slab import create_memory_file, map_memory

__all__ = [
    "IDLE",
    "MOST_THREADS",
    "TIMES_PER_ROW",
    "BlackBox",
    "Doing",
    "OpenBlackBox",
    "Phase",
    "doing_code",
    "doing_in",
    "open_black_box",
    "readable_stack",
]

_PAGE_NBYTES = mmap.PAGESIZE
TIMES_PER_ROW = 4
_STACK_NBYTES = 1 << 16
IDLE = -1
_ROWS = 1 << 32
_NUM_LANES = _PAGE_NBYTES // 16
MOST_THREADS = _NUM_LANES - 2  # the last two are those of async envs


class Phase(enum.IntEnum):
    """What an env is asked for."""

    STEP = 0
    RESET = 1
    BUILD = 2
    CALL = 3
    CLOSE = 4


def doing_code(row: int, phase: Phase) -> int:
    """What the page holds during a call of an env; for `STEP` it is the row itself."""
    return row + _ROWS * phase


class Doing(NamedTuple):
    """The call of an env that a worker is in.

    Attributes:
        row: Which of the worker's envs.
        phase: What it is asked for.
        number: Differs between two calls of the same row and phase.
        lane: In which of the worker's lanes; see `worker.lanes`.
    """

    row: int
    phase: Phase
    number: int = 0
    lane: int = 0


def doing_in(numbers: Sequence[int]) -> list[Doing]:
    """The calls that two integers a lane tell of; see `OpenBlackBox.doing`."""
    return [
        Doing(code % _ROWS, Phase(code // _ROWS), number, lane)
        for lane, (code, number) in enumerate(zip(numbers[::2], numbers[1::2], strict=True))
        if code != IDLE
    ]


class BlackBox:
    """The parent's side; the owner of the file.

    Attributes:
        fd: To be inherited by the worker.
    """

    def __init__(self, num_rows: int) -> None:
        self.fd: int = create_memory_file("aiovec-black-box")
        self._nbytes = _PAGE_NBYTES * (1 + -(-8 * (1 + TIMES_PER_ROW * num_rows) // _PAGE_NBYTES))
        self._num_rows = num_rows
        try:
            os.ftruncate(self.fd, self._nbytes)
            os.lseek(self.fd, 0, os.SEEK_END)  # where the worker's copy of the descriptor goes on writing
            self._memory = memoryview(map_memory(self.fd, self._nbytes))
        except BaseException:
            os.close(self.fd)
            raise
        self._page = self._memory[:_PAGE_NBYTES].cast("q")
        for lane in range(_NUM_LANES):
            self._page[2 * lane] = IDLE

    def __repr__(self) -> str:
        return f"<BlackBox doing={self.doing}>"

    @property
    def doing(self) -> list[Doing]:
        """The calls of envs that the worker is in at this moment, or was in when it ended; mostly one, or none."""
        return doing_in(self._page.tolist())

    @property
    def times(self) -> Sequence[float]:
        """See `OpenBlackBox.times`; a copy."""
        return self._memory[_PAGE_NBYTES:].cast("d")[: 1 + TIMES_PER_ROW * self._num_rows].tolist()

    @property
    def stack_nbytes(self) -> int:
        """How much `faulthandler` has written so far."""
        return os.fstat(self.fd).st_size - self._nbytes

    @property
    def stack(self) -> str:
        """The last Python stack, innermost call first; empty if none was written."""
        return readable_stack(os.pread(self.fd, _STACK_NBYTES, self._nbytes).decode(errors="replace"))

    def close(self) -> None:
        """Closes the file and its mapping."""
        self._page.release()
        self._memory.release()
        os.close(self.fd)


class OpenBlackBox:
    """The worker's side.

    Attributes:
        times: Seconds. First those of whole steps; then of each row: the last one, their sum, how many, and the sum of
            those that belong to no whole step. See `worker.clock`.

    Args:
        memory: What the parent sees.
    """

    def __init__(self, memory: memoryview) -> None:
        self._page = memory[:_PAGE_NBYTES].cast("q")
        self.times: memoryview[float] = memory[_PAGE_NBYTES:].cast("d")

    def doing(self, lane: int) -> memoryview:
        """What a lane writes down; negative numbers count from the last one.

        Two integers: `IDLE`, or the `doing_code` of the env's call that comes next; and a number that rises with each
        call, but for the steps of one request, which differ in their row.
        """
        lane %= _NUM_LANES
        return self._page[2 * lane : 2 * lane + 2]


def open_black_box(fd: int) -> OpenBlackBox:
    """In the worker: has `faulthandler` write into the file."""
    os.set_inheritable(fd, False)
    faulthandler.enable(fd)
    faulthandler.register(signal.SIGUSR1, fd)
    return OpenBlackBox(memoryview(map_memory(fd, os.fstat(fd).st_size)))


def readable_stack(written: str) -> str:
    """What `faulthandler` wrote, without the frames below an env and the threads that run none."""
    titles: list[str] = []
    threads: list[tuple[str, list[str]]] = []
    for block in written.split("\n\n"):
        lines = [line for line in block.splitlines() if not line.startswith("Extension modules:")]
        frames = [line for line in lines if line.startswith("  File ")]
        ours = next((index for index, line in enumerate(frames) if _is_ours(line)), len(frames))
        if not frames:
            titles += lines[:1]  # "Fatal Python error: Segmentation fault"
        elif ours:
            threads.append((next((line for line in lines if not line.startswith("  ")), ""), frames[:ours]))
    headings = len(threads) > 1
    return "\n".join([*titles, *("\n".join([heading] * headings + frames) for heading, frames in threads)])


def _is_ours(frame: str) -> bool:
    return "/aiovec/worker/" in frame or "/aiovec/exchange/" in frame
