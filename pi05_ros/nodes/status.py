"""What the policy node says of itself on ~/status, and when.

The policy node's parts on /diagnostics, from the figures of ~/status.

/diagnostics in the conventions of diagnostic_updater: one status per part of the node.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Protocol

from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue

from pi05_ros.config import LimitsParameters, PolicyParameters, SchedulerParameters
from pi05_ros.control.latency import LatencySummary
from pi05_ros.msg import PolicyStatus
from pi05_ros.nodes.assembly import device_memory_mb
from pi05_ros.nodes.control_thread import ControlThread
from pi05_ros.nodes.inputs import Inputs
from pi05_ros.nodes.messages import to_time
from pi05_ros.runner import PolicyRunner
from pi05_ros.types import JointGroup, Policy

PHASES = {
    PolicyStatus.UNCONFIGURED: "unconfigured",
    PolicyStatus.INACTIVE: "inactive",
    PolicyStatus.ACTIVE: "active",
    PolicyStatus.ERROR: "error",
    PolicyStatus.FINALIZED: "shut down",
}


def policy_diagnostics(
    node: StatusSource, problems: Sequence[str], now_s: float
) -> DiagnosticArray:
    """One status each for the node, its cameras, joints, instruction, executor and so on.

    `problems` are the node's; each part shows those that are about it.
    """
    parts = [_node_part(node, problems)]
    if node.runner is not None and node.inputs is not None:
        parts += _camera_parts(node, node.runner, problems, now_s)
        parts += [
            _joint_part(node, node.runner, problems, now_s),
            _tracking_part(node, node.runner, problems),
            _plain_part("instruction", node.runner.buffer.instruction or "", problems, Level.WARN),
            _executor_part(node, node.runner, problems),
            _scheduler_part(node, node.runner, problems, now_s),
            _limits_part(node, node.runner),
            _controllers_part(node, problems),
            _plain_part("topic", "QoS fits", problems, Level.ERROR, shown="topics"),
        ]
    return diagnostic_array(node.get_name(), node.parameters.robot, parts, now_s)


def _about(problems: Sequence[str], *beginnings: str) -> list[str]:
    return [problem for problem in problems if problem.startswith(beginnings)]


def _node_part(node: StatusSource, problems: Sequence[str]) -> PartStatus:
    level, words = Level.OK, [PHASES[node.phase]]
    stopped = _about(problems, "stopped:")
    if stopped or node.stopped:
        by_itself = node.runner is not None and node.runner.stop_reason
        level = Level.ERROR if by_itself else Level.WARN
        words += stopped or ["stopped: ~/resume ends it"]
    if node.fault or node.phase == PolicyStatus.ERROR:
        level = Level.ERROR
        words.append(node.fault)
    return PartStatus(
        "node",
        level,
        "; ".join(word for word in words if word),
        {
            "dry run": node.parameters.dry_run,
            "stopped": bool(stopped or node.stopped),
            "control rate Hz": node.control.tick_times.rate_hz,
        },
    )


def _plain_part(
    about: str, fine: str, problems: Sequence[str], level: Level, shown: str = ""
) -> PartStatus:
    trouble = _about(problems, f"{about} ", f"{about}:")
    return PartStatus(shown or about, level if trouble else Level.OK, "; ".join(trouble) or fine)


def _camera_parts(
    node: StatusSource, runner: PolicyRunner, problems: Sequence[str], now_s: float
) -> list[PartStatus]:
    parts = []
    changes = runner.buffer.size_changes
    about_cameras = _about(problems, "camera")
    for name, camera in runner.buffer.camera_statistics(now_s).items():
        trouble = [problem for problem in about_cameras if f"'{name}'" in problem]
        level = node.escalation.level(f"camera {name}", bool(trouble))
        if name in changes:
            level = max(level, Level.WARN)
            trouble.append(changes[name])
        parts.append(
            PartStatus(
                f"camera {name}",
                level,
                "; ".join(trouble) or "frames arrive",
                {
                    "received": camera.received,
                    "used": camera.used,
                    "lost": camera.lost,
                    "rate Hz": camera.rate_hz,
                    "age s": camera.age_s,
                    "clock jumps": camera.clock_jumps,
                },
            )
        )
    return parts


def _joint_part(
    node: StatusSource, runner: PolicyRunner, problems: Sequence[str], now_s: float
) -> PartStatus:
    assert node.inputs is not None
    trouble = _about(problems, "joint")
    joints = runner.buffer.joint_statistics(now_s)
    return PartStatus(
        "joints",
        node.escalation.level("joints", bool(trouble)),
        "; ".join(trouble) or "positions arrive",
        {
            "received": joints.received,
            "refused": node.inputs.refused_joint_states,
            "rate Hz": joints.rate_hz,
            "age s": joints.age_s,
            "clock jumps": joints.clock_jumps,
        },
    )


def _tracking_part(node: StatusSource, runner: PolicyRunner, problems: Sequence[str]) -> PartStatus:
    """Commanded against measured positions, and why no motion may start at the measured ones."""
    assert node.joints is not None
    trouble = _about(problems, "tracking:", "start:")
    level = node.escalation.level("tracking", bool(trouble))
    if runner.stop_reason:
        level, trouble = Level.ERROR, [runner.stop_reason, *trouble]
    return PartStatus(
        "tracking",
        level,
        "; ".join(trouble) or "the arms follow",
        {
            "delay s": runner.tracking.delay_s,
            **{
                f"{name} error of limit": f"{error:.3g} of {limit:.3g}"
                for name, error, limit in zip(
                    node.joints.names, runner.tracking.errors, runner.tracking.limits, strict=True
                )
            },
        },
    )


def _executor_part(node: StatusSource, runner: PolicyRunner, problems: Sequence[str]) -> PartStatus:
    statistics = runner.executor.statistics
    latency = runner.latency.summary() or NOTHING_MEASURED
    network = runner.network_latency.summary() or NOTHING_MEASURED
    start = runner.start_wait.summary() or NOTHING_MEASURED
    publish = runner.publish_wait.summary() or NOTHING_MEASURED
    truncated = int(getattr(node.policy, "truncated_tokens", 0))
    hang = _about(problems, "policy:")
    words = hang or [word for word in (node.fault, node.control.last_failure) if word][:1]
    if truncated:
        words = [*words, f"the prompt lost {truncated} tokens, shorten the instruction"]
    level = Level.ERROR if hang or node.fault else Level.WARN if words else Level.OK
    return PartStatus(
        "executor",
        level,
        "; ".join(words) or runner.executor.state.value,
        {
            "inferences": statistics.completed,
            "failed": statistics.failed,
            "discarded": statistics.discarded,
            "hangs": runner.watchdog.hangs if runner.watchdog else 0,
            "misses": runner.misses,
            "latency p50 s": latency.p50_s,
            "latency p95 s": latency.p95_s,
            "latency p99 s": latency.p99_s,
            "network p50 s": network.p50_s,
            "start wait p50 s": start.p50_s,
            "start wait p99 s": start.p99_s,
            "publish wait p50 s": publish.p50_s,
            "publish wait p99 s": publish.p99_s,
            "reaction to instruction s": runner.reaction_s or 0.0,
            **device_memory_mb(),
        },
    )


def _scheduler_part(
    node: StatusSource, runner: PolicyRunner, problems: Sequence[str], now_s: float
) -> PartStatus:
    statistics = runner.scheduler.statistics
    refused = _about(problems, "first command")
    held = _about(problems, "speed")
    return PartStatus(
        "scheduler",
        Level.ERROR if refused else Level.WARN if held else Level.OK,
        "; ".join(refused + held) or node.scheduling.method,
        {
            "live chunks": runner.live_chunks(now_s),
            "horizon left s": runner.horizon_left_s(now_s),
            "received": statistics.received,
            "dropped late": statistics.dropped_late,
            "dropped old": statistics.dropped_old,
            "dropped busy": statistics.dropped_busy,
            "doubted": statistics.dropped_doubted,
            "crossovers": statistics.crossovers,
            "delay estimate s": runner.latency.estimate_s or 0.0,
            "speed scale": runner.pace.scale,
            "smoothing lag s": runner.low_pass.lag_s if runner.low_pass else 0.0,
        },
    )


def _limits_part(node: StatusSource, runner: PolicyRunner) -> PartStatus:
    assert node.joints is not None
    clamps = runner.stream.clamps
    kinds = {name: getattr(clamps, name) for name in ("position", "velocity", "acceleration")}
    totals = sum(kinds.values())
    values: dict[str, object] = {"source": node.limits.source}
    values.update({f"{kind} clamps": int(counts.sum()) for kind, counts in kinds.items()})
    values["held"] = int(clamps.held.sum())
    values.update(zip(node.joints.names, (int(total) for total in totals), strict=True))
    return PartStatus("limits", Level.OK, f"{int(totals.sum())} clamped joint commands", values)


def _controllers_part(node: StatusSource, problems: Sequence[str]) -> PartStatus:
    trouble = _about(problems, "controllers:", "publishers:")
    return PartStatus(
        "controllers",
        Level.ERROR if trouble else Level.OK,
        "; ".join(trouble) or "subscribed",
        {
            "messages": node.control.trajectories,
            "too late, not sent": node.control.late,
            **{
                f"{output.topic} subscribers": ", ".join(output.subscriber_names)
                for output in node.control.outputs.values()
            },
        },
    )


class Level(IntEnum):
    """diagnostic_msgs/DiagnosticStatus levels."""

    OK = 0
    WARN = 1
    ERROR = 2
    STALE = 3


@dataclass(frozen=True)
class PartStatus:
    """How one part of the node does."""

    part: str
    level: Level
    message: str
    values: Mapping[str, object] = field(default_factory=dict)


def diagnostic_array(
    node_name: str, hardware_id: str, parts: Iterable[PartStatus], stamp_s: float
) -> DiagnosticArray:
    """`<node>: <part>` for each part, values as text."""
    array = DiagnosticArray()
    array.header.stamp = to_time(stamp_s)
    for part in parts:
        status = DiagnosticStatus(
            level=bytes([part.level]),
            name=f"{node_name}: {part.part}",
            message=part.message,
            hardware_id=hardware_id,
        )
        status.values = [
            KeyValue(key=key, value=f"{value:.6g}" if isinstance(value, float) else str(value))
            for key, value in part.values.items()
        ]
        array.status.append(status)
    return array


class Escalation:
    """Trouble is a WARN at first, and an ERROR once it has lasted."""

    def __init__(self, after_s: float) -> None:
        self._after_s = after_s
        self._since_s: dict[str, float] = {}

    def level(self, part: str, trouble: bool) -> Level:
        """The level of `part`; to be asked at every status."""
        if not trouble:
            self._since_s.pop(part, None)
            return Level.OK
        now_s = time.monotonic()
        lasted_s = now_s - self._since_s.setdefault(part, now_s)
        return Level.ERROR if lasted_s >= self._after_s else Level.WARN


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
