"""A node process under test, and a robot's other half to talk to it with."""

from __future__ import annotations

import contextlib
import functools
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import rclpy
import yaml
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState
from rcl_interfaces.msg import SetParametersResult
from rcl_interfaces.srv import SetParameters
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.parameter import Parameter
from rclpy.qos import QoSProfile
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import Image, JointState
from std_msgs.msg import String
from std_srvs.srv import Trigger
from trajectory_msgs.msg import JointTrajectory

from pi05_ros.config import JointParameters, joint_group
from pi05_ros.msg import ActionChunk, PolicyStatus
from pi05_ros.nodes.messages import (
    IMAGE_QOS,
    INSTRUCTION_QOS,
    LATCHED_QOS,
    image_message,
    joint_state_message,
    to_seconds,
    to_time,
)
from pi05_ros.types import JointGroup

ROOT = Path(__file__).parents[2]
PARAMS_FILE = ROOT / "config" / "aloha.yaml"
MODULES = {"policy_node": "pi05_ros.nodes.main", "aloha_sim_node": "pi05_lab.sim.main"}
CAMERAS = ("cam_high", "cam_left_wrist", "cam_right_wrist")
CONTROLLERS = ("left_arm_controller", "right_arm_controller")
JOINTS = tuple(
    f"{side}_{joint}"
    for side in ("left", "right")
    for joint in (
        *("waist", "shoulder", "elbow", "forearm_roll", "wrist_angle", "wrist_rotate"),
        "gripper",
    )
)
HOME = np.array([0.0, -0.96, 1.16, 0.0, -0.3, 0.0, 0.024] * 2)
FRAME_PERIOD_S = 1 / 30
CONTROL_PERIOD_S = 0.02
EVERY_TRAJECTORY_QOS = QoSProfile(depth=100)
"""Reliable, and deeper than a controller's: a busy test must not miss one and see a jump."""


class NodeProcess:
    """One of the package's executables, or a Python file, as a process of its own."""

    def __init__(self, name: str | Path, log: Path, *arguments: str, **environment: str) -> None:
        self.log_path = log
        program = [str(name)]
        if isinstance(name, str):
            program = ["-m", MODULES[name]]
        command = [sys.executable, *program, "--ros-args"]
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [*command, "--params-file", str(PARAMS_FILE), *arguments],
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **environment},
            )

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    @property
    def threads(self) -> int:
        return len(list(Path(f"/proc/{self._process.pid}/task").iterdir()))

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def wait(self, timeout_s: float) -> int:
        """Until it ends by itself; its exit code."""
        return self._process.wait(timeout_s)

    def stop(self, timeout_s: float = 10.0, by: signal.Signals = signal.SIGINT) -> int:
        """Interrupt it, as Ctrl-C does by default; its exit code."""
        if self._process.poll() is None:
            self._process.send_signal(by)
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise


class Servo:
    """Joints that are where the last trajectory of each controller commands them to be."""

    def __init__(self) -> None:
        self.positions = HOME.copy()
        self._followed: dict[str, JointTrajectory] = {}

    def place(self, positions: np.ndarray) -> None:
        """Put the joints somewhere by hand; trajectories from before are not followed on."""
        self.positions = positions
        self._followed = {}  # the peer's thread may iterate over the one before

    def follow(self, controller: str, trajectory: JointTrajectory) -> None:
        self._followed[controller] = trajectory

    def move(self, now_s: float) -> np.ndarray:
        positions = self.positions.copy()
        for trajectory in self._followed.values():
            stamp_s, points, _ = arrays(trajectory)
            times_s = stamp_s + np.array([to_seconds(p.time_from_start) for p in trajectory.points])
            if now_s >= times_s[0]:
                for name, column in zip(trajectory.joint_names, points.T, strict=True):
                    positions[JOINTS.index(name)] = np.interp(now_s, times_s, column)
        self.positions = positions
        return positions


class Peer:
    """What stands around the policy node: cameras, joints, controllers, a person."""

    def __init__(self) -> None:
        rclpy.init()
        self.node = rclpy.create_node("peer")
        self.statuses: list[PolicyStatus] = []
        self.chunks: list[ActionChunk] = []
        self.trajectories: dict[str, list[JointTrajectory]] = {name: [] for name in CONTROLLERS}
        self.active_instructions: list[str] = []
        self.servo = Servo()
        self.make_image: Callable[[str, float], Image] = default_image
        self.make_joints: Callable[[np.ndarray, float], JointState] = default_joints
        self.diagnostics: dict[str, DiagnosticStatus] = {}
        self.clock_s: Callable[[], float] | None = None
        """The time of /clock and of all stamps; None is real time and no /clock."""
        self.cameras: Sequence[str] = ()
        self.publish_joints = False
        node = self.node
        self._unmatched: tuple[list[PolicyStatus], list[DiagnosticArray]] = ([], [])
        node.create_subscription(PolicyStatus, "policy/status", self._on_status, 10)
        node.create_subscription(ActionChunk, "policy/action_chunk", self.chunks.append, 10)
        node.create_subscription(
            String,
            "policy/active_instruction",
            lambda message: self.active_instructions.append(message.data),
            LATCHED_QOS,
        )
        node.create_subscription(DiagnosticArray, "/diagnostics", self._on_diagnostics, 10)
        self._controllers: list[Any] = []
        self.start_controllers()
        self._clock = node.create_publisher(Clock, "/clock", 1)
        self._images = {
            name: node.create_publisher(Image, f"{name}/image_raw", IMAGE_QOS) for name in CAMERAS
        }
        self._joints = node.create_publisher(JointState, "joint_states", 10)
        self._instruction = node.create_publisher(String, "instruction", INSTRUCTION_QOS)
        self._change_state = node.create_client(ChangeState, "policy/change_state")
        self._triggers: dict[str, Any] = {}
        self._set_parameters: dict[str, Any] = {}
        node.create_timer(FRAME_PERIOD_S, self._publish)
        self._closing = False
        self._calls: queue.SimpleQueue[tuple[Callable[[], object], threading.Event]] = (
            queue.SimpleQueue()
        )
        self._executor = SingleThreadedExecutor()
        self._executor.add_node(node)
        self._thread = threading.Thread(target=self._spin, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closing = True
        self._executor.shutdown(timeout_sec=1.0)
        self._thread.join(2.0)
        self.node.destroy_node()
        rclpy.try_shutdown()

    @property
    def positions(self) -> np.ndarray:
        """[14] measured; setting them moves the joints by hand."""
        return self.servo.positions

    @positions.setter
    def positions(self, positions: np.ndarray) -> None:
        self.servo.place(positions)

    def start_controllers(self, names: Sequence[str] = CONTROLLERS) -> None:
        for name in names:
            subscription = self.node.create_subscription(
                JointTrajectory,
                f"{name}/joint_trajectory",
                functools.partial(self._on_trajectory, name),
                EVERY_TRAJECTORY_QOS,
            )
            self._controllers.append(subscription)

    def _on_trajectory(self, controller: str, trajectory: JointTrajectory) -> None:
        self.servo.follow(controller, trajectory)
        self.trajectories[controller].append(trajectory)

    def stop_controllers(self) -> None:
        while self._controllers:
            self.destroy(self.node.destroy_subscription, self._controllers.pop())

    def destroy(self, destroy: Callable[[Any], object], entity: Any) -> None:
        """Call one of the node's `destroy_…` between two spins, on the thread that spins.

        On another thread, the destruction of an entity whose events rclpy collects raises
        InvalidHandle in the spinning thread and can leave a callback group blocked for ever.
        """
        done = threading.Event()
        self._calls.put((functools.partial(destroy, entity), done))
        self._executor.wake()
        assert done.wait(10.0), "the peer's thread does not spin"

    def run_robot(self) -> None:
        """Publish images of all cameras and joint states from here on."""
        self.cameras, self.publish_joints = CAMERAS, True

    def stop_robot(self) -> None:
        self.cameras, self.publish_joints = (), False

    def reset(self) -> None:
        for kept in (self.statuses, self.chunks, *self.trajectories.values()):
            kept.clear()
        self.diagnostics.clear()

    def change_state(self, transition: str, timeout_s: float = 60.0) -> bool:
        number = getattr(Transition, f"TRANSITION_{transition.upper()}")
        request = ChangeState.Request(transition=Transition(id=number))
        return bool(self._call(self._change_state, request, timeout_s).success)

    def trigger(self, service: str, timeout_s: float = 10.0) -> str:
        """Call a std_srvs/Trigger; its message."""
        if service not in self._triggers:
            self._triggers[service] = self.node.create_client(Trigger, service)
        response = self._call(self._triggers[service], Trigger.Request(), timeout_s)
        assert response.success, response.message
        return str(response.message)

    def set_parameter(self, node: str, name: str, value: Any) -> SetParametersResult:
        if node not in self._set_parameters:
            client = self.node.create_client(SetParameters, f"{node}/set_parameters")
            self._set_parameters[node] = client
        request = SetParameters.Request(
            parameters=[Parameter(name, value=value).to_parameter_msg()]
        )
        return self._call(self._set_parameters[node], request, 10.0).results[0]

    def instruct(self, text: str) -> None:
        self.wait(lambda: self._instruction.get_subscription_count() > 0, "instruction subscriber")
        self._instruction.publish(String(data=text))

    def wait(self, condition: Callable[[], Any], what: str, timeout_s: float = 20.0) -> Any:
        deadline_s = time.monotonic() + timeout_s
        while not (value := condition()):
            if time.monotonic() > deadline_s:
                problems = self.statuses[-1].problems if self.statuses else "no status"
                raise AssertionError(f"no {what} within {timeout_s:g} s; {problems}")
            time.sleep(0.02)
        return value

    def fresh_status(self) -> PolicyStatus:
        seen = len(self.statuses)
        self.wait(lambda: len(self.statuses) > seen + 1, "status")
        return self.statuses[-1]

    def _call(self, client: Any, request: Any, timeout_s: float) -> Any:
        self.wait(client.service_is_ready, client.srv_name, timeout_s)
        future = client.call_async(request)
        self.wait(future.done, f"answer of {client.srv_name}", timeout_s)
        return future.result()

    def _spin(self) -> None:
        with contextlib.suppress(ExternalShutdownException):
            while rclpy.ok() and not self._closing:
                while not self._calls.empty():
                    call, done = self._calls.get()
                    call()
                    done.set()
                self._executor.spin_once(timeout_sec=0.5)

    def _on_status(self, message: PolicyStatus) -> None:
        self._unmatched[0].append(message)
        self._match()

    def _on_diagnostics(self, message: DiagnosticArray) -> None:
        if message.status[0].name.startswith("policy: "):
            self._unmatched[1].append(message)
            self._match()
        else:
            self.diagnostics.update({status.name: status for status in message.status})

    def _match(self) -> None:
        """What the node publishes together is seen together, in whatever order it arrives."""
        statuses, diagnostics = self._unmatched
        while statuses and diagnostics:
            status_s, diagnostics_s = (
                to_seconds(kept[0].header.stamp) for kept in (statuses, diagnostics)
            )
            if status_s < diagnostics_s:
                statuses.pop(0)
            elif diagnostics_s < status_s:
                diagnostics.pop(0)
            else:
                newest = diagnostics.pop(0).status
                self.diagnostics.update({status.name: status for status in newest})
                self.statuses.append(statuses.pop(0))

    def _publish(self) -> None:
        if self.clock_s is None:
            now_s = self.node.get_clock().now().nanoseconds * 1e-9
        else:
            now_s = self.clock_s()
            self._clock.publish(Clock(clock=to_time(now_s)))
        if self.publish_joints:
            self._joints.publish(self.make_joints(self.servo.move(now_s), now_s))
        for name in self.cameras:
            self._images[name].publish(self.make_image(name, now_s))


@contextlib.contextmanager
def unconfigured(peer: Peer, process: NodeProcess) -> Iterator[Peer]:
    """The policy node is unconfigured at the beginning and again at the end."""
    peer.positions = HOME.copy()
    peer.reset()
    peer.wait(lambda: peer.statuses or process.ended, "status", 60.0)
    assert not process.ended, process.log
    yield peer
    peer.stop_robot()
    peer.make_image, peer.make_joints = default_image, default_joints
    state = peer.fresh_status().state
    if state == PolicyStatus.ACTIVE:
        assert peer.change_state("deactivate")
    if state in (PolicyStatus.ACTIVE, PolicyStatus.INACTIVE):
        assert peer.change_state("cleanup")


def default_joints(positions: np.ndarray, stamp_s: float) -> JointState:
    return joint_state_message(JOINTS, positions, np.zeros_like(positions), stamp_s)


def default_image(camera: str, stamp_s: float) -> Image:
    """Noise: a camera never repeats an image to the byte."""
    noise = np.random.default_rng(round(stamp_s * 1e9)).integers(100, 150, (48, 64, 3), np.uint8)
    return image_message(noise, stamp_s, camera)


def limits() -> JointGroup:
    """The joints of config/aloha.yaml."""
    blocks = yaml.safe_load(PARAMS_FILE.read_text())["/**/policy"]["ros__parameters"]["joints"]
    return joint_group({name: JointParameters(**blocks[name]) for name in blocks["names"]})


def arrays(trajectory: JointTrajectory) -> tuple[float, np.ndarray, np.ndarray]:
    """Stamp, positions and velocities [n, n_joints]."""
    positions = np.array([point.positions for point in trajectory.points])
    velocities = np.array([point.velocities for point in trajectory.points])
    return to_seconds(trajectory.header.stamp), positions, velocities


def at_rest(trajectory: JointTrajectory) -> bool:
    return bool(np.allclose(arrays(trajectory)[2], 0.0, atol=1e-4))


def check_limits(trajectories: Sequence[JointTrajectory]) -> None:
    """Position, velocity and acceleration of every point, and rest at the end."""
    joints = limits()
    assert trajectories
    for trajectory in trajectories:
        columns = [JOINTS.index(name) for name in trajectory.joint_names]
        _, positions, velocities = arrays(trajectory)
        assert (positions >= joints.lower[columns] - 1e-9).all()
        assert (positions <= joints.upper[columns] + 1e-9).all()
        assert (np.abs(velocities) <= joints.max_velocity[columns] + 1e-9).all()
        change = np.abs(np.diff(velocities, axis=0)) / CONTROL_PERIOD_S
        assert (change <= joints.max_acceleration[columns] + 1e-6).all()
        assert not velocities[-1].any()


def check_boundaries(trajectories: Sequence[JointTrajectory]) -> None:
    """Each begins where and as fast as the one before it is then; within one activation."""
    for before, after in pairwise(trajectories):
        stamp_s, positions, velocities = arrays(before)
        next_s, next_positions, next_velocities = arrays(after)
        row = min(round((next_s - stamp_s) / CONTROL_PERIOD_S), len(positions) - 1)
        np.testing.assert_allclose(next_positions[0], positions[row], atol=1e-6)
        np.testing.assert_allclose(next_velocities[0], velocities[row], atol=1e-6)
