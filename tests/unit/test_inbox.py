"""The inbox: each env at most once, rows in the order in which they came, failures before rows, nothing lost."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from aiovec.pool.inbox import Inbox
from aiovec.pool.pending_call import PendingCall
from aiovec.pool.ring import HOME


def call(seq: int) -> PendingCall:
    return PendingCall(seq, "step", True, HOME, (0,), None)


def test_an_empty_one() -> None:
    """Nothing is there, however little is asked for."""
    inbox = Inbox()
    assert not inbox
    assert [*inbox] == []
    assert 0 not in inbox
    assert inbox.calls == set()
    assert not inbox.has_failures
    assert not inbox.has(1)
    assert inbox.first(None) == []
    inbox.remove([0, 1])
    assert repr(inbox) == "<Inbox ready=0 failed=[]>"


def test_rows_come_first_come_first_served() -> None:
    """As many as are asked for; looking takes nothing."""
    inbox, first, second = Inbox(), call(1), call(2)
    inbox.arrive(first, [3, 1])
    inbox.arrive(second, [2])
    assert inbox
    assert [*inbox] == [3, 1, 2]
    assert [inbox.has(count) for count in (1, 3, 4)] == [True, True, False]
    assert inbox.first(2) == inbox.first(2) == [(3, first), (1, first)]
    assert inbox.first(None) == [(3, first), (1, first), (2, second)]
    assert inbox.calls == {1, 2}
    inbox.remove([3, 2, 7])
    assert [*inbox] == [1]
    assert inbox.calls == {1}


def test_who_comes_again_is_the_last() -> None:
    """Else an env that is always quick would keep its place before the others."""
    inbox = Inbox()
    inbox.arrive(call(1), [0, 1])
    inbox.remove([0])
    inbox.arrive(call(2), [0])
    assert [env_index for env_index, _ in inbox.first(None)] == [1, 0]


def test_failures_do_not_wait() -> None:
    """They are all that is given, in ascending env index, and rows are kept until later."""
    inbox, mixed = Inbox(), call(1)
    inbox.arrive(mixed, [2, 0, 3, 1], failed=[3, 0, 9])
    assert inbox.has_failures
    assert inbox.has(100)
    assert 9 not in inbox
    assert inbox.first(1) == [(0, mixed), (3, mixed)]
    assert {*inbox} == {0, 1, 2, 3}
    assert repr(inbox) == "<Inbox ready=2 failed=[0, 3]>"
    inbox.remove([0, 3])
    assert not inbox.has_failures
    assert [env_index for env_index, _ in inbox.first(None)] == [2, 1]


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("arrive"), st.sets(st.integers(0, 5)), st.sets(st.integers(0, 5))),
            st.tuples(st.just("remove"), st.sets(st.integers(0, 5)), st.just(frozenset[int]())),
        ),
        max_size=20,
    )
)
def test_it_is_a_queue_of_envs(operations: list[tuple[str, set[int], set[int]]]) -> None:
    """Against a list of rows and a dict of failures."""
    inbox, rows, failed = Inbox(), list[int](), set[int]()
    for seq, (what, env_ids, failing) in enumerate(operations, 1):
        if what == "arrive":
            new = [env_index for env_index in env_ids if env_index not in inbox]
            inbox.arrive(call(seq), new, failing)
            rows += [env_index for env_index in new if env_index not in failing]
            failed |= failing.intersection(new)
        else:
            inbox.remove(env_ids)
            rows = [env_index for env_index in rows if env_index not in env_ids]
            failed -= env_ids
        assert [*inbox][: len(rows)] == rows
        assert {*inbox} == {*rows, *failed}
        assert bool(inbox) is bool(rows or failed)
        assert all(env_index in inbox for env_index in (*rows, *failed))
        for count in range(1, 4):
            assert inbox.has(count) is (bool(failed) or len(rows) >= count)
            assert [i for i, _ in inbox.first(count)] == (sorted(failed) if failed else rows[:count])
