"""Writes a robot's frames as a bag with the topics of the policy node."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from pi05_lab.data.bags import BagError, BagWriter
from pi05_ros.types import FloatArray, ImageArray

INSTRUCTION_PERIOD_S = 1.0
"""The instruction is repeated for readers that start in the middle."""


class RobotBagWriter:
    """Writes images, joint states, the instruction, and every controller's commands.

    A context manager closes it. Topics are `/<camera>/image_raw`, `/joint_states`, `/instruction`
    and `/<controller>/joint_trajectory`, as in `config/aloha.yaml`.

    Args:
        path: the bag's folder, which must not exist.
        joint_names: of all joints, in the order of every array that is written.
        controllers: controller → its joints, which must be in `joint_names`.
        period_s: between two frames; a command is due one period after its frame.
    """

    def __init__(
        self,
        path: Path | str,
        joint_names: Sequence[str],
        controllers: Mapping[str, Sequence[str]],
        period_s: float,
    ) -> None:
        self._names = list(joint_names)
        self._columns: dict[str, list[int]] = {}
        for name, joints in controllers.items():
            unknown = [joint for joint in joints if joint not in joint_names]
            if unknown:
                raise BagError(
                    f"controller {name}: joint {unknown[0]!r} is not one of {self._names}"
                )
            self._columns[name] = [self._names.index(joint) for joint in joints]
        self._period_ns = round(period_s * 1e9)
        self._instruction = ""
        self._instruction_ns = 0
        self._bag = BagWriter(path)

    def write(
        self,
        stamp_s: float,
        images: Mapping[str, ImageArray],
        positions: FloatArray,
        velocities: FloatArray,
        targets: FloatArray,
        instruction: str,
    ) -> None:
        """Write one frame; BagError for missing or infinite values, or images that are not RGB.

        Args:
            stamp_s: of the images and the joints.
            images: camera → uint8 RGB [height, width, 3].
            positions: [n_joints] measured, rad and m.
            velocities: [n_joints] measured, rad/s and m/s.
            targets: [n_joints] commanded, rad and m.
            instruction: published when it changes and every `INSTRUCTION_PERIOD_S`.
        """
        time_ns = round(stamp_s * 1e9)
        for values in (positions, velocities, targets):
            if len(values) != len(self._names) or not np.isfinite(values).all():
                raise BagError(f"expected {len(self._names)} finite joint values: {values}")
        since_ns = time_ns - self._instruction_ns
        if instruction != self._instruction or since_ns >= INSTRUCTION_PERIOD_S * 1e9:
            self._instruction, self._instruction_ns = instruction, time_ns
            self._bag.write_text("/instruction", time_ns, instruction)
        for camera, image in images.items():
            if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
                raise BagError(
                    f"camera {camera!r} needs uint8 RGB [height, width, 3], got {image.dtype} "
                    f"{image.shape}"
                )
            self._bag.write_image(f"/{camera}/image_raw", time_ns, camera, image)
        self._bag.write_joints("/joint_states", time_ns, self._names, positions, velocities)
        for name, columns in self._columns.items():
            joints, row = [self._names[column] for column in columns], targets[None, columns]
            topic = f"/{name}/joint_trajectory"
            self._bag.write_trajectory(topic, time_ns, joints, row, [self._period_ns])

    def __enter__(self) -> RobotBagWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._bag.close()
