"""The answers of sent envs that wait in shared memory: who has ended, and who is to wake us.

The owner of the tokens of `exchange.wanted`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from aiovec.exchange.answer_slots import AnswerSlots
from aiovec.exchange.wanted import Wanted

__all__ = ["Sent"]

_NOTHING = (1 << 64) - 1  # no call has this number


class Sent:
    """The sent envs of a vector.

    Args:
        slots: Where their answers are left.
        wanted: Tells workers when to wake us.
        num_envs: How many envs.
    """

    def __init__(self, slots: AnswerSlots, wanted: Wanted, num_envs: int) -> None:
        self._slots = slots
        self._wanted = wanted
        self._seqs = np.full(num_envs, _NOTHING, dtype=np.uint64)  # by env: the call that it is to answer
        self._num_asked = 0
        self._is_waiting = False

    def __repr__(self) -> str:
        return f"<Sent asked={self._num_asked} waiting={self._is_waiting}>"

    def __bool__(self) -> bool:
        """Whether anybody has not answered yet, as far as we looked."""
        return self._num_asked > 0

    def ask(self, env_ids: Sequence[int], first_seq: int) -> None:
        """These are sent an action; their calls are numbered from the first on."""
        self._seqs[env_ids] = np.arange(first_seq, first_seq + len(env_ids))
        self._num_asked += len(env_ids)

    def forget(self, env_index: int, seq: int) -> None:
        """The answer came by the socket, or will not come; nothing where another call is the one to answer."""
        if self._seqs[env_index] == seq:
            self._seqs[env_index] = _NOTHING
            self._num_asked -= 1

    def has_left(self, env_index: int, seq: int) -> bool:
        """Whether an answer is there; from any thread."""
        return bool(self._slots.seqs[env_index] == seq)

    def take(self) -> list[tuple[int, bytes]]:
        """What was left since the last look, in the order in which the envs ended: number of the call, and answer."""
        if not self._num_asked:
            return []
        ended = (self._slots.seqs == self._seqs).nonzero()[0]
        if not len(ended):
            return []
        if len(ended) > 1:
            ended = ended[self._slots.ended[ended].argsort(kind="stable")]
        seqs = self._seqs[ended].tolist()
        self._seqs[ended] = _NOTHING
        self._num_asked -= len(ended)
        return list(zip(seqs, map(self._slots.take, ended.tolist()), strict=True))

    def want(self, count: int) -> None:
        """Has us woken when so many more have answered; look once more behind this."""
        self.give_up()
        if self._num_asked:
            self._wanted.want(count, self._num_asked)
            self._is_waiting = True

    def give_up(self) -> None:
        """Nobody is to wake us any more."""
        if self._is_waiting:
            self._wanted.take_back()
            self._is_waiting = False
