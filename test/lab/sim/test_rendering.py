"""Pins what the cameras see and where they see the cubes, and that rendering leaves physics alone.

Faults: another image's coordinates, cubes seen through arms.
"""

from __future__ import annotations

import sys
import threading

import mujoco
import numpy as np
import pytest

from pi05_lab.sim.arms import HOME_POSITIONS, SimulatedAloha
from pi05_lab.sim.rendering import (
    ABSENT,
    CAMERAS,
    SCENE_CAMERA,
    CameraRenderer,
    RenderingUnavailable,
    cube_pixels,
)
from pi05_lab.sim.starts import random_start
from pi05_lab.sim.tasks import all_tasks


@pytest.fixture(scope="module")
def sim() -> SimulatedAloha:
    return SimulatedAloha()


@pytest.fixture(scope="module")
def renderer(sim: SimulatedAloha) -> CameraRenderer:
    return CameraRenderer(sim.model, width=160, height=120)


def _pixels_of(image: np.ndarray, channel: int, least: int = 60) -> np.ndarray:
    """Rows and columns [n, 2] where one channel is clearly the strongest."""
    others = np.delete(image.astype(int), channel, axis=2).max(axis=2)
    return np.argwhere(image[..., channel].astype(int) > least + 1.5 * others)


@pytest.mark.parametrize("seed", range(4))
def test_the_high_camera_sees_each_cube_where_it_is(
    sim: SimulatedAloha, renderer: CameraRenderer, seed: int
) -> None:
    """A flipped or swapped image would put the cubes in the wrong order."""
    sim.reset(seed)
    image = renderer.render(sim.qpos(), "cam_high")
    assert image.shape == (120, 160, 3) and image.dtype == np.uint8
    centers = {}
    for channel, name in enumerate(("red", "green", "blue")):
        pixels = _pixels_of(image, channel)
        assert len(pixels) > 20, f"the {name} cube is not in the image"
        centers[name] = pixels.mean(axis=0)
    for a in sim.cubes:
        for b in sim.cubes:
            dx, dy = (sim.cube_position(a) - sim.cube_position(b))[:2]
            if dx > 0.03:
                assert centers[a][1] > centers[b][1], "x runs to the right"
            if dy > 0.05:
                assert centers[a][0] < centers[b][0], "y runs upwards"


@pytest.mark.parametrize(("camera", "moved"), [("cam_left_wrist", 0), ("cam_right_wrist", 7)])
def test_a_wrist_camera_moves_with_its_own_arm(
    sim: SimulatedAloha, renderer: CameraRenderer, camera: str, moved: int
) -> None:
    sim.reset(0)
    before = renderer.render(sim.qpos(), camera).astype(int)
    qpos = sim.qpos()
    qpos[sim.model.joint("left_waist" if moved == 0 else "right_waist").qposadr[0]] += 0.3
    after = renderer.render(qpos, camera).astype(int)
    other = renderer.render(qpos, next(c for c in CAMERAS[1:] if c != camera)).astype(int)
    same = renderer.render(sim.qpos(), next(c for c in CAMERAS[1:] if c != camera)).astype(int)
    assert np.abs(after - before).mean() > 5
    assert np.abs(other - same).mean() < np.abs(after - before).mean()


def test_a_wrist_camera_sees_what_its_gripper_is_about_to_take(
    sim: SimulatedAloha, renderer: CameraRenderer
) -> None:
    """gym-aloha's own wrist cameras see only the gripper."""
    sim.reset(0)
    qpos = sim.qpos()
    tool = sim.tool_position("left")
    start = sim.model.joint("red_cube").qposadr[0]
    qpos[start : start + 3] = tool + np.array([0.08, 0.0, 0.0])
    image = renderer.render(qpos, "cam_left_wrist")
    pixels = _pixels_of(image, 0)
    assert len(pixels) > 100
    assert abs(pixels[:, 1].mean() - 80) < 8, "the gripper's axis is the image's middle"


def test_the_scene_camera_shows_both_arms_and_the_cubes(sim: SimulatedAloha) -> None:
    sim.reset(1)
    with CameraRenderer(sim.model, 320, 180, quality="pretty") as renderer:
        image = renderer.render(sim.qpos(), SCENE_CAMERA)
    assert all(len(_pixels_of(image, channel)) > 20 for channel in range(3))
    dark = np.argwhere(image.max(axis=2) < 60)[:, 1]
    assert (dark < 130).sum() > 300 and (dark > 190).sum() > 300


def test_shadows_are_for_people_only(sim: SimulatedAloha, renderer: CameraRenderer) -> None:
    sim.reset(1)
    with CameraRenderer(sim.model, 160, 120, quality="pretty") as pretty:
        shaded = pretty.render(sim.qpos(), "cam_high")
    plain = renderer.render(sim.qpos(), "cam_high")
    assert shaded.astype(int).sum() < plain.astype(int).sum()


def test_an_image_is_its_own_array(sim: SimulatedAloha, renderer: CameraRenderer) -> None:
    """A reused buffer would change an image that waits in a queue."""
    sim.reset(0)
    first = renderer.render(sim.data, "cam_high")
    kept = first.copy()
    second = renderer.render(sim.data, "cam_left_wrist")
    assert not np.shares_memory(first, second)
    np.testing.assert_array_equal(first, kept)


def test_drawing_does_not_touch_the_simulation(
    sim: SimulatedAloha, renderer: CameraRenderer
) -> None:
    sim.reset(0)
    elsewhere = sim.qpos()
    elsewhere[0] += 0.5
    tool = sim.tool_position("left")
    renderer.render(elsewhere, "cam_high")
    np.testing.assert_array_equal(sim.tool_position("left"), tool)
    assert sim.model.vis.quality.offsamples == SimulatedAloha(cubes=()).model.vis.quality.offsamples


def test_renders_in_a_thread_while_physics_steps() -> None:
    """Images come from the copied configuration, and physics comes out as without a camera."""
    sim, reference = SimulatedAloha(), SimulatedAloha()
    sim.reset(0)
    reference.reset(0)
    start = sim.qpos()
    images: list[np.ndarray] = []
    rendering = threading.Event()

    def render() -> None:
        with CameraRenderer(sim.model, 160, 120) as renderer:
            for _ in range(12):
                images.append(renderer.render(start, "cam_high"))
                rendering.set()

    thread = threading.Thread(target=render)
    thread.start()
    assert rendering.wait(timeout=30)
    targets = HOME_POSITIONS + 0.2
    sim.set_targets(targets)
    reference.set_targets(targets)
    for _ in range(100):
        sim.step()
    thread.join(timeout=30)
    reference.step(100)
    assert len(images) == 12
    assert all((image == images[0]).all() for image in images)
    np.testing.assert_array_equal(sim.qpos(), reference.qpos())


def test_another_thread_is_rejected(sim: SimulatedAloha, renderer: CameraRenderer) -> None:
    """OpenGL would draw nothing, or crash."""
    caught: list[BaseException] = []

    def render() -> None:
        try:
            renderer.render(sim.data, "cam_high")
        except RuntimeError as error:
            caught.append(error)

    thread = threading.Thread(target=render)
    thread.start()
    thread.join()
    assert "thread that made it" in str(caught[0])


def test_wrong_requests_are_named(sim: SimulatedAloha, renderer: CameraRenderer) -> None:
    with pytest.raises(ValueError, match="cam_low"):
        renderer.render(sim.data, "cam_low")
    with pytest.raises(ValueError, match="'cam_low'"):
        cube_pixels(sim, "cam_low")
    with pytest.raises(ValueError, match="qpos"):
        renderer.render(np.zeros(3), "cam_high")
    with pytest.raises(ValueError, match="0×10"):
        CameraRenderer(sim.model, width=0, height=10)
    with pytest.raises(ValueError, match="ugly"):
        CameraRenderer(sim.model, quality="ugly")  # type: ignore[arg-type]


def test_a_closed_renderer_is_rejected(sim: SimulatedAloha) -> None:
    renderer = CameraRenderer(sim.model, 32, 24)
    renderer.close()
    renderer.close()
    with pytest.raises(RuntimeError, match="closed"):
        renderer.render(sim.data, "cam_high")


@pytest.mark.parametrize("backend", ["egl", "osmesa"])
def test_missing_opengl_names_the_packages(
    sim: SimulatedAloha, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    monkeypatch.setenv("MUJOCO_GL", backend)
    monkeypatch.setitem(sys.modules, f"mujoco.{backend}", None)
    with pytest.raises(RenderingUnavailable, match="apt-get install -y libegl1"):
        CameraRenderer(sim.model)


def test_the_pixels_are_those_that_the_image_shows() -> None:
    """Against the drawn colours, in random situations with grippers before cubes.

    A few cubes at the image's edge or behind a finger are one thing to a ray and another to the
    eye; nearly all must agree.
    """
    sim = SimulatedAloha()
    renderer = CameraRenderer(sim.model, 112, 84)
    rng = np.random.default_rng(0)
    tasks = all_tasks(sim.cubes, ("touch", "pick"))
    distances, agree = [], []
    for _ in range(25):
        random_start(sim, tasks[rng.integers(len(tasks))], rng)
        for camera in CAMERAS:
            image = renderer.render(sim.data, camera)
            for channel, place in enumerate(cube_pixels(sim, camera)):
                found = _pixels_of(image, channel, 40)[:, ::-1] + 0.5
                visible = len(found) > 3
                agree.append(visible == bool(place[0] >= 0))
                if visible and place[0] >= 0:
                    offset = found.mean(axis=0) - place * [112, 84]
                    distances.append(np.hypot(*offset))
    renderer.close()
    assert np.mean(agree) > 0.9 and len(distances) > 80
    assert np.median(distances) < 0.6 and np.quantile(distances, 0.9) < 2.0


def test_a_cube_outside_the_image_is_absent() -> None:
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
    mujoco.mj_kinematics(sim.model, sim.data)
    red, green, _ = cube_pixels(sim, "cam_high")
    assert (red == ABSENT).all()
    assert (green >= 0).all()
