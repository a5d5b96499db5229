"""What the demo saw of a run on the wire, and whether it was a good one."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from rich.table import Table

from pi05_ros.types import FloatArray

MIN_TRAVEL_RAD = 0.05
"""Less than this from every joint of an arm, and the arm has not moved."""
MAX_TRACKING_RMS_RAD = 0.08
MAX_LAG_S = 0.2
"""The largest delay between command and servo that the tracking error is freed from."""


@dataclass(frozen=True)
class CameraCount:
    """Frames of one camera, counted by the one who sent and the one who received."""

    published: int
    received: int
    rate_hz: float

    @property
    def lost(self) -> int:
        return self.published - self.received


@dataclass
class DemoRecord:
    """Everything that the report shows. Times are seconds of the ROS clock."""

    joint_names: list[str]
    instructions: list[tuple[float, str]] = field(default_factory=list)
    outcomes: list[str] = field(default_factory=list)
    """One line for each instruction, where it can be judged."""
    measured_s: list[float] = field(default_factory=list)
    measured: list[list[float]] = field(default_factory=list)
    """Joint positions, rad and m, at `measured_s`."""
    commanded_s: dict[str, list[float]] = field(default_factory=dict)
    commanded: dict[str, list[list[float]]] = field(default_factory=dict)
    """By controller: the first point of every trajectory, when it is due."""
    controller_joints: dict[str, list[str]] = field(default_factory=dict)
    chunks: list[tuple[float, float, float]] = field(default_factory=list)
    """Arrival, observation stamp, latency."""
    qpos_s: list[float] = field(default_factory=list)
    qpos: list[list[float]] = field(default_factory=list)
    """The simulator's whole state, from which the video is drawn."""
    cameras: dict[str, CameraCount] = field(default_factory=dict)
    policy: str = ""
    latency_s: tuple[float, float, float] = (0.0, 0.0, 0.0)
    network_s: float = 0.0
    inferences: int = 0
    inference_failures: int = 0
    chunks_received: int = 0
    chunks_used: int = 0
    chunks_dropped: int = 0
    command_rate_hz: float = 0.0
    jitter_s: tuple[float, float] = (0.0, 0.0)
    clamped: dict[str, int] = field(default_factory=dict)
    real_time_factor: float = 1.0
    trajectories_rejected: int = 0
    rejection: str = ""
    problems: list[str] = field(default_factory=list)
    """What the policy node or a process complained about."""

    def measured_between(self) -> tuple[FloatArray, FloatArray]:
        """Times [n] and positions [n, n_joints] from the first instruction on."""
        times = np.array(self.measured_s)
        positions = np.array(self.measured).reshape(len(times), len(self.joint_names))
        start_s = self.instructions[0][0] if self.instructions else -np.inf
        kept = times >= start_s
        return times[kept], positions[kept]

    def commanded_joint(self, name: str) -> tuple[FloatArray, FloatArray]:
        """Times [n] and positions [n] of one joint's commands."""
        for controller, joints in self.controller_joints.items():
            if name in joints and self.commanded_s.get(controller):
                column = joints.index(name)
                rows = np.array(self.commanded[controller])
                return np.array(self.commanded_s[controller]), rows[:, column]
        return np.empty(0), np.empty(0)


@dataclass(frozen=True)
class Tracking:
    """How the measured joints followed the commanded ones."""

    lag_s: float
    rms_rad: float
    max_rad: float


def tracking(record: DemoRecord) -> Tracking | None:
    """Error of the arm joints after the servo's own lag, the same for all; None without commands.

    The lag is the shift in 0 … `MAX_LAG_S` with the smallest error.
    """
    times, positions = record.measured_between()
    curves = []
    for column, name in enumerate(record.joint_names):
        commanded_s, commanded = record.commanded_joint(name)
        if "gripper" in name or len(commanded_s) < 2 or len(times) < 2:
            continue
        inside = (times >= commanded_s[0] + MAX_LAG_S) & (times <= commanded_s[-1])
        if inside.any():
            curves.append((commanded_s, commanded, times[inside], positions[inside, column]))
    if not curves:
        return None
    best: Tracking | None = None
    for lag_s in np.arange(0.0, MAX_LAG_S + 1e-9, 0.005):
        errors = np.concatenate(
            [position - np.interp(t - lag_s, c_s, c) for c_s, c, t, position in curves]
        )
        rms = float(np.sqrt(np.mean(errors**2)))
        if best is None or rms < best.rms_rad:
            best = Tracking(float(lag_s), rms, float(np.abs(errors).max()))
    return best


def travel_rad(record: DemoRecord, arm: str) -> float:
    """The way that the joints of one arm went, summed over joints and time, without grippers."""
    _, positions = record.measured_between()
    columns = [
        k
        for k, name in enumerate(record.joint_names)
        if name.startswith(arm) and "gripper" not in name
    ]
    if len(positions) < 2:
        return 0.0
    return float(np.abs(np.diff(positions[:, columns], axis=0)).sum())


def failures(record: DemoRecord) -> list[str]:
    """Why the run was not a good one, one line each; empty: frames, chunks and motion are there."""
    found = list(record.problems)
    for name, camera in record.cameras.items():
        if camera.received == 0:
            found.append(f"no frame of {name} reached the policy")
    if not record.cameras:
        found.append("the policy node reported no cameras")
    if record.chunks_received == 0:
        found.append("the policy produced no action chunk")
    for arm in ("left", "right"):
        if travel_rad(record, arm) < MIN_TRAVEL_RAD:
            found.append(f"the {arm} arm did not move")
    followed = tracking(record)
    if followed is None:
        found.append("no trajectory was commanded")
    elif followed.rms_rad > MAX_TRACKING_RMS_RAD:
        found.append(
            f"the arms did not follow: {followed.rms_rad:.3f} rad RMS from the commands, "
            f"more than {MAX_TRACKING_RMS_RAD} rad"
        )
    return found


def table(record: DemoRecord) -> Table:
    """The run in figures."""
    rows = Table(title="What happened", title_justify="left", show_header=False)
    rows.add_column(style="bold", no_wrap=True)
    rows.add_column()
    rows.add_row("policy", record.policy)
    for k, (_, text) in enumerate(record.instructions):
        outcome = f": {record.outcomes[k]}" if k < len(record.outcomes) else ""
        rows.add_row("instruction", f"{text}{outcome}")
    for name, camera in record.cameras.items():
        rows.add_row(
            name,
            f"{camera.rate_hz:.1f} Hz, {camera.received} of {camera.published} frames received, "
            f"{camera.lost} lost",
        )
    p50, p95, p99 = (1e3 * value for value in record.latency_s)
    rows.add_row(
        "inference",
        f"p50 {p50:.0f}, p95 {p95:.0f}, p99 {p99:.0f} ms from picture to usable chunk; "
        f"the policy itself p50 {1e3 * record.network_s:.0f} ms; "
        f"{record.inference_failures} failed",
    )
    rows.add_row(
        "chunks",
        f"{record.chunks_received} received, {record.chunks_used} used, "
        f"{record.chunks_dropped} dropped",
    )
    jitter_p50, jitter_p99 = (1e3 * value for value in record.jitter_s)
    rows.add_row(
        "commands",
        f"{record.command_rate_hz:.1f} Hz, jitter p50 {jitter_p50:.1f}, p99 {jitter_p99:.1f} ms",
    )
    rows.add_row(
        "travel",
        f"left arm {travel_rad(record, 'left'):.2f} rad, "
        f"right arm {travel_rad(record, 'right'):.2f} rad, all joints together",
    )
    followed = tracking(record)
    if followed is not None:
        rows.add_row(
            "tracking",
            f"{followed.rms_rad:.4f} rad RMS, {followed.max_rad:.3f} rad at most, "
            f"{1e3 * followed.lag_s:.0f} ms behind the command",
        )
    rows.add_row("clamps", ", ".join(f"{kind} {n}" for kind, n in record.clamped.items()))
    rows.add_row(
        "simulator",
        f"{record.real_time_factor:.0%} of real time, "
        f"{record.trajectories_rejected} trajectories rejected"
        + (f", the last: {record.rejection}" if record.rejection else ""),
    )
    return rows
