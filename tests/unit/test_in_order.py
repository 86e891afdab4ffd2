"""Numbered messages that overtake each other."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from aiovec.exchange.in_order import InOrder


def test_what_comes_in_order_is_taken_at_once() -> None:
    """Nothing waits."""
    in_order: InOrder[str] = InOrder()
    assert [in_order.take(number, message) for number, message in enumerate("abc")] == [["a"], ["b"], ["c"]]


def test_what_comes_early_waits() -> None:
    """And comes behind those that it has overtaken."""
    in_order: InOrder[str] = InOrder()
    assert in_order.take(2, "c") == []
    assert in_order.take(1, "b") == []
    assert repr(in_order) == "<InOrder next=0 early=[1, 2]>"
    assert in_order.take(0, "a") == ["a", "b", "c"]
    assert in_order.take(3, "d") == ["d"]


@given(st.permutations(range(12)))
def test_any_order(numbers: list[int]) -> None:
    """Each message is taken once, in the order of the numbers."""
    in_order: InOrder[int] = InOrder()
    taken = [message for number in numbers for message in in_order.take(number, number)]
    assert taken == list(range(12))
