"""A pipe of tokens, one byte each: the parent puts them there, and each is taken by one worker, in order."""

from __future__ import annotations

import contextlib
import os

__all__ = ["PIPE_NBYTES", "TokenPipe", "take_token"]

PIPE_NBYTES = 1 << 12  # less than any pipe holds


class TokenPipe:
    """The parent's side; it owns both ends of the pipe. Neither side ever waits: the parent's loop must not."""

    def __init__(self) -> None:
        read_fd, write_fd = os.pipe()
        self.worker_fd: int = read_fd
        self._fd = write_fd
        os.set_blocking(self.worker_fd, False)
        os.set_blocking(self._fd, False)

    def put(self, tokens: bytes | bytearray) -> None:
        """Puts some behind those that are there."""
        os.write(self._fd, tokens)

    def take_back(self) -> None:
        """Takes back those that nobody has taken."""
        with contextlib.suppress(BlockingIOError):  # there are none
            while len(os.read(self.worker_fd, PIPE_NBYTES)) == PIPE_NBYTES:
                pass

    def close(self) -> None:
        """Closes both ends."""
        os.close(self.worker_fd)
        os.close(self._fd)


def take_token(worker_fd: int) -> bytes | None:
    """Takes the next, in a worker; `None` where there is none."""
    try:
        return os.read(worker_fd, 1)
    except BlockingIOError:
        return None
