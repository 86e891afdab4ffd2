"""The answers that no task awaits by themselves, until `recv` takes them or a new request discards them.

They are those of sent envs and of cancelled calls; and, where a call has failed, of the envs that did their part. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

from aiovec.pool.pending_call import PendingCall

__all__ = ["Inbox"]


class Inbox:
    """Each env at most once, with the call whose answer bears its row."""

    def __init__(self) -> None:
        self._ready: dict[int, PendingCall] = {}  # in order of completion
        self._failed: dict[int, PendingCall] = {}  # instead of a row there is an exception

    def __repr__(self) -> str:
        return f"<Inbox ready={len(self._ready)} failed={sorted(self._failed)}>"

    def __bool__(self) -> bool:
        return bool(self._ready or self._failed)

    def __iter__(self) -> Iterator[int]:
        return iter([*self._ready, *self._failed])

    def __contains__(self, env_index: int) -> bool:
        return env_index in self._ready or env_index in self._failed

    @property
    def has_failures(self) -> bool:
        """Whether some have failed: then they are what comes first."""
        return bool(self._failed)

    @property
    def num_ready(self) -> int:
        """How many rows there are."""
        return len(self._ready)

    @property
    def calls(self) -> set[int]:
        """The numbers of the calls that some of it belongs to."""
        return {call.seq for box in (self._ready, self._failed) for call in box.values()}

    def arrive(self, call: PendingCall, env_ids: Iterable[int], failed: Iterable[int] = ()) -> None:
        """Takes the rows of some envs, and the exceptions of those that failed."""
        failed = set(failed)
        for env_index in env_ids:
            (self._failed if env_index in failed else self._ready)[env_index] = call

    def arrive_one(self, call: PendingCall, env_index: int, has_failed: bool) -> None:
        """The same for a call that is about one env."""
        (self._failed if has_failed else self._ready)[env_index] = call

    def has(self, wanted: int) -> bool:
        """Whether there are so many rows, or a failure, which is not to wait."""
        return bool(self._failed) or len(self._ready) >= wanted

    def first(self, most: int | None) -> list[tuple[int, PendingCall]]:
        """The failures, if there are any; else the first rows. Nothing is taken."""
        if self._failed:
            return sorted(self._failed.items(), key=lambda item: item[0])
        return list(islice(self._ready.items(), most))

    def remove(self, env_ids: Iterable[int]) -> None:
        """They were taken, or are discarded."""
        for env_index in env_ids:
            self._ready.pop(env_index, None)
            self._failed.pop(env_index, None)
