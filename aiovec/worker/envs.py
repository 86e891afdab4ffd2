"""The envs of one worker, and the turns of each: built, stepped, reset, called, closed.

No I/O, no threads, no event loop: each turn touches its own row alone. An exception of the env is an outcome like
any other.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import gymnasium as gym
from gymnasium.vector import AutoresetMode

from aiovec.async_env import AsyncEnv
from aiovec.errors import InvalidEnvResultError, ResetNeeded
from aiovec.exchange import pickles
from aiovec.exchange.black_box import IDLE, Phase, doing_code
from aiovec.exchange.failures import EnvLost, StepRefused, TurnCancelled
from aiovec.exchange.messages import BuildRequest
from aiovec.exchange.restart_delay import restart_delay
from aiovec.worker.clock import StepClock
from aiovec.worker.rows import RowWriter
from aiovec.worker.turns import Doing, EnvCall, Outcome, Pause, Turn, drive

__all__ = ["Envs", "shape_of"]

_RESETTING = doing_code(0, Phase.RESET)
_NO_ENV: gym.Env[Any, Any] = gym.Env()  # in the row of one that could not be built
_TOLD = Exception("told")  # why an env could not be built anew was raised: the next reset tries again


class Envs:
    """The envs of one worker.

    Attributes:
        env_ids: Their indices in the vector.
        envs: One a row, once built.
        calls: What a step calls for each env: its `step`, or after an episode its autoreset.
        autoresets: The latter, one a row; told apart from the env's own `step` by identity.
        observations: Each env's last one: under a `reset_mask` the other rows repeat it.
        num_steps: How often all were stepped together.
    """

    def __init__(self, request: BuildRequest, autoreset: Callable[[int, Any], Any]) -> None:
        count = len(request.env_ids)
        self.env_ids: range = request.env_ids
        self.envs: list[Any] = [_NO_ENV] * count
        self.is_async: list[bool] = [False] * count
        self.calls: list[Callable[[Any], Any]] = [_never_built] * count
        self.autoresets: list[Callable[[Any], Any]] = [functools.partial(autoreset, row) for row in range(count)]
        self.observations: list[Any] = [None] * count
        self.num_steps = 0
        self._env_fns = request.env_fns
        self._max_restarts = request.max_restarts
        self._mode = request.autoreset_mode
        # Rows whose env must be built before it is reset: with what the last attempt raised, or `_TOLD`.
        self._unbuilt: dict[int, BaseException] = {}
        self._turns = [0] * count  # how often each was stepped by itself
        self._failed: dict[int, tuple[int, int]] = {}  # by row: in which step it failed last, how often in a row

    # ---- built

    def building(self, row: int) -> Turn[BaseException | None]:
        """Builds an env; gives what went wrong."""
        try:
            yield from self._building(row)
        except BaseException as exception:  # noqa: BLE001
            return exception
        return None

    def rebuilding(self, row: int, is_lost: bool) -> Turn[None]:
        """Builds an env in place of one whose worker died; what goes wrong is told when it is reset.

        With `max_restarts` its first step is its reset, or tells that it was lost.
        """
        exception = yield from self.building(row)
        if exception is not None:
            self._unbuilt[row] = exception
        if self._max_restarts is not None:
            self.calls[row] = _tell_loss if is_lost else self.autoresets[row]

    def _building(self, row: int) -> Turn[None]:
        env_index, env_fn = self.env_ids[row], self._env_fns[row]
        env: Any = yield EnvCall(Phase.BUILD, functools.partial(_build, env_fn))
        if not isinstance(env, gym.Env):
            raise TypeError(f"env_fns[{env_index}] returned {shape_of(env)}, which is not a gymnasium.Env")
        for name in ("observation_space", "action_space"):
            if not isinstance(getattr(env, name, None), gym.Space):
                raise TypeError(f"{env!r} has no {name}: set it in its class, or in __init__, to a gymnasium.Space")
        self.is_async[row] = isinstance(env, AsyncEnv)
        unwrapped: Any = env.unwrapped
        if isinstance(unwrapped, AsyncEnv) and not self.is_async[row]:
            raise TypeError(
                f"env_fns[{env_index}] returned {env!r}: a wrapper that cannot await the AsyncEnv in it. "
                "Leave it out (`aiovec.make_vec` does), or make it an AsyncEnv itself."
            )
        self.envs[row] = env
        self.calls[row] = env.step

    def forget_env_fns(self) -> None:
        """They are not needed again, unless failed envs are built anew; and may hold much."""
        if self._max_restarts is None:
            self._env_fns = ()

    # ---- stepped

    def count_turns(self, group: range) -> None:
        """Some were stepped together; all at once, `num_steps` says it."""
        if self._max_restarts is not None:
            for row in group:
                self._turns[row] += 1

    def stepping(self, row: int, action: Any, writer: RowWriter, autoreset: bool, outcome: Outcome) -> Turn[None]:
        """Steps an env by itself, and writes its row.

        Args:
            row: Which.
            action: Its own.
            writer: Of the buffer that this call writes.
            autoreset: Whether an episode that ends is followed by another one. If not, only a batch goes on after it.
            outcome: Of the request.
        """
        self._turns[row] += 1
        try:
            if self.calls[row] is self.autoresets[row]:
                if not autoreset:
                    raise StepRefused
                self.observations[row], info = yield from self.resetting(row)
                writer.set_outcome(row, 0.0, False, False)
            else:
                info = yield from self._stepping(row, action, writer)
            if writer.has_ended(row) and self._mode is not AutoresetMode.DISABLED:
                if self._mode is AutoresetMode.SAME_STEP and autoreset:
                    outcome.entries.append((self.env_ids[row], self.final_of(row, info)))
                    self.observations[row], info = yield from self.resetting(row)
                else:
                    self.calls[row] = self.autoresets[row]
            if info.__class__ is not dict or info:
                outcome.infos.append((row, info))
            writer.set_observation(row, self.observations[row])
        except BaseException as exception:  # noqa: BLE001
            self._fail(row, exception, writer, outcome)

    def _stepping(self, row: int, action: Any, writer: RowWriter) -> Turn[dict[str, Any]]:
        transition = yield EnvCall(Phase.STEP, functools.partial(self.calls[row], action))
        try:
            observation, reward, terminated, truncated, info = transition
        except (TypeError, ValueError):
            raise self.wrong_result(row, "step", transition) from None
        self.observations[row] = observation
        writer.set_outcome(row, reward, terminated, truncated)
        return info  # type: ignore[no-any-return]

    def final_of(self, row: int, info: dict[str, Any]) -> dict[str, Any]:
        """What `SAME_STEP` says of an episode's last step.

        Copied before the reset: an env that reuses its array, or its info, would overwrite the last ones.
        """
        return {
            "final_obs": self._copied(row, "observation", self.observations[row]),
            "final_info": self._copied(row, "info", info),
        }

    def _copied(self, row: int, what: str, value: Any) -> Any:
        try:
            return copy.deepcopy(value)
        except Exception as error:
            got = f"{type(error).__name__}: {error}"
            raise InvalidEnvResultError(self.env_ids[row], f"last {what}", "what can be copied", got) from error

    # ---- reset

    def resetting(self, row: int, **arguments: Any) -> Turn[tuple[Any, Any]]:
        """Resets an env, which is built before if it has failed; raises what the env raises."""
        if row in self._unbuilt:
            yield from self._building_anew(row)
        return self._reset_result(
            row, (yield EnvCall(Phase.RESET, functools.partial(self.envs[row].reset, **arguments)))
        )

    def reset_at_once(self, row: int, doing: Doing, clock: StepClock) -> tuple[Any, Any]:
        """The same without a turn, in a step of envs that take turns in one thread: a CartPole falls each 22nd step."""
        if row in self._unbuilt:
            return drive(self.resetting(row), row, doing, clock)
        doing[0] = row + _RESETTING  # told apart from the step that it is part of, which has counted already
        try:
            result = self.envs[row].reset()
        finally:
            doing[0] = IDLE
        return self._reset_result(row, result)

    def _reset_result(self, row: int, result: Any) -> tuple[Any, Any]:
        self.calls[row] = self.envs[row].step
        if not isinstance(result, (tuple, list)) or len(result) != 2:
            raise self.wrong_result(row, "reset", result)
        return result[0], result[1]

    def resetting_as_asked(
        self, row: int, seed: int | None, options: dict[str, Any] | None, writer: RowWriter, outcome: Outcome
    ) -> Turn[None]:
        """The same for a request, and writes the row."""
        try:
            # Each env its own dict: one that pops a key must not take it from the next.
            own = None if options is None else dict(options)
            self.observations[row], info = yield from self.resetting(row, seed=seed, options=own)
            if info.__class__ is not dict or info:
                outcome.infos.append((row, info))
            if row in self._failed:  # it is no turn, as an autoreset is: only a failure in the very next is in a row
                last_turn, in_a_row = self._failed[row]
                self._failed[row] = (last_turn - 1, in_a_row)
            writer.set_outcome(row, 0.0, False, False)
            writer.set_observation(row, self.observations[row])
        except BaseException as exception:  # noqa: BLE001
            self._fail(row, exception, writer, outcome)

    def repeating(self, row: int, writer: RowWriter, outcome: Outcome) -> Turn[None]:
        """Writes the last observation again, of an env that is not reset where others are."""
        writer.set_outcome(row, 0.0, False, False)
        outcome.errors.update(writer.write_some([row], [self.observations[row]]))
        yield from ()

    def _building_anew(self, row: int) -> Turn[None]:
        error = self._unbuilt[row]
        if error is not _TOLD:
            self._unbuilt[row] = _TOLD
            raise error
        if self.envs[row] is not _NO_ENV:
            try:
                shape_of((yield EnvCall(Phase.CLOSE, self.envs[row].close)))
            except TurnCancelled:
                raise
            except BaseException:  # noqa: BLE001, S110  whatever that raises: the env has failed, and that was told
                pass
            self.envs[row] = _NO_ENV
        seconds = restart_delay(self._failed[row][1] if row in self._failed else 0)
        if seconds:
            yield EnvCall(Phase.BUILD, Pause(seconds))
        yield from self._building(row)
        del self._unbuilt[row]

    def _fail(self, row: int, exception: BaseException, writer: RowWriter, outcome: Outcome) -> None:
        writer.set_outcome(row, 0.0, False, False)
        outcome.errors[row] = exception
        outcome.known.add(row)
        self.has_failed(row, exception)

    def has_failed(self, row: int, exception: BaseException) -> None:
        """An env has failed: with `max_restarts` it is built anew, and under NEXT_STEP its next step is the reset."""
        if self._max_restarts is None or isinstance(exception, (StepRefused, TurnCancelled)):
            return
        self.calls[row] = self.autoresets[row]
        if isinstance(exception, EnvLost):
            return
        self._unbuilt.setdefault(row, _TOLD)
        last_turn, in_a_row = self._failed.get(row, (-2, 0))
        turn = self.num_steps + self._turns[row]
        # A step apart is the row of its reset; and after one more than are allowed all begins anew.
        is_in_a_row = turn - last_turn <= 2 and in_a_row <= self._max_restarts
        self._failed[row] = (turn, in_a_row + 1 if is_in_a_row else 1)

    # ---- called, closed

    def calling(self, row: int, name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Turn[Any]:
        """Calls a method, or gets an attribute, through the wrappers; raises what that raises."""
        env = self._built(row, name)

        def call() -> Any:
            found = env.get_wrapper_attr(name)
            return found(*args, **kwargs) if callable(found) else found

        result = yield EnvCall(Phase.CALL, call)
        if inspect.isawaitable(result):
            raise InvalidEnvResultError(self.env_ids[row], f"result of {name}", "a value", shape_of(result))
        return result

    def setting(self, row: int, name: str, value: Any) -> Turn[None]:
        """Sets an attribute, through the wrappers; raises what that raises."""
        env = self._built(row, "set_attr")

        def set_attr() -> None:
            env.set_wrapper_attr(name, value)

        yield EnvCall(Phase.CALL, set_attr)
        if self.calls[row] not in (self.autoresets[row], _tell_loss):
            self.calls[row] = env.step  # it may have been `step` that was set

    def closing(self, row: int) -> Turn[None]:
        """Closes an env; raises what that raises."""
        env, self.envs[row] = self.envs[row], _NO_ENV
        if env is not _NO_ENV:
            result = yield EnvCall(Phase.CLOSE, env.close)
            if inspect.isawaitable(result):
                raise InvalidEnvResultError(self.env_ids[row], "result of close", "nothing", shape_of(result))

    def _built(self, row: int, command: str) -> Any:
        if row in self._unbuilt:
            raise ResetNeeded(command, [self.env_ids[row]], "failed, and was not built anew yet")
        return self.envs[row]

    def wrong_result(self, row: int, command: str, got: Any) -> InvalidEnvResultError:
        """An env returned something else than a transition, or an observation with its info."""
        expected = "(observation, info)" if command == "reset" else "(observation, reward, terminated, truncated, info)"
        return InvalidEnvResultError(self.env_ids[row], f"result of {command}", expected, shape_of(got))


def _build(env_fn: bytes | Callable[[], Any]) -> Any:
    return (pickles.loads(env_fn) if isinstance(env_fn, bytes) else env_fn)()


def _never_built(_action: Any) -> Any:
    raise AssertionError("a step before the env was built")


def _tell_loss(_action: Any) -> Any:
    """In place of a step: tells that the env's worker died."""
    raise EnvLost


def shape_of(value: Any) -> str:
    """What an env returned, for a message."""
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)} values"
    if inspect.isawaitable(value):
        if inspect.iscoroutine(value):
            value.close()  # it is never awaited, and that is told here
        return f"a {type(value).__name__}: only the methods of an `aiovec.AsyncEnv` are awaited"
    return f"{value!r} ({type(value).__name__})"[:200]
