"""The end of a motion, and when the next one may start."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

from pi05_ros.control.trajectory import ClockJumpedBackError, CommandStream, TrajectoryPoints


@dataclass(frozen=True)
class Braking:
    """A motion that ends: every output follows `stream.commanded` from `start_s` to `rest_s`.

    Times are on the stream's clock.
    """

    trajectory: TrajectoryPoints | None
    """For controllers that take trajectories. None if they have it already: after a clock jump the
    tail of the last trajectory brakes, and a braking in progress continues."""
    start_s: float
    """The present place in the motion."""
    rest_s: float


class BrakeState:
    """Ends the commanded motion and keeps the time at which it comes to rest.

    Times are seconds on the clock of the observation stamps. The stream's clock, which `Braking`
    uses, is ahead of it by `_stream_ahead_s` after a jump.
    """

    def __init__(self, stream: CommandStream) -> None:
        self._stream = stream
        self._began_s = self._rest_s = -math.inf
        self._stream_ahead_s = 0.0
        self._ticked_s = self._ticked_at_s = -math.inf

    def record_tick(self, now_s: float) -> None:
        """The stream made a trajectory at `now_s`."""
        self._ticked_s, self._ticked_at_s = now_s, time.monotonic()

    def rest_s(self, now_s: float) -> float:
        """When the last motion comes to rest; -inf before the first."""
        if now_s < self._began_s:
            # The clock was set back during the braking: assume that all of it is left.
            back_s = self._began_s - now_s
            self._began_s -= back_s
            self._rest_s -= back_s
            self._stream_ahead_s += back_s
        return self._rest_s

    def brake(self, now_s: float) -> Braking | None:
        """End the motion; None at rest. A braking in progress continues."""
        if not self._stream.active:
            return self._in_progress(now_s)
        try:
            trajectory = self._stream.brake(now_s)
        except ClockJumpedBackError:
            return self.brake_by_tail(now_s)
        return self._begin(now_s, now_s, trajectory)

    def brake_by_tail(self, now_s: float) -> Braking | None:
        """As `brake`, for a clock that has jumped since the stream's last trajectory."""
        self._stream.stop()
        if self._ticked_s == -math.inf:
            return self._in_progress(now_s)
        passed_s = max(self._stream.dt_s, time.monotonic() - self._ticked_at_s)
        return self._begin(now_s, self._ticked_s + passed_s, None)

    def retract(self, now_s: float) -> Braking | None:
        """The trajectory of `brake` was not sent: the tail of the one before it brakes."""
        self._stream.retract()
        self._stream.stop()
        return self._begin(now_s, now_s + self._stream_ahead_s, None)

    def _begin(
        self, now_s: float, stream_s: float, trajectory: TrajectoryPoints | None
    ) -> Braking | None:
        self._ticked_s = -math.inf
        self._stream_ahead_s = stream_s - now_s
        self._began_s = now_s
        self._rest_s = max(now_s, self._stream.rest_time_s - self._stream_ahead_s)
        if trajectory is None:
            return self._in_progress(now_s)
        return Braking(trajectory, stream_s, self._stream.rest_time_s)

    def _in_progress(self, now_s: float) -> Braking | None:
        rest_s = self.rest_s(now_s)
        if now_s >= rest_s:
            return None
        return Braking(None, now_s + self._stream_ahead_s, rest_s + self._stream_ahead_s)
