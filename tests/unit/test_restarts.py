"""How often an env may fail: every event by itself, no processes."""

from __future__ import annotations

import pytest
from gymnasium.vector import AutoresetMode

from aiovec.exchange.restart_delay import restart_delay
from aiovec.pool.mended import Failing
from aiovec.pool.restarts import Restarts

NEXT_STEP, SAME_STEP, DISABLED = AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP, AutoresetMode.DISABLED
NOBODY: frozenset[int] = frozenset()


def failing(exception: Exception) -> Failing:
    """As it comes: read when it is asked for."""
    return lambda: exception


def fail(restarts: Restarts, *env_ids: int) -> None:
    """A step in which these fail."""
    for env_index in env_ids:
        restarts.failed(env_index, failing(ValueError(f"of {env_index}")))
    restarts.stepped(frozenset(env_ids))


@pytest.mark.parametrize("mode", AutoresetMode)
def test_the_budget_counts_failures_in_a_row(mode: AutoresetMode) -> None:
    restarts = Restarts(2, mode)
    fail(restarts, 3, 4)
    assert not restarts.is_last(3)
    fail(restarts, 3)
    assert restarts.is_last(3)
    assert not restarts.is_exhausted(3)
    fail(restarts, 3)
    assert restarts.is_exhausted(3)
    assert not restarts.is_exhausted(4)
    (error,) = restarts.crash_loops([3, 4])
    assert (error.env_ids, len(error.exceptions)) == ((3,), 3)


def test_the_row_of_a_reset_is_no_success() -> None:
    """Else an env that fails in each first step would be built anew for ever."""
    restarts = Restarts(2, NEXT_STEP)
    for _ in range(3):
        fail(restarts, 0)
        restarts.stepped(NOBODY)
    assert restarts.is_exhausted(0)


@pytest.mark.parametrize(("mode", "steps"), [(NEXT_STEP, 2), (SAME_STEP, 1), (DISABLED, 1)])
def test_a_successful_step_clears_it(mode: AutoresetMode, steps: int) -> None:
    """But for the generation, which rises for life."""
    restarts = Restarts(1, mode)
    for generation in range(1, 5):
        fail(restarts, 0)
        assert restarts.generation(0) == generation
        for _ in range(steps):
            restarts.stepped(NOBODY)
        assert not restarts.is_exhausted(0)
    assert "failing={}" in repr(restarts)


def test_a_reset_by_the_user_begins_anew_only_where_the_budget_was_used_up() -> None:
    restarts = Restarts(1, DISABLED)
    restarts.failed(1, failing(ValueError("of 1, in a reset")))
    fail(restarts, 0, 1)
    restarts.was_reset([0, 1])
    assert not restarts.is_exhausted(1)
    fail(restarts, 0, 1)
    assert restarts.is_exhausted(0)
    assert not restarts.is_exhausted(1)


def test_envs_that_are_given_up_share_the_error_of_their_worker() -> None:
    restarts = Restarts(9, NEXT_STEP)
    death = RuntimeError("the worker")
    for env_index in (1, 2, 3):
        restarts.failed(env_index, failing(death))
    restarts.give_up([1, 2])
    (error,) = restarts.crash_loops([1, 2, 3])
    assert error.env_ids == (1, 2)
    assert error.__cause__ is death
    restarts.was_reset([1, 2])
    assert restarts.crash_loops([1, 2, 3]) == []


def test_the_delay_doubles_up_to_five_seconds() -> None:
    assert [restart_delay(count) for count in range(5)] == [0, 0, 0.1, 0.2, 0.4]
    assert restart_delay(50) == 5
    restarts = Restarts(9, NEXT_STEP)
    fail(restarts, 0)
    fail(restarts, 0)
    assert restarts.delay([0, 1]) == 0.1
