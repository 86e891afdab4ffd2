"""Who may import whom: testing → faces → pool → exchange ← worker."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import aiovec

SOURCE = Path(aiovec.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))
PURE = {"states.py", "spaces.py", "ring.py"}  # of the pool: they decide, and await nothing


def part_of(path: Path) -> str:
    """`exchange`, `pool`, `testing`, `worker`, or nothing for the faces."""
    return path.relative_to(SOURCE).parts[0] if path.parent != SOURCE else ""


def imports_of(path: Path) -> set[str]:
    """Every module that a file imports, wherever in it, but for type checkers alone."""
    tree = ast.parse(path.read_text())
    skipped = {
        node
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and isinstance(branch.test, ast.Name) and branch.test.id == "TYPE_CHECKING"
        for node in ast.walk(branch)
    }
    modules: set[str] = set()
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            assert node.module is not None
            modules |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return modules


def imports_any(path: Path, *packages: str) -> bool:
    """Whether a file imports one of these packages, or anything in them."""
    return any(
        module == package or module.startswith(f"{package}.") for module in imports_of(path) for package in packages
    )


@pytest.fixture(params=FILES, ids=[str(path.relative_to(SOURCE)) for path in FILES])
def path(request: pytest.FixtureRequest) -> Path:
    """Each file of aiovec."""
    found: Path = request.param
    return found


def test_the_house_is_as_it_is_drawn() -> None:
    """A new part needs a rule here."""
    assert {part_of(path) for path in FILES} == {"", "exchange", "pool", "testing", "worker"}


def test_nothing_needs_what_is_for_tests(path: Path) -> None:
    """Nor does that see more than the faces, but for how a value travels to a worker."""
    if part_of(path) != "testing":
        assert not imports_any(path, "aiovec.testing")
    else:
        assert not imports_any(path, "aiovec.pool", "aiovec.worker")


def test_worker_never_imports_pool(path: Path) -> None:
    """Nor the faces: a worker is started without them."""
    if part_of(path) == "worker":
        assert not imports_any(path, "aiovec.pool", "aiovec.vector_env", "aiovec.make", "aiovec.arguments")


def test_exchange_imports_neither_side(path: Path) -> None:
    """It is what both sides share."""
    if part_of(path) == "exchange":
        assert not imports_any(path, "aiovec.pool", "aiovec.worker", "aiovec.vector_env", "aiovec.arguments")


def test_the_pool_knows_no_face(path: Path) -> None:
    """Only who is asked knows who asks."""
    if part_of(path) == "pool":
        assert not imports_any(path, "aiovec.vector_env", "aiovec.make", "aiovec.arguments")


def test_the_pool_takes_a_worker_in_two_places(path: Path) -> None:
    """The one that starts a process, and the one that needs none; Ray's loads it by its name, in a thread."""
    if part_of(path) == "pool" and path.name not in ("in_process.py", "process.py"):
        assert not imports_any(path, "aiovec.worker")
    if path.name == "process.py":
        own = {module for module in imports_of(path) if module.startswith("aiovec.worker.")}
        assert all(module.startswith("aiovec.worker.entry") for module in own)


def test_event_loops_are_the_pools_and_the_faces(path: Path) -> None:
    """What is shared, and what a worker does, works without one."""
    if path.name == "async_lane.py":  # where there are async envs
        return
    if part_of(path) in ("exchange", "worker") or path.name in ("errors.py", "arguments.py", "__init__.py"):
        assert not imports_any(path, "asyncio", "anyio", "uvloop")


def test_decisions_import_no_event_loop(path: Path) -> None:
    """States, spaces and buffers are synchronous functions."""
    if part_of(path) == "pool" and path.name in PURE:
        assert not imports_any(path, "asyncio", "anyio", "socket", "os")


def test_one_file_pickles(path: Path) -> None:
    """One owner for each dangerous thing; `exchange.pickles` has this one."""
    if path.name != "pickles.py":
        assert not imports_any(path, "pickle", "cloudpickle", "tblib")


def test_errors_depend_on_nothing_of_ours() -> None:
    """Everything may raise them."""
    assert not imports_any(SOURCE / "errors.py", "aiovec")


def test_the_rules_can_see_imports() -> None:
    """Also inside of functions: that is where a worker imports what is heavy."""
    assert imports_any(SOURCE / "worker" / "entry.py", "aiovec.worker.serve")
    assert imports_any(SOURCE / "pool" / "in_process.py", "asyncio")
    assert not imports_any(SOURCE / "errors.py", "aiovec.vector_env")
