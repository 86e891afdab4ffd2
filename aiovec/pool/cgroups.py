"""What this process's control groups say; of both versions, and where there are none, nothing."""

from __future__ import annotations

from pathlib import Path

__all__ = ["cgroup_folders", "cpu_quota", "read_file"]


def cgroup_folders(root: Path, controller: str) -> list[Path]:
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
    for folder in cgroup_folders(root, "cpu"):
        quota, _, period = (read_file(folder / "cpu.max") or "").partition(" ")  # version 2: "150000 100000"
        if not quota:
            quota, period = read_file(folder / "cpu.cfs_quota_us") or "", read_file(folder / "cpu.cfs_period_us") or ""
        if quota.isdigit() and period.isdigit():  # not "max", nor version 1's "-1"
            quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def read_file(path: Path) -> str | None:
    """One of the system's small files; `None` where there is none, or none for us."""
    try:
        return path.read_text().strip()
    except OSError:
        return None
