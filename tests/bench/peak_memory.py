"""How much memory a rollout takes: run by `table.py` in a process of its own, ``python peak_memory.py aiovec``."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import bench_envs
import contestants

import aiovec

NUM_STEPS = NUM_ENVS = 32
FRAME_NBYTES = 210 * 160 * 3


def resident_nbytes(peak: bool) -> int:
    """Of this process: now, or at most until now."""
    name = "VmHWM:" if peak else "VmRSS:"
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])


async def with_aiovec(rows: list[object]) -> tuple[int, int]:
    """Bytes above those before, and of the slab."""
    async with aiovec.AsyncVectorEnv([bench_envs.breakout] * NUM_ENVS, num_workers=2) as envs:
        await envs.reset(seed=0)
        before = resident_nbytes(peak=False)
        rollout = await envs.rollout(lambda _observations: rows[0], NUM_STEPS)
        assert rollout.observations.nbytes == (NUM_STEPS + 1) * NUM_ENVS * FRAME_NBYTES
        assert int(rollout.observations.max()) > 0  # every page is this process's too
        arrays = (rollout.observations, rollout.actions, rollout.rewards, rollout.terminations, rollout.truncations)
        return resident_nbytes(peak=True) - before, sum(array.nbytes for array in arrays)


def with_gymnasium(rows: list[object]) -> tuple[int, int]:
    """Bytes above those before, and of what is kept at the end."""
    envs = contestants.Gymnasium(bench_envs.breakout, NUM_ENVS, rows)
    envs.run(1)
    before = resident_nbytes(peak=False)
    envs.run_rollout(NUM_STEPS)
    peak = resident_nbytes(peak=True) - before
    envs.close()
    return peak, (NUM_STEPS + 1) * NUM_ENVS * FRAME_NBYTES


if __name__ == "__main__":
    name = sys.argv[1]
    rows = contestants.action_rows(bench_envs.breakout, NUM_ENVS)
    peak, nbytes = asyncio.run(with_aiovec(rows)) if name == "aiovec" else with_gymnasium(rows)
    print(f"{name} {peak / 1e6:.0f} MB for {nbytes / 1e6:.0f} MB, {peak / nbytes:.2f} ×")
