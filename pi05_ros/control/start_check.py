"""Checks that measured joint states agree before a motion starts at them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from pi05_ros.types import FloatArray, JointGroup

MIN_SPAN_S = 0.05
"""Shortest span of the joint states that must agree."""
MAX_GAP_S = 0.2
"""Joint states before a longer gap do not count."""
NOISE_SHARE = 0.002
"""Encoder noise as a share of a joint's range: two counts of a 10-bit sensor."""
MAX_NOISE_S = 0.01
"""Bound of the noise for joints with wide limits: the distance at max_velocity in this time."""
STANDING_SHARE = 0.1
"""Share of max_velocity below which a joint stands."""


@dataclass(frozen=True)
class StartProof:
    """The result of a start check."""

    positions: FloatArray | None
    """[n_joints] to start at; None: the motion must not start."""
    problem: str = ""
    """Why not: joint, value and remedy."""
    too_few: bool = False
    """The only problem is that more joint states are needed."""


class StartCheck:
    """Proves a start position by several consecutive joint states.

    The newest `states` joint states, and at least those of the last `MIN_SPAN_S`, must agree:
    between neighbours no joint moves faster than max_velocity, over all of them none faster than
    `STANDING_SHARE` of it, both plus the encoder noise, and every joint is within its limits plus
    the tolerance. A glitch or a second publisher with other values fails the check while it is in
    the window.
    """

    def __init__(
        self,
        joints: JointGroup,
        states: int = 5,
        tolerance: float = 0.03,
        *,
        standing: bool = True,
    ) -> None:
        """Raises ValueError out of range.

        Args:
            joints: names, limits and velocity limits.
            states: joint states that must agree, at least 2.
            tolerance: allowed distance beyond the limits, share of a joint's range.
            standing: False also accepts moving arms, for runs that command nothing.
        """
        if states < 2:
            raise ValueError(f"start_states must be at least 2, got {states}")
        if not (math.isfinite(tolerance) and tolerance >= 0):
            raise ValueError(f"start_tolerance must be finite and >= 0, got {tolerance}")
        span = joints.upper - joints.lower
        self.states = states
        self.noise = np.minimum(NOISE_SHARE * span, MAX_NOISE_S * joints.max_velocity)
        """[n_joints] rad or m."""
        self.lower = joints.lower - tolerance * span
        self.upper = joints.upper + tolerance * span
        self._joints = joints
        self._standing = standing

    def check(self, stamps_s: FloatArray, positions: FloatArray) -> StartProof:
        """[n] increasing stamps (equal ones allowed), [n, n_joints] finite positions → proof."""
        first = self._window(stamps_s)
        if first is None:
            return StartProof(
                None,
                f"start: {len(stamps_s)} joint states since the arms rest, {self.states} without a "
                f"gap of {MAX_GAP_S:g} s are needed; publish joint_states at 20 Hz or more",
                too_few=True,
            )
        stamps_s, positions = stamps_s[first:], positions[first:]
        problem = self._jump(stamps_s, positions) or self._outside(positions[-1])
        if not problem and self._standing:
            problem = self._motion(stamps_s, positions)
        return StartProof(None, problem) if problem else StartProof(positions[-1].copy())

    def inside(self, position: FloatArray) -> bool:
        """Whether [n_joints] lie within the limits plus the tolerance."""
        return not self._outside(position)

    def _window(self, stamps_s: FloatArray) -> int | None:
        """Index of the first joint state that counts; None if there are too few."""
        count = len(stamps_s)
        if count < self.states:
            return None
        first = int(np.searchsorted(stamps_s, stamps_s[-1] - MIN_SPAN_S, side="right")) - 1
        first = min(first, count - self.states)
        if first < 0 or np.diff(stamps_s[first:]).max() > MAX_GAP_S:
            return None
        return first

    def _jump(self, stamps_s: FloatArray, positions: FloatArray) -> str:
        between_s = np.diff(stamps_s)
        with np.errstate(over="ignore"):
            steps = np.abs(np.diff(positions, axis=0))
            excess = steps / (between_s[:, None] * self._joints.max_velocity + self.noise)
        row, joint = np.unravel_index(int(np.argmax(excess)), excess.shape)
        if excess[row, joint] <= 1:
            return ""
        return (
            f"start: joint {self._joints.names[joint]!r} jumps from {positions[row, joint]:.4g} to "
            f"{positions[row + 1, joint]:.4g} in {between_s[row]:.3f} s; find a second publisher "
            "with 'ros2 topic info -v joint_states', or check the encoder"
        )

    def _outside(self, position: FloatArray) -> str:
        beyond = np.maximum(self.lower - position, position - self.upper)
        joint = int(np.argmax(beyond / (self.upper - self.lower)))
        if beyond[joint] <= 0:
            return ""
        spec = self._joints.joints[joint]
        return (
            f"start: joint {spec.name!r} is at {position[joint]:.4g}, outside its limits "
            f"{spec.lower:.4g} to {spec.upper:.4g}; move it inside, or correct "
            f"joints.{spec.name}.lower and upper"
        )

    def _motion(self, stamps_s: FloatArray, positions: FloatArray) -> str:
        span_s = float(stamps_s[-1] - stamps_s[0])
        moved = positions.max(axis=0) - positions.min(axis=0)
        allowed = STANDING_SHARE * self._joints.max_velocity * span_s + self.noise
        joint = int(np.argmax(moved / allowed))
        if moved[joint] <= allowed[joint]:
            return ""
        return (
            f"start: joint {self._joints.names[joint]!r} moves by {moved[joint]:.3g} in "
            f"{span_s:.3f} s, at most {allowed[joint]:.3g} is allowed; wait until the arm rests, "
            "or stop what moves it"
        )
