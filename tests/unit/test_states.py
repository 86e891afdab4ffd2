"""Every state and every event: what changes, what is refused, and that a refusal changes nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from gymnasium import error as gymnasium_error

from aiovec.errors import AlreadyPendingCallError, ResetNeeded
from aiovec.pool.states import EnvState, EnvStates

IDLE, AWAITED, OWED, BROKEN = EnvState
SEQ = 7  # the call of the tests; the states below were brought about by calls 1 to 4
ANY = 0  # the env that is in the state; env 1 is idle


def states_with(state: EnvState) -> EnvStates:
    """Two envs: the first in this state by call 2, the second idle."""
    states = EnvStates(2)
    states.begin_reset(1, "reset", None)
    states.settle(1, {})
    if state is not IDLE:
        states.begin_reset(2, "reset", [0])
    if state is OWED:
        states.abandon(2)
    if state is BROKEN:
        states.settle(2, {0: "failed in reset"})
    assert both(states) == [state, IDLE]
    return states


def both(states: EnvStates) -> list[EnvState]:
    """The states of the two envs."""
    return [states.of(0), states.of(1)]


EVENTS: dict[str, Callable[[EnvStates], None]] = {
    "step": lambda states: states.begin_step(SEQ, "step"),
    "reset all": lambda states: states.begin_reset(SEQ, "reset", None),
    "reset it": lambda states: states.begin_reset(SEQ, "reset", [0]),
    "reset the other": lambda states: states.begin_reset(SEQ, "reset", [1]),
    "repeat it": lambda states: states.check_repeatable("reset", [0]),
    "repeat the other": lambda states: states.check_repeatable("reset", [1]),
    "its call answered": lambda states: states.settle(2, {}),
    "its call failed": lambda states: states.settle(2, {0: "failed"}),
    "another call answered": lambda states: states.settle(99, {}),
    "another call failed": lambda states: states.settle(99, {0: "failed"}),
    "its task gone": lambda states: states.abandon(2),
    "its task gone, it answered": lambda states: states.abandon(2, [0, 1]),
    "another task gone": lambda states: states.abandon(99, [0, 1]),
    "lost": lambda states: states.break_(0, "must be built anew, since its worker died"),
    "send it": lambda states: states.begin_send(SEQ, "send", [0]),
    "send the other": lambda states: states.begin_send(SEQ, "send", [1]),
    "send both": lambda states: states.begin_send(SEQ, "send", [0, 1]),
    "check both": lambda states: states.check_idle("send", [0, 1]),
    "step it alone": lambda states: states.begin_one(SEQ, "step", 0),
    "step the other alone": lambda states: states.begin_one(SEQ, "step", 1),
    "taken": lambda states: states.take([0]),
    "taken, and ended": lambda states: states.take([0], [0]),
    "the other taken": lambda states: states.take([1]),
}

BUSY, NEEDED = AlreadyPendingCallError, ResetNeeded
# For each event what becomes of the two envs, or the refusal, with the first env idle, awaited, owed, broken.
TABLE: dict[str, tuple[list[EnvState] | type[Exception], ...]] = {
    "step": ([AWAITED, AWAITED], BUSY, BUSY, NEEDED),
    "reset all": ([AWAITED, AWAITED], BUSY, [AWAITED, AWAITED], [AWAITED, AWAITED]),
    "reset it": ([AWAITED, IDLE], BUSY, [AWAITED, IDLE], [AWAITED, IDLE]),
    "reset the other": ([IDLE, AWAITED], [AWAITED, AWAITED], [OWED, AWAITED], [BROKEN, AWAITED]),
    "repeat it": ([IDLE, IDLE], BUSY, BUSY, ResetNeeded),
    "repeat the other": ([IDLE, IDLE], [AWAITED, IDLE], [OWED, IDLE], [BROKEN, IDLE]),
    "its call answered": ([IDLE, IDLE], [IDLE, IDLE], [OWED, IDLE], [BROKEN, IDLE]),
    "its call failed": ([IDLE, IDLE], [BROKEN, IDLE], [BROKEN, IDLE], [BROKEN, IDLE]),
    "another call answered": ([IDLE, IDLE], [AWAITED, IDLE], [OWED, IDLE], [BROKEN, IDLE]),
    "another call failed": ([IDLE, IDLE], [AWAITED, IDLE], [OWED, IDLE], [BROKEN, IDLE]),
    "its task gone": ([IDLE, IDLE], [OWED, IDLE], [OWED, IDLE], [BROKEN, IDLE]),
    "its task gone, it answered": ([IDLE, IDLE], [IDLE, IDLE], [OWED, IDLE], [BROKEN, IDLE]),
    "another task gone": ([IDLE, IDLE], [AWAITED, IDLE], [OWED, IDLE], [BROKEN, IDLE]),
    "lost": ([BROKEN, IDLE], [BROKEN, IDLE], [BROKEN, IDLE], [BROKEN, IDLE]),
    "send it": ([OWED, IDLE], BUSY, BUSY, NEEDED),
    "send the other": ([IDLE, OWED], [AWAITED, OWED], [OWED, OWED], [BROKEN, OWED]),
    "send both": ([OWED, OWED], BUSY, BUSY, NEEDED),
    "check both": ([IDLE, IDLE], BUSY, BUSY, NEEDED),
    "step it alone": ([AWAITED, IDLE], BUSY, BUSY, NEEDED),
    "step the other alone": ([IDLE, AWAITED], [AWAITED, AWAITED], [OWED, AWAITED], [BROKEN, AWAITED]),
    "taken": ([IDLE, IDLE], [AWAITED, IDLE], [IDLE, IDLE], [BROKEN, IDLE]),
    "taken, and ended": ([BROKEN, IDLE], [BROKEN, IDLE], [BROKEN, IDLE], [BROKEN, IDLE]),
    "the other taken": ([IDLE, IDLE], [AWAITED, IDLE], [OWED, IDLE], [BROKEN, IDLE]),
}


@pytest.mark.parametrize("state", EnvState, ids=lambda state: state.name.lower())
@pytest.mark.parametrize("event", EVENTS)
def test_every_state_meets_every_event(state: EnvState, event: str) -> None:
    """The table above; a refusal changes nothing."""
    states = states_with(state)
    outcome = TABLE[event][state]
    if isinstance(outcome, list):
        EVENTS[event](states)
        assert both(states) == outcome
    else:
        with pytest.raises(outcome):
            EVENTS[event](states)
        assert both(states) == [state, IDLE]


@pytest.mark.parametrize("state", [IDLE, OWED, BROKEN], ids=lambda state: state.name.lower())
def test_a_refused_call_is_unknown_later(state: EnvState) -> None:
    """Its number settles nothing, and what was allowed before still is."""
    states = states_with(AWAITED)
    with pytest.raises(AlreadyPendingCallError):
        states.begin_reset(SEQ, "reset", None)
    states.settle(SEQ, {})
    assert both(states) == [AWAITED, IDLE]
    states.settle(2, {0: "failed"} if state is BROKEN else {})
    states.begin_reset(SEQ + 1, "reset", [0])
    assert both(states) == [AWAITED, IDLE]


def test_new_envs_need_a_reset() -> None:
    """And the message says of which."""
    states = EnvStates(3)
    with pytest.raises(ResetNeeded, match=r"step\(\) refused: envs 0-2 have not been reset yet\. Reset first"):
        states.begin_step(1, "step")
    with pytest.raises(ResetNeeded, match="env 1 is not in the reset_mask, but without an observation"):
        states.check_repeatable("reset", [1])
    assert [states.of(index) for index in range(3)] == [BROKEN] * 3


def test_one_new_env_has_not_been_reset() -> None:
    """The sentence is right for one env too."""
    states = EnvStates(2)
    states.begin_reset(1, "reset", [0])
    states.settle(1, {})
    with pytest.raises(ResetNeeded, match=r"env 1 has not been reset yet.*`envs.reset\(env_ids=\[1\]\)`"):
        states.begin_step(2, "step")


def test_an_env_whose_first_reset_failed_has_nothing_to_repeat() -> None:
    """Its last observation does not exist: a reset of the others by mask is refused."""
    states = EnvStates(2)
    states.begin_reset(1, "reset", None)
    states.settle(1, {0: "failed in reset"})
    with pytest.raises(ResetNeeded):
        states.check_repeatable("reset", [0])


def test_a_broken_env_is_named_with_its_reason() -> None:
    """Those with the same reason together; the message tells the way out."""
    states = EnvStates(4)
    states.begin_reset(1, "reset", None)
    states.settle(1, {})
    states.begin_step(2, "step")
    states.settle(2, {1: "failed in step", 3: "failed in step", 2: "ended its episode"})
    with pytest.raises(ResetNeeded) as caught:
        states.begin_step(3, "step")
    assert caught.value.env_ids == (1, 3)
    assert str(caught.value) == (
        "step() refused: envs 1, 3 failed in step. Reset first: `envs.reset()` for all, or "
        "`envs.reset(env_ids=[1, 3])` for these alone."
    )
    assert isinstance(caught.value, gymnasium_error.ResetNeeded)


def test_an_awaited_env_is_named_before_an_owed_one() -> None:
    """Waiting for the other task is the first way out; then the two ways for what is owed."""
    states = EnvStates(3)
    states.begin_reset(1, "reset", None)
    states.settle(1, {})
    states.begin_reset(2, "reset", [0])
    states.abandon(2)
    states.begin_reset(3, "reset", [2])
    with pytest.raises(AlreadyPendingCallError, match=r"step\(\) refused: another task awaits env 2\.") as caught:
        states.begin_step(4, "step")
    assert caught.value.env_ids == (2,)
    states.settle(3, {})
    with pytest.raises(AlreadyPendingCallError) as caught:
        states.begin_step(4, "step")
    assert caught.value.env_ids == (0,)
    for way_out in ("envs.reset()", "envs.close()"):
        assert way_out in str(caught.value)
    assert isinstance(caught.value, gymnasium_error.AlreadyPendingCallError)


def test_whole_batches_go_round() -> None:
    """The step path: reset, steps, a cancelled step, its reset."""
    states = EnvStates(2)
    states.begin_reset(1, "reset", None)
    states.settle(1, {})
    for seq in (2, 3):
        states.begin_step(seq, "step")
        assert both(states) == [AWAITED, AWAITED]
        with pytest.raises(AlreadyPendingCallError):
            states.begin_step(seq + 50, "step")
        states.settle(seq, {})
        assert both(states) == [IDLE, IDLE]
    states.begin_step(4, "step")
    states.abandon(4)
    assert both(states) == [OWED, OWED]
    states.begin_reset(5, "reset", None)
    states.settle(4, {})  # the late answer of the cancelled step
    assert both(states) == [AWAITED, AWAITED]
    states.settle(5, {})
    assert both(states) == [IDLE, IDLE]


def test_a_step_that_was_owed_is_discarded_by_a_reset() -> None:
    """Env by env: the call is owed something until the last of its envs was reset."""
    states = EnvStates(2)
    states.begin_reset(1, "reset", None)
    states.settle(1, {})
    states.begin_step(2, "step")
    assert not states.owed_to(2)
    states.abandon(2)
    assert states.owed_to(2)
    states.begin_reset(3, "reset", [0])
    assert states.owed_to(2)
    states.begin_reset(4, "reset", [1])
    assert not states.owed_to(2)
    states.settle(2, {0: "failed in step"})
    assert both(states) == [AWAITED, AWAITED]


def test_what_had_answered_is_idle_when_the_task_is_gone() -> None:
    """After the death of a worker: its envs are broken, those that answered idle, the others owed."""
    states = EnvStates(3)
    states.begin_reset(1, "reset", None)
    states.settle(1, {})
    states.begin_step(2, "step")
    states.break_(2, "must be built anew, since its worker died")
    states.abandon(2, answered=[0, 2])
    assert [states.of(index) for index in range(3)] == [IDLE, OWED, BROKEN]


def test_an_env_that_broke_meanwhile_stays_broken() -> None:
    """A worker may answer, and die before the others have answered the same call."""
    states = EnvStates(2)
    states.begin_reset(1, "reset", None)
    states.settle(1, {})
    states.begin_step(2, "step")
    states.break_(0, "must be built anew, since its worker died")
    states.settle(2, {})
    assert both(states) == [BROKEN, IDLE]
    with pytest.raises(ResetNeeded, match="env 0 must be built anew, since its worker died"):
        states.begin_step(3, "step")


def test_a_batch_that_is_owed_is_not_settled_as_if_awaited() -> None:
    """An answer that nobody took leaves its envs owed, whole batch or part."""
    states = EnvStates(2)
    states.begin_reset(1, "reset", None)
    states.settle(1, {})
    states.begin_step(2, "step")
    states.abandon(2)
    states.settle(2, {})
    assert both(states) == [OWED, OWED]


def test_a_reset_clears_the_reason() -> None:
    """A second failure is told by its own reason."""
    states = states_with(BROKEN)
    states.begin_reset(3, "reset", [0])
    states.settle(3, {})
    states.begin_step(4, "step")
    states.settle(4, {0: "failed in step"})
    with pytest.raises(ResetNeeded, match="failed in step"):
        states.begin_step(5, "step")


def test_busy_envs_outside_of_a_part_do_not_matter() -> None:
    """Different envs may be driven from different tasks."""
    states = states_with(AWAITED)
    states.begin_reset(3, "reset", [1])
    states.settle(3, {})
    assert both(states) == [AWAITED, IDLE]
    states.settle(2, {})
    states.begin_step(4, "step")
    assert both(states) == [AWAITED, AWAITED]


def test_repr_counts() -> None:
    """One line, for a debugger."""
    assert repr(states_with(OWED)) == "<EnvStates 1 idle, 0 awaited, 1 owed, 0 broken>"


def test_an_ended_episode_leaves_an_observation_to_repeat() -> None:
    """Where nobody resets the env but the user: others may be reset before."""
    states = EnvStates(2)
    states.begin_reset(1, "reset", None)
    states.settle(1, {})
    states.begin_step(2, "step")
    states.settle(2, {}, ended=[0])
    assert both(states) == [BROKEN, IDLE]
    with pytest.raises(ResetNeeded, match="env 0 ended its episode, and autoreset is disabled"):
        states.begin_step(3, "step")
    states.check_repeatable("reset", [0])


@pytest.mark.parametrize("as_part", [False, True])
def test_what_is_interrupted_must_be_reset(as_part: bool) -> None:
    """Only what the call still had; a whole batch or a part."""
    states = EnvStates(2)
    states.begin_reset(1, "reset", None)
    states.settle(1, {})
    if as_part:
        states.begin_reset(2, "reset", [0])
    else:
        states.begin_step(2, "step")
    states.interrupt(7)
    states.interrupt(2)
    assert both(states) == [BROKEN, IDLE if as_part else BROKEN]
    with pytest.raises(ResetNeeded, match="was interrupted"):
        states.begin_step(3, "step")


# ---- envs that are stepped by themselves


@pytest.mark.parametrize("state", [AWAITED, OWED, BROKEN], ids=lambda state: state.name.lower())
@pytest.mark.parametrize(("has_ended", "waits_for_reset"), [(False, False), (False, True), (True, False), (True, True)])
def test_the_answer_of_a_single_env(state: EnvState, has_ended: bool, waits_for_reset: bool) -> None:
    """It is idle then, or broken where nobody resets it, also where `recv` takes it; a death behind its answer stands."""
    states = states_with(state)
    states.settle_one(2, 0, has_ended, waits_for_reset)
    settled = BROKEN if has_ended and waits_for_reset else IDLE
    assert both(states) == [state if state is BROKEN else settled, IDLE]
    if state is BROKEN:
        with pytest.raises(ResetNeeded, match="failed in reset"):
            states.begin_one(SEQ, "step", 0)
        with pytest.raises(ResetNeeded):
            states.check_repeatable("reset", [0])


def after_an_end(waits_for_reset: bool = False) -> EnvStates:
    """Env 0 has ended its episode in a step of its own."""
    states = states_with(IDLE)
    states.begin_one(3, "step", 0)
    states.settle_one(3, 0, True, waits_for_reset)
    return states


GO_ON: dict[str, Callable[[EnvStates], None]] = {
    "a batch": lambda states: (states.begin_step(4, "step"), states.settle(4, {}))[-1],
    "a send": lambda states: (states.begin_send(4, "send", [0]), states.take([0]))[-1],
    "a reset": lambda states: (states.begin_reset(4, "reset", None), states.settle(4, {}))[-1],
    "a reset of it": lambda states: (states.begin_reset(4, "reset", [0]), states.settle(4, {}))[-1],
}


@pytest.mark.parametrize("go_on", GO_ON)
def test_after_the_end_of_its_episode_only_a_batch_or_a_reset_goes_on(go_on: str) -> None:
    """There is no autoreset of a single env; behind those it steps again."""
    states = after_an_end()
    for _ in range(2):
        with pytest.raises(ResetNeeded, match="env 0 ended its episode"):
            states.begin_one(4, "step", 0)
        assert both(states) == [IDLE, IDLE]
    states.begin_one(4, "step", 1)  # the other may
    states.settle_one(4, 1, False, False)
    GO_ON[go_on](states)
    states.begin_one(5, "step", 0)
    assert both(states) == [AWAITED, IDLE]


@pytest.mark.parametrize("go_on", ["a batch", "a send"])
def test_where_nobody_resets_an_env_a_batch_does_not_go_on(go_on: str) -> None:
    """It is broken, as after a batch."""
    states = after_an_end(waits_for_reset=True)
    with pytest.raises(ResetNeeded, match="ended its episode, and autoreset is disabled"):
        GO_ON[go_on](states)
    GO_ON["a reset of it"](states)
    states.begin_one(5, "step", 0)


def test_a_batch_after_single_steps_is_a_whole_one_again() -> None:
    """The step path: what single envs did is written out, and all are idle at once again."""
    states = states_with(IDLE)
    for seq in (3, 4):
        states.begin_step(seq * 10, "step")
        states.settle(seq * 10, {})
        states.begin_one(seq, "step", 1)
        assert both(states) == [IDLE, AWAITED]
        with pytest.raises(AlreadyPendingCallError, match="another task awaits env 1"):
            states.begin_step(99, "step")
        states.settle_one(seq, 1, False, False)
        states.begin_send(50, "send", [1, 0])
        with pytest.raises(AlreadyPendingCallError) as caught:
            states.begin_step(99, "step")
        assert caught.value.env_ids == (0, 1)
        states.take([0, 1])
        assert both(states) == [IDLE, IDLE]


def test_what_is_owed_to_whom() -> None:
    """Each sent env by a call of its own; taking, and a reset, end it."""
    states = states_with(IDLE)
    states.begin_send(8, "send", [1, 0])
    assert (states.owed_to(8), states.owed_to(9), states.num_owed()) == ([1], [0], 2)
    assert states.is_owed(0)
    assert states.is_owed(0, 9)
    assert not states.is_owed(0, 8)
    states.take([0])
    assert (states.owed_to(9), states.num_owed()) == ([], 1)
    assert states.num_owed([0, 1]) == 2
    assert not states.is_owed(0)
    states.begin_reset(10, "reset", [1])
    assert states.num_owed() == 0
    assert (states.asked_by(8), states.asked_by(9), states.asked_by(10)) == ([], [0], [1])


def test_a_refused_send_owes_nothing() -> None:
    """One of its envs is busy, or broken: none is sent."""
    for state in (AWAITED, BROKEN):
        states = states_with(state)
        with pytest.raises((AlreadyPendingCallError, ResetNeeded)):
            states.begin_send(SEQ, "send", [1, 0])
        assert states.num_owed() == 0
        states.begin_one(SEQ, "step", 1)


def test_a_row_that_was_collected_is_one_to_repeat() -> None:
    """The first observation of an env may come by `recv`, if its first reset was cancelled."""
    states = EnvStates(2)
    states.begin_reset(1, "reset", None)
    states.abandon(1)
    with pytest.raises(AlreadyPendingCallError):
        states.check_repeatable("reset", [0])
    states.take([0, 1])
    states.check_repeatable("reset", [0, 1])


@pytest.mark.parametrize("end", ["settle", "abandon", "interrupt"])
def test_a_row_that_is_repeated_is_not_written_meanwhile(end: str) -> None:
    """By a send, a single step, a reset or another mask; nor is the env reset, which would write it, too."""
    states = states_with(IDLE)
    states.begin_reset(3, "reset", [0], repeated=[1])
    for begin in (
        lambda: states.begin_send(9, "send", [1]),
        lambda: states.begin_one(9, "step", 1),
        lambda: states.begin_reset(9, "reset", [1]),
        lambda: states.check_repeatable("reset", [1]),
    ):
        with pytest.raises(AlreadyPendingCallError, match="another task awaits env 1"):
            begin()
    assert both(states) == [AWAITED, IDLE]
    {
        "settle": lambda: states.settle(3, {}),
        "abandon": lambda: states.abandon(3),
        "interrupt": lambda: states.interrupt(3),
    }[end]()
    states.begin_one(9, "step", 1)
    assert both(states)[1] == AWAITED
