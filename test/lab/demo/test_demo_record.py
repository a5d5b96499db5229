"""The demo's verdict: a run without frames, chunks or motion fails with the reason."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from rich.console import Console

from pi05_lab.demo.report import (
    CameraCount,
    DemoRecord,
    failures,
    plot,
    table,
    tracking,
    travel_rad,
)

LAG_S = 0.05
JOINTS = ["left_waist", "left_gripper", "right_waist", "right_gripper"]


def motion(times_s: np.ndarray) -> np.ndarray:
    arm = 0.4 * np.sin(2 * times_s)
    grip = np.full_like(times_s, 0.03)
    return np.stack([arm, grip, -arm, grip], axis=1)


@pytest.fixture()
def record() -> DemoRecord:
    """Ten seconds of two arms that follow 50 ms behind the command."""
    record = DemoRecord(joint_names=list(JOINTS), instructions=[(100.0, "wave")])
    times_s = 99.0 + np.arange(0, 11, 0.01)
    record.measured_s = times_s.tolist()
    record.measured = motion(times_s - LAG_S).tolist()
    for k, arm in enumerate(("left", "right")):
        name = f"{arm}_arm_controller"
        record.controller_joints[name] = [f"{arm}_waist", f"{arm}_gripper"]
        record.commanded_s[name] = times_s[::2].tolist()
        record.commanded[name] = motion(times_s[::2])[:, 2 * k : 2 * k + 2].tolist()
    record.cameras = {"cam_high": CameraCount(published=300, received=300, rate_hz=30.0)}
    record.chunks = [(100.0 + t, 99.9 + t, 0.1) for t in range(9)]
    record.chunks_received = record.chunks_used = 9
    return record


def test_a_good_run_has_no_failures(record: DemoRecord) -> None:
    assert failures(record) == []
    followed = tracking(record)
    assert followed is not None
    assert followed.lag_s == pytest.approx(LAG_S, abs=0.006)
    assert followed.rms_rad < 0.005
    assert travel_rad(record, "left") == pytest.approx(travel_rad(record, "right"))


def no_frames(record: DemoRecord) -> None:
    record.cameras["cam_high"] = CameraCount(published=300, received=0, rate_hz=0.0)


def no_cameras(record: DemoRecord) -> None:
    record.cameras = {}


def no_chunks(record: DemoRecord) -> None:
    record.chunks_received = 0


def right_arm_at_rest(record: DemoRecord) -> None:
    record.measured = [[*row[:2], 0.0, row[3]] for row in record.measured]


def arms_move_otherwise(record: DemoRecord) -> None:
    record.measured = [[-row[0], row[1], -row[2], row[3]] for row in record.measured]


def nothing_commanded(record: DemoRecord) -> None:
    for name in record.commanded:
        record.commanded[name], record.commanded_s[name] = [], []


def crashed(record: DemoRecord) -> None:
    record.problems = ["policy_node ended with code 1"]


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (no_frames, "no frame of cam_high"),
        (no_cameras, "no cameras"),
        (no_chunks, "no action chunk"),
        (right_arm_at_rest, "right arm did not move"),
        (arms_move_otherwise, "did not follow"),
        (nothing_commanded, "no trajectory"),
        (crashed, "ended with code 1"),
    ],
)
def test_each_fault_is_named(
    record: DemoRecord, fault: Callable[[DemoRecord], None], reason: str
) -> None:
    fault(record)
    assert any(reason in line for line in failures(record)), failures(record)


def test_motion_before_the_instruction_does_not_count(record: DemoRecord) -> None:
    """Fault pinned: arms that settle at the start, then ignore the instruction, count as moved."""
    record.measured = [
        row if stamp_s < 100.0 else [0.0] * 4
        for stamp_s, row in zip(record.measured_s, record.measured, strict=True)
    ]
    assert any("did not move" in line for line in failures(record))


def test_the_table_shows_what_was_lost(record: DemoRecord) -> None:
    record.cameras["cam_high"] = CameraCount(published=300, received=290, rate_hz=29.0)
    record.trajectories_rejected, record.rejection = 3, "the last point has a velocity"
    text = io.StringIO()
    Console(file=text, width=120).print(table(record))
    assert "290 of 300 frames received, 10 lost" in text.getvalue()
    assert "3 trajectories rejected, the last: the last point has a velocity" in text.getvalue()
    assert "wave" in text.getvalue()


def test_the_plot_has_both_curves(record: DemoRecord, tmp_path: Path) -> None:
    path = tmp_path / "joints.png"
    plot(record, path)
    picture = cv2.imread(str(path))
    assert picture is not None
    assert picture.shape[1] > 800
    blue = (picture[..., 0] > 150) & (picture[..., 2] < 80)
    orange = (picture[..., 2] > 200) & (picture[..., 0] < 80)
    assert blue.sum() > 200
    assert orange.sum() > 200


def test_an_empty_record_fails_without_crashing() -> None:
    found = failures(DemoRecord(joint_names=[]))
    assert any("no trajectory" in line for line in found)
    assert any("did not move" in line for line in found)
