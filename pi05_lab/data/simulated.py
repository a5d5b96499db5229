"""Records the scripted experts' episodes in the simulator, frame by frame."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np

from pi05_lab.data.images import encode as encode_png
from pi05_lab.data.lerobot_format import (
    CHUNK_KEY,
    CUBES_KEY,
    PICTURE_KEY,
    PIXELS_KEY,
    DatasetError,
    Extra,
    Features,
)
from pi05_lab.parallel import run_tasks
from pi05_lab.sim.arms import SimulatedAloha
from pi05_lab.sim.experts import GRIPPERS, HORIZON, Expert, grippers_to_metres, grippers_to_unit
from pi05_lab.sim.judge import Judge
from pi05_lab.sim.motion import DT_S
from pi05_lab.sim.rendering import CAMERAS, CameraRenderer, cube_pixels
from pi05_lab.sim.scene import JOINT_NAMES
from pi05_lab.sim.starts import random_start, reset_for
from pi05_lab.sim.tasks import VERBS, Task, all_tasks, instruction
from pi05_ros.types import ActionChunk, FloatArray, ImageArray, Observation

CONTROL_HZ = 50
REPLAN_TICKS = 8
LIMIT_S = 10.0
HOLD_S = 0.5
"""Recorded after a task is done, so that a policy learns to hold its position."""
TRIES = 20

_ROLLOUT_SAMPLES = 14
"""In a policy's episode: enough to approach a cube and to try again."""
_DISTURBED = 0.4
"""Probability of a disturbance between two samples."""
_ARM_NOISE_RAD = 0.05
_GRIPPER_NOISE = 0.15
"""Of a gripper's whole range."""
_NOISE_TICKS = 8
_NEAR_M = 0.08


@dataclass(frozen=True)
class RecordConfig:
    """What is recorded. The same configuration and episode number give the same episode.

    Args:
        verbs: what is done, names of `sim.tasks.VERBS`.
        weights: how often each is done, relative to the others; () for equally often.
        seed: of all random choices.
        fps: frames per second; a divisor of 50.
        size_px: width and height of the images; 4:3 as the simulated robot publishes, so that the
            policy pads images in training as it does on the robot.
        chunks: label every frame with the expert's next `HORIZON` steps.
        states: record a few samples of many random situations instead of whole episodes.
        instructions: with `states`, how many instructions each image is labelled for.
        encode: return images as PNG, else as arrays.
    """

    verbs: tuple[str, ...] = VERBS
    weights: tuple[float, ...] = ()
    seed: int = 0
    fps: int = CONTROL_HZ
    size_px: tuple[int, int] = (112, 84)
    chunks: bool = False
    states: bool = False
    instructions: int = 4
    encode: bool = True

    def __post_init__(self) -> None:
        if not self.verbs or len({*self.verbs} & {*VERBS}) != len(self.verbs):
            raise DatasetError(f"tasks must be different ones of {VERBS}, got {self.verbs}")
        if self.weights and (len(self.weights) != len(self.verbs) or min(self.weights) <= 0):
            raise DatasetError(f"every task needs a weight above 0, got {self.weights}")
        if self.fps < 1 or CONTROL_HZ % self.fps:
            raise DatasetError(f"fps must divide {CONTROL_HZ}, got {self.fps}")
        if self.states and self.instructions < 1:
            raise DatasetError(f"an image needs an instruction, got {self.instructions}")


@dataclass(frozen=True)
class Frame:
    """The arguments of `DatasetWriter.add_frame`, and the joints' velocities.

    State and action are in the policy's units: rad, grippers from 0 (closed) to 1 (open).
    """

    images: dict[str, ImageArray | bytes] | None
    state: FloatArray
    action: FloatArray
    task: str
    velocities: FloatArray
    """[14] rad/s and m/s."""
    extra: dict[str, Any]


def features(config: RecordConfig, use_video: bool = False) -> Features:
    """The features of a data set of these frames."""
    cubes = SimulatedAloha().cubes
    axes = [f"{cube}_{axis}" for cube in cubes for axis in "xyz"]
    pixels = [f"{camera}_{cube}_{axis}" for camera in CAMERAS for cube in cubes for axis in "uv"]
    extras = {
        CUBES_KEY: Extra((len(axes),), names=axes),
        PIXELS_KEY: Extra((len(pixels),), names=pixels),
    }
    if config.chunks or config.states:
        extras[CHUNK_KEY] = Extra((HORIZON, len(JOINT_NAMES)))
    if config.states:
        extras[PICTURE_KEY] = Extra((1,), "int64")
    width, height = config.size_px
    cameras = dict.fromkeys(CAMERAS, (height, width))
    return Features(cameras, JOINT_NAMES, JOINT_NAMES, extras, use_video)


class RolloutPolicy(Protocol):
    """A policy that moves the arms while the expert labels the states it reaches."""

    def restart(self, seed: int) -> None:
        """Start an episode, whose noise follows from the seed."""

    def infer(self, observation: Observation) -> ActionChunk: ...


MakePolicy = Callable[[], RolloutPolicy]


def episodes(
    config: RecordConfig, count: int, workers: int = 1, make_policy: MakePolicy | None = None
) -> Iterator[list[Frame]]:
    """Episodes 0 … count - 1, independent of the number of workers.

    DatasetError if the expert keeps failing, WorkerDied if a worker process was killed.
    """
    yield from run_tasks(partial(SimulatedRecorder, config, make_policy), range(count), workers)


class SimulatedRecorder:
    """Simulates one episode per call; used only in the thread that made it.

    A policy of `make_policy` moves the arms instead of the expert, which labels the states that the
    policy reaches (DAgger, Ross et al. 2011); this requires `config.states`.
    """

    def __init__(self, config: RecordConfig, make_policy: MakePolicy | None = None) -> None:
        # One Mesa thread per recorder: several recorders share the cores.
        os.environ.setdefault("LP_NUM_THREADS", "1")
        self.config = config
        self._policy = make_policy() if make_policy else None
        self._sim = SimulatedAloha()
        self._expert = Expert(self._sim)
        self._renderer = CameraRenderer(self._sim.model, *config.size_px)
        self._stride = CONTROL_HZ // config.fps
        self._physics_steps = round(DT_S / self._sim.model.opt.timestep)

    def close(self) -> None:
        self._renderer.close()

    def __call__(self, number: int) -> list[Frame]:
        """The frames of episode `number`; DatasetError if the expert failed `TRIES` times."""
        if self._policy is not None:
            (seed,) = np.random.SeedSequence([self.config.seed, number]).generate_state(1)
            self._policy.restart(int(seed))
        for attempt in range(TRIES):
            rng = np.random.default_rng([self.config.seed, number, attempt])
            frames = self._sample_states(rng) if self.config.states else self._demonstration(rng)
            if frames is not None:
                return frames
        raise DatasetError(f"the expert failed {TRIES} times at episode {number}")

    def _demonstration(self, rng: np.random.Generator) -> list[Frame] | None:
        """One task until it is done, from home unless it is "home"; None if the expert fails."""
        task = self._draw_task(rng)
        (random_start if task.verb == "home" else reset_for)(self._sim, task, rng)
        text = instruction(task, rng)
        judge = Judge(task, self._sim)
        frames: list[Frame] = []
        for tick in range(round(LIMIT_S * CONTROL_HZ)):
            if tick % REPLAN_TICKS == 0:
                plan = self._expert.plan(task)
            target = plan[tick % REPLAN_TICKS]
            if tick % self._stride == 0:
                label = self._label(task) if self.config.chunks else None
                frames.append(self._frame(self._render(), target, text, label))
            self._step(target)
            judge.update()
            if judge.wrong:
                return None
            if judge.done_at_s is not None and (tick + 1) / CONTROL_HZ > judge.done_at_s + HOLD_S:
                return frames
        return None

    def _sample_states(self, rng: np.random.Generator) -> list[Frame]:
        """A few samples of a task, each labelled for other instructions, too."""
        task = self._draw_task(rng)
        from_home = task.verb != "home" and rng.random() < 0.3
        (reset_for if from_home else random_start)(self._sim, task, rng)
        samples = _ROLLOUT_SAMPLES
        if self._policy is None:
            samples = int(rng.integers(5, 9) if from_home else rng.integers(3, 6))
        frames: list[Frame] = []
        for _ in range(samples):
            rendered = self._render()
            plan = self._expert.plan(task, HORIZON * self._stride)
            text = instruction(task, rng)
            frames.append(self._frame(rendered, plan[0], text, plan[:: self._stride]))
            for other in self._other_tasks(task, rng):
                label = self._label(other)
                frames.append(self._frame(None, label[0], instruction(other, rng), label))
            if self._policy is None:
                targets = self._disturbed(plan, rng)
            else:
                state = grippers_to_unit(self._sim.positions())
                actions = self._policy.infer(Observation(rendered, state, text, 0.0)).actions
                targets = grippers_to_metres(actions).repeat(self._stride, axis=0)
            near = False
            if task.side is not None and task.color is not None:
                offset = self._sim.tool_position(task.side) - self._sim.cube_position(task.color)
                near = bool(np.linalg.norm(offset) < _NEAR_M)
            ticks = int(rng.integers(6, 16) if near else rng.integers(12, 30))
            for target in targets[:ticks]:
                self._step(target)
        return frames

    def _disturbed(self, plan: FloatArray, rng: np.random.Generator) -> FloatArray:
        """The plan, sometimes with a growing constant error."""
        if rng.random() >= _DISTURBED:
            return plan
        spread = np.full(len(JOINT_NAMES), _ARM_NOISE_RAD)
        spread[GRIPPERS] = _GRIPPER_NOISE
        growth = np.minimum(1.0, np.arange(len(plan)) / _NOISE_TICKS)
        noise = growth[:, None] * rng.normal(0.0, spread)
        return grippers_to_metres(grippers_to_unit(plan) + noise)

    def _other_tasks(self, task: Task, rng: np.random.Generator) -> list[Task]:
        """Other tasks for the same images; the first has the same verb if possible."""
        chosen = [task]
        for k in range(self.config.instructions - 1):
            verbs = (task.verb if k == 0 else self._draw_verb(rng),)
            every = [all_tasks(self._sim.cubes, each) for each in (verbs, self.config.verbs)]
            new = [[other for other in tasks if other not in chosen] for tasks in every]
            tasks = new[0] or new[1] or [task]
            chosen.append(tasks[rng.integers(len(tasks))])
        return chosen[1:]

    def _draw_verb(self, rng: np.random.Generator) -> str:
        weights = np.array(self.config.weights or np.ones(len(self.config.verbs)))
        return self.config.verbs[rng.choice(len(weights), p=weights / weights.sum())]

    def _draw_task(self, rng: np.random.Generator) -> Task:
        tasks = all_tasks(self._sim.cubes, (self._draw_verb(rng),))
        return tasks[rng.integers(len(tasks))]

    def _label(self, task: Task) -> FloatArray:
        """[HORIZON, 14] the expert's next steps at the data's rate."""
        return self._expert.plan(task, HORIZON * self._stride)[:: self._stride]

    def _render(self) -> dict[str, ImageArray]:
        return {camera: self._renderer.render(self._sim.data, camera) for camera in CAMERAS}

    def _frame(
        self,
        rendered: Mapping[str, ImageArray] | None,
        target: FloatArray,
        text: str,
        label: FloatArray | None,
    ) -> Frame:
        sim, (width, height) = self._sim, self.config.size_px
        pixels = [cube_pixels(sim, camera, width / height).ravel() for camera in CAMERAS]
        extra: dict[str, Any] = {
            CUBES_KEY: np.concatenate([sim.cube_position(cube) for cube in sim.cubes]),
            PIXELS_KEY: np.concatenate(pixels),
        }
        if label is not None:
            extra[CHUNK_KEY] = grippers_to_unit(label).astype(np.float32)
        images: dict[str, ImageArray | bytes] | None = None
        if rendered is not None:
            encode: Any = encode_png if self.config.encode else np.asarray
            images = {camera: encode(image) for camera, image in rendered.items()}
        state, action = grippers_to_unit(sim.positions()), grippers_to_unit(target)
        return Frame(images, state, action, text, sim.velocities(), extra)

    def _step(self, target: FloatArray) -> None:
        self._sim.set_targets(target)
        self._sim.step(self._physics_steps)
