"""The soak's verdict. Faults pinned: a missed leak, a level reported as a leak, a missed jump."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from soak_checks import Points, TrajectoryCheck
from soak_memory import Sample, growth
from soak_report import Outcome, report

from pi05_ros.control.limits import MotionLimiter
from pi05_ros.control.trajectory import CommandStream
from pi05_ros.robot_config import read_robot_config

TIMES_S = np.arange(0.0, 1600.0)
RNG = np.random.default_rng(0)
LEVELS_MB = 560.0 + 38.0 * (np.sin(TIMES_S / 37.0) > 0.3) + RNG.normal(0.0, 2.0, TIMES_S.size)
"""Up by a stall's images, down by a configure, and noise."""


def outcome(memory_mb: np.ndarray, **changes: object) -> Outcome:
    samples = [
        Sample(at_s, mb, mb - 100.0, mb - 200.0, 21, 23)
        for at_s, mb in zip(TIMES_S, memory_mb, strict=False)
    ]
    recovery_s = {"a camera stops": [0.2, 0.4], "policy: oom": [1.5]}
    values = {"recovery_s": recovery_s, "samples": samples, "settled_s": 0.0, **changes}
    return Outcome(minutes=30.0, trajectories=9000, **values)


def test_a_leak_is_growth_and_a_level_is_not() -> None:
    grown = growth(TIMES_S, LEVELS_MB)
    assert abs(grown.share) < 0.005 and abs(grown.per_minute) < 0.1
    leak = growth(TIMES_S, LEVELS_MB + 0.75 * TIMES_S / 60.0)
    assert leak.share > 0.02
    assert leak.per_minute == pytest.approx(0.75, abs=0.1)
    with pytest.raises(ValueError, match="48 values"):
        growth(TIMES_S[:47], LEVELS_MB[:47])


def test_the_report_names_each_failure() -> None:
    text, well = report(outcome(LEVELS_MB))
    assert well
    assert "30 minutes, 3 faults, 9000 trajectories" in text
    assert "| a camera stops | 2 | 0.30 | 0.40 | 0 |" in text
    for wrong, words in (
        ({"tracebacks": 1}, "| uncaught exceptions | 1 |"),
        ({"ended": ["node"]}, "| processes that ended by themselves | 1: node |"),
        (
            {"violations": ["at 1 s: limits"]},
            "| trajectories that fail a check | 1: at 1 s: limits |",
        ),
        ({"exit_codes": [-15]}, "| exit codes other than 0 after SIGTERM | 1: -15 |"),
        ({"unreported": ["~/stop"]}, "| faults that the status does not name | 1: ~/stop |"),
        ({"lost": ["policy: oom"]}, "| 1: policy: oom |"),
        ({"settled_s": 1590.0}, "Too short"),
    ):
        text, well = report(outcome(LEVELS_MB, **wrong))
        assert words in text and not well
    assert not report(outcome(LEVELS_MB + 0.75 * TIMES_S / 60.0))[1]


ROBOT = read_robot_config(Path(__file__).parents[2] / "config" / "aloha.yaml")
JOINTS = ROBOT.joints
DT_S = ROBOT.dt_s


def motion(ticks: int, offset_rad: float = 0.3) -> list[tuple[float, Points]]:
    """Publication time and message of each tick; every message moves."""
    limiter = MotionLimiter(JOINTS, DT_S, ROBOT.parameters.position_margin)
    stream = CommandStream(limiter)
    middle = (JOINTS.lower + JOINTS.upper) / 2
    stream.start(middle, 100.0)
    target = middle + offset_rad * (JOINTS.upper - JOINTS.lower)
    messages = []
    for tick in range(ticks):
        now_s = 100.0 + tick * DT_S
        points = stream.tick(now_s, lambda times_s: np.tile(target, (len(times_s), 1)))
        messages.append((now_s, Points(points.stamp_s, points.positions, points.velocities)))
    return messages


def trajectory_check() -> TrajectoryCheck:
    return TrajectoryCheck(JOINTS, list(range(len(JOINTS))), DT_S)


def test_the_streams_messages_pass_the_checks() -> None:
    check = trajectory_check()
    messages = motion(10)
    for now_s, points in messages:
        assert check.check(points, now_s) == []
    assert check.compared == 6  # three of nine boundaries are at rest
    # A lost message is not a jump.
    check.reset()
    for now_s, points in (messages[3], messages[5], messages[6]):
        assert check.check(points, now_s) == []


def test_a_jump_a_late_first_point_and_a_speed_are_found() -> None:
    (_, before), (now_s, points) = motion(8)[-2:]
    check = trajectory_check()
    check.check(before, now_s)
    jumped = Points(points.stamp_s, points.positions + 1e-3, points.velocities)
    assert check.check(jumped, now_s) == ["chunk boundary"]
    check.reset()
    assert check.check(points, points.stamp_s - 0.01) == ["begins in the future"]
    check.reset()
    assert check.check(Points(now_s, points.positions, 40 * points.velocities), now_s) == ["limits"]
    assert check.found == {"chunk boundary": 1, "begins in the future": 1, "limits": 1}


def test_a_motion_after_rest_begins_at_rest() -> None:
    (_, before), (now_s, points) = motion(8)[-2:]
    check = trajectory_check()
    check.check(before, now_s)
    later = Points(points.stamp_s + 60.0, points.positions, points.velocities)
    assert check.check(later, now_s + 60.0) == ["chunk boundary"]
