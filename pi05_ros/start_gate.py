"""When a motion may start, and at which measured positions."""

from __future__ import annotations

from pi05_ros.control.braking import BrakeState
from pi05_ros.control.start_check import StartCheck
from pi05_ros.observation.buffer import NotReady, ObservationBuffer
from pi05_ros.types import FloatArray

SHOWN_AFTER_S = 1.0
"""Too few joint states become a problem after this time."""


class StartGate:
    """Waits until the last motion is at rest and joint states stamped after it agree."""

    def __init__(
        self, buffer: ObservationBuffer, rest: BrakeState, check: StartCheck | None
    ) -> None:
        """Without `check`, one joint state is enough."""
        self.problem = ""
        self._buffer = buffer
        self._brake = rest
        self._check = check

    def positions(self, now_s: float) -> FloatArray | None:
        """Positions [n_joints] to start at; None while no motion may start. Sets `problem`."""
        self.problem = ""
        rest_s = self._brake.rest_s(now_s)
        if now_s < rest_s:
            return None
        try:
            newest = self._buffer.positions(now_s)
        except NotReady:
            return None
        stamps_s, states = self._buffer.joint_history(rest_s)
        if self._check is None:
            return newest if len(stamps_s) else None
        proof = self._check.check(stamps_s, states)
        if not proof.too_few or now_s - rest_s > SHOWN_AFTER_S:
            self.problem = proof.problem
        return proof.positions
