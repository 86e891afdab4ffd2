"""What `aiovec doctor` says of machines that were made up."""

from __future__ import annotations

import os
import resource
from pathlib import Path
from typing import Any

import pytest

from aiovec import doctor


def machine(root: Path, files: dict[str, str]) -> Path:
    """A root folder with some of the system's files."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "usable", "verdict", "says"),
    [
        ({}, 8, "ok", "8 of"),
        ({"sys/fs/cgroup/cpu.max": "max 100000\n"}, 8, "ok", "8 of"),
        ({"sys/fs/cgroup/cpu.max": "250000 100000\n"}, 8, "note", "a cgroup quota of 2.5"),
        ({"sys/fs/cgroup/cpu.max": "800000 100000\n"}, 8, "ok", "a cgroup quota of 8"),
        (
            {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "50000", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"},
            2,
            "note",
            "a cgroup quota of 0.5",
        ),
        (
            {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"},
            2,
            "ok",
            "2 of",
        ),
        ({}, 1, "note", "1 of"),
    ],
)
def test_cpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], usable: int, verdict: str, says: str
) -> None:
    """Both versions of cgroups."""
    monkeypatch.setattr(doctor, "usable_cpus", lambda: usable)
    finding = doctor.cpus(machine(tmp_path, files))
    assert finding.verdict == verdict
    assert says in finding.found
    assert bool(finding.advice) is (verdict != "ok")
    if "quota of 2.5" in finding.found:
        assert "num_workers=2" in finding.advice


@pytest.mark.parametrize(
    ("files", "verdict", "says"),
    [
        ({"proc/meminfo": "MemTotal: 99 kB\nMemAvailable: 8000000 kB\n"}, "ok", "8.19 GB free"),
        ({"proc/meminfo": "MemAvailable: 500000 kB\n"}, "note", "0.51 GB free"),
        (
            {
                "proc/meminfo": "MemAvailable: 8000000 kB\n",
                "sys/fs/cgroup/memory.max": "2000000000",
                "sys/fs/cgroup/memory.current": "1500000000",
            },
            "note",
            "a cgroup limit of 2.00 GB of which 1.50 GB are used",
        ),
        ({"proc/meminfo": "MemAvailable: 8000000 kB\n", "sys/fs/cgroup/memory.max": "max"}, "ok", "8.19 GB free"),
        (
            {
                "proc/meminfo": "MemAvailable: 8000000 kB\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
            },
            "ok",
            "8.19 GB free",
        ),
        ({}, "ok", "unknown"),
    ],
)
def test_memory(tmp_path: Path, files: dict[str, str], verdict: str, says: str) -> None:
    """Of the machine, and of its cgroup."""
    finding = doctor.memory(machine(tmp_path, files))
    assert (finding.verdict, says in finding.found) == (verdict, True)


def test_shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It matters little to aiovec, and that is what is said."""
    assert doctor.shared_memory(tmp_path).verdict == "note"
    (tmp_path / "dev/shm").mkdir(parents=True)
    sizes: list[Any] = []
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _path: sizes[0])
    sizes[:] = [type("Usage", (), {"total": 1 << 26, "free": 1 << 20})()]
    small = doctor.shared_memory(tmp_path)
    assert small.verdict == "note"
    assert "aiovec does not use it" in small.advice
    sizes[:] = [type("Usage", (), {"total": 1 << 33, "free": 1 << 32})()]
    assert doctor.shared_memory(tmp_path).verdict == "ok"


def test_memory_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a seccomp profile forbids them."""
    assert doctor.memory_files().verdict == "ok"

    def forbidden(_name: str) -> int:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "memfd_create", forbidden)
    finding = doctor.memory_files()
    assert finding.verdict == "problem"
    assert "EPERM" in finding.found
    assert "shared_memory=False" in finding.advice


@pytest.mark.parametrize(("soft", "verdict"), [(resource.RLIM_INFINITY, "ok"), (1024, "ok"), (70, "problem")])
def test_descriptors(monkeypatch: pytest.MonkeyPatch, soft: int, verdict: str) -> None:
    """How many workers they are enough for."""
    monkeypatch.setattr(resource, "getrlimit", lambda _which: (soft, soft))
    finding = doctor.descriptors()
    assert finding.verdict == verdict
    if soft == 1024:
        assert "some 120 workers" in finding.found


@pytest.mark.parametrize(("soft", "verdict"), [(resource.RLIM_INFINITY, "ok"), (30_000, "ok"), (20, "note")])
def test_processes(monkeypatch: pytest.MonkeyPatch, soft: int, verdict: str) -> None:
    """The user's limit."""
    monkeypatch.setattr(resource, "getrlimit", lambda _which: (soft, soft))
    assert doctor.processes().verdict == verdict


def test_lifelines(monkeypatch: pytest.MonkeyPatch) -> None:
    """An old kernel has no pidfd."""
    assert doctor.lifelines().verdict == "ok"

    def missing(_pid: int) -> int:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(os, "pidfd_open", missing)
    finding = doctor.lifelines()
    assert finding.verdict == "note"
    assert "pidfd_open" in finding.found


@pytest.mark.parametrize(("name", "verdict"), [("Linux", "ok"), ("Darwin", "note"), ("Windows", "problem")])
def test_system(monkeypatch: pytest.MonkeyPatch, name: str, verdict: str) -> None:
    """What it is, and what that means."""
    monkeypatch.setattr(doctor.platform, "system", lambda: name)
    assert doctor.system().verdict == verdict


def test_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that is missing is a problem, one that is optional is not."""
    version = doctor.importlib.metadata.version
    assert doctor.versions().verdict == "ok"

    def without_tblib(name: str) -> str:
        if name in ("tblib", "uvloop"):
            raise doctor.importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(doctor.importlib.metadata, "version", without_tblib)
    finding = doctor.versions()
    assert (finding.verdict, finding.advice) == ("problem", "Install tblib.")


def test_a_start_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error is what was found."""

    def fails(*_args: Any, **_kwargs: Any) -> Any:
        raise RuntimeError("no process\nmore")

    monkeypatch.setattr(doctor, "AsyncVectorEnv", fails)
    assert doctor.start(None).verdict == "problem"
    finding = doctor.start("fork")
    assert (finding.verdict, finding.found) == ("note", "RuntimeError: no process")
