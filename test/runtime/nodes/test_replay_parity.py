"""A recorded bag through the library and, replayed, through the live node: the same chunks.

Fault pinned: an evaluation that decodes, selects, normalises or un-normalises otherwise than the
node that it speaks for.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rclpy
from harness import (  # type: ignore[import-not-found]
    CAMERAS,
    CONTROLLERS,
    HOME,
    JOINTS,
    PARAMS_FILE,
    NodeProcess,
)
from noted_policy_node import digest  # type: ignore[import-not-found]
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rosbags.rosbag2 import Reader
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import Image, JointState
from std_msgs.msg import String

from pi05_lab.data.robot_bag import RobotBagWriter
from pi05_lab.evaluation.open_loop.conditions import EvaluationSettings
from pi05_lab.evaluation.open_loop.evaluator import OpenLoopEvaluation
from pi05_lab.evaluation.open_loop.runs import Job, Plan, load_policy, open_recording
from pi05_ros.msg import ActionChunk, PolicyStatus
from pi05_ros.nodes.messages import IMAGE_QOS, INSTRUCTION_QOS, JOINT_QOS, to_seconds, to_time
from pi05_ros.types import FloatArray, Observation

pytestmark = pytest.mark.slow

SECONDS, RATE_HZ, START_S = 1.6, 25.0, 100.0
CLOCK_PERIOD_S = 0.01
NUM_STEPS = 2


@pytest.fixture(scope="module")
def bag(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Moving joints and images that all differ."""
    path = tmp_path_factory.mktemp("parity") / "bag"
    rng = np.random.default_rng(0)
    half = len(JOINTS) // 2
    arms = {name: JOINTS[k * half : (k + 1) * half] for k, name in enumerate(CONTROLLERS)}
    with RobotBagWriter(path, JOINTS, arms, 1 / RATE_HZ) as writer:
        for k in range(round(SECONDS * RATE_HZ)):
            images = {c: rng.integers(0, 255, (24, 32, 3), dtype=np.uint8) for c in CAMERAS}
            positions = HOME + 0.002 * k
            stamp_s = START_S + k / RATE_HZ
            writer.write(stamp_s, images, positions, np.zeros(14), positions, "wave")
    return path


@pytest.fixture(scope="module")
def by_library(bag: Path, process: NodeProcess) -> dict[str, tuple[float, FloatArray]]:
    """Hash of the observation → its stamp and chunk in joint units, of every observation.

    Computed while `process` loads its policy.
    """
    settings = EvaluationSettings(every_s=1 / RATE_HZ, control_every=0, timings=False)
    plan = Plan(policies={}, settings=settings, params_file=str(PARAMS_FILE))
    policy = load_policy("small", "aloha", device="cpu", num_steps=NUM_STEPS, seed=0, threads=1)
    robot = plan.robot()
    found: dict[str, tuple[float, FloatArray]] = {}
    infer = policy.infer

    def note(observation: Observation, prefix: Any = None) -> Any:
        chunk = infer(observation, prefix)
        joints = robot.config.joints.to_joints(chunk.actions)
        found[digest(observation)] = (observation.stamp_s, joints)
        return chunk

    policy.infer = note  # type: ignore[method-assign]
    recording = open_recording(Job("bag", bag), plan, robot)
    result = OpenLoopEvaluation(recording, {"small": policy}, robot, settings).run()
    assert result.observations == len(found) == round(SECONDS * RATE_HZ)
    assert result.notes == []
    return found


class SchedulerReplay:
    """Republishes a bag's messages as they are, with the clock that they were recorded by."""

    def __init__(self) -> None:
        rclpy.init()
        self.node = rclpy.create_node("player")
        self.chunks: list[ActionChunk] = []
        self.states: list[int] = []
        self._clock = self.node.create_publisher(Clock, "/clock", 10)
        self._publishers = {
            "/joint_states": self.node.create_publisher(JointState, "joint_states", JOINT_QOS),
            "/instruction": self.node.create_publisher(String, "instruction", INSTRUCTION_QOS),
        }
        for name in CAMERAS:
            topic = f"{name}/image_raw"
            self._publishers[f"/{topic}"] = self.node.create_publisher(Image, topic, IMAGE_QOS)
        self.node.create_subscription(ActionChunk, "policy/action_chunk", self.chunks.append, 50)
        self.node.create_subscription(
            PolicyStatus, "policy/status", lambda status: self.states.append(status.state), 10
        )
        self._executor = SingleThreadedExecutor()
        self._executor.add_node(self.node)
        self._thread = threading.Thread(target=self._spin, daemon=True)
        self._thread.start()

    def _spin(self) -> None:
        with contextlib.suppress(ExternalShutdownException):
            self._executor.spin()

    def ready(self) -> bool:
        """The node is active and everything that is played has a listener."""
        listeners = [each.get_subscription_count() for each in self._publishers.values()]
        return self.states[-1:] == [PolicyStatus.ACTIVE] and min(listeners) > 0

    def play(self, bag: Path, rate: float) -> None:
        started_s = time.monotonic()
        clock_ns = 0

        def advance(to_ns: int, begin_ns: int) -> None:
            nonlocal clock_ns
            clock_ns = clock_ns or begin_ns
            while clock_ns <= to_ns:
                time_s = (clock_ns - begin_ns) * 1e-9 / rate
                time.sleep(max(0.0, started_s + time_s - time.monotonic()))
                self._clock.publish(Clock(clock=to_time(clock_ns * 1e-9)))
                clock_ns += round(CLOCK_PERIOD_S * 1e9)

        with Reader(bag) as reader:
            begin_ns = reader.start_time
            for connection, stamp_ns, data in reader.messages():
                if connection.topic in self._publishers:
                    advance(stamp_ns, begin_ns)
                    self._publishers[connection.topic].publish(bytes(data))
            advance(stamp_ns + 300_000_000, begin_ns)

    def close(self) -> None:
        self._executor.shutdown(timeout_sec=1.0)
        self._thread.join(2.0)
        self.node.destroy_node()
        rclpy.try_shutdown()


@pytest.fixture(scope="module")
def notes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parity") / "notes.jsonl"


@pytest.fixture(scope="module")
def process(notes: Path) -> Iterator[NodeProcess]:
    arguments = [
        "use_sim_time:=true", "autostart:=true", "dry_run:=true", "status_rate_hz:=10.0",
        f"num_steps:={NUM_STEPS}", "seed:=0", "threads:=1", "device:=cpu",
    ]  # fmt: skip
    parameters = [word for argument in arguments for word in ("-p", argument)]
    program = Path(__file__).with_name("noted_policy_node.py")
    process = NodeProcess(program, notes.with_suffix(".log"), *parameters, NOTES=str(notes))
    yield process
    process.stop()


@pytest.fixture(scope="module")
def player(process: NodeProcess) -> Iterator[SchedulerReplay]:
    """With the node active."""
    player = SchedulerReplay()
    deadline_s = time.monotonic() + 60.0
    while not player.ready():
        assert time.monotonic() < deadline_s, process.log
        time.sleep(0.05)
    yield player
    player.close()


@pytest.mark.parametrize("rate", [1.0, 0.5])
def test_equal_observations_give_equal_chunks(
    bag: Path,
    by_library: dict[str, tuple[float, FloatArray]],
    player: SchedulerReplay,
    notes: Path,
    rate: float,
) -> None:
    """The second replay also begins before the first one ended: the clock jumps back."""
    player.chunks.clear()
    before = len(notes.read_text().splitlines())
    player.play(bag, rate)
    deadline_s = time.monotonic() + 5.0
    while not player.chunks and time.monotonic() < deadline_s:
        time.sleep(0.05)
    time.sleep(0.3)
    lines = [json.loads(line) for line in notes.read_text().splitlines()[before:]]
    seen = dict(lines)
    chunks = {to_seconds(chunk.header.stamp): chunk for chunk in player.chunks}
    compared = 0
    for stamp_s, chunk in chunks.items():
        # a tick between two cameras' images makes another observation, which is left out
        known = by_library.get(seen[stamp_s])
        if known is None:
            continue
        assert known[0] == stamp_s
        actions = np.array(chunk.positions).reshape(chunk.horizon, len(chunk.joint_names))
        assert list(chunk.joint_names) == list(JOINTS) and chunk.instruction == "wave"
        np.testing.assert_array_equal(actions, known[1])
        compared += 1
    assert compared >= 5, f"{compared} of {len(chunks)} chunks, {len(seen)} inferences"
    assert compared >= len(chunks) // 2
