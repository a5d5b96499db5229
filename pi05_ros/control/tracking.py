"""Compares commanded and measured joint positions."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from pi05_ros.types import FloatArray, JointGroup

MAX_DELAY_S = 0.3
DEFAULT_DELAY_S = 0.05
"""Before the joints have moved."""
MARGIN_S = 0.045
"""A default limit is the distance at max_velocity in the delay plus this time. Errors stay below
1/5 of it with a first-order lag of 55 ms, and below 4/5 with one of 150 ms not yet learned."""
MIN_LIMIT_SHARE = 0.02
"""Smallest default limit, share of a joint's range, for sag and backlash."""

_DELAY_STEP_S = 0.02
_PRIOR = 0.1
"""Weight of the default delay: one arm that moves at 1/5 of max_velocity for 0.5 s."""
_MEMORY_S = 7.0
"""Time constant of the delay estimate."""
_LEARN_PERIOD_S = 0.04
_MOVING_SHARE = 0.05
"""Share of max_velocity above which a measured joint moves."""
_RING_STEP_S = 0.01
_RING_ROWS = 128
_MAX_STEP_S = 1.0


@dataclass(frozen=True)
class TrackingFault:
    """Why the motion must end."""

    reason: str
    stale: bool
    """Joint states stopped; otherwise a joint does not follow its commands."""


class TrackingMonitor:
    """Compares each joint state with the command for its stamp minus the robot's delay.

    The delay (transport, controller cycle, servo lag) is estimated from moving joints: the one from
    0 to `MAX_DELAY_S` with the smallest variance of the error over the last seconds. Constant
    offsets (gravity) do not affect it; grippers, joints at rest, and errors above half of the limit
    are excluded.
    """

    def __init__(
        self, joints: JointGroup, time_s: float = 0.5, max_state_age_s: float = 0.1
    ) -> None:
        """Raises ValueError out of range.

        Args:
            joints: names, velocity limits and `max_tracking_error`; where that is 0, the limit
                follows from the delay, and grippers, which hold objects, have none.
            time_s: how long an error may exceed its limit, or joint states may be stale; 0: off.
            max_state_age_s: an older joint state is stale.
        """
        if not (math.isfinite(time_s) and time_s >= 0):
            raise ValueError(f"tracking_time_s must be finite and >= 0, got {time_s}")
        self.delay_s = DEFAULT_DELAY_S
        """Estimated delay of the measured behind the commanded motion."""
        self.errors: FloatArray = np.zeros(len(joints))
        """[n_joints] distance of the newest joint state from its command, rad or m."""
        self.problem = ""
        """One line while a joint exceeds its limit."""
        self._joints = joints
        self._time_s = time_s
        self._max_state_age_s = max_state_age_s
        self._given = joints.max_tracking_error > 0
        self._delays_s = np.arange(0.0, MAX_DELAY_S + 1e-9, _DELAY_STEP_S)
        self._prior = _PRIOR * (self._delays_s - DEFAULT_DELAY_S) ** 2
        shape = (len(self._delays_s), len(joints))
        self._weight = np.zeros(len(joints))
        self._sum: FloatArray = np.zeros(shape)
        self._squares: FloatArray = np.zeros(shape)
        self._times_s = np.empty(2 * _RING_ROWS)
        self._commands = np.empty((2 * _RING_ROWS, len(joints)))
        self._set_limits()
        self.reset()

    def reset(self) -> None:
        """End the motion; keeps the delay."""
        self._rows = 0
        self._over_s = 0.0
        self._began_s = self._checked_s = self._state_s = -math.inf
        self._learned_s = -math.inf
        self._learned_at: FloatArray | None = None
        self.problem = ""
        self.errors = np.zeros(len(self._joints))

    def check(
        self, now_s: float, commanded: FloatArray, state: tuple[float, FloatArray] | None
    ) -> TrackingFault | None:
        """Record the command for `now_s`, and compare the newest joint state.

        Args:
            now_s: on the clock of the joint states' stamps.
            commanded: [n_joints]; the first one after `reset` holds for all earlier times.
            state: stamp and positions [n_joints] of the newest joint state.
        """
        if self._time_s == 0:
            return None
        if self._rows == 0:
            self._began_s = self._checked_s = now_s
        self._record(now_s, commanded)
        passed_s = min(max(0.0, now_s - self._checked_s), _MAX_STEP_S)
        self._checked_s = now_s
        state_s = self._began_s if state is None else max(state[0], self._began_s)
        age_s = now_s - state_s
        if state is None or age_s > self._max_state_age_s:
            if age_s <= self._max_state_age_s + self._time_s:
                return None
            reason = f"no joint state for {age_s:.2f} s in motion; check the driver"
            return TrackingFault(reason, stale=True)
        if state[0] != self._state_s:
            self._compare(*state)
        return self._check_errors(passed_s)

    def plausible(self, state_s: float, measured: FloatArray) -> bool:
        """Whether joints that follow can be at `measured` [n_joints] at `state_s`.

        Excludes single wrong joint states, which end no motion, from inference.
        """
        if self._time_s <= 0 or self._rows == 0:
            return True
        return bool((self._errors(state_s, measured) <= self.limits).all())

    def _errors(self, state_s: float, measured: FloatArray) -> FloatArray:
        commanded = self._commanded(np.array([state_s - self.delay_s]))[0]
        return np.asarray(np.abs(measured - commanded))

    def _compare(self, state_s: float, measured: FloatArray) -> None:
        self._state_s = state_s
        self.errors = self._errors(state_s, measured)
        passed_s = state_s - self._learned_s
        if self._learned_at is None or passed_s <= 0:
            self._learned_s, self._learned_at = state_s, measured
        elif passed_s >= _LEARN_PERIOD_S:
            self._learn(state_s, measured, passed_s)
            self._learned_s, self._learned_at = state_s, measured

    def _check_errors(self, passed_s: float) -> TrackingFault | None:
        excess = self.errors / self.limits
        joint = int(excess.argmax())
        if excess[joint] <= 1:
            self.problem = ""
            # Intermittent errors, as with two publishers, add up too.
            self._over_s = max(0.0, self._over_s - passed_s / 2)
            return None
        self._over_s += passed_s
        what = (
            f"joint {self._joints.names[joint]!r} is {self.errors[joint]:.3g} from its command, "
            f"limit {self.limits[joint]:.3g}"
        )
        self.problem = f"tracking: {what}"
        if self._over_s < self._time_s:
            return None
        return TrackingFault(f"{what} (e-stop, drives off, or an obstacle?)", stale=False)

    def _record(self, now_s: float, commanded: FloatArray) -> None:
        """Keep the newest command, and earlier ones at least `_RING_STEP_S` apart."""
        rows = self._rows
        if rows and now_s < self._times_s[rows - 1]:
            return
        if rows > 1 and now_s < self._times_s[rows - 2] + _RING_STEP_S:
            rows -= 1
        if rows == len(self._times_s):
            rows = _RING_ROWS
            self._times_s[:rows] = self._times_s[rows:]
            self._commands[:rows] = self._commands[rows:]
        self._times_s[rows] = now_s
        self._commands[rows] = commanded
        self._rows = rows + 1

    def _commanded(self, times_s: FloatArray) -> FloatArray:
        """Times [n] → commands [n, n_joints]; constant beyond both ends of the record."""
        last = self._rows - 1
        after = np.searchsorted(self._times_s[: self._rows], times_s)
        after = np.minimum(np.maximum(after, min(1, last)), last)
        before = np.maximum(after - 1, 0)
        begin_s = self._times_s[before]
        span_s = np.maximum(self._times_s[after] - begin_s, 1e-9)
        share = np.minimum(np.maximum((times_s - begin_s) / span_s, 0.0), 1.0)[:, None]
        start = self._commands[before]
        return np.asarray(start + share * (self._commands[after] - start))

    def _learn(self, state_s: float, measured: FloatArray, passed_s: float) -> None:
        assert self._learned_at is not None
        max_velocity = self._joints.max_velocity
        moved = np.abs(measured - self._learned_at)
        sound = (moved > _MOVING_SHARE * passed_s * max_velocity) & (self.errors < self.limits / 2)
        sound &= ~self._joints.gripper
        if not sound.any():
            return
        errors_s = (self._commanded(state_s - self._delays_s) - measured) / max_velocity
        passed_s = min(passed_s, 0.1)
        kept = math.exp(-passed_s / _MEMORY_S)
        weight = passed_s * sound
        self._weight = kept * self._weight + weight
        errors_s *= weight
        self._sum = kept * self._sum + errors_s
        errors_s *= errors_s
        errors_s /= np.maximum(weight, 1e-12)
        self._squares = kept * self._squares + errors_s
        scatter = self._squares - self._sum**2 / np.maximum(self._weight, 1e-12)
        self.delay_s = self._best_delay(scatter.sum(axis=1) + self._prior)
        self._set_limits()

    def _best_delay(self, costs: FloatArray) -> float:
        """The minimum of the costs [n_delays], by a parabola through its neighbours."""
        best = int(costs.argmin())
        if not 0 < best < len(costs) - 1:
            return float(self._delays_s[best])
        left, middle, right = costs[best - 1 : best + 2]
        bend = left - 2 * middle + right
        shift = 0.0 if bend <= 0 else 0.5 * (left - right) / bend
        return float(self._delays_s[best] + shift * _DELAY_STEP_S)

    def _set_limits(self) -> None:
        joints = self._joints
        usual = np.maximum(
            joints.max_velocity * (self.delay_s + MARGIN_S),
            MIN_LIMIT_SHARE * (joints.upper - joints.lower),
        )
        usual = np.where(joints.gripper, math.inf, usual)
        self.limits = np.where(self._given, joints.max_tracking_error, usual)
        """[n_joints] rad or m; infinite without a limit."""
