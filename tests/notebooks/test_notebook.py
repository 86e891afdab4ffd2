"""`examples/notebook.ipynb`, read from top to bottom in a Jupyter kernel, as a user does."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from notebooks.kernels import BOUND_SECONDS, NAME, Cell

NOTEBOOK = Path(__file__).parents[2] / "examples" / "notebook.ipynb"


def code_cells() -> tuple[Any, list[Any]]:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    return notebook, [cell for cell in notebook.cells if cell.cell_type == "code"]


def picture(cell: Cell) -> Any:
    """The pixels of the last thing that a cell displayed."""
    from PIL import Image

    with Image.open(io.BytesIO(base64.b64decode(cell.data[-1]["image/png"]))) as image:
        return np.asarray(image)


def test_it_is_committed_without_outputs() -> None:
    notebook, cells = code_cells()
    assert notebook.nbformat >= 4
    for cell in cells:
        assert cell.outputs == []
        assert cell.execution_count is None


def test_each_cell_shows_what_the_text_beside_it_says() -> None:
    for module in ("ale_py", "pygame"):
        pytest.importorskip(module, reason="the notebook's environments: pip install 'aiovec[examples]'")
    notebook, cells = code_cells()
    NotebookClient(notebook, kernel_name=NAME, timeout=int(BOUND_SECONDS)).execute()
    shown: dict[str, Cell] = {}
    for cell in cells:
        shown[cell.id] = Cell()
        for output in cell.outputs:
            shown[cell.id].take(output.output_type, output)
    assert [name for name, cell in shown.items() if cell.error] == ["error"]

    assert "<td" in shown["start"].data[-1]["text/html"]
    assert shown["start"].text == "AsyncVectorEnv(CartPole-v1, num_envs=9, num_workers=2, started)"
    assert re.fullmatch(r"\(\(9, 4\), np\.float64\(\d\.0\)\)", shown["step"].text)

    assert shown["frames"].text == "<Frames num_envs=9 mosaic=1808x1208>"
    assert picture(shown["frames"]).shape == (604, 904, 3)
    assert shown["look"].text == "<Frames num_envs=3 mosaic=1808x400>"
    assert re.fullmatch(r"reward: \d+\.0\n5,400 steps; .*\n", shown["statistics"].stdout)
    assert shown["close"].text.endswith(", closed)")

    assert shown["own"].text == "array([50., 50.,  0.], dtype=float32)"
    assert shown["error"].ename == "RuntimeError"
    assert re.search(r"^-+> \d+ +raise RuntimeError\(f\"no fuel left", shown["error"].error, re.MULTILINE)
    assert "raised by env 1 during step" in shown["error"].error
    assert shown["again"].text == "array([100.,  50.,  50.], dtype=float32)"
    assert "not within half a second\n" in shown["slow"].stdout
    # On a machine that has no time, the line comes only after the half second.
    assert re.search(r"\[aiovec worker 0\] too hot: cooling down\n", shown["slow"].stdout + shown["after-slow"].stdout)
    assert shown["after-slow"].text == "array([50., 50., 50.], dtype=float32)"

    assert shown["breakout"].text == "<Frames num_envs=6 mosaic=488x424>"
    assert len(np.unique(picture(shown["breakout"]).reshape(-1, 3), axis=0)) >= 8
