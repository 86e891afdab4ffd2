"""The command line as a user types it, in processes of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from example_runs import workers_of
from matplotlib import image

THIRD_PARTY = """
    import sys

    import gymnasium as gym
    import numpy as np

    class Third(gym.Env):
        observation_space = gym.spaces.Box(0, 1, (1,), np.float32)
        action_space = gym.spaces.Discrete(2)

        def __init__(self, fails_at=None):
            self.fails_at = fails_at
            self.steps = 0

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            return np.zeros(1, np.float32), {}

        def step(self, action):
            self.steps += 1
            if self.steps == self.fails_at or (self.fails_at == "worker" and "aiovec.worker.serve" in sys.modules):
                raise RuntimeError("the motor is too hot")
            return np.zeros(1, np.float32), 1.0, False, False, {}

    gym.register("Third-v0", Third)
"""


def run(folder: Path, *arguments: str, columns: int = 120, isolated: bool = False) -> subprocess.CompletedProcess[str]:
    """Runs ``aiovec …`` to its end."""
    command = [sys.executable, "-c", WITHOUT_TYPER] if isolated else [sys.executable, "-m", "aiovec"]
    environment = os.environ | {"COLUMNS": str(columns)}
    return subprocess.run(
        [*command, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=100, check=False
    )


WITHOUT_TYPER = "import sys; sys.modules['typer'] = None; from aiovec.__main__ import main; main()"


@pytest.fixture
def third_party(tmp_path: Path) -> Path:
    """A folder with a module that registers an env."""
    (tmp_path / "third_party.py").write_text(textwrap.dedent(THIRD_PARTY))
    return tmp_path


def test_bench(tmp_path: Path) -> None:
    """A table, a sentence, a record of all that was measured, and a picture."""
    done = run(
        tmp_path,
        *("bench", "CartPole-v1", "--num-envs", "6", "--num-workers", "0,2"),
        *("--seconds", "0.1", "--json", "out.json", "--png", "out.png"),
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    for text in ("6 x CartPole-v1", "aiovec, no workers", "aiovec, 2 workers", "Gymnasium Sync", "Gymnasium Async"):
        assert text in done.stdout
    record = json.loads((tmp_path / "out.json").read_text())
    assert [result["num_workers"] for result in record["results"]] == [0, 2, None, None]
    for result in record["results"]:
        assert len(result["step_seconds_of_rounds"]) == 5
        assert result["env_steps_per_second"] == pytest.approx(6 / result["median_step_seconds"])
        assert (result["longest_heartbeat_gap_seconds"] is None) is (result["num_workers"] is None)
    assert 0 <= record["results"][1]["overhead_share"] <= 1
    assert record["autoreset_mode"] == "NextStep"
    assert record["machine"]["load_of_the_minute_before"] >= 0
    assert record["versions"].keys() >= {"python", "gymnasium", "numpy"}
    assert 0 < record["env_alone"]["step_seconds"] < 0.01
    assert "num_workers=" in record["advice"]
    assert record["advice"] in " ".join(done.stdout.split())
    pixels = image.imread(tmp_path / "out.png")
    assert min(pixels.shape[:2]) > 300
    assert len({bytes(pixel) for row in (pixels * 255).astype("u1") for pixel in row}) > 3


def test_a_record_on_stdout(tmp_path: Path) -> None:
    """Nothing else is there; what is for people goes to stderr."""
    arguments = ("bench", "CartPole-v1", "--num-envs", "2", "--seconds", "0.05", "--num-workers", "0", "--no-gymnasium")
    done = run(tmp_path, *arguments, "--json", "-")
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["results"]) == 1
    assert "2 x CartPole-v1" in done.stderr
    assert not list(tmp_path.iterdir())


def test_bench_in_a_narrow_terminal(tmp_path: Path) -> None:
    """No number is cut."""
    arguments = ("bench", "CartPole-v1", "--num-envs", "2", "--seconds", "0.05", "--num-workers", "1", "--no-gymnasium")
    done = run(tmp_path, *arguments, columns=80)
    assert done.returncode == 0, done.stderr
    assert "…" not in done.stdout
    assert "Gymnasium" not in done.stdout


def test_an_id_of_others(third_party: Path) -> None:
    """By the module that registers it, which lies in the folder; with an argument of its own."""
    arguments = ("bench", "Third-v0", "--num-envs", "2", "--seconds", "0.05", "--num-workers", "1")
    done = run(third_party, *arguments, "--import", "third_party", "--env-kwarg", "fails_at=None")
    assert done.returncode == 0, done.stderr
    assert "2 x Third-v0" in done.stdout


def test_image_envs(tmp_path: Path) -> None:
    """Real frames."""
    pytest.importorskip("ale_py", reason="the game is in ale-py")
    arguments = ("bench", "BreakoutNoFrameskip-v4", "--import", "ale_py", "--num-envs", "2", "--seconds", "0.1")
    done = run(tmp_path, *arguments, "--num-workers", "1", "--no-gymnasium")
    assert done.returncode == 0, done.stderr
    assert "2 x BreakoutNoFrameskip-v4" in done.stdout
    assert done.stderr == ""  # no game greets


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("bench", "NoSuch-v0"), ["aiovec: NoSuch-v0: ", "doesn't exist", "`--import MODULE`"]),
        (("bench", "CartPole-v1", "--import", "no_module"), ["--import no_module: ModuleNotFoundError"]),
        (("bench", "CartPole-v1", "--env-kwarg", "gravity"), ["--env-kwarg 'gravity': expected NAME=VALUE"]),
        (("bench", "CartPole-v1", "--num-workers", "1,-2"), ["--num-workers 1,-2: '-2' is no number from 0"]),
        (("bench", "CartPole-v1", "--env-kwarg", "no=1"), ["fails by itself, during construction: TypeError", "'no'"]),
        (("bench", "CartPole-v1", "--num-envs", "0"), ["--num-envs"]),
        (("bench", "CartPole-v1", "--seconds", "-1"), ["--seconds"]),
        (("bench", "CartPole-v1", "--seconds", "inf"), ["--seconds inf: expected a finite number"]),
        (("bench", "CartPole-v1", "--autoreset-mode", "Disabled"), ["take NextStep or SameStep"]),
        (
            ("bench", "Third-v0", "--import", "third_party", "--env-kwarg", "fails_at=1"),
            ["during step: RuntimeError: the motor is too hot"],
        ),
        (
            ("bench", "Third-v0", "--import", "third_party", "--env-kwarg", "fails_at=worker", "--seconds", "0.1"),
            ["Third-v0 fails in env", "during step: RuntimeError: the motor is too hot"],
        ),
        # At once, and not when all is measured.
        (
            ("bench", "CartPole-v1", "--seconds", "3600", "--json", "no/x.json"),
            ["aiovec: no/x.json: there is no folder no"],
        ),
        (
            ("bench", "CartPole-v1", "--seconds", "3600", "--png", "no/x.png"),
            ["aiovec: no/x.png: there is no folder no"],
        ),
        (("doctor", "--json", "."), ["aiovec: .: it is a folder"]),
    ],
)
def test_what_cannot_be_done(third_party: Path, arguments: tuple[str, ...], says: list[str]) -> None:
    """One clear line, and no traceback."""
    done = run(third_party, *arguments)
    assert done.returncode in (1, 2)
    for text in says:
        assert text in done.stderr
    assert "Traceback" not in done.stderr


def interrupted(folder: Path, is_time: Callable[[str], bool], *arguments: str) -> tuple[int, str, str]:
    """Types a Ctrl-C once it is time; exit code, stdout and stderr. No process is left."""
    mark = f"AIOVEC_TEST_MARK={folder}"
    with subprocess.Popen(
        [sys.executable, "-m", "aiovec", "bench", *arguments],
        cwd=folder,
        env=os.environ | {"AIOVEC_TEST_MARK": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    ) as running:
        too_late = threading.Timer(60, running.kill)
        too_late.start()
        while not is_time(mark):
            assert running.poll() is None
            threading.Event().wait(0.02)
        os.killpg(running.pid, signal.SIGINT)  # as a terminal does it, to Gymnasium's processes too
        printed, errors = running.communicate()
        too_late.cancel()
        too_late.join()
    assert "Traceback" not in errors
    assert not workers_of(mark)
    with pytest.raises(ProcessLookupError):  # nor one of Gymnasium's
        os.killpg(running.pid, 0)
    return running.returncode, printed, errors


def test_ctrl_c(tmp_path: Path) -> None:
    """It ends at once, shows what there is, and leaves no process."""
    arguments = ("CartPole-v1", "--seconds", "60", "--num-envs", "4")
    code, printed, errors = interrupted(tmp_path, lambda mark: len(workers_of(mark)) >= 3, *arguments)
    assert code == 130
    assert "interrupted: what is shown was measured before" in errors
    assert "4 x CartPole-v1" in printed


def test_ctrl_c_while_gymnasium_builds(third_party: Path) -> None:
    """Its SyncVectorEnv builds in this process, the slow one after the other: nothing waits for that."""
    built = third_party / "built"
    (third_party / "slowly.py").write_text(
        textwrap.dedent(
            f"""
            import pathlib, sys, time
            import third_party
            import gymnasium as gym

            class Slowly(third_party.Third):
                made = 0

                def __init__(self):
                    super().__init__()
                    Slowly.made += 1
                    if Slowly.made == 3 and "aiovec.worker.serve" not in sys.modules:  # the first was measured by itself
                        pathlib.Path({str(built)!r}).touch()
                        time.sleep(600)

            gym.register("Slowly-v0", Slowly)
            """
        )
    )
    arguments = ("Slowly-v0", "--import", "slowly", "--num-envs", "2", "--num-workers", "1", "--seconds", "0.1")
    code, printed, errors = interrupted(third_party, lambda _mark: built.exists(), *arguments)
    assert code == 130
    assert "interrupted" in errors
    assert "2 x Slowly-v0" in printed


def test_doctor(tmp_path: Path) -> None:
    """Every check, as a table and as JSON."""
    done = run(tmp_path, "doctor", "--json", "doctor.json")
    assert done.returncode == 0, done.stdout + done.stderr
    findings: list[dict[str, Any]] = json.loads((tmp_path / "doctor.json").read_text())
    checks = {finding["check"] for finding in findings}
    assert checks == {
        *(
            "system",
            "container",
            "versions",
            "CPUs",
            "memory",
            "/dev/shm",
            "memfd",
            "descriptors",
            "processes",
            "pidfd",
        ),
        *("lifelines", "start, fresh interpreters", "start, context='fork'"),
        *("start, context='forkserver'", "start, context='spawn'"),
    }
    assert all(finding["verdict"] in ("ok", "note") for finding in findings)
    for finding in findings:
        assert finding["check"] in done.stdout
        assert (finding["verdict"] == "ok") is (finding["advice"] == "")


def test_without_the_extra(tmp_path: Path) -> None:
    """It says what to install."""
    done = run(tmp_path, "doctor", isolated=True)
    assert done.returncode == 1
    assert done.stderr.strip() == "the command line needs typer: pip install 'aiovec[cli]'"
