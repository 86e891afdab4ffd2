"""Who is the last worker to end a step: only that one wakes the parent.

With as many workers as cores, a parent that wakes for the first reply takes the core from a worker that is
still stepping, which costs 64 CartPole a tenth of a step.

The tally is a pipe of tokens, one byte a worker and step. A worker that has ended takes one. The pipe hands
them out in order and each once, so the tokens of many steps can lie there in a row, and whoever is last to end
a step takes its last one: all workers take part in each step, and have taken theirs of the steps before. (One
that had sent its reply may still have to take its token when the next step begins. Then another worker takes a
last token too early, so what it says is checked: `exchange.reply_area` bears the number of the step.) The death
of a worker leaves its token: from then on workers answer each for itself, until a new one has its place and all
have answered such a call. Then nobody is still to take a token, and the tally begins anew.
"""

from __future__ import annotations

import contextlib
import os

__all__ = ["Tally", "take_last"]

_LAST = b"\1"
_STEPS_AT_ONCE = 32
_PIPE_NBYTES = 1 << 12  # less than any pipe holds


class Tally:
    """The parent's side; it owns both ends of the pipe.

    Args:
        num_workers: How many take a token in each step.
    """

    def __init__(self, num_workers: int) -> None:
        self._num_workers = num_workers
        self._steps_at_once = max(1, min(_STEPS_AT_ONCE, _PIPE_NBYTES // num_workers))
        self._steps_left = 0
        read_fd, write_fd = os.pipe()
        self.worker_fd: int = read_fd
        self._fd = write_fd
        # Neither side ever waits here: the parent's loop must not, and a worker without a token answers aloud.
        os.set_blocking(self.worker_fd, False)
        os.set_blocking(self._fd, False)

    def __repr__(self) -> str:
        return f"<Tally of {self._num_workers} workers>"

    def begin_step(self) -> None:
        """Sees to it that there are tokens for one more step."""
        if not self._steps_left:
            os.write(self._fd, (b"\0" * (self._num_workers - 1) + _LAST) * self._steps_at_once)
            self._steps_left = self._steps_at_once
        self._steps_left -= 1

    def begin_anew(self) -> None:
        """Takes back all tokens; only when no worker is still to take one."""
        with contextlib.suppress(BlockingIOError):
            while True:
                os.read(self.worker_fd, _PIPE_NBYTES)
        self._steps_left = 0

    def close(self) -> None:
        """Closes both ends."""
        os.close(self.worker_fd)
        os.close(self._fd)


def take_last(worker_fd: int) -> bool:
    """Takes a token, in a worker; tells whether it was the last one of its step."""
    try:
        return os.read(worker_fd, 1) == _LAST
    except BlockingIOError:
        return True
