"""Real programs: how workers live with the parent's `__main__`, paths and terminal, and that none outlives its parent."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import functools
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fault_envs import BOUND_SECONDS, PASS_GATE, Dies, DiesBehindItsReply, Gate, Gated, Says, exit_with_3, is_running

import aiovec
from aiovec import AlreadyPendingCallError, AsyncVectorEnv, ClosedEnvironmentError, ResetNeeded, WorkerDied, failures

ROOT = str(Path(aiovec.__file__).parents[1])
GONE_WITHIN_SECONDS = 2.0
MARK = "AIOVEC_TESTS_MARK"


class Program:
    """A script of a user, in a directory and a session of its own; all that it starts bears its mark."""

    def __init__(self, directory: Path, source: str) -> None:
        self.directory = directory
        self.path = directory / "script.py"
        self.path.write_text(textwrap.dedent(source))
        self.mark = f"{MARK}={uuid.uuid4().hex}"
        self.process: subprocess.Popen[str] | None = None

    def start(
        self, *command: str, how: tuple[str, ...] = (), stdin: Any = subprocess.DEVNULL, **environment: str
    ) -> Any:
        """Starts it; `how` are flags of the interpreter, `command` replaces ``script.py`` and its arguments."""
        name, _, value = self.mark.partition("=")
        inherited = {key: text for key, text in os.environ.items() if key not in ("PYTHONSAFEPATH", "OMP_NUM_THREADS")}
        self.process = subprocess.Popen(
            [sys.executable, *how, *(command or (self.path.name,))],
            cwd=self.directory,
            env={**inherited, "PYTHONPATH": ROOT, name: value, **environment},
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        return self.process

    def run(self, *command: str, **options: Any) -> tuple[int, str, str]:
        """Runs it to its end: exit code, stdout, stderr."""
        process = self.start(*command, **options)
        stdout, stderr = process.communicate(timeout=BOUND_SECONDS)
        return process.returncode, stdout, stderr

    def output(self, *command: str, **options: Any) -> str:
        """Runs it to its good end, without a word on stderr, and leaves nothing: what it printed."""
        exitcode, stdout, stderr = self.run(*command, **options)
        assert (exitcode, stderr) == (0, "")
        self.assert_nothing_left()
        return stdout

    def processes(self) -> dict[int, str]:
        """Every process that bears the mark, however it was started, by pid."""
        found = {}
        for directory in Path("/proc").iterdir():
            if directory.name.isdigit():
                with contextlib.suppress(OSError):
                    environment = (directory / "environ").read_bytes().split(b"\0")
                    if self.mark.encode() in environment and is_running(int(directory.name)):
                        command = (directory / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                        found[int(directory.name)] = command[:200]
        return found

    def assert_nothing_left(self) -> None:
        """The parent has ended: within two seconds so has everything else."""
        deadline = time.monotonic() + GONE_WITHIN_SECONDS
        while left := self.processes():
            assert time.monotonic() < deadline, f"still there: {left}"
            time.sleep(0.02)


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Callable[[str], Program]]:
    """Makes programs; whatever a failed test leaves of them is ended."""
    made: list[Program] = []

    def make(source: str) -> Program:
        made.append(Program(tmp_path, source))
        return made[-1]

    yield make
    for one in made:
        for pid in one.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if one.process is not None:
            one.process.kill()
            one.process.communicate()


# ---- __main__ of every kind

UNGUARDED = """
    import asyncio
    import gymnasium as gym
    import numpy as np
    import aiovec

    class MyError(Exception):
        def __init__(self, what, *, code):
            super().__init__(what)
            self.code = code

    class MyEnv(gym.Env):
        observation_space = gym.spaces.Box(-9, 9, (2,), np.float32)
        action_space = gym.spaces.Discrete(3)

        def __init__(self, index):
            self.index = index

        def reset(self, *, seed=None, options=None):
            return np.full(2, self.index, np.float32), {}

        def step(self, action):
            if action == 1:
                raise MyError("mine", code=self.index)
            return np.full(2, action, np.float32), 1.0, False, False, {"index": self.index}

    async def main():
        async with aiovec.AsyncVectorEnv([lambda i=i: MyEnv(i) for i in range(3)], num_workers=2) as envs:
            observations, _ = await envs.reset()
            print("observations", observations.tolist())
            *_, infos = await envs.step([0, 0, 2])
            print("index", infos["index"].tolist())
            try:
                await envs.step([0, 0, 1])
            except MyError as error:
                print("caught", type(error) is MyError, error.args, error.code)
                print("failed", aiovec.failures(error)[0].env_index)
            try:
                await envs.reset()
                await envs.step([1, 1, 1])
            except* MyError as group:
                print("group", [error.code for error in group.exceptions])

    asyncio.run(main())
"""
UNGUARDED_OUTPUT = """\
observations [[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]]
index [0, 1, 2]
caught True ('mine',) 2
failed 2
group [0, 1, 2]
"""


@pytest.mark.parametrize("kind", ["script", "stdin", "-c", "-m", "-I", "-O"])
def test_a_program_without_a_guard(kind: str, program: Callable[[str], Program], tmp_path: Path) -> None:
    """Classes and lambdas of `__main__` work, and `except MyError` catches the very class."""
    one = program(UNGUARDED)
    source = one.path.read_text()
    if kind == "script":
        output = one.output()
    elif kind == "stdin":
        with one.path.open() as stdin:
            output = one.output("-", stdin=stdin)
    elif kind == "-c":
        output = one.output("-c", source)
    elif kind == "-m":
        output = one.output("-m", "script")
    elif kind == "-I":
        one.path.write_text(f"import sys\nsys.path.insert(0, {ROOT!r})\n{source}")
        output = one.output(how=("-I",))
    else:
        output = one.output(how=("-O", "-X", "utf8"))
    assert output == UNGUARDED_OUTPUT


def test_a_traceback_of_main_shows_its_source(program: Callable[[str], Program]) -> None:
    """Not caught, it is printed with the script's own line, once through the await and once in the env."""
    one = program(UNGUARDED.replace("except MyError as error", "except ZeroDivisionError as error"))
    exitcode, _, stderr = one.run()
    assert exitcode == 1
    assert 'raise MyError("mine", code=self.index)' in stderr
    assert "await envs.step([0, 0, 1])" in stderr
    assert re.search(r"^\s*raised by env 2 during step, worker pid \d+$", stderr, re.MULTILINE)
    assert "never" not in stderr
    one.assert_nothing_left()


PRELUDE = """
    import asyncio, os, signal, sys, time
    import gymnasium as gym
    import numpy as np
    import aiovec

    class Asks(gym.Env):
        observation_space = gym.spaces.Box(-9, 9, (2,), np.float32)
        action_space = gym.spaces.Discrete(3)

        def reset(self, *, seed=None, options=None):
            return np.zeros(2, np.float32), {}

        def step(self, action):
            return np.zeros(2, np.float32), 1.0, False, False, {}

        def ask(self, question):
            return question()

    async def ask(question, **kwargs):
        async with aiovec.AsyncVectorEnv([Asks], num_workers=1, **kwargs) as envs:
            await envs.reset()
            await envs.step([0])
            return (await envs.call("ask", question))[0]
"""


@pytest.mark.parametrize("inserted", [False, True], ids=["in the directory", "on sys.path"])
def test_modules_that_have_names_of_the_standard_library(
    inserted: bool, program: Callable[[str], Program], tmp_path: Path
) -> None:
    """What the parent survives (it has imported the right ones before), a worker survives, too."""
    for name in ("signal", "random", "pickle", "socket", "tempfile"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('the wrong module')\n")
    insert = f"sys.path.insert(0, {str(tmp_path)!r})" if inserted else ""
    one = program(f"{PRELUDE}\n    {insert}\n    print(asyncio.run(ask(lambda: 1 + 1)))")
    assert one.output(how=("-P",)) == "2\n"


def test_what_was_added_to_the_path_at_run_time_is_there(program: Callable[[str], Program], tmp_path: Path) -> None:
    """Also a module that no site file names, imported where the env_fn is unpickled."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "their_env.py").write_text(
        textwrap.dedent(PRELUDE) + "\nclass TheirEnv(Asks):\n    def ask(self, question): return __file__\n"
    )
    one = program(f"""{PRELUDE}
    sys.path.insert(0, {str(tmp_path / "elsewhere")!r})
    import their_env
    Asks = their_env.TheirEnv
    print(asyncio.run(ask("")))
    """)
    assert one.output() == f"{tmp_path}/elsewhere/their_env.py\n"


@pytest.mark.parametrize("context", [None, "fork", "forkserver", "spawn"])
def test_what_a_worker_has_of_its_parent(
    context: str | None, program: Callable[[str], Program], tmp_path: Path
) -> None:
    """Its directory, flags, arguments and environment; one thread for BLAS; a session, and so a group, of its own."""
    one = program(f"""{PRELUDE}
    if __name__ == "__main__":
        os.chdir("below")
        os.environ["MINE"] = "at run time"
        print(asyncio.run(ask(lambda: (
            os.getcwd(),
            os.environ["OMP_NUM_THREADS"],
            os.environ["OPENBLAS_NUM_THREADS"],
            os.getsid(0) == os.getpgrp() == os.getpid(),
            sys.flags.optimize,
            os.environ["MINE"],
            sys.argv[1:],
        ), context={context!r})))
    """)
    (tmp_path / "below").mkdir()
    expected = (f"{tmp_path}/below", "1", "1", True, 1, "at run time", ["--lr", "ä\udcff"])
    assert one.output("script.py", "--lr", "ä\udcff", how=("-O",)) == f"{expected}\n"


def test_the_number_of_threads_is_the_users_to_set(program: Callable[[str], Program]) -> None:
    """The other limits are still one."""
    one = program(f"""{PRELUDE}
    print(asyncio.run(ask(lambda: (os.environ['OMP_NUM_THREADS'], os.environ['MKL_NUM_THREADS']))))
    """)
    assert one.output(OMP_NUM_THREADS="3") == "('3', '1')\n"


@pytest.mark.parametrize("context", [None, "fork", "spawn"])
def test_what_a_worker_prints_arrives_marked(context: str | None, program: Callable[[str], Program]) -> None:
    """Line by line, also without a newline at the end, each in its own stream, also what was not Python's."""
    one = program(f"""{PRELUDE}
    class Prints(Asks):
        def ask(self, question):
            print("to stdout\\nsecond line")
            print("to stderr", file=sys.stderr)
            os.write(1, b"by the descriptor, without an end")

    if __name__ == "__main__":
        Asks = Prints
        asyncio.run(ask("", context={context!r}))
        print("the parent's own")
    """)
    exitcode, stdout, stderr = one.run()
    assert exitcode == 0
    *lines, last = stdout.splitlines()
    assert sorted(lines) == sorted(
        f"[aiovec worker 0] {line}" for line in ("to stdout", "second line", "by the descriptor, without an end")
    )
    assert last == "the parent's own"
    assert stderr == "[aiovec worker 0] to stderr\n"
    one.assert_nothing_left()


@pytest.mark.parametrize("context", [None, "fork"])
def test_breakpoint_in_a_worker_says_what_to_do(context: str | None, program: Callable[[str], Program]) -> None:
    """It has no terminal; it must not wait for one."""
    one = program(f"""{PRELUDE}
    try:
        asyncio.run(ask(breakpoint, context={context!r}))
    except RuntimeError as error:
        print(error)
    """)
    assert "num_workers=0" in one.output()


# ---- forgotten


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("moment", ["in the loop", "after the loop", "at exit"])
def test_a_forgotten_close_warns_once(moment: str, num_workers: int, program: Callable[[str], Program]) -> None:
    """And frees everything, and raises nothing."""
    one = program(f"""{PRELUDE}
    import gc

    async def main():
        global kept
        envs = aiovec.AsyncVectorEnv([Asks, Asks], num_workers={num_workers})
        await envs.reset()
        await envs.step([0, 0])
        if {moment!r} == "in the loop":
            del envs
            gc.collect()
            await asyncio.sleep(0.01)
        elif {moment!r} == "at exit":
            kept = envs

    asyncio.run(main())
    print("after the loop")
    """)
    exitcode, stdout, stderr = one.run(how=("-W", "always::ResourceWarning"))
    assert (exitcode, stdout) == (0, "after the loop\n")
    assert len(re.findall("ResourceWarning: (?!Enable tracemalloc)", stderr)) == 1, stderr
    assert "was never closed: use `async with`, or `await envs.close()`" in stderr
    assert "Traceback" not in stderr
    assert "Exception" not in stderr
    one.assert_nothing_left()


@pytest.mark.not_on_ray("an actor that is killed ends soon, not at once")
async def test_a_forgotten_vector_frees_its_workers_in_a_loop_that_goes_on() -> None:
    """The next vector in the same loop has the same descriptor numbers, and works."""
    async with asyncio.timeout(BOUND_SECONDS):
        for _ in range(2):
            envs = AsyncVectorEnv([functools.partial(Dies, exit_with_3)], num_workers=1)
            await envs.reset()
            (pid,) = await envs.get_attr("pid")
            with pytest.warns(ResourceWarning, match="was never closed"):
                del envs
            assert not is_running(pid)
    async with asyncio.timeout(BOUND_SECONDS), AsyncVectorEnv([functools.partial(Dies, exit_with_3)]) as envs:
        await envs.reset()
        await envs.step([0])


# ---- however the parent ends

ENDS = """
    import asyncio, ctypes, os, signal, subprocess, sys, time
    import gymnasium as gym
    import numpy as np
    import aiovec

    how, state, context, held = sys.argv[1:] if __name__ == "__main__" else [""] * 4

    class Env(gym.Env):
        observation_space = gym.spaces.Box(-9, 9, (2,), np.float32)
        action_space = gym.spaces.Discrete(3)

        def reset(self, *, seed=None, options=None):
            return np.zeros(2, np.float32), {}

        def step(self, action):
            if action:
                with open("arrived", "a") as file:
                    file.write(".")
            if action == 1:
                time.sleep(60)
            elif action == 2:
                ctypes.PyDLL(None).sleep(60)  # PyDLL keeps the GIL
            return np.zeros(2, np.float32), 1.0, False, False, {}

        def start_a_child(self):
            self.child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])

    async def main():
        envs = aiovec.AsyncVectorEnv([Env, Env], num_workers=2, context=context or None, close_grace=0.3)
        if held == "with":
            async with envs:
                await train(envs)
        else:
            await train(envs)

    async def train(envs):
        await envs.reset()
        if state == "children":
            await envs.call("start_a_child")
        action = {"busy": 1, "stuck": 2}.get(state)
        if action:
            step = asyncio.create_task(envs.step([action, action]))
            step.add_done_callback(lambda step: step.cancelled() or step.exception())
            while not os.path.exists("arrived") or os.path.getsize("arrived") < 2:
                await asyncio.sleep(0.01)
        print("ready", flush=True)
        if how == "exception":
            raise LookupError("of the training")
        if how != "return":
            await asyncio.sleep(60)

    if __name__ == "__main__":
        asyncio.run(main())
"""
EXITCODES = {
    "return": 0,
    "exception": 1,
    "SIGINT": -signal.SIGINT,
    "SIGTERM": -signal.SIGTERM,
    "SIGKILL": -signal.SIGKILL,
}

# Every way and state for fresh interpreters; beside them what differs: a close on the way out, processes that envs
# started, and how other contexts tie their workers to the parent.
ENDINGS = [
    *((how, state, "", "bare") for how in EXITCODES for state in ("idle", "busy", "stuck", "children")),
    *((how, state, "", "with") for how in ("return", "exception", "SIGINT") for state in ("busy", "stuck")),
    *((how, "stuck", context, "bare") for how in EXITCODES for context in ("fork", "forkserver", "spawn")),
    *(("SIGKILL", "busy", context, "bare") for context in ("fork", "forkserver", "spawn")),
]


@pytest.mark.parametrize(("how", "state", "context", "held"), ENDINGS, ids=lambda value: value or "fresh")
def test_no_worker_outlives_the_parent(
    how: str, state: str, context: str, held: str, program: Callable[[str], Program]
) -> None:
    """Whatever the workers are doing at that moment."""
    one = program(ENDS)
    process = one.start(one.path.name, how, state, context, held)
    assert process.stdout.readline() == "ready\n", process.communicate()
    if how.startswith("SIG"):
        assert len(one.processes()) >= 3
    if how == "SIGINT":
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    elif how.startswith("SIG"):
        process.send_signal(getattr(signal, how))
    exitcode = process.wait(timeout=BOUND_SECONDS)
    one.assert_nothing_left()
    stdout, stderr = process.communicate()
    assert (exitcode, stdout) == (EXITCODES[how], "")
    if how == "exception":
        assert "LookupError: of the training" in stderr
    elif how == "SIGINT":
        assert stderr.rstrip().endswith("KeyboardInterrupt")
    else:
        assert stderr == ""
    for word in ("never retrieved", "Exception ignored", "Traceback (most recent call last)" * 2, "was destroyed"):
        assert word not in stderr


INTERRUPTED = """
    import asyncio, sys
    import numpy as np
    import aiovec
    from sample_envs import Counter

    async def evaluate(envs):
        await envs.reset()
        observations, *_ = await envs.step([0, 0])
        print("evaluated", observations[:, 2].tolist(), flush=True)

    async def train(envs):
        await envs.reset()
        print("ready", flush=True)
        try:
            while True:
                await envs.step([0, 0])
        except asyncio.CancelledError:
            await evaluate(envs)
            raise

    with asyncio.Runner() as runner:
        envs = aiovec.AsyncVectorEnv([lambda: Counter(length=10**9)] * 2, num_workers=2)
        try:
            runner.run(train(envs))
        except KeyboardInterrupt:
            runner.run(evaluate(envs))
            runner.run(envs.close())
            if "raise" in sys.argv:
                raise
"""


@pytest.mark.parametrize("then", ["go on", "raise"])
def test_after_ctrl_c_the_envs_can_still_be_stepped(then: str, program: Callable[[str], Program]) -> None:
    """In the task that it cancels, and in the `except` of the caller; at most one traceback, the parent's."""
    one = program(INTERRUPTED)
    process = one.start(one.path.name, then, PYTHONPATH=os.pathsep.join([ROOT, str(Path(__file__).parents[1])]))
    assert process.stdout.readline() == "ready\n", process.communicate()
    os.killpg(process.pid, signal.SIGINT)
    stdout, stderr = process.communicate(timeout=BOUND_SECONDS)
    one.assert_nothing_left()
    assert stdout == "evaluated [1.0, 1.0]\n" * 2
    if then == "raise":
        assert stderr.rstrip().endswith("KeyboardInterrupt")
        assert "aiovec-worker" not in stderr
    else:
        assert (process.returncode, stderr) == (0, "")


SMALL_SHM = """
    import asyncio, ctypes, os, subprocess
    import numpy as np
    import gymnasium as gym
    import aiovec
    from sample_envs import Counter

    class Large(Counter):
        def __init__(self):
            super().__init__(length=10**9)
            self.observation_space = gym.spaces.Box(0, 255, (1_000_000,), np.uint8)

        def _observation(self):
            return np.full(1_000_000, self.steps, np.uint8)

    async def main():
        async with aiovec.AsyncVectorEnv([Large] * 4, num_workers=2) as envs:
            await envs.reset()
            kept = [(await envs.step([0] * 4))[0] for _ in range(8)]
            print([int(batch.min()) for batch in kept], [int(batch.max()) for batch in kept])
            print(os.statvfs("/dev/shm").f_blocks * os.statvfs("/dev/shm").f_frsize, os.listdir("/dev/shm"))

    own_mounts = 0x00020000  # CLONE_NEWNS
    if ctypes.CDLL(None).unshare(own_mounts) == 0:
        mounted = subprocess.run("mount --make-rprivate / && mount -t tmpfs -o size=1M small /dev/shm", shell=True)
        if mounted.returncode == 0:
            asyncio.run(main())
"""


def test_a_small_dev_shm_is_no_limit(program: Callable[[str], Program]) -> None:
    """A container has 64 MB there, or 1 MB: the slab is not in it."""
    one = program(SMALL_SHM)
    path = os.pathsep.join([ROOT, str(Path(__file__).parents[1])])
    exitcode, stdout, stderr = one.run(one.path.name, PYTHONPATH=path)
    if exitcode == 0 and not stdout:
        pytest.skip(f"no mounts of its own for a process here: {stderr}")
    one.assert_nothing_left()
    steps = list(range(1, 9))
    assert (exitcode, stdout, stderr) == (0, f"{steps} {steps}\n{1 << 20} []\n", "")


def test_a_child_of_the_parent_does_not_hide_its_end(program: Callable[[str], Program]) -> None:
    """A process that the parent forked holds copies of its ends of all pipes."""
    one = program(
        ENDS.replace(
            'print("ready", flush=True)',
            """if os.fork() == 0:
            os.environ.clear()
            time.sleep(6)
            os._exit(0)
        print("ready", flush=True)""",
        )
    )
    process = one.start(one.path.name, "SIGKILL", "busy", "", "bare")
    assert process.stdout.readline() == "ready\n"
    workers = {pid for pid, command in one.processes().items() if "aiovec.worker" in command}
    assert len(workers) == 2
    process.kill()
    process.wait(timeout=BOUND_SECONDS)
    deadline = time.monotonic() + GONE_WITHIN_SECONDS
    while any(is_running(pid) for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.02)


# ---- a worker that ends by itself


async def noticed(pid: int) -> None:
    """Waits until the end of a worker has been taken: it is reaped."""
    while Path(f"/proc/{pid}").exists():
        await asyncio.sleep(0.005)


def deaths(error: WorkerDied, env_ids: list[int], pid: int) -> None:
    """The facts that each has."""
    assert list(error.env_ids) == env_ids
    assert error.pid == pid
    assert [(failure.env_index, failure.pid) for failure in failures(error)] == [(index, pid) for index in env_ids]
    for text in (f"pid {pid}", "env"):
        assert text in str(error)


@pytest.mark.parametrize("context", [None, "fork", "forkserver", "spawn"])
async def test_a_worker_killed_during_a_step(context: Any, gate: Gate, on_ray: bool) -> None:
    """The awaiting task wakes at once; envs of other workers are whole after a reset of theirs."""
    env_fns = [functools.partial(Gated, gate.key, offset=index) for index in range(4)]
    vector = AsyncVectorEnv(env_fns, num_workers=2, context=context)
    async with asyncio.timeout(BOUND_SECONDS), vector as envs:
        await envs.reset()
        pid = await worker_of(envs, 3)
        step = asyncio.create_task(envs.step([0, 0, 0, 2]))
        await gate.arrived()
        assert await envs.get_attr("steps", env_ids=[0, 1]) == (1, 1)  # served behind the step: that has answered
        os.kill(pid, signal.SIGKILL)
        how = "died" if on_ray else "was killed by SIGKILL"
        with pytest.raises(WorkerDied, match=rf"envs 2, 3.*{how}.* during step") as caught:
            await step
        deaths(caught.value, [2, 3], pid)
        assert caught.value.exitcode == (None if on_ray else -signal.SIGKILL)
        assert caught.value.command == "step"
        with pytest.raises(ResetNeeded) as refused:
            await envs.step([0, 0, 0, 0])
        assert refused.value.env_ids == (2, 3)
        observations, _ = await envs.reset(env_ids=[0, 1])
        np.testing.assert_array_equal(observations, np.array([[0, 2, 0], [1, 2, 0]], np.float32))
        assert await envs.get_attr("steps", env_ids=[0, 1]) == (0, 0)
        assert not is_running(pid)


@pytest.mark.not_on_ray("Ray does not tell how a process has ended")
@pytest.mark.parametrize("what", ["info", "error", "text"])
async def test_a_worker_killed_after_its_part_of_a_step(what: str, gate: Gate) -> None:
    """Its rows were written, so the step is whole, with all that the others had to say later."""
    env_fns = [functools.partial(Says, gate.key, what, index) for index in range(3)]
    async with asyncio.timeout(BOUND_SECONDS), AsyncVectorEnv(env_fns, num_workers=3) as envs:
        await envs.reset()
        pid = await worker_of(envs, 0)
        step = asyncio.create_task(envs.step([0, PASS_GATE, PASS_GATE]))
        await gate.arrived(2)
        assert await envs.get_attr("steps", env_ids=[0]) == (1,)  # served behind the step: that has ended
        os.kill(pid, signal.SIGKILL)
        await noticed(pid)
        gate.open(2)
        if what == "error":
            with pytest.raises(ExceptionGroup, match="2 envs failed in step") as caught:
                await step
            assert [failure.env_index for failure in failures(caught.value)] == [1, 2]
        else:
            observations, rewards, *_, infos = await step
            np.testing.assert_array_equal(rewards, [1, 1, 1])
            if what == "info":
                np.testing.assert_array_equal(infos["steps"], [1, 1, 1])
                assert infos["_steps"].all()
            else:
                assert observations == ("0 1", "1 1", "2 1")
        with pytest.raises(WorkerDied, match=r"env 0 .*was killed by SIGKILL.* while idle") as dead:
            await envs.step([0, 0, 0])
        deaths(dead.value, [0], pid)
        with pytest.raises(ResetNeeded) as refused:
            await envs.step([0, 0, 0])
        assert refused.value.env_ids[0] == 0
        await envs.reset()
        for _ in range(3):
            observations, rewards, *_ = await envs.step([0, 0, 0])
        np.testing.assert_array_equal(rewards, [3, 3, 3])


async def test_a_failure_beside_a_death_in_one_step(gate: Gate) -> None:
    """The death is raised at once; the env that had failed before needs a reset, as after any failure."""
    env_fns = [functools.partial(Says, gate.key, "info", 0), functools.partial(Gated, gate.key, offset=1)]
    async with asyncio.timeout(BOUND_SECONDS), AsyncVectorEnv(env_fns, num_workers=2) as envs:
        await envs.reset()
        pid = await worker_of(envs, 0)
        step = asyncio.create_task(envs.step([PASS_GATE, 1]))
        await gate.arrived()
        assert await envs.get_attr("steps", env_ids=[1]) == (0,)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(WorkerDied, match="env 0 .*during step"):
            await step
        assert envs._started is not None
        assert [envs._started.pool.calls.states.of(index).name for index in range(2)] == ["BROKEN", "BROKEN"]
        observations, _ = await envs.reset(env_ids=[1])
        np.testing.assert_array_equal(observations, np.array([[1, 2, 0]], np.float32))


async def worker_of(envs: AsyncVectorEnv, env_index: int) -> int:
    """The pid of the worker that holds an env, from what the system knows."""
    children = sorted(envs._started.pool.workers, key=lambda worker: worker.env_ids.start)  # type: ignore[union-attr]
    return next(worker.pid for worker in children if env_index in worker.env_ids)


@pytest.mark.not_on_ray("Ray does not tell how a process has ended")
@pytest.mark.parametrize("known", [True, False], ids=["noticed", "not yet noticed"])
async def test_a_worker_killed_while_idle(known: bool) -> None:
    """The next call says it: which envs, which pid, which signal."""
    env_fns = [functools.partial(Dies, exit_with_3, offset=index) for index in range(3)]
    async with asyncio.timeout(BOUND_SECONDS), AsyncVectorEnv(env_fns, num_workers=2) as envs:
        await envs.reset()
        *_, pid = await envs.get_attr("pid")
        os.kill(pid, signal.SIGKILL)
        if known:
            await noticed(pid)
        with pytest.raises(WorkerDied, match=r"env 2.*was killed by SIGKILL") as caught:
            await envs.step([0, 0, 0])
        deaths(caught.value, [2], pid)
        assert caught.value.exitcode == -signal.SIGKILL
        assert caught.value.command == (None if known else "step")
        # What the other worker had not answered at that moment is owed.
        with pytest.raises((ResetNeeded, AlreadyPendingCallError)):
            await envs.step([0, 0, 0])
        await envs.reset(env_ids=[0, 1])
        assert await envs.get_attr("steps", env_ids=[0, 1]) == (0, 0)


@pytest.mark.not_on_ray("Ray does not tell how a process has ended")
@pytest.mark.parametrize(
    ("command", "use"),
    [
        ("_observation", lambda envs: envs.call("_observation")),
        ("render", lambda envs: envs.render(env_ids=[2])),
    ],
)
async def test_other_calls_after_a_worker_was_killed(command: str, use: Any) -> None:
    """Each says that the worker is gone, and none hangs."""
    env_fns = [functools.partial(Dies, exit_with_3, offset=index) for index in range(3)]
    async with asyncio.timeout(BOUND_SECONDS), AsyncVectorEnv(env_fns, num_workers=2) as envs:
        await envs.reset()
        *_, pid = await envs.get_attr("pid")
        os.kill(pid, signal.SIGKILL)
        await noticed(pid)
        for _ in range(2):
            with pytest.raises(WorkerDied, match=r"env 2.*was killed by SIGKILL") as caught:
                await use(envs)
            deaths(caught.value, [2], pid)
            assert caught.value.command in (command, None)
        assert await envs.get_attr("offset", env_ids=[1, 0]) == (1, 0)


DEATHS: dict[str, tuple[Callable[[], object], int, str]] = {
    "exit": (exit_with_3, 3, "exited with code 3 during step"),
    "exit 0": (functools.partial(os._exit, 0), 0, "exited with code 0 during step"),
    "segfault": (functools.partial(ctypes.string_at, 0), -signal.SIGSEGV, "was killed by SIGSEGV during step"),
    "abort": (os.abort, -signal.SIGABRT, "was killed by SIGABRT during step"),
}


@pytest.mark.not_on_ray("Ray does not tell how a process has ended")
@pytest.mark.parametrize("death", DEATHS)
async def test_a_worker_that_ends_in_step(death: str) -> None:
    """With its exit code or signal, and the end of its stderr."""
    ending, exitcode, text = DEATHS[death]
    env_fns = [functools.partial(Dies, ending, offset=index) for index in range(3)]
    async with asyncio.timeout(BOUND_SECONDS), AsyncVectorEnv(env_fns, num_workers=2) as envs:
        await envs.reset()
        pid, *_ = await envs.get_attr("pid")
        with pytest.raises(WorkerDied, match=rf"envs 0, 1 .*{text}") as caught:
            await envs.step([0, 1, 0])
        deaths(caught.value, [0, 1], pid)
        assert caught.value.exitcode == exitcode
        assert caught.value.command == "step"
        assert ("the last words" in caught.value.stderr) is (death == "exit")
        assert ("the last words" in str(caught.value)) is (death == "exit")
        await envs.reset(env_ids=[2])
        assert await envs.get_attr("steps", env_ids=[2]) == (0,)
        assert ("fault_envs.py" in caught.value.stack or "ctypes" in caught.value.stack) is (exitcode < 0)


@pytest.mark.not_on_ray("Ray does not tell how a process has ended")
async def test_a_worker_that_ends_while_its_envs_are_built() -> None:
    """The start fails, and leaves nothing."""
    env_fns = [functools.partial(Dies, exit_with_3), exit_with_3]
    envs = AsyncVectorEnv(env_fns, num_workers=2)
    async with asyncio.timeout(BOUND_SECONDS):
        with pytest.raises(WorkerDied, match=r"env 1 .*exited with code 3 during build") as caught:
            await envs
        assert caught.value.env_ids == (1,)
        assert not envs.closed


async def test_both_workers_die_in_one_step(on_ray: bool) -> None:
    """One error at once; afterwards all envs say that they need a reset, and close ends."""
    env_fns = [functools.partial(Dies, exit_with_3, offset=index) for index in range(2)]
    async with asyncio.timeout(BOUND_SECONDS):
        async with AsyncVectorEnv(env_fns, num_workers=2) as envs:
            await envs.reset()
            pids = await envs.get_attr("pid")
            with pytest.raises(WorkerDied, match="died" if on_ray else "exited with code 3"):
                await envs.step([1, 1])
            for pid in pids:
                await noticed(pid)
            # Ray may tell of the second one later.
            with pytest.raises((ResetNeeded, WorkerDied, *[AlreadyPendingCallError] * on_ray)):
                await envs.step([0, 0])
        with pytest.raises(ClosedEnvironmentError):
            await envs.step([0, 0])


@pytest.mark.parametrize("num_workers", [1, 2])
async def test_close_after_a_worker_died(num_workers: int) -> None:
    """There is nobody to ask, nothing to raise, and nothing to wait for, `close_grace` above all."""
    env_fns = [functools.partial(Dies, exit_with_3, offset=index) for index in range(2)]
    async with asyncio.timeout(BOUND_SECONDS):
        envs = await AsyncVectorEnv(env_fns, num_workers=num_workers, close_grace=10)
        *_, pid = await envs.get_attr("pid")
        os.kill(pid, signal.SIGKILL)
        async with asyncio.timeout(5):
            await envs.close()
        assert envs.closed


async def test_a_worker_that_ends_in_close() -> None:
    """Its end was asked for; nobody waits for an answer that cannot come."""
    env_fns = [functools.partial(Dies, exit_with_3, at="close", offset=index) for index in range(2)]
    async with asyncio.timeout(BOUND_SECONDS):
        envs = await AsyncVectorEnv(env_fns, num_workers=2, close_grace=10)
        async with asyncio.timeout(5):
            with contextlib.suppress(WorkerDied):
                await envs.close()
        assert envs.closed


@pytest.mark.not_on_ray("Ray does not tell how a process has ended")
async def test_a_worker_killed_behind_a_reply_too_large_for_its_area() -> None:
    """It has answered, but not taken its token: the others are asked, so that the step ends all the same."""
    env_fns = [functools.partial(DiesBehindItsReply, offset=index) for index in range(2)]
    async with asyncio.timeout(BOUND_SECONDS), AsyncVectorEnv(env_fns, num_workers=2) as envs:
        await envs.reset()
        await envs.step([0, 0])
        _, rewards, *_, infos = await envs.step([1, 0])
        np.testing.assert_array_equal(rewards, [2, 2])
        assert len(infos["text"][0]) == 20_000
        with pytest.raises(WorkerDied, match="env 0 .*was killed by SIGKILL"):
            await envs.step([0, 0])
        await envs.reset()
        await envs.step([0, 0])


IMPORTED = """
    import aiovec
    import gymnasium as gym
    from gymnasium.envs.classic_control import CartPoleEnv

    class Own(CartPoleEnv):
        pass

    def build():
        return {what}

    envs = aiovec.BlockingVectorEnv([{env_fn}] * 2, num_workers=1)
    try:
        print(envs.reset()[0].shape)
    finally:
        envs.close()
"""


@pytest.mark.parametrize(("env_fn", "what"), [("Own", "None"), ("build", "CartPoleEnv()"), ("lambda: Own()", "None")])
def test_a_start_within_the_import_of_what_the_envs_are(
    env_fn: str, what: str, program: Callable[[str], Program], tmp_path: Path
) -> None:
    """A worker would import it, too, and start workers, whose import would …: refused at once, and never a hang."""
    (tmp_path / "experiment.py").write_text(textwrap.dedent(IMPORTED.format(env_fn=env_fn, what=what)))
    exitcode, _, errors = program("import experiment").run()
    assert exitcode == 1
    assert "while 'experiment' is being imported" in errors


def test_a_start_within_the_import_of_something_else(program: Callable[[str], Program], tmp_path: Path) -> None:
    """What a worker does not import is nothing to it."""
    env_fn = "lambda: CartPoleEnv()"
    (tmp_path / "experiment.py").write_text(textwrap.dedent(IMPORTED.format(env_fn=env_fn, what="None")))
    assert "(2, 4)" in program("import experiment").output()


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_terminate_in_a_signal_handler(loop: str, program: Callable[[str], Program]) -> None:
    """The task that waits is told, although nothing else wakes the loop."""
    output = program(f"""
        import asyncio, signal, time
        import aiovec, numpy as np, gymnasium as gym, uvloop

        class Slow(gym.Env):
            observation_space, action_space = gym.spaces.Box(-1, 1, (1,)), gym.spaces.Discrete(2)
            def reset(self, *, seed=None, options=None):
                return np.zeros(1, np.float32), {{}}
            def step(self, action):
                time.sleep(60)

        async def main():
            async with aiovec.AsyncVectorEnv([Slow] * 2, num_workers=2) as envs:
                await envs.reset()
                signal.signal(signal.SIGALRM, lambda *_: envs.terminate())
                signal.setitimer(signal.ITIMER_REAL, 0.3)
                try:
                    await envs.step([0, 0])
                except aiovec.ClosedEnvironmentError as error:
                    print("told:", error)

        {"asyncio" if loop == "asyncio" else "uvloop"}.run(main())
    """).output()
    assert "told: step()" in output
