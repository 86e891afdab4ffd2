"""What `aiovec doctor` looks at: what this machine gives a vector, what is missing, and what to do about it.

Each check is a function of the system's root folder, where it reads files, so that it can be tried with another one.
"""

from __future__ import annotations

import asyncio
import errno
import importlib.metadata
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
import numpy as np

import aiovec
from aiovec.exchange.cgroups import cgroup_limits, cpu_quota, memory_limit, read_file
from aiovec.pool.cpus import allowed_cpus, usable_cpus
from aiovec.vector_env import AsyncVectorEnv

__all__ = ["Finding", "examine", "package_versions"]

Verdict = Literal["ok", "note", "problem"]

# Of this process, by worker: its sockets, pipes, pidfd and memory files; and a reserve for the program itself.
_DESCRIPTORS_PER_WORKER, _OTHER_DESCRIPTORS = 8, 64
_SHM = "/dev/shm"  # noqa: S108  it is only looked at
_LITTLE_MEMORY_NBYTES = 1 << 30
_START_METHODS: tuple[Literal["fork", "forkserver", "spawn"] | None, ...] = (None, "fork", "forkserver", "spawn")
_PACKAGES = ("aiovec", "gymnasium", "numpy", "anyio", "tblib", "cloudpickle")
_OTHER_PACKAGES = ("uvloop", "greenlet", "torch", "ale-py", "pillow")
_SECONDS_OF_A_START = 60.0
_SECONDS_OF_AN_END = 5.0
# A worker that is stuck in C code, with Python's lock held: a thread of its own could not end it.
_STUCK_WORKER = """
import ctypes, os, sys
sys.path.insert(0, sys.argv[1])
from aiovec.worker.lifeline import hold_lifeline
pause = ctypes.PyDLL(None).pause
hold_lifeline(int(sys.argv[2]), int(sys.argv[3]))
os.write(1, b"x")
pause()
"""


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
    yield from (system(), container(root, os.environ), versions(), cpus(root), memory(root), shared_memory(root))
    yield from (memory_files(), descriptors(), processes(root), pidfds(), lifelines())
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


def container(root: Path, environ: Mapping[str, str]) -> Finding:
    """What this runs in, by the marks that such things leave."""
    marks = (
        ("Docker", (root / ".dockerenv").exists()),
        ("Podman", (root / "run/.containerenv").exists()),
        ("Kubernetes", "KUBERNETES_SERVICE_HOST" in environ),
        ("a Slurm job", "SLURM_JOB_ID" in environ),
        ("WSL", "microsoft" in (read_file(root / "proc/sys/kernel/osrelease") or "").lower()),
    )
    found = ", ".join(name for name, is_there in marks if is_there) or "none seen"
    if os.getpid() == 1:
        advice = "This is process 1, which must reap what others leave: `docker run --init` does it."
        return Finding("container", "note", found, advice)
    return Finding("container", "ok", found)


def package_versions() -> dict[str, str]:
    """Of Python, and of the packages that are there; a source tree of aiovec has none of its own."""
    found = {"python": platform.python_version()}
    for name in (*_PACKAGES, *_OTHER_PACKAGES):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def versions() -> Finding:
    """Python and the packages."""
    versions_found = package_versions()
    found = ", ".join(f"{name} {version}" for name, version in versions_found.items())
    missing = [name for name in _PACKAGES[1:] if name not in versions_found]
    if missing:
        return Finding("versions", "problem", found, f"Install {', '.join(missing)}.")
    return Finding("versions", "ok", found)


def cpus(root: Path) -> Finding:
    """Those that this process may use, against those that are there."""
    found, quota = f"{allowed_cpus()} of {os.cpu_count() or 1} usable", cpu_quota(root)
    if quota is not None:
        found += f", a cgroup quota of {quota:g}"
    if usable_cpus(root) == 1:
        return Finding("CPUs", "note", found, "With one CPU num_workers=0 is often fastest: `aiovec bench` tells.")
    return Finding("CPUs", "ok", found)


def memory(root: Path) -> Finding:
    """What is free of the machine's, or of the cgroup's limit."""
    free = next(
        (
            1024 * int(line.split()[1])
            for line in (read_file(root / "proc/meminfo") or "").splitlines()
            if line.startswith("MemAvailable:")
        ),
        None,
    )
    limit, used = memory_limit(root) or (None, 0)
    found = "unknown" if free is None else f"{_gigabytes(free)} free"
    if limit is not None:
        found += f", a cgroup limit of {_gigabytes(limit)} of which {_gigabytes(used)} are used"
        free = limit - used if free is None else min(free, limit - used)
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


def processes(root: Path) -> Finding:
    """How many, threads included, the user and the cgroup may have."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    found, few = "no limit for this user", 64 + 2 * usable_cpus()
    advice: list[str] = []
    if soft != resource.RLIM_INFINITY:
        found = f"{soft:,} for this user"
        if soft < few:
            advice.append("`ulimit -u`")
    limits = cgroup_limits(root, "pids", ("pids.max",), ("pids.current",))
    if limits:
        _, most, used = min(limits, key=lambda found: found[1] - found[2])
        found += f", {most:,} for this cgroup of which {used:,} are there"
        if most - used < few:
            advice.append("`docker run --pids-limit`")
    if advice:
        return Finding(
            "processes", "note", found, f"A worker has some four threads; raise it by {' and '.join(advice)}."
        )
    return Finding("processes", "ok", found)


def pidfds() -> Finding:
    """By what the end of a process is noticed, whoever holds its pipes open."""
    try:
        if hasattr(os, "pidfd_open"):
            os.close(os.pidfd_open(os.getpid()))
            return Finding("pidfd", "ok", "works")
        found = "not there"
    except OSError as error:
        found = f"{errno.errorcode.get(error.errno or 0)}: {error.strerror}"
    advice = (
        "A thread waits for each worker instead. Linux has it from 5.3; a container's seccomp profile may forbid it."
    )
    return Finding("pidfd", "note", found, advice)


def lifelines() -> Finding:
    """Whether a worker that is stuck in C code ends with its parent: tried, with a pipe that is closed."""
    root = str(Path(aiovec.__file__).parent.parent)
    lifeline, ours = os.pipe()
    try:
        command = [sys.executable, "-P", "-c", _STUCK_WORKER, root, str(lifeline), str(os.getpid())]
        with subprocess.Popen(  # noqa: S603  our own interpreter
            command, stdout=subprocess.PIPE, pass_fds=[lifeline], env=os.environ | {"AIOVEC_WORKER": "1"}
        ) as worker:
            assert worker.stdout is not None  # noqa: S101
            is_ready = worker.stdout.read(1) == b"x"
            os.close(ours)
            ours = -1
            try:
                code = worker.wait(_SECONDS_OF_AN_END)
            except subprocess.TimeoutExpired:
                worker.kill()
                code = 0
    finally:
        for fd in (lifeline, ours):
            if fd >= 0:
                os.close(fd)
    if is_ready and code == -signal.SIGKILL:
        return Finding("lifelines", "ok", "a worker that is stuck in C ends with its parent")
    found = "a worker that is stuck in C outlives its parent" if is_ready else f"it ended by itself, with code {code}"
    advice = "Where this program is killed, look for processes that it left: this system has no F_SETSIG that works."
    return Finding("lifelines", "note", found, advice)


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
        vector = AsyncVectorEnv([_Trivial] * 2, num_workers=2, context=method)
        async with asyncio.timeout(_SECONDS_OF_A_START), vector as envs:
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


def _gigabytes(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB"
