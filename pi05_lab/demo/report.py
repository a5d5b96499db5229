"""What `pi05 demo` recorded of a run, and its report: verdict, table, plot and video."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import av
import cv2
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from rich.table import Table

from pi05_lab.sim.arms import SimulatedAloha
from pi05_lab.sim.judge import Judge
from pi05_lab.sim.rendering import CAMERAS, SCENE_CAMERA, CameraRenderer
from pi05_lab.sim.scene import SIDES
from pi05_lab.sim.tasks import parse
from pi05_ros.types import FloatArray, ImageArray

MIN_TRAVEL_RAD = 0.05
"""Smallest travel of an arm that counts as motion, summed over its joints."""
MAX_TRACKING_RMS_RAD = 0.08
MAX_LAG_S = 0.2
"""Largest lag between command and servo that is removed from the tracking error."""
FPS = 12
SCENE = (640, 480)
INSET = (214, 160)
WIDTH, HEIGHT = SCENE[0] + INSET[0], SCENE[1]
"""Pixels of the video: the scene, and the policy's three cameras in a column on its right."""


@dataclass(frozen=True)
class CameraCount:
    """Frames of one camera, counted by the publisher and by the subscriber."""

    published: int
    received: int
    rate_hz: float

    @property
    def lost(self) -> int:
        return self.published - self.received


@dataclass
class DemoRecord:
    """A run of the demo. Times are seconds of the ROS clock."""

    joint_names: list[str]
    instructions: list[tuple[float, str]] = field(default_factory=list)
    measured_s: list[float] = field(default_factory=list)
    measured: list[list[float]] = field(default_factory=list)
    """Joint positions, rad and m, at `measured_s`."""
    commanded_s: dict[str, list[float]] = field(default_factory=dict)
    commanded: dict[str, list[list[float]]] = field(default_factory=dict)
    """By controller: the first point of every trajectory, and its time."""
    controller_joints: dict[str, list[str]] = field(default_factory=dict)
    chunks: list[tuple[float, float, float]] = field(default_factory=list)
    """Arrival, observation stamp and latency, s."""
    qpos_s: list[float] = field(default_factory=list)
    qpos: list[list[float]] = field(default_factory=list)
    """The simulator's whole state at `qpos_s`."""
    cameras: dict[str, CameraCount] = field(default_factory=dict)
    policy: str = ""
    latency_s: tuple[float, float, float] = (0.0, 0.0, 0.0)
    network_s: float = 0.0
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
    """Faults of the processes."""

    def measured_between(self) -> tuple[FloatArray, FloatArray]:
        """Times [n] and positions [n, n_joints] from the first instruction on."""
        times: FloatArray = np.array(self.measured_s)
        positions: FloatArray = np.array(self.measured).reshape(len(times), len(self.joint_names))
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
    """Error between the commanded and the measured arm joints."""

    lag_s: float
    rms_rad: float
    max_rad: float


def tracking(record: DemoRecord) -> Tracking | None:
    """Error of the arm joints after removing the servo's lag; None without commands.

    The lag is the shift in 0 … `MAX_LAG_S` with the smallest error, the same for all joints.
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
    """Distance travelled by the joints of one arm, summed over joints, without the gripper."""
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
    """Why the run failed, one line each; empty if there were frames, chunks and motion."""
    found = list(record.problems)
    for name, camera in record.cameras.items():
        if camera.received == 0:
            found.append(f"no frame of {name} reached the policy")
    if not record.cameras:
        found.append("the policy node reported no cameras")
    if record.chunks_received == 0:
        found.append("the policy produced no action chunk")
    for arm in SIDES:
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


@dataclass(frozen=True)
class Outcome:
    """Result of one instruction until the next one, or until the end of the run."""

    text: str
    known: bool
    """The instruction is a task of the simulator, which has a success criterion."""
    done_after_s: float | None
    wrong: bool
    """Another cube was touched, or the other arm was used, before."""
    given_s: float
    """Duration of the instruction."""
    changed: bool
    """Another instruction followed."""

    def __str__(self) -> str:
        if not self.known:
            return "no task that can be judged"
        if self.done_after_s is None:
            when = "when changed after" if self.changed else "in"
            result = f"not done {when} {self.given_s:.1f} s"
        else:
            result = f"done after {self.done_after_s:.1f} s"
        return result + (", after another cube or arm" if self.wrong else "")


def judge_run(record: DemoRecord) -> list[Outcome]:
    """One outcome per instruction, by the criteria of `sim.judge.Judge`."""
    if not record.qpos_s:
        return []
    sim = SimulatedAloha()
    outcomes = []
    for (start_s, text), (end_s, following) in pairwise(
        [*record.instructions, (record.qpos_s[-1] + 1e-6, "")]
    ):
        task = parse(text)
        judge: Judge | None = None
        for stamp_s, qpos in zip(record.qpos_s, record.qpos, strict=True):
            if task is None or not start_s <= stamp_s < end_s:
                continue
            sim.set_qpos(qpos)
            sim.data.time = stamp_s - start_s
            judge = judge or Judge(task, sim)
            judge.update()
        outcomes.append(
            Outcome(
                text,
                known=task is not None,
                done_after_s=judge.done_at_s if judge else None,
                wrong=judge is not None and judge.wrong,
                given_s=end_s - start_s,
                changed=bool(following),
            )
        )
    return outcomes


def table(record: DemoRecord) -> Table:
    """The run in figures."""
    rows = Table(title="What happened", title_justify="left", show_header=False)
    rows.add_column(style="bold", no_wrap=True)
    rows.add_column()
    rows.add_row("policy", record.policy)
    outcomes = [f": {outcome}" for outcome in judge_run(record)]
    for k, (_, text) in enumerate(record.instructions):
        rows.add_row("instruction", text + (outcomes[k] if outcomes else ""))
    for name, camera in record.cameras.items():
        rows.add_row(
            name,
            f"{camera.rate_hz:.1f} Hz, {camera.received} of {camera.published} frames received, "
            f"{camera.lost} lost",
        )
    p50, p95, p99 = (1e3 * value for value in record.latency_s)
    rows.add_row(
        "inference",
        f"p50 {p50:.0f}, p95 {p95:.0f}, p99 {p99:.0f} ms from image to usable chunk; "
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


def plot(record: DemoRecord, path: Path) -> None:
    """Write a PNG of commanded and measured joints: a row per joint, a column per arm."""
    joints = [name.removeprefix("left_") for name in record.joint_names if name.startswith("left_")]
    figure = Figure(figsize=(13, 1.45 * len(joints) + 1.2))
    axes = figure.subplots(len(joints), 2, sharex=True, squeeze=False)
    times, measured = record.measured_between()
    start_s = times[0] if len(times) else 0.0
    for k, joint in enumerate(joints):
        for column, arm in enumerate(SIDES):
            axis, name = axes[k][column], f"{arm}_{joint}"
            unit, factor = ("mm", 1e3) if "gripper" in joint else ("rad", 1.0)
            for arrival_s, _, _ in record.chunks:
                axis.axvline(arrival_s - start_s, color="0.85", linewidth=0.8, zorder=0)
            for when_s, _ in record.instructions:
                axis.axvline(when_s - start_s, color="tab:red", linewidth=1.0, zorder=1)
            commanded_s, commanded = record.commanded_joint(name)
            positions = measured[:, record.joint_names.index(name)]
            axis.plot(commanded_s - start_s, commanded * factor,
                      color="tab:blue", linewidth=1.6, label="commanded")  # fmt: skip
            axis.plot(times - start_s, positions * factor,
                      color="tab:orange", linewidth=1.0, label="measured")  # fmt: skip
            axis.set_ylabel(f"{joint.replace('_', ' ')}\n{unit}", fontsize=8)
            axis.tick_params(labelsize=7)
            axis.margins(x=0.01)
            if k == 0:
                axis.set_title(f"{arm} arm", fontsize=10)
    for axis in axes[-1]:
        axis.set_xlabel("s after the first instruction", fontsize=8)
    handles, labels = axes[0][0].get_legend_handles_labels()
    handles += [Line2D([], [], color="0.85"), Line2D([], [], color="tab:red")]
    labels += ["chunk arrives", "instruction arrives"]
    figure.legend(handles, labels, loc="lower center", ncol=4, fontsize=8)
    figure.suptitle("; ".join(text for _, text in record.instructions), x=0.01, ha="left")
    figure.tight_layout(rect=(0, 0.02, 1, 0.98))
    figure.savefig(path, dpi=110)


def write_text(image: ImageArray, lines: Sequence[str]) -> None:
    """Draw lines on a dark band at the bottom of the image, in place."""
    height = len(image)
    band = 14 + 30 * len(lines)
    image[height - band :] = (image[height - band :] * 0.35).astype(np.uint8)
    for k, line in enumerate(lines):
        origin = (16, height - band + 30 * (k + 1) - 4)
        cv2.putText(
            image, line, origin, cv2.FONT_HERSHEY_SIMPLEX, 0.72, (255, 255, 255), 2, cv2.LINE_AA
        )  # OpenCV's fonts are ASCII only.


def write_video(record: DemoRecord, path: Path) -> ImageArray:
    """Write an H.264 MP4 of the run, rendered from its recorded states.

    Rendering during the motion would take a core from the policy and the simulator.

    Returns:
        RGB [HEIGHT, WIDTH, 3], the frame in the middle.

    Raises:
        ValueError: the run is too short.
    """
    begin_s = record.instructions[0][0]
    start_s = max(begin_s - 0.5, record.qpos_s[0])
    times: FloatArray = np.arange(start_s, record.qpos_s[-1], 1.0 / FPS)
    if not len(times):
        raise ValueError("the run is too short for a video")
    model = SimulatedAloha().model
    with (
        CameraRenderer(model, *SCENE, quality="pretty") as scenes,
        CameraRenderer(model, *INSET) as insets,
        av.open(str(path), "w") as container,
    ):
        stream = container.add_stream("libx264", rate=FPS)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.options = {"crf": "26", "preset": "veryfast"}
        for k, now_s in enumerate(times):
            row = min(bisect.bisect_left(record.qpos_s, now_s), len(record.qpos) - 1)
            qpos = np.asarray(record.qpos[row])
            given = [f'"{text}"' for given_s, text in record.instructions if given_s <= now_s]
            scene = scenes.render(qpos, SCENE_CAMERA)
            write_text(scene, [given[-1] if given else "", f"{now_s - begin_s:5.1f} s"])
            views = [insets.render(qpos, camera) for camera in CAMERAS]
            image: ImageArray = np.hstack([scene, np.vstack(views)])
            if k == len(times) // 2:
                middle = image
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
    return middle
