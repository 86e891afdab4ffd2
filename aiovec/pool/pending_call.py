"""A call, of whichever kind: one request to each of its workers, one future, one number that all its replies bear."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from aiovec.errors import EnvTimeoutError, WorkerDied
from aiovec.exchange.messages import ResetRequest
from aiovec.exchange.replies import Apart, is_to_be_read_in_a_thread
from aiovec.exchange.slab import Buffer
from aiovec.pool.answer import Answer
from aiovec.pool.mended import Mended
from aiovec.pool.ring import Lease

__all__ = ["PendingCall"]

_NO_RESETS: Mapping[int, ResetRequest] = {}
_NONE_SAVED: Mapping[int, Buffer] = {}


class PendingCall:
    """One call from its requests to its answer.

    Attributes:
        seq: Its number; all its requests and replies bear it.
        command: As messages name it.
        env_index: Of a batch that is about one env: that env.
        env_ids: Of a batch: the rows of its answer, in order. `None`: all envs, or no batch.
        is_batch: Whether its answer is rows, which are owed if nobody waits for them any more.
        buffer: Which buffer its rows go to.
        missing: The workers that have not answered yet.
        payloads: What the others answered, by worker.
        replies: The same, unpickled, as far as it was asked for.
        deaths: The workers that died meanwhile.
        mended: Of a batch with `on_failure="restart"`.
        future: Done when there is something to say to the task that waits; `None` where there never is one.
        is_sent: An env was sent an action, without a task that waits; the answer is owed from the beginning.
        is_abandoned: The task that waited is gone; the answer is owed.
        is_dropped: Nobody will ask for the answer.
        began: When it was sent; seconds of `time.perf_counter`.
        is_together: Its workers answer by the tally: the last of them for all.
        group: Of a step: which group of envs; see `exchange.groups`.
        resets: Of a reset: what it asks, by worker.
        saved: Rows of workers that have answered and then died, by worker: others may reset their envs meanwhile.
        kept: A copy of its rows, taken when it was answered, where reading the rest of the answer takes long.
        lease: Of a rollout, which sees to its calls itself: the memory that they write.
    """

    __slots__ = (
        "began",
        "buffer",
        "command",
        "deaths",
        "env_ids",
        "env_index",
        "future",
        "group",
        "is_abandoned",
        "is_batch",
        "is_dropped",
        "is_sent",
        "is_together",
        "kept",
        "lease",
        "mended",
        "missing",
        "payloads",
        "replies",
        "resets",
        "saved",
        "seq",
    )

    def __init__(
        self,
        seq: int,
        command: str,
        is_batch: bool,
        buffer: int,
        workers: Iterable[int],
        future: Answer | None,
        env_ids: Sequence[int] | None = None,
    ) -> None:
        self.seq: int = seq
        self.command: str = command
        self.env_ids: Sequence[int] | None = env_ids
        self.env_index: int | None = env_ids[0] if env_ids is not None and len(env_ids) == 1 else None
        self.is_batch: bool = is_batch
        self.buffer: int = buffer
        self.missing: set[int] = set(workers)
        self.payloads: dict[int, Any] = {}
        self.replies: dict[int, Any] | None = None
        self.deaths: tuple[WorkerDied | EnvTimeoutError, ...] = ()
        self.mended: Mended | None = None
        self.future: Answer | None = future
        self.is_sent: bool = is_batch and future is None
        self.is_abandoned: bool = self.is_sent
        self.is_dropped: bool = False
        self.is_together: bool = False
        self.group: int = 0
        self.lease: Lease | None = None
        self.kept: Buffer | None = None
        self.saved: Mapping[int, Buffer] = _NONE_SAVED
        self.resets: Mapping[int, ResetRequest] = _NO_RESETS
        self.began: float = 0.0

    def __repr__(self) -> str:
        return f"<PendingCall {self.seq} {self.command} missing={sorted(self.missing)} dropped={self.is_dropped}>"

    @property
    def is_complete(self) -> bool:
        """Whether every worker has answered, or is gone."""
        return not self.missing

    def answered_by(self, own: range) -> Sequence[int]:
        """The envs that the whole answer of a worker is about, given its envs; in the order of its rows."""
        return own if self.env_ids is None else [env_index for env_index in self.env_ids if env_index in own]

    def is_repeatable(self, index: int) -> bool:
        """Whether another worker can do what this one was asked: a reset, unless others' last rows are part of it."""
        request = self.resets.get(index)
        return request is not None and not (request.whole_batch and request.rows is not None)

    def is_to_be_read_in_a_thread(self) -> bool:
        """Whether to unpickle the answer away from the loop."""
        for index, payload in self.payloads.items():
            if payload and (self.replies is None or index not in self.replies) and _is_slow(payload):
                return True
        return self.mended is not None and any(
            _is_slow(part.payload) for part in self.mended.parts if part.payload and not part.is_read
        )


def _is_slow(payload: Any) -> bool:
    return isinstance(payload, (bytes, memoryview, Apart)) and is_to_be_read_in_a_thread(payload)
