"""`check_vector_env`: the contract of a vector as a function, and the table of its checks."""

from __future__ import annotations

import asyncio
import functools
import warnings
from collections.abc import Awaitable, Callable, Collection, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from gymnasium.vector import AutoresetMode

from aiovec.testing import env_checks, failure_checks, vector_checks
from aiovec.testing.contract_error import ContractError
from aiovec.testing.faulty_env import FaultyEnv
from aiovec.testing.observing import held_by_process
from aiovec.testing.subject import Maker, Subject
from aiovec.testing.tapes import FEWEST_STEPS, EnvFn, without_await

__all__ = ["CHECKS", "check_vector_env"]

_NUM_ENVS = 3
_EPISODE_LENGTHS = (3, 4, 6)


class _Check(NamedTuple):
    run: Callable[[Subject], Awaitable[None]]
    applies: Callable[[Subject], bool]


def _always(_subject: Subject) -> bool:
    return True


def _of_an_env(subject: Subject) -> bool:
    return subject.users_env is not None


def _of_a_vector(subject: Subject) -> bool:
    return subject.users_env is None


def _with_workers(subject: Subject) -> bool:
    return subject.has_workers


def _of_a_vector_with_workers(subject: Subject) -> bool:
    return subject.users_env is None and subject.has_workers


def _with_frames(subject: Subject) -> bool:
    return subject.render_mode == "rgb_array"


def _with_proc(_subject: Subject) -> bool:
    return bool(held_by_process())


CHECKS: Mapping[str, _Check] = MappingProxyType(
    {
        "env_fn_pickles": _Check(env_checks.env_fn_pickles, _of_an_env),
        "env_is_determined": _Check(env_checks.env_is_determined, _of_an_env),
        "env_fits_spaces": _Check(env_checks.env_fits_spaces, _of_an_env),
        "env_keeps_results": _Check(env_checks.env_keeps_results, _of_an_env),
        "before_start": _Check(vector_checks.before_start, _always),
        "spaces": _Check(vector_checks.spaces, _always),
        "next_step": _Check(functools.partial(vector_checks.autoreset, mode=AutoresetMode.NEXT_STEP), _always),
        "same_step": _Check(functools.partial(vector_checks.autoreset, mode=AutoresetMode.SAME_STEP), _always),
        "disabled": _Check(functools.partial(vector_checks.autoreset, mode=AutoresetMode.DISABLED), _always),
        "num_workers": _Check(vector_checks.num_workers, _with_workers),
        "ownership": _Check(vector_checks.ownership, _always),
        "render": _Check(vector_checks.render, _with_frames),
        "attributes": _Check(vector_checks.attributes, _always),
        "part_resets": _Check(vector_checks.part_resets, _always),
        "part_batches": _Check(vector_checks.part_batches, _always),
        "sub_envs": _Check(vector_checks.sub_envs, _always),
        "cancellation": _Check(vector_checks.cancellation, _with_workers),
        "close": _Check(vector_checks.close, _always),
        "nothing_left": _Check(vector_checks.nothing_left, _with_proc),
        "free_loop": _Check(vector_checks.free_loop, _with_workers),
        "exception": _Check(failure_checks.exception, _of_a_vector),
        "others_whole": _Check(failure_checks.others_whole, _of_a_vector),
        "several_failures": _Check(failure_checks.several_failures, _of_a_vector),
        "unpicklable_exception": _Check(failure_checks.unpicklable_exception, _of_a_vector),
        "exit_in_env": _Check(failure_checks.exit_in_env, _of_a_vector),
        "wrong_result": _Check(failure_checks.wrong_result, _of_a_vector),
        "failed_start": _Check(failure_checks.failed_start, _of_a_vector),
        "failed_reset": _Check(failure_checks.failed_reset, _of_a_vector),
        "failed_close": _Check(failure_checks.failed_close, _of_a_vector),
        "worker_died": _Check(failure_checks.worker_died, _of_a_vector_with_workers),
        "stuck_env": _Check(failure_checks.stuck_env, _of_a_vector_with_workers),
        "restart": _Check(failure_checks.restart, _of_a_vector),
    }
)


async def check_vector_env(
    maker: Maker,
    env_fn: EnvFn | None = None,
    *,
    seed: int = 1,
    num_steps: int = 250,
    skip: Collection[str] = (),
    seconds_per_check: float = 120,
) -> tuple[str, ...]:
    """Checks an env, or a vector, against the contract of aiovec.

    For who writes an env: does it work in a vector, in worker processes, and equally every time?

        await check_vector_env(aiovec.AsyncVectorEnv, MyEnv)

    For who writes a backend, a subclass or a replacement of `AsyncVectorEnv`: does it keep what that promises?

        await check_vector_env(functools.partial(MyVectorEnv, num_workers=2))

    In a test suite this is one test. It steps vectors of three envs, and looks at this process as a whole: nothing
    else should start processes or block the event loop meanwhile. Checks are made in this order; each begins with a new
    vector, so that it can be skipped:

    | check | what is checked | when |
    | --- | --- | --- |
    | ``env_fn_pickles`` | it goes to a worker by cloudpickle | with `env_fn` |
    | ``env_is_determined`` | the env does the same for the same seed and actions | with `env_fn` |
    | ``env_fits_spaces`` | its observations are in its space | with `env_fn` |
    | ``env_keeps_results`` | it does not write into what it returned | with `env_fn` |
    | ``before_start`` | a vector that is not started knows its numbers, and can be closed | |
    | ``spaces`` | spaces and metadata are those of `SyncVectorEnv` | |
    | ``next_step``, ``same_step``, ``disabled`` | so is each result, step for step, in that autoreset mode | |
    | ``num_workers`` | results do not depend on `num_workers`, an option that `maker` takes | with workers |
    | ``ownership`` | what was returned never changes | |
    | ``render`` | frames are those of `SyncVectorEnv` | render mode ``"rgb_array"`` |
    | ``attributes`` | `set_attr`, `get_attr`, `call`, also with `env_ids` | |
    | ``part_resets`` | `reset(env_ids=…)` gives dense rows, and leaves the other envs as they are | |
    | ``part_batches`` | `send` and `recv` give each env's own rows, each once | |
    | ``sub_envs`` | `envs[i]` gives what the env gives by itself | |
    | ``cancellation`` | a cancelled step is owed: refused, collected, discarded | with workers |
    | ``close`` | it is for good, and may be repeated | |
    | ``nothing_left`` | no process and no descriptor is left after a close or `terminate` | on Linux |
    | ``free_loop`` | a heartbeat on the event loop goes on | with workers |
    | ``exception`` | type, arguments, notes, the env's frames, whose it was | without `env_fn` |
    | ``others_whole`` | the other envs were stepped; the failed one needs a reset | without `env_fn` |
    | ``several_failures`` | they are an `ExceptionGroup` | without `env_fn` |
    | ``unpicklable_exception``, ``exit_in_env`` | they arrive as `RemoteError` | without `env_fn` |
    | ``wrong_result`` | an observation that does not fit is refused | without `env_fn` |
    | ``failed_start``, ``failed_reset``, ``failed_close`` | each raises what the env raised | without `env_fn` |
    | ``worker_died`` | SIGKILL and a segmentation fault are told, and mended by a reset | without, with workers |
    | ``stuck_env`` | `step_timeout`, an option that `maker` takes, ends what is stuck | without, with workers |
    | ``restart`` | `on_failure="restart"`, likewise, gives a row that says so | without `env_fn` |

    Args:
        maker: Called as `maker(env_fns, **options)`, it builds a vector that is not started; it takes the option
            `autoreset_mode`, and those that the table names. `num_workers` of that vector says whether it has workers.
        env_fn: Builds the env that is to be checked, a `gymnasium.Env` or an `AsyncEnv`. `None`: it is the vector that is
            to be checked, with a `FaultyEnv` for each env.
        seed: Of envs and actions.
        num_steps: How many steps trajectories have; more than an episode has, or autoreset is not compared.
        skip: Checks that are not to be made.
        seconds_per_check: A check that takes longer has failed: something hangs.

    Returns:
        The names of the checks that were made.

    Raises:
        ContractError: A check failed; the message says which one, where, what was expected and what came, and what that
            means.
        TypeError: `maker` or `env_fn` is no function.
        ValueError: There is no check of a name in `skip`; or `num_steps` is below 40.

    Warns:
        UserWarning: No episode ended within `num_steps`.
    """
    for name, function in (("maker", maker), ("env_fn", env_fn)):
        given: object = function
        if not (callable(given) or (given is None and name == "env_fn")):
            raise TypeError(f"{name}={given!r}: expected a function, such as a class, that builds one")
    if unknown := sorted(set(skip) - set(CHECKS)):
        raise ValueError(f"skip={unknown}: no such check; there are {', '.join(CHECKS)}")
    if num_steps < FEWEST_STEPS:
        raise ValueError(f"num_steps={num_steps!r}: expected a number of steps from {FEWEST_STEPS}")
    env_fns: list[EnvFn] = [functools.partial(FaultyEnv, episode_length=length) for length in _EPISODE_LENGTHS]
    subject = Subject(maker, [env_fn] * _NUM_ENVS if env_fn is not None else env_fns, env_fn, seed, num_steps)
    subject.render_mode = await asyncio.to_thread(_render_mode_of, subject.env_fns[0])
    envs = subject.build()
    subject.has_workers = envs.num_workers != 0
    await envs.close()
    made: list[str] = []
    for name, check in CHECKS.items():
        if name not in skip and check.applies(subject):
            await _make(name, check, subject, seconds_per_check)
            made.append(name)
    if subject.has_compared_without_ends:
        warnings.warn(
            f"no episode ended within num_steps={num_steps}: autoreset was not compared", UserWarning, stacklevel=2
        )
    return tuple(made)


async def _make(name: str, check: _Check, subject: Subject, seconds: float) -> None:
    subject.check, subject.where = name, "its beginning"
    limit = asyncio.timeout(seconds)
    try:
        async with limit:
            await check.run(subject)
    except ContractError:
        raise
    except Exception as error:
        if limit.expired():
            got, meaning = f"nothing for {seconds:g} s", "Something waits for what never comes."
            raise ContractError(name, subject.where, "an end", got, meaning) from error
        got = f"{type(error).__qualname__}: {error}"
        meaning = "This call must work: the exception itself is the cause of this one."
        raise ContractError(name, subject.where, "a result", got, meaning) from error


def _render_mode_of(env_fn: EnvFn) -> Any:
    env = without_await(env_fn)
    try:
        return env.render_mode
    finally:
        env.close()
