"""`pi05 demo` as a newcomer runs it: what it leaves behind, and what it says when it can't."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import pytest

pytestmark = pytest.mark.slow

PI05 = Path(sys.executable).parent / "pi05"


def demo(output: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = {key: value for key, value in os.environ.items() if key != "ROS_DOMAIN_ID"}
    return subprocess.run(
        [PI05, "demo", "--output", output, *arguments],
        capture_output=True,
        text=True,
        timeout=180,
        env=env,
    )


def test_the_demo_moves_the_arms_and_shows_it(tmp_path: Path) -> None:
    done = demo(tmp_path, "--bag", "--seconds", "4", "--instruction", "wave with the right arm")
    assert done.returncode == 0, done.stdout + done.stderr
    for row in ("cam_left_wrist", "inference", "chunks", "commands", "travel", "clamps"):
        assert row in done.stdout
    assert "trained" in done.stdout and "untrained" not in done.stdout
    for picture in ("joints.png", "scene.png"):
        assert cv2.imread(str(tmp_path / picture)) is not None
    assert (tmp_path / "scene.mp4").stat().st_size > 10_000
    report = tmp_path / "report"
    arguments = [str(PI05), "evaluate", str(tmp_path / "bag"), "--output", str(report)]
    arguments += ["--every", "0.4"]
    evaluated = subprocess.run(arguments, capture_output=True, text=True, timeout=120)
    assert evaluated.returncode == 0, evaluated.stdout + evaluated.stderr
    metrics = json.loads((report / "metrics.json").read_text())
    assert metrics["totals"]["observations"] > 5
    assert (report / "report.html").stat().st_size > 50_000


def test_a_checkpoint_that_is_none_is_named(tmp_path: Path) -> None:
    """Pins: a failure whose reason is only to be found in a log file."""
    done = demo(tmp_path, "--checkpoint", "/no/such/checkpoint")
    assert done.returncode == 1
    assert "/no/such/checkpoint" in done.stdout.replace("\n", "")
    assert "Traceback" not in done.stdout + done.stderr
