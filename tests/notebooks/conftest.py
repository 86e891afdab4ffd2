"""A kernel for each test, which knows nothing of those that this machine has."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from jupyter_core.utils import ensure_event_loop
from notebooks.kernels import Kernel, make_kernelspec


@pytest.fixture(autouse=True)
def jupyter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A Jupyter whose one kernel is the running interpreter, and which leaves its files in the test's own directory."""
    for name in ("JUPYTER_PATH", "JUPYTER_DATA_DIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):
        folder = tmp_path / name.lower()
        folder.mkdir()
        monkeypatch.setenv(name, str(folder))
    make_kernelspec(tmp_path / "jupyter_path")
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")  # CartPole is drawn without a screen
    loop = ensure_event_loop()  # that of Jupyter's blocking calls, which do not close it
    yield
    asyncio.set_event_loop(None)
    loop.close()


@pytest.fixture
def kernel() -> Iterator[Kernel]:
    """A Jupyter kernel; it was told nothing yet."""
    with Kernel() as kernel:
        yield kernel
