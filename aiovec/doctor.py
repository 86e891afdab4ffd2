"""What `aiovec doctor` looks at: what this machine gives a vector, what is missing, and what to do about it.

Each check is a function of the system's root folder, where it reads files, so that it can be tried with another one.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import importlib.metadata
import os
import platform
import resource
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
import numpy as np

from aiovec.pool.pool import usable_cpus
from aiovec.vector_env import AsyncVectorEnv

__all__ = ["Finding", "examine"]

Verdict = Literal["ok", "note", "problem"]

# Of this process, by worker: its sockets, pipes, pidfd and memory files; and a reserve for the program itself.
_DESCRIPTORS_PER_WORKER, _OTHER_DESCRIPTORS = 8, 64
_SHM = "/dev/shm"  # noqa: S108  it is only looked at
_LITTLE_MEMORY_NBYTES = 1 << 30
_START_METHODS: tuple[Literal["fork", "forkserver", "spawn"] | None, ...] = (None, "fork", "forkserver", "spawn")
_PACKAGES = ("aiovec", "gymnasium", "numpy", "anyio", "tblib", "cloudpickle")
_OTHER_PACKAGES = ("uvloop", "greenlet", "torch", "ale-py", "pillow")


@dataclass(frozen=True)
class Finding:
    """What one check has found.

    Attributes:
        check: Its name.
        verdict: ``"ok"``, ``"note"``: works, with something to know, or ``"problem"``.
        found: The facts.
        advice: What to do; empty where there is nothing.
    """

    check: str
    verdict: Verdict
    found: str
    advice: str = ""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def examine(root: Path = Path("/")) -> Iterator[Finding]:
    """Makes all checks, one after the other; those of starts take some tenths of a second each."""
    yield from (system(), versions(), cpus(root), memory(root), shared_memory(root), memory_files())
    yield from (descriptors(), processes(), lifelines())
    for method in _START_METHODS:
        yield start(method)


def system() -> Finding:
    """The operating system."""
    found = f"{platform.system()} {platform.release()}, {platform.machine()}"
    if platform.system() == "Linux":
        return Finding("system", "ok", found)
    if platform.system() == "Darwin":
        return Finding("system", "note", found, "macOS works by fall-backs that are not tested: tell us what you see.")
    return Finding("system", "problem", found, "Use Linux, on Windows in WSL 2.")


def versions() -> Finding:
    """Python and the packages."""
    found = [f"Python {platform.python_version()}"]
    missing: list[str] = []
    for name in (*_PACKAGES, *_OTHER_PACKAGES):
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            if name in _PACKAGES[1:]:  # a source tree has no version of its own
                missing.append(name)
    if missing:
        return Finding("versions", "problem", ", ".join(found), f"Install {', '.join(missing)}.")
    return Finding("versions", "ok", ", ".join(found))


def cpus(root: Path) -> Finding:
    """Those that this process may use, against those that are there."""
    usable, there, quota = usable_cpus(), os.cpu_count() or 1, _cpu_quota(root)
    found = f"{usable} of {there} usable"
    if quota is not None:
        found += f", a cgroup quota of {quota:g}"
    if quota is not None and quota < usable:
        number = max(1, int(quota))
        return Finding(
            "CPUs", "note", found, f"Pass num_workers={number}: the default counts CPUs, and the quota gives fewer."
        )
    if usable == 1:
        return Finding("CPUs", "note", found, "With one CPU num_workers=0 is often fastest: `aiovec bench` tells.")
    return Finding("CPUs", "ok", found)


def _cpu_quota(root: Path) -> float | None:
    """How many CPUs' time the cgroup gives; `None`: no limit."""
    quota = _read(root / "sys/fs/cgroup/cpu.max")  # version 2: "max 100000" or "150000 100000"
    if quota is not None:
        most, _, period = quota.partition(" ")
        return None if most == "max" else int(most) / int(period)
    most_v1 = _read(root / "sys/fs/cgroup/cpu/cpu.cfs_quota_us")
    period_v1 = _read(root / "sys/fs/cgroup/cpu/cpu.cfs_period_us")
    if most_v1 is None or period_v1 is None or int(most_v1) <= 0:
        return None
    return int(most_v1) / int(period_v1)


def memory(root: Path) -> Finding:
    """What is free of the machine's, or of the cgroup's limit."""
    free = next(
        (
            1024 * int(line.split()[1])
            for line in (_read(root / "proc/meminfo") or "").splitlines()
            if line.startswith("MemAvailable:")
        ),
        None,
    )
    limit = _first_number(root, "sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory/memory.limit_in_bytes")
    used = _first_number(root, "sys/fs/cgroup/memory.current", "sys/fs/cgroup/memory/memory.usage_in_bytes") or 0
    found = "unknown" if free is None else f"{_gigabytes(free)} free"
    if limit is not None and limit < 1 << 60:  # version 1 says "no limit" by a number of that size
        found += f", a cgroup limit of {_gigabytes(limit)} of which {_gigabytes(used)} are used"
        free = min(free or limit, limit - used)
    if free is not None and free < _LITTLE_MEMORY_NBYTES:
        advice = "A worker takes some 30 MB and what its envs need: use few workers, and small rollouts."
        return Finding("memory", "note", found, advice)
    return Finding("memory", "ok", found)


def shared_memory(root: Path) -> Finding:
    """``/dev/shm``, which aiovec does not need."""
    folder = root / "dev/shm"
    if not folder.is_dir():
        return Finding(_SHM, "note", "not there", "aiovec does not need it; libraries that your envs use may.")
    size = shutil.disk_usage(folder)
    found = f"{_gigabytes(size.total)}, {_gigabytes(size.free)} free"
    if size.total < 1 << 28:
        advice = "aiovec does not use it (its memory is a memfd); for other libraries: `docker run --shm-size=1g`."
        return Finding(_SHM, "note", found, advice)
    return Finding(_SHM, "ok", found)


def memory_files() -> Finding:
    """A memfd, and space in it that is really there."""
    if not hasattr(os, "memfd_create"):
        return Finding("memfd", "note", "not there", "A temporary file takes its place.")
    try:
        fd = os.memfd_create("aiovec-doctor")
        try:
            os.posix_fallocate(fd, 0, 1 << 20)
        finally:
            os.close(fd)
    except OSError as error:
        advice = "Allow memfd_create (a container's seccomp profile may forbid it), or pass shared_memory=False."
        return Finding("memfd", "problem", f"{errno.errorcode.get(error.errno or 0)}: {error.strerror}", advice)
    return Finding("memfd", "ok", "works")


def descriptors() -> Finding:
    """How many workers the limit of open files allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return Finding("descriptors", "ok", "no limit")
    workers = max(0, (soft - _OTHER_DESCRIPTORS) // _DESCRIPTORS_PER_WORKER)
    hard_text = "no limit" if hard == resource.RLIM_INFINITY else f"{hard:,}"
    found = f"{soft:,} open files ({hard_text} at most): some {workers:,} workers"
    if workers < 2 * usable_cpus():
        return Finding(
            "descriptors", "problem", found, "Raise it: `ulimit -n 4096`, or `docker run --ulimit nofile=4096`."
        )
    return Finding("descriptors", "ok", found)


def processes() -> Finding:
    """How many the user may have."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    if soft == resource.RLIM_INFINITY:
        return Finding("processes", "ok", "no limit")
    if soft < 64 + 2 * usable_cpus():
        return Finding("processes", "note", f"{soft:,} for this user", "Raise it where a start fails: `ulimit -u`.")
    return Finding("processes", "ok", f"{soft:,} for this user")


def lifelines() -> Finding:
    """By what workers end with their parent, and their end is noticed."""
    missing = [
        name
        for name, is_there in (
            ("pidfd_open", hasattr(os, "pidfd_open") and _opens_pidfd()),
            ("F_SETSIG", hasattr(fcntl, "F_SETSIG")),
        )
        if not is_there
    ]
    if missing:
        advice = "Workers are ended by a thread of theirs, and their end is noticed by their pipes: upgrade the kernel to 5.4."
        return Finding("lifelines", "note", f"without {', '.join(missing)}", advice)
    return Finding("lifelines", "ok", "pidfd and F_SETSIG work")


def _opens_pidfd() -> bool:
    try:
        os.close(os.pidfd_open(os.getpid()))
    except OSError:
        return False
    return True


class _Trivial(gym.Env[Any, Any]):
    observation_space = gym.spaces.Box(-1, 1, (1,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed, options=options)
        return np.zeros(1, np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return np.full(1, action, np.float32), 1.0, False, False, {}


def start(method: Literal["fork", "forkserver", "spawn"] | None) -> Finding:
    """Starts two workers, steps them once, and closes them."""
    name = f"start, {f'context={method!r}' if method else 'fresh interpreters'}"

    async def step_once() -> tuple[float, list[float]]:
        began = time.perf_counter()
        async with AsyncVectorEnv([_Trivial] * 2, num_workers=2, context=method) as envs:
            await envs.reset(seed=1)
            _, rewards, *_ = await envs.step([0, 1])
            return time.perf_counter() - began, rewards.tolist()

    try:
        seconds, rewards = asyncio.run(step_once())
    except Exception as error:  # noqa: BLE001  whatever it is, it is what was to be found
        verdict: Verdict = "problem" if method is None else "note"
        advice = "Workers do not start: see the limits above." if method is None else "Leave `context` out."
        return Finding(name, verdict, f"{type(error).__name__}: {str(error).partition(chr(10))[0]}", advice)
    if rewards != [1.0, 1.0]:
        return Finding(name, "problem", f"a step gave the rewards {rewards}", "Please report this.")
    return Finding(name, "ok", f"2 workers ready and stepped after {seconds:.2f} s")


def _first_number(root: Path, *paths: str) -> int | None:
    for path in paths:
        text = _read(root / path)
        if text is not None and text != "max":
            return int(text)
    return None


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None


def _gigabytes(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB"
