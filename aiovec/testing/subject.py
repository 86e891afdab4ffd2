"""`Subject`: the vector that is checked, and what all checks do with it."""

from __future__ import annotations

import asyncio
import contextlib
import copy
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeVar

from gymnasium.vector import AutoresetMode

from aiovec.testing.contract_error import ContractError
from aiovec.testing.differences import difference
from aiovec.testing.tapes import Asked, BatchTape, EnvFn, record_batches

__all__ = ["FIELDS", "NOT_AS_SYNC", "Maker", "Subject", "shown"]

Maker = Callable[..., Any]
_Error = TypeVar("_Error", bound=Exception)

FIELDS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "reset": ("observations", "infos"),
        "step": ("observations", "rewards", "terminations", "truncations", "infos"),
    }
)
NOT_AS_SYNC = "gymnasium.vector.SyncVectorEnv gives something else for the same seeds and actions."
_LONGEST_SHOWN = 300  # characters


class Subject:
    """A maker of vectors, and the envs that they have.

    Args:
        maker: Builds a vector that is not started.
        env_fns: The envs.
        users_env: The env that its author wants to have checked, or `None`.
        seed: Of envs and actions.
        num_steps: How long the trajectories are.
    """

    def __init__(
        self, maker: Maker, env_fns: Sequence[EnvFn], users_env: EnvFn | None, seed: int, num_steps: int
    ) -> None:
        self.env_fns: tuple[EnvFn, ...] = tuple(env_fns)
        self.num_envs: int = len(env_fns)
        self.users_env: EnvFn | None = users_env
        self.seed: int = seed
        self.num_steps: int = num_steps
        self.check: str = ""
        self.where: str = ""
        self.has_workers: bool = True
        self.render_mode: str | None = None
        self._maker = maker
        self._tapes: dict[tuple[AutoresetMode, bool], BatchTape] = {}

    def __repr__(self) -> str:
        return f"<Subject of {self._maker!r}, check={self.check!r}, where={self.where!r}>"

    # ---- the vector

    def build(self, env_fns: Sequence[EnvFn] | None = None, **options: Any) -> Any:
        """A vector that is not started."""
        options.setdefault("autoreset_mode", AutoresetMode.NEXT_STEP)
        return self._maker(list(self.env_fns if env_fns is None else env_fns), **options)

    @contextlib.asynccontextmanager
    async def started(self, env_fns: Sequence[EnvFn] | None = None, **options: Any) -> AsyncGenerator[Any]:
        """A vector that is started, and closed in the end; where a check fails it is not asked any more, but ended."""
        vector = self.build(env_fns, **options)
        try:
            self.where = "the start"
            await vector
            self.where = "the calls after the start"
            yield vector
            self.where = "the close"
            await vector.close()
        except BaseException:
            vector.terminate()
            raise

    async def tape(self, mode: AutoresetMode, *, resets_between: bool = True) -> BatchTape:
        """What `SyncVectorEnv` does with the same envs, seeds and actions."""
        key = (mode, resets_between)
        if key not in self._tapes:
            self.where = f"gymnasium.vector.SyncVectorEnv ({mode.name})"
            self._tapes[key] = await asyncio.to_thread(
                record_batches, self.env_fns, mode, self.seed, self.num_steps, resets_between=resets_between
            )
        return self._tapes[key]

    @property
    def has_compared_without_ends(self) -> bool:
        """Whether there are tapes, and in none of them an episode ended."""
        return bool(self._tapes) and not any(tape.has_ended_episodes for tape in self._tapes.values())

    async def ask(self, envs: Any, asked: Asked) -> Any:
        """Asks a vector, or a sub-env, what was asked on a tape; the arguments must be as they were."""
        self.where = asked.what
        arguments, keywords = copy.deepcopy((asked.arguments, asked.keywords))
        result = await getattr(envs, asked.method)(*arguments, **keywords)
        given = (asked.arguments, asked.keywords)
        self.expect_same((arguments, keywords), given, f"{asked.what}, arguments", "The caller's arguments are his.")
        return result

    async def replay(self, envs: Any, tape: BatchTape, meaning: str = NOT_AS_SYNC) -> None:
        """Asks all that is on a tape, and compares."""
        for asked in tape.asked:
            self.expect_result(await self.ask(envs, asked), asked.result, asked.what, asked.method, meaning)

    # ---- what is expected

    def violation(self, where: str, expected: str, got: str, meaning: str) -> ContractError:
        """What a check found."""
        return ContractError(self.check, where, expected, got, meaning)

    def expect(self, is_so: bool, where: str, expected: str, got: object, meaning: str) -> None:
        """Raises unless it is so."""
        if not is_so:
            raise self.violation(where, expected, shown(got), meaning)

    def expect_same(self, got: Any, expected: Any, where: str, meaning: str) -> None:
        """Raises unless both are equal in every bit."""
        if (found := difference(got, expected)) is not None:
            raise self.violation(f"{where}{found.at}", _cut(found.expected), _cut(found.got), meaning)

    def expect_result(self, got: Any, expected: Any, where: str, method: str, meaning: str) -> None:
        """The same for what `reset` or `step` gave; the message names the leaf."""
        fields = FIELDS[method]
        is_whole = isinstance(got, tuple) and len(got) == len(fields)
        self.expect(is_whole, where, f"a tuple of {', '.join(fields)}", got, meaning)
        for field, mine, theirs in zip(fields, got, expected, strict=True):
            self.expect_same(mine, theirs, f"{where}, {field}", meaning)

    async def expect_raised(
        self, error_type: type[_Error], call: Callable[[], Awaitable[Any]], where: str, meaning: str
    ) -> _Error:
        """Gives what a call raised, which is of that type."""
        self.where = where
        try:
            result = await call()
        except error_type as error:
            return error
        except Exception as error:
            raise self.violation(where, _name(error_type), f"{_name(type(error))}: {error}", meaning) from error
        raise self.violation(where, _name(error_type), f"no exception, but {shown(result)}", meaning)


def shown(value: object) -> str:
    """A value as messages have it."""
    return _cut(value if isinstance(value, str) else repr(value))


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."


def _name(error_type: type[BaseException]) -> str:
    return error_type.__qualname__
