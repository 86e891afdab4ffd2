"""How long envs took, as a worker writes it and the parent reads it."""

from __future__ import annotations

from typing import Any

import pytest

from aiovec.exchange.black_box import TIMES_PER_ROW, BlackBox
from aiovec.worker.clock import StepClock


def test_every_61st_step_is_timed_env_by_env() -> None:
    """An env that raises, too; the others are called as they are."""
    times = [0.0] * (1 + 2 * TIMES_PER_ROW)
    clock = StepClock(times)

    def fails(action: Any) -> Any:
        raise ValueError(action)

    calls = [abs, fails]
    timed = 0
    for _ in range(122):
        taken = clock.calls(calls)
        if taken is calls:
            continue
        timed += 1
        assert taken[0](-3) == 3
        with pytest.raises(ValueError, match="7"):
            taken[1](7)
        clock.batch(0.5)
    assert timed == 2
    assert times[0] == 2 * 0.5
    for row in (0, 1):
        last, total, count, alone = times[1 + TIMES_PER_ROW * row : 1 + TIMES_PER_ROW * (row + 1)]
        assert 0 < last <= total
        assert (count, alone) == (2, 0)


def test_a_step_of_its_own_counts_for_its_env_and_no_batch() -> None:
    times = [0.0] * (1 + 2 * TIMES_PER_ROW)
    StepClock(times).turn(1, 0.25)
    assert times == [0, 0, 0, 0, 0, 0.25, 0.25, 1, 0.25]


def test_the_parent_reads_what_the_worker_wrote() -> None:
    """Also where it takes more than a page."""
    box = BlackBox(1000)
    try:
        assert box.times == [0.0] * (1 + 1000 * TIMES_PER_ROW)
        StepClock(box._memory[4096:].cast("d")).turn(999, 2.0)
        assert box.times[-4:] == [2.0, 2.0, 1.0, 2.0]
        assert box.stack == ""
    finally:
        box.close()
