"""What users pass: every bad argument is named, with the fact, and nothing is changed."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import AutoresetMode

from aiovec.arguments import ResetTargets, check_plan, env_ids_of, reset_targets
from aiovec.exchange.messages import ResetRequest
from aiovec.pool.cpus import usable_cpus
from aiovec.pool.start import StartPlan

BOX = spaces.Box(0, 1, (2,))


def env_fn() -> Any:
    """Never called here."""


def plan(**changed: Any) -> StartPlan:
    """A plan of good arguments, but for some."""
    arguments: dict[str, Any] = {
        "env_fns": [env_fn] * 3,
        "num_workers": 2,
        "threads_per_worker": 1,
        "shared_memory": True,
        "copy": None,
        "observation_mode": "same",
        "autoreset_mode": AutoresetMode.NEXT_STEP,
        "context": None,
        "worker_options": None,
        "step_timeout": None,
        "start_timeout": 60.0,
        "close_grace": 3.0,
        "max_buffers": 4,
        "traceback_locals": False,
        "on_failure": "raise",
        "max_restarts": 3,
    }
    return check_plan(**{**arguments, **changed})


@pytest.mark.parametrize(
    ("name", "value", "error", "fact"),
    [
        ("env_fns", [], ValueError, "at least one env"),
        ("env_fns", [env_fn, "CartPole-v1"], TypeError, "env_fns[1] is 'CartPole-v1', which cannot be called"),
        ("env_fns", [None], TypeError, "env_fns[0] is None, which cannot be called"),
        ("env_fns", env_fn, TypeError, "env_fns"),
        ("env_fns", 4, TypeError, "env_fns"),
        ("num_workers", -1, ValueError, "num_workers=-1"),
        ("num_workers", 1.5, ValueError, "num_workers=1.5"),
        ("num_workers", True, ValueError, "num_workers=True"),
        ("num_workers", "2", ValueError, "num_workers='2'"),
        ("threads_per_worker", 0, ValueError, "threads_per_worker=0"),
        ("threads_per_worker", 1.5, ValueError, "threads_per_worker=1.5"),
        ("threads_per_worker", 1000, ValueError, "threads_per_worker=1000: expected a number of threads, 1 to 254"),
        ("observation_mode", "similar", ValueError, "observation_mode='similar'"),
        ("observation_mode", None, ValueError, "observation_mode=None"),
        ("observation_mode", (BOX,), TypeError, "a pair"),
        ("observation_mode", (BOX, BOX, BOX), TypeError, "a pair"),
        ("observation_mode", (BOX, "same"), TypeError, "a pair"),
        ("autoreset_mode", "next_step", ValueError, "'NextStep'"),
        ("autoreset_mode", None, ValueError, "autoreset_mode=None"),
        ("context", "thread", ValueError, "context='thread'"),
        ("worker_options", {"num_cpus": 1}, ValueError, "context='ray'"),
        ("worker_options", 1, TypeError, "worker_options=1"),
        ("start_timeout", 0, ValueError, "start_timeout=0"),
        ("start_timeout", -1.0, ValueError, "start_timeout=-1.0"),
        ("start_timeout", math.nan, ValueError, "start_timeout=nan"),
        ("start_timeout", "60", (TypeError, ValueError), "start_timeout='60'"),
        ("close_grace", 0, ValueError, "close_grace=0"),
        ("close_grace", None, (TypeError, ValueError), "close_grace=None"),
        ("max_buffers", 0, ValueError, "max_buffers=0"),
        ("max_buffers", 2.0, ValueError, "max_buffers=2.0"),
        ("max_buffers", True, ValueError, "max_buffers=True"),
    ],
)
def test_a_bad_argument_is_named(name: str, value: Any, error: type[Exception], fact: str) -> None:
    """The name, the value, what was expected."""
    with pytest.raises(error) as caught:
        plan(**{name: value})
    assert name in str(caught.value)
    assert fact in str(caught.value)


def test_a_good_plan_is_completed() -> None:
    """Env_fns become a tuple, a name a mode; there are never more workers than envs."""
    made = plan(env_fns=iter([env_fn] * 3), num_workers=np.int64(8), autoreset_mode="SameStep")
    assert made.env_fns == (env_fn,) * 3
    assert made.num_workers == 3
    assert type(made.num_workers) is int
    assert made.autoreset_mode is AutoresetMode.SAME_STEP
    assert plan(autoreset_mode="DISABLED").autoreset_mode is AutoresetMode.DISABLED
    assert plan(num_workers=0).num_workers == 0
    assert plan(num_workers=None).num_workers == min(3, usable_cpus())
    assert plan(num_workers=None, env_fns=[env_fn] * 10_000).num_workers == usable_cpus()


@pytest.mark.parametrize("mode", ["same", "different", (BOX, BOX)])
@pytest.mark.parametrize("context", [None, "fork", "forkserver", "spawn"])
def test_every_mode_and_context_is_taken(mode: Any, context: str | None) -> None:
    """What the docstring lists."""
    made = plan(observation_mode=mode, context=context)
    assert (made.observation_mode, made.context) == (mode, context)


@pytest.mark.parametrize("env_ids", [[2, 0], (2, 0), np.array([2, 0]), iter([2, 0])])
def test_env_ids_keep_their_order(env_ids: Any) -> None:
    """As plain numbers."""
    ids = env_ids_of(3, env_ids)
    assert ids == [2, 0]
    assert all(type(env_index) is int for env_index in ids)


@pytest.mark.parametrize(
    ("env_ids", "error", "fact"),
    [
        ([3], ValueError, "env_ids has 3: the envs are numbered from 0 to 2"),
        ([0, -1], ValueError, "env_ids has -1"),
        ([0.0], ValueError, "env_ids has 0.0"),
        ([True], ValueError, "env_ids has True"),
        (np.array([True, False, True]), ValueError, "env_ids has"),
        (["0"], ValueError, "env_ids has '0'"),
        ([], ValueError, "env_ids is empty"),
        ([1, 0, 1], ValueError, "env_ids has 1 twice"),
        (1, TypeError, "env_ids"),
    ],
)
def test_bad_env_ids_are_named(env_ids: Any, error: type[Exception], fact: str) -> None:
    """Which one, and what there is."""
    with pytest.raises(error) as caught:
        env_ids_of(3, env_ids)
    assert fact in str(caught.value)


@pytest.mark.parametrize("env_ids", [None, [0], [2, 1]])
@pytest.mark.parametrize(
    ("seed", "error", "fact"),
    [
        (1.5, TypeError, "seed=1.5"),
        (True, TypeError, "seed=True"),
        ([1] * 4, ValueError, "seed has length 4"),
        ([], ValueError, "seed has length 0"),
    ],
)
def test_bad_seeds_are_named(env_ids: list[int] | None, seed: Any, error: type[Exception], fact: str) -> None:
    """The argument, its value or its length."""
    with pytest.raises(error) as caught:
        reset_targets(3, seed, None, env_ids)
    assert fact in str(caught.value)


@pytest.mark.parametrize("seeds", [[1, 2.5, 3], [1, "2", 3], [1, True, 3]])
def test_a_bad_seed_in_a_list_is_named(seeds: list[Any]) -> None:
    """By its position."""
    with pytest.raises(TypeError) as caught:
        reset_targets(3, seeds, None, None)
    assert str(caught.value) == f"seed[1]={seeds[1]!r}: expected an int or None"


@pytest.mark.parametrize(
    ("mask", "error", "fact"),
    [
        ([True, False, True], TypeError, "list"),
        (np.array([1, 0, 1]), TypeError, "int64"),
        (np.array([True, False]), ValueError, "got shape (2,)"),
        (np.array([[True, False, True]]), ValueError, "got shape (1, 3)"),
        (np.zeros(3, bool), ValueError, "no True"),
        (None, TypeError, "NoneType"),
    ],
)
def test_a_bad_mask_is_named(mask: Any, error: type[Exception], fact: str) -> None:
    """Gymnasium's rules, and its error classes."""
    with pytest.raises(error, match=r"options\['reset_mask'\]") as caught:
        reset_targets(3, None, {"reset_mask": mask}, None)
    assert fact in str(caught.value)


def test_env_ids_and_a_mask_exclude_each_other() -> None:
    """Both would say which envs are meant."""
    with pytest.raises(ValueError, match=r"env_ids and options\['reset_mask'\]"):
        reset_targets(3, None, {"reset_mask": np.ones(3, bool)}, [0])


def requests_of(target: ResetTargets) -> list[ResetRequest | None]:
    """What two workers of two envs each are asked."""
    return [target.request(range(2)), target.request(range(2, 4))]


def test_all_envs_are_reset() -> None:
    """Each env its own seed; the rows are all."""
    target = reset_targets(4, 10, None, None)
    assert target.env_ids == [0, 1, 2, 3]
    assert requests_of(target) == [ResetRequest(None, [10, 11], None, True), ResetRequest(None, [12, 13], None, True)]


def test_no_seed_is_no_seed() -> None:
    """For every env, and where a list says so."""
    assert reset_targets(4, None, None, None).request(range(2)) == ResetRequest(None, [None, None], None, True)
    assert reset_targets(2, [None, 5], None, None).request(range(2)) == ResetRequest(None, [None, 5], None, True)
    assert reset_targets(2, np.array([4, 5]), None, None).seeds == {0: 4, 1: 5}


def test_some_envs_are_reset() -> None:
    """A worker's rows in the order asked for; an int seeds by env index, a list goes with `env_ids`."""
    by_int = reset_targets(4, 10, {"x": 1}, [3, 0, 2])
    assert by_int.env_ids == [3, 0, 2]
    assert requests_of(by_int) == [
        ResetRequest([0], [10], {"x": 1}, False),
        ResetRequest([1, 0], [13, 12], {"x": 1}, False),
    ]
    by_list = reset_targets(4, [7, 8], None, [3, 2])
    assert requests_of(by_list) == [None, ResetRequest([1, 0], [7, 8], None, False)]


def test_a_mask_asks_every_worker_and_is_taken_out() -> None:
    """The rows of the others are repeated; the caller's dict and mask stay as they are."""
    mask = np.array([False, True, False, False])
    options = {"reset_mask": mask, "x": 1}
    target = reset_targets(4, [1, 2, 3, 4], options, None)
    assert (target.env_ids, target.reset_ids, target.unmasked) == ([0, 1, 2, 3], [1], [0, 2, 3])
    assert requests_of(target) == [ResetRequest([1], [2], {"x": 1}, True), ResetRequest([], [], {"x": 1}, True)]
    assert list(options) == ["reset_mask", "x"]
    assert options["reset_mask"] is mask


def test_a_full_mask_is_no_mask() -> None:
    """All envs, also those that are owed."""
    target = reset_targets(2, None, {"reset_mask": np.ones(2, bool)}, None)
    assert (target.reset_ids, target.unmasked, target.options) == (None, [], {})


def test_options_of_actors() -> None:
    """They reach Ray as they are, but for those that would take an actor out of the vector's hands."""
    pytest.importorskip("ray")
    given = {"num_cpus": 2, "resources": {"simulator": 1}}
    made = plan(context="ray", worker_options=given)
    assert made.worker_options == given
    assert plan(context="ray").worker_options == {}
    for name, value in (("lifetime", "detached"), ("max_restarts", 3), ("name", "mine")):
        with pytest.raises(ValueError, match=name):
            plan(context="ray", worker_options={name: value})


@pytest.mark.parametrize("num_workers", [None, 0])
def test_how_many_actors_must_be_said(num_workers: int | None) -> None:
    """The CPUs of a cluster are not those of this process."""
    with pytest.raises(ValueError, match="say how many"):
        plan(context="ray", num_workers=num_workers)
