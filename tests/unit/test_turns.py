"""`drive`: every way through a turn, without an env."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NoReturn

import pytest

from aiovec.exchange.black_box import IDLE, Phase, doing_code
from aiovec.worker import turns
from aiovec.worker.clock import StepClock
from aiovec.worker.turns import EnvCall, Outcome, Pause, Turn, drive

CLOCK = StepClock([0.0] * 100)

ROW = 3


def recorded(calls: list[tuple[int, Phase, Callable[[], Any]]]) -> tuple[list[Any], Turn[Any], list[int]]:
    """A turn that makes these calls, what `doing` showed in each of them, and `doing` itself."""
    doing, seen = [IDLE, 0], []

    def call(function: Callable[[], Any]) -> Any:
        seen.append(tuple(doing))
        return function()

    def turn() -> Turn[Any]:
        results = []
        for _, phase, function in calls:
            results.append((yield EnvCall(phase, functools.partial(call, function))))
        return results

    return seen, turn(), doing


def raises(exception: BaseException) -> NoReturn:
    raise exception


def test_what_calls_return_is_sent_in_and_the_result_given() -> None:
    """Each call is written down while it lasts, under a number of its own."""
    phases = (Phase.RESET, Phase.STEP, Phase.CLOSE)
    seen, turn, doing = recorded([(0, phase, lambda phase=phase: phase.name) for phase in phases])
    assert drive(turn, ROW, doing, CLOCK) == ["RESET", "STEP", "CLOSE"]
    assert seen == [(doing_code(ROW, phase), number) for number, phase in enumerate(phases, 1)]
    assert doing == [IDLE, 3]


def test_a_turn_without_a_call() -> None:
    doing = [IDLE, 7]

    def turn() -> Turn[str]:
        return "nothing to do"
        yield

    assert drive(turn(), ROW, doing, CLOCK) == "nothing to do"
    assert doing == [IDLE, 7]


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), StopIteration(5), SystemExit(3)])
def test_what_a_call_raises_is_thrown_in(error: BaseException) -> None:
    """The turn decides: it may go on with another call. Nothing is doing at that moment."""
    doing = [IDLE, 0]
    at_the_throw: list[int] = []

    def turn() -> Turn[tuple[BaseException, Any]]:
        try:
            yield EnvCall(Phase.STEP, functools.partial(raises, error))
        except BaseException as caught:
            at_the_throw.extend(doing)
            found = caught
        return found, (yield EnvCall(Phase.RESET, lambda: "again"))

    caught, returned = drive(turn(), ROW, doing, CLOCK)
    assert caught is error
    assert returned == "again"
    assert at_the_throw == [IDLE, 1]
    assert doing == [IDLE, 2]


def test_a_generator_exit_of_an_env_does_not_end_its_turn() -> None:
    """A generator would take it for its own end, and never see that it was thrown, if another delegates to it."""
    error, doing = GeneratorExit("own"), [IDLE, 0]

    def inner() -> Turn[str]:
        try:
            yield EnvCall(Phase.STEP, functools.partial(raises, error))
        except BaseException as caught:
            assert turns.was_raised(caught) is error
        return (yield EnvCall(Phase.RESET, lambda: "again"))

    def outer() -> Turn[str]:
        return (yield from inner())

    assert drive(outer(), ROW, doing, CLOCK) == "again"
    assert turns.was_raised(error) is error


def test_a_turn_that_ends_with_what_was_thrown() -> None:
    doing = [IDLE, 0]

    def turn() -> Turn[str]:
        try:
            yield EnvCall(Phase.STEP, functools.partial(raises, ValueError("x")))
        except ValueError as error:
            return f"told: {error}"
        return "not raised"

    assert drive(turn(), ROW, doing, CLOCK) == "told: x"


@pytest.mark.parametrize("calls_before", [0, 1])
def test_what_a_turn_raises_comes_out(calls_before: int) -> None:
    """Before its first call, or after it; and nothing is left as if an env were called."""
    doing = [IDLE, 0]

    def turn() -> Turn[None]:
        for _ in range(calls_before):
            yield EnvCall(Phase.CALL, lambda: None)
        raise LookupError("the turn's own")

    with pytest.raises(LookupError, match="the turn's own"):
        drive(turn(), ROW, doing, CLOCK)
    assert doing == [IDLE, calls_before]


def test_what_a_turn_does_not_catch_comes_out() -> None:
    """With the frames of the call."""
    doing = [IDLE, 0]

    def turn() -> Turn[None]:
        yield EnvCall(Phase.CALL, functools.partial(raises, ValueError("x")))

    with pytest.raises(ValueError, match="x") as caught:
        drive(turn(), ROW, doing, CLOCK)
    assert caught.traceback[-1].name == "raises"
    assert doing == [IDLE, 1]


def test_a_pause_sleeps(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(turns.time, "sleep", slept.append)

    def turn() -> Turn[str]:
        yield EnvCall(Phase.BUILD, Pause(0.25))
        return "awake"

    assert drive(turn(), ROW, [IDLE, 0], CLOCK) == "awake"
    assert slept == [0.25]


def test_outcomes_share_nothing() -> None:
    first, second = Outcome(), Outcome()
    first.infos.append((0, {}))
    first.entries.append((0, {}))
    first.errors[0] = ValueError()
    first.known.add(0)
    assert not (second.infos)
    assert not (second.entries)
    assert not (second.errors)
    assert not (second.known)
