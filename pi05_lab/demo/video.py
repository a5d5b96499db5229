"""The run as a video, drawn afterwards from the simulator's recorded states.

Drawing it while the arms move would take a core from the policy and the simulator.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from pathlib import Path

import av
import cv2
import numpy as np

from pi05_lab.demo.report import DemoRecord
from pi05_lab.sim.arms import SimulatedAloha
from pi05_lab.sim.rendering import CAMERAS, CameraRenderer
from pi05_ros.types import ImageArray

FPS = 12
SCENE = (640, 480)
INSET = (214, 160)
WIDTH, HEIGHT = SCENE[0] + INSET[0], SCENE[1]
"""Pixels: the scene, and the three policy cameras in a column on its right."""


def write_text(picture: ImageArray, lines: Sequence[str]) -> None:
    """Put lines on a dark band at the picture's foot, in place."""
    height = len(picture)
    band = 14 + 30 * len(lines)
    picture[height - band :] = (picture[height - band :] * 0.35).astype(np.uint8)
    for k, line in enumerate(lines):
        origin = (16, height - band + 30 * (k + 1) - 4)
        cv2.putText(
            picture, line, origin, cv2.FONT_HERSHEY_SIMPLEX, 0.72, (255, 255, 255), 2, cv2.LINE_AA
        )  # cv2's outline fonts are ASCII only, which instructions of the demo are


class SceneWriter:
    """Draws one recorded state: the scene, the policy's three cameras on its side, the text."""

    def __init__(self) -> None:
        model = SimulatedAloha().model
        self._scene = CameraRenderer(model, width=SCENE[0], height=SCENE[1], quality="pretty")
        self._insets = CameraRenderer(model, width=INSET[0], height=INSET[1], quality="fast")

    def draw(self, qpos: Sequence[float], lines: Sequence[str]) -> ImageArray:
        """RGB [HEIGHT, WIDTH, 3]."""
        state = np.asarray(qpos)
        scene = self._scene.render(state, "scene")
        write_text(scene, lines)
        views = [self._insets.render(state, camera) for camera in CAMERAS]
        return np.hstack([scene, np.vstack(views)])

    def close(self) -> None:
        self._scene.close()
        self._insets.close()


def write_video(record: DemoRecord, path: Path) -> ImageArray:
    """Write an H.264 MP4 of the run; returns the picture in the middle of the motion."""
    start_s = record.instructions[0][0] - 0.5
    end_s = record.qpos_s[-1]
    times = np.arange(max(start_s, record.qpos_s[0]), end_s, 1.0 / FPS)
    writer = SceneWriter()
    middle = None
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.options = {"crf": "26", "preset": "veryfast"}
        for k, when_s in enumerate(times):
            row = min(bisect.bisect_left(record.qpos_s, when_s), len(record.qpos) - 1)
            said = [text for said_s, text in record.instructions if said_s <= when_s]
            clock = f"{when_s - record.instructions[0][0]:5.1f} s"
            picture = writer.draw(record.qpos[row], [f'"{said[-1]}"' if said else "", clock])
            if k == len(times) // 2:
                middle = picture
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    writer.close()
    if middle is None:
        raise ValueError("the run is too short for a video")
    return middle
