"""Where cameras see cubes; faults: another picture's coordinates, cubes seen through arms."""

from __future__ import annotations

import numpy as np
import pytest

from pi05_lab.sim.arms import SimulatedAloha
from pi05_lab.sim.rendering import CAMERAS, CameraRenderer
from pi05_lab.sim.starts import random_start
from pi05_lab.sim.tasks import all_tasks
from pi05_lab.sim.views import ABSENT, cube_pixels

WIDTH, HEIGHT = 112, 84


def _coloured(picture: np.ndarray, channel: int) -> np.ndarray:
    """[n, 2] column and row of the pixels where one channel is clearly the strongest."""
    others = np.delete(picture.astype(int), channel, axis=2).max(axis=2)
    return np.argwhere(picture[..., channel] > 40 + 1.5 * others)[:, ::-1] + 0.5


def test_the_pixels_are_those_that_the_picture_shows() -> None:
    """Against the drawn colours, in random situations with grippers before cubes.

    A few cubes at the picture's edge or behind a finger are one thing to a ray and another to the
    eye; nearly all must agree.
    """
    sim = SimulatedAloha()
    renderer = CameraRenderer(sim.model, WIDTH, HEIGHT)
    rng = np.random.default_rng(0)
    tasks = all_tasks(sim.cubes, ("touch", "pick"))
    distances, agree = [], []
    for _ in range(25):
        random_start(sim, tasks[rng.integers(len(tasks))], rng)
        for camera in CAMERAS:
            picture = renderer.render(sim.data, camera)
            for channel, place in enumerate(cube_pixels(sim, camera)):
                found = _coloured(picture, channel)
                visible = len(found) > 3
                agree.append(visible == bool(place[0] >= 0))
                if visible and place[0] >= 0:
                    offset = found.mean(axis=0) - place * [WIDTH, HEIGHT]
                    distances.append(np.hypot(*offset))
    renderer.close()
    assert np.mean(agree) > 0.9 and len(distances) > 80
    assert np.median(distances) < 0.6 and np.quantile(distances, 0.9) < 2.0


def test_what_is_not_in_the_picture_is_absent() -> None:
    sim = SimulatedAloha()
    sim.reset(0)
    assert (cube_pixels(sim, "cam_high") >= 0).all()
    start = int(sim.model.joint("red_cube").qposadr[0])
    sim.data.qpos[start : start + 2] = [2.0, 2.0]
    sim.step()
    red, green, blue = cube_pixels(sim, "cam_high")
    assert (red == ABSENT).all() and (green >= 0).all() and (blue >= 0).all()


def test_a_cube_under_another_is_hidden() -> None:
    sim = SimulatedAloha()
    sim.reset(0)
    start, above = (int(sim.model.joint(f"{c}_cube").qposadr[0]) for c in ("red", "green"))
    eye = np.array([0.0, 0.2, 0.72])
    towards = eye - sim.cube_position("red")
    sim.data.qpos[above : above + 7] = sim.data.qpos[start : start + 7]
    sim.data.qpos[above : above + 3] += 0.12 * towards
    import mujoco

    mujoco.mj_kinematics(sim.model, sim.data)
    red, green, _ = cube_pixels(sim, "cam_high")
    assert (red == ABSENT).all()
    assert (green >= 0).all()


def test_an_unknown_camera_is_named() -> None:
    with pytest.raises(ValueError, match="'cam_low'"):
        cube_pixels(SimulatedAloha(), "cam_low")
