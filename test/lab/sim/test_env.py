"""The gymnasium environment; faults: not LeRobot's format, a seed without effect."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from pi05_lab.sim import env as env_module
from pi05_lab.sim.env import ENV_ID, AlohaCubes
from pi05_lab.sim.experts import Expert, grippers_to_unit
from pi05_lab.sim.rendering import CAMERAS
from pi05_lab.sim.tasks import parse


@pytest.fixture
def env() -> Iterator[AlohaCubes]:
    made = AlohaCubes(tasks=("touch",))
    yield made
    made.close()


@pytest.mark.slow
def test_gymnasiums_own_checks() -> None:
    made = gymnasium.make(ENV_ID, tasks=("touch", "wave"), size_px=(32, 24))
    with warnings.catch_warnings():
        # joints are in rad, not between -1 and 1
        warnings.simplefilter("ignore")
        check_env(made.unwrapped)
    made.close()


def test_observations_have_lerobots_keys(env: AlohaCubes) -> None:
    """What LeRobot's `preprocess_observation` and `rollout` read."""
    observation, info = env.reset(seed=1)
    assert set(observation["pixels"]) == set(CAMERAS)
    for image in observation["pixels"].values():
        assert image.shape == (84, 112, 3) and image.dtype == np.uint8 and image.std() > 5
    assert observation["agent_pos"].shape == (14,)
    assert env.observation_space.contains(observation)
    assert info == {"is_success": False, "task": env.task}
    task = parse(env.task_description)
    assert task is not None and env.task == f"touch {task.side} {task.color}"
    assert env._max_episode_steps == 500 and env.metadata["render_fps"] == 50
    assert env.render().shape == (240, 320, 3)


def test_a_seed_gives_the_same_episode(env: AlohaCubes) -> None:
    first, _ = env.reset(seed=3)
    text = env.task_description
    env.reset(seed=4)
    again, _ = env.reset(seed=3)
    assert env.task_description == text
    for name in CAMERAS:
        np.testing.assert_array_equal(first["pixels"][name], again["pixels"][name])


def test_the_expert_succeeds(env: AlohaCubes) -> None:
    """In an action's units, at an action's rate."""
    env.reset(seed=5)
    expert, total = Expert(env._sim), 0.0
    for _ in range(20):
        for action in grippers_to_unit(expert.plan(env._task))[:10]:
            assert env.action_space.shape == action.shape
            _, reward, done, truncated, info = env.step(action.astype(np.float32))
            total += reward
            if done:
                assert info["is_success"] and not truncated and total == 1.0
                return
    pytest.fail("the expert did not touch the cube in 4 s")


def test_an_episode_ends_after_its_steps() -> None:
    env = AlohaCubes(tasks=("touch",), max_episode_steps=2, size_px=(32, 24), cameras=CAMERAS[:1])
    observation, _ = env.reset(seed=0)
    still = observation["agent_pos"]
    assert env.step(still)[2:4] == (False, False)
    assert env.step(still)[2:4] == (False, True)
    with pytest.raises(ValueError, match="14 finite numbers"):
        env.step(np.full(14, np.nan))
    env.close()


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match=r"tasks: 'dance' is none of touch, pick"):
        AlohaCubes(tasks=("dance",))
    with pytest.raises(ValueError, match=r"cameras: 'top' is none of cam_high"):
        AlohaCubes(cameras=("top",))
    assert env_module.FPS == 50
