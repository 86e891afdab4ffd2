"""The envs of one worker, in this process: what they return, and what they do wrong."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from sample_envs import Counter
from unit.strategies import same

from aiovec.errors import InvalidEnvResultError
from aiovec.exchange import infos, pickles
from aiovec.exchange.black_box import IDLE
from aiovec.exchange.failures import FailureRecord
from aiovec.exchange.layout import Layout
from aiovec.exchange.messages import BatchReply, BuildReply, BuildRequest, CallRequest, ResetRequest, SetAttrRequest
from aiovec.exchange.slab import Geometry, Slab
from aiovec.worker.clock import StepClock
from aiovec.worker.host import EnvHost
from aiovec.worker.rows import RowWriter

CLOCK = StepClock([0.0] * 1000)
FIRST = 4  # the index of the worker's first env


def capture(exception: BaseException, env_index: int, command: str) -> FailureRecord:
    """The exception itself: nothing has to travel here."""
    return FailureRecord.of(exception, env_index, 1, command)


class Hosted:
    """A host, its rows, and the replies in words."""

    def __init__(
        self, env_fns: Sequence[Callable[[], Any]], mode: AutoresetMode = AutoresetMode.NEXT_STEP, first: int = FIRST
    ) -> None:
        self.ids = range(first, first + len(env_fns))
        self.host = EnvHost(BuildRequest(self.ids, tuple(env_fns), mode), capture, [IDLE, 0], CLOCK)
        built = self.host.building().do([IDLE, 0], CLOCK)
        assert not built.failures
        self.layout = Layout(built.spaces[0].observation_space)
        slab = Slab.private(Geometry(len(env_fns), self.layout, Layout(built.spaces[0].action_space)))
        self.rows = slab.buffer(0)
        self.writer = RowWriter(self.layout, slab.strip_of(0).arrays, range(len(env_fns)), self.ids)

    def reset(
        self,
        rows: Sequence[int] | None = None,
        seeds: Sequence[int | None] | None = None,
        options: dict[str, Any] | None = None,
        *,
        whole_batch: bool = False,
    ) -> BatchReply:
        """Some rows, or all."""
        count = len(self.ids) if rows is None else len(rows)
        request = ResetRequest(rows, seeds or [None] * count, options, whole_batch)
        return self.host.resetting(request, self.writer).do([IDLE, 0], CLOCK) or BatchReply({})

    def step(self, actions: Any = None) -> BatchReply:
        """All envs, with zeros unless told otherwise."""
        actions = [0] * len(self.ids) if actions is None else actions
        return self.host.step(actions, self.writer) or BatchReply({})

    def infos(self, reply: BatchReply) -> dict[str, Any]:
        """As the parent merges them."""
        of_envs = zip(self.ids, infos.as_dicts(self.ids, reply.infos), strict=True)
        return infos.of_rows({env_index: info for env_index, info in of_envs if info}, self.ids)

    def batch(self) -> tuple[Any, ...]:
        """Copies of the rows: observations, rewards, both flags."""
        return tuple(array.copy() for array in self.rows.arrays())


def failed(reply: Any) -> dict[int, str]:
    """Which envs failed, with the type of what they raised."""
    return {record.env_index: type(record.exception).__name__ for record in reply.failures}


class Scripted(Counter):
    """Does what it is told by its attributes: callables that take the env's place."""

    def __init__(self, length: int = 5, offset: int = 0) -> None:
        super().__init__(length, offset)
        self.on_step: Callable[[Any], Any] | None = None
        self.on_reset: Callable[[], Any] | None = None
        self.on_close: Callable[[], None] | None = None
        self.closed = False
        self.seeds: list[int | None] = []
        self.options: list[dict[str, Any] | None] = []

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        self.seeds.append(seed)
        self.options.append(options)
        result = super().reset(seed=seed)
        return result if self.on_reset is None else self.on_reset()

    def step(self, action: Any) -> Any:
        result = super().step(action)
        return result if self.on_step is None else self.on_step(result)

    def close(self) -> None:
        self.closed = True
        if self.on_close is not None:
            self.on_close()


def three(mode: AutoresetMode = AutoresetMode.NEXT_STEP, lengths: Sequence[int] = (5, 5, 5)) -> tuple[Hosted, Any]:
    """Three scripted envs, reset, and the envs themselves."""
    hosted = Hosted([functools.partial(Scripted, length, i) for i, length in enumerate(lengths)], mode)
    assert not hosted.reset().failures
    return hosted, hosted.host.rows.envs


def raises(exception: BaseException) -> Callable[..., Any]:
    """A callable that raises, whatever it is given."""

    def function(*_args: Any) -> Any:
        raise exception

    return function


# ---- trajectories


@pytest.mark.parametrize("mode", AutoresetMode)
@pytest.mark.parametrize("lengths", [[1, 2, 3, 7, 100], [100, 7, 3, 2, 1]], ids=["first first", "last first"])
def test_trajectories_equal_gymnasium(mode: AutoresetMode, lengths: list[int]) -> None:
    """Observations, rewards, flags, infos and the order of their keys, over the ends of episodes of unequal length."""
    makers = [functools.partial(Counter, length, offset) for offset, length in enumerate(lengths)]
    hosted, reference = Hosted(makers, mode), SyncVectorEnv(makers, autoreset_mode=mode)
    reply = hosted.reset(seeds=[9, 10, 11, 12, 13])
    expected_observations, expected_infos = reference.reset(seed=9)
    assert same(hosted.batch()[0], expected_observations)
    assert same(hosted.infos(reply), expected_infos)
    for number in range(12):
        reply = hosted.step(np.full(5, number % 4))
        assert not reply.failures
        *expected, expected_infos = reference.step(np.full(5, number % 4))
        assert all(map(same, hosted.batch(), expected))
        assert same(hosted.infos(reply), expected_infos)
        ended = np.logical_or(expected[2], expected[3])
        if mode is AutoresetMode.DISABLED and ended.any():
            hosted.reset(np.flatnonzero(ended).tolist(), whole_batch=True)
            expected_observations, _ = reference.reset(options={"reset_mask": ended})
            assert same(hosted.batch()[0], expected_observations)
    assert [env.actions for env in hosted.host.rows.envs] == [env.actions for env in reference.envs]  # type: ignore[attr-defined]


def test_a_step_without_infos_has_nothing_to_say() -> None:
    """The reply is a bare header then."""
    hosted, envs = three()
    for env in envs:
        env.on_step = lambda result: (*result[:4], {})
    assert hosted.host.step([0, 0, 0], hosted.writer) is None
    assert (
        hosted.host.resetting(ResetRequest(None, [None] * 3, None, False), hosted.writer).do([IDLE, 0], CLOCK) is None
    )


def test_same_step_keeps_the_terminal_observation_of_an_array_that_is_reused() -> None:
    """The reset of such an env overwrites what its last step returned."""
    hosted, envs = three(AutoresetMode.SAME_STEP, (2, 5, 5))
    array = np.zeros(3, np.float32)

    def fill(result: Any) -> Any:
        array[...] = result[0]
        return (array, *result[1:])

    envs[0].on_step = fill
    envs[0].on_reset = lambda: (fill((np.full(3, -1),))[0], {})
    hosted.step()
    got = hosted.infos(hosted.step())
    assert got["final_obs"][0].tolist() == [0, 1, 2]
    assert hosted.rows.observations[0][0].tolist() == [-1, -1, -1]
    assert got["_final_obs"].tolist() == [True, False, False]


# ---- reset


def test_seeds_and_options_go_to_their_envs() -> None:
    """In the order of the rows; each env has an options dict of its own."""
    hosted, envs = three()
    given = {"x": 1}
    hosted.reset([2, 0], [7, 8], given)
    assert [env.seeds for env in envs] == [[None, 8], [None], [None, 7]]
    assert [env.options[-1] for env in envs] == [{"x": 1}, None, {"x": 1}]
    envs[2].options[-1].clear()
    assert given == {"x": 1}
    assert envs[0].options[-1] == {"x": 1}


def test_a_reset_of_some_writes_their_rows_only() -> None:
    """Their rows; the others keep what the last call left."""
    hosted, _ = three()
    hosted.step()
    before = hosted.batch()
    hosted.reset([1])
    after = hosted.batch()
    assert after[0].tolist() == [before[0][0].tolist(), [1, 2, 0], before[0][2].tolist()]
    assert after[1].tolist() == [before[1][0], 0.0, before[1][2]]


def test_a_reset_by_mask_repeats_the_other_observations() -> None:
    """In any buffer: rewards and flags are zero, infos are those of the envs that were reset."""
    hosted, envs = three()
    hosted.step()
    envs[1].on_reset = lambda: (np.full(3, 8), {"fresh": True})
    hosted.rows.observations[0][...] = 99
    got = hosted.infos(hosted.reset([1], whole_batch=True))
    assert hosted.rows.observations[0].tolist() == [[0, 1, 1], [8, 8, 8], [2, 1, 1]]
    assert not any(array.any() for array in hosted.batch()[1:])
    assert got["_fresh"].tolist() == [False, True, False]


def test_a_reset_in_the_middle_of_an_autoreset_is_enough() -> None:
    """An env that ended its episode and was reset by the user is stepped next, not reset again."""
    hosted, envs = three(lengths=(1, 5, 5))
    hosted.step()
    hosted.reset([0])
    hosted.step()
    assert envs[0].episodes == 2
    assert envs[0].steps == 1


# ---- what envs do wrong

STOPS = [ValueError("x"), SystemExit(1), KeyboardInterrupt(), GeneratorExit(), StopIteration(), AssertionError()]


@pytest.mark.parametrize("error", STOPS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("row", range(3))
def test_a_step_that_raises_fails_its_env_alone(error: BaseException, row: int) -> None:
    """The others are stepped, and their rows are right."""
    hosted, envs = three()
    hosted.step()
    envs[row].on_step = raises(error)
    reply = hosted.step()
    assert failed(reply) == {FIRST + row: type(error).__name__}
    assert reply.failures[0].exception is error
    assert reply.failures[0].command == "step"
    assert [env.steps for env in envs] == [2, 2, 2]
    observations, rewards, _, _ = hosted.batch()
    for other in {0, 1, 2} - {row}:
        assert observations[other].tolist() == [other, 1, 2]
        assert rewards[other] == 2
    assert hosted.infos(reply)["_steps"].tolist() == [other != row for other in range(3)]


def test_all_may_raise() -> None:
    """Every env is told, in ascending order."""
    hosted, envs = three()
    for env in envs:
        env.on_step = raises(KeyError("k"))
    assert list(failed(hosted.step())) == [4, 5, 6]


def test_our_own_frames_are_not_in_the_way() -> None:
    """The traceback begins with the env's `step`."""
    hosted, envs = three()
    envs[0].on_step = raises(ValueError("x"))
    error = hosted.step().failures[0].exception
    assert error is not None
    assert error.__traceback__ is not None
    assert error.__traceback__.tb_frame.f_code.co_name == "step"


RESULTS: dict[str, Callable[[Any], Any]] = {
    "4-tuple": lambda result: result[:4],
    "6-tuple": lambda result: (*result, None),
    "empty": lambda result: (),
    "None": lambda result: None,
    "observation": lambda result: result[0],
    "number": lambda result: 5,
}


@pytest.mark.parametrize("everyone", [False, True])
@pytest.mark.parametrize("result", RESULTS)
def test_a_step_of_a_wrong_length_is_told(result: str, everyone: bool) -> None:
    """As old as gym's four, or nothing at all; of one env, or of all alike."""
    hosted, envs = three()
    wrong = [0, 1, 2] if everyone else [1]
    for row in wrong:
        envs[row].on_step = RESULTS[result]
    reply = hosted.step()
    assert failed(reply) == {FIRST + row: "InvalidEnvResultError" for row in wrong}
    text = str(reply.failures[0].exception)
    assert f"env {FIRST + wrong[0]} returned a wrong result of step" in text
    assert "(observation, reward, terminated, truncated, info)" in text
    for row in {0, 1, 2} - set(wrong):
        assert hosted.rows.observations[0][row].tolist() == [row, 1, 1]


def test_a_list_of_five_is_taken_and_blames_nobody() -> None:
    """As Gymnasium unpacks it; an exception of the next env is still its own."""
    hosted, envs = three()
    envs[0].on_step = list
    envs[1].on_step = raises(ValueError("x"))
    assert failed(hosted.step()) == {5: "ValueError"}
    assert hosted.rows.observations[0].tolist()[::2] == [[0, 1, 1], [2, 1, 1]]


@pytest.mark.parametrize("result", [None, (1, 2, 3), "ab", np.zeros(3), (np.zeros(3),)], ids=repr)
def test_a_reset_of_a_wrong_length_is_told(result: Any) -> None:
    """An observation without its info, above all."""
    hosted, envs = three()
    envs[1].on_reset = lambda: result
    for reply in (hosted.reset(), hosted.reset([1]), hosted.reset([1], whole_batch=True)):
        assert failed(reply) == {5: "InvalidEnvResultError"}
        assert "env 5 returned a wrong result of reset: expected (observation, info)" in str(
            reply.failures[0].exception
        )


INFOS = [[1], "x", 5, np.array([1, 2]), np.array([0]), (1,), None, [], 0]


@pytest.mark.parametrize("info", INFOS, ids=repr)
def test_an_info_that_is_no_dict_is_told(info: Any) -> None:
    """Of a step and of a reset, alone and in a batch; the others are right."""
    hosted, envs = three()
    envs[1].on_step = lambda result: (*result[:4], info)
    replies = [hosted.step()]
    assert hosted.rows.observations[0].tolist()[::2] == [[0, 1, 1], [2, 1, 1]]
    envs[1].on_reset = lambda: (np.zeros(3), info)
    replies += [hosted.reset(), hosted.reset([1])]
    for reply in replies:
        assert failed(reply) == {5: "InvalidEnvResultError"}
        assert "env 5 returned a wrong info: expected a dict" in str(reply.failures[0].exception)


@pytest.mark.parametrize(
    ("position", "value"),
    [(0, np.zeros(2)), (0, None), (1, "much"), (1, np.zeros(2)), (2, np.zeros(2, bool)), (3, np.ones((2, 2), bool))],
)
@pytest.mark.parametrize("mode", AutoresetMode)
def test_a_wrong_value_of_a_step_is_told(position: int, value: Any, mode: AutoresetMode) -> None:
    """Observation, reward and flags: the env is named, the others are stepped and right."""
    hosted, envs = three(mode)
    envs[1].on_step = lambda result: (*result[:position], value, *result[position + 1 :])
    reply = hosted.step()
    assert failed(reply) == {5: "InvalidEnvResultError"}
    assert isinstance(reply.failures[0].exception, InvalidEnvResultError)
    observations, rewards, _, _ = hosted.batch()
    assert observations[::2].tolist() == [[0, 1, 1], [2, 1, 1]]
    assert rewards[::2].tolist() == [1, 1]


@pytest.mark.parametrize("rows", [None, [0, 1, 2], [2, 1]])
def test_a_reset_that_raises_fails_its_env_alone(rows: list[int] | None) -> None:
    """The others are reset, and their infos are told."""
    hosted, envs = three()
    hosted.step()
    envs[1].on_reset = raises(OSError("x"))
    envs[2].on_reset = lambda: (np.full(3, 7), {"fresh": 1})
    reply = hosted.reset(rows)
    assert failed(reply) == {5: "OSError"}
    assert reply.failures[0].command == "reset"
    assert hosted.rows.observations[0][2].tolist() == [7, 7, 7]
    assert hosted.infos(reply)["_fresh"].tolist() == [False, False, True]


def test_a_same_step_reset_that_raises_fails_its_env_alone() -> None:
    """It says nothing of its last step; the others that ended are reset."""
    hosted, envs = three(AutoresetMode.SAME_STEP, (1, 1, 5))
    envs[0].on_reset = raises(ValueError("x"))
    reply = hosted.step()
    assert failed(reply) == {4: "ValueError"}
    got = hosted.infos(reply)
    assert got["_final_obs"].tolist() == [False, True, False]
    assert hosted.rows.observations[0][1:].tolist() == [[1, 2, 0], [2, 1, 1]]


def test_a_next_step_reset_that_raises_is_done_by_the_users() -> None:
    """The failure is of the step that resets; the user's reset puts the env right."""
    hosted, envs = three(lengths=(1, 5, 5))
    assert not hosted.step().failures
    envs[0].on_reset = raises(ValueError("x"))
    reply = hosted.step()
    assert failed(reply) == {4: "ValueError"}
    envs[0].on_reset = None
    assert not hosted.reset([0]).failures
    assert not hosted.step().failures
    assert envs[0].steps == 1


# ---- build


def test_every_failed_construction_is_told() -> None:
    """One that raises, one that is no env, one that cannot be loaded; the rest can be closed."""
    made: list[Scripted] = []

    def good() -> Scripted:
        made.append(Scripted())
        return made[-1]

    makers = (good, raises(ValueError("x")), lambda: "no env", b"no pickle", good)
    host = EnvHost(BuildRequest(range(2, 7), makers, AutoresetMode.NEXT_STEP), capture, [IDLE, 0], CLOCK)  # type: ignore[arg-type]
    reply = host.building().do([IDLE, 0], CLOCK)
    assert failed(reply) == {3: "ValueError", 4: "TypeError", 5: "UnpicklingError"}
    assert {record.command for record in reply.failures} == {"build"}
    assert "env_fns[4] returned 'no env' (str), which is not a gymnasium.Env" in str(reply.failures[1].exception)
    assert reply.spaces == []
    assert host.closing().do([IDLE, 0], CLOCK).failures == []
    assert [env.closed for env in made] == [True, True]
    assert repr(host) == "<EnvHost envs=2-6>"


def test_build_tells_distinct_spaces_once() -> None:
    """With the envs that have them, and the first env's metadata and render mode."""

    class Wide(Counter):
        metadata = {"render_modes": ["ansi"]}  # noqa: RUF012
        render_mode = "ansi"

        def __init__(self) -> None:
            super().__init__()
            self.observation_space = spaces.Box(0, 1, (9,))

    makers = (pickles.dumps_to_worker(Wide), Counter, Wide, Counter)
    reply = (
        EnvHost(BuildRequest(range(4), makers, AutoresetMode.NEXT_STEP), capture, [IDLE, 0], CLOCK)
        .building()
        .do([IDLE, 0], CLOCK)
    )
    assert [fact.env_ids for fact in reply.spaces] == [[0, 2], [1, 3]]
    assert reply.metadata == {"render_modes": ["ansi"]}
    assert reply.render_mode == "ansi"
    assert isinstance(reply, BuildReply)


# ---- calls


def test_calls_answer_in_the_order_asked() -> None:
    """Methods are called, attributes are given; through wrappers."""
    hosted = Hosted([lambda i=i: gym.wrappers.TimeLimit(Counter(offset=i), 9) for i in range(3)])  # type: ignore[misc]
    assert hosted.host.calling(CallRequest([2, 0], "offset", (), {})).do([IDLE, 0], CLOCK).results == [2, 0]
    reply = hosted.host.calling(CallRequest(None, "get_wrapper_attr", ("length",), {})).do([IDLE, 0], CLOCK)
    assert reply.results == [5, 5, 5]
    assert reply.failures == []


def test_a_call_that_raises_fails_its_env_alone() -> None:
    """The others were called; the command is named."""
    hosted, envs = three()
    envs[0].probe = envs[2].probe = lambda value: value + 1
    reply = hosted.host.calling(CallRequest(None, "probe", (1,), {})).do([IDLE, 0], CLOCK)
    assert failed(reply) == {5: "AttributeError"}
    assert reply.failures[0].command == "call('probe')"
    assert reply.results == [2, None, 2]
    envs[1].render = raises(ValueError("x"))
    reply = hosted.host.calling(CallRequest([1], "render", (), {})).do([IDLE, 0], CLOCK)
    assert [record.command for record in reply.failures] == ["render"]


def test_attributes_are_set_env_by_env() -> None:
    """A value each, in the order of the rows."""
    hosted, envs = three()
    reply = hosted.host.setting(SetAttrRequest([2, 0], "length", [20, 10])).do([IDLE, 0], CLOCK)
    assert reply.failures == []
    assert [env.length for env in envs] == [10, 5, 20]


def test_a_step_that_was_set_is_used() -> None:
    """Also one that is a `functools.partial`, and one set after that, and during an autoreset."""
    hosted, envs = three(lengths=(5, 5, 1))

    def constant(value: int, _action: Any) -> Any:
        return np.full(3, value), 0.0, False, False, {}

    for value in (1, 2, 3):
        step = functools.partial(constant, value)
        hosted.host.setting(SetAttrRequest([0], "step", [step])).do([IDLE, 0], CLOCK)
        hosted.step()
        assert hosted.rows.observations[0][0].tolist() == [value] * 3
    assert envs[2].episodes == 2  # its autoreset was in the second of three steps


def test_close_closes_all_and_tells_who_failed() -> None:
    """Also after one has raised; a second close has nothing left to do."""
    hosted, envs = three()
    envs = list(envs)
    envs[0].on_close = raises(OSError("device gone"))
    reply = hosted.host.closing().do([IDLE, 0], CLOCK)
    assert failed(reply) == {4: "OSError"}
    assert reply.failures[0].command == "close"
    assert [env.closed for env in envs] == [True] * 3
    assert hosted.host.closing().do([IDLE, 0], CLOCK).failures == []


# ---- leaves without a fixed size


class Speaker(gym.Env[Any, Any]):
    """Says its step as a text, beside a number."""

    observation_space = spaces.Dict(number=spaces.Discrete(99), text=spaces.Text(9))
    action_space = spaces.Discrete(2)
    steps = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        self.steps = 0
        return {"number": 0, "text": "reset"}, {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        if action == 1:
            raise ValueError("x")
        return {"number": self.steps, "text": f"step {self.steps}"}, 0.0, False, False, {}


def test_dynamic_leaves_are_in_the_reply() -> None:
    """Of every row of a batch, of the asked rows of a part; a failed row repeats its last value."""
    hosted = Hosted([Speaker] * 3)
    hosted.host.set_dynamic_columns(
        lambda observations: [[observation and observation["text"] for observation in observations]]
    )
    assert hosted.reset().dynamic == [["reset"] * 3]
    assert hosted.step().dynamic == [["step 1"] * 3]
    reply = hosted.step([0, 1, 0])
    assert failed(reply) == {5: "ValueError"}
    assert reply.dynamic == [["step 2", None, "step 2"]]
    assert hosted.reset([2, 1]).dynamic == [["reset", "reset"]]
    assert hosted.rows.observations[0].tolist() == [2, 0, 0]
