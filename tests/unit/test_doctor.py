"""What `aiovec doctor` says of machines that were made up."""

from __future__ import annotations

import errno
import os
import resource
from pathlib import Path
from typing import Any

import pytest

from aiovec import doctor
from aiovec.pool import cpus


def machine(root: Path, files: dict[str, str]) -> Path:
    """A root folder with some of the system's files."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "allowed", "usable", "says"),
    [
        ({}, 8, 8, "8 of"),
        ({"sys/fs/cgroup/cpu.max": "max 100000\n"}, 8, 8, "8 of"),
        ({"sys/fs/cgroup/cpu.max": "250000 100000\n"}, 8, 2, "a cgroup quota of 2.5"),
        ({"sys/fs/cgroup/cpu.max": "800000 100000\n"}, 8, 8, "a cgroup quota of 8"),
        ({"sys/fs/cgroup/cpu.max": "1600000 100000\n"}, 8, 8, "a cgroup quota of 16"),
        (
            {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "50000", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"},
            2,
            1,
            "a cgroup quota of 0.5",
        ),
        (
            {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"},
            2,
            2,
            "2 of",
        ),
        (
            {  # the limit of the folder above it, and none of another's
                "proc/self/cgroup": "0::/jobs/mine\n",
                "sys/fs/cgroup/jobs/mine/cpu.max": "max 100000",
                "sys/fs/cgroup/jobs/cpu.max": "150000 100000",
                "sys/fs/cgroup/others/cpu.max": "100000 100000",
            },
            8,
            1,
            "a cgroup quota of 1.5",
        ),
        (
            {
                "proc/self/cgroup": "9:name=systemd:/\n3:cpu,cpuacct:/docker/mine\n0::/\n",
                "sys/fs/cgroup/cpu/docker/mine/cpu.cfs_quota_us": "200000",
                "sys/fs/cgroup/cpu/docker/mine/cpu.cfs_period_us": "100000",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            8,
            2,
            "a cgroup quota of 2",
        ),
        (  # a container: the kernel tells the host's path, and what is mounted is our own
            {"proc/self/cgroup": "0::/docker/4711\n", "sys/fs/cgroup/cpu.max": "300000 100000"},
            8,
            3,
            "a cgroup quota of 3",
        ),
        ({"proc/self/cgroup": "0::/../..\n", "sys/fs/cgroup/cpu.max": "\n"}, 8, 8, "8 of"),
        ({}, 1, 1, "1 of"),
    ],
)
def test_cpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], allowed: int, usable: int, says: str
) -> None:
    """Both versions of cgroups; the default of `num_workers` is what they leave."""
    for module in (doctor, cpus):
        monkeypatch.setattr(module, "allowed_cpus", lambda: allowed)
    root = machine(tmp_path, files)
    assert cpus.usable_cpus(root) == usable
    finding = doctor.cpus(root)
    assert says in finding.found
    assert finding.verdict == ("note" if usable == 1 else "ok")
    assert bool(finding.advice) is (usable == 1)


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
        (
            {  # pages of files are not in the way
                "proc/meminfo": "MemAvailable: 8000000 kB\n",
                "sys/fs/cgroup/memory.max": "2000000000",
                "sys/fs/cgroup/memory.current": "1900000000",
                "sys/fs/cgroup/memory.stat": "anon 200000000\ninactive_file 1700000000\n",
            },
            "ok",
            "a cgroup limit of 2.00 GB of which 0.20 GB are used",
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
        (
            {  # what is left counts, not which limit is lower
                "proc/meminfo": "MemAvailable: 8000000 kB\n",
                "proc/self/cgroup": "4:memory:/job\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "5000000000",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "4900000000",
                "sys/fs/cgroup/memory/job/memory.limit_in_bytes": "4000000000",
                "sys/fs/cgroup/memory/job/memory.usage_in_bytes": "1000000000",
            },
            "note",
            "a cgroup limit of 5.00 GB of which 4.90 GB are used",
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


@pytest.mark.parametrize(
    ("soft", "files", "verdict", "says"),
    [
        (resource.RLIM_INFINITY, {}, "ok", "no limit for this user"),
        (30_000, {}, "ok", "30,000 for this user"),
        (20, {}, "note", "20 for this user"),
        (
            30_000,
            {"sys/fs/cgroup/pids.max": "100", "sys/fs/cgroup/pids.current": "90"},
            "note",
            "100 for this cgroup of which 90 are there",
        ),
        (
            30_000,
            {
                "proc/self/cgroup": "8:pids:/job\n",
                "sys/fs/cgroup/pids/pids.max": "max",
                "sys/fs/cgroup/pids/job/pids.max": "5000",
                "sys/fs/cgroup/pids/job/pids.current": "10",
            },
            "ok",
            "5,000 for this cgroup of which 10 are there",
        ),
    ],
)
def test_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, soft: int, files: dict[str, str], verdict: str, says: str
) -> None:
    """The limits of the user and of the cgroup."""
    monkeypatch.setattr(resource, "getrlimit", lambda _which: (soft, soft))
    finding = doctor.processes(machine(tmp_path, files))
    assert (finding.verdict, says in finding.found) == (verdict, True)
    assert ("pids-limit" in finding.advice) is (verdict == "note" and bool(files))
    assert ("ulimit -u" in finding.advice) is (soft == 20)


def test_pidfds(monkeypatch: pytest.MonkeyPatch) -> None:
    """An old kernel has none."""
    assert doctor.pidfds().verdict == "ok"

    def missing(_pid: int) -> int:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(os, "pidfd_open", missing)
    finding = doctor.pidfds()
    assert (finding.verdict, finding.found) == ("note", "ENOSYS: Function not implemented")
    monkeypatch.delattr(os, "pidfd_open")
    assert doctor.pidfds().found == "not there"


def test_lifelines() -> None:
    """Tried for real."""
    assert doctor.lifelines().verdict == "ok"


@pytest.mark.parametrize(
    ("worker", "says"),
    [
        ("import os, time; os.write(1, b'x'); time.sleep(60)", "outlives its parent"),
        ("raise SystemExit(3)", "ended by itself, with code 3"),
    ],
)
def test_lifelines_that_do_not_hold(monkeypatch: pytest.MonkeyPatch, worker: str, says: str) -> None:
    """On a system whose kernel sends nothing; and nothing is left of the trial."""
    monkeypatch.setattr(doctor, "_STUCK_WORKER", worker)
    monkeypatch.setattr(doctor, "_SECONDS_OF_AN_END", 0.2)
    finding = doctor.lifelines()
    assert (finding.verdict, says in finding.found) == ("note", True)


@pytest.mark.parametrize(
    ("files", "environ", "found"),
    [
        ({}, {}, "none seen"),
        ({".dockerenv": ""}, {}, "Docker"),
        ({"run/.containerenv": ""}, {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, "Podman, Kubernetes"),
        ({}, {"SLURM_JOB_ID": "7"}, "a Slurm job"),
        ({"proc/sys/kernel/osrelease": "5.15.90.1-microsoft-standard-WSL2"}, {}, "WSL"),
    ],
)
def test_container(tmp_path: Path, files: dict[str, str], environ: dict[str, str], found: str) -> None:
    """By what such things leave."""
    assert doctor.container(machine(tmp_path, files), environ) == doctor.Finding("container", "ok", found)


def test_container_without_an_init(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What workers' children leave has nobody who reaps it."""
    monkeypatch.setattr(os, "getpid", lambda: 1)
    assert "--init" in doctor.container(tmp_path, {}).advice


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
