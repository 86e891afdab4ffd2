"""What this process's control groups say; of both versions, and where there are none, nothing."""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["cgroup_limits", "cpu_quota", "memory_limit", "read_file"]

_NO_LIMIT = 1 << 60  # version 1 says by a number above this that memory has none


def _folders(root: Path, controller: str) -> list[Path]:
    """The folders of this process's cgroup and of those above it, each of which may set a limit.

    In a container the path that the kernel tells may be the host's, which is not there: what is mounted is our own then.
    """
    mount = root / "sys/fs/cgroup"
    mounts = {"": mount, controller: mount / controller}  # version 2 names no controller
    folders: list[Path] = []
    for line in (read_file(root / "proc/self/cgroup") or "").splitlines():
        _, controllers, path = line.split(":", 2)
        for name in controllers.split(","):
            if name in mounts:
                parts = Path(path).parts[1:]
                folders += [mounts[name].joinpath(*parts[:depth]) for depth in range(len(parts), 0, -1)]
    return [*folders, *mounts.values()]


def cpu_quota(root: Path) -> float | None:
    """How many CPUs' time the cgroup gives; `None`: no limit."""
    quotas: list[float] = []
    for folder in _folders(root, "cpu"):
        quota, _, period = (read_file(folder / "cpu.max") or "").partition(" ")  # version 2: "150000 100000"
        if not quota:
            quota, period = read_file(folder / "cpu.cfs_quota_us") or "", read_file(folder / "cpu.cfs_period_us") or ""
        if quota.isdigit() and period.isdigit():  # not "max", nor version 1's "-1"
            quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def cgroup_limits(
    root: Path, controller: str, limits: tuple[str, ...], uses: tuple[str, ...]
) -> list[tuple[Path, int, int]]:
    """Each limit that is set: its folder, the limit, how much of it is used.

    Args:
        root: Where the system's files are.
        controller: Which, by its name in version 1.
        limits: The file with the limit, in version 2 and in version 1.
        uses: The file with what is used, likewise.
    """
    found: list[tuple[Path, int, int]] = []
    for folder in _folders(root, controller):
        limit = _first_number(folder, limits)
        if limit is not None:
            found.append((folder, limit, _first_number(folder, uses) or 0))
    return found


def memory_limit(root: Path) -> tuple[int, int] | None:
    """The limit that leaves least, and how much of it is used, in bytes; `None`: no limit.

    Pages of files count as free, as in `MemAvailable`: the kernel drops them when memory is asked for, and where much is
    read they soon fill any limit.
    """
    names = ("memory.max", "memory.limit_in_bytes"), ("memory.current", "memory.usage_in_bytes")
    limits = [found for found in cgroup_limits(root, "memory", *names) if found[1] < _NO_LIMIT]
    pairs = [(limit, max(0, used - _file_pages_nbytes(folder))) for folder, limit, used in limits]
    return min(pairs, key=lambda pair: pair[0] - pair[1], default=None)


def _file_pages_nbytes(folder: Path) -> int:
    text = read_file(folder / "memory.stat") or ""
    # In version 1 the plain names leave out the groups below, which the limit is for as well.
    prefix = "total_" if "\ntotal_" in text else ""
    return sum(map(int, re.findall(rf"^{prefix}(?:in)?active_file (\d+)$", text, re.MULTILINE)))


def _first_number(folder: Path, names: tuple[str, ...]) -> int | None:
    texts = [read_file(folder / name) for name in names]
    return next((int(text) for text in texts if text is not None and text.isdigit()), None)


def read_file(path: Path) -> str | None:
    """One of the system's small files; `None` where there is none, or none for us."""
    try:
        return path.read_text().strip()
    except OSError:
        return None
