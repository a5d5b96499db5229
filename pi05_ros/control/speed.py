"""How a plan is entered and how fast it is executed, between the scheduler and the limits.

`SpeedScaler` maps the clock to the plan's time, `StartRamp` leads from the measured positions into
a plan that begins elsewhere, `LowPassFilter` smooths the targets.
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

FIRST_COMMANDS = ("ramp", "refuse")

_TIME_TOLERANCE_S = 1e-6
_SMOOTHSTEP_PEAK = 1.5
"""Largest slope of 3s² - 2s³."""
_MAX_SEGMENTS = 32
"""Changes of speed that are kept; a chunk's observation is rarely older than the last two."""


class LowPassFilter:
    """A critically damped second-order low-pass on the targets of each joint.

    y'' = ω²·(target - y) - 2ω·y', exact for a target that is constant over a step. The output is
    continuous in position and velocity, does not overshoot a step, and lags a steady motion by
    `lag_s` = 2/ω. Joints of `exempt` pass unchanged.

    Successive ticks filter overlapping times, so the states of each call are kept, and the next
    call begins at the kept state of its first time.
    """

    def __init__(self, cutoff_hz: float, exempt: NDArray[np.bool_] | None = None) -> None:
        """Raises ValueError for a cutoff that is not above 0."""
        if not (math.isfinite(cutoff_hz) and cutoff_hz > 0):
            raise ValueError(f"cutoff_hz must be finite and > 0, got {cutoff_hz}")
        # Two equal poles in cascade: 3 dB down at 0.6436 of each pole's frequency.
        self._omega = 2 * math.pi * cutoff_hz / math.sqrt(math.sqrt(2.0) - 1.0)
        self.lag_s = 2.0 / self._omega
        self._exempt = None if exempt is None else np.array(exempt, dtype=bool)
        self._times_s: FloatArray = np.empty(0)
        self._positions: FloatArray = np.empty((0, 0))
        self._velocities: FloatArray = np.empty((0, 0))

    def clear(self) -> None:
        """The next `filter` begins at rest at its first target."""
        self._times_s = np.empty(0)

    def start(self, position: FloatArray) -> None:
        """The next `filter` begins at rest at `position` [n_joints]."""
        self._times_s = np.array([-math.inf])
        self._positions = np.array(position, dtype=np.float64)[None]
        self._velocities = np.zeros_like(self._positions)

    def filter(self, times_s: FloatArray, targets: Targets) -> FloatArray | None:
        """The smoothed targets [n, n_joints] at increasing times [n]."""
        wanted = targets(times_s)
        if wanted is None:
            self.clear()
            return None
        if not len(self._times_s):
            self.start(wanted[0])
        position, velocity = self._state(float(times_s[0]))
        positions, velocities = [position], [velocity]
        for step_s, target in zip(np.diff(times_s), wanted[1:], strict=True):
            decay = math.exp(-self._omega * step_s)
            gap = position - target
            slope = velocity + self._omega * gap
            position = target + (gap + slope * step_s) * decay
            velocity = (velocity - self._omega * slope * step_s) * decay
            positions.append(position)
            velocities.append(velocity)
        self._times_s = np.array(times_s)
        self._positions, self._velocities = np.stack(positions), np.stack(velocities)
        if self._exempt is None:
            return self._positions
        return np.where(self._exempt, wanted, self._positions)

    def _state(self, time_s: float) -> tuple[FloatArray, FloatArray]:
        """Position and velocity at the latest kept time up to `time_s`."""
        row = int(np.searchsorted(self._times_s, time_s + _TIME_TOLERANCE_S, side="right")) - 1
        row = max(row, 0)
        return self._positions[row], self._velocities[row]


class StartRamp:
    """Leads from the measured positions into a plan that begins elsewhere, or refuses it.

    Applies where a joint is farther than `distance` from the plan's first target: the targets are
    mixed with the start positions by a share that rises smoothly from 0 to 1, slowly enough that
    the mixing moves no joint faster than `speed` of its velocity limit. Grippers are exempt: a
    gripper that is closed where the policy wants it open is normal.
    """

    def __init__(
        self, joints: JointGroup, mode: str = "ramp", distance: float = 0.5, speed: float = 0.25
    ) -> None:
        """Raises ValueError out of range.

        Args:
            joints: names and velocity limits.
            mode: one of `FIRST_COMMANDS`.
            distance: rad or m; a first target beyond it is far.
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
        """Prepare the ramp from `positions` [n_joints] to the plan's first `target` [n_joints].

        Times are the plan's. Returns the reason for a refusal, in mode `refuse`.
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
        duration_s = _SMOOTHSTEP_PEAK * float(
            np.max(away / (self._speed * self._joints.max_velocity))
        )
        self._end_s = now_s + duration_s
        return None

    def apply(self, times_s: FloatArray, targets: FloatArray) -> FloatArray:
        """Times [n], targets [n, n_joints] → ramped targets [n, n_joints]."""
        if self._end_s <= self._start_s or times_s[0] >= self._end_s:
            return targets
        share = np.clip((times_s - self._start_s) / (self._end_s - self._start_s), 0.0, 1.0)
        share = (share * share * (3.0 - 2.0 * share))[:, None]
        mixed = self._from + share * (targets - self._from)
        return np.where(self._joints.gripper, targets, mixed)


@dataclass(frozen=True)
class _Segment:
    """From `start_s` on the rate goes linearly from `rate` to `target` within `ramp_s`."""

    start_s: float
    plan_s: float
    rate: float
    target: float
    ramp_s: float

    def plan(self, times_s: FloatArray) -> FloatArray:
        since_s = times_s - self.start_s
        ramped_s = np.minimum(since_s, self.ramp_s)
        moved_s = self.rate * ramped_s
        if self.ramp_s > 0:
            slope = (self.target - self.rate) / self.ramp_s
            moved_s = moved_s + 0.5 * slope * np.maximum(ramped_s, 0.0) ** 2
        rest_s = np.maximum(since_s - self.ramp_s, 0.0)
        return np.asarray(self.plan_s + moved_s + self.target * rest_s)

    def rate_at(self, time_s: float) -> float:
        if self.ramp_s <= 0 or time_s >= self.start_s + self.ramp_s:
            return self.target
        share = max(0.0, (time_s - self.start_s) / self.ramp_s)
        return self.rate + share * (self.target - self.rate)


class SpeedScaler:
    """Maps the clock to the plan's time, which advances by `scale` seconds per second.

    At scale 0 the plan stands, at 1 chunks are executed at the speed they were predicted for. The
    rate changes along a ramp, so position and velocity stay continuous. At a scale of 1 from the
    start, the plan's time equals the clock's.

    One thread writes, any thread may read: the segments are an immutable tuple, never empty, which
    a writer replaces by one assignment and a reader reads once.
    """

    def __init__(self, scale: float = 1.0, ramp_s: float = 0.5) -> None:
        """`ramp_s`: duration of a change from 0 to 1. Raises ValueError out of range."""
        if not (math.isfinite(ramp_s) and ramp_s >= 0):
            raise ValueError(f"speed_ramp_s must be finite and >= 0, got {ramp_s}")
        self._ramp_s = ramp_s
        self.scale = _checked(scale)
        """The requested scale."""
        self._segments: tuple[_Segment, ...] = ()
        self.reset()

    def rate(self, now_s: float) -> float:
        """Plan seconds per second at `now_s`, during a ramp between two scales."""
        return self._segments[-1].rate_at(now_s)

    def set_scale(self, scale: float, now_s: float) -> None:
        """Ramp to another scale from `now_s` on. Raises ValueError outside 0 to 1."""
        self.scale = _checked(scale)
        rate = self.rate(now_s)
        ramp_s = abs(scale - rate) * self._ramp_s
        change = _Segment(now_s, self.plan_s(now_s), rate, scale, ramp_s)
        self._segments = (*self._segments[1 - _MAX_SEGMENTS :], change)

    def reset(self) -> None:
        """Run at `scale` without a ramp, for a robot at rest."""
        self._segments = (_Segment(0.0, 0.0, self.scale, self.scale, 0.0),)

    def plan_s(self, time_s: float) -> float:
        """The plan's time at one clock time."""
        return float(self.plan_times_s(time_s))

    def plan_times_s(self, times_s: ArrayLike) -> FloatArray:
        """The plan's times, of any shape; future ones assume no further change."""
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
