"""From which measured positions a motion may start, and from when on."""

from __future__ import annotations

from pi05_ros.control.start_check import StartCheck
from pi05_ros.observation.buffer import NotReady, ObservationBuffer
from pi05_ros.runner.rest import Rest
from pi05_ros.types import FloatArray

SHOWN_AFTER_S = 1.0
"""Joint states that are too few are a problem if they are still after this time."""


class StartGate:
    """Waits for the rest of the last motion and for joint states, stamped later, that agree."""

    def __init__(self, buffer: ObservationBuffer, rest: Rest, check: StartCheck | None) -> None:
        """Without a `check`, the newest joint state is enough."""
        self.problem = ""
        self._buffer = buffer
        self._rest = rest
        self._check = check

    def positions(self, now_s: float) -> FloatArray | None:
        """[n_joints] to start at; None while no motion may start. Sets `problem`."""
        self.problem = ""
        rest_s = self._rest.rest_s(now_s)
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
