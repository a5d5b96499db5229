"""What the policy node says of itself on ~/status, and when."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

from pi05_ros.config import LimitsParameters, PolicyParameters, SchedulerParameters
from pi05_ros.control.latency import LatencySummary
from pi05_ros.msg import PolicyStatus
from pi05_ros.nodes.control_thread import ControlThread
from pi05_ros.nodes.diagnostics import Escalation
from pi05_ros.nodes.inputs import Inputs
from pi05_ros.nodes.messages import to_time
from pi05_ros.runner import PolicyRunner
from pi05_ros.types import JointGroup, Policy

NOTHING_MEASURED = LatencySummary(count=0, p50_s=0.0, p95_s=0.0, p99_s=0.0, max_s=0.0)
LOOK_PERIOD_S = 0.1


class StatusSource(Protocol):
    """What the policy node knows of itself."""

    phase: int
    parameters: PolicyParameters
    scheduling: SchedulerParameters
    limits: LimitsParameters
    policy: Policy | None
    joints: JointGroup | None
    inputs: Inputs | None
    escalation: Escalation
    control: ControlThread
    fault: str
    stopped: bool

    @property
    def runner(self) -> PolicyRunner | None: ...

    def get_name(self) -> str: ...


class StatusTimes:
    """A status is due at its rate, and at once when a problem comes or goes."""

    def __init__(self, rate_hz: float) -> None:
        self.look_period_s = min(LOOK_PERIOD_S, 1.0 / rate_hz)
        self._period_s = 1.0 / rate_hz
        self._published_s = float("-inf")
        self._shown: tuple[int, frozenset[str]] | None = None

    def due(self, phase: int, problems: Sequence[str]) -> bool:
        """Whether to publish; asked every `look_period_s`."""
        left_s = self._published_s + self._period_s - time.monotonic()
        return left_s < self.look_period_s / 2 or self._shown != _kinds(phase, problems)

    def published(self, phase: int, problems: Sequence[str]) -> None:
        self._published_s = time.monotonic()
        self._shown = _kinds(phase, problems)


def _kinds(phase: int, problems: Sequence[str]) -> tuple[int, frozenset[str]]:
    """What a problem is about stands before its colon; the figures behind it change steadily."""
    return phase, frozenset(problem.split(":")[0] for problem in problems)


def policy_status(node: StatusSource, problems: Sequence[str], now_s: float) -> PolicyStatus:
    """The node's figures as pi05_ros/PolicyStatus."""
    message = PolicyStatus(state=node.phase, dry_run=node.parameters.dry_run)
    message.header.stamp = to_time(now_s)
    message.problems = list(problems)
    message.ticks, message.trajectories = node.control.tick_times.ticks, node.control.trajectories
    message.scheduler = node.scheduling.method
    runner = node.runner
    if runner is None or node.policy is None or node.joints is None:
        return message
    message.policy = node.policy.description
    message.instruction = runner.buffer.instruction or ""
    for name, camera in runner.buffer.camera_statistics(now_s).items():
        message.cameras.append(name)
        message.frames_received.append(camera.received)
        message.frame_rate_hz.append(camera.rate_hz)
        message.frame_age_s.append(camera.age_s)
    executor, scheduler = runner.executor.statistics, runner.scheduler.statistics
    message.inferences, message.inference_failures = executor.completed, executor.failed
    latency = runner.latency.summary() or NOTHING_MEASURED
    network = runner.network_latency.summary() or NOTHING_MEASURED
    message.latency_p50_s, message.latency_p95_s = latency.p50_s, latency.p95_s
    message.latency_p99_s, message.network_p50_s = latency.p99_s, network.p50_s
    message.chunks_received, message.chunks_used = scheduler.received, scheduler.used
    message.chunks_dropped = scheduler.received - scheduler.used
    message.live_chunks = runner.live_chunks(now_s)
    message.horizon_left_s = runner.horizon_left_s(now_s)
    jitter = node.control.tick_times.jitter() or NOTHING_MEASURED
    message.tick_rate_hz = node.control.tick_times.rate_hz
    message.tick_jitter_p50_s, message.tick_jitter_p99_s = jitter.p50_s, jitter.p99_s
    clamps = runner.stream.clamps
    message.joints = list(node.joints.names)
    message.clamped_position = clamps.position.tolist()
    message.clamped_velocity = clamps.velocity.tolist()
    message.clamped_acceleration = clamps.acceleration.tolist()
    return message
