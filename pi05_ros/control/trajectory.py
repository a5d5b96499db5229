"""The stream of trajectories that joint_trajectory_controller follows."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pi05_ros.control.limits import Clamps, MotionLimiter, MotionState
from pi05_ros.types import FloatArray, JointGroup

IntArray = NDArray[np.int64]

_GRID_TOLERANCE = 1e-4
"""Share of a step within which a time is on the grid; float64 epoch seconds resolve 0.24 µs."""


class ClockJumpedBackError(RuntimeError):
    """The clock is behind an earlier call; start again from measured positions."""


@dataclass(frozen=True)
class TrajectoryPoints:
    """One trajectory message: cubic between the points, at rest at its last."""

    stamp_s: float
    """The header's stamp."""
    times_from_start_s: FloatArray
    """[n] strictly increasing from 0."""
    positions: FloatArray
    """[n, n_joints] rad or m."""
    velocities: FloatArray
    """[n, n_joints] rad/s or m/s; the last row is exactly zero."""


@dataclass(frozen=True)
class ClampCounts:
    """Commanded steps in which a joint did not get what was asked for, [n_joints] each."""

    position: IntArray
    velocity: IntArray
    acceleration: IntArray
    held: IntArray
    """Steps in which the joint braked because its target was not finite."""


class CommandStream:
    """Keeps the commanded motion on a time grid and makes each tick's trajectory.

    A tick plans from the first grid time t_k at or after now + lead_s: the state at t_k is read
    from the trajectory published before it, its tail included, and `lookahead_steps` limited steps
    follow the targets; then every joint brakes to rest. What was published for the time up to t_k
    stays, so position and velocity are continuous at every replacement.

    Controllers read a stamp in two ways (ros2_controllers, joint_trajectory_controller/src). Up to
    Kilted the old trajectory ends when the message arrives: a cubic leads from there to the first
    point, or points in the past are cut off. From 6.8 on the old one goes on until the stamp, but a
    stamp in the past counts as the time of arrival and delays all points. The message therefore
    begins with its stamp, at the first grid time after now + transport_s, and repeats the published
    points from there to t_k. The grid lies half a step off the first tick: a message that
    arrives within the half step has the cubic coincide with the old trajectory, whose segment it
    ends. The first trajectory after `start` begins at t_k, since the controller's reference may
    differ from the measured positions and gets until then to move there.

    Not thread safe.
    """

    def __init__(
        self,
        joints: JointGroup,
        limiter: MotionLimiter,
        dt_s: float,
        lookahead_steps: int = 10,
        lead_s: float = 0.02,
        transport_s: float = 0.003,
    ) -> None:
        """Raises ValueError if the limiter has another grid or joints, or a value is out of range.

        Args:
            joints: the commanded joints.
            limiter: made for the same joints and `dt_s`.
            dt_s: the grid.
            lookahead_steps: steps that follow the targets before the tail, at least 1.
            lead_s: how late a message may reach the controller. After a longer time it has followed
                the old trajectory past t_k and jumps to the other.
            transport_s: how long a message usually takes; more than lead_s counts as that.
        """
        if limiter.dt_s != dt_s:
            raise ValueError(f"the limiter's dt_s {limiter.dt_s} is not the stream's {dt_s}")
        if limiter.joints.names != joints.names:
            raise ValueError(f"the limiter's joints {limiter.joints.names} are not {joints.names}")
        if lookahead_steps < 1:
            raise ValueError(f"lookahead_steps must be >= 1, got {lookahead_steps}")
        if not (math.isfinite(lead_s) and lead_s >= 0):
            raise ValueError(f"lead_s must be finite and >= 0, got {lead_s}")
        if not (math.isfinite(transport_s) and transport_s >= 0):
            raise ValueError(f"transport_s must be finite and >= 0, got {transport_s}")
        self.dt_s = dt_s
        self.lead_s = lead_s
        self.transport_s = min(transport_s, lead_s)
        self.lookahead_steps = lookahead_steps
        self._limiter = limiter
        self._ramp = np.arange(lookahead_steps)[:, None] * limiter.velocity_step
        self.clamps = ClampCounts(*(np.zeros(len(joints), dtype=np.int64) for _ in range(4)))
        self._active = False
        self._origin_s = math.nan
        # What is commanded, by row: grid index self._first, self._first + 1, ...
        self._positions: FloatArray = np.empty((0, len(joints)))
        self._velocities: FloatArray = np.empty((0, len(joints)))
        self._first: int | None = None
        self._planned_from = 0
        self._planned_clamps: Clamps | None = None

    @property
    def active(self) -> bool:
        """Between `start` and `hold`."""
        return self._active

    @property
    def rest_time_s(self) -> float:
        """When the published trajectory comes to rest; -inf before the first one."""
        if self._first is None:
            return -math.inf
        return self._origin_s + (self._first + len(self._positions) - 1) * self.dt_s

    def start(self, position: FloatArray, now_s: float) -> None:
        """Begin at rest at the measured positions [n_joints]; forgets what was published.

        A non-finite position raises ValueError. After `hold`, wait for `rest_time_s`: a start
        while the arms still move would ask them to stand at once.
        """
        state = self._limiter.at_rest(position)
        self._positions = state.position[None]
        self._velocities = state.velocity[None]
        self._origin_s = now_s
        self._first = None
        self._planned_from = 0
        self._planned_clamps = None
        self._active = True

    def tick(
        self, now_s: float, targets: Callable[[FloatArray], FloatArray | None]
    ) -> TrajectoryPoints:
        """The trajectory to publish at `now_s`.

        Args:
            now_s: may step back by up to one dt_s, for a clock that is being adjusted.
            targets: times [n] → positions [n, n_joints] there, non-finite ones brake their joint;
                None brakes all.

        Raises:
            RuntimeError: before `start` or after `hold`.
            ClockJumpedBackError: the clock jumped back.
            ValueError: the targets have another shape.
        """
        if not self._active:
            raise RuntimeError("the command stream is not started: call start() first")
        index = self._advance(now_s)
        grid = np.arange(index, index + self.lookahead_steps + 2, dtype=np.float64)
        wanted = targets(self._origin_s + self.dt_s * grid)
        if wanted is None:
            return self._publish(now_s, index)
        wanted = np.asarray(wanted, dtype=np.float64)
        if wanted.shape != (len(grid), self._positions.shape[1]):
            raise ValueError(
                f"targets must give shape {(len(grid), self._positions.shape[1])}, "
                f"got {wanted.shape}"
            )
        positions, velocities, clamps = self._limiter.follow(
            self._state_at(index), wanted[1:-1], self._target_velocities(wanted)
        )
        return self._publish(now_s, index, positions, velocities, clamps)

    def settled_in_s(self, now_s: float) -> float:
        """How long to keep back a message that is not sent with the ticks; mostly 0.

        Sent now, it might arrive one step before the one that its first point ends, and a
        controller that replaces on arrival would draw one cubic across both.
        """
        if self._first is None:
            return 0.0
        steps = (now_s - self._origin_s) / self.dt_s
        end = math.floor(steps + _GRID_TOLERANCE) + 1
        return (end - steps) * self.dt_s if steps + self.transport_s / self.dt_s > end else 0.0

    def hold(self, now_s: float) -> TrajectoryPoints:
        """The trajectory that brakes to rest from the commanded state at now + lead; ends ticks.

        May be called again. Raises RuntimeError if the stream was never started, and
        ClockJumpedBackError as `tick` does.
        """
        if math.isnan(self._origin_s):
            raise RuntimeError("the command stream is not started: call start() first")
        self._active = False
        return self._publish(now_s, self._advance(now_s))

    def stop(self) -> None:
        """End ticks without a last trajectory: what was published brakes by its own tail."""
        self._active = False

    def commanded(self, time_s: float) -> MotionState:
        """The state that the last published trajectory commands at `time_s`; at rest beyond it."""
        if math.isnan(self._origin_s):
            raise RuntimeError("the command stream is not started: call start() first")
        last = len(self._positions) - 1
        steps = (time_s - self._origin_s) / self.dt_s - (self._first or 0)
        steps = min(max(steps, 0.0), float(last))
        row = min(int(steps), max(last - 1, 0))
        share = steps - row
        before, after = self._velocities[row], self._velocities[min(row + 1, last)]
        velocity = (1 - share) * before + share * after
        return MotionState(
            self._positions[row] + share * self.dt_s / 2 * (before + velocity), velocity
        )

    def _target_velocities(self, wanted: FloatArray) -> FloatArray:
        """[n + 2, n_joints] targets → [n, n_joints] velocities of the inner ones.

        Central differences, no faster than what full braking brings down to any slower target
        ahead: without that, the joints would run past a chunk that ends in motion.
        """
        with np.errstate(invalid="ignore", over="ignore"):
            velocities = (wanted[2:] - wanted[:-2]) / (2 * self.dt_s)
            reachable = np.abs(velocities) + self._ramp
            cap = np.fmin.accumulate(reachable[::-1], axis=0)[::-1] - self._ramp
            return np.asarray(np.minimum(np.maximum(velocities, -cap), cap))

    def _advance(self, now_s: float) -> int:
        """The grid index to plan from; what was planned before it is commanded for good."""
        if self._first is None:
            self._origin_s = now_s + self.dt_s / 2
        steps = (now_s - self._origin_s + self.lead_s) / self.dt_s
        index = math.ceil(steps - _GRID_TOLERANCE)
        if index < self._planned_from:
            if steps < self._planned_from - 2:
                raise ClockJumpedBackError(
                    f"the clock jumped back to {now_s} s: start again from measured positions"
                )
            index = self._planned_from
        executed = index - self._planned_from
        if executed and self._planned_clamps is not None:
            for kind in ("position", "velocity", "acceleration", "held"):
                counts = getattr(self.clamps, kind)
                counts += getattr(self._planned_clamps, kind)[:executed].sum(axis=0)
        return index

    def _rows(self, indices: IntArray) -> IntArray:
        """Grid indices → rows of what was published; beyond its end it rests."""
        first = int(indices[0]) if self._first is None else self._first
        return np.minimum(np.maximum(indices - first, 0), len(self._positions) - 1)

    def _state_at(self, index: int) -> MotionState:
        row = self._rows(np.array([index]))[0]
        return MotionState(self._positions[row], self._velocities[row])

    def _publish(
        self,
        now_s: float,
        index: int,
        positions: FloatArray | None = None,
        velocities: FloatArray | None = None,
        clamps: Clamps | None = None,
    ) -> TrajectoryPoints:
        """Join the published way to `index`, the steps from there [n, n_joints], and the tail."""
        steps = (now_s - self._origin_s) / self.dt_s
        present = math.floor(steps + _GRID_TOLERANCE)
        stamped = math.ceil(steps + self.transport_s / self.dt_s - _GRID_TOLERANCE)
        first = index
        if self._first is not None:
            first = max(self._first, min(present, index))
        begin = max(0, min(stamped, index) - first)
        kept = self._rows(np.arange(first, index + 1))
        way: list[FloatArray] = [self._positions[kept]]
        speeds: list[FloatArray] = [self._velocities[kept]]
        if positions is not None and velocities is not None:
            way.append(positions)
            speeds.append(velocities)
        tail, tail_speeds = self._limiter.brake_to_rest(MotionState(way[-1][-1], speeds[-1][-1]))
        self._positions = np.concatenate((*way, tail))
        self._velocities = np.concatenate((*speeds, tail_speeds))
        self._positions.setflags(write=False)
        self._velocities.setflags(write=False)
        self._first = first
        self._planned_from = index
        self._planned_clamps = clamps
        count = len(self._positions) - begin
        return TrajectoryPoints(
            self._origin_s + (first + begin) * self.dt_s,
            self.dt_s * np.arange(count, dtype=np.float64),
            self._positions[begin:],
            self._velocities[begin:],
        )
