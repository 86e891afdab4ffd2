"""Which workers are dead, and who has been told: each death is raised once, to the task that waits, or to the next call."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from aiovec.errors import CrashLoopError
from aiovec.pool.worker import Death

__all__ = ["Deaths"]


class Deaths:
    """Of one vector. Pure."""

    def __init__(self) -> None:
        self._by_worker: dict[int, Death] = {}  # as they were first told, until another worker has its place
        self._untold: list[Death | CrashLoopError] = []
        self._unheard: dict[int, Death] = {}  # by env that was idle then, until a task of it is told

    def __repr__(self) -> str:
        return f"<Deaths of {sorted(self._by_worker)} untold={len(self._untold)}>"

    @property
    def has_untold(self) -> bool:
        """Whether the next call raises one."""
        return bool(self._untold)

    def of(self, index: int) -> Death | None:
        """How this worker ended; `None` if that is not known."""
        return self._by_worker.get(index)

    def add(self, index: int, death: Death) -> None:
        """This worker has ended."""
        self._by_worker[index] = death

    def replaced(self, index: int, env_ids: Sequence[int]) -> None:
        """Another one has its place: whoever asked for that has no use for a death that nobody was told of."""
        del self._by_worker[index]
        own = set(env_ids)
        self._untold = [untold for untold in self._untold if not own.intersection(untold.env_ids)]
        self._hear(env_ids)

    # ---- who is told

    def raise_untold(self) -> None:
        """Raises, once, what nobody was waiting for.

        Raises:
            WorkerDied: It happened since the last call.
            EnvTimeoutError: Likewise.
            CrashLoopError: Likewise.
        """
        if self._untold:
            death = self._untold.pop(0)
            self._hear(death.env_ids)
            raise death

    def raise_unheard(self, env_index: int) -> None:
        """Raises, once, the death of the worker of an env that was idle then, to the task of that env.

        Raises:
            WorkerDied: It ended, and a reset builds its envs anew.
            EnvTimeoutError: Likewise.
        """
        death = self._unheard.pop(env_index, None)
        if death is not None:
            self._untold = [untold for untold in self._untold if untold.env_ids != death.env_ids]
            raise death.during(death.command)

    def tell_later(self, deaths: Iterable[Death | CrashLoopError]) -> None:
        """The next calls raise these."""
        self._untold += deaths

    def tell_later_if_dead(self, deaths: Iterable[Death]) -> None:
        """The same of workers whose place nobody has taken meanwhile."""
        dead = [death.env_ids for death in self._by_worker.values()]
        self._untold += [death for death in deaths if death.env_ids in dead]

    def tell_tasks_of(self, env_ids: Iterable[int], death: Death) -> None:
        """The next task of each of these envs is told, if nobody else is."""
        self._unheard.update(dict.fromkeys(env_ids, death))

    def told(self, death: Death) -> None:
        """A call raises it."""
        self._untold = [untold for untold in self._untold if untold.env_ids != death.env_ids]
        self._hear(death.env_ids)

    def _hear(self, env_ids: Iterable[int]) -> None:
        for env_index in env_ids:
            self._unheard.pop(env_index, None)
