"""`WrappedVectorEnv`: what `aiovec.wrap` gives. One that is built needs greenlet, an extra; its name does not."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from types import TracebackType
from typing import Any, NoReturn, Self

import gymnasium as gym
from gymnasium.vector import VectorEnv, VectorWrapper

from aiovec.batches import ResetResult, StepResult
from aiovec.errors import (
    AlreadyPendingCallError,
    ClosedEnvironmentError,
    NotStartedError,
    ResetNeeded,
    WrappedCallError,
)
from aiovec.vector_env import AsyncVectorEnv

__all__ = ["VectorWrapperFn", "WrappedVectorEnv"]

VectorWrapperFn = Callable[[VectorEnv[Any, Any, Any]], VectorEnv[Any, Any, Any]]  # a class, or a function that wraps

_PAST_WRAPPERS = frozenset({"send", "recv", "batches", "rollout", "rollouts"})
_SPACES = ("observation_space", "single_observation_space", "action_space", "single_action_space")


class WrappedVectorEnv:
    """A vector with wrappers around it: `reset`, `step` and `render` go through them, one call at a time.

    Wrappers are ordinary code, and run on the loop's thread: one that takes long, such as a video that is encoded, holds up the
    loop for so long. Their attributes, such as ``return_queue`` or ``obs_rms``, are attributes here, to be read and to be
    set; where several have one of that name, the outermost is meant. `call`, `get_attr`, `set_attr`, `statistics` and all
    else that no wrapper knows of is the vector's own. `send`, `recv`, rollouts and single envs are refused, since wrappers would
    not see their rows: use `unwrapped` for these, and for as long as you do, nothing else.

    A cancelled call has gone on in the workers while the wrappers have not seen its result: what follows is `reset`, or `close`. Where
    an env fails in a `step`, wrappers have not seen the rows of the others in that step.

    Args:
        envs: The vector.
        wrappers: See `wrap`.
    """

    __slots__ = ("_busy", "_envs", "_is_interrupted", "_outermost", "_under_await", "_wrappers")

    def __init__(self, envs: AsyncVectorEnv, wrappers: Sequence[VectorWrapperFn]) -> None:
        self._envs: AsyncVectorEnv = envs
        self._wrappers: tuple[VectorWrapperFn, ...] = tuple(wrappers)
        self._outermost: VectorEnv[Any, Any, Any] | None = None
        from aiovec.greenlets import UnderAwait  # noqa: PLC0415  it needs an extra

        self._under_await: UnderAwait = UnderAwait()
        self._busy: bool = False
        self._is_interrupted: bool = False  # since a call was cancelled, wrappers and envs are not in step

    def __repr__(self) -> str:
        if self._outermost is None:
            return f"<WrappedVectorEnv of {self._envs!r}>"
        return repr(self._outermost)

    def __len__(self) -> int:
        return len(self._envs)

    @property
    def unwrapped(self) -> AsyncVectorEnv:
        """The vector itself."""
        return self._envs

    @property
    def wrappers(self) -> tuple[VectorEnv[Any, Any, Any], ...]:
        """The wrappers, the outermost first; none before the start."""
        return tuple(self._chain())

    @property
    def num_envs(self) -> int:
        """How many envs."""
        return self._envs.num_envs

    @property
    def closed(self) -> bool:
        """Whether `close` or `terminate` was called."""
        return self._envs.closed

    @property
    def metadata(self) -> dict[str, Any]:
        """As the outermost wrapper has it."""
        return self._known("metadata").metadata

    @property
    def render_mode(self) -> str | None:
        """As the outermost wrapper has it."""
        return self._known("render_mode").render_mode

    @property
    def observation_space(self) -> gym.Space[Any]:
        """Of a batch, as the outermost wrapper has it."""
        return self._known("observation_space").observation_space

    @property
    def single_observation_space(self) -> gym.Space[Any]:
        """Of one env, as the outermost wrapper has it."""
        return self._known("single_observation_space").single_observation_space

    @property
    def action_space(self) -> gym.Space[Any]:
        """Of a batch, as the outermost wrapper has it."""
        return self._known("action_space").action_space

    @property
    def single_action_space(self) -> gym.Space[Any]:
        """Of one env, as the outermost wrapper has it."""
        return self._known("single_action_space").single_action_space

    # ---- lifetime

    async def __aenter__(self) -> Self:
        return await self._start()

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    def __await__(self) -> Generator[Any, None, Self]:
        """Starts the vector, if it is not, and builds the wrappers; gives this object."""
        return self._start().__await__()

    async def _start(self) -> Self:
        if self._outermost is None:
            await self._envs
        if self._outermost is None:  # still: another task may have been first
            try:
                self._outermost = await self._alone("start", self._wrapped)
            except AlreadyPendingCallError:
                raise
            except BaseException:
                await self._envs.close()
                raise
        return self

    def _wrapped(self) -> VectorEnv[Any, Any, Any]:
        envs: VectorEnv[Any, Any, Any] = _Innermost(self._envs)
        for wrapper in self._wrappers:
            envs = wrapper(envs)
        return envs

    async def close(self, *, terminate: bool = False) -> None:
        """Closes the wrappers, the envs and the workers; see `AsyncVectorEnv.close`.

        A call that another task awaits is told `ClosedEnvironmentError`.
        """
        if self._busy or terminate:
            await self._envs.close(terminate=terminate)  # what another task awaits in the wrappers ends
        outermost, self._outermost = self._outermost, None
        try:
            if outermost is not None:
                await self._under_await.run(outermost.close)
        finally:
            await self._envs.close(terminate=terminate)

    aclose = close

    def terminate(self) -> None:
        """Ends the workers at once, without `await`; wrappers are not closed."""
        self._envs.terminate()

    # ---- through the wrappers

    async def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> ResetResult:
        """Resets all envs, or by ``options["reset_mask"]`` some; starts the vector if it is not.

        Args:
            seed: See `AsyncVectorEnv.reset`.
            options: Likewise.

        Returns:
            What the outermost wrapper returns.

        Raises:
            AlreadyPendingCallError: Another task is in a call of this vector; nothing was changed.
            Exception: As `AsyncVectorEnv.reset`, or what a wrapper raised.
        """
        is_of_some = options is not None and "reset_mask" in options  # a wrapper may take it out
        await self._start()
        result: ResetResult = await self._alone("reset", self._known("reset()").reset, seed=seed, options=options)
        if not is_of_some:  # else wrappers still miss a result of the others
            self._is_interrupted = False
        return result

    async def step(self, actions: Any) -> StepResult:
        """Steps every env once.

        Args:
            actions: As the outermost wrapper's `action_space` says.

        Returns:
            What the outermost wrapper returns.

        Raises:
            AlreadyPendingCallError: Another task is in a call of this vector; nothing was changed.
            ResetNeeded: A call was cancelled, or an env needs a reset; nothing was changed.
            Exception: As `AsyncVectorEnv.step`, or what a wrapper raised.
            asyncio.CancelledError: The envs go on with the step; `reset` waits it out.
        """
        outermost = self._known("step()")
        self._refuse_interrupted("step")
        result: StepResult = await self._alone("step", outermost.step, actions)
        return result

    async def render(self) -> tuple[Any, ...] | None:
        """What the outermost wrapper renders: as a rule one frame an env."""
        outermost = self._known("render()")
        self._refuse_interrupted("render")
        frames: tuple[Any, ...] | None = await self._alone("render", outermost.render)
        return frames

    async def _alone(self, command: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Runs a function of the wrappers, which know of one call at a time."""
        if self._busy:
            raise AlreadyPendingCallError(command, range(self.num_envs), owed=False)
        self._busy = True
        try:
            return await self._under_await.run(function, *args, **kwargs)
        except Exception:
            raise
        except BaseException:
            self._is_interrupted = True
            raise
        finally:
            self._busy = False

    def _refuse_interrupted(self, command: str) -> None:
        if self._is_interrupted:
            reason = "were in a call that was cancelled, whose result their wrappers have not seen"
            raise ResetNeeded(command, range(self.num_envs), reason)

    def _known(self, name: str) -> VectorEnv[Any, Any, Any]:
        if self._outermost is None:
            raise ClosedEnvironmentError(name) if self._envs.closed else NotStartedError(name)
        return self._outermost

    # ---- attributes

    def _chain(self) -> Iterator[VectorEnv[Any, Any, Any]]:
        envs = self._outermost
        while envs is not None and not isinstance(envs, _Innermost):
            yield envs
            envs = envs.env if isinstance(envs, VectorWrapper) else None

    def __getattr__(self, name: str) -> Any:
        if name in _PAST_WRAPPERS:
            self._refuse(name)
        if name.startswith("_"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        for wrapper in self._chain():
            if hasattr(wrapper, name):
                return getattr(wrapper, name)
        return getattr(self._envs, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in WrappedVectorEnv.__slots__:
            object.__setattr__(self, name, value)
            return
        for wrapper in self._chain():
            if hasattr(wrapper, name):
                setattr(wrapper, name, value)
                return
        raise AttributeError(f"none of the wrappers has an attribute {name!r}: {self!r}")

    def __getitem__(self, env_index: int) -> NoReturn:
        self._refuse(f"envs[{env_index!r}]")

    def __iter__(self) -> NoReturn:
        self._refuse("iter(envs)")

    def _refuse(self, name: str) -> NoReturn:
        wrappers = [type(wrapper).__name__ for wrapper in self._chain()] or ["the wrappers"]
        raise WrappedCallError(name, wrappers, "`reset` and `step` go through them; `envs.unwrapped` has the rest.")


class _Innermost(VectorEnv[Any, Any, Any]):
    """The started vector, as wrappers see it: its methods wait by handing a coroutine to the task that runs them."""

    def __init__(self, envs: AsyncVectorEnv) -> None:
        from aiovec.greenlets import await_here  # noqa: PLC0415  it needs an extra

        self._await_here = await_here
        self._envs = envs
        self.num_envs = envs.num_envs
        self.metadata = envs.metadata
        self.render_mode = envs.render_mode
        self.spec = envs.spec
        for name in _SPACES:
            setattr(self, name, getattr(envs, name))

    def __repr__(self) -> str:
        return repr(self._envs)

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> ResetResult:
        return self._await_here(self._envs.reset(seed=seed, options=options), _nobody_awaits)

    def step(self, actions: Any) -> StepResult:
        return self._await_here(self._envs.step(actions), _nobody_awaits)

    def render(self) -> tuple[Any, ...]:
        return self._await_here(self._envs.render(), _nobody_awaits)

    def call(self, name: str, /, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        return self._await_here(self._envs.call(name, *args, **kwargs), _nobody_awaits)

    def get_attr(self, name: str) -> tuple[Any, ...]:
        return self._await_here(self._envs.get_attr(name), _nobody_awaits)

    def set_attr(self, name: str, values: Any) -> None:
        self._await_here(self._envs.set_attr(name, values), _nobody_awaits)

    def close_extras(self, **kwargs: Any) -> None:
        self._await_here(self._envs.close(terminate=bool(kwargs.get("terminate"))), _nobody_awaits)


def _nobody_awaits() -> WrappedCallError:
    advice = (
        "It must wait for the workers, so it works only inside of `await envs.reset(…)`, `step`, `render` and `close`."
    )
    return WrappedCallError("a call of a wrapper by itself", ["the task that awaits"], advice)
