"""Node `aloha_sim`: a two-arm ALOHA in MuJoCo behind the topics that a real one would have.

Out: `joint_states`, `<camera>/image_raw`, `~/qpos` (the whole state, for replay), `/diagnostics`.
In: `<arm>_controller/joint_trajectory`, executed as joint_trajectory_controller does;
`~/set_qpos`, a whole state to go on from, as `~/qpos` gives it but for the time in front.
Service: `~/reset` puts arms and cubes back.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from diagnostic_msgs.msg import DiagnosticArray
from rcl_interfaces.msg import SetParametersResult
from rclpy.node import Node
from rclpy.parameter import Parameter
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import Image, JointState
from std_msgs.msg import Float64MultiArray
from std_srvs.srv import Trigger
from trajectory_msgs.msg import JointTrajectory

from pi05_lab.sim.arms import JOINT_NAMES, SimulatedAloha
from pi05_lab.sim.controller import JointTrajectoryController, Trajectory, TrajectoryRejected
from pi05_lab.sim.rendering import CAMERAS
from pi05_lab.sim.sim_loop import SimLoop, SimState
from pi05_ros.config import ParameterError, SimParameters
from pi05_ros.nodes.messages import (
    IMAGE_QOS,
    TRAJECTORY_QOS,
    image_message,
    joint_state_message,
    to_seconds,
    to_time,
    trajectory_arrays,
)
from pi05_ros.nodes.parameters import declare
from pi05_ros.nodes.read_noise import ReadNoise
from pi05_ros.nodes.spinning import spin_until_interrupted
from pi05_ros.nodes.status import Level, PartStatus, diagnostic_array
from pi05_ros.types import ImageArray

STATUS_PERIOD_S = 0.5
ARMS = {"left_arm_controller": range(0, 7), "right_arm_controller": range(7, 14)}


class AlohaSimNode(Node):
    """Wires `SimLoop` to topics."""

    def __init__(self) -> None:
        super().__init__("aloha_sim")
        self._settings = settings = declare(self, SimParameters)
        for key in ("cameras", "active_cameras"):
            check_cameras(key, getattr(settings, key))
        self._active_cameras = list(settings.active_cameras)
        self.add_on_set_parameters_callback(self._on_set_parameters)
        sim = SimulatedAloha()
        sim.reset(settings.seed)
        self._resets = 0
        self._read_noise = ReadNoise(settings.seed)
        self._state_publisher = self.create_publisher(JointState, "joint_states", 10)
        self._qpos_publisher = self.create_publisher(Float64MultiArray, "~/qpos", 10)
        # without publish_clock not even advertised: a second source of /clock stops other nodes
        self._clock_publisher = (
            self.create_publisher(Clock, "/clock", 10) if settings.publish_clock else None
        )
        self._diagnostics_publisher = self.create_publisher(DiagnosticArray, "/diagnostics", 10)
        self._image_publishers = {
            camera: self.create_publisher(Image, f"{camera}/image_raw", IMAGE_QOS)
            for camera in settings.cameras
        }
        self._controllers = {
            name: (JointTrajectoryController([JOINT_NAMES[c] for c in columns]), list(columns))
            for name, columns in ARMS.items()
        }
        for controller, columns in self._controllers.values():
            controller.hold(sim.positions()[columns])
        self.loop = SimLoop(
            sim,
            self._controllers,
            wall_clock_s=lambda: self.get_clock().now().nanoseconds * 1e-9,
            own_clock=settings.publish_clock,
            on_state=self._publish_state,
            joint_rate_hz=settings.joint_rate_hz,
            on_frame=self._publish_frame,
            wanted_cameras=self._wanted_cameras,
            camera_rate_hz=settings.camera_rate_hz,
            camera_size=(settings.width, settings.height),
            on_error=self._on_loop_error,
        )
        self._trajectory_subscriptions = [
            self.create_subscription(
                JointTrajectory,
                f"{name}/joint_trajectory",
                lambda message, name=name: self._on_trajectory(name, message),
                TRAJECTORY_QOS,
            )
            for name in ARMS
        ]
        self.create_service(Trigger, "~/reset", self._on_reset)
        self.create_subscription(Float64MultiArray, "~/set_qpos", self._on_set_qpos, 10)
        self.create_timer(STATUS_PERIOD_S, self._publish_diagnostics)
        self.failed = ""
        self._lost_s = 0.0
        self.loop.start()

    def close(self) -> None:
        """End the physics and camera threads."""
        self.loop.stop()

    def _wanted_cameras(self) -> list[str]:
        """Rendering is what costs: a camera without a subscriber is left out."""
        return [
            camera
            for camera in self._active_cameras
            if self._image_publishers[camera].get_subscription_count() > 0
        ]

    def _publish_state(self, state: SimState) -> None:
        if self._clock_publisher is not None:
            self._clock_publisher.publish(Clock(clock=to_time(state.stamp_s)))
        self._state_publisher.publish(
            joint_state_message(JOINT_NAMES, state.positions, state.velocities, state.stamp_s)
        )
        if self._qpos_publisher.get_subscription_count() > 0:
            self._qpos_publisher.publish(
                Float64MultiArray(data=[state.stamp_s, *state.qpos.tolist()])
            )

    def _publish_frame(self, camera: str, picture: ImageArray, stamp_s: float) -> None:
        image = image_message(self._read_noise(picture), stamp_s, camera)
        self._image_publishers[camera].publish(image)

    def _on_trajectory(self, controller: str, message: JointTrajectory) -> None:
        times_s, positions, velocities, accelerations = trajectory_arrays(message)
        trajectory = Trajectory(
            joint_names=list(message.joint_names),
            stamp_s=to_seconds(message.header.stamp),
            times_from_start_s=times_s,
            positions=positions,
            velocities=velocities if any(velocities) else None,
            accelerations=accelerations if any(accelerations) else None,
        )
        try:
            self.loop.accept(controller, trajectory)
        except TrajectoryRejected as error:
            self.get_logger().warning(
                f"{controller} rejected a trajectory: {error}", throttle_duration_sec=1.0
            )

    def _on_reset(self, _: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        self._resets += 1
        seed = self._settings.seed + self._resets
        self.loop.reset(seed)
        response.success, response.message = True, f"arms at home, cubes placed with seed {seed}"
        return response

    def _on_set_qpos(self, message: Float64MultiArray) -> None:
        try:
            self.loop.place(np.array(message.data))
        except ValueError as error:
            self.get_logger().error(f"~/set_qpos: {error}")

    def _on_set_parameters(self, parameters: Sequence[Parameter]) -> SetParametersResult:
        for parameter in parameters:
            if parameter.name != "active_cameras":
                return SetParametersResult(
                    successful=False,
                    reason=f"{parameter.name} is read at the start; restart with the new value",
                )
            names = [name for name in parameter.value if name]
            try:
                check_cameras("active_cameras", names, self._settings.cameras)
            except ParameterError as error:
                return SetParametersResult(successful=False, reason=str(error))
            self._active_cameras = names
        return SetParametersResult(successful=True)

    def _on_loop_error(self, message: str) -> None:
        self.failed = message

    def _publish_diagnostics(self) -> None:
        if self.failed:
            self.get_logger().fatal(self.failed)
            raise SystemExit(1)
        loop, controllers = self.loop.statistics, self._controllers
        lost_s = loop.lost_s - self._lost_s
        self._lost_s = loop.lost_s
        falls_behind = lost_s > 0
        if falls_behind:
            self.get_logger().warning(
                f"the simulator lost {lost_s:.2f} s against real time in {STATUS_PERIOD_S} s: "
                "fewer cameras, a lower camera_rate_hz or smaller pictures make it faster",
                throttle_duration_sec=5.0,
            )
        parts = [
            PartStatus(
                "physics",
                Level.WARN if falls_behind else Level.OK,
                "slower than real time" if falls_behind else "real time",
                {"real time factor": loop.real_time_factor, "lost s": loop.lost_s},
            ),
            PartStatus(
                "cameras",
                Level.OK,
                f"{self._settings.camera_rate_hz:g} Hz",
                {
                    **{f"{name} published": loop.frames.get(name, 0) for name in CAMERAS},
                    "rounds left out": loop.late_frames,
                },
            ),
            *(
                PartStatus(
                    name,
                    Level.WARN if controller.rejected else Level.OK,
                    controller.last_rejection or "follows",
                    {"accepted": controller.accepted, "rejected": controller.rejected},
                )
                for name, (controller, _) in controllers.items()
            ),
        ]
        now_s = self.get_clock().now().nanoseconds * 1e-9
        self._diagnostics_publisher.publish(
            diagnostic_array(self.get_name(), "MuJoCo ALOHA", parts, now_s)
        )


def check_cameras(key: str, names: Sequence[str], known: Sequence[str] = CAMERAS) -> None:
    """Raise ParameterError for a camera that the scene does not have."""
    for name in names:
        if name not in known:
            raise ParameterError(f"parameter {key!r}: no camera {name!r}; there are {list(known)}")


def main(args: Sequence[str] | None = None) -> int:
    """Entry point of the executable `aloha_sim_node`."""
    return spin_until_interrupted(AlohaSimNode, "aloha_sim", args)
