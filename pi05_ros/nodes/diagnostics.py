"""/diagnostics in the conventions of diagnostic_updater: one status per part of the node."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum

from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue

from pi05_ros.nodes.messages import to_time


class Level(IntEnum):
    """diagnostic_msgs/DiagnosticStatus levels."""

    OK = 0
    WARN = 1
    ERROR = 2
    STALE = 3


@dataclass(frozen=True)
class PartStatus:
    """How one part of the node does."""

    part: str
    level: Level
    message: str
    values: Mapping[str, object] = field(default_factory=dict)


def diagnostic_array(
    node_name: str, hardware_id: str, parts: Iterable[PartStatus], stamp_s: float
) -> DiagnosticArray:
    """`<node>: <part>` for each part, values as text."""
    array = DiagnosticArray()
    array.header.stamp = to_time(stamp_s)
    for part in parts:
        status = DiagnosticStatus(
            level=bytes([part.level]),
            name=f"{node_name}: {part.part}",
            message=part.message,
            hardware_id=hardware_id,
        )
        status.values = [
            KeyValue(key=key, value=f"{value:.6g}" if isinstance(value, float) else str(value))
            for key, value in part.values.items()
        ]
        array.status.append(status)
    return array


class Escalation:
    """Trouble is a WARN at first, and an ERROR once it has lasted."""

    def __init__(self, after_s: float) -> None:
        self._after_s = after_s
        self._since_s: dict[str, float] = {}

    def level(self, part: str, trouble: bool) -> Level:
        """The level of `part`; to be asked at every status."""
        if not trouble:
            self._since_s.pop(part, None)
            return Level.OK
        now_s = time.monotonic()
        lasted_s = now_s - self._since_s.setdefault(part, now_s)
        return Level.ERROR if lasted_s >= self._after_s else Level.WARN
