"""The moments at which a policy was furthest off, with what the cameras showed."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from typing import Any

import cv2
import numpy as np

from pi05_ros.types import ImageArray

WIDTH = 200
"""Of a small picture, pixels."""
_APART_S = 1.0


class WorstMoments:
    """Keeps the worst few, at least 1 s apart.

    Args:
        count: how many.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._kept: list[dict[str, Any]] = []

    def offer(
        self,
        error: float,
        hold: float,
        stamp_s: float,
        instruction: str,
        images: Mapping[str, ImageArray],
        later: Callable[[], Mapping[str, ImageArray]],
    ) -> None:
        """A moment; its pictures are only made small if it is one of the worst.

        Args:
            error: of the policy, rad.
            hold: error of holding still, rad.
            stamp_s: of the observation.
            instruction: of its episode.
            images: camera → RGB at the observation.
            later: gives those at the chunk's end.
        """
        rivals = [k for k in self._kept if abs(k["stamp_s"] - stamp_s) < _APART_S]
        if any(rival["error"] >= error for rival in rivals):
            return
        rest = [k for k in self._kept if k not in rivals]
        if len(rest) >= self._count and (not rest or rest[-1]["error"] >= error):
            return
        rest.append(
            {
                "error": error,
                "hold": hold,
                "stamp_s": stamp_s,
                "instruction": instruction,
                "before": {name: _small(picture) for name, picture in images.items()},
                "after": {name: _small(picture) for name, picture in later().items()},
            }
        )
        self._kept = sorted(rest, key=lambda k: (-k["error"], k["stamp_s"]))[: self._count]

    def to_list(self, origin_s: float) -> list[dict[str, Any]]:
        return [
            {
                **kept,
                "error": round(kept["error"], 6),
                "hold": round(kept["hold"], 6),
                "stamp_s": round(kept["stamp_s"] - origin_s, 3),
            }
            for kept in self._kept
        ]


def _small(picture: ImageArray) -> str:
    """A JPEG of `WIDTH` pixels as base64."""
    height = max(1, round(picture.shape[0] * WIDTH / picture.shape[1]))
    small = cv2.resize(picture, (WIDTH, height), interpolation=cv2.INTER_AREA)
    encoded = cv2.imencode(".jpg", np.ascontiguousarray(small[:, :, ::-1]))[1]
    return base64.b64encode(encoded.tobytes()).decode()
