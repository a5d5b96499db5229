"""What the policy node says of itself: ~/status and /diagnostics, from the same figures."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from diagnostic_msgs.msg import DiagnosticArray

from pi05_ros.control.latency import LatencySummary, LatencyTracker
from pi05_ros.msg import PolicyStatus
from pi05_ros.nodes.diagnostics import Level, PartStatus, diagnostic_array
from pi05_ros.nodes.messages import to_time
from pi05_ros.nodes.parameters import PolicyParameters, SchedulerParameters
from pi05_ros.runner import PolicyRunner
from pi05_ros.types import JointGroup, Policy

NOTHING_MEASURED = LatencySummary(count=0, p50_s=0.0, p95_s=0.0, p99_s=0.0, max_s=0.0)
PHASES = {
    PolicyStatus.UNCONFIGURED: "unconfigured",
    PolicyStatus.INACTIVE: "inactive",
    PolicyStatus.ACTIVE: "active",
    PolicyStatus.ERROR: "error",
}


class StatusSource(Protocol):
    """What the policy node knows of itself."""

    phase: int
    parameters: PolicyParameters
    scheduling: SchedulerParameters
    policy: Policy | None
    runner: PolicyRunner | None
    joints: JointGroup | None
    jitter: LatencyTracker
    ticks: int
    trajectories: int
    last_failure: str

    @property
    def tick_rate_hz(self) -> float: ...

    def problems(self, now_s: float) -> list[str]: ...

    def get_fully_qualified_name(self) -> str: ...


def policy_status(node: StatusSource, now_s: float) -> PolicyStatus:
    """The node's figures as pi05_ros/PolicyStatus."""
    message = PolicyStatus(state=node.phase, dry_run=node.parameters.dry_run)
    message.header.stamp = to_time(now_s)
    message.problems = node.problems(now_s)
    message.ticks, message.trajectories = node.ticks, node.trajectories
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
    message.live_chunks = runner.scheduler.live_chunks(now_s)
    message.horizon_left_s = runner.scheduler.remaining_s(now_s)
    jitter = node.jitter.summary() or NOTHING_MEASURED
    message.tick_rate_hz = node.tick_rate_hz
    message.tick_jitter_p50_s, message.tick_jitter_p99_s = jitter.p50_s, jitter.p99_s
    clamps = runner.stream.clamps
    message.joints = list(node.joints.names)
    message.clamped_position = clamps.position.tolist()
    message.clamped_velocity = clamps.velocity.tolist()
    message.clamped_acceleration = clamps.acceleration.tolist()
    return message


def policy_diagnostics(node: StatusSource, now_s: float) -> DiagnosticArray:
    """One status each for the node, cameras, joints, executor, scheduler, limits, controllers."""
    phase = PHASES[node.phase]
    level = Level.ERROR if node.phase == PolicyStatus.ERROR else Level.OK
    parts = [PartStatus("node", level, phase, {"dry run": node.parameters.dry_run})]
    if node.runner is not None and node.joints is not None:
        parts += _stream_parts(node, now_s) + _motion_parts(node, now_s)
    return diagnostic_array(node.get_fully_qualified_name(), node.parameters.robot, parts, now_s)


def _stream_parts(node: StatusSource, now_s: float) -> list[PartStatus]:
    assert node.runner is not None
    buffer = node.runner.buffer
    problems = buffer.problems(now_s)
    parts = []
    for name, camera in buffer.camera_statistics(now_s).items():
        trouble = [problem for problem in problems if name in problem]
        parts.append(
            PartStatus(
                f"camera {name}",
                Level.WARN if trouble else Level.OK,
                "; ".join(trouble) or "frames arrive",
                {"received": camera.received, "rate Hz": camera.rate_hz, "age s": camera.age_s},
            )
        )
    others = [p for p in problems if not any(name in p for name in buffer.camera_names)]
    parts.append(
        PartStatus(
            "joints and instruction", Level.WARN if others else Level.OK, "; ".join(others) or "ok"
        )
    )
    return parts


def _motion_parts(node: StatusSource, now_s: float) -> list[PartStatus]:
    runner, joints = node.runner, node.joints
    assert runner is not None and joints is not None
    executor, scheduler = runner.executor.statistics, runner.scheduler.statistics
    latency = runner.latency.summary() or NOTHING_MEASURED
    clamps = runner.stream.clamps
    totals = clamps.position + clamps.velocity + clamps.acceleration
    deaf = [p for p in node.problems(now_s) if "nobody listens" in p]
    return [
        PartStatus(
            "executor",
            Level.WARN if node.last_failure else Level.OK,
            node.last_failure or runner.executor.state.name.lower(),
            {
                "inferences": executor.completed,
                "failed": executor.failed,
                "discarded": executor.discarded,
                "latency p50 s": latency.p50_s,
                "latency p95 s": latency.p95_s,
                "latency p99 s": latency.p99_s,
            },
        ),
        PartStatus(
            "scheduler",
            Level.OK,
            node.scheduling.method,
            {
                "live chunks": runner.scheduler.live_chunks(now_s),
                "horizon left s": runner.scheduler.remaining_s(now_s),
                "received": scheduler.received,
                "dropped late": scheduler.dropped_late,
                "dropped old": scheduler.dropped_old,
                "dropped busy": scheduler.dropped_busy,
                "doubted": scheduler.dropped_doubted,
                "crossovers": scheduler.crossovers,
                "delay estimate s": runner.latency.estimate_s or 0.0,
                "speed scale": runner.speed_scale,
                "smoothing lag s": runner.follower.lag_s if runner.follower else 0.0,
            },
        ),
        PartStatus(
            "limits",
            Level.OK,
            f"{int(np.sum(totals))} clamped joint commands",
            {name: int(count) for name, count in zip(joints.names, totals, strict=True)},
        ),
        PartStatus(
            "controllers",
            Level.ERROR if deaf else Level.OK,
            "; ".join(deaf) or "listening",
            {"trajectories": node.trajectories},
        ),
    ]
