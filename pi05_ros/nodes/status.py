"""~/status and /diagnostics of the policy node.

/diagnostics follows diagnostic_updater: one status per part of the node.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from rclpy.node import Node

from pi05_ros.config import PolicyParameters
from pi05_ros.msg import PolicyStatus
from pi05_ros.nodes.assembly import device_memory_mb
from pi05_ros.nodes.control_thread import ControlThread
from pi05_ros.nodes.inputs import Inputs
from pi05_ros.nodes.messages import to_time
from pi05_ros.robot_config import RobotConfig
from pi05_ros.runner import PolicyRunner
from pi05_ros.types import Level, Policy, Problem

PHASES = {
    PolicyStatus.UNCONFIGURED: "unconfigured",
    PolicyStatus.INACTIVE: "inactive",
    PolicyStatus.ACTIVE: "active",
    PolicyStatus.ERROR: "error",
    PolicyStatus.FINALIZED: "shut down",
}
CHECK_PERIOD_S = 0.1
STOPPED = Problem("stopped", "stopped: ~/resume ends it")


@dataclass(frozen=True)
class PartStatus:
    """One status of /diagnostics."""

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
        values = [
            KeyValue(key=key, value=f"{value:.6g}" if isinstance(value, float) else str(value))
            for key, value in part.values.items()
        ]
        status = DiagnosticStatus(
            name=f"{node_name}: {part.part}", message=part.message, hardware_id=hardware_id
        )
        status.level, status.values = bytes([part.level]), values
        array.status.append(status)
    return array


class Escalation:
    """A problem is a WARN at first, and an ERROR once it has lasted `after_s`."""

    def __init__(self, after_s: float) -> None:
        self._after_s = after_s
        self._since_s: dict[str, float] = {}

    def level(self, part: str, has_problem: bool) -> Level:
        """The level of `part`; called for each status."""
        if not has_problem:
            self._since_s.pop(part, None)
            return Level.OK
        now_s = time.monotonic()
        lasted_s = now_s - self._since_s.setdefault(part, now_s)
        return Level.ERROR if lasted_s >= self._after_s else Level.WARN


@dataclass(frozen=True)
class Configured:
    """What `configure` has built and `cleanup` drops."""

    policy: Policy
    robot: RobotConfig
    runner: PolicyRunner
    inputs: Inputs
    escalation: Escalation


@dataclass(frozen=True)
class Snapshot:
    """The node at the time of one status."""

    now_s: float
    phase: int
    problems: Sequence[Problem]
    fault: str
    stopped: bool
    parameters: PolicyParameters
    method: str
    """Of the scheduler."""
    control: ControlThread
    configured: Configured | None

    def about(self, *parts: str, name: str | None = None) -> list[Problem]:
        """The problems of `parts`, or those of them that concern the camera `name`."""
        return [p for p in self.problems if p.part in parts and (name is None or name in p.names)]


class StatusPublisher:
    """Publishes at a rate, and at once when a problem or the phase comes or goes."""

    def __init__(self, node: Node, rate_hz: float) -> None:
        self.check_period_s = min(CHECK_PERIOD_S, 1.0 / rate_hz)
        self._name = node.get_name()
        self._period_s = 1.0 / rate_hz
        self._published_s = float("-inf")
        self._shown: object = None
        self._status = node.create_publisher(PolicyStatus, "~/status", 10)
        self._diagnostics = node.create_publisher(DiagnosticArray, "/diagnostics", 10)

    def due(self, phase: int, problems: Sequence[Problem]) -> bool:
        """Whether to publish; called every `check_period_s`."""
        left_s = self._published_s + self._period_s - time.monotonic()
        return left_s < self.check_period_s / 2 or self._shown != _kinds(phase, problems)

    def publish(self, node: Snapshot) -> None:
        self._published_s, self._shown = time.monotonic(), _kinds(node.phase, node.problems)
        with node.control.lock:
            status, diagnostics = policy_status(node), policy_diagnostics(node, self._name)
        self._status.publish(status)
        self._diagnostics.publish(diagnostics)


def _kinds(phase: int, problems: Sequence[Problem]) -> object:
    """The texts are left out: their figures change all the time."""
    return phase, frozenset((problem.part, problem.names) for problem in problems)


def policy_status(node: Snapshot) -> PolicyStatus:
    """The node's figures as pi05_ros/PolicyStatus."""
    ticks = node.control.tick_times
    message = PolicyStatus(
        state=node.phase,
        dry_run=node.parameters.dry_run,
        problems=[problem.text for problem in node.problems],
        ticks=ticks.ticks,
        trajectories=node.control.trajectories,
        scheduler=node.method,
    )
    message.header.stamp = to_time(node.now_s)
    if node.configured is None:
        return message
    runner = node.configured.runner
    message.policy = node.configured.policy.description
    message.instruction = runner.buffer.instruction or ""
    for name, camera in runner.buffer.camera_statistics(node.now_s).items():
        message.cameras.append(name)
        message.frames_received.append(camera.received)
        message.frame_rate_hz.append(camera.rate_hz)
        message.frame_age_s.append(camera.age_s)
    executor, scheduler = runner.executor.statistics, runner.scheduler.statistics
    message.inferences, message.inference_failures = executor.completed, executor.failed
    latency = runner.latency.summary()
    network = runner.network_latency.summary()
    message.latency_p50_s, message.latency_p95_s = latency.p50_s, latency.p95_s
    message.latency_p99_s, message.network_p50_s = latency.p99_s, network.p50_s
    message.chunks_received, message.chunks_used = scheduler.received, scheduler.used
    message.chunks_dropped = scheduler.received - scheduler.used
    message.live_chunks = runner.live_chunks(node.now_s)
    message.horizon_left_s = runner.horizon_left_s(node.now_s)
    jitter = ticks.jitter.summary()
    message.tick_rate_hz = ticks.rate_hz
    message.tick_jitter_p50_s, message.tick_jitter_p99_s = jitter.p50_s, jitter.p99_s
    clamps = runner.stream.clamps
    message.joints = list(node.configured.robot.joints.names)
    message.clamped_position = clamps.position.tolist()
    message.clamped_velocity = clamps.velocity.tolist()
    message.clamped_acceleration = clamps.acceleration.tolist()
    return message


def policy_diagnostics(node: Snapshot, name: str) -> DiagnosticArray:
    """One status each for the node, its cameras, joints, instruction, executor and so on."""
    parts = [_node_part(node)]
    configured = node.configured
    if configured is not None:
        instruction = configured.runner.buffer.instruction or ""
        parts += [
            *_camera_parts(node, configured),
            _joint_part(node, configured),
            _tracking_part(node, configured),
            _part("instruction", node.about("instruction"), instruction, {}),
            _executor_part(node, configured),
            _scheduler_part(node, configured.runner),
            _limits_part(configured),
            _controllers_part(node),
            _part("topics", node.about("topic"), "QoS fits", {}),
        ]
    return diagnostic_array(name, node.parameters.robot, parts, node.now_s)


def _part(
    part: str,
    problems: Sequence[Problem],
    fine: str,
    values: Mapping[str, object],
    level: Level | None = None,
) -> PartStatus:
    """The problems' texts and worst level, or `fine`."""
    if level is None:
        level = max((problem.level for problem in problems), default=Level.OK)
    return PartStatus(part, level, "; ".join(p.text for p in problems) or fine, values)


def _node_part(node: Snapshot) -> PartStatus:
    stopped = node.about("stopped") or ([STOPPED] if node.stopped else [])
    level = max((problem.level for problem in stopped), default=Level.OK)
    if node.fault or node.phase == PolicyStatus.ERROR:
        level = Level.ERROR
    words = [PHASES[node.phase], *(problem.text for problem in stopped), node.fault]
    values = {
        "dry run": node.parameters.dry_run,
        "stopped": bool(stopped),
        "control rate Hz": node.control.tick_times.rate_hz,
    }
    return PartStatus("node", level, "; ".join(filter(None, words)), values)


def _camera_parts(node: Snapshot, configured: Configured) -> Iterator[PartStatus]:
    buffer = configured.runner.buffer
    for name, camera in buffer.camera_statistics(node.now_s).items():
        problems = node.about("camera", name=name)
        level = configured.escalation.level(f"camera {name}", bool(problems))
        if name in buffer.size_changes:
            level = max(level, Level.WARN)
            problems.append(Problem("camera", buffer.size_changes[name]))
        values = {
            "received": camera.received,
            "used": camera.used,
            "lost": camera.lost,
            "rate Hz": camera.rate_hz,
            "age s": camera.age_s,
            "clock jumps": camera.clock_jumps,
        }
        yield _part(f"camera {name}", problems, "frames arrive", values, level)


def _joint_part(node: Snapshot, configured: Configured) -> PartStatus:
    problems = node.about("joints")
    joints = configured.runner.buffer.joint_statistics(node.now_s)
    values = {
        "received": joints.received,
        "refused": configured.inputs.refused_joint_states,
        "rate Hz": joints.rate_hz,
        "age s": joints.age_s,
        "clock jumps": joints.clock_jumps,
    }
    level = configured.escalation.level("joints", bool(problems))
    return _part("joints", problems, "positions arrive", values, level)


def _tracking_part(node: Snapshot, configured: Configured) -> PartStatus:
    """Commanded against measured positions, and why no motion may start at the measured ones."""
    problems = node.about("tracking", "start")
    level = configured.escalation.level("tracking", bool(problems))
    stop_reason, tracking = configured.runner.stop_reason, configured.runner.tracking
    if stop_reason:
        level, problems = Level.ERROR, [Problem("tracking", stop_reason), *problems]
    values: dict[str, object] = {"delay s": tracking.delay_s}
    names = configured.robot.joints.names
    for name, error, limit in zip(names, tracking.errors, tracking.limits, strict=True):
        values[f"{name} error of limit"] = f"{error:.3g} of {limit:.3g}"
    return _part("tracking", problems, "the arms follow", values, level)


def _executor_part(node: Snapshot, configured: Configured) -> PartStatus:
    runner = configured.runner
    statistics = runner.executor.statistics
    trackers = (runner.latency, runner.network_latency, runner.start_wait, runner.publish_wait)
    latency, network, start, publish = (tracker.summary() for tracker in trackers)
    problems = node.about("policy")
    failure = node.fault or node.control.last_failure
    if failure and not problems:
        problems.append(Problem("policy", failure, Level.ERROR if node.fault else Level.WARN))
    truncated = int(getattr(configured.policy, "truncated_tokens", 0))
    if truncated:
        text = f"the prompt lost {truncated} tokens, shorten the instruction"
        problems.append(Problem("policy", text))
    values = {
        "inferences": statistics.completed,
        "failed": statistics.failed,
        "discarded": statistics.discarded,
        "hangs": runner.watchdog.hangs,
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
    }
    level = Level.ERROR if node.fault else None
    return _part("executor", problems, runner.executor.state.value, values, level)


def _scheduler_part(node: Snapshot, runner: PolicyRunner) -> PartStatus:
    statistics = runner.scheduler.statistics
    values = {
        "live chunks": runner.live_chunks(node.now_s),
        "horizon left s": runner.horizon_left_s(node.now_s),
        "received": statistics.received,
        "dropped late": statistics.dropped_late,
        "dropped old": statistics.dropped_old,
        "dropped busy": statistics.dropped_busy,
        "doubted": statistics.dropped_doubted,
        "crossovers": statistics.crossovers,
        "delay estimate s": runner.latency.estimate_s or 0.0,
        "speed scale": runner.pace.scale,
        "smoothing lag s": runner.low_pass.lag_s if runner.low_pass else 0.0,
    }
    problems = [*node.about("first command"), *node.about("speed")]
    return _part("scheduler", problems, node.method, values)


def _limits_part(configured: Configured) -> PartStatus:
    clamps = configured.runner.stream.clamps
    totals = clamps.position + clamps.velocity + clamps.acceleration
    values = {
        "source": configured.robot.limits.source,
        "position clamps": int(clamps.position.sum()),
        "velocity clamps": int(clamps.velocity.sum()),
        "acceleration clamps": int(clamps.acceleration.sum()),
        "held": int(clamps.held.sum()),
        **dict(zip(configured.robot.joints.names, totals.tolist(), strict=True)),
    }
    return _part("limits", [], f"{int(totals.sum())} clamped joint commands", values)


def _controllers_part(node: Snapshot) -> PartStatus:
    control = node.control
    values: dict[str, object] = {
        "messages": control.trajectories,
        "too late, not sent": control.late,
    }
    for output in control.outputs.values():
        values[f"{output.topic} subscribers"] = ", ".join(output.subscriber_names)
    return _part("controllers", node.about("controllers", "publishers"), "subscribed", values)
