"""Episodes of the scripted experts in the simulator, frame by frame."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from pi05_lab.data import images as pictures
from pi05_lab.data import lerobot_format as layout
from pi05_lab.data.lerobot_format import DatasetError, Extra, Features
from pi05_ros.types import FloatArray, ImageArray

if TYPE_CHECKING:
    from pi05_lab.sim.tasks import Task

CONTROL_HZ = 50
HORIZON = 50
CUBES_KEY = "scene.cube_positions"
"""[3 × cubes] x, y, z of each cube's centre, m. Not under `observation`, where LeRobot's policies
would take it for something that a robot measures."""
PIXELS_KEY = "scene.cube_pixels"
"""[cameras × cubes × 2] column and row of what each camera sees of each cube, from 0 to 1 over the
picture; -1 where it sees none."""
PICTURE_KEY = "picture_index"
"""Frames with the same number have the same pictures."""

REPLAN_TICKS = 8
LIMIT_S = 10.0
HOLD_S = 0.5
"""Recorded after a task is done, so that a policy learns to stay."""
TRIES = 20

_ACTED_MOMENTS = 14
"""Of a visit with an actor: enough to come near a cube and to try again."""
_DISTURBED = 0.4
_ARM_NOISE_RAD = 0.05
_GRIPPER_NOISE = 0.15
"""Of a gripper's whole way."""
_NOISE_TICKS = 8
_NEAR_M = 0.08


@dataclass(frozen=True)
class RecordConfig:
    """What is recorded. The same recipe and episode number give the same episode.

    Args:
        verbs: what is done, names of `sim.tasks.VERBS`.
        weights: how often each is, relative to the others.
        seed: of everything that is random.
        fps: frames per second; a divisor of 50.
        size_px: width and height of the pictures; 4:3 as the simulated robot publishes, so that the
            policy pads what it trains on as it pads what it gets.
        chunks: label every frame with the expert's next `HORIZON` steps.
        visits: record a few moments of many random situations instead of whole episodes.
        instructions: labels of each picture of a visit, for different instructions.
        encode: give pictures as PNG, else as arrays.
    """

    verbs: tuple[str, ...] = ("touch", "pick", "place", "wave", "home")
    weights: tuple[float, ...] = ()
    seed: int = 0
    fps: int = CONTROL_HZ
    size_px: tuple[int, int] = (112, 84)
    chunks: bool = False
    visits: bool = False
    instructions: int = 4
    encode: bool = True

    def __post_init__(self) -> None:
        from pi05_lab.sim.tasks import VERBS

        unknown = [verb for verb in self.verbs if verb not in VERBS]
        if unknown or not self.verbs or len(set(self.verbs)) != len(self.verbs):
            raise DatasetError(f"tasks must be different ones of {VERBS}, got {self.verbs}")
        if self.weights and (len(self.weights) != len(self.verbs) or min(self.weights) <= 0):
            raise DatasetError(f"every task needs a weight above 0, got {self.weights}")
        if self.fps < 1 or CONTROL_HZ % self.fps:
            raise DatasetError(f"fps must divide {CONTROL_HZ}, got {self.fps}")
        if self.visits and self.instructions < 1:
            raise DatasetError(f"a picture needs an instruction, got {self.instructions}")

    @property
    def labelled(self) -> bool:
        """Whether frames have `action_chunk`: moments have no frames that would follow."""
        return self.chunks or self.visits


@dataclass(frozen=True)
class Frame:
    """What `DatasetWriter.add_frame` takes, and the joints' velocities.

    State and action are in the policy's units: rad, grippers from 0 (closed) to 1 (open).
    """

    images: dict[str, ImageArray | bytes] | None
    state: FloatArray
    action: FloatArray
    task: str
    velocities: FloatArray
    """[14] rad/s and m/s."""
    extra: dict[str, Any] = field(default_factory=dict)


def features(recipe: RecordConfig, use_video: bool = False) -> Features:
    """The features of a dataset of this recipe."""
    from pi05_lab.sim.arms import JOINT_NAMES, SimulatedAloha
    from pi05_lab.sim.rendering import CAMERAS

    cubes = SimulatedAloha().cubes
    axes = [f"{cube}_{axis}" for cube in cubes for axis in "xyz"]
    pixels = [f"{camera}_{cube}_{axis}" for camera in CAMERAS for cube in cubes for axis in "uv"]
    extras = {
        CUBES_KEY: Extra((len(axes),), names=axes),
        PIXELS_KEY: Extra((len(pixels),), names=pixels),
    }
    if recipe.labelled:
        extras[layout.CHUNK_KEY] = Extra((HORIZON, len(JOINT_NAMES)))
    if recipe.visits:
        extras[PICTURE_KEY] = Extra((1,), "int64")
    width, height = recipe.size_px
    return Features(
        dict.fromkeys(CAMERAS, (height, width)), JOINT_NAMES, JOINT_NAMES, extras, use_video
    )


class GripperUnits:
    """Between the simulator's joints (grippers in m) and the policy's (grippers from 0 to 1)."""

    def __init__(self) -> None:
        from pi05_lab.sim.scene import GRIPPER_CLOSED_M, GRIPPER_OPEN_M, JOINT_NAMES

        self.gripper = np.array([name.endswith("gripper") for name in JOINT_NAMES])
        """[14] which joints are grippers."""
        self._offset = np.where(self.gripper, GRIPPER_CLOSED_M, 0.0)
        self._scale = np.where(self.gripper, GRIPPER_OPEN_M - GRIPPER_CLOSED_M, 1.0)

    def to_policy(self, positions: FloatArray) -> FloatArray:
        """[..., 14] the simulator's → the policy's."""
        return (positions - self._offset) / self._scale

    def to_joints(self, units: FloatArray) -> FloatArray:
        """[..., 14] the policy's → the simulator's."""
        return units * self._scale + self._offset


Actor = Callable[[Mapping[str, ImageArray], FloatArray, str], FloatArray]
"""Pictures, state [14] and instruction → actions [horizon, 14], in the policy's units."""


class SimulatedRecorder:
    """Plays episodes of a recipe; belongs to the thread that made it.

    Args:
        recipe: what is played.
        actor: moves the arms in visits instead of the expert, which still labels every moment: the
            states are then those that a policy gets itself into (DAgger, Ross et al. 2011).

    Raises:
        RenderingUnavailable: no OpenGL on this machine.
    """

    def __init__(self, recipe: RecordConfig, actor: Actor | None = None) -> None:
        # Mesa's threads would fight for the cores that other recorders use
        os.environ.setdefault("LP_NUM_THREADS", "1")
        from pi05_lab.sim.arms import SimulatedAloha
        from pi05_lab.sim.experts import DT_S, Expert
        from pi05_lab.sim.rendering import CAMERAS, CameraRenderer
        from pi05_lab.sim.views import cube_pixels

        self.recipe = recipe
        self._actor = actor
        self._cameras = CAMERAS
        self._cube_pixels = cube_pixels
        self._sim = SimulatedAloha()
        self._expert = Expert(self._sim)
        self._renderer = CameraRenderer(self._sim.model, *recipe.size_px)
        self._units = GripperUnits()
        self._stride = CONTROL_HZ // recipe.fps
        self._physics_steps = round(DT_S / self._sim.model.opt.timestep)

    def close(self) -> None:
        self._renderer.close()

    def episode(self, number: int) -> list[Frame]:
        """The frames of one episode, or of one visit.

        Raises:
            DatasetError: the expert did not do what it was asked in `TRIES` tries.
        """
        for attempt in range(TRIES):
            rng = np.random.default_rng([self.recipe.seed, number, attempt])
            frames = self._visit(rng) if self.recipe.visits else self._demonstration(rng)
            if frames is not None:
                return frames
        raise DatasetError(f"the expert failed {TRIES} times at episode {number}")

    def _demonstration(self, rng: np.random.Generator) -> list[Frame] | None:
        """One task until it is done; None if it is not. All but "home" begin at home."""
        from pi05_lab.sim.judge import Judge
        from pi05_lab.sim.starts import random_start, reset_for
        from pi05_lab.sim.tasks import instruction

        task = self._draw(rng)
        start = random_start if task.verb == "home" else reset_for
        start(self._sim, task, rng)
        text = instruction(task, rng)
        judge = Judge(task, self._sim)
        frames: list[Frame] = []
        for tick in range(round(LIMIT_S * CONTROL_HZ)):
            if tick % REPLAN_TICKS == 0:
                plan = self._expert.plan(task)
            target = plan[tick % REPLAN_TICKS]
            if tick % self._stride == 0:
                label = self._label(task) if self.recipe.chunks else None
                frames.append(self._frame(self._pictures(), target, text, label))
            self._step(target)
            judge.update()
            if judge.wrong:
                return None
            if judge.done_at_s is not None and (tick + 1) / CONTROL_HZ > judge.done_at_s + HOLD_S:
                return frames
        return None

    def _visit(self, rng: np.random.Generator) -> list[Frame]:
        """A few moments of a task, each with what would be done for other instructions, too."""
        from pi05_lab.sim.starts import random_start, reset_for
        from pi05_lab.sim.tasks import instruction

        task = self._draw(rng)
        from_home = task.verb != "home" and rng.random() < 0.3
        (reset_for if from_home else random_start)(self._sim, task, rng)
        frames: list[Frame] = []
        for _ in range(self._moments(from_home, rng)):
            drawn = self._draw_pictures()
            images: dict[str, ImageArray | bytes] | None = self._stored(drawn)
            plan = self._expert.plan(task, HORIZON * self._stride)
            text = instruction(task, rng)
            for asked in [task, *self._others(task, rng)]:
                mine = asked is task
                steps = plan if mine else self._expert.plan(asked, len(plan))
                told = text if mine else instruction(asked, rng)
                label = steps[:: self._stride]
                frames.append(self._frame(images, steps[0], told, label))
                images = None
            if self._actor is None:
                course = self._disturbed(plan, rng)
            else:
                state = self._units.to_policy(self._sim.positions())
                course = self._units.to_joints(self._actor(drawn, state, text))
                course = course.repeat(self._stride, axis=0)
            for target in course[: self._ticks_until_next(task, rng)]:
                self._step(target)
        return frames

    def _moments(self, from_home: bool, rng: np.random.Generator) -> int:
        if self._actor is not None:
            return _ACTED_MOMENTS
        return int(rng.integers(5, 9) if from_home else rng.integers(3, 6))

    def _ticks_until_next(self, task: Task, rng: np.random.Generator) -> int:
        if task.side is not None and task.color is not None:
            offset = self._sim.tool_position(task.side) - self._sim.cube_position(task.color)
            if np.linalg.norm(offset) < _NEAR_M:
                return int(rng.integers(6, 16))
        return int(rng.integers(12, 30))

    def _disturbed(self, plan: FloatArray, rng: np.random.Generator) -> FloatArray:
        """The plan, at times with the arms led astray."""
        if rng.random() >= _DISTURBED:
            return plan
        noise = rng.normal(0.0, np.where(self._units.gripper, _GRIPPER_NOISE, _ARM_NOISE_RAD))
        growth = np.minimum(1.0, np.arange(len(plan)) / _NOISE_TICKS)
        led_astray = self._units.to_policy(plan) + growth[:, None] * noise
        return self._units.to_joints(led_astray)

    def _others(self, task: Task, rng: np.random.Generator) -> Iterator[Task]:
        """Other tasks for the same pictures; the first differs by arm or colour alone."""
        from pi05_lab.sim.tasks import all_tasks

        seen = {task}
        for k in range(self.recipe.instructions - 1):
            verb = task.verb if k == 0 else self._draw_verb(rng)
            tasks = [t for t in all_tasks(self._sim.cubes, (verb,)) if t not in seen]
            if not tasks:
                every = all_tasks(self._sim.cubes, self.recipe.verbs)
                tasks = [t for t in every if t not in seen] or [task]
            chosen = tasks[rng.integers(len(tasks))]
            seen.add(chosen)
            yield chosen

    def _draw_verb(self, rng: np.random.Generator) -> str:
        weights = np.array(self.recipe.weights or np.ones(len(self.recipe.verbs)))
        return self.recipe.verbs[rng.choice(len(weights), p=weights / weights.sum())]

    def _draw(self, rng: np.random.Generator) -> Task:
        from pi05_lab.sim.tasks import all_tasks

        tasks = all_tasks(self._sim.cubes, (self._draw_verb(rng),))
        return tasks[rng.integers(len(tasks))]

    def _label(self, task: Task) -> FloatArray:
        return self._expert.plan(task, HORIZON * self._stride)[:: self._stride]

    def _pictures(self) -> dict[str, ImageArray | bytes]:
        return self._stored(self._draw_pictures())

    def _draw_pictures(self) -> dict[str, ImageArray]:
        return {camera: self._renderer.render(self._sim.data, camera) for camera in self._cameras}

    def _stored(self, drawn: dict[str, ImageArray]) -> dict[str, ImageArray | bytes]:
        if not self.recipe.encode:
            return dict(drawn)
        return {camera: pictures.encode(picture) for camera, picture in drawn.items()}

    def _frame(
        self,
        images: dict[str, ImageArray | bytes] | None,
        target: FloatArray,
        text: str,
        label: FloatArray | None,
    ) -> Frame:
        cubes = np.concatenate([self._sim.cube_position(cube) for cube in self._sim.cubes])
        aspect = self.recipe.size_px[0] / self.recipe.size_px[1]
        pixels = [self._cube_pixels(self._sim, camera, aspect).ravel() for camera in self._cameras]
        extra: dict[str, Any] = {CUBES_KEY: cubes, PIXELS_KEY: np.concatenate(pixels)}
        if label is not None:
            extra[layout.CHUNK_KEY] = self._units.to_policy(label).astype(np.float32)
        return Frame(
            images=images,
            state=self._units.to_policy(self._sim.positions()),
            action=self._units.to_policy(target),
            task=text,
            velocities=self._sim.velocities(),
            extra=extra,
        )

    def _step(self, target: FloatArray) -> None:
        self._sim.set_targets(target)
        self._sim.step(self._physics_steps)
