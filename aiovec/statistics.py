"""`VectorStatistics`: what a vector has done so far, and what it is doing."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from aiovec.errors import name_envs

__all__ = ["PendingStatistics", "VectorStatistics"]


@dataclass(frozen=True)
class PendingStatistics:
    """A call that is not answered yet.

    Attributes:
        command: As messages name it.
        env_ids: The envs that it waits for: of each worker that has not answered the one that is called at the moment,
            else all of that worker that were asked.
        seconds: Since it was sent.
    """

    command: str
    env_ids: tuple[int, ...]
    seconds: float

    def __str__(self) -> str:
        return f"{self.command} has waited for {name_envs(self.env_ids)} for {self.seconds:.1f} s"


@dataclass(frozen=True)
class VectorStatistics:
    """What a vector has done since its start.

    All of it are Python's own numbers, texts and tuples: `json.dumps(statistics.as_dict())` works.

    Attributes:
        steps: How many steps of single envs were answered.
        env_seconds: Spent inside envs, in their `step` and in autoresets, summed over envs.
        waiting_seconds: In which any call was pending.
        overhead: The share of the workers' time, as long as any call was pending, in which no env ran: what aiovec
            costs, and the wait for slower workers. 0 where envs overlap in one worker.
        env_last_seconds: Each env's last step that was timed; 0 if none was. Where envs take turns in one thread every
            61st step of a worker is timed by env.
        env_mean_seconds: The mean of those.
        pending: The calls that are not answered yet, the oldest first.
        restarts: How often an env was built anew (`on_failure="restart"`).
    """

    steps: int
    env_seconds: float
    waiting_seconds: float
    overhead: float
    env_last_seconds: tuple[float, ...]
    env_mean_seconds: tuple[float, ...]
    pending: tuple[PendingStatistics, ...]
    restarts: int

    def __str__(self) -> str:
        slowest = max(range(len(self.env_mean_seconds)), key=self.env_mean_seconds.__getitem__)
        parts = [
            f"{self.steps:,} steps",
            f"{self.steps_per_second:,.0f} a second",
            f"overhead {self.overhead:.0%}",
            f"slowest env {slowest}: {self.env_mean_seconds[slowest] * 1e3:.3g} ms a step",
        ]
        if self.restarts:
            parts.append(f"{self.restarts} restarts")
        return "; ".join([*parts, *map(str, self.pending)])

    @property
    def steps_per_second(self) -> float:
        """Steps of single envs for each second in which any call was pending."""
        return self.steps / self.waiting_seconds if self.waiting_seconds else 0.0

    def as_dict(self) -> dict[str, Any]:
        """As dicts, lists and numbers."""
        return asdict(self)
