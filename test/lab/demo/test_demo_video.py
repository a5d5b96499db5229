"""The demo's video is a playable file with the instruction on it."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest

from pi05_lab.demo.report import FPS, HEIGHT, WIDTH, DemoRecord, write_text, write_video
from pi05_lab.sim.arms import SimulatedAloha


def record_of(seconds: float) -> DemoRecord:
    sim = SimulatedAloha()
    sim.reset(0)
    targets = sim.positions()
    targets[0] += 0.5
    sim.set_targets(targets)
    record = DemoRecord(joint_names=[], instructions=[(10.0, "wave")])
    for k in range(round(seconds / 0.02)):
        record.qpos_s.append(10.0 + 0.02 * k)
        record.qpos.append(sim.qpos().tolist())
        sim.step(4)
    return record


def test_video(tmp_path: Path) -> None:
    path = tmp_path / "scene.mp4"
    middle = write_video(record_of(1.0), path)
    assert middle.shape == (HEIGHT, WIDTH, 3)
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == pytest.approx(FPS, abs=1)
    assert frames[0].shape == (HEIGHT, WIDTH, 3)
    moved = np.abs(frames[0].astype(int) - frames[-1].astype(int)).max(axis=2)
    assert (moved > 60).sum() > 100


def test_a_run_without_states_is_refused(tmp_path: Path) -> None:
    record = DemoRecord(joint_names=[], instructions=[(10.0, "wave")], qpos_s=[5.0], qpos=[[0.0]])
    with pytest.raises(ValueError, match="too short"):
        write_video(record, tmp_path / "scene.mp4")


def test_text_stays_inside_the_band() -> None:
    image = np.full((480, 640, 3), 200, np.uint8)
    write_text(image, ["a", "b"])
    changed = np.flatnonzero((image != 200).any(axis=(1, 2)))
    assert changed[0] == 480 - 74
    assert image[changed[0] :].max() == 255
