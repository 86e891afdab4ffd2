"""The public surface, and what the import of a worker costs."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import aiovec
import aiovec.errors

SOURCE = Path(aiovec.__file__).parent
ALIASES = {  # of types, for annotations
    "EnvFn",
    "ObservationMode",
    "Policy",
    "ResetResult",
    "StepResult",
    "Transition",
    "VectorWrapperFn",
}


def test_all_is_sorted_and_without_doubles() -> None:
    """By ASCII, so that a name has one place."""
    assert aiovec.__all__ == sorted(set(aiovec.__all__))


@pytest.mark.parametrize("name", aiovec.__all__)
def test_every_public_name_is_there(name: str) -> None:
    """By attribute, by `from … import`, in `dir`; and told by a docstring."""
    found = getattr(aiovec, name)
    assert getattr(importlib.import_module("aiovec"), name) is found
    assert name in dir(aiovec)
    if name not in ALIASES:
        assert found.__doc__
        assert found.__module__.startswith("aiovec.")


def test_what_public_signatures_name_is_public() -> None:
    """A user can annotate what is passed, and what is returned."""
    paths = [path.relative_to(SOURCE.parent).with_suffix("") for path in SOURCE.rglob("[a-z]*.py")]
    ours = {name for path in paths for name in importlib.import_module(".".join(path.parts)).__all__}
    named: set[str] = set()
    for public in (getattr(aiovec, name) for name in aiovec.__all__ if name not in ALIASES):
        members = vars(public).values() if isinstance(public, type) else [public]
        for member in members:
            function = member.fget if isinstance(member, property) else member
            if not inspect.isfunction(function) or (public is aiovec.SubEnv and function.__name__ == "__init__"):
                continue  # nobody but a vector builds one
            if function.__name__ == "__init__" or not function.__name__.startswith("_"):
                named.update(re.findall(r"(?<!')\b\w+", " ".join(map(str, function.__annotations__.values()))))
    assert {"EnvFn", "Rollout", "StepResult"} <= named
    assert named & ours <= set(aiovec.__all__)


def test_every_public_name_is_there_in_a_worker() -> None:
    """Imported when it is first asked for."""
    code = "import aiovec; [getattr(aiovec, name) for name in aiovec.__all__]"
    environment = {**os.environ, "AIOVEC_WORKER": "1", "PYTHONPATH": str(SOURCE.parent)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_other_names_are_an_attribute_error() -> None:
    """`hasattr` works, and the message is Python's."""
    with pytest.raises(AttributeError, match="module 'aiovec' has no attribute 'Nothing'"):
        aiovec.Nothing
    assert not hasattr(aiovec, "name_envs")


def test_star_import_gives_the_public_names() -> None:
    """No more, no less."""
    names: dict[str, object] = {}
    exec("from aiovec import *", names)  # noqa: S102
    assert sorted(names.keys() - {"__builtins__"}) == aiovec.__all__


def test_every_error_is_public() -> None:
    """Whatever aiovec raises, a user can name."""
    errors = {name for name, value in vars(aiovec.errors).items() if isinstance(value, type)}
    ours = {name for name in errors if issubclass(getattr(aiovec.errors, name), aiovec.AiovecError)}
    assert ours <= set(aiovec.__all__)


def test_type_checkers_see_the_same_names() -> None:
    """The imports are those that `__getattr__` serves."""
    tree = ast.parse((SOURCE / "__init__.py").read_text())
    seen = [alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert sorted(set(seen) - {"annotations", "TYPE_CHECKING", "Any"}) == aiovec.__all__


def test_every_module_says_what_it_exports() -> None:
    """Each has a docstring, and each name of its `__all__` is there, once."""
    for path in SOURCE.rglob("*.py"):
        if path.name in ("__init__.py", "__main__.py"):
            continue
        module = importlib.import_module(".".join(path.relative_to(SOURCE.parent).with_suffix("").parts))
        assert module.__doc__, module
        assert len(module.__all__) == len(set(module.__all__)), module
        assert all(hasattr(module, name) for name in module.__all__), module


def imported_by(statement: str, **environment: str) -> set[str]:
    """The modules that a fresh interpreter has after a statement."""
    code = f"import sys; sys.path.insert(0, {str(SOURCE.parent)!r}); {statement}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True, env=os.environ | environment
    )
    return set(done.stdout.split())


def test_a_worker_begins_with_the_standard_library() -> None:
    """It ties its life to the parent's before anything heavy is imported."""
    modules = imported_by("import aiovec.worker.entry", AIOVEC_WORKER="1")
    assert "aiovec.worker.entry" in modules
    assert not modules & {"asyncio", "anyio", "numpy", "gymnasium", "cloudpickle"}


def test_a_worker_serves_without_an_event_loop() -> None:
    """A worker has no loop, so it does not wait for the import of one."""
    modules = imported_by("import aiovec.worker.serve", AIOVEC_WORKER="1")
    assert "aiovec.worker.serve" in modules
    assert not modules & {"asyncio", "anyio", "uvloop"}


def test_importing_aiovec_imports_what_it_needs() -> None:
    """Else the first `make_vec`, which may stand in a coroutine, would hold up the loop with it."""
    assert imported_by("import aiovec") >= {"asyncio", "anyio", "numpy", "gymnasium", "aiovec.vector_env"}


def test_extras_are_imported_when_they_are_needed() -> None:
    """Who has not installed one, or does not use it, does not wait for it."""
    extras = {"typer", "rich", "matplotlib", "PIL", "greenlet"}
    assert not imported_by("import aiovec") & {*extras, "aiovec.cli", "aiovec.testing", "aiovec.greenlets"}


def test_what_a_worker_starts_is_no_worker() -> None:
    """The mark does not go on to other processes."""
    code = "import os, aiovec; assert 'AIOVEC_WORKER' not in os.environ; aiovec.make_vec"
    assert "aiovec.make" in imported_by(code, AIOVEC_WORKER="1")
