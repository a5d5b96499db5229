"""How fast a plan is executed: its own time, which can be slowed down, held and resumed.

A follower in front of the limits that takes the roughness out of the targets, for some lag.

A first command that is far from where the robot stands: go there slowly, or not at all.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pi05_ros.types import FloatArray, JointGroup

Targets = Callable[[FloatArray], FloatArray | None]
"""Times [n] → positions [n, n_joints], or None where there are none."""

_TIME_TOLERANCE_S = 1e-6


class LowPassFilter:
    """A critically damped second-order low-pass on the targets, joint by joint.

    y'' = ω²·(target - y) - 2ω·y', exact for a target that is constant over a step. The output is
    continuous in position and velocity whatever the targets do, it never overshoots a step, and it
    runs behind a steady motion by `lag_s` = 2/ω. Joints of `exempt` pass unchanged.

    A tick asks for times ahead that the tick after it asks for again, so the states of a course
    are kept, and the next course begins at the state kept for its first time.
    """

    def __init__(self, cutoff_hz: float, exempt: NDArray[np.bool_] | None = None) -> None:
        """Raises ValueError for a cutoff that is not above 0."""
        if not (math.isfinite(cutoff_hz) and cutoff_hz > 0):
            raise ValueError(f"cutoff_hz must be finite and > 0, got {cutoff_hz}")
        # the cascade of two equal poles is 3 dB down at 0.6436 of each pole's frequency
        self._omega = 2 * math.pi * cutoff_hz / math.sqrt(math.sqrt(2.0) - 1.0)
        self._exempt = None if exempt is None else np.array(exempt, dtype=bool)
        self._times_s: FloatArray = np.empty(0)
        self._positions: FloatArray = np.empty((0, 0))
        self._velocities: FloatArray = np.empty((0, 0))

    @property
    def lag_s(self) -> float:
        """How far the output runs behind a steady motion."""
        return 2.0 / self._omega

    def clear(self) -> None:
        """Forget the motion; the next course begins at rest at its first target."""
        self._times_s = np.empty(0)

    def start(self, position: FloatArray) -> None:
        """Begin the next course at rest at `position` [n_joints] instead."""
        self._times_s = np.array([-math.inf])
        self._positions = np.array(position, dtype=np.float64)[None]
        self._velocities = np.zeros_like(self._positions)

    def course(self, times_s: FloatArray, targets: Targets) -> FloatArray | None:
        """The targets at increasing times [n], smoothed: [n, n_joints]."""
        wanted = targets(times_s)
        if wanted is None:
            self.clear()
            return None
        if not len(self._times_s):
            self.start(wanted[0])
        position, velocity = self._kept(float(times_s[0]))
        positions, velocities = [position], [velocity]
        steps_s = np.diff(times_s)
        for step_s, target in zip(steps_s, wanted[1:], strict=True):
            decay = math.exp(-self._omega * step_s)
            gap = position - target
            pull = velocity + self._omega * gap
            position = target + (gap + pull * step_s) * decay
            velocity = (velocity - self._omega * pull * step_s) * decay
            positions.append(position)
            velocities.append(velocity)
        self._times_s = np.array(times_s)
        self._positions, self._velocities = np.stack(positions), np.stack(velocities)
        if self._exempt is None:
            return self._positions
        return np.where(self._exempt, wanted, self._positions)

    def _kept(self, time_s: float) -> tuple[FloatArray, FloatArray]:
        """The state at the latest kept time that is not after `time_s`, moved on to it."""
        row = int(np.searchsorted(self._times_s, time_s + _TIME_TOLERANCE_S, side="right")) - 1
        row = max(row, 0)
        return self._positions[row], self._velocities[row]


FIRST_COMMANDS = ("ramp", "refuse")

_PEAK = 1.5
"""Largest slope of the smooth step 3s² - 2s³."""


class StartRamp:
    """Leads from the measured positions into a plan that begins elsewhere.

    Only a plan whose first target is farther than `distance` from a joint is touched: its targets
    are mixed with the positions at the start, by a share that rises smoothly from 0 to 1 in the
    time that keeps every joint's speed on that way within `speed` of its limit. Grippers are left
    alone: closed where the policy wants them open is nothing unusual.
    """

    def __init__(
        self, joints: JointGroup, mode: str = "ramp", distance: float = 0.5, speed: float = 0.25
    ) -> None:
        """Raises ValueError out of range.

        Args:
            joints: names and velocity limits.
            mode: one of `FIRST_COMMANDS`.
            distance: rad or m from which on a first target counts as far.
            speed: share of the velocity limits, above 0 to 1.
        """
        if mode not in FIRST_COMMANDS:
            raise ValueError(f"first_command {mode!r}: choose one of {', '.join(FIRST_COMMANDS)}")
        if not (math.isfinite(distance) and distance >= 0):
            raise ValueError(f"first_command_distance must be finite and >= 0, got {distance}")
        if not 0 < speed <= 1:
            raise ValueError(f"first_command_speed must be above 0 and at most 1, got {speed}")
        self._joints = joints
        self._mode = mode
        self._distance = distance
        self._speed = speed
        self._from: FloatArray = np.empty(0)
        self._start_s = self._end_s = -math.inf

    def begin(self, positions: FloatArray, target: FloatArray, now_s: float) -> str | None:
        """From `positions` [n_joints] towards the first `target` [n_joints] of a plan, in its time.

        Returns why the motion must not start, in mode `refuse`.
        """
        away = np.where(self._joints.gripper, 0.0, np.abs(target - positions))
        worst = int(np.argmax(away))
        self._start_s = self._end_s = now_s
        if away[worst] <= self._distance:
            return None
        if self._mode == "refuse":
            return (
                f"first command: joint {self._joints.names[worst]!r} is at "
                f"{positions[worst]:.3f} and would go to {target[worst]:.3f}, limit "
                f"{self._distance:g} away; move it closer, or set faults.first_command to ramp"
            )
        self._from = positions.copy()
        duration_s = _PEAK * float(np.max(away / (self._speed * self._joints.max_velocity)))
        self._end_s = now_s + duration_s
        return None

    def course(self, times_s: FloatArray, targets: FloatArray) -> FloatArray:
        """[n] times, [n, n_joints] targets → the targets to follow there."""
        if self._end_s <= self._start_s or times_s[0] >= self._end_s:
            return targets
        share = np.clip((times_s - self._start_s) / (self._end_s - self._start_s), 0.0, 1.0)
        share = (share * share * (3.0 - 2.0 * share))[:, None]
        mixed = self._from + share * (targets - self._from)
        return np.where(self._joints.gripper, targets, mixed)


_MAX_SEGMENTS = 32
"""Changes of speed that are remembered; a chunk's observation is seldom older than the last two."""


@dataclass(frozen=True)
class _Segment:
    """From one change of speed to the next: the rate runs from `rate` to `target`, then stays."""

    start_s: float
    plan_s: float
    rate: float
    target: float
    ramp_s: float
    """How long the rate changes."""

    def plan(self, times_s: FloatArray) -> FloatArray:
        since_s = times_s - self.start_s
        ramped_s = np.minimum(since_s, self.ramp_s)
        way_s = self.rate * ramped_s
        if self.ramp_s > 0:
            slope = (self.target - self.rate) / self.ramp_s
            way_s = way_s + 0.5 * slope * np.maximum(ramped_s, 0.0) ** 2
        rest_s = np.maximum(since_s - self.ramp_s, 0.0)
        return np.asarray(self.plan_s + way_s + self.target * rest_s)

    def rate_at(self, time_s: float) -> float:
        if self.ramp_s <= 0 or time_s >= self.start_s + self.ramp_s:
            return self.target
        share = max(0.0, (time_s - self.start_s) / self.ramp_s)
        return self.rate + share * (self.target - self.rate)


class SpeedScaler:
    """The time that a plan has reached, `scale` seconds a second.

    The scale goes from 0, where the plan stands, to 1, where chunks are executed as fast as they
    were meant. A change is a ramp of the rate, so position and velocity of whatever follows the
    plan are continuous. At a scale of 1 from the start, the plan's time is the clock's.

    Any thread may read while one thread writes: the changes of speed are one immutable tuple,
    never empty, which a writer replaces by one assignment and a reader reads once.
    """

    def __init__(self, scale: float = 1.0, ramp_s: float = 0.5) -> None:
        """`ramp_s`: how long a change from 0 to 1 takes. Raises ValueError out of range."""
        if not (math.isfinite(ramp_s) and ramp_s >= 0):
            raise ValueError(f"speed_ramp_s must be finite and >= 0, got {ramp_s}")
        self._ramp_s = ramp_s
        self._scale = _checked(scale)
        self._segments: tuple[_Segment, ...] = ()
        self.reset()

    @property
    def scale(self) -> float:
        """What was asked for last."""
        return self._scale

    def rate(self, now_s: float) -> float:
        """Plan seconds per second at `now_s`, on the way to `scale`."""
        return self._segments[-1].rate_at(now_s)

    def set_scale(self, scale: float, now_s: float) -> None:
        """Go to another speed from `now_s` on. Raises ValueError outside 0 to 1."""
        self._scale = _checked(scale)
        rate = self.rate(now_s)
        ramp_s = abs(scale - rate) * self._ramp_s
        change = _Segment(now_s, self.plan_s(now_s), rate, scale, ramp_s)
        self._segments = (*self._segments[1 - _MAX_SEGMENTS :], change)

    def reset(self) -> None:
        """Begin at full scale without a ramp, as for a robot that stands."""
        self._segments = (_Segment(0.0, 0.0, self._scale, self._scale, 0.0),)

    def plan_s(self, time_s: float) -> float:
        """The plan's time at one time; times before the oldest change that is known ran as it."""
        return float(self.plan_times_s(time_s))

    def plan_times_s(self, times_s: ArrayLike) -> FloatArray:
        """The plan's times, of any shape, also of times to come if the speed is not changed."""
        times = np.asarray(times_s, dtype=np.float64)
        first, *changes = self._segments
        plan = first.plan(times)
        for segment in changes:
            plan = np.where(times >= segment.start_s, segment.plan(times), plan)
        return plan


def _checked(scale: float) -> float:
    if not 0 <= scale <= 1:
        raise ValueError(f"speed_scale must be from 0 to 1, got {scale}")
    return float(scale)
