"""What a vector does to its surroundings: how long it blocks the event loop, and what it leaves behind."""

from __future__ import annotations

import asyncio
import contextlib
import time
from pathlib import Path
from types import TracebackType
from typing import Self

__all__ = ["Heartbeat", "held_by_process"]

_BEAT_SECONDS = 0.005
_OWN_TASKS = Path("/proc/self/task")  # Linux has it


class Heartbeat:
    """Beats on the event loop as long as it is entered, and notes its longest gap.

    What threads of this process waited for a CPU of a loaded machine is taken off a gap (on Linux): it is nobody's fault.

    Args:
        bound: Gaps below so many seconds are not looked at closely.
        to_the_end: Whether the time since the last beat counts where it is left: not where the loop stands still before
            that, as between a test and the end of its fixtures.
    """

    def __init__(self, bound: float, *, to_the_end: bool = True) -> None:
        self.longest_gap: float = 0.0
        self._to_the_end = to_the_end
        self._bound = bound
        self._last = self._without_cpu = 0.0
        self._task: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<Heartbeat longest_gap={self.longest_gap:.3f} s>"

    async def __aenter__(self) -> Self:
        self._last, self._without_cpu = time.perf_counter(), _seconds_without_cpu()
        self._task = asyncio.create_task(self._beat(), name="heartbeat of a check")
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._task is not None  # noqa: S101  it was entered
        if self._to_the_end:
            self._note()  # what blocked the loop up to here
        self._task.cancel()
        await asyncio.wait([self._task])

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(_BEAT_SECONDS)
            self._note()

    def _note(self) -> None:
        gap, without_cpu = time.perf_counter() - self._last, _seconds_without_cpu()
        if gap > self._bound:
            self.longest_gap = max(self.longest_gap, gap - max(without_cpu - self._without_cpu, 0.0))
        self._last, self._without_cpu = time.perf_counter(), without_cpu


def _seconds_without_cpu() -> float:
    """How long the threads of this process have waited for a CPU so far: the loop's own, and who held Python's lock."""
    nanoseconds = 0
    with contextlib.suppress(OSError):  # no such folder here, or no descriptor left to look at it
        for task in _OWN_TASKS.iterdir():
            with contextlib.suppress(OSError):  # a thread that just ended
                nanoseconds += int((task / "schedstat").read_text().split()[1])
    return nanoseconds / 1e9


def held_by_process() -> dict[str, set[str]]:
    """What this process has of its system, by kind: descriptors, children, and the whole system's shared memory.

    Returns:
        Names that two calls can be compared by; nothing where the system has no /proc.
    """
    if not _OWN_TASKS.is_dir():
        return {}
    descriptors: set[str] = set()
    for fd in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the descriptor of the listing itself
            descriptors.add(f"{fd.name}: {fd.readlink()}")
    children: set[str] = set()
    for task in _OWN_TASKS.iterdir():
        with contextlib.suppress(FileNotFoundError):  # a thread that just ended
            children |= {f"pid {pid}" for pid in (task / "children").read_text().split()}
    shared_memory = {file.name for file in Path("/dev/shm").iterdir()}  # noqa: S108  it is only read
    return {"descriptors": descriptors, "children": children, "shared memory": shared_memory}
