"""When a worker counts as stuck, and what is shown of its stack: pure."""

from __future__ import annotations

import pytest

from aiovec.exchange.black_box import IDLE, MOST_THREADS, BlackBox, Doing, Phase, doing_code, readable_stack
from aiovec.pool.watch import Sightings

IN_STEP = Doing(3, Phase.STEP)
WORKER = 0


def test_who_is_seen_in_one_call_for_the_whole_limit_is_stuck() -> None:
    """Told once; not before the limit has passed since it was first seen."""
    sightings = Sightings(1.0, 5.0)
    assert not sightings.see(WORKER, 7, [IN_STEP], 10.0)
    assert not sightings.see(WORKER, 7, [IN_STEP], 10.9)
    assert sightings.see(WORKER, 7, [IN_STEP], 11.0)
    assert not sightings.see(WORKER, 7, [IN_STEP], 15.0)


@pytest.mark.parametrize(
    ("pid", "doing"),
    [
        (7, IN_STEP._replace(number=1)),  # the same env, in the next step
        (7, Doing(4, Phase.STEP)),
        (7, Doing(3, Phase.RESET)),  # an autoreset
        (8, IN_STEP),  # a worker that has taken the place
        (7, Doing(3, Phase.BUILD)),
    ],
)
def test_any_progress_begins_the_time_anew(pid: int, doing: Doing) -> None:
    """Two thousand envs may take as long as they like together."""
    sightings = Sightings(1.0, 5.0)
    sightings.see(WORKER, 7, [IN_STEP], 10.0)
    assert not sightings.see(WORKER, pid, [doing], 11.5)
    assert not sightings.see(WORKER, pid, [doing], 12.4)
    assert not sightings.see(WORKER, 7, [IN_STEP], 12.4)
    assert not sightings.see(WORKER, 7, [IN_STEP], 13.3)
    assert sightings.see(WORKER, 7, [IN_STEP], 13.5)


def test_between_two_calls_the_time_begins_anew() -> None:
    sightings = Sightings(1.0, 5.0)
    sightings.see(WORKER, 7, [IN_STEP], 10.0)
    assert not sightings.see(WORKER, 7, [], 10.5)
    assert not sightings.see(WORKER, 7, [IN_STEP], 11.2)


def test_each_lane_of_a_worker_is_seen_for_itself() -> None:
    """One that is stuck is told, whatever the others do, and once."""
    sightings = Sightings(1.0, 5.0)
    for number in range(3):
        busy = Doing(1, Phase.STEP, number, 1)
        assert sightings.see(WORKER, 7, [IN_STEP, busy], 10.0 + number / 2) == ([IN_STEP] if number == 2 else [])
    assert not sightings.see(WORKER, 7, [IN_STEP], 20.0)


def test_a_construction_has_a_limit_of_its_own() -> None:
    sightings = Sightings(1.0, 5.0)
    building = Doing(0, Phase.BUILD)
    sightings.see(WORKER, 7, [building], 10.0)
    assert not sightings.see(WORKER, 7, [building], 14.9)
    assert sightings.see(WORKER, 7, [building], 15.0)


def test_a_second_worker_that_is_stuck_in_the_same_way_is_told_too() -> None:
    sightings = Sightings(1.0, 5.0)
    sightings.see(WORKER, 7, [IN_STEP], 10.0)
    assert sightings.see(WORKER, 7, [IN_STEP], 11.0)
    sightings.see(WORKER, 8, [IN_STEP], 11.3)
    assert sightings.see(WORKER, 8, [IN_STEP], 12.3)


def test_workers_are_seen_each_for_itself() -> None:
    """One that goes on does not excuse another."""
    sightings = Sightings(1.0, 5.0)
    for worker in range(2):
        sightings.see(worker, 7, [IN_STEP], 0.0)
    assert not sightings.see(0, 8, [IN_STEP], 1.0)
    assert sightings.see(1, 7, [IN_STEP], 1.0)


# ---- the black box


@pytest.mark.parametrize("phase", Phase)
@pytest.mark.parametrize("row", [0, 1, 4095])
def test_what_a_worker_writes_down_is_read(row: int, phase: Phase) -> None:
    """And for a step it is the row itself, since that is one store on the step path."""
    assert doing_code(row, Phase.STEP) == row
    box = BlackBox(1000)
    try:
        assert box.doing == []
        box._page[0] = doing_code(row, phase)
        assert box.doing == [Doing(row, phase)]
        box._page[-2] = 5
        assert box.doing[1:] == [Doing(5, Phase.STEP, 0, MOST_THREADS + 1)]
        box._page[-2] = IDLE
        box._page[0] = IDLE
        assert box.doing == []
        assert (box.stack, box.stack_nbytes) == ("", 0)
    finally:
        box.close()


def test_a_stack_shows_the_env_and_nothing_of_ours() -> None:
    """Threads that run no env are left out, too."""
    written = """\
Fatal Python error: Segmentation fault

Thread 0x00007f01 (most recent call first):
  File "/x/aiovec/worker/lifeline.py", line 46 in _readable
  File "/lib/threading.py", line 982 in run

Current thread 0x00007f02 (most recent call first):
  File "/home/user/env.py", line 12 in push
  File "/home/user/env.py", line 5 in step
  File "/x/aiovec/worker/host.py", line 170 in step
  File "/x/aiovec/worker/serve.py", line 80 in run

Extension modules: numpy.core._multiarray_umath (total: 1)
"""
    assert readable_stack(written) == (
        "Fatal Python error: Segmentation fault\n"
        '  File "/home/user/env.py", line 12 in push\n'
        '  File "/home/user/env.py", line 5 in step'
    )


def test_several_threads_of_an_env_keep_their_headings() -> None:
    """Whose is what."""
    written = 'Thread 0x01 (most recent call first):\n  File "a.py", line 1 in f\n\n' * 2
    assert readable_stack(written).count("Thread 0x01") == 2
    assert readable_stack("") == ""
