"""Every example runs, as a user runs it: one process, with tiny arguments."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
ENDS_WITHIN_SECONDS = 5.0
TOOL_ROW = re.compile(
    r"^ (quick|slow|failing|hanging|new env) +(\d+)(?: +[\d.]+ s){3} +(\d+) +(\d+) +(\d+) *$", re.MULTILINE
)


def run(tmp_path: Path, name: str, *arguments: str) -> str:
    """Runs an example to its end; what it printed."""
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == ""
    return ended.stdout


def interrupt(
    tmp_path: Path, moment: str, name: str, *arguments: str, within_seconds: float = ENDS_WITHIN_SECONDS
) -> list[str]:
    """Sends a Ctrl-C to an example that has printed something; the lines it printed after that, once it ended."""
    mark = f"AIOVEC_TEST_MARK={tmp_path}"
    with subprocess.Popen(
        [sys.executable, "-u", str(EXAMPLES / name), *arguments],
        cwd=tmp_path,
        env=os.environ | dict([mark.split("=")]),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as example:
        too_late = threading.Timer(60, example.kill)
        too_late.start()
        try:
            assert example.stdout is not None
            assert any(moment in line for line in example.stdout)
            while not workers_of(mark):
                assert example.poll() is None
                time.sleep(0.005)
            begin = time.monotonic()
            example.send_signal(signal.SIGINT)
            printed, errors = example.communicate()
            seconds = time.monotonic() - begin
        finally:
            too_late.cancel()
            example.kill()
    assert workers_of(mark) == set()
    assert example.returncode == 130, errors
    assert errors == ""
    assert seconds < within_seconds
    return printed.splitlines()


def needs(*modules: str, extras: str = "examples") -> None:
    for module in modules:
        pytest.importorskip(module, reason=f"the example imports {module}: pip install 'aiovec[{extras}]'")


def assert_is_picture(path: Path, *, colours: int) -> None:
    """A picture that has at least so many colours."""
    from matplotlib import image

    pixels = image.imread(path)
    assert min(pixels.shape[:2]) > 100
    assert len({bytes(pixel) for row in (pixels * 255).astype("u1") for pixel in row}) >= colours


def workers_of(mark: str) -> set[int]:
    """Every worker process, whoever its parent is by now, that inherited a mark in its environment."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended meanwhile, or is not ours to look at
            marked = mark.encode() in (folder / "environ").read_bytes()
            if marked and b"aiovec.worker" in (folder / "cmdline").read_bytes():
                found.add(int(folder.name))
    return found


def test_quickstart(tmp_path: Path) -> None:
    printed = run(tmp_path, "quickstart.py", "--num-envs", "4", "--steps", "50")
    assert "CartPole: 4 envs in" in printed
    assert "mean return" in printed
    assert "caught OutOfFuelError of env 1: no fuel left at" in printed
    assert "after its reset all three fly" in printed
    assert "heartbeats of 5 ms" in printed


def test_quickstart_counts_episodes_as_cartpole_does(tmp_path: Path) -> None:
    """Its reward is 1 a step, so a mean return is a mean length, unless the step that resets were counted."""
    printed = run(tmp_path, "quickstart.py", "--num-envs", "8", "--steps", "200")
    match = re.search(r"mean return ([\d.]+), mean length ([\d.]+)", printed)
    assert match is not None
    assert match[1] == match[2]


def test_breakout(tmp_path: Path) -> None:
    needs("ale_py", "matplotlib", "rich")
    arguments = ["--num-envs=2", "--steps=40", "--rounds=1", "--num-workers=1", "--output=pictures/seen.png"]
    printed = run(tmp_path, "breakout.py", *arguments)
    assert "Breakout, 2 envs, raw frames" in printed
    assert "The frames of all four were the same after every round." in printed
    assert "Picture: pictures/seen.png" in printed
    assert_is_picture(tmp_path / "pictures/seen.png", colours=8)


def test_demo(tmp_path: Path) -> None:
    needs("ale_py", "matplotlib", "pygame", "rich")
    printed = run(tmp_path, "demo.py", "--seconds", "1.5", "--num-cartpoles", "4", "--num-breakouts", "2")
    assert re.search(
        r"^  1\.\d s \| CartPole [\d,]+ env steps/s.* \| Breakout [\d,]+ env steps/s", printed, re.MULTILINE
    )
    for name, colours in (("demo-breakout.png", 8), ("demo-cartpole.png", 4)):
        assert f"Picture: out/{name}" in printed
        assert_is_picture(tmp_path / "out" / name, colours=colours)


@pytest.mark.parametrize("moment", ["starting the workers", "CartPole"], ids=["while it starts", "while it plays"])
def test_demo_ends_cleanly_at_ctrl_c(tmp_path: Path, moment: str) -> None:
    needs("ale_py", "matplotlib", "pygame", "rich")
    printed = interrupt(tmp_path, moment, "demo.py", "--seconds", "60", "--num-cartpoles", "4")
    assert printed[-1] == "stopped by Ctrl-C; every worker has ended"
    assert not (tmp_path / "out").exists()


def test_tool_agents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each tool has its own outcome, each failure its new env, and nothing is left: no worker, no open question."""
    needs("aiohttp", "rich")
    monkeypatch.setenv("AIOVEC_TEST_MARK", str(tmp_path))
    arguments = ["--num-agents=6", "--num-workers=2", "--steps=6", "--slow-seconds=0.01", "--step-timeout=2"]
    printed = run(tmp_path, "tool_agents.py", *arguments)
    assert "6 agents in 2 workers use the tools at http://127.0.0.1:" in printed
    rows = {what: tuple(map(int, counts)) for what, *counts in TOOL_ROW.findall(printed)}
    quick, slow, failing, hanging, new_env = (
        rows[what][0] for what in ("quick", "slow", "failing", "hanging", "new env")
    )
    assert quick + slow + failing + hanging == 6 * 6
    assert min(quick, slow, failing, hanging) > 0
    assert rows["quick"] == (quick, quick, 0, 0)  # times, answered, HTTP 500, timed out
    assert rows["slow"] == (slow, slow, 0, 0)
    assert rows["failing"] == (failing, 0, failing, 0)
    assert rows["hanging"] == (hanging, 0, 0, hanging)
    assert new_env == failing + hanging
    assert rows["new env"] == (new_env, new_env, 0, 0)
    assert f"Envs were built anew {new_env} times." in printed
    assert re.search(r"All agents together waited [\d.]+ s, within [\d.]+ s: \d+ times as much\.", printed)
    match = re.search(r"asked (\d+) questions, up to (\d+) at once; 0 are still open\.", printed)
    assert match is not None
    assert 3 * (36 - failing) < int(match[1]) <= 3 * 36  # a failure may end the other questions of its step unasked
    assert int(match[2]) > 3  # more than one agent's
    assert workers_of(f"AIOVEC_TEST_MARK={tmp_path}") == set()


def needs_torch() -> None:
    needs("matplotlib", "rich", "torch", extras="examples,torch")


def mean_return_of(line: str) -> float:
    return float(line.rpartition("mean return of the last 100: ")[2])


def test_actor_learner(tmp_path: Path) -> None:
    """A policy that has learned nothing has a mean return of 22."""
    needs_torch()
    *_, ended, checkpoint, picture = run(tmp_path, "actor_learner.py", "--solved-return=60").splitlines()
    assert ended.startswith("solved: ")
    assert mean_return_of(ended) >= 60
    assert (checkpoint, picture) == ("Checkpoint: out/actor-learner.pt", "Picture: out/actor-learner.png")
    assert_is_picture(tmp_path / "out/actor-learner.png", colours=8)

    arguments = ["--resume=out/actor-learner.pt", "--output=later", "--learning-rate=0", "--max-steps=6000"]
    *_, ended, _checkpoint, _picture = run(tmp_path, "actor_learner.py", *arguments).splitlines()
    assert ended.startswith("not solved: ")
    assert mean_return_of(ended) > 40
    assert (tmp_path / "later/actor-learner.pt").stat().st_size > 0


def test_actor_learner_saves_at_ctrl_c(tmp_path: Path) -> None:
    needs_torch()
    printed = interrupt(tmp_path, "env steps in", "actor_learner.py", within_seconds=20)  # it still draws
    *_, ended, checkpoint, picture = printed
    assert sum("Ctrl-C" in line for line in printed) == 1
    assert ended.startswith("stopped by Ctrl-C, every worker has ended: ")
    assert (checkpoint, picture) == ("Checkpoint: out/actor-learner.pt", "Picture: out/actor-learner.png")
    assert (tmp_path / "out/actor-learner.pt").stat().st_size > 0
    assert_is_picture(tmp_path / "out/actor-learner.png", colours=8)


def test_actor_learner_names_the_env_that_fails(tmp_path: Path) -> None:
    needs_torch()
    (tmp_path / "brittle.py").write_text(
        """if True:
        import gymnasium as gym
        from gymnasium.envs.classic_control import CartPoleEnv

        class Brittle(CartPoleEnv):
            def step(self, action):
                if self.np_random_seed == 3:  # that of env 2
                    raise OSError("the pole broke")
                return super().step(action)

        gym.register("Brittle-v0", Brittle, max_episode_steps=500)
        """
    )
    mark, path = f"AIOVEC_TEST_MARK={tmp_path}", filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")])
    ended = subprocess.run(
        [sys.executable, str(EXAMPLES / "actor_learner.py"), "--env-id=brittle:Brittle-v0", "--num-envs=4"],
        cwd=tmp_path,
        env=os.environ | dict([mark.split("=")]) | {"PYTHONPATH": os.pathsep.join(path)},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert ended.returncode == 1
    assert "env 2 failed in step: the pole broke" in ended.stdout
    assert "brittle.py" in ended.stderr  # the worker's own frame
    assert workers_of(mark) == set()
