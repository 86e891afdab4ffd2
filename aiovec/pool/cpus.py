"""How many CPUs there are for us."""

from __future__ import annotations

import os
from pathlib import Path

from aiovec.exchange.cgroups import cpu_quota

__all__ = ["allowed_cpus", "usable_cpus"]


def allowed_cpus() -> int:
    """How many CPUs this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def usable_cpus(root: Path = Path("/")) -> int:
    """How many it may keep busy: a container's quota may be less than the CPUs that it sees; rounded down, at least 1.

    Args:
        root: Where the system's files are.
    """
    allowed, quota = allowed_cpus(), cpu_quota(root)
    return allowed if quota is None else max(1, min(allowed, int(quota)))
