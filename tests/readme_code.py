"""The README's pieces of code, each of which is a test."""

from __future__ import annotations

import ast
import asyncio
import inspect
import re
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

import aiovec

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = list(re.finditer(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL))
NUM_ENVS = 8


def python_blocks(*, on_ray: bool) -> list[re.Match[str]]:
    """Those that need Ray, or those that do not."""
    needs_ray = re.compile(r'"ray"|^import ray$', re.MULTILINE)
    return [block for block in BLOCKS if block[1] == "python" and bool(needs_ray.search(block[2])) is on_ray]


def line_of(block: re.Match[str]) -> int:
    """Where in the README a block begins."""
    return README.count("\n", 0, block.start()) + 2


def run_block(block: re.Match[str]) -> None:
    """With the names that the README says are there; where it awaits, in an event loop."""
    names: dict[str, Any] = {"aiovec": aiovec, "asyncio": asyncio, "gym": gym, "np": np, "__name__": "readme"}
    code = compile(
        "\n" * (line_of(block) - 1) + block[2], str(ROOT / "README.md"), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
    )
    if code.co_flags & inspect.CO_COROUTINE:
        asyncio.run(_awaited(code, names))
    else:
        exec(code, names)  # noqa: S102


async def _awaited(code: Any, names: dict[str, Any]) -> None:
    """Runs a block beside a vector that was started and reset, if it uses one."""
    async with aiovec.make_vec("CartPole-v1", num_envs=NUM_ENVS, vector_kwargs={"num_workers": 2}) as envs:
        await envs.reset(seed=1)
        names |= {"envs": envs, "actions": np.zeros(NUM_ENVS, np.int64), "policy": _policy}
        await eval(code, names)  # noqa: S307


def _policy(observations: Any) -> Any:
    """A batch of actions, whatever the batch."""
    return (np.asarray(observations)[:, 2] > 0).astype(np.int64)
