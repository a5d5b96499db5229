"""Node `aloha_sim`: a two-arm ALOHA in MuJoCo with the topics of a real one.

Out: `joint_states`, `<camera>/image_raw`, `~/qpos` (the whole state, for replay), `/diagnostics`.
In: `<arm>_controller/joint_trajectory`, executed like joint_trajectory_controller; `~/set_qpos`, a
whole state to continue from, like `~/qpos` without its leading time. Service: `~/reset`, arms and
cubes to their initial places.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

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

from pi05_lab.sim.arms import SimulatedAloha
from pi05_lab.sim.controller import JointTrajectoryController, Trajectory, TrajectoryRejected
from pi05_lab.sim.rendering import CAMERAS, CameraRenderer
from pi05_lab.sim.scene import JOINT_NAMES, TIMESTEP_S
from pi05_ros.config import ParameterError, SimParameters
from pi05_ros.nodes import messages
from pi05_ros.nodes.parameters import declare
from pi05_ros.nodes.spinning import spin_until_interrupted
from pi05_ros.nodes.status import Level, PartStatus, diagnostic_array
from pi05_ros.types import ImageArray

STATUS_PERIOD_S = 0.5
ARMS = {"left_arm_controller": slice(0, 7), "right_arm_controller": slice(7, 14)}
"""Controller → its joints in `JOINT_NAMES`."""
MAX_LAG_S = 0.1
"""Physics catches up with a lag up to this; beyond it the machine is too slow, and time is lost."""
NOISY_VALUES = 400


class ReadNoise:
    """A sensor's read noise: without it rendered images repeat to the byte while nothing moves.

    Changes 400 values of each image by one grey value; the same seed, the same noise.
    """

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)

    def __call__(self, image: ImageArray) -> ImageArray:
        """A noisy copy of [height, width, 3], for one thread."""
        noisy = image.copy()
        values = noisy.reshape(-1)
        where = self._rng.integers(0, values.size, NOISY_VALUES)
        up = self._rng.integers(0, 2, NOISY_VALUES, dtype=np.uint8)
        # black cannot fall and white cannot rise
        chosen = image.reshape(-1)[where]
        up[chosen == 0], up[chosen == 255] = 1, 0
        values[where] = chosen + 2 * up - 1
        return noisy


class AlohaSimNode(Node):
    """Steps physics and renders the cameras in a thread each, in real time.

    Trajectories and messages are stamped with ROS time, or with `publish_clock` with the simulated
    time, for a system that follows /clock.
    """

    def __init__(self) -> None:
        super().__init__("aloha_sim")
        self._settings = settings = declare(self, SimParameters)
        for key in ("cameras", "active_cameras"):
            check_cameras(key, getattr(settings, key))
        self._active_cameras = list(settings.active_cameras)
        self.add_on_set_parameters_callback(self._on_set_parameters)
        self._state_publisher = self.create_publisher(JointState, "joint_states", 10)
        self._qpos_publisher = self.create_publisher(Float64MultiArray, "~/qpos", 10)
        # Advertised only with publish_clock: a second source of /clock stops other nodes.
        self._clock_publisher = (
            self.create_publisher(Clock, "/clock", 10) if settings.publish_clock else None
        )
        self._diagnostics_publisher = self.create_publisher(DiagnosticArray, "/diagnostics", 10)
        self._image_publishers = {
            camera: self.create_publisher(Image, f"{camera}/image_raw", messages.IMAGE_QOS)
            for camera in settings.cameras
        }
        self._controllers = {
            name: JointTrajectoryController(JOINT_NAMES[joints]) for name, joints in ARMS.items()
        }
        self._sim = SimulatedAloha()
        self._lock = threading.Lock()
        """Guards the simulator, its time, the controllers and the published times."""
        self._stop = threading.Event()
        self._elapsed_s = self._lost_s = self._lost_reported_s = 0.0
        """Simulated; wall time that physics could not follow, and how much of it was reported."""
        self._frames = dict.fromkeys(CAMERAS, 0)
        self._late_rounds = 0
        """Skipped camera cycles, because the previous one took too long."""
        self._resets = 0
        self._failure = ""
        self._reset(settings.seed)
        self._latest = (self._now_s(), self._sim.qpos())
        for name in ARMS:
            self.create_subscription(
                JointTrajectory,
                f"{name}/joint_trajectory",
                lambda message, name=name: self._on_trajectory(name, message),
                messages.TRAJECTORY_QOS,
            )
        self.create_service(Trigger, "~/reset", self._on_reset)
        self.create_subscription(Float64MultiArray, "~/set_qpos", self._on_set_qpos, 10)
        self.create_timer(STATUS_PERIOD_S, self._publish_diagnostics)
        self._threads = [
            threading.Thread(target=self._guard, args=(loop,), name=name, daemon=True)
            for loop, name in ((self._run_physics, "physics"), (self._run_cameras, "cameras"))
        ]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """End the physics and camera threads."""
        self._stop.set()
        for thread in self._threads:
            thread.join(2.0)

    def _now_s(self) -> float:
        wall_s: float = self.get_clock().now().nanoseconds * 1e-9
        return self._elapsed_s if self._settings.publish_clock else wall_s

    def _guard(self, loop: Callable[[], None]) -> None:
        try:
            loop()
        except Exception as error:
            if not self._stop.is_set():
                self._failure = f"{threading.current_thread().name}: {error}"

    def _run_physics(self) -> None:
        steps_per_state = max(1, round(1.0 / (self._settings.joint_rate_hz * TIMESTEP_S)))
        positions, velocities = self._sim.positions(), self._sim.velocities()
        targets = np.empty(len(JOINT_NAMES))
        step = 0
        next_s = time.monotonic()
        while not self._stop.is_set():
            with self._lock:
                now_s = self._now_s()
                for name, joints in ARMS.items():
                    targets[joints], _ = self._controllers[name].update(
                        now_s, positions[joints], velocities[joints]
                    )
                self._sim.set_targets(targets)
                self._sim.step()
                self._elapsed_s += TIMESTEP_S
                self._latest = stamp_s, qpos = self._now_s(), self._sim.qpos()
                positions, velocities = self._sim.positions(), self._sim.velocities()
            step += 1
            if step % steps_per_state == 0:
                if self._clock_publisher is not None:
                    self._clock_publisher.publish(Clock(clock=messages.to_time(stamp_s)))
                state = messages.joint_state_message(JOINT_NAMES, positions, velocities, stamp_s)
                self._state_publisher.publish(state)
                if self._qpos_publisher.get_subscription_count() > 0:
                    self._qpos_publisher.publish(Float64MultiArray(data=[stamp_s, *qpos.tolist()]))
            next_s += TIMESTEP_S
            lag_s = time.monotonic() - next_s
            if lag_s > MAX_LAG_S:
                self._lost_s += lag_s
                next_s += lag_s
            elif lag_s < 0:
                self._stop.wait(-lag_s)

    def _run_cameras(self) -> None:
        period_s = 1.0 / self._settings.camera_rate_hz
        noise = ReadNoise(self._settings.seed)
        next_s = time.monotonic()
        with CameraRenderer(
            self._sim.model, self._settings.width, self._settings.height
        ) as renderer:
            while not self._stop.is_set():
                with self._lock:
                    stamp_s, qpos = self._latest
                for camera, publisher in self._image_publishers.items():
                    # Without a subscriber there is no image: rendering dominates the cost.
                    subscribed = publisher.get_subscription_count() > 0
                    if camera in self._active_cameras and subscribed:
                        image = noise(renderer.render(qpos, camera))
                        publisher.publish(messages.image_message(image, stamp_s, camera))
                        self._frames[camera] += 1
                next_s += period_s
                while next_s < time.monotonic() - period_s:
                    next_s += period_s
                    self._late_rounds += 1
                self._stop.wait(max(0.0, next_s - time.monotonic()))

    def _on_trajectory(self, controller: str, message: JointTrajectory) -> None:
        times_s, positions, velocities, accelerations = messages.trajectory_arrays(message)
        trajectory = Trajectory(
            joint_names=list(message.joint_names),
            stamp_s=messages.to_seconds(message.header.stamp),
            times_from_start_s=times_s,
            positions=positions,
            velocities=velocities if any(velocities) else None,
            accelerations=accelerations if any(accelerations) else None,
        )
        try:
            with self._lock:
                self._controllers[controller].accept(trajectory, self._now_s())
        except TrajectoryRejected as error:
            self.get_logger().warning(
                f"{controller} rejected a trajectory: {error}", throttle_duration_sec=1.0
            )

    def _on_reset(self, _: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        self._resets += 1
        seed = self._settings.seed + self._resets
        self._reset(seed)
        response.success, response.message = True, f"arms at home, cubes placed with seed {seed}"
        return response

    def _reset(self, seed: int) -> None:
        with self._lock:
            self._sim.reset(seed)
            self._hold()

    def _on_set_qpos(self, message: Float64MultiArray) -> None:
        try:
            with self._lock:
                self._sim.set_qpos(np.array(message.data))
                self._hold()
        except ValueError as error:
            self.get_logger().error(f"~/set_qpos: {error}")

    def _hold(self) -> None:
        """End the running trajectories."""
        for name, joints in ARMS.items():
            self._controllers[name].hold(self._sim.positions()[joints])

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

    def _publish_diagnostics(self) -> None:
        if self._failure:
            self.get_logger().fatal(self._failure)
            raise SystemExit(1)
        lost_s = self._lost_s - self._lost_reported_s
        self._lost_reported_s += lost_s
        physics = (Level.OK, "real time")
        if lost_s > 0:
            physics = (Level.WARN, "slower than real time")
            self.get_logger().warning(
                f"the simulator lost {lost_s:.2f} s against real time in {STATUS_PERIOD_S} s: "
                "fewer cameras, a lower camera_rate_hz or smaller images make it faster",
                throttle_duration_sec=5.0,
            )
        total_s = self._elapsed_s + self._lost_s
        factor = self._elapsed_s / total_s if total_s > 0 else 1.0
        times = {"real time factor": factor, "lost s": self._lost_s}
        frames = {f"{camera} published": count for camera, count in self._frames.items()}
        frames["rounds left out"] = self._late_rounds
        rate = f"{self._settings.camera_rate_hz:g} Hz"
        parts = [
            PartStatus("physics", *physics, times),
            PartStatus("cameras", Level.OK, rate, frames),
        ]
        for name, controller in self._controllers.items():
            level = Level.WARN if controller.rejected else Level.OK
            counts = {"accepted": controller.accepted, "rejected": controller.rejected}
            parts.append(PartStatus(name, level, controller.last_rejection or "follows", counts))
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
