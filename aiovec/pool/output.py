"""What a worker prints, line by line, into the parent's own stdout and stderr.

Through the parent, so that in a notebook it lands in the cell, and so that the end of stderr is at hand when
a worker dies.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import os
import sys

__all__ = ["WorkerOutput"]

_CHUNK_NBYTES = 1 << 16
_TAIL_NBYTES = 4096
_LONGEST_LINE_NBYTES = 1 << 16  # a longer one is cut, so that no worker can fill the parent's memory

# What a pipe holds at most, for whoever may not set more (`fs.pipe-max-size`). Not until nothing is there: what left the
# worker's session may write for ever.
_REST_NBYTES = 1 << 20


class WorkerOutput:
    """The two streams of one worker.

    Args:
        fds: Non-blocking reading ends of its stdout and stderr; whoever opened them closes them.
        label: Put before each line.
    """

    def __init__(self, fds: tuple[int, int], label: str) -> None:
        self._open = dict(zip(fds, ("stdout", "stderr"), strict=True))
        self._partial = dict.fromkeys(fds, b"")
        self._label = label
        self._tail = b""
        self._loop: asyncio.AbstractEventLoop | None = None

    def __repr__(self) -> str:
        return f"<WorkerOutput {self._label!r} open={list(self._open.values())}>"

    @property
    def stderr_tail(self) -> str:
        """The last 4 KiB of stderr."""
        return self._tail.decode(errors="replace")

    def watch(self, loop: asyncio.AbstractEventLoop) -> None:
        """Forwards what comes, as it comes, until `finish`."""
        self._loop = loop
        # Not in our caller's context: by that a Jupyter kernel knows the cell which started us, and would show there what
        # belongs to the cell that runs.
        context = contextvars.Context()
        for fd in self._open:
            context.run(loop.add_reader, fd, self._read, fd)

    def finish(self) -> None:
        """Forwards what is there, up to 1 MiB a stream, and stops; before the descriptors are closed."""
        for fd in list(self._open):
            for _ in range(_REST_NBYTES // _CHUNK_NBYTES):
                if not self._read(fd):
                    break
            if fd in self._open:
                self._forget(fd)

    def _read(self, fd: int) -> bool:
        """Forwards one chunk; false where there is none now."""
        try:
            chunk = os.read(fd, _CHUNK_NBYTES)
        except BlockingIOError:
            return False
        if not chunk:
            self._forget(fd)
            return False
        if self._open[fd] == "stderr":
            self._tail = (self._tail + chunk)[-_TAIL_NBYTES:]
        *lines, rest = (self._partial[fd] + chunk).split(b"\n")
        if len(rest) > _LONGEST_LINE_NBYTES:
            lines.append(rest)
            rest = b""
        self._partial[fd] = rest
        self._print(self._open[fd], lines)
        return True

    def _forget(self, fd: int) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.remove_reader(fd)
        name, rest = self._open.pop(fd), self._partial.pop(fd)
        if rest:
            self._print(name, [rest])

    def _print(self, name: str, lines: list[bytes]) -> None:
        stream = getattr(sys, name, None)
        if stream is None or not lines:  # a program without a terminal has no sys.stdout
            return
        # A worker's life must not depend on our stdout: its end is told and it is reaped, although the encoding has not
        # that letter, the stream is closed, or its reader is gone. A program may put any object there: so any exception.
        with contextlib.suppress(Exception):
            stream.write("".join(f"[{self._label}] {line.decode(errors='replace')}\n" for line in lines))
            stream.flush()
