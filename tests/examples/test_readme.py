"""Every piece of code in the README runs, and every command in it is there; for those on Ray see `tests/ray`."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from readme_code import BLOCKS, README, ROOT, line_of, python_blocks, run_block

CODE = python_blocks(on_ray=False)
COMMANDS = [
    line.removeprefix("$ ").partition("  #")[0].strip()
    for block in BLOCKS
    if block[1] == "console"
    for line in block[2].splitlines()
    if line.startswith("$ ")
]


@pytest.mark.blocks_loop  # by pictures that are drawn, and whatever a user's own code does
@pytest.mark.parametrize("block", CODE, ids=[f"line {line_of(block)}" for block in CODE])
def test_code_runs(block: re.Match[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it stands there."""
    monkeypatch.chdir(tmp_path)
    run_block(block)


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
