"""An episode of a LeRobot dataset as the events of a recording."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pi05_lab.data.lerobot_dataset import LeRobotDataset
from pi05_lab.data.lerobot_format import DatasetError
from pi05_lab.evaluation.open_loop.bag import BagError
from pi05_lab.evaluation.open_loop.notes import Notes
from pi05_lab.evaluation.open_loop.sources import Command, Event, Instruction, Joints, Picture
from pi05_lab.evaluation.open_loop.topics import EvaluatedRobot
from pi05_ros.types import FloatArray, ImageArray

START_S = 1.0
_CACHE_BYTES = 64 << 20


def is_dataset(path: Path) -> bool:
    return (path / "meta" / "info.json").is_file()


class DatasetRecording:
    """One episode: state and action are in the policy's units, an action is a set-point.

    Raises:
        BagError: no usable dataset, no such episode, or joints and cameras that are not the
            robot's.
    """

    def __init__(
        self,
        name: str,
        root: Path,
        episode: int,
        robot: EvaluatedRobot,
        notes: Notes,
        instruction: str | None = None,
    ) -> None:
        self.name = name
        self.notes = notes
        self._instruction = instruction
        self._robot = robot
        try:
            self._data = LeRobotDataset(root, cache_bytes=_CACHE_BYTES)
            self._frames = range(*self._data.bounds(episode))
        except DatasetError as error:
            raise BagError(str(error)) from None
        count = len(robot.config.joints)
        for key, dim in (("state", self._data.state_dim), ("action", self._data.action_dim)):
            if dim != count:
                raise BagError(f"{root}: {key} has {dim} values, the params file {count} joints")
        self._cameras = [c.name for c in robot.cameras if c.name in self._data.cameras]
        missing = [c.name for c in robot.cameras if c.required and c.name not in self._cameras]
        if missing:
            raise BagError(f"{root} has no camera {missing[0]!r}; it has {self._data.cameras}")

    def decode(self, payload: Any) -> ImageArray:
        frame, camera = payload
        return self._data.images(frame, (camera,))[camera]

    def first_instruction(self) -> str | None:
        return self._instruction or self._data.task(self._frames[0])

    def commanded(self) -> list[tuple[int, ...]]:
        return [tuple(range(len(self._robot.config.joints)))]

    def events(self) -> Iterator[Event]:
        columns = tuple(range(len(self._robot.config.joints)))
        said = ""
        for k, frame in enumerate(self._frames):
            stamp_s = START_S + k / self._data.fps
            time_ns = round(stamp_s * 1e9)
            text = self._instruction or self._data.task(frame)
            if text != said:
                said = text
                yield Instruction(time_ns, text, "task")
            yield Joints(time_ns, stamp_s, self._positions(self._data.state[frame]), "state")
            for camera in self._cameras:
                yield Picture(time_ns, stamp_s, camera, (frame, camera), camera)
            positions = self._positions(self._data.action[frame])[None]
            times_s = np.array([stamp_s])
            yield Command(time_ns, stamp_s, times_s, positions, columns, "action")

    def _positions(self, values: Any) -> FloatArray:
        return self._robot.config.joints.to_joints(np.asarray(values, dtype=np.float64))
