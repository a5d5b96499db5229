"""The simulated robot's two threads: physics with its controllers, and the cameras."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from pi05_lab.sim.arms import SimulatedAloha
from pi05_lab.sim.controller import JointTrajectoryController, Trajectory
from pi05_lab.sim.rendering import CameraRenderer
from pi05_ros.types import FloatArray, ImageArray

MAX_LAG_S = 0.1
"""A lag that is caught up; a longer one means that the machine is too slow, and time is lost."""


@dataclass(frozen=True)
class SimState:
    """What the arms do at one moment of the loop's clock."""

    stamp_s: float
    positions: FloatArray
    velocities: FloatArray
    qpos: FloatArray


@dataclass
class LoopStatistics:
    """How the loops keep up."""

    simulated_s: float = 0.0
    lost_s: float = 0.0
    """Wall time that physics could not follow."""
    frames: dict[str, int] = field(default_factory=dict)
    late_frames: int = 0
    """Camera rounds that were left out because the one before took too long."""

    @property
    def real_time_factor(self) -> float:
        total_s = self.simulated_s + self.lost_s
        return self.simulated_s / total_s if total_s > 0 else 1.0


class SimLoop:
    """Steps physics in real time, runs one trajectory controller per arm, renders the cameras.

    `clock_s` is the time that trajectories are stamped with: ROS time, or the simulation's own
    (`own_clock`) for a system that follows /clock.
    """

    def __init__(
        self,
        sim: SimulatedAloha,
        controllers: Mapping[str, tuple[JointTrajectoryController, Sequence[int]]],
        *,
        wall_clock_s: Callable[[], float],
        own_clock: bool,
        on_state: Callable[[SimState], None],
        joint_rate_hz: float,
        on_frame: Callable[[str, ImageArray, float], None],
        wanted_cameras: Callable[[], Sequence[str]],
        camera_rate_hz: float,
        camera_size: tuple[int, int],
        on_error: Callable[[str], None],
    ) -> None:
        self._sim = sim
        self._controllers = dict(controllers)
        self._wall_clock_s = wall_clock_s
        self._own_clock = own_clock
        self._on_state, self._on_frame = on_state, on_frame
        self._wanted_cameras = wanted_cameras
        self._timestep_s = float(sim.model.opt.timestep)
        self._steps_per_state = max(1, round(1.0 / (joint_rate_hz * self._timestep_s)))
        self._camera_period_s = 1.0 / camera_rate_hz
        self._camera_size = camera_size
        self._on_error = on_error
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._elapsed_s = 0.0
        self.statistics = LoopStatistics()
        self._latest = self._state()
        self._threads = [
            threading.Thread(target=self._guard, args=(loop,), name=name, daemon=True)
            for loop, name in ((self._physics, "physics"), (self._cameras, "cameras"))
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self, timeout_s: float = 2.0) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(timeout_s)

    @property
    def state(self) -> SimState:
        with self._lock:
            return self._latest

    def accept(self, controller: str, trajectory: Trajectory) -> None:
        """Hand a trajectory to a controller.

        Raises:
            TrajectoryRejected: as joint_trajectory_controller would reject it.
        """
        with self._lock:
            self._controllers[controller][0].accept(trajectory, self._now_s())

    def reset(self, seed: int | None) -> None:
        """Put arms and cubes back; running trajectories end."""
        with self._lock:
            self._sim.reset(seed)
            for controller, columns in self._controllers.values():
                controller.hold(self._sim.positions()[list(columns)])

    def place(self, qpos: FloatArray) -> None:
        """Put everything at `qpos` [nq], at rest; running trajectories end.

        Raises:
            ValueError: of another scene, or not finite.
        """
        with self._lock:
            self._sim.set_qpos(qpos)
            for controller, columns in self._controllers.values():
                controller.hold(self._sim.positions()[list(columns)])

    def _now_s(self) -> float:
        return self._elapsed_s if self._own_clock else self._wall_clock_s()

    def _state(self) -> SimState:
        return SimState(
            self._now_s(), self._sim.positions(), self._sim.velocities(), self._sim.qpos()
        )

    def _guard(self, loop: Callable[[], None]) -> None:
        try:
            loop()
        except Exception as error:
            if not self._stop.is_set():
                self._on_error(f"{threading.current_thread().name}: {error}")

    def _physics(self) -> None:
        period_s = self._timestep_s
        next_s = time.monotonic()
        targets = np.empty(len(self._sim.positions()))
        step = 0
        while not self._stop.is_set():
            with self._lock:
                now_s = self._now_s()
                measured = self._latest
                for controller, columns in self._controllers.values():
                    joints = list(columns)
                    targets[joints], _ = controller.update(
                        now_s, measured.positions[joints], measured.velocities[joints]
                    )
                self._sim.set_targets(targets)
                self._sim.step()
                self._elapsed_s += period_s
                self.statistics.simulated_s = self._elapsed_s
                self._latest = state = self._state()
            step += 1
            if step % self._steps_per_state == 0:
                self._on_state(state)
            next_s += period_s
            lag_s = time.monotonic() - next_s
            if lag_s > MAX_LAG_S:
                self.statistics.lost_s += lag_s
                next_s += lag_s
            elif lag_s < 0:
                self._stop.wait(-lag_s)

    def _cameras(self) -> None:
        width, height = self._camera_size
        renderer = CameraRenderer(self._sim.model, width=width, height=height, quality="fast")
        next_s = time.monotonic()
        try:
            while not self._stop.is_set():
                state = self.state
                for camera in self._wanted_cameras():
                    self._on_frame(camera, renderer.render(state.qpos, camera), state.stamp_s)
                    frames = self.statistics.frames
                    frames[camera] = frames.get(camera, 0) + 1
                next_s += self._camera_period_s
                while next_s < time.monotonic() - self._camera_period_s:
                    next_s += self._camera_period_s
                    self.statistics.late_frames += 1
                self._stop.wait(max(0.0, next_s - time.monotonic()))
        finally:
            renderer.close()
