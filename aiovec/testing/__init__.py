"""For tests of what is built on aiovec: an env that fails on demand.

`import aiovec` does not import it.
"""

from __future__ import annotations

from aiovec.testing.faulty_env import FaultyEnv

__all__ = ["FaultyEnv"]
