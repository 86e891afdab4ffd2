"""How envs are shared out to workers, and those of a worker to groups."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from aiovec.exchange.groups import EVERY_ENV, MOST_GROUPS, group_code, index_in, rows_of_group, split_evenly


@given(st.integers(1, 300), st.data())
def test_a_split_is_contiguous_and_even(num_envs: int, data: st.DataObject) -> None:
    """All envs once, in order; no worker has more than one env above another."""
    shares = split_evenly(num_envs, data.draw(st.integers(1, num_envs)))
    assert [index for ids in shares for index in ids] == list(range(num_envs))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@given(st.integers(1, MOST_GROUPS), st.data())
def test_a_group_is_one_number(num_groups: int, data: st.DataObject) -> None:
    """It says which rows of a worker, however many that has; two bytes are enough."""
    num_rows = data.draw(st.integers(num_groups, 600))
    codes = [group_code(index, num_groups) for index in range(num_groups)]
    assert [rows_of_group(code, num_rows) for code in codes] == split_evenly(num_rows, num_groups)
    assert [index_in(code) for code in codes] == list(range(num_groups))
    assert EVERY_ENV not in codes
    assert max(codes) < 1 << 16


def test_no_group_is_every_env() -> None:
    assert rows_of_group(EVERY_ENV, 5) == range(5)
    assert index_in(EVERY_ENV) == 0
