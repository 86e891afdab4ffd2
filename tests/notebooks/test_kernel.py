"""aiovec in a real Jupyter kernel: what cells define, show, and do to the vector."""

from __future__ import annotations

import ast
import contextlib
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fault_envs import is_running
from notebooks.kernels import Cell, Kernel

GONE_WITHIN_SECONDS = 5.0

DEFINE = """
import os, sys
import aiovec, gymnasium as gym, numpy as np

class Told(gym.Env):
    observation_space = gym.spaces.Box(0, 1000, (2,), np.float32)
    action_space = gym.spaces.Discrete(4)

    def __init__(self, number):
        self.number, self.steps = number, 0

    def reset(self, *, seed=None, options=None):
        self.steps = 0
        return np.array([self.number, self.steps], np.float32), {}

    def step(self, action):
        self.steps += 1
        if action == 1:
            raise ValueError(f"an error of env {self.number}")  # this very line
        if action == 2:
            print("out", self.number, self.steps)
            print("err", self.number, self.steps, file=sys.stderr)
        if action == 3:
            with open(self.fifo, "rb") as held:  # opens when the test does, and ends when the test closes it
                held.read()
        return np.array([self.number, self.steps], np.float32), 1.0, False, False, {}

    def pid(self):
        return os.getpid()
"""

START = """
envs = await aiovec.AsyncVectorEnv([lambda: Told(5), lambda: Told(7)], num_workers=2)
observations, infos = await envs.reset()
observations.tolist()
"""


@pytest.fixture
def vector(kernel: Kernel) -> Kernel:
    """A kernel that has started a vector."""
    assert not kernel.run(DEFINE).error
    assert kernel.result_of(START) == "[[5.0, 0.0], [7.0, 0.0]]"
    return kernel


def pids(kernel: Kernel) -> list[int]:
    found: list[int] = ast.literal_eval(kernel.result_of("list(await envs.call('pid'))"))
    assert all(map(is_running, found))
    return found


def assert_gone(found: list[int]) -> None:
    deadline = time.monotonic() + GONE_WITHIN_SECONDS
    while any(map(is_running, found)):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_class_and_lambdas_of_a_cell(vector: Kernel) -> None:
    """What they return is of the classes of the notebook."""
    assert vector.result_of("(await envs.step([0, 0]))[0].tolist()") == "[[5.0, 1.0], [7.0, 1.0]]"
    assert len(set(pids(vector))) == 2
    assert not vector.run("await envs.close()").error


def test_the_traceback_points_at_the_line_of_the_cell(vector: Kernel) -> None:
    number = 1 + next(index for index, line in enumerate(DEFINE.strip().splitlines()) if "this very line" in line)
    cell = vector.run("await envs.step([0, 1])")
    assert cell.ename == "ValueError"
    assert re.search(rf"Cell In\[\d+\], line {number}, in Told\.step\b", cell.error)
    assert re.search(rf"^-+> {number} +raise ValueError\(.*\)  # this very line$", cell.error, re.MULTILINE)
    assert "await envs.step([0, 1])" in cell.error
    assert "ValueError: an error of env 7" in cell.error
    assert "raised by env 1 during step, worker pid" in cell.error
    assert vector.result_of("(await envs.reset(env_ids=[1]))[0].tolist()") == "[[7.0, 0.0]]"


def test_what_workers_print_is_in_the_cell_that_runs(vector: Kernel) -> None:
    """Not in the one that started them."""
    first = vector.run("_ = await envs.step([2, 0])")
    vector.wait_until(lambda: bool(first.stdout and first.stderr))
    second = vector.run("_ = await envs.step([0, 2])")
    vector.wait_until(lambda: bool(second.stdout and second.stderr))
    assert first.stdout == "[aiovec worker 0] out 5 1\n"
    assert first.stderr == "[aiovec worker 0] err 5 1\n"
    assert second.stdout == "[aiovec worker 1] out 7 2\n"
    assert second.stderr == "[aiovec worker 1] err 7 2\n"


@contextlib.contextmanager
def held_step(kernel: Kernel, folder: Path) -> Iterator[Cell]:
    """A cell that awaits a step; env 1 is in it until the end of the block."""
    fifo = folder / "step"
    os.mkfifo(fifo)
    told = kernel.run(f"await envs.set_attr('fifo', {str(fifo)!r})")
    assert not told.error, told.error
    cell = kernel.send("await envs.step([0, 3])")
    with open(fifo, "wb"):
        yield cell


def test_an_interrupted_cell_leaves_the_vector_whole(vector: Kernel, tmp_path: Path) -> None:
    """By a SIGINT, as the stop button sends it: the step is owed, and a reset goes on. The workers never see it."""
    before = pids(vector)
    with held_step(vector, tmp_path) as cell:
        vector.interrupt()
        vector.wait_until(lambda: cell.is_idle)
        assert cell.ename == "CancelledError"
        assert "await envs.step([0, 3])" in cell.error
        refused = vector.run("await envs.step([0, 0])")
        assert refused.ename == "AlreadyPendingCallError"
        assert "`envs.reset()` waits it out and discards it" in refused.error
    assert vector.result_of("(await envs.reset())[0].tolist()") == "[[5.0, 0.0], [7.0, 0.0]]"
    assert vector.result_of("(await envs.step([0, 0]))[0].tolist()") == "[[5.0, 1.0], [7.0, 1.0]]"
    assert pids(vector) == before


def test_what_an_interrupted_cell_awaited_can_be_collected(vector: Kernel, tmp_path: Path) -> None:
    with held_step(vector, tmp_path) as cell:
        vector.interrupt()
        vector.wait_until(lambda: cell.is_idle)
    collected = "batch = await envs.recv(min_envs=2); sorted(batch.observations.tolist())"
    assert vector.result_of(collected) == "[[5.0, 1.0], [7.0, 1.0]]"
    assert vector.result_of("(await envs.step([0, 0]))[0].tolist()") == "[[5.0, 2.0], [7.0, 2.0]]"


def test_an_interrupt_between_cells_changes_nothing(vector: Kernel) -> None:
    vector.interrupt()
    assert vector.result_of("(await envs.step([0, 0]))[0].tolist()") == "[[5.0, 1.0], [7.0, 1.0]]"


def test_a_start_that_is_interrupted_can_be_tried_again(kernel: Kernel, tmp_path: Path) -> None:
    """Its worker is gone as soon as the cell is."""
    assert not kernel.run(DEFINE).error
    fifo, pid = tmp_path / "build", tmp_path / "pid"
    os.mkfifo(fifo)
    cell = kernel.send(f"""
class HeldAtFirst(Told):
    def __init__(self):
        super().__init__(0)
        if not os.path.exists({str(pid)!r}):
            with open({str(pid)!r}, "w") as file:
                print(os.getpid(), file=file)
            with open({str(fifo)!r}, "rb") as held:
                held.read()

envs = aiovec.AsyncVectorEnv([HeldAtFirst], num_workers=1)
await envs
""")
    with open(fifo, "wb"):
        kernel.interrupt()
        kernel.wait_until(lambda: cell.is_idle)
        assert cell.ename == "CancelledError"
        assert_gone([int(pid.read_text())])
    assert kernel.result_of("(await envs.reset())[0].tolist()") == "[[0.0, 0.0]]"


@pytest.mark.parametrize("way", ["restart", "restart now", "kill", "shut down"])
@pytest.mark.parametrize("moment", ["idle", "in a step"])
def test_no_worker_outlives_the_kernel(vector: Kernel, tmp_path: Path, way: str, moment: str) -> None:
    found = pids(vector)
    with held_step(vector, tmp_path) if moment == "in a step" else contextlib.nullcontext():
        if way == "kill":
            os.kill(vector.pid, signal.SIGKILL)
        elif way == "shut down":
            vector.manager.shutdown_kernel()
        else:
            vector.restart(now=way == "restart now")
        assert_gone(found)
    if way.startswith("restart"):
        assert not vector.run(DEFINE).error
        assert vector.result_of(START) == "[[5.0, 0.0], [7.0, 0.0]]"
