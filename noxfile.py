"""The project's tasks; those without a Python of their own use the one that runs nox.

With only Python at hand: ``python noxfile.py -s demo``, ``python noxfile.py -s tests``. It sets up nox by itself.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
EXTRAS = "[cli,notebook,wrappers]"

if __name__ == "__main__" and importlib.util.find_spec("nox") is None:
    bootstrap = HERE / ".nox" / "bootstrap"
    python = bootstrap / "bin" / "python"
    complete = bootstrap / "complete"  # written last: what was interrupted is built anew
    if not complete.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", bootstrap], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "nox>=2025.5"], check=True)
        complete.touch()
    os.execv(python, [str(python), "-m", "nox", "-f", __file__, *sys.argv[1:]])  # noqa: S606  nobody left for a Ctrl-C

import nox  # noqa: E402  it may have to be installed first

PYPROJECT = nox.project.load_toml(HERE / "pyproject.toml")
PYTHONS = nox.project.python_versions(PYPROJECT)

nox.options.sessions = ["lint", "typing", "tests", "ray", "examples"]
nox.options.error_on_missing_interpreters = False
nox.options.reuse_venv = "yes"


def _show_pyenv_pythons() -> None:
    """Lets pyenv's shims find every Python that it has, not only the chosen one."""
    try:
        listed = subprocess.run(["pyenv", "versions", "--bare"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return
    chosen = os.environ.get("PYENV_VERSION", "")
    versions = [chosen] if chosen else [".".join(map(str, sys.version_info[:3]))]
    versions += [version for version in listed.stdout.split() if version.startswith(tuple(PYTHONS))]
    os.environ["PYENV_VERSION"] = ":".join(dict.fromkeys(versions))


_show_pyenv_pythons()


def _install(session: nox.Session, *groups: str, extras: str = "") -> None:
    """Installs the wheel, never the working tree, and some dependency groups."""
    session.install("--quiet", *nox.project.dependency_groups(PYPROJECT, *groups), f".{extras}")


def _isolated() -> dict[str, str]:
    """The environment in which `import aiovec` finds the wheel only."""
    return {"PYTHONSAFEPATH": "1"}


@nox.session
def lint(session: nox.Session) -> None:
    """Ruff: rules and format."""
    session.install("--quiet", *nox.project.dependency_groups(PYPROJECT, "lint"))
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def typing(session: nox.Session) -> None:
    """Mypy and pyright, both strict, and the completeness of the public types."""
    _install(session, "typing", extras=EXTRAS)
    session.run("mypy", env=_isolated())
    session.run("pyright", env=_isolated())
    command = ("pyright", "--verifytypes", "aiovec", "--ignoreexternal", "--outputjson")
    output = session.run(*command, env=_isolated(), silent=True, success_codes=[0, 1])
    symbols = json.loads(str(output))["typeCompleteness"]["symbols"]
    incomplete = [symbol["name"] for symbol in symbols if symbol["isExported"] and not symbol["isTypeKnown"]]
    if incomplete:
        session.error(f"public names without a complete type: {sorted(incomplete)}")


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    """The test suite, without examples and notebooks, on each Python here: whole on the first, a sample on the others."""
    _install(session, "test", extras=EXTRAS)
    chosen = session.posargs
    if not chosen:
        chosen = ["--numprocesses=3"]  # most tests wait for processes
        if session.python != PYTHONS[0]:
            chosen += ["--sample=8"]  # but for the exceptions, which do differ between Pythons
    elsewhere = [f"--ignore=tests/{folder}" for folder in ("examples", "notebooks", "ray")]
    session.run("pytest", *elsewhere, *chosen, env=_isolated())


@nox.session
def ray(session: nox.Session) -> None:
    """Workers on Ray, where it can be installed: their own tests, and a sample of those of all workers."""
    _install(session, "test", extras="[wrappers]")
    session.install("--quiet", "ray>=2.60", success_codes=[0, 1])
    for chosen in (
        ["tests/ray", "tests/unit/test_ray_actor.py"],
        ["--ray", "--sample=60", "--timeout=600", "tests/conformance", "tests/faults"],
    ):
        session.run("pytest", *chosen, *session.posargs, env=_isolated())


@nox.session
def examples(session: nox.Session) -> None:
    """Every example, as its test runs it, notebooks in a Jupyter kernel, and wrappers with all that some of them need."""
    _install(session, "test", "examples", "wrappers", extras="[cli,examples,notebook,wrappers]")
    # For `actor_learner.py`, `ppo.py` and some wrappers, whose tests are skipped without it. CI's machine has this one on its disk, for Python 3.11;
    # by its "+cpu" nobody else downloads the gigabytes of CUDA that plain torch brings.
    session.install("--quiet", "torch==2.13.0+cpu", success_codes=[0, 1])
    chosen = ["tests/examples", "tests/notebooks", "tests/conformance/test_wrapping.py"]
    session.run("pytest", *chosen, *session.posargs, env=_isolated())


@nox.session
def coverage(session: nox.Session) -> None:
    """The test suite with branch coverage, workers included."""
    _install(session, "coverage", "examples", extras="[cli,examples,notebook,wrappers]")
    session.run("coverage", "erase")
    session.run("coverage", "run", "-m", "pytest", *session.posargs, env=_isolated())
    session.run("coverage", "combine", "--quiet")
    session.run("coverage", "report")


@nox.session
def bench(session: nox.Session) -> None:
    """The table of the README, interleaved with bare processes and Gymnasium's AsyncVectorEnv."""
    _install(session, "bench")
    for others in (["envpool"], ["torch==2.13.0+cpu", "torchrl"]):  # shown beside ours where they can be had
        session.install("--quiet", *others, success_codes=[0, 1])
    session.run("python", "tests/bench/table.py", *session.posargs)


@nox.session
def pictures(session: nox.Session) -> None:
    """The pictures of the README, from what `bench` has left in docs/bench.json."""
    session.install("--quiet", "matplotlib>=3.8")
    session.run("python", "docs/pictures.py", *session.posargs)


@nox.session
def demo(session: nox.Session) -> None:
    """CartPole and Breakout, many at once, under await in one event loop."""
    session.install("--quiet", ".[examples]")
    # Its own clean end after a Ctrl-C takes longer than nox's 0.5 s.
    session.run("python", "examples/demo.py", *session.posargs, interrupt_timeout=10, terminate_timeout=5)


if __name__ == "__main__":
    nox.main()
