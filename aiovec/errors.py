"""Every error that aiovec itself raises.

    AiovecError
    ├── AlreadyPendingCallError     an env is awaited or owed          (gymnasium's class too)
    ├── NoAsyncCallError            recv() with nothing pending        (gymnasium's class too)
    ├── CallTimeoutError            a blocking call waited too long    (TimeoutError, and multiprocessing's)
    ├── ClosedEnvironmentError      the vector is closed               (gymnasium's class too)
    ├── NotStartedError             asked before the start             (RuntimeError)
    ├── WrongLoopError              asked from another event loop      (RuntimeError)
    ├── RunningLoopError            a blocking call inside an event loop  (RuntimeError)
    ├── WrappedCallError            what wrappers cannot know about    (TypeError)
    ├── ResetNeeded                 an env must be reset first         (gymnasium's class too)
    ├── InvalidActionsError         actions that do not fit the space  (gymnasium's InvalidAction, ValueError)
    ├── InvalidExtrasError          a policy's extras differ from step to step  (ValueError)
    ├── InvalidEnvResultError       an env returned what does not fit  (ValueError)
    ├── SpaceMismatchError          sub-envs whose spaces differ       (RuntimeError)
    ├── SlabMemoryError             no memory for the shared slab      (MemoryError)
    ├── EnvTimeoutError             envs that did not answer in time   (TimeoutError)
    ├── WorkerStartError            the system gave no worker process  (RuntimeError)
    ├── CrashLoopError              an env that fails however often it is built anew
    ├── RemoteError                 an env's exception that could not travel as itself
    ├── WorkerDied                  a worker process ended by itself
    ├── BatcherClosedError          the batcher is closed              (RuntimeError)
    ├── BatcherFullError            as many wait as may wait           (RuntimeError)
    ├── InvalidObservationError     it differs from the others         (ValueError)
    └── InvalidBatchResultError     a wrong number of rows             (ValueError)

The last four are of a `Batcher`. An exception of an env is not wrapped: it is raised as itself (see
``aiovec.failures``).
Constructors take facts and build the sentence; every class here survives pickling with both.
"""

from __future__ import annotations

import errno
import multiprocessing
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from gymnasium import error as gymnasium_error

__all__ = [
    "AiovecError",
    "AlreadyPendingCallError",
    "BatcherClosedError",
    "BatcherFullError",
    "CallTimeoutError",
    "ClosedEnvironmentError",
    "CrashLoopError",
    "EnvTimeoutError",
    "Failure",
    "InvalidActionsError",
    "InvalidBatchResultError",
    "InvalidEnvResultError",
    "InvalidExtrasError",
    "InvalidObservationError",
    "NoAsyncCallError",
    "NotStartedError",
    "RemoteError",
    "ResetNeeded",
    "RunningLoopError",
    "SlabMemoryError",
    "SpaceMismatchError",
    "WorkerDied",
    "WorkerStartError",
    "WrappedCallError",
    "WrongLoopError",
    "add_note",
    "failures",
    "mark_failures",
    "name_command",
    "name_envs",
]


def name_envs(env_ids: Sequence[int]) -> str:
    """The envs as a message names them: ``env 3``, ``envs 0-15``, ``envs 1, 4, 9 and 20 more``."""
    ids = [int(i) for i in env_ids]
    if len(ids) == 1:
        return f"env {ids[0]}"
    if len(ids) > 2 and ids == list(range(ids[0], ids[0] + len(ids))):
        return f"envs {ids[0]}-{ids[-1]}"
    shown = ", ".join(map(str, ids[:8]))
    return f"envs {shown}" + (f" and {len(ids) - 8} more" if len(ids) > 8 else "")


def name_command(command: str) -> str:
    """A command as what was called: ``step()``; ``set_attr('gravity')`` is named so already."""
    return command if command.endswith(")") else f"{command}()"


_Error = TypeVar("_Error", bound="AiovecError")


class AiovecError(Exception):
    """The root of aiovec's own errors."""

    def __reduce__(self) -> tuple[Any, ...]:
        # Neither __init__ nor __new__ runs again: args, attributes and notes are the state, the sentence included.
        return _rebuild, (type(self), self.args, self.__dict__)


def _rebuild(cls: type[_Error], args: tuple[Any, ...], state: dict[str, Any]) -> _Error:
    error = cls.__new__(cls)
    error.args = args
    error.__dict__.update(state)
    return error


class AlreadyPendingCallError(AiovecError, gymnasium_error.AlreadyPendingCallError):
    """A call was refused because some of its envs are awaited or owed; nothing was changed.

    Attributes:
        command: The refused call.
        env_ids: The busy envs.
    """

    def __init__(self, command: str, env_ids: Sequence[int], owed: bool, *, begun: str | None = None) -> None:
        self.command = command
        self.name: str = begun or command  # gymnasium's attribute
        self.env_ids: tuple[int, ...] = tuple(env_ids)
        if begun is not None:
            text = (
                f"{command}() refused: the answer of an earlier {begun} was not taken yet. `{begun}_wait()` takes it; "
                f"`reset()` discards it, but only once a `{begun}_wait` has timed out or was interrupted; `close()` ends it."
            )
        elif not env_ids:
            text = f"{command}() refused: another task, or another thread, is in such a call already. Await that first."
        elif owed:
            text = (
                f"{command}() refused: {name_envs(env_ids)} {'was' if len(env_ids) == 1 else 'were'} sent an action, or "
                "the call that waited was cancelled, and the result is still owed. `envs.recv()` collects it, "
                "`envs.reset()` waits it out and discards it, `envs.close()` ends it."
            )
        else:
            text = f"{command}() refused: another task awaits {name_envs(env_ids)}. Await that call first."
        Exception.__init__(self, text)


class NoAsyncCallError(AiovecError, gymnasium_error.NoAsyncCallError):
    """`recv`, or a blocking `step_wait`, was asked although nothing is pending, so it would wait for ever.

    Attributes:
        command: ``"recv"``; or ``"step"``, ``"reset"`` or ``"call"``.
    """

    def __init__(self, command: str = "recv") -> None:
        self.command = command
        self.name: str = command  # gymnasium's attribute
        if command == "recv":
            text = "recv() refused: no env was sent an action, and none is owed. `envs.send(actions)` first."
        else:
            text = f"{command}_wait() refused: there is no {command} to wait for. `{command}_async(…)` first."
        Exception.__init__(self, text)


class CallTimeoutError(AiovecError, TimeoutError, multiprocessing.TimeoutError):
    """A call of a `BlockingVectorEnv` was not answered in time; it goes on, and can be waited for again.

    Attributes:
        command: ``"step"``, ``"reset"`` or ``"call"``.
        seconds: How long it was waited for.
        env_ids: The envs that have not answered.
    """

    def __init__(self, command: str, seconds: float, env_ids: Sequence[int]) -> None:
        self.command = command
        self.seconds = seconds
        self.env_ids: tuple[int, ...] = tuple(env_ids)
        who = name_envs(env_ids) if env_ids else "the answer"
        super().__init__(
            f"{command}_wait() has timed out after {seconds:g} s: it still waits for {who}. "
            f"`{command}_wait()` waits again, `reset()` waits it out and discards it, `close()` ends it."
        )


class ClosedEnvironmentError(AiovecError, gymnasium_error.ClosedEnvironmentError):
    """The vector environment is closed, for good.

    Attributes:
        command: The refused call.
    """

    def __init__(self, command: str) -> None:
        self.command = command
        super().__init__(f"{command} on a vector environment that is closed. Build a new one.")


class NotStartedError(AiovecError, RuntimeError):
    """Something was asked that is known only once the envs have been built.

    Attributes:
        command: What was asked: ``"step()"``, or an attribute such as ``"observation_space"``.
    """

    def __init__(self, command: str) -> None:
        self.command = command
        what = f"{command} before the start" if command.endswith(")") else f"`{command}` is known after the start"
        super().__init__(
            f"{what}: the workers build the envs. Start with `async with AsyncVectorEnv(...) as envs:`, "
            "`await envs`, or the first `await envs.reset()`."
        )


class WrongLoopError(AiovecError, RuntimeError):
    """The vector environment, or the batcher, belongs to another event loop.

    Attributes:
        command: The refused call.
        owner: What belongs to it: ``"vector environment"``, ``"batcher"``.
    """

    def __init__(self, command: str, owner: str = "vector environment") -> None:
        self.command = command
        self.owner = owner
        text = (
            f"{command} from another event loop than the one that started this {owner}. "
            f"Use it in that loop, or build one {owner} per loop"
        )
        if owner == "vector environment":
            text += "; `envs.terminate()` ends its workers from anywhere, also when that loop is closed"
        super().__init__(f"{text}.")


class RunningLoopError(AiovecError, RuntimeError):
    """A `BlockingVectorEnv` was used where an event loop runs, which it would block; nothing was done.

    Attributes:
        command: The refused call.
    """

    def __init__(self, command: str) -> None:
        self.command = command
        super().__init__(
            f"{command} inside a running event loop, which it would block (a notebook always runs one). Use "
            "`AsyncVectorEnv` with `await`; or run the code that blocks by `await asyncio.to_thread(…)`."
        )


class WrappedCallError(AiovecError, TypeError):
    """Something was asked of wrapped envs that would go past their wrappers; nothing was done.

    Attributes:
        name: What was asked.
        wrappers: Their names, the outermost first.
    """

    def __init__(self, name: str, wrappers: Sequence[str], advice: str) -> None:
        self.name = name
        self.wrappers: tuple[str, ...] = tuple(wrappers)
        super().__init__(f"`{name}` would go past {', '.join(wrappers)}. {advice}")


class ResetNeeded(AiovecError, gymnasium_error.ResetNeeded):  # noqa: N818  Gymnasium's name
    """Some envs cannot be stepped before they are reset; nothing was changed.

    Attributes:
        command: The refused call.
        env_ids: The envs that need a reset.
        reason: Why: ``"failed in step"``.
    """

    def __init__(self, command: str, env_ids: Sequence[int], reason: str) -> None:
        self.command = command
        self.env_ids: tuple[int, ...] = tuple(env_ids)
        self.reason = reason
        ids = [int(i) for i in env_ids[:8]]
        super().__init__(
            f"{command}() refused: {name_envs(env_ids)} {reason}. Reset first: `envs.reset()` for all, or "
            f"`envs.reset(env_ids={ids}{'...' if len(env_ids) > 8 else ''})` for these alone."
        )


class InvalidActionsError(AiovecError, gymnasium_error.InvalidAction, ValueError):
    """The actions do not fit the action space; no env was stepped by them.

    Attributes:
        leaf: Which part of the actions, or of what a policy gave: ``"actions['move']"``.
        expected: What it should have been.
        got: What it was.
    """

    def __init__(self, leaf: str, expected: str, got: str, *, is_behind_others: bool = False) -> None:
        self.leaf = leaf
        self.expected = expected
        self.got = got
        # A rollout has asked for others before.
        outcome = (
            "No env was stepped by these; steps before them were taken" if is_behind_others else "No env was stepped"
        )
        super().__init__(f"{leaf}: expected {expected}, got {got}. {outcome}.")

    def behind_others(self) -> InvalidActionsError:
        """The same, within a rollout that has asked for steps before this one."""
        return InvalidActionsError(self.leaf, self.expected, self.got, is_behind_others=True)


class InvalidExtrasError(AiovecError, ValueError):
    """What a policy gave beside its actions in a rollout is not like what it gave first; that rollout has ended.

    Attributes:
        leaf: Which part of it: ``"extras['value']"``.
        expected: What it should have been.
        got: What it was.
    """

    def __init__(self, leaf: str, expected: str, got: str) -> None:
        self.leaf = leaf
        self.expected = expected
        self.got = got
        super().__init__(
            f"{leaf} of the policy: expected {expected}, got {got}. Each leaf must be an array with one row for each "
            "env that the policy was shown, of one shape and dtype in every step."
        )


class InvalidEnvResultError(AiovecError, ValueError):
    """An env returned something that its spaces, or Gymnasium's API, do not allow.

    Attributes:
        env_index: The env.
        what: Which part of the result: ``"reward"``, ``"observation['camera']"``.
        expected: What it should have been.
        got: What it was.
    """

    def __init__(self, env_index: int, what: str, expected: str, got: str) -> None:
        self.env_index = env_index
        self.what = what
        self.expected = expected
        self.got = got
        super().__init__(
            f"env {env_index} returned a wrong {what}: expected {expected}, got {got}. "
            "Correct the env, or the space it declares."
        )


class SpaceMismatchError(AiovecError, RuntimeError):
    """The spaces of the sub-envs cannot be batched; the vector was not started.

    Attributes:
        env_index: The first env that differs.
        kind: ``"observation"`` or ``"action"``.
        got: Its space.
        expected: That of the vector.
    """

    def __init__(self, env_index: int, kind: str, got: str, expected: str, advice: str) -> None:
        self.env_index = env_index
        self.kind = kind
        self.got = got
        self.expected = expected
        super().__init__(f"the {kind} space of env {env_index} is {got}, that of the vector is {expected}. {advice}")


class SlabMemoryError(MemoryError, AiovecError):
    """The system has no memory for the shared slab; the vector was not started, or the rollout has not begun.

    Attributes:
        nbytes: How many bytes were asked for.
        reason: What the system says.
    """

    def __init__(self, nbytes: int, reason: str) -> None:
        self.nbytes = nbytes
        self.reason = reason
        super().__init__(
            f"no memory for the {nbytes:,} bytes that observations, actions and rewards share: {reason}. "
            "Use fewer envs, smaller observations, or shorter rollouts."
        )


class WorkerStartError(AiovecError, RuntimeError):
    """The system gave no process, no descriptor or no memory for a worker; nothing is left of the attempt.

    Attributes:
        env_ids: The envs that it was to hold.
        reason: What the system, or Ray, says, and what to do.
        errno: The system's number for the reason; `None` where it has none, as on a Ray cluster.
    """

    def __init__(self, env_ids: Sequence[int], reason: str, errno: int | None = None) -> None:
        self.env_ids: tuple[int, ...] = tuple(env_ids)
        self.reason = reason
        self.errno: int | None = errno
        super().__init__(f"no worker for {name_envs(env_ids)}: {reason}")

    @classmethod
    def of(cls, env_ids: Sequence[int], error: OSError) -> WorkerStartError:
        """What an error of the system means."""
        advice = {
            errno.EMFILE: " A worker takes 8 descriptors of this process: raise its limit (`ulimit -n`), or use fewer"
            " workers.",
            errno.EAGAIN: " Raise the limit of processes (`ulimit -u`), or use fewer workers.",
        }
        return cls(env_ids, f"{error.strerror or error}.{advice.get(error.errno or 0, '')}", error.errno)


class EnvTimeoutError(AiovecError, TimeoutError):
    """Some envs did not answer in time, and their worker was ended; an `AsyncEnv` was only cancelled.

    Attributes:
        env_ids: The envs that did not answer.
        lost_env_ids: All envs of that worker: each needs a reset, which builds it anew. Empty at the start, where
            nothing is left, and for an `AsyncEnv`, whose worker lives.
        command: What they were doing.
        seconds: The limit: of one env's own call, or of the start.
        pid: The worker's process id; `None` if there were several.
        place: On a Ray cluster: the worker's node and its actor. Empty on this machine.
        stack: The worker's Python stack of that moment, innermost call first; empty if it had none yet.
    """

    def __init__(
        self,
        env_ids: Sequence[int],
        command: str,
        seconds: float,
        *,
        lost_env_ids: Sequence[int] = (),
        pid: int | None = None,
        place: str = "",
        stack: str = "",
        is_rebuilt: bool = False,
    ) -> None:
        self.env_ids: tuple[int, ...] = tuple(env_ids)
        self.lost_env_ids: tuple[int, ...] = tuple(lost_env_ids)
        self.command = command
        self.seconds = seconds
        self.pid = pid
        self.place = place
        self.stack = stack
        text = f"{name_envs(env_ids)} did not end {command} within {seconds:g} s"
        if lost_env_ids:
            advice = _REBUILT if is_rebuilt else _how_to_rebuild(lost_env_ids)
            text += f"; the worker (pid {pid}{f', {place}' if place else ''}) was killed. {advice}"
        super().__init__(text + _stack_text(stack))

    def during(self, _command: str | None, *, is_rebuilt: bool = False) -> EnvTimeoutError:
        """The same, for one more call that waits: each awaiting task raises an exception of its own."""
        return EnvTimeoutError(
            self.env_ids,
            self.command,
            self.seconds,
            lost_env_ids=self.lost_env_ids,
            pid=self.pid,
            place=self.place,
            stack=self.stack,
            is_rebuilt=is_rebuilt,
        )


class CrashLoopError(AiovecError):
    """Some envs failed again and again, although they were built anew each time (`on_failure="restart"`).

    Its `__cause__` is the last failure.

    Attributes:
        env_ids: The envs; those that ended together with one worker share the error.
        max_restarts: How many failures in a row are borne.
        exceptions: Their failures without a successful step in between, the first one first.
    """

    def __init__(self, env_ids: Sequence[int], max_restarts: int, exceptions: Sequence[Exception]) -> None:
        self.env_ids: tuple[int, ...] = tuple(env_ids)
        self.max_restarts = max_restarts
        self.exceptions: tuple[Exception, ...] = tuple(exceptions)
        story = "".join(
            f"\n  {number}. {type(exception).__name__}: {_first_line(exception)}"
            for number, exception in enumerate(exceptions, 1)
        )
        super().__init__(
            f"{name_envs(env_ids)} failed {len(exceptions)} times without a successful step in between "
            f"(max_restarts={max_restarts}). {_how_to_rebuild(env_ids)}{story}"
        )


def _first_line(exception: Exception) -> str:
    try:
        return str(exception).partition("\n")[0]
    except Exception as error:  # noqa: BLE001  the user's own __str__
        return f"<its __str__ raised {type(error).__name__}>"


class RemoteError(AiovecError):
    """Stands for an exception of an env, or of a batcher's function, that cannot be raised as itself.

    That is one that does not pickle (its text and its formatted traceback came instead), or one whose
    type would stop, cancel or end the awaiting task (`SystemExit`, `KeyboardInterrupt`,
    `asyncio.CancelledError`, `StopIteration`, …): then `__cause__` is the original.

    Attributes:
        type_name: The qualified name of the original type.
        text: The original's text.
        formatted: The original's traceback as the worker printed it; empty where `__cause__` tells.
    """

    def __init__(self, type_name: str, text: str, formatted: str = "") -> None:
        self.type_name = type_name
        self.text = text
        self.formatted = formatted
        message = f"{type_name}: {text}" if text else type_name
        super().__init__(f"{message}\n\n{formatted}" if formatted else message)


class WorkerDied(AiovecError):  # noqa: N818  it states a fact
    """A worker process ended although nobody had asked it to.

    Attributes:
        env_ids: The envs it held.
        pid: Its process id.
        exitcode: As in `multiprocessing.Process.exitcode`: negative for a signal.
        command: What it was doing, or `None` when it was idle.
        stderr: The last 4 KiB that it wrote there.
        env_index: The env whose own call it was in, or `None`.
        stack: Its last Python stack, innermost call first, where `faulthandler` could write one: not after
            SIGKILL, and not on a Ray cluster.
        place: On a Ray cluster: its node and its actor. Empty on this machine.
        cause: On a Ray cluster: why it died, as Ray tells it. Empty on this machine.
    """

    def __init__(
        self,
        env_ids: Sequence[int],
        pid: int,
        exitcode: int | None,
        command: str | None,
        stderr: str,
        *,
        env_index: int | None = None,
        stack: str = "",
        place: str = "",
        cause: str = "",
        is_rebuilt: bool = False,
    ) -> None:
        self.env_ids: tuple[int, ...] = tuple(env_ids)
        self.env_index = env_index
        self.place = place
        self.cause = cause
        self.stack = stack
        self.pid = pid
        self.exitcode = exitcode
        self.command = command
        self.stderr = stderr
        if place:
            how = "died"
        elif exitcode is None:
            how = "closed its connection"
        elif exitcode < 0:
            how = f"was killed by {_signal_name(-exitcode)}"
        else:
            how = f"exited with code {exitcode}"
        during = f"during {command}" if command else "while idle"
        inside = f", inside env {env_index}" if env_index is not None and len(env_ids) > 1 else ""
        tail = f"\nThe end of its stderr:\n{stderr.rstrip()}" if stderr.strip() else ""
        advice = _REBUILT if is_rebuilt else _how_to_rebuild(env_ids) if command not in _AT_THE_START else ""
        who = f"the worker of {name_envs(env_ids)} (pid {pid or 'unknown'}{f', {place}' if place else ''})"
        because = f"\nWhat Ray says of it: {cause}" if cause else ""
        told = f"{who} {how} {during}{inside}. {advice}".rstrip()
        super().__init__(f"{told}{because}{_stack_text(stack)}{tail}")

    def during(self, command: str | None, *, is_rebuilt: bool = False) -> WorkerDied:
        """The same, as it is told to a call that waits."""
        facts = (self.env_ids, self.pid, self.exitcode, command, self.stderr)
        return WorkerDied(
            *facts,
            env_index=self.env_index,
            stack=self.stack,
            place=self.place,
            cause=self.cause,
            is_rebuilt=is_rebuilt,
        )


_AT_THE_START = ("build", "map")  # of which nothing is left
_REBUILT = "Another worker builds its envs anew."  # with `on_failure="restart"`


def _how_to_rebuild(env_ids: Sequence[int]) -> str:
    ids = [int(i) for i in env_ids[:8]]
    more = ", ..." if len(env_ids) > 8 else ""
    return f"A reset builds its envs anew: `envs.reset(env_ids={str(ids)[:-1]}{more}])`, or of all."


def _stack_text(stack: str) -> str:
    return f"\nIts Python stack, innermost call first:\n{stack.rstrip()}" if stack.strip() else ""


def _signal_name(number: int) -> str:
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = f"signal {number}"
    return f"{name} (out of memory?)" if name == "SIGKILL" else name


class BatcherClosedError(AiovecError, RuntimeError):
    """The batcher is closed, for good; the function did not see the observation, or was cancelled."""

    def __init__(self, waited: bool) -> None:
        how = "was closed before it answered this call" if waited else "is closed, and takes no call"
        super().__init__(f"the batcher {how}. Build a new one.")


class BatcherFullError(AiovecError, RuntimeError):
    """As many callers wait as may wait; this one was not queued.

    Attributes:
        max_pending: How many may wait.
    """

    def __init__(self, max_pending: int) -> None:
        self.max_pending = max_pending
        super().__init__(
            f"the batcher is full: {max_pending} callers wait, and max_pending allows no more. Call again later."
        )


class InvalidObservationError(AiovecError, ValueError):
    """An observation differs from those that it would be batched with; it was not queued.

    Attributes:
        leaf: Which part of it: ``"observation['camera']"``.
        expected: What the others have there.
        got: What it has.
    """

    def __init__(self, leaf: str, expected: str, got: str) -> None:
        self.leaf = leaf
        self.expected = expected
        self.got = got
        super().__init__(
            f"{leaf}: expected {expected}, as in the batcher's other observations, got {got}. It was not queued."
        )


class InvalidBatchResultError(AiovecError, ValueError):
    """A batcher's function did not return one row for each observation.

    Attributes:
        leaf: Which part of it: ``"result[1]"``.
        num_rows: How many rows were expected.
        got: What it was.
    """

    def __init__(self, leaf: str, num_rows: int, got: str) -> None:
        self.leaf = leaf
        self.num_rows = num_rows
        self.got = got
        super().__init__(
            f"the batcher's function returned a wrong {leaf}: expected {num_rows} rows, one for each observation, "
            f"got {got}. Return an array, a tensor or a list of that length, or a dict or tuple of such."
        )


@dataclass(frozen=True)
class Failure:
    """One failed env.

    Attributes:
        env_index: The env.
        pid: Of the worker that held it; `None` where several were late at the start.
        command: What it was asked for: ``"step"``, ``"reset"``, ``"build"``, ….
        exception: What it raised.
    """

    env_index: int
    pid: int | None
    command: str
    exception: BaseException


# A private mark, so that an exception group that an env itself raised is told from the one that aiovec made.
_FAILURES = "_aiovec_failures"


def failures(exception: BaseException) -> list[Failure]:
    """Every failed env in an exception that aiovec raised.

    Args:
        exception: What an awaited call raised: one env's exception, the group of several, or a group that
            `except*` or a task group made of such.

    Returns:
        One `Failure` an env, in ascending env index; empty if `exception` is not of an env.
    """
    marked: list[Failure] | None = getattr(exception, _FAILURES, None)
    if marked is not None:
        return list(marked)
    if isinstance(exception, (WorkerDied, EnvTimeoutError)):
        lost = exception.env_ids if isinstance(exception, WorkerDied) else exception.lost_env_ids or exception.env_ids
        return [Failure(index, exception.pid, exception.command or "nothing", exception) for index in lost]
    if isinstance(exception, CrashLoopError):
        last = failures(exception.exceptions[-1])
        command, pid = (last[0].command, last[0].pid) if last else ("build", None)
        return [Failure(index, pid, command, exception) for index in exception.env_ids]
    if isinstance(exception, BaseExceptionGroup):
        # Of one dead worker each task has an exception of its own.
        by_env = {failure.env_index: failure for member in exception.exceptions for failure in failures(member)}
        return [by_env[env_index] for env_index in sorted(by_env)]
    return []


def mark_failures(raised: BaseException, of: Sequence[Failure]) -> None:
    """Ties failed envs to the exception that is raised for them, whatever its class does with attributes."""
    raised.__dict__[_FAILURES] = list(of)
    if len(of) == 1 and isinstance(raised, BaseExceptionGroup):  # an env's own: `except*` makes others of its members
        for member in raised.exceptions:
            mark_failures(member, of)


def add_note(raised: BaseException, note: str) -> None:
    """Adds a note, also to a class that forbids attributes to be set."""
    notes: list[str] = raised.__dict__.setdefault("__notes__", [])
    if note not in notes:  # an env may raise the same object again and again
        notes.append(note)
