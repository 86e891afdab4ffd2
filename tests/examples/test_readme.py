"""Every piece of code in the README runs, and every command in it is there."""

from __future__ import annotations

import ast
import asyncio
import importlib.util
import inspect
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

import aiovec

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = list(re.finditer(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL))
CODE = [block for block in BLOCKS if block[1] == "python"]
COMMANDS = [
    line.removeprefix("$ ").partition("  #")[0].strip()
    for block in BLOCKS
    if block[1] == "console"
    for line in block[2].splitlines()
    if line.startswith("$ ")
]
NUM_ENVS = 8


def line_of(block: re.Match[str]) -> int:
    """Where in the README a block begins."""
    return README.count("\n", 0, block.start()) + 2


def is_on_ray(block: re.Match[str]) -> bool:
    """Whether it needs Ray: nox has a session for all that does."""
    return 'context="ray"' in block[2]


def case_of(block: re.Match[str]) -> Any:
    """A block as a test."""
    needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
    ray = [needs_ray] if is_on_ray(block) else []
    return pytest.param(block, id=f"line {line_of(block)}{' on Ray' * len(ray)}", marks=ray)


@pytest.mark.blocks_loop  # by pictures that are drawn, and whatever a user's own code does
@pytest.mark.parametrize("block", [case_of(block) for block in CODE])
def test_code_runs(block: re.Match[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the names that the README says are there; where it awaits, in an event loop."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"aiovec": aiovec, "asyncio": asyncio, "gym": gym, "np": np, "__name__": "readme"}
    code = compile(
        "\n" * (line_of(block) - 1) + block[2], str(ROOT / "README.md"), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
    )
    if code.co_flags & inspect.CO_COROUTINE:
        asyncio.run(awaited(code, names))
    else:
        exec(code, names)  # noqa: S102


async def awaited(code: Any, names: dict[str, Any]) -> None:
    """Runs a block beside a vector that was started and reset, if it uses one."""
    async with aiovec.make_vec("CartPole-v1", num_envs=NUM_ENVS, vector_kwargs={"num_workers": 2}) as envs:
        await envs.reset(seed=1)
        names |= {"envs": envs, "actions": np.zeros(NUM_ENVS, np.int64), "policy": policy}
        await eval(code, names)  # noqa: S307


def policy(observations: Any) -> Any:
    """A batch of actions, whatever the batch."""
    return (np.asarray(observations)[:, 2] > 0).astype(np.int64)


def test_there_is_code() -> None:
    """Else the tests above would be none."""
    assert len(CODE) > 10
    assert len(COMMANDS) > 3


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_there(command: str, tmp_path: Path) -> None:
    """Sessions of nox and extras are looked up; aiovec's own command line is run, for a short time."""
    program, *arguments = command.replace("'", "").split()
    if program == "python3":
        assert arguments[0] == "noxfile.py"
        source = (ROOT / "noxfile.py").read_text()
        assert all(f"def {name}(session" in source for name in re.findall(r"-s (\S+)", command))
    elif program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert arguments[0] == "install"
        assert {*re.findall(r"[a-z]+", arguments[-1])} <= extras.keys()
    else:
        assert program == "aiovec"
        short = ["--seconds", "0.05"] if arguments[0] == "bench" else []
        done = subprocess.run(
            [sys.executable, "-m", "aiovec", *arguments, *short],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_links_lead_somewhere() -> None:
    """Pictures and files that the README names are in the repository."""
    linked = re.findall(r"\]\(([^)#]+)\)", README)
    assert linked
    for path in [*linked, *re.findall(r"`(examples/\w+\.\w+)`", README)]:
        assert (ROOT / path).exists(), path
