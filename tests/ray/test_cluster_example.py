"""The example of a cluster, as a user runs it: a node is killed, the run goes on, and nothing of Ray is left."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from example_runs import EXAMPLES

pytest.importorskip("ray", reason="Ray is not installed: `pip install aiovec[ray]`")

ENDS_WITHIN_SECONDS = 200
GONE_WITHIN_SECONDS = 15.0


@pytest.fixture
def session_folder() -> Iterator[str]:
    """Where the example's Ray has its files; a path of pytest's own is too long for the names of its sockets."""
    with tempfile.TemporaryDirectory(prefix="aiovec-ray-", dir="/tmp") as folder:
        yield folder


@pytest.mark.timeout(300)
def test_cluster(tmp_path: Path, session_folder: str) -> None:
    arguments = ["--num-envs=6", "--kill-after=1000", "--max-steps=2000", "--population=8"]
    ended = subprocess.run(
        [sys.executable, str(EXAMPLES / "cluster.py"), *arguments],
        cwd=tmp_path,
        env=os.environ | {"RAY_TMPDIR": session_folder},
        capture_output=True,
        text=True,
        timeout=ENDS_WITHIN_SECONDS,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert "Traceback" not in ended.stderr
    assert_nothing_of_ray_is_left(session_folder)
    printed = ended.stdout

    placed = re.findall(r"^  envs (\d) to (\d) are on node (\w{12})$", printed, re.MULTILINE)
    killed = re.findall(r"^Killing node (\w{12}), at env step ([\d,]+)\.$", printed, re.MULTILINE)
    assert len(killed) == 1
    node, at_step = killed[0][0], int(killed[0][1].replace(",", ""))
    assert at_step >= 1000
    before, after = placed[:2], placed[2:]
    assert [env_ids for *env_ids, _node in sorted(before)] == [["0", "2"], ["3", "5"]]
    lost = [(first, last) for first, last, place in before if place == node]
    kept = [place for _first, _last, place in before if place != node]
    assert (len(lost), len(kept)) == (1, 1)

    first, last = lost[0]
    died = rf"^WorkerDied: the worker of envs {first}-{last} \(pid \d+, on Ray node {node} at [^,]+, actor \w{{12}}\) died "
    assert re.search(died, printed, re.MULTILINE)
    assert "What Ray says of it: " in printed
    assert "  its 3 rows: rewards [nan nan nan], truncated True" in printed
    masked = re.search(r"^Masked out: (\d+) transitions\.", printed, re.MULTILINE)
    assert masked is not None
    assert int(masked[1]) >= 3
    assert int(masked[1]) % 3 == 0  # whole workers, if Ray was slow to see that the node is gone

    assert re.search(r"^All envs are there again, [\d.]+ s after the kill:$", printed, re.MULTILINE)
    assert after == [("0", "5", kept[0])]
    assert re.search(rf"^  node {kept[0]}: alive, 2 CPUs$", printed, re.MULTILINE)
    assert re.search(rf"^  node {node}: dead, ", printed, re.MULTILINE)
    assert re.search(r"^before [\d,]+, while envs were lost [\d,]+, after [1-9][\d,]*$", printed, re.MULTILINE)
    steps = re.fullmatch(r"(?:not )?solved: ([\d,]+) env steps, .*", printed.splitlines()[-1])
    assert steps is not None
    assert int(steps[1].replace(",", "")) >= at_step + 2000


def assert_nothing_of_ray_is_left(session_folder: str) -> None:
    """No process that bears this session in its command line, or has a file of it open."""
    deadline = time.monotonic() + GONE_WITHIN_SECONDS
    while left := processes_of(session_folder):
        assert time.monotonic() < deadline, f"left behind: {left}"
        time.sleep(0.1)


def processes_of(session_folder: str) -> dict[int, str]:
    """By id, what they are; Ray's Python processes have a title in place of their command line."""
    found: dict[int, str] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended meanwhile, or is not ours to look at
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if session_folder in command or any(
                session_folder in os.readlink(descriptor) for descriptor in (folder / "fd").iterdir()
            ):
                found[int(folder.name)] = command
    return found
