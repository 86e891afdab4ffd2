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

There are two: two groups of envs of a rollout are stepped at the same time, each in a lock-step of its own.
"""

from __future__ import annotations

from aiovec.exchange.tokens import PIPE_NBYTES, TokenPipe, take_token

__all__ = ["NUM_TALLIES", "Tally", "take_last"]

NUM_TALLIES = 2
_LAST = b"\1"
_STEPS_AT_ONCE = 32


class Tally(TokenPipe):
    """The parent's side.

    Args:
        num_workers: How many take a token in each step.
    """

    def __init__(self, num_workers: int) -> None:
        super().__init__()
        self._num_workers = num_workers
        self._steps_at_once = max(1, min(_STEPS_AT_ONCE, PIPE_NBYTES // num_workers))
        self._steps_left = 0

    def __repr__(self) -> str:
        return f"<Tally of {self._num_workers} workers>"

    def begin_step(self) -> None:
        """Sees to it that there are tokens for one more step."""
        if not self._steps_left:
            self.put((b"\0" * (self._num_workers - 1) + _LAST) * self._steps_at_once)
            self._steps_left = self._steps_at_once
        self._steps_left -= 1

    def begin_anew(self) -> None:
        """Takes back all tokens; only when no worker is still to take one."""
        self.take_back()
        self._steps_left = 0


def take_last(worker_fd: int) -> bool:
    """Takes a token, in a worker; tells whether it was the last one of its step, as where there is none."""
    return take_token(worker_fd) in (_LAST, None)
