"""Every example runs, as a user runs it: one process, with tiny arguments."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from example_runs import EXAMPLES, interrupt, needs, run, workers_of

TOOL_ROW = re.compile(
    r"^ (quick|slow|failing|hanging|new env) +(\d+)(?: +[\d.]+ s){3} +(\d+) +(\d+) +(\d+) *$", re.MULTILINE
)


def assert_is_picture(path: Path, *, colours: int) -> None:
    """A picture that has at least so many colours."""
    from matplotlib import image

    pixels = image.imread(path)
    assert min(pixels.shape[:2]) > 100
    assert len({bytes(pixel) for row in (pixels * 255).astype("u1") for pixel in row}) >= colours


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


def needs_ppo() -> None:
    needs("ale_py", "cv2", "matplotlib", "rich", "torch", extras="examples,torch")


def assert_split_sums(line: str) -> None:
    """What `ppo.py` prints of its time: `of 3.21 s: env 1.50 s (46.7%), policy …`."""
    whole = re.match(r"of ([\d.]+) s: ", line)
    parts = re.findall(r"(\w+) (-?[\d.]+) s \((-?[\d.]+)%\)", line)
    assert whole is not None
    assert [name for name, _seconds, _percent in parts] == ["env", "policy", "learning", "other"]
    assert all(float(percent) > 0 for _name, _seconds, percent in parts[:3])  # seconds may round to 0
    assert float(parts[3][1]) >= 0  # no time is counted twice
    assert sum(float(seconds) for _name, seconds, _percent in parts) == pytest.approx(float(whole[1]), abs=0.03)
    assert sum(float(percent) for _name, _seconds, percent in parts) == pytest.approx(100, abs=0.3)


@pytest.mark.parametrize("groups", [1, 2])
def test_ppo(tmp_path: Path, groups: int) -> None:
    needs_ppo()
    arguments = [f"--groups={groups}", "--num-envs=4", "--max-steps=3000", "--output=here"]
    *_, ended, split, checkpoint, picture = run(tmp_path, "ppo.py", *arguments).splitlines()
    match = re.match(r"not solved: ([\d,]+) env steps in", ended)
    assert match is not None
    assert 3000 <= int(match[1].replace(",", "")) < 3000 + 4 * 32
    assert_split_sums(split)
    assert (checkpoint, picture) == ("Checkpoint: here/ppo.pt", "Picture: here/ppo.png")
    assert (tmp_path / "here/ppo.pt").stat().st_size > 0
    assert_is_picture(tmp_path / "here/ppo.png", colours=8)


def test_ppo_solves_cartpole(tmp_path: Path) -> None:
    """Within twice the steps that it took; a policy that has learned nothing has a mean return of 22."""
    needs_ppo()
    *_, ended, split, _checkpoint, _picture = run(tmp_path, "ppo.py", "--seed=1").splitlines()
    assert ended.startswith("solved: ")
    assert mean_return_of(ended) >= 475
    assert_split_sums(split)


def test_ppo_plays_breakout(tmp_path: Path) -> None:
    needs_ppo()
    arguments = ["--env-id=ALE/Breakout-v5", "--num-envs=2", "--num-workers=1", "--num-steps=16", "--max-steps=400"]
    *_, ended, split, checkpoint, _picture = run(tmp_path, "ppo.py", *arguments).splitlines()
    assert ended.startswith("not solved: 4")
    assert_split_sums(split)
    assert checkpoint == "Checkpoint: out/ppo.pt"
    import torch

    weights = torch.load(tmp_path / "out/ppo.pt", weights_only=True)
    assert weights["features.0.weight"].shape == (32, 4, 8, 8)  # four frames, channels first
    assert all(bool(weight.isfinite().all()) for weight in weights.values())


def test_ppo_saves_at_ctrl_c(tmp_path: Path) -> None:
    needs_ppo()
    printed = interrupt(tmp_path, "env steps in", "ppo.py", within_seconds=20)  # it still draws
    *_, ended, split, checkpoint, picture = printed
    assert sum("Ctrl-C" in line for line in printed) == 1
    assert ended.startswith("stopped by Ctrl-C, every worker has ended: ")
    assert_split_sums(split)
    assert (checkpoint, picture) == ("Checkpoint: out/ppo.pt", "Picture: out/ppo.png")
    assert (tmp_path / "out/ppo.pt").stat().st_size > 0
    assert_is_picture(tmp_path / "out/ppo.png", colours=4)


def advantages_of_episodes(
    rewards: Any, values: Any, terminations: Any, autoresets: Any, gamma: float, trace_decay: float
) -> Any:
    """The definition: for each step a sum over the later ones of its own episode, env by env."""
    import numpy as np

    num_steps, num_envs = rewards.shape
    advantages = np.zeros((num_steps, num_envs))
    for env_index in range(num_envs):
        for t in range(num_steps):
            if autoresets[t, env_index]:
                continue
            later = [k for k in range(t, num_steps) if autoresets[k, env_index]]
            for k in range(t, later[0] if later else num_steps):
                following = 0 if terminations[k, env_index] else values[k + 1, env_index]
                error = rewards[k, env_index] + gamma * following - values[k, env_index]
                advantages[t, env_index] += (gamma * trace_decay) ** (k - t) * error
    return advantages


def test_ppo_estimates_advantages_of_each_episode_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """The resets between them have rewards and values that would be seen wherever they leaked to."""
    needs_ppo()
    import numpy as np
    import torch

    spec = importlib.util.spec_from_file_location("ppo_example", EXAMPLES / "ppo.py")
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, example)  # where its dataclasses look for it
    spec.loader.exec_module(example)

    rng = np.random.default_rng(1)
    num_steps, num_envs = 40, 8
    rewards, values = rng.normal(size=(num_steps, num_envs)), rng.normal(size=(num_steps + 1, num_envs))
    ends, autoresets = np.zeros((2, num_steps, num_envs), bool)
    autoresets[0] = rng.random(num_envs) < 0.5  # where the rollout before this one saw an end
    for t in range(num_steps):
        ends[t] = (rng.random(num_envs) < 0.2) & ~autoresets[t]
        autoresets[t + 1 : t + 2] = ends[t]
    terminations = ends & (rng.random(ends.shape) < 0.5)
    assert all(each.any() for each in (terminations, ends & ~terminations, ends[-1], autoresets[0]))
    # A reset's reward is never anything, nor is what the network says of a terminal state.
    rewards[autoresets] = 1e6
    values[1:][terminations] = 1e6

    found = example.advantages_of(*map(torch.from_numpy, (rewards, values, terminations, autoresets)), 0.9, 0.8)
    wanted = advantages_of_episodes(rewards, values, terminations, autoresets, 0.9, 0.8)
    np.testing.assert_allclose(found.numpy(), wanted, atol=1e-9)
    assert abs(wanted).max() < 100
