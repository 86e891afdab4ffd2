"""Envs that fail, block or tell where they live, as the tests in `faults/` ask, and the gate such a test holds."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import fcntl
import importlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NoReturn, Self

import anyio
import gymnasium as gym
import numpy as np
from sample_envs import Counter

BOUND_SECONDS = 20.0
"""Generous: nothing here takes a tenth of it, and what hangs shall say where."""

PASS_GATE = 2
"""The action with which a `Gated` env waits at its gate."""


# ---- the gate: an env waits until the test lets it through


@dataclass(frozen=True)
class GateKey:
    """The env's side of a `Gate`; travels."""

    arrivals: str
    passes: str

    def pass_through(self) -> None:
        """Says that somebody is here, and waits until the test lets one through."""
        arrivals = os.open(self.arrivals, os.O_WRONLY)
        try:
            os.write(arrivals, b".")
        finally:
            os.close(arrivals)
        with open(self.passes, "rb", buffering=0) as passes:
            passes.read(1)


class Gate:
    """Two FIFOs in a directory of the test, which holds both ends open, so that nobody ever sees an end of file."""

    def __init__(self, directory: Path) -> None:
        self.key = GateKey(str(directory / "arrivals"), str(directory / "passes"))
        os.mkfifo(self.key.arrivals)
        os.mkfifo(self.key.passes)
        self._arrivals = os.open(self.key.arrivals, os.O_RDWR | os.O_NONBLOCK)
        self._passes = os.open(self.key.passes, os.O_RDWR | os.O_NONBLOCK)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        os.close(self._arrivals)
        os.close(self._passes)

    async def arrived(self, count: int = 1) -> None:
        """Waits until so many more envs have come to the gate."""
        while count:
            await anyio.wait_readable(self._arrivals)
            count -= len(os.read(self._arrivals, count))

    def open(self, count: int = 1) -> None:
        """Lets so many through, who are here or who will come."""
        os.write(self._passes, b"." * count)


class Gated(Counter):
    """Waits at its gate in the moment `at`.

    That is in `step` for the action `PASS_GATE`, in `reset` with the option `gate`, in `work`, `init` or `close`.
    """

    def __init__(self, key: GateKey, at: str = "step", offset: int = 0, size: int = 3, log: str | None = None) -> None:
        super().__init__(length=1000, offset=offset)
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (size,), np.float32)
        self.size = size
        self.key = key
        self.at = at
        self.log = log
        if at == "init":
            key.pass_through()

    def _observation(self) -> Any:
        observation = np.full(self.size, self.steps, np.float32)
        observation[:3] = super()._observation()
        return observation

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        if self.at == "reset" and options is not None and options.get("gate"):
            self.key.pass_through()
        observation, _ = super().reset(seed=seed)
        return observation, {"episodes": self.episodes}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        if self.at == "step" and action == PASS_GATE:
            self.key.pass_through()
        if action == 1:
            raise ValueError("An error occurred.")
        return super().step(action)

    def work(self, value: Any) -> Any:
        """Waits at the gate if this is the moment, and gives the value and how many steps there were."""
        if self.at == "work":
            self.key.pass_through()
        return value, self.steps

    def render(self) -> Any:
        return self.steps

    def close(self) -> None:
        if self.at == "close":
            self.key.pass_through()
        if self.log is not None:
            append_line(self.log, f"close {self.offset}")


class Says(Gated):
    """Has something to say beside its row, behind its gate too: an ``"info"``, an ``"error"``, or a ``"text"``."""

    def __init__(self, key: GateKey, what: str, offset: int) -> None:
        super().__init__(key, offset=offset)
        self.what = what
        if what == "text":
            self.observation_space = gym.spaces.Text(9)

    def _observation(self) -> Any:
        return f"{self.offset} {self.steps}" if self.what == "text" else super()._observation()

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, _ = super().step(action)
        if self.what == "error" and action == PASS_GATE:
            raise ValueError("An error occurred.")
        return observation, reward, terminated, truncated, {"steps": self.steps} if self.what == "info" else {}


# ---- envs that fail


class TwoArguments(Exception):
    """Has a constructor that `args` alone do not call rightly, and an attribute."""

    def __init__(self, what: str, *, code: int) -> None:
        super().__init__(f"{what} ({code})")
        self.what = what
        self.code = code


class HoldsLock(Exception):
    """Does not pickle."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.lock = threading.Lock()


class HoldsSocket(Exception):
    """Does not pickle either, and has a descriptor."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.socket = socket.socket()


class FailsToLoad(Exception):
    """Pickles, but does not load."""

    def __reduce__(self) -> Any:
        return _refuse_to_load, ("an exception",)


class BadText(Exception):
    """Has no text."""

    def __str__(self) -> str:
        raise RuntimeError("no text")


class Laden(Exception):
    """Carries much: in its arguments, or as an attribute."""

    def __init__(self, *args: Any, load: Any = None) -> None:
        super().__init__(*args)
        self.load = load


class Sealed(Exception):
    """Forbids attributes to be set, those of every exception too."""

    def __setattr__(self, name: str, value: Any) -> None:
        raise TypeError(f"{name} is not to be set")


def sealed_error() -> Exception:
    return Sealed("An error occurred.")


def _refuse_to_load(what: str) -> NoReturn:
    raise Sealed(what) if what == "what is sealed" else LookupError(f"{what} that does not load")


class FailsInWorker:
    """Pickles, but does not load in the worker."""

    def __init__(self, what: str = "a request") -> None:
        self.what = what

    def __reduce__(self) -> Any:
        return _refuse_to_load, (self.what,)


class FailsToUnpickle:
    """An env_fn that pickles, but does not load in the worker."""

    def __call__(self) -> gym.Env[Any, Any]:
        return Counter()

    def __reduce__(self) -> Any:
        return _refuse_to_load, ("an env_fn",)


class Faulty(Counter):
    """Raises what `make_error` makes, in the moment `at`.

    That is in `init`, in `step` for action 1, in `reset` with the option `fail`, in `render`, `work` or `close`, when
    the attribute `broken` is read (`get_attr`) or `guarded` is set (`set_attr`).
    """

    def __init__(self, at: str, make_error: Callable[[], BaseException], offset: int = 0) -> None:
        super().__init__(length=1000, offset=offset)
        self.at = at
        self.make_error = make_error
        self._raise_at("init")

    def _raise_at(self, moment: str) -> None:
        if self.at == moment:
            raise self.make_error()

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        if options is not None and options.get("fail"):
            self._raise_at("reset")
        return super().reset(seed=seed)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        if action == 1:
            self._raise_at("step")
        return super().step(action)

    def render(self) -> Any:
        self._raise_at("render")
        return self.steps

    def work(self) -> int:
        self._raise_at("work")
        return self.steps

    def descriptors(self) -> int:
        """How many its process has."""
        return len(os.listdir("/proc/self/fd"))

    @property
    def broken(self) -> int:
        self._raise_at("get_attr")
        return self.steps

    @property
    def guarded(self) -> int:
        return self.steps

    @guarded.setter
    def guarded(self, value: int) -> None:
        self._raise_at("set_attr")
        self.__dict__["guarded_value"] = value

    def close(self) -> None:
        self._raise_at("close")


def an_error() -> ValueError:
    """What `Faulty` raises where a test does not care."""
    return ValueError("An error occurred.")


def error_with_everything() -> BaseException:
    """Has a cause, notes, attributes and a constructor with a keyword."""
    try:
        raise KeyError("the cause")
    except KeyError as cause:
        error = TwoArguments("a socket", code=7)
        error.__cause__ = cause
    error.add_note("a note of the env")
    return error


def os_error() -> BaseException:
    """Its attributes come from its arguments."""
    return FileNotFoundError(2, "No such file", "/nowhere")


LADEN_NBYTES = 100_000_000
LADEN_LENGTH = 2_000_000


def laden_with_an_array() -> Laden:
    """Its text is short."""
    return Laden("laden", np.arange(LADEN_NBYTES // 8))


def laden_with_bytes() -> Laden:
    """Its text is longer than they are, since Python shows most bytes by four characters."""
    return Laden("laden", b"\x07" * LADEN_NBYTES)


def laden_with_objects() -> Laden:
    """Takes most of a second to unpickle, all of it in C. Texts: with containers the garbage collector would stop, too."""
    return Laden("laden", load=[f"number {number}" for number in range(LADEN_LENGTH)])


def error_of_a_module(name: str) -> BaseException:
    """An exception of a module that nobody has imported yet."""
    error: BaseException = importlib.import_module(name).OfAModule("An error occurred.")
    return error


def group_of_its_own() -> BaseException:
    """A group that an env made, not aiovec."""
    return ExceptionGroup("two at once", [ValueError("one"), TypeError("two")])


class Deep(Counter):
    """Raises for action 1 from a thousand frames down."""

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        if action == 1:
            self.down(1000)
        return super().step(action)

    def down(self, depth: int) -> None:
        if not depth:
            raise ValueError("from far below")
        # Python's own limit counts frames from the top of the process: leave room for them.
        sys.setrecursionlimit(max(sys.getrecursionlimit(), 5000))
        self.down(depth - 1)


class FailsWhile(Counter):
    """Cannot be built while a file exists."""

    def __init__(self, path: str, offset: int = 0) -> None:
        super().__init__(offset=offset)
        if os.path.exists(path):
            raise RuntimeError(f"{path} exists")


# ---- envs whose results are wrong


class Returns(Counter):
    """Returns from `step` for action 1, or from `reset` with the option `wrong`, what `result` makes of the right."""

    def __init__(self, result: Callable[[Any], Any], offset: int = 0, space: gym.Space[Any] | None = None) -> None:
        super().__init__(length=1000, offset=offset)
        self.result = result
        if space is not None:
            self.observation_space = space

    def _observation(self) -> Any:
        right = super()._observation()
        if isinstance(self.observation_space, gym.spaces.Dict):
            return {"camera": np.full((2, 2), self.steps, np.uint8), "speed": right}
        return right

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        right = super().reset(seed=seed)
        return self.result(right) if options is not None and options.get("wrong") else right

    def step(self, action: Any) -> Any:
        right = super().step(action)
        return self.result(right) if action == 1 else right

    def work(self) -> Any:
        return self.result(self.steps)


def with_a_generator(right: Any) -> Any:
    """The right result, but its info cannot be copied."""
    return (*right[:-1], {"steps": 1, "generator": (number for number in range(3))})


def with_a_lock(right: Any) -> Any:
    """The right result, but its info, or all of it, does not pickle."""
    return (*right[:-1], {"lock": threading.Lock()}) if isinstance(right, tuple) else threading.Lock()


def observes_a_lock(right: Any) -> Any:
    """The right result, but for the observation, which neither pickles nor can be copied."""
    return (threading.Lock(), *right[1:])


def holds_itself(right: Any) -> Any:
    """The right result, but a dict of its info holds itself."""
    endless: dict[str, Any] = {}
    endless["again"] = endless
    return (*right[:-1], {"steps": 1, "endless": endless})


def holds_itself_in_a_list(right: Any) -> Any:
    """The right result, and a list of its info holds itself."""
    endless: list[Any] = []
    endless.append(endless)
    return (*right[:-1], {"endless": endless})


def unloadable(right: Any) -> Any:
    """The right result, but its info, or all of it, pickles and does not load."""
    return (*right[:-1], {"bad": FailsToLoad()}) if isinstance(right, tuple) else FailsToLoad()


class WithoutSpaces(gym.Env[Any, Any]):
    """Forgot its spaces."""


def raises_timeout() -> gym.Env[Any, Any]:
    """As a constructor that connects to a simulator may."""
    raise TimeoutError("no simulator")


def not_an_env() -> Any:
    """An env_fn that gives something else."""
    return {"observation": 1}


def without_a_result() -> Any:
    """An env_fn whose `return` was forgotten."""
    return None


# ---- envs with other spaces


class Spaces(Counter):
    """A `Counter` that declares the given spaces."""

    def __init__(self, observation: gym.Space[Any] | None = None, action: gym.Space[Any] | None = None) -> None:
        super().__init__(length=1000)
        self.observation_space = observation or self.observation_space
        self.action_space = action or self.action_space


class Structured(Counter):
    """Takes a dict of actions: `move`, a number, and `push`, two numbers."""

    def __init__(self, offset: int = 0) -> None:
        super().__init__(length=1000, offset=offset)
        self.action_space = gym.spaces.Dict(
            {"move": gym.spaces.Discrete(4), "push": gym.spaces.Box(-1, 1, (2,), np.float32)}
        )


# ---- envs that tell where they live


class Recorded(Counter):
    """Writes down each construction, one line with its pid and its index; may wait for others that are built."""

    def __init__(self, log: str, index: int, together: int = 0) -> None:
        super().__init__(length=1000, offset=index)
        append_line(log, f"{os.getpid()} {index}")
        if together:
            deadline = time.monotonic() + BOUND_SECONDS / 2
            while len(Path(log).read_text().splitlines()) < together:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"waited in vain for {together} envs to be built at the same time")
                time.sleep(0.005)

    @property
    def pid(self) -> int:
        return os.getpid()

    @property
    def parent(self) -> int:
        return os.getppid()


class Slow(Counter):
    """Takes real time to be built and to be closed."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds
        time.sleep(seconds)

    def close(self) -> None:
        time.sleep(self.seconds)


class DiesBehindItsReply(Counter):
    """Action 1: the worker is killed at the moment at which it would take its token."""

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = super().step(action)
        if action == 1:
            from aiovec.worker import serve

            serve.take_last = lambda _fd: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
            info["text"] = "x" * 20_000
        return observation, reward, terminated, truncated, info


class Dies(Counter):
    """Ends its worker in `step` for action 1, or in `close`; `ending` does it."""

    def __init__(self, ending: Callable[[], object], at: str = "step", offset: int = 0) -> None:
        super().__init__(length=1000, offset=offset)
        self.ending = ending
        self.at = at

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        if action == 1 and self.at == "step":
            self.ending()
        return super().step(action)

    def start_a_flood(self, session: bool) -> int:
        """Something that writes to our stdout for ever, in a session of its own or in ours."""
        self.child = subprocess.Popen(["yes"], start_new_session=session)
        return self.child.pid

    def close(self) -> None:
        if self.at == "close":
            self.ending()

    @property
    def pid(self) -> int:
        return os.getpid()


def exit_with_3() -> NoReturn:
    """Ends this process without a word to Python, but one on stderr."""
    os.write(2, b"the last words\n")
    os._exit(3)


def append_line(path: str, line: str) -> None:
    """One line that does not mix with those of other processes."""
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(line + "\n")


# ---- what tests wait with


def is_running(pid: int) -> bool:
    """Whether a process exists and is no zombie: in a container nobody may reap orphans."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def context_of_loop() -> Literal["fork"] | None:
    """Fresh interpreters on asyncio, forks on uvloop: these cost a tenth, and the tables do not need all four."""
    return "fork" if type(asyncio.get_running_loop()).__module__.startswith("uvloop") else None


async def turns(count: int = 20) -> None:
    """Gives the loop some turns: enough for whatever could happen without an event from outside."""
    for _ in range(count):
        await asyncio.sleep(0)


# ---- envs that end their worker, or get stuck


class Mortal(Counter):
    """Does what `ending` does in the moment `at`.

    That is in `step` for action 1, in `reset` with the option `die`, in `render`, `work`, `close`, or in `init` once
    `armed` exists.
    """

    def __init__(self, ending: Callable[[], object], at: str, offset: int = 0, armed: str = "/") -> None:
        super().__init__(length=1000, offset=offset)
        self.ending = ending
        self.at = at
        if at == "init" and os.path.exists(armed):
            ending()

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        if self.at == "reset" and options is not None and options.get("die"):
            self.ending()
        return super().reset(seed=seed)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        if self.at == "step" and action == 1:
            self.ending()
        return super().step(action)

    def render(self) -> Any:
        if self.at == "render":
            self.ending()
        return self.steps

    def work(self) -> int:
        if self.at == "work":
            self.ending()
        return self.steps

    def start_a_child(self, group: bool) -> int:
        """Something that would outlive this test, in a process group of its own or in ours."""
        command = [sys.executable, "-c", "import time; time.sleep(60)"]
        self.child = subprocess.Popen(command, process_group=0 if group else None)
        return self.child.pid

    def start_a_flood(self, session: bool) -> int:
        """Something that writes to our stdout for ever, in a session of its own or in ours."""
        self.child = subprocess.Popen(["yes"], start_new_session=session)
        return self.child.pid

    def close(self) -> None:
        if self.at == "close":
            self.ending()


def end_with_sigkill() -> None:
    """As the kernel does when it is out of memory."""
    os.kill(os.getpid(), signal.SIGKILL)


def use_up_memory() -> NoReturn:
    """More than its control group has; where there is none, not more than any machine has."""
    hoard = [b"\1" * (1 << 20) for _ in range(512)]
    raise MemoryError(f"the kernel gave this process {len(hoard)} MiB")


def segfault() -> None:
    """A real one, in C."""
    ctypes.string_at(0)


def end_inside_a_frame() -> None:
    """Ends with the first bytes of a reply on their way."""
    for fd in map(int, os.listdir("/proc/self/fd")):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{fd}").startswith("socket:"):
                os.write(fd, b"\1" * 10)
    os._exit(3)


def end_with_a_child_that_holds_the_socket() -> None:
    """So that the socket does not close with the process."""
    if os.fork():
        os._exit(3)
    time.sleep(BOUND_SECONDS)
    os._exit(0)


def hang_in_python() -> None:
    """For ever, in Python."""
    while True:
        time.sleep(1)


def hang_in_c() -> None:
    """For longer than any test, in C, with the GIL held."""
    ctypes.PyDLL(None).sleep(100)


def stop() -> None:
    """As a debugger does, or a terminal's Ctrl-Z; who goes on again is stuck anyway."""
    os.kill(os.getpid(), signal.SIGSTOP)
    hang_in_python()


def say_something() -> None:
    """The beginning of a line, with a letter that ASCII has not."""
    os.write(1, "naïve".encode())


# ---- envs of unusual size, and one that counts


class Echo(Counter):
    """Gives back what it gets; its infos are as large as `reset` asks."""

    def echo(self, value: Any) -> Any:
        return value

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        observation, _ = super().reset(seed=seed)
        return observation, {"padding": options["padding"]} if options is not None else {}


class Wide(Counter):
    """Declares observations of so many bytes."""

    def __init__(self, nbytes: int) -> None:
        super().__init__()
        self.observation_space = gym.spaces.Box(0, 255, (nbytes,), np.uint8)


class Boundless(Counter):
    """Its observation is larger than any memory; there never is one."""

    def __init__(self) -> None:
        super().__init__()
        self.observation_space = gym.spaces.MultiBinary(1 << 45)  # type: ignore[assignment]


class Received(gym.Env[Any, Any]):
    """Takes as many milliseconds as the action says; its observation has `size` numbers."""

    def __init__(self, index: int, size: int) -> None:
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (size,), np.float32)
        self.action_space = gym.spaces.Discrete(10)
        self.index = index
        self.size = size
        self.received = 0

    def _answer(self) -> tuple[Any, dict[str, Any]]:
        return np.full(self.size, self.received, np.float32), {"received": self.received, "index": self.index}

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        time.sleep(0.001 * (options or {}).get("milliseconds", 0))
        return self._answer()

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.received += 1
        time.sleep(0.001 * int(action))
        observation, info = self._answer()
        return observation, float(self.received), False, False, info


class InfoOfOwnType(Counter):
    """Its infos have a value of its own type, and a key of its own."""

    def __init__(self, value: Any) -> None:
        super().__init__(length=1000)
        self.value = value

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return *super().step(action)[:4], {"value": self.value, f"own_{int(self.value) - 1}": 1}
