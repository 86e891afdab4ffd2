"""How envs are shared out, in contiguous rows: to workers, and those of each worker to groups that are stepped in turn.

A group is one number in the header of a frame, which says of how many groups it is, too: so a worker that takes a dead
one's place knows all that it needs.
"""

from __future__ import annotations

from itertools import pairwise

__all__ = ["EVERY_ENV", "MOST_GROUPS", "group_code", "index_in", "rows_of_group", "split_evenly"]

EVERY_ENV = 0  # the code of no group
MOST_GROUPS = 255


def split_evenly(count: int, num_parts: int) -> list[range]:
    """Contiguous parts, as even as can be; the larger ones first."""
    share, rest = divmod(count, num_parts)
    bounds = [index * share + min(index, rest) for index in range(num_parts + 1)]
    return [range(start, stop) for start, stop in pairwise(bounds)]


def group_code(index: int, num_groups: int) -> int:
    """The number of a group in a frame."""
    return num_groups << 8 | index


def index_in(code: int) -> int:
    """Which of the groups it is, from 0; 0 for all envs, too."""
    return code & 0xFF


def rows_of_group(code: int, num_rows: int) -> range:
    """The rows of a group, or all, of a worker with so many."""
    return split_evenly(num_rows, code >> 8)[code & 0xFF] if code else range(num_rows)
