"""`BlockingVectorEnv` beside `SyncVectorEnv`, and what is written for Gymnasium's vectors over it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from conformance.comparing import AUTORESET_MODES, assert_same
from gymnasium.utils.performance import benchmark_vector_step
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
from sample_envs import Counter
from space_envs import OBSERVATION_SPACES, InfoEnv, Recorder, SpaceEnv
from wrapper_cases import FairSync

import aiovec

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

NUM_ENVS = 3
NUM_STEPS = 50
CELLS = [(0, True), (1, True), (2, True), (2, False)]

EnvFn = Callable[[], gym.Env[Any, Any]]


def blocking(env_fns: list[Any], num_workers: int = 2, **kwargs: Any) -> aiovec.BlockingVectorEnv:
    """Forked workers, as these cost a tenth of fresh interpreters."""
    context = "fork" if num_workers else None
    return aiovec.BlockingVectorEnv(env_fns, num_workers=num_workers, context=context, **kwargs)


def played(envs: Any, mode: AutoresetMode) -> list[Any]:
    """Resets, steps, and the halves of both."""
    seen: list[Any] = [envs.reset(seed=3)]
    envs.action_space.seed(4)
    done = np.zeros(NUM_ENVS, np.bool_)
    for step in range(NUM_STEPS):
        if mode is AutoresetMode.DISABLED and done.any():
            seen.append(envs.reset(options={"reset_mask": done}))
        if step == 25:
            seen.append(envs.reset(seed=[1, None, 3], options={"level": 2}))
        actions = envs.action_space.sample()
        if isinstance(envs, aiovec.BlockingVectorEnv) and step % 2:
            envs.step_async(actions)
            seen.append(envs.step_wait(timeout=60))
        else:
            seen.append(envs.step(actions))
        done = seen[-1][2] | seen[-1][3]
    return seen


@pytest.mark.parametrize("mode", AUTORESET_MODES)
@pytest.mark.parametrize("name", OBSERVATION_SPACES)
def test_same_as_sync(name: str, mode: AutoresetMode) -> None:
    """Every space, each autoreset mode; the cells take turns."""
    env_fns: list[Any] = [partial(SpaceEnv, OBSERVATION_SPACES[name])] * NUM_ENVS
    sync = FairSync(env_fns, autoreset_mode=mode)
    expected = played(sync, mode)
    num_workers, shared_memory = CELLS[(len(name) + AUTORESET_MODES.index(mode)) % len(CELLS)]
    envs = blocking(env_fns, num_workers, shared_memory=shared_memory, autoreset_mode=mode)
    assert_same(played(envs, mode), expected, name)
    for attribute in ("observation_space", "action_space", "single_observation_space", "single_action_space"):
        assert getattr(envs, attribute) == getattr(sync, attribute)
    assert envs.metadata == sync.metadata
    envs.close()
    sync.close()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_infos_seeds_calls_and_attributes(num_workers: int) -> None:
    """As Gymnasium's vector has them."""
    sync = FairSync([partial(InfoEnv, env_index) for env_index in range(NUM_ENVS)])
    envs = blocking([partial(InfoEnv, env_index) for env_index in range(NUM_ENVS)], num_workers)
    assert_same(played(envs, AutoresetMode.NEXT_STEP), played(sync, AutoresetMode.NEXT_STEP), "infos")
    sync.close()
    envs.close()

    sync = FairSync([partial(Recorder, name=str(env_index)) for env_index in range(NUM_ENVS)])
    envs = blocking([partial(Recorder, name=str(env_index)) for env_index in range(NUM_ENVS)], num_workers)
    for vector in (sync, envs):
        vector.reset(seed=5)
        vector.step(np.zeros(NUM_ENVS, np.int64))
        vector.set_attr("name", ["a", "b", "c"])
        vector.set_attr("colour", "red")
    for name in ("told", "name", "colour"):
        assert_same(envs.get_attr(name), sync.get_attr(name), name)
        assert_same(envs.call(name), sync.call(name), name)
    assert envs.np_random_seed == sync.np_random_seed
    assert [generator.random() for generator in envs.np_random] == [generator.random() for generator in sync.np_random]
    assert envs.call("np_random_seed", env_ids=[2]) == (sync.np_random_seed[2],)
    assert envs.get_attr("name", env_ids=[1, 0]) == ("b", "a")
    envs.call_async("name")
    assert envs.call_wait(timeout=60) == ("a", "b", "c")
    sync.close()
    envs.close()


def test_it_is_a_vector_env_of_gymnasium() -> None:
    """By its class, its attributes, and its representation."""
    envs = blocking([lambda: gym.make("CartPole-v1", render_mode="rgb_array")] * 2, 1)
    assert isinstance(envs, VectorEnv)
    assert envs.unwrapped is envs
    assert (envs.num_envs, envs.num_workers, envs.render_mode, envs.closed) == (2, 1, "rgb_array", False)
    assert envs.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP
    assert repr(envs) == "BlockingVectorEnv(num_envs=2)"
    envs.reset(seed=1)
    assert envs.statistics().steps == 0
    envs.close()
    envs.close()
    assert envs.closed


def test_arguments_of_gymnasium() -> None:
    """In its order, those without an effect too; `max_concurrency` is the number of workers."""
    envs = aiovec.BlockingVectorEnv([Counter] * 6, True, True, "fork", True, None, "same", "SameStep", 2)
    assert envs.num_workers == 2
    assert envs.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
    envs.reset()
    envs.close()
    with pytest.raises(TypeError, match="worker: aiovec has one kind of worker"):
        aiovec.BlockingVectorEnv([Counter], worker=print)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="BlockingVectorEnv has no option num_worker; it has .*num_workers"):
        aiovec.BlockingVectorEnv([Counter], num_worker=2)


def test_copy_false_gives_views() -> None:
    """Which hold until the next step; else what is returned never changes."""
    envs = blocking([Counter] * 2, 1, copy=False)
    observations, _ = envs.reset()
    envs.step(envs.action_space.sample())
    assert observations[0, 2] == 1
    envs.close()
    envs = blocking([Counter] * 2, 1)
    observations, _ = envs.reset()
    envs.step(envs.action_space.sample())
    assert observations[0, 2] == 0
    envs.close()


def test_beyond_gymnasium() -> None:
    """Part batches, resets of some, rollouts."""
    envs = blocking([partial(Counter, offset=offset) for offset in range(4)], 2)
    envs.reset()
    envs.send([0, 0, 0], [0, 2, 3])
    batch = envs.recv(min_envs=3)
    assert sorted(batch.env_ids.tolist()) == [0, 2, 3]
    observations, _ = envs.reset(env_ids=[3, 1])
    assert observations[:, 0].tolist() == [3, 1]
    rollout = envs.rollout(lambda observations: np.zeros(len(observations), np.int64), 5)
    assert rollout.observations.shape == (6, 4, 3)
    envs.close()


def test_gymnasiums_own_benchmark() -> None:
    """`gymnasium.utils.performance` takes it."""
    envs = blocking([lambda: gym.make("CartPole-v1")] * 4, 2)
    assert benchmark_vector_step(envs, target_duration=0, seed=1) > 0
    envs.close()


def test_through_gymnasiums_make_vec() -> None:
    """By a registered id: the same vector, its options among the env's arguments, its spec as Gymnasium fills it."""
    env_id = aiovec.register_vec("CartPole-v1")
    assert env_id == aiovec.register_vec("CartPole-v1") == "aiovec/CartPole-v1"
    envs: Any = gym.make_vec(env_id, num_envs=3, num_workers=1, render_mode="rgb_array", autoreset_mode="SameStep")
    assert isinstance(envs, aiovec.BlockingVectorEnv)
    assert envs.spec.id == env_id
    assert repr(envs) == "BlockingVectorEnv(aiovec/CartPole-v1, num_envs=3)"
    assert (envs.num_workers, envs.render_mode) == (1, "rgb_array")
    expected = SyncVectorEnv([lambda: gym.make("CartPole-v1")] * 3, autoreset_mode="SameStep")
    assert_same(envs.reset(seed=2), expected.reset(seed=2), "reset")
    assert [spec.max_episode_steps for spec in envs.call("spec")] == [500] * 3
    envs.close()
    expected.close()
    single = gym.make(env_id)
    assert type(single.unwrapped).__name__ == "CartPoleEnv"
    single.close()
    with pytest.raises(gym.error.NameNotFound):
        aiovec.register_vec("NoSuchEnv-v0")


class Other(Counter):
    """Another class than `Counter`."""


def test_ids_of_vectors_are_as_distinct_as_those_of_envs() -> None:
    """With a namespace and without; and an id that is registered anew is that of the new env."""
    env_ids = ["aiovec_tests/counter-v0", "aiovec_tests-counter-v0", "counter-v0"]
    vector_ids: list[str] = []
    try:
        for env_class in (Counter, Other):
            for env_id, length in zip(env_ids, (1, 2, 3), strict=True):
                gym.registry.pop(env_id, None)
                gym.register(env_id, env_class, disable_env_checker=True, kwargs={"length": length})
            vector_ids = [aiovec.register_vec(env_id) for env_id in env_ids]
            assert len(set(vector_ids)) == 3
            for vector_id, length in zip(vector_ids, (1, 2, 3), strict=True):
                single = gym.make(vector_id)
                assert (type(single.unwrapped), single.unwrapped.length) == (env_class, length)  # type: ignore[attr-defined]
                envs: Any = gym.make_vec(vector_id, num_envs=1, num_workers=0)
                assert envs.get_attr("length") == (length,)
                assert [type(env) for env in envs.get_attr("unwrapped")] == [env_class]
                envs.close()
    finally:
        for env_id in (*env_ids, *vector_ids):
            gym.registry.pop(env_id, None)


def test_every_option_of_the_vector_is_one_in_gymnasiums_make_vec() -> None:
    """Those that only a `BlockingVectorEnv` has, too."""
    env_id = aiovec.register_vec("CartPole-v1")
    envs: Any = gym.make_vec(env_id, num_envs=3, max_concurrency=2, daemon=True, worker=None)
    assert envs.num_workers == 2
    envs.close()


def cleanrl_like(envs: Any, num_iterations: int) -> list[float]:
    """A training loop as CleanRL writes them: storage of its own, `final_info` by `episode`, one update an iteration."""
    envs = gym.wrappers.vector.RecordEpisodeStatistics(envs)
    generator = np.random.default_rng(1)
    weights = np.zeros((4, 2))
    returns: list[float] = []
    observations, _ = envs.reset(seed=1)
    done = np.zeros(envs.num_envs, np.bool_)
    for _ in range(num_iterations):
        stored, acted, rewarded, alive = [], [], [], []
        for _ in range(32):
            logits = observations @ weights
            probabilities = np.exp(logits - logits.max(axis=1, keepdims=True))
            probabilities /= probabilities.sum(axis=1, keepdims=True)
            actions = (generator.random(envs.num_envs) < probabilities[:, 1]).astype(np.int64)
            stored.append(observations)
            acted.append(np.eye(2)[actions] - probabilities)
            alive.append(~done)
            observations, rewards, terminations, truncations, infos = envs.step(actions)
            done = terminations | truncations
            rewarded.append(rewards)
            if "episode" in infos:
                returns += infos["episode"]["r"][infos["_episode"]].tolist()
        to_go = np.cumsum(np.array(rewarded)[::-1], axis=0)[::-1]
        advantage = (to_go - to_go.mean()) * np.array(alive)
        weights += 1e-4 * np.einsum("tni,tnj,tn->ij", np.array(stored), np.array(acted), advantage)
    envs.close()
    return returns


def test_a_training_loop_gives_the_same_numbers() -> None:
    """Written for Gymnasium's vectors, it runs when the import is changed, and learns the very same."""
    env_fns = [lambda: gym.make("CartPole-v1")] * 8
    theirs = cleanrl_like(gym.vector.SyncVectorEnv(env_fns), 20)
    ours = cleanrl_like(aiovec.BlockingVectorEnv(env_fns, num_workers=2), 20)
    assert len(theirs) > 50
    assert ours == theirs
