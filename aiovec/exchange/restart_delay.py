"""How long to wait before an env that fails again and again is built anew."""

from __future__ import annotations

__all__ = ["restart_delay"]

_FIRST_SECONDS = 0.1
_LONGEST_SECONDS = 5.0


def restart_delay(failures_in_a_row: int) -> float:
    """Seconds: none after the first failure, then 0.1, doubled each time, at most 5."""
    if failures_in_a_row < 2:
        return 0.0
    return float(min(_FIRST_SECONDS * 2 ** (failures_in_a_row - 2), _LONGEST_SECONDS))
