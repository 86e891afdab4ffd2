"""The envs of one worker: built, stepped, reset, called, closed. No I/O, no processes, no event loop.

An exception of one env never keeps another from its turn: it is captured, and the call goes on. The step path
works on columns, not on envs one by one: what costs 0.1 µs per env here is 2 % of a CartPole.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import operator
import time
from collections.abc import Callable, Generator, Iterable, MutableSequence, Sequence
from typing import Any

import gymnasium as gym
from gymnasium.vector import AutoresetMode

from aiovec.errors import InvalidEnvResultError, ResetNeeded
from aiovec.exchange import infos as infos_
from aiovec.exchange import packed_infos, pickles
from aiovec.exchange.black_box import IDLE, Phase, doing_code
from aiovec.exchange.failures import EnvLost, FailureRecord, StepRefused
from aiovec.exchange.messages import (
    BatchReply,
    BuildReply,
    BuildRequest,
    CallReply,
    CallRequest,
    ResetRequest,
    SetAttrRequest,
    SpaceFacts,
)
from aiovec.exchange.restart_delay import restart_delay
from aiovec.worker.rows import RowWriter

__all__ = ["EnvHost"]

Capture = Callable[[BaseException, int, str], FailureRecord]
Transition = tuple[Any, Any, Any, Any, dict[str, Any]]

_PENDING: Any = object()  # no transition yet: what is raised now is the env's own
_NO_ENV: gym.Env[Any, Any] = gym.Env()  # in the row of one that could not be built
_TOLD = Exception("told")  # why an env could not be built anew was raised: the next reset tries again


class EnvHost:
    """The envs of one worker.

    Args:
        request: What to build.
        capture: Turns an env's exception into what the reply bears.
        doing: Tells which env is called at the moment; see `exchange.black_box.open_black_box`.
    """

    def __init__(self, request: BuildRequest, capture: Capture, doing: MutableSequence[int] | memoryview) -> None:
        self.env_ids: range = request.env_ids
        self._doing = doing
        self._env_fns = request.env_fns
        self._max_restarts = request.max_restarts
        # Rows whose env must be built before it is reset: with what the last attempt raised, or `_TOLD`.
        self._unbuilt: dict[int, BaseException] = {}
        self._num_steps = 0  # of all envs together
        self._turns = [0] * len(request.env_ids)  # of each by itself
        self._failed: dict[int, tuple[int, int]] = {}  # by row: in which step it failed last, how often in a row
        self._autoreset_mode = request.autoreset_mode
        self._capture = capture
        self.envs: list[gym.Env[Any, Any]] = []
        # What a step calls for each env: its `step`, or under NEXT_STEP after an episode its autoreset.
        self._calls: list[Callable[[Any], Transition]] = []
        self._autoresets: list[Callable[[Any], Transition]] = []
        # Each env's last observation: under a reset_mask the other rows repeat it.
        self._observations: list[Any] = []
        self._rewards: list[Any] = []
        self._terminations: list[Any] = []
        self._truncations: list[Any] = []
        self._has_dynamic_leaves = False
        self._dynamic_columns: Callable[[Sequence[Any]], list[list[Any]]] = lambda _observations: []

    def __repr__(self) -> str:
        return f"<EnvHost envs={self.env_ids.start}-{self.env_ids.stop - 1} built={len(self.envs)}>"

    def build(self) -> BuildReply:
        """Builds every env, also after one has failed, so that all failures are told at once."""
        failures: list[FailureRecord] = []
        for row, env_index in enumerate(self.env_ids):
            try:
                self.envs.append(self._build(row))
            except BaseException as exception:  # noqa: BLE001
                failures.append(self._fail(exception, env_index, "build"))
        if self._max_restarts is None:
            self._env_fns = ()
        if failures:
            self.close()
            return BuildReply([], {}, None, failures)
        self._begin()
        first = self.envs[0]
        return BuildReply(self._spaces(), dict(first.metadata), first.render_mode, [])

    def rebuild(self, delay: float, lost: Sequence[int]) -> None:
        """Builds every env in place of a worker that died; see `RebuildRequest`.

        Each that cannot be built tells it when it is reset.
        """
        time.sleep(delay)
        for row in range(len(self.env_ids)):
            try:
                self.envs.append(self._build(row))
            except BaseException as exception:  # noqa: BLE001
                self.envs.append(_NO_ENV)
                self._unbuilt[row] = exception
        self._begin()
        if self._max_restarts is not None:
            self._calls = list(self._autoresets)
            for row in lost:
                self._calls[row] = _tell_loss

    def _build(self, row: int) -> gym.Env[Any, Any]:
        env_index, env_fn = self.env_ids[row], self._env_fns[row]
        with self._calling(row, Phase.BUILD):
            env: Any = (pickles.loads(env_fn) if isinstance(env_fn, bytes) else env_fn)()
        if not isinstance(env, gym.Env):
            raise TypeError(f"env_fns[{env_index}] returned {env!r}, which is not a gymnasium.Env")
        for name in ("observation_space", "action_space"):
            if not isinstance(getattr(env, name, None), gym.Space):
                raise TypeError(f"{env!r} has no {name}: set it in its class, or in __init__, to a gymnasium.Space")
        return env

    def _begin(self) -> None:
        self._calls = [env.step for env in self.envs]
        self._autoresets = [functools.partial(self._autoreset, row) for row in range(len(self.envs))]
        self._observations = [None] * len(self.envs)
        self._rewards = [0.0] * len(self.envs)
        self._terminations = [False] * len(self.envs)
        self._truncations = [False] * len(self.envs)

    def _spaces(self) -> list[SpaceFacts]:
        facts: list[SpaceFacts] = []
        for env_index, env in zip(self.env_ids, self.envs, strict=True):
            for known in facts:
                if env.observation_space == known.observation_space and env.action_space == known.action_space:
                    known.env_ids.append(env_index)
                    break
            else:
                facts.append(SpaceFacts([env_index], env.observation_space, env.action_space))
        return facts

    def set_dynamic_columns(self, columns: Callable[[Sequence[Any]], list[list[Any]]] | None) -> None:
        """Gives the function that takes the leaves without a fixed size out of observations, if there are any."""
        self._has_dynamic_leaves = columns is not None
        if columns is not None:
            self._dynamic_columns = columns

    # ---- step

    def step(self, actions: Iterable[Any], writer: RowWriter) -> BatchReply | None:
        """Steps every env and writes its row.

        Args:
            actions: One an env.
            writer: Of the buffer that this call writes.

        Returns:
            What there is to say beside the rows, or `None`.
        """
        observations, rewards = self._observations, self._rewards
        terminations, truncations = self._terminations, self._truncations
        infos: list[tuple[int, dict[str, Any]]] = []
        errors: dict[int, BaseException] = {}
        doing, row, transition = self._doing, 0, _PENDING
        self._num_steps += 1
        doing[1] += 1
        turns = zip(range(len(observations)), self._calls, actions, strict=False)  # the parent counted the actions
        while True:
            try:
                for row, call, action in turns:
                    doing[0] = row
                    transition = _PENDING
                    transition = call(action)
                    observations[row], rewards[row], terminations[row], truncations[row], info = transition
                    if info.__class__ is not dict or info:
                        infos.append((row, info))
                break
            except BaseException as exception:  # noqa: BLE001
                errors[row] = exception if transition is _PENDING else self._wrong_result(row, "step", transition)
                rewards[row], terminations[row], truncations[row] = 0.0, False, False
        doing[0] = IDLE
        errors.update(writer.write_outcomes(rewards, terminations, truncations))
        entries: list[tuple[int, dict[str, Any]]] = []
        if self._autoreset_mode is not AutoresetMode.DISABLED and (ended := writer.ended()):
            self._end_episodes(ended, infos, entries, errors)
        return self._answer(infos, entries, errors, writer, "step")

    def step_one(self, row: int, action: Any, writer: RowWriter, autoreset: bool) -> BatchReply | None:
        """Steps one env by itself, and writes its row.

        Args:
            row: Which.
            action: Its own.
            writer: Of the buffer that this call writes.
            autoreset: Whether an episode that ends is followed by another one. If not, only a batch goes on after it.

        Returns:
            What there is to say beside the row, or `None`.
        """
        if not autoreset and self._calls[row] is self._autoresets[row]:
            return BatchReply({}, failures=[self._capture(StepRefused(), self.env_ids[row], "step")])
        infos: list[tuple[int, dict[str, Any]]] = []
        entries: list[tuple[int, dict[str, Any]]] = []
        errors: dict[int, BaseException] = {}
        doing, transition = self._doing, _PENDING
        self._turns[row] += 1
        doing[1] += 1
        doing[0] = row
        try:
            transition = self._calls[row](action)
            doing[0] = IDLE
            self._observations[row], reward, terminated, truncated, info = transition
            if info.__class__ is not dict or info:
                infos.append((row, info))
        except BaseException as exception:  # noqa: BLE001
            doing[0] = IDLE
            errors[row] = exception if transition is _PENDING else self._wrong_result(row, "step", transition)
        else:
            if (error := writer.write_outcome(row, reward, terminated, truncated)) is not None:
                errors[row] = error
            elif writer.has_ended(row) and self._autoreset_mode is not AutoresetMode.DISABLED:
                if autoreset:
                    self._end_episodes([row], infos, entries, errors)
                else:
                    self._calls[row] = self._autoresets[row]
        return self._answer_some([row], infos, entries, errors, writer, "step")

    def _end_episodes(
        self,
        ended: list[int],
        infos: list[tuple[int, dict[str, Any]]],
        entries: list[tuple[int, dict[str, Any]]],
        errors: dict[int, BaseException],
    ) -> None:
        """Applies the autoreset mode to the rows whose episode ended with this step."""
        if self._autoreset_mode is AutoresetMode.NEXT_STEP:
            for row in ended:
                if row not in errors:
                    self._calls[row] = self._autoresets[row]
            return
        final_infos = dict(infos)
        for row in ended:
            if row in errors:
                continue
            try:
                # Copied before the reset: an env that reuses its array, or its info, would overwrite the last ones.
                final = {
                    "final_obs": self._copied(row, "observation", self._observations[row]),
                    "final_info": self._copied(row, "info", final_infos.pop(row, {})),
                }
                self._observations[row], info = self._reset(row)
            except BaseException as exception:  # noqa: BLE001
                errors[row] = exception
            else:
                entries.append((self.env_ids[row], final))
                if info.__class__ is not dict or info:
                    final_infos[row] = info
        infos[:] = sorted(final_infos.items())

    def _copied(self, row: int, what: str, value: Any) -> Any:
        try:
            return copy.deepcopy(value)
        except Exception as error:
            got = f"{type(error).__name__}: {error}"
            raise InvalidEnvResultError(self.env_ids[row], f"last {what}", "what can be copied", got) from error

    def _autoreset(self, row: int, _action: Any) -> Transition:
        observation, info = self._reset(row)
        return observation, 0.0, False, False, info

    def _reset(self, row: int, **arguments: Any) -> tuple[Any, dict[str, Any]]:
        if row in self._unbuilt:
            self._build_anew(row)
        env = self.envs[row]
        self._doing[1] += 1
        self._doing[0] = doing_code(row, Phase.RESET)
        try:
            result: Any = env.reset(**arguments)
        finally:
            self._doing[0] = IDLE
        self._calls[row] = env.step
        if not isinstance(result, (tuple, list)) or len(result) != 2:
            raise self._wrong_result(row, "reset", result)
        return result[0], result[1]

    def _build_anew(self, row: int) -> None:
        error = self._unbuilt[row]
        if error is not _TOLD:
            self._unbuilt[row] = _TOLD
            raise error
        if self.envs[row] is not _NO_ENV:
            with contextlib.suppress(BaseException), self._calling(row, Phase.CLOSE):
                self.envs[row].close()  # whatever that raises: the env has failed, and that was told
            self.envs[row] = _NO_ENV
        time.sleep(restart_delay(self._failed[row][1] if row in self._failed else 0))
        self.envs[row] = self._build(row)
        del self._unbuilt[row]

    def has_failed(self, env_index: int, exception: BaseException) -> None:
        """An env has failed: with `max_restarts` it is built anew, and under NEXT_STEP its next step is the reset."""
        if self._max_restarts is None:
            return
        row = env_index - self.env_ids.start
        self._calls[row] = self._autoresets[row]
        if isinstance(exception, EnvLost):
            return
        self._unbuilt.setdefault(row, _TOLD)
        last_turn, in_a_row = self._failed.get(row, (-2, 0))
        turn = self._num_steps + self._turns[row]
        # A step apart is the row of its reset; and after one more than are allowed all begins anew.
        is_in_a_row = turn - last_turn <= 2 and in_a_row <= self._max_restarts
        self._failed[row] = (turn, in_a_row + 1 if is_in_a_row else 1)

    def _wrong_result(self, row: int, command: str, got: Any) -> InvalidEnvResultError:
        expected = "(observation, info)" if command == "reset" else "(observation, reward, terminated, truncated, info)"
        return InvalidEnvResultError(self.env_ids[row], f"result of {command}", expected, _shape_of(got))

    # ---- reset

    def reset(self, request: ResetRequest, writer: RowWriter) -> BatchReply | None:
        """Resets some envs and writes their rows; with `whole_batch` the others' last observations too."""
        rows = range(len(self.envs)) if request.rows is None else request.rows
        infos: list[tuple[int, dict[str, Any]]] = []
        errors: dict[int, BaseException] = {}
        for row, seed in zip(rows, request.seeds, strict=True):
            try:
                # Each env its own dict: one that pops a key must not take it from the next.
                options = None if request.options is None else dict(request.options)
                self._observations[row], info = self._reset(row, seed=seed, options=options)
            except BaseException as exception:  # noqa: BLE001
                errors[row] = exception
            else:
                if info.__class__ is not dict or info:
                    infos.append((row, info))
        if request.rows is not None and not request.whole_batch:
            for row in request.rows:
                writer.write_outcome(row, 0.0, False, False)
            return self._answer_some(request.rows, infos, [], errors, writer, "reset")
        zeros, falses = [0.0] * len(self.envs), [False] * len(self.envs)
        writer.write_outcomes(zeros, falses, falses)
        return self._answer(infos, [], errors, writer, "reset")

    # ---- answers

    def _answer(
        self,
        infos: list[tuple[int, dict[str, Any]]],
        entries: list[tuple[int, dict[str, Any]]],
        errors: dict[int, BaseException],
        writer: RowWriter,
        command: str,
    ) -> BatchReply | None:
        """Writes the observations of all rows and gathers what does not go into the slab."""
        observations = self._observations
        if errors:
            good = [row for row in range(len(observations)) if row not in errors]
            errors.update(writer.write_some(good, [observations[row] for row in good]))
        else:
            errors.update(writer.write_observations(observations))
        if not (infos or entries or errors or self._has_dynamic_leaves):
            return None
        if len(infos) == len(observations) and not (entries or errors or self._has_dynamic_leaves):
            packed = packed_infos.pack([info for _, info in infos])
            if packed is not None:
                return BatchReply(packed)
        dynamic = self._dynamic_columns([None if row in errors else value for row, value in enumerate(observations)])
        return self._reply(infos, entries, dynamic, errors, command)

    def _answer_some(
        self,
        rows: Sequence[int],
        infos: list[tuple[int, dict[str, Any]]],
        entries: list[tuple[int, dict[str, Any]]],
        errors: dict[int, BaseException],
        writer: RowWriter,
        command: str,
    ) -> BatchReply | None:
        """The same, of some rows."""
        good = [row for row in rows if row not in errors]
        errors.update(writer.write_some(good, [self._observations[row] for row in good]))
        if not (infos or entries or errors or self._has_dynamic_leaves):
            return None
        dynamic = self._dynamic_columns([None if row in errors else self._observations[row] for row in rows])
        return self._reply(sorted(infos, key=operator.itemgetter(0)), entries, dynamic, errors, command)

    def _reply(
        self,
        infos: list[tuple[int, dict[str, Any]]],
        entries: list[tuple[int, dict[str, Any]]],
        dynamic: list[list[Any]],
        errors: dict[int, BaseException],
        command: str,
    ) -> BatchReply:
        for row, info in infos:
            checked: Any = info
            if row not in errors and not isinstance(checked, dict):
                errors[row] = InvalidEnvResultError(self.env_ids[row], "info", "a dict", _shape_of(info))
        first = self.env_ids.start
        if errors:
            infos = [(row, info) for row, info in infos if row not in errors]
            entries = [(env_index, final) for env_index, final in entries if env_index - first not in errors]
        for row, error in errors.items():
            self.has_failed(first + row, error)
        finals = bool(entries)
        entries += [(first + row, info) for row, info in infos]
        if finals:  # Gymnasium's order of keys: env by env, the final ones of each first
            entries.sort(key=operator.itemgetter(0))
        failures = [self._fail(errors[row], self.env_ids[row], command) for row in sorted(errors)]
        errors.clear()  # held by a frame that they hold themselves: they would stay until the collector runs
        return BatchReply(infos_.collect(entries, len(self.env_ids)) if entries else {}, dynamic, failures)

    def _fail(self, exception: BaseException, env_index: int, command: str) -> FailureRecord:
        traceback = exception.__traceback__
        while (
            traceback is not None
            and traceback.tb_next is not None
            and traceback.tb_frame.f_code.co_filename == __file__
        ):
            traceback = traceback.tb_next  # our own frames tell the user nothing
        exception.__traceback__ = traceback
        return self._capture(exception, env_index, command)

    # ---- calls

    def call(self, request: CallRequest) -> CallReply:
        """Calls a method of some envs, or gets an attribute, through their wrappers."""

        def call(row: int, _position: int) -> Any:
            found = self._env(row, request.name).get_wrapper_attr(request.name)
            return found(*request.args, **request.kwargs) if callable(found) else found

        command = "render" if request.name == "render" else f"call({request.name!r})"
        return self._for_each(request.rows, call, command)

    def set_attr(self, request: SetAttrRequest) -> CallReply:
        """Sets an attribute of some envs, through their wrappers."""

        def set_one(row: int, position: int) -> None:
            env = self._env(row, "set_attr")
            env.set_wrapper_attr(request.name, request.values[position])
            if self._calls[row] not in (self._autoresets[row], _tell_loss):
                self._calls[row] = env.step  # it may have been `step` that was set

        return self._for_each(request.rows, set_one, f"set_attr({request.name!r})")

    def close(self) -> CallReply:
        """Closes every env, also after one has failed."""
        reply = self._for_each(None, lambda row, _position: self.envs[row].close(), "close", Phase.CLOSE)
        self.envs, self._calls = [], []
        return reply

    def _env(self, row: int, command: str) -> gym.Env[Any, Any]:
        if row in self._unbuilt:
            raise ResetNeeded(command, [self.env_ids[row]], "failed, and was not built anew yet")
        return self.envs[row]

    def _for_each(
        self,
        rows: Sequence[int] | None,
        function: Callable[[int, int], Any],
        command: str,
        phase: Phase = Phase.CALL,
    ) -> CallReply:
        results: list[Any] = []
        failures: list[FailureRecord] = []
        for position, row in enumerate(range(len(self.envs)) if rows is None else rows):
            try:
                with self._calling(row, phase):
                    results.append(function(row, position))
            except BaseException as exception:  # noqa: BLE001
                results.append(None)
                failures.append(self._fail(exception, self.env_ids[row], command))
        return CallReply(results, failures)

    @contextlib.contextmanager
    def _calling(self, row: int, phase: Phase) -> Generator[None, None, None]:
        """Writes down that an env is called, off the step path."""
        self._doing[1] += 1
        self._doing[0] = doing_code(row, phase)
        try:
            yield
        finally:
            self._doing[0] = IDLE


def _tell_loss(_action: Any) -> Transition:
    raise EnvLost


def _shape_of(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)} values"
    return f"{value!r} ({type(value).__name__})"[:200]
