"""Each death is told once: to the task that waits, to the next call, or to a task of an env that was idle then."""

from __future__ import annotations

import pytest

from aiovec import WorkerDied
from aiovec.pool.deaths import Deaths


def death(*env_ids: int) -> WorkerDied:
    """Of the worker of these envs."""
    return WorkerDied(env_ids, 4711, -9, None, "")


def test_the_next_call_is_told_once() -> None:
    """One death a call."""
    deaths = Deaths()
    deaths.tell_later([death(0, 1), death(2)])
    for env_ids in ((0, 1), (2,)):
        assert deaths.has_untold
        with pytest.raises(WorkerDied) as caught:
            deaths.raise_untold()
        assert caught.value.env_ids == env_ids
    assert not deaths.has_untold
    deaths.raise_untold()


def test_whoever_comes_first_is_told() -> None:
    """A batch, or a task of one of the envs; then the other way has nothing more to say."""
    for env_index in (0, None):
        deaths = Deaths()
        deaths.add(0, death(0, 1))
        deaths.tell_later([death(0, 1)])
        deaths.tell_tasks_of([0, 1], death(0, 1))
        deaths.raise_unheard(2)
        with pytest.raises(WorkerDied):
            deaths.raise_untold() if env_index is None else deaths.raise_unheard(env_index)
        deaths.raise_untold()
        if env_index is None:
            deaths.raise_unheard(1)
        else:
            with pytest.raises(WorkerDied):  # another task, with an env of its own
                deaths.raise_unheard(1)


def test_a_death_that_a_call_has_told() -> None:
    deaths = Deaths()
    deaths.add(0, death(0, 1))
    deaths.tell_later([death(0, 1), death(2)])
    deaths.tell_tasks_of([0, 1], death(0, 1))
    deaths.told(death(0, 1))
    deaths.raise_unheard(0)
    with pytest.raises(WorkerDied) as caught:
        deaths.raise_untold()
    assert caught.value.env_ids == (2,)
    assert deaths.of(0) is not None


def test_a_worker_whose_place_another_one_has_taken() -> None:
    """Its death is of no use to anybody, also where a call has it still."""
    deaths = Deaths()
    deaths.add(0, death(0, 1))
    deaths.tell_later([death(0, 1)])
    deaths.tell_tasks_of([0, 1], death(0, 1))
    deaths.replaced(0, [0, 1])
    deaths.tell_later_if_dead([death(0, 1)])
    deaths.raise_untold()
    deaths.raise_unheard(1)
    assert deaths.of(0) is None
