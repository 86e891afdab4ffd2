"""How these tests run: Hypothesis without a deadline, and quickly, since there are many of them."""

from __future__ import annotations

from hypothesis import settings

# Always the same examples: a test that fails does so for everyone. No deadline: a loaded machine stalls.
settings.register_profile("unit", deadline=None, derandomize=True, max_examples=100)
settings.load_profile("unit")
