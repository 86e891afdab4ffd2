"""What a batch call remembers with `on_failure="restart"`: whom it asked, who failed, and answers that came in parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from aiovec.exchange.failures import restore
from aiovec.exchange.messages import BatchReply

__all__ = ["Failing", "Mended", "Part"]

Failing = Callable[[], Exception]  # reads the exception when it is first asked for


class Part:
    """A worker's answer about some envs, which is unpickled when it is first asked for.

    Attributes:
        env_ids: The envs of its rows, in order.
        payload: As it came.
    """

    def __init__(self, env_ids: Sequence[int], payload: Any, unpack: Callable[[Any], BatchReply | None]) -> None:
        self.env_ids: Sequence[int] = env_ids
        self.payload: Any = payload
        self._unpack = unpack
        self._reply: BatchReply | None = None
        self._exceptions: dict[int, Exception] = {}

    @property
    def is_read(self) -> bool:
        """Whether it was asked for."""
        return self._reply is not None

    @property
    def reply(self) -> BatchReply:
        """What the worker said."""
        if self._reply is None:
            self._reply = self._unpack(self.payload) or BatchReply({})
            self._exceptions = {record.env_index: restore(record) for record in self._reply.failures}
        return self._reply

    def exception(self, env_index: int) -> Exception:
        """What one of the envs raised."""
        _ = self.reply
        return self._exceptions[env_index]


class Mended:
    """What one batch call remembers.

    Attributes:
        asked: The envs of the present request, by worker.
        in_parts: Workers whose answer comes in parts.
        parts: Those.
        failures: What each env failed with, the last one last.
    """

    def __init__(self) -> None:
        self.asked: dict[int, list[int]] = {}
        self.in_parts: set[int] = set()
        self.parts: list[Part] = []
        self.failures: dict[int, list[Failing]] = {}

    @property
    def is_needed(self) -> bool:
        """Whether anything happened that an ordinary answer does not tell."""
        return bool(self.failures or self.in_parts)
