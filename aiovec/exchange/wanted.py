"""How many more answers the parent waits for: whoever gives the last of them wakes it, nobody else does.

Each env that was sent an action would wake the parent by itself otherwise, and take the core from a worker that is
still stepping: with 8 Breakout, of which four are waited for, that costs half of the time.

A pipe of tokens, one byte for each answer that is to come while the parent waits. A worker leaves its answer
(`exchange.answer_slots`), then takes a token; that of the last answer that is wanted tells it to wake the parent. An
answer that is left before the tokens are there may take one or not, so the parent looks again once they are, and begins
anew if anything has come. So it may be woken too early, which it sees, and never too late.
"""

from __future__ import annotations

from aiovec.exchange.tokens import PIPE_NBYTES, TokenPipe, take_token

__all__ = ["Wanted", "take_wanted"]

_WAKE = b"\1"


class Wanted(TokenPipe):
    """The parent's side."""

    def __repr__(self) -> str:
        return f"<Wanted fd={self._fd}>"

    def want(self, count: int, to_come: int) -> None:
        """Has the parent woken by whoever gives the last of `count` answers, from now on, out of those that are to come.

        And by that of twice as many, and so on: the worker that took the one token may be stopped before it says so. Who
        waits for more than the pipe holds is woken in between.
        """
        tokens = bytearray(min(max(count, to_come), PIPE_NBYTES))
        position = count
        while position <= len(tokens):
            tokens[position - 1 : position] = _WAKE
            position *= 2
        tokens[-1:] = _WAKE
        self.put(tokens)


def take_wanted(worker_fd: int) -> bool:
    """Takes a token, in a worker that has left an answer; tells whether to wake the parent."""
    return take_token(worker_fd) == _WAKE
