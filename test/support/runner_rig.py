"""A runner with its parts on a clock of its own, and arms that follow what it commands."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from pi05_ros.control.limits import MotionLimiter
from pi05_ros.control.scheduler import make_scheduler
from pi05_ros.control.start_check import StartCheck
from pi05_ros.control.tracking import TrackingMonitor
from pi05_ros.control.trajectory import CommandStream, TrajectoryPoints
from pi05_ros.executor import InferenceExecutor
from pi05_ros.observation.buffer import CameraStream, Gates, ObservationBuffer
from pi05_ros.runner import PolicyRunner, Tick
from pi05_ros.types import ActionChunk, ActionPrefix, JointGroup, JointSpec, Observation

DT_S = 0.02
HOME = np.array([0.1, 0.03])


class ScriptedPolicy:
    """Predicts one constant target, in policy units; waits for `gate` when it has one."""

    horizon, dt_s, state_dim, action_dim = 50, DT_S, 2, 2
    cameras = ("top",)
    description = "scripted"

    def __init__(self) -> None:
        self.target = np.array([0.5, 1.0])
        self.gate: threading.Event | None = None
        self.seen: list[Observation] = []
        self.prefixes: list[ActionPrefix | None] = []
        self.fail = False

    def infer(self, observation: Observation, prefix: ActionPrefix | None = None) -> ActionChunk:
        if observation.stamp_s > 0:  # not the warm-up
            self.seen.append(observation)
            self.prefixes.append(prefix)
            if self.gate is not None:
                self.gate.wait(5.0)
        if self.fail:
            raise RuntimeError("out of luck")
        return ActionChunk(
            np.tile(self.target, (self.horizon, 1)),
            observation.stamp_s,
            self.dt_s,
            observation.instruction,
        )


class Rig:
    """A runner with its parts, and a perfect servo, driven by a clock of its own."""

    def __init__(self) -> None:
        self.policy = ScriptedPolicy()
        self.joints = JointGroup(
            [
                JointSpec("elbow", -1.0, 1.0, 2.0, 10.0),
                JointSpec("grip", 0.0, 0.06, 0.2, 2.0, 0.04, 0.02, gripper=True),
            ]
        )
        self.executor = InferenceExecutor(lambda: self.policy)
        self.executor.start()
        self.executor.wait_ready(10.0)
        self.buffer = ObservationBuffer([CameraStream("top")], self.joints.names, Gates())
        self.stream = CommandStream(MotionLimiter(self.joints, DT_S))
        self.runner = self.make_runner()
        self.now_s = 100.0
        self.measured = HOME
        self.drives_on = True

    def make_runner(self, **options: Any) -> PolicyRunner:
        return PolicyRunner(
            self.buffer,
            self.executor,
            make_scheduler("temporal_ensemble", gripper=self.joints.gripper),
            self.stream,
            self.joints,
            lambda message: message,
            **{
                "start_check": StartCheck(self.joints),
                "tracking": TrackingMonitor(self.joints),
                **options,
            },
        )

    def activate(self, instruction: str = "wave") -> None:
        self.runner.set_instruction(instruction)
        self.runner.activate()

    def start(self, instruction: str = "wave") -> TrajectoryPoints:
        """Activate and wait for the first trajectory."""
        self.activate(instruction)
        return self.trajectory()

    def trajectory(self, ticks: int = 300) -> TrajectoryPoints:
        """The next trajectory."""
        trajectory = self.until(lambda tick: tick.trajectory is not None, ticks).trajectory
        assert trajectory is not None
        return trajectory

    def feel(self) -> None:
        """A joint state at the present time."""
        if self.drives_on and self.stream.rest_time_s > 0:
            self.measured = self.stream.commanded(self.now_s).position
        self.buffer.put_joints(self.now_s, self.measured)

    def see(self) -> None:
        """A frame and a joint state at the present time."""
        self.feel()
        self.buffer.put_image("top", self.now_s, np.zeros((4, 4, 3), np.uint8))

    def tick(self, see: bool = True, feel: bool = True) -> Tick:
        """The next tick, with a new frame or without, with a new joint state or without."""
        self.now_s += DT_S
        if see:
            self.see()
        elif feel:
            self.feel()
        return self.runner.tick(self.now_s)

    def until(
        self,
        condition: Callable[[Tick], Any],
        ticks: int = 300,
        see: bool = True,
        feel: bool = True,
    ) -> Tick:
        for _ in range(ticks):
            tick = self.tick(see, feel)
            if condition(tick):
                return tick
            time.sleep(0.002)
        raise AssertionError("it did not happen")

    def problems(self) -> list[str]:
        return [problem.text for problem in self.runner.problems(self.now_s)]

    def close(self) -> None:
        if self.policy.gate is not None:
            self.policy.gate.set()
        self.executor.stop(5.0)
