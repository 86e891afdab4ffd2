"""What makes a suite that starts a thousand workers quick."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module", autouse=True)
def nothing_old_to_collect() -> Iterator[None]:
    """A forked worker begins with a collection: it need not walk, and so copy, all that pytest has loaded."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
