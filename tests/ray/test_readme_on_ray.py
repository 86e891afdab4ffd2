"""The README's pieces of code that need Ray run."""

from __future__ import annotations

import re

import pytest
from readme_code import line_of, python_blocks, run_block

pytest.importorskip("ray", reason="Ray is not installed: `pip install aiovec[ray]`")

CODE = python_blocks(on_ray=True)

pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # Ray's own sockets and processes
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def test_there_is_code() -> None:
    """Else the test below would be none."""
    assert CODE


@pytest.mark.parametrize("block", CODE, ids=[f"line {line_of(block)}" for block in CODE])
def test_code_runs(block: re.Match[str]) -> None:
    """As it stands there."""
    run_block(block)
