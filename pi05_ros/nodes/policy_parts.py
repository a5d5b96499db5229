"""The policy node's parts on /diagnostics, from the figures of ~/status."""

from __future__ import annotations

from collections.abc import Sequence

from diagnostic_msgs.msg import DiagnosticArray

from pi05_ros.msg import PolicyStatus
from pi05_ros.nodes.assembly import device_memory_mb
from pi05_ros.nodes.diagnostics import Level, PartStatus, diagnostic_array
from pi05_ros.nodes.status import NOTHING_MEASURED, StatusSource
from pi05_ros.runner import PolicyRunner

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
            "smoothing lag s": runner.follower.lag_s if runner.follower else 0.0,
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
