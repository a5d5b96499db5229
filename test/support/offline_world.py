"""A robot of two joints and a gripper whose motion is a formula, recorded as bags; policies for it.

The policies are given by name ("offline_world:oracle"), so that worker processes can make them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rosbags.highlevel import AnyReader
from rosbags.rosbag2 import StoragePlugin, Writer
from rosbags.typesys import Stores, get_typestore

from pi05_lab.data.lerobot_format import Features
from pi05_lab.data.lerobot_writer import DatasetWriter
from pi05_lab.data.robot_bag import RobotBagWriter
from pi05_lab.evaluation.open_loop.conditions import EvaluationSettings
from pi05_lab.evaluation.open_loop.evaluator import OpenLoopEvaluation
from pi05_lab.evaluation.open_loop.jobs import Job
from pi05_lab.evaluation.open_loop.results import RecordingResult
from pi05_lab.evaluation.open_loop.runs import Plan, open_recording
from pi05_ros.types import ActionChunk, ActionPrefix, FloatArray, ImageArray, Observation, Policy

JOINTS = ("shoulder", "elbow", "gripper")
CONTROLLERS = {"arm_controller": JOINTS}
RATE_HZ = 50.0
HORIZON, DT_S = 10, 0.05
START_S = 100.0
TYPES = get_typestore(Stores.ROS2_HUMBLE)

PARAMS = """
/**/policy:
  ros__parameters:
    checkpoint: "offline_world:oracle"
    cameras:
      names: [top]
      top: {topic: top/image_raw, transport: raw, required: true}
    joints:
      names: [shoulder, elbow, gripper]
      shoulder: {lower: -2.0, upper: 2.0, max_velocity: 3.0, max_acceleration: 60.0}
      elbow: {lower: -2.0, upper: 2.0, max_velocity: 3.0, max_acceleration: 60.0}
      gripper: {lower: 0.0, upper: 0.04, max_velocity: 1.0, max_acceleration: 20.0,
                policy_zero: 0.0, policy_one: 0.04, gripper: true}
    controllers:
      names: [arm_controller]
      arm_controller: {joints: [shoulder, elbow, gripper]}
    scheduler: {method: latest}
    control_rate_hz: 50.0
"""


def motion(times_s: FloatArray) -> FloatArray:
    """[n] → [n, 3] rad, rad, m; the gripper closes at 1.5 s and opens at 3 s of the recording."""
    t = np.asarray(times_s, dtype=np.float64) - START_S
    closed = (t >= 1.5) & (t < 3.0)
    columns = (0.5 * np.sin(2 * t), 0.3 * np.cos(1.5 * t), np.where(closed, 0.005, 0.035))
    return np.stack(columns, axis=1)


def write_params(folder: Path) -> Path:
    path = folder / "params.yaml"
    path.write_text(PARAMS)
    return path


def grey_image(k: int) -> ImageArray:
    """Two grey halves; the grey differs by frame."""
    image = np.full((12, 16, 3), 40 + k % 100, dtype=np.uint8)
    image[:, 8:] += 60
    return image


def write_bag(
    path: Path,
    seconds: float = 4.0,
    instruction: Callable[[float], str] = lambda _: "wave",
    cameras: Callable[[int], Mapping[str, ImageArray]] = lambda k: {"top": grey_image(k)},
    servo_lag_s: float = 0.0,
) -> Path:
    """A bag with `motion` as commands; the joints follow it `servo_lag_s` late."""
    with RobotBagWriter(path, JOINTS, CONTROLLERS, 1 / RATE_HZ) as bag:
        for k in range(round(seconds * RATE_HZ)):
            stamp_s = START_S + k / RATE_HZ
            measured = motion(np.array([stamp_s - servo_lag_s]))[0]
            target = motion(np.array([stamp_s]))[0]
            text = instruction(stamp_s - START_S)
            bag.write(stamp_s, cameras(k), measured, np.zeros(3), target, text)
    return path


def write_dataset(root: Path, frames: int, *instructions: str) -> Path:
    """A LeRobot dataset with an episode of `motion` for each instruction."""
    features = Features({"top": (12, 16)}, JOINTS, JOINTS, {}, False)
    with DatasetWriter(root, round(RATE_HZ), features) as writer:
        for text in instructions:
            for k in range(frames):
                position = motion(np.array([START_S + k / RATE_HZ]))[0] / (1.0, 1.0, 0.04)
                values = position.astype(np.float32)
                writer.add_frame({"top": grey_image(k)}, values, values, text)
            writer.end_episode()
    return root


def make_plan(folder: Path, *policies: str, **settings: object) -> Plan:
    """A plan for `write_bag`'s recordings; the params file is written into the folder."""
    sources = policies or ("oracle",)
    options = replace(EvaluationSettings(timings=False), **settings)  # type: ignore[arg-type]
    return Plan(
        policies={name: f"offline_world:{name}" for name in sources},
        settings=options,
        params_file=str(write_params(folder)),
    )


def job(path: Path) -> Job:
    return Job(path.name, path)


def run(path: Path, plan: Plan, **policies: Policy) -> RecordingResult:
    robot = plan.robot()
    recording = open_recording(job(path), plan, robot)
    return OpenLoopEvaluation(recording, policies, robot, plan.settings).run()


def notes(result: RecordingResult) -> list[str]:
    return [note.text for note in result.notes]


def rewrite(
    source: Path, target: Path, change: Callable[[str, int, Any], Any], types: Any = TYPES
) -> Path:
    """Copy a bag; `change` gets topic, number in the topic and message, None leaves it out."""
    counts: dict[str, int] = {}
    connections: dict[str, Any] = {}
    with (
        AnyReader([source]) as reader,
        Writer(target, version=8, storage_plugin=StoragePlugin.MCAP) as writer,
    ):
        for connection, stamp_ns, data in reader.messages():
            topic = connection.topic
            k = counts[topic] = counts.get(topic, -1) + 1
            changed = change(topic, k, types.deserialize_cdr(data, connection.msgtype))
            if changed is None:
                continue
            topic, kind, message = (
                changed if isinstance(changed, tuple) else (topic, connection.msgtype, changed)
            )
            if topic not in connections:
                connections[topic] = writer.add_connection(topic, kind, typestore=types)
            writer.write(connections[topic], stamp_ns, types.serialize_cdr(message, kind))
    return target


class FormulaPolicy:
    """Predicts a function of the observation and the times [horizon], in rad and m."""

    horizon, dt_s = HORIZON, DT_S
    state_dim = action_dim = 3
    cameras = ("top",)

    def __init__(self, name: str, predict: Callable[[Observation, FloatArray], FloatArray]) -> None:
        self.description = f"{name}, a formula"
        self._predict = predict
        self.seen: list[Observation] = []

    def infer(self, observation: Observation, prefix: ActionPrefix | None = None) -> ActionChunk:
        self.seen.append(observation)
        times_s = observation.stamp_s + DT_S * np.arange(HORIZON, dtype=np.float64)
        actions = self._predict(observation, times_s) / (1.0, 1.0, 0.04)
        return ActionChunk(
            np.asarray(actions, dtype=np.float64),
            observation.stamp_s,
            DT_S,
            observation.instruction,
            {"network": 0.012},
        )


def oracle() -> FormulaPolicy:
    """The formula with an error of 0.01 rad; uses instruction and images."""

    def predict(observation: Observation, times_s: FloatArray) -> FloatArray:
        wrong = 0.2 * (observation.instruction != "wave")
        blind = 0.3 * (not next(iter(observation.images.values())).any())
        return motion(times_s) + np.array([0.01 + wrong + blind, -0.01, 0.0])

    return FormulaPolicy("oracle", predict)


def wild() -> FormulaPolicy:
    """Random positions within the limits."""

    def predict(observation: Observation, times_s: FloatArray) -> FloatArray:
        rng = np.random.default_rng(round(observation.stamp_s * 1e6))
        return rng.uniform((-2.0, -2.0, 0.0), (2.0, 2.0, 0.04), size=(HORIZON, 3))

    return FormulaPolicy("wild", predict)


def still() -> FormulaPolicy:
    """Holds the position."""

    def predict(observation: Observation, times_s: FloatArray) -> FloatArray:
        return np.tile(observation.state * (1.0, 1.0, 0.04), (HORIZON, 1))

    return FormulaPolicy("still", predict)


def flaky() -> FormulaPolicy:
    """The oracle that raises at every third inference."""
    policy = oracle()
    infer = policy.infer

    def fail_every_third(
        observation: Observation, prefix: ActionPrefix | None = None
    ) -> ActionChunk:
        if len(policy.seen) % 3 == 2:
            policy.seen.append(observation)
            raise RuntimeError("not this time")
        return infer(observation, prefix)

    policy.infer = fail_every_third  # type: ignore[method-assign]
    return policy


def gpu() -> FormulaPolicy:
    """Its description is the GPUs of its process; two processes wait for each other."""
    gpus, meeting = os.environ["CUDA_VISIBLE_DEVICES"], Path(os.environ["OFFLINE_WORLD_MEETING"])
    (meeting / gpus).touch()
    limit_s = time.monotonic() + 120
    while len(list(meeting.iterdir())) < 2 and time.monotonic() < limit_s:
        time.sleep(0.01)
    return FormulaPolicy(gpus, lambda observation, times_s: motion(times_s))


def deadly() -> FormulaPolicy:
    """Kills its process for the instruction "kill"."""

    def predict(observation: Observation, times_s: FloatArray) -> FloatArray:
        if observation.instruction == "kill":
            os._exit(9)
        return motion(times_s)

    return FormulaPolicy("deadly", predict)
