"""The pictures of the README are drawn by the script beside them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def test_pictures_are_drawn(tmp_path: Path) -> None:
    """From any measurement, rows without a comparison among them."""
    measured = tmp_path / "bench.json"
    row = {"name": "step, 64 CartPole", "num_envs": 64, "bare_seconds": 2e-4, "limit_seconds": 3e-4}
    rows = [row | {"aiovec_seconds": 4e-4, "gymnasium_seconds": 6e-3}, row | {"aiovec_seconds": 4e-4}]
    rows[1] |= {"name": "step, 1024 CartPole", "gymnasium_seconds": None}
    measured.write_text(json.dumps({"heading": "a machine", "rows": rows}))
    command = [sys.executable, str(DOCS / "pictures.py"), "--bench", str(measured), "--to", str(tmp_path)]
    subprocess.run(command, check=True, timeout=100)
    for name, words in (("bench.svg", ["64 CartPole", "160,000", "10,667"]), ("architecture.svg", ["worker 1"])):
        picture = (tmp_path / name).read_text()
        assert all(word in picture for word in words), name
