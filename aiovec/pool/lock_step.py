"""Steps that all workers take together: only the last to end one wakes the parent, which then looks at what each has left.

After the death of a worker each answers for itself, until another one has its place and all have answered such a call:
then nobody is still to take a token (see `exchange.tally`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from aiovec.exchange.groups import index_in
from aiovec.exchange.reply_area import ReplyArea
from aiovec.exchange.tally import NUM_TALLIES, Tally
from aiovec.pool.pending_call import PendingCall

__all__ = ["LockStep"]


class LockStep:
    """Of one vector.

    Args:
        areas: Where workers leave what they have to say, of each one for each tally; none where no memory is shared.
        tallies: Of all envs or the first group, of the second group; none where each worker answers for itself.
    """

    def __init__(self, areas: Sequence[Sequence[ReplyArea]] = (), tallies: Sequence[Tally] = ()) -> None:
        self.is_on: bool = bool(tallies)  # whether a step is answered by a tally
        self._areas = areas
        self._tallies = tallies
        self._apart_since = 0  # the number of the last call before a worker died, or took another's place

    def __repr__(self) -> str:
        return f"<LockStep on={self.is_on} workers={len(self._areas)}>"

    def begin_step(self, tally: int = 0) -> bool:
        """Whether the step that begins is answered by this tally, which has its tokens then."""
        if not self.is_on or tally >= NUM_TALLIES:
            return False
        self._tallies[tally].begin_step()
        return True

    def has_ended(self, call: PendingCall, index: int) -> bool:
        """Whether a worker has ended a call, although nobody was woken, since others have not; from any thread."""
        areas, tally = self._areas, index_in(call.group)
        return call.is_together and bool(areas) and tally < NUM_TALLIES and areas[index][tally].has(call.seq)

    def left(self, call: PendingCall, workers: Iterable[int]) -> Iterator[tuple[int, Any]]:
        """What some workers have left of a step; a reply too large for its area is on its way by the socket."""
        tally = index_in(call.group)
        for index in tuple(workers) if self._areas and tally < NUM_TALLIES else ():
            reply = self._areas[index][tally].take(call.seq)
            if reply is not None:
                yield index, reply

    def part(self, seq: int) -> None:
        """A worker died, or takes another's place: behind this call each answers for itself."""
        self.is_on, self._apart_since = False, seq

    def answered(self, call: PendingCall, num_workers: int) -> None:
        """A call was answered while each answered for itself."""
        is_of_all = call.seq > self._apart_since and not call.deaths and len(call.payloads) == num_workers
        if self._tallies and is_of_all:
            for tally in self._tallies:
                tally.begin_anew()
            self.is_on = True
