"""A call, of whichever kind: one request to each of its workers, one future, one number that all its replies bear."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from aiovec.errors import EnvTimeoutError, WorkerDied
from aiovec.exchange.messages import BatchReply, ResetRequest
from aiovec.pool.answer import Answer

__all__ = ["PendingCall"]

# Replies larger than this are unpickled in a thread, so that the loop goes on meanwhile.
_LARGE_NBYTES = 1 << 20


class PendingCall:
    """One call from its requests to its answer.

    Attributes:
        seq: Its number; all its requests and replies bear it.
        command: As messages name it.
        is_batch: Whether its answer is rows, which are owed if nobody waits for them any more.
        buffer: Which buffer its rows go to.
        missing: The workers that have not answered yet.
        payloads: What the others answered, by worker.
        deaths: The workers that died meanwhile.
        asked: With `on_failure="restart"`: the envs of its present request, by worker.
        resets: What a reset has asked, by worker.
        mended: Workers whose answer comes in parts.
        failures: With `on_failure="restart"`: what each env failed with, the last one last.
        parts: The answers of workers some of whose envs had failed, with the envs that each is about, in order.
        future: Done when there is something to say to the task that waits.
        is_abandoned: The task that waited is gone; the answer is owed.
        is_dropped: Nobody will ask for the answer.
    """

    __slots__ = (
        "asked",
        "buffer",
        "command",
        "deaths",
        "failures",
        "future",
        "is_abandoned",
        "is_batch",
        "is_dropped",
        "mended",
        "missing",
        "parts",
        "payloads",
        "resets",
        "seq",
    )

    def __init__(
        self, seq: int, command: str, is_batch: bool, buffer: int, workers: Iterable[int], future: Answer
    ) -> None:
        self.seq: int = seq
        self.command: str = command
        self.is_batch: bool = is_batch
        self.buffer: int = buffer
        self.missing: set[int] = set(workers)
        self.payloads: dict[int, Any] = {}
        self.deaths: list[WorkerDied | EnvTimeoutError] = []
        self.future: Answer = future
        self.asked: dict[int, list[int]] = {}
        self.resets: dict[int, ResetRequest] = {}
        self.mended: set[int] = set()
        self.failures: dict[int, list[Exception]] = {}
        self.parts: list[tuple[list[int], BatchReply]] = []
        self.is_abandoned: bool = False
        self.is_dropped: bool = False

    def __repr__(self) -> str:
        return f"<PendingCall {self.seq} {self.command} missing={sorted(self.missing)} dropped={self.is_dropped}>"

    @property
    def is_large(self) -> bool:
        """Whether to read the answer in a thread."""
        return sum(len(p) for p in self.payloads.values() if isinstance(p, (bytes, memoryview))) > _LARGE_NBYTES
