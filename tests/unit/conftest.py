"""How these tests run: Hypothesis without a deadline, and quickly, since there are many of them."""

from __future__ import annotations

import gc

import pytest
from hypothesis import settings

# Always the same examples: a test that fails does so for everyone. No deadline: a loaded machine stalls.
settings.register_profile("unit", deadline=None, derandomize=True, max_examples=100)
settings.load_profile("unit")


@pytest.fixture(scope="package", autouse=True)
def _quick_collections() -> None:
    """What is imported by now is no garbage: `nothing_left_behind` need not look at it after each test."""
    gc.collect()
    gc.freeze()
