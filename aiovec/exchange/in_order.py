"""Messages that are numbered, and may overtake each other on their way: taken in the order of their numbers. Pure."""

from __future__ import annotations

from typing import Generic, TypeVar

__all__ = ["InOrder"]

_Message = TypeVar("_Message")


class InOrder(Generic[_Message]):
    """The messages of one sender, numbered from 0."""

    def __init__(self) -> None:
        self._next = 0
        self._early: dict[int, _Message] = {}

    def __repr__(self) -> str:
        return f"<InOrder next={self._next} early={sorted(self._early)}>"

    def take(self, number: int, message: _Message) -> list[_Message]:
        """Takes one that has come, and gives those whose turn it is now."""
        self._early[number] = message
        ready: list[_Message] = []
        while self._next in self._early:
            ready.append(self._early.pop(self._next))
            self._next += 1
        return ready
