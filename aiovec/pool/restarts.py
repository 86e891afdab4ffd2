"""How often an env may fail and be built anew: the budget of `on_failure="restart"`. Pure.

What counts are failures without a successful step between them. The row in which a new env is reset is no step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from collections.abc import Set as AbstractSet

from gymnasium.vector import AutoresetMode

from aiovec.errors import CrashLoopError
from aiovec.exchange.restart_delay import restart_delay
from aiovec.pool.mended import Failing

__all__ = ["GIVEN_UP", "Restarts"]

GIVEN_UP = "failed too often: a reset builds anew"


class Restarts:
    """The failures of all envs of a vector.

    Args:
        max_restarts: How many failures in a row are followed by another attempt.
        mode: Under SAME_STEP a failed row waits for the new env; under NEXT_STEP the next row is its reset.
    """

    def __init__(self, max_restarts: int, mode: AutoresetMode) -> None:
        self._max_restarts = max_restarts
        self._resets_in_next_row = mode is AutoresetMode.NEXT_STEP
        self.waits_in_step: bool = mode is AutoresetMode.SAME_STEP
        self._stories: dict[int, list[Failing]] = {}  # the failures since the last successful step
        self._resetting: set[int] = set()  # envs whose next row is the reset of the new one
        self._given_up: set[int] = set()
        self._generations: Counter[int] = Counter()

    def __repr__(self) -> str:
        return f"<Restarts failing={ {index: len(story) for index, story in self._stories.items()} }>"

    def failed(self, env_index: int, failing: Failing, *, is_counted: bool = True) -> None:
        """One more failure; one that is not counted takes the place of the last."""
        story = self._stories.setdefault(env_index, [])
        if story and not is_counted:
            story.pop()
        story.append(failing)
        self._generations[env_index] += 1

    def is_exhausted(self, env_index: int) -> bool:
        """Whether this env has failed too often in a row."""
        return env_index in self._given_up or len(self._stories.get(env_index, ())) > self._max_restarts

    def is_last(self, env_index: int) -> bool:
        """Whether one more failure of this env is one too many."""
        return self.is_exhausted(env_index) or len(self._stories.get(env_index, ())) >= self._max_restarts

    def give_up(self, env_ids: Iterable[int]) -> None:
        """These cannot be built anew: there is no worker for them."""
        self._given_up.update(env_ids)

    def delay(self, env_ids: Iterable[int]) -> float:
        """Seconds to wait before these are built anew, together."""
        return max(restart_delay(len(self._stories.get(env_index, ()))) for env_index in env_ids)

    @property
    def total(self) -> int:
        """How often any env was built anew."""
        return self._generations.total()

    def generation(self, env_index: int) -> int:
        """How often this env was built anew, the attempt at hand included."""
        return self._generations[env_index]

    def stepped(self, failed: AbstractSet[int], env_ids: Iterable[int] | None = None) -> None:
        """A step of all, or of these, was answered: for those that did not fail a success, or their reset."""
        if not self._stories:
            return
        stepped = self._stories.keys() if env_ids is None else self._stories.keys() & set(env_ids)
        for env_index in [index for index in stepped if index not in failed and index not in self._given_up]:
            if env_index in self._resetting:
                self._resetting.discard(env_index)
            else:
                del self._stories[env_index]
        if self._resets_in_next_row:
            self._resetting |= failed

    def was_reset(self, env_ids: Iterable[int]) -> None:
        """The user has reset these: their next row is a step, and who had failed too often begins anew."""
        for env_index in env_ids:
            self._resetting.discard(env_index)
            if self.is_exhausted(env_index):
                self._stories.pop(env_index, None)
                self._given_up.discard(env_index)

    def crash_loops(self, env_ids: Iterable[int]) -> list[CrashLoopError]:
        """An error for each of these that has failed too often; envs that ended with one worker share it."""
        by_last: dict[int, list[int]] = {}
        for env_index in env_ids:
            if self.is_exhausted(env_index):
                by_last.setdefault(id(self._stories[env_index][-1]()), []).append(env_index)
        errors: list[CrashLoopError] = []
        for ids in by_last.values():
            story = [failing() for failing in self._stories[ids[0]]]
            errors.append(CrashLoopError(ids, self._max_restarts, story))
            errors[-1].__cause__ = story[-1]
        return errors
