"""The trajectories that joint_trajectory_controller follows, and the end of a motion.

A tick at `now` republishes the motion around now and replaces it from t_k on:

    published before  ...o---o---o---o---o---o
    published now            o---o---o---x---x---x---x---x---x
                               now   t_k         |   tail   |
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pi05_ros.control.limits import Clamps, MotionLimiter, MotionState
from pi05_ros.types import FloatArray

IntArray = NDArray[np.int64]

TRANSPORT_S = 0.012
"""Usual delay of a message to the controller, one controller period included, for `in_time`."""
_GRID_TOLERANCE = 1e-4
"""Share of a step; float64 epoch seconds resolve 0.24 µs."""
_TICK_JITTER = 0.1
"""Share of a step by which a tick may be late and still plan from the same grid time."""
_PAST_S = 0.02
"""How far before its publication a message begins, at least: for a controller that reads its clock
at the start of its cycle, and for clocks of two machines that differ."""
_HISTORY_S = 1.0
"""How far back `commanded` reaches, at least."""
_NOT_STARTED = "the command stream is not started: call start() first"


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


class ClampCounts(NamedTuple):
    """Commanded steps in which a joint did not get its target, by limit; [n_joints] each."""

    position: IntArray
    velocity: IntArray
    acceleration: IntArray
    held: IntArray
    """The joint braked because its target was not finite."""


@dataclass(frozen=True)
class _Plan:
    """The commanded motion, [n, n_joints] by grid time, at rest after its last row."""

    origin_s: float
    """The time of grid index 0."""
    positions: FloatArray
    velocities: FloatArray
    first: int
    """Grid index of the first row."""
    begin: int
    """Grid index from which it differs from the previous plan."""
    clamps: Clamps | None
    """Of the steps from `begin` on."""

    def rows(self, begin: int, end: int) -> tuple[FloatArray, FloatArray]:
        """Positions and velocities at grid indices begin … end - 1."""
        first, last = begin - self.first, end - self.first
        if first >= 0 and last <= len(self.positions):
            return self.positions[first:last], self.velocities[first:last]
        rows = np.clip(np.arange(first, last), 0, len(self.positions) - 1)
        return self.positions[rows], self.velocities[rows]

    def state(self, index: int) -> MotionState:
        row = min(max(index - self.first, 0), len(self.positions) - 1)
        return MotionState(self.positions[row], self.velocities[row])


class CommandStream:
    """Keeps the commanded motion on a time grid and makes each tick's trajectory.

    A tick plans from t_k, the first grid time at or after now + lead_s, and from the state that was
    published for t_k: `lookahead_steps` limited steps follow the targets, then every joint brakes
    to rest. The motion published for times up to t_k stays.

    A message begins at least 20 ms before its publication, with the states commanded for that time.
    A controller that takes it before t_k is already on the same motion: it drops the past points
    and continues on its segment. A message that began in the future would be bridged from the last
    commanded or the measured state, neither of which is the commanded state now
    (`pi05_lab.sim.controller`). docs/controllers.md lists the controller settings for this.

    A controller that still follows the previous message at t_k jumps to the new motion later. With
    the controller's period T this cannot happen to a message that takes up to lead_s - T, nor after
    n consecutive lost messages if n·dt_s + delay + T <= lead_s. `in_time` and `retract` hold back a
    message that the sender itself delayed.

    If the controllers' command is unknown, a motion begins at rest at the measured positions at its
    first t_k; a controller that interpolates from its desired state has until then to get there.

    Not thread safe, but `commanded` and `rest_time_s` may be read by other threads.
    """

    def __init__(
        self,
        limiter: MotionLimiter,
        lookahead_steps: int = 10,
        lead_s: float = 0.02,
    ) -> None:
        """Raises ValueError out of range.

        Args:
            limiter: of the commanded joints; its dt_s is the grid.
            lookahead_steps: steps that follow the targets before the tail, at least 1.
            lead_s: how late a message may reach the controller.
        """
        if lookahead_steps < 1:
            raise ValueError(f"lookahead_steps must be >= 1, got {lookahead_steps}")
        if not (math.isfinite(lead_s) and lead_s >= 0):
            raise ValueError(f"lead_s must be finite and >= 0, got {lead_s}")
        self.dt_s = dt_s = limiter.dt_s
        self.lead_s = lead_s
        self.transport_s = min(TRANSPORT_S, lead_s)
        self.lookahead_steps = lookahead_steps
        self._limiter = limiter
        self._ramp = np.arange(lookahead_steps)[:, None] * limiter.velocity_step
        self.clamps = ClampCounts(
            *(np.zeros(len(limiter.joints), dtype=np.int64) for _ in range(4))
        )
        self._half_dt_s = dt_s / 2
        self._past = _PAST_S / dt_s
        self._history = math.ceil(_HISTORY_S / dt_s)
        self.active = False
        """Between `start` and `brake` or `stop`."""
        self._followed = False
        """Whether the controllers command the plan."""
        self._plan: _Plan | None = None
        self._before: tuple[_Plan, bool, bool, tuple[IntArray, ...]] | None = None
        """Plan, `active`, `_followed` and the counts added to `clamps`, for `retract`."""

    @property
    def rest_time_s(self) -> float:
        """When the commanded motion comes to rest; -inf before the first `start`."""
        plan = self._plan
        if plan is None:
            return -math.inf
        return plan.origin_s + (plan.first + len(plan.positions) - 1) * self.dt_s

    def start(self, position: FloatArray, now_s: float) -> None:
        """Begin at rest at the measured positions [n_joints].

        If the published motion has come to rest and every joint is measured within
        max_velocity · dt_s of its end, the controllers still command that end: the new motion
        begins there, without a step by gravity or servo lag. `reset` excludes this.

        After `brake`, wait for `rest_time_s`: a start while the arms move would command them to
        stand at once. Raises ValueError for a non-finite position.
        """
        state = self._limiter.at_rest(position)
        rows = 1
        if self._plan is not None and self._followed and now_s >= self.rest_time_s:
            rest = self._plan.positions[-1]
            near = np.abs(rest - state.position) <= self._limiter.max_velocity * self.dt_s
            if near.all():
                state, rows = self._limiter.at_rest(rest), self._history
        # Grid index 0 is the first t_k, with a margin for late ticks.
        origin_s = now_s + self.lead_s + _TICK_JITTER * self.dt_s
        positions = np.tile(state.position, (rows, 1))
        self._plan = _Plan(origin_s, positions, np.zeros_like(positions), 1 - rows, 0, None)
        self._before = None
        self._followed = rows > 1
        self.active = True

    def reset(self) -> None:
        """The controllers lost the published motion: `start` uses the measured positions."""
        self._followed = False

    def tick(
        self, now_s: float, targets: Callable[[FloatArray], FloatArray | None]
    ) -> TrajectoryPoints:
        """The trajectory to publish at `now_s`.

        Args:
            now_s: may step back by up to one dt_s, for a clock that is being adjusted.
            targets: times [n] → positions [n, n_joints]; a non-finite one brakes its joint, None
                brakes all.

        Raises:
            RuntimeError: before `start` or after `brake`.
            ClockJumpedBackError: the clock jumped back.
            ValueError: the targets have another shape.
        """
        plan = self._started_plan()
        if not self.active:
            raise RuntimeError(_NOT_STARTED)
        index = self._index(now_s, plan)
        grid = np.arange(index, index + self.lookahead_steps + 2, dtype=np.float64)
        wanted = targets(plan.origin_s + self.dt_s * grid)
        if wanted is None:
            return self._publish(now_s, plan, index)
        wanted = np.asarray(wanted, dtype=np.float64)
        shape = (len(grid), plan.positions.shape[1])
        if wanted.shape != shape:
            raise ValueError(f"targets must give shape {shape}, got {wanted.shape}")
        steps = self._limiter.follow(
            plan.state(index), wanted[1:-1], self._target_velocities(wanted)
        )
        return self._publish(now_s, plan, index, steps)

    def in_time(self, now_s: float) -> bool:
        """Whether the last trajectory, if sent at `now_s`, reaches the controllers before its t_k.

        A later one would make them jump from the previous motion to this one.
        """
        plan = self._started_plan()
        begin_s = plan.origin_s + (plan.begin + _GRID_TOLERANCE) * self.dt_s
        return now_s + self.transport_s <= begin_s

    def retract(self) -> None:
        """Undo the last `tick` or `brake`, whose trajectory was not published.

        Restores `active` and `clamps`; the next tick plans from the published motion. Raises
        RuntimeError if there is none since the last `start`, `stop` or `retract`.
        """
        if self._before is None:
            raise RuntimeError("there is no trajectory to retract")
        self._plan, self.active, self._followed, added = self._before
        self._before = None
        for counts, more in zip(self.clamps, added, strict=False):
            counts -= more

    def brake(self, now_s: float) -> TrajectoryPoints:
        """The trajectory that brakes to rest from the commanded state at now + lead_s; ends ticks.

        May be called again. Raises RuntimeError before the first `start`, and ClockJumpedBackError.
        """
        plan = self._started_plan()
        points = self._publish(now_s, plan, self._index(now_s, plan))
        self.active = False
        return points

    def stop(self) -> None:
        """End ticks without a stop trajectory: the published one brakes by its tail."""
        if self.active:
            self.active, self._before = False, None

    def commanded(self, time_s: float) -> MotionState:
        """The state commanded at `time_s`, at least back to 1 s ago or the last `start`.

        At rest after the published trajectory's end, and before the start's first t_k.
        """
        plan = self._started_plan()
        last = len(plan.positions) - 1
        steps = (time_s - plan.origin_s) / self.dt_s - plan.first
        steps = min(max(steps, 0.0), float(last))
        row = min(int(steps), max(last - 1, 0))
        share = steps - row
        before, after = plan.velocities[row], plan.velocities[min(row + 1, last)]
        velocity = (1 - share) * before + share * after
        return MotionState(
            plan.positions[row] + share * self._half_dt_s * (before + velocity), velocity
        )

    def _started_plan(self) -> _Plan:
        if self._plan is None:
            raise RuntimeError(_NOT_STARTED)
        return self._plan

    def _target_velocities(self, wanted: FloatArray) -> FloatArray:
        """[n + 2, n_joints] targets → [n, n_joints] velocities of the inner ones.

        Central differences, capped at the speed from which full braking reaches every slower
        target ahead: without the cap, the joints would overshoot a chunk that ends in motion.
        """
        with np.errstate(invalid="ignore", over="ignore"):
            velocities = (wanted[2:] - wanted[:-2]) / (2 * self.dt_s)
            reachable = np.abs(velocities) + self._ramp
            cap = np.fmin.accumulate(reachable[::-1], axis=0)[::-1] - self._ramp
            return np.asarray(np.minimum(np.maximum(velocities, -cap), cap))

    def _index(self, now_s: float, plan: _Plan) -> int:
        """The grid index of t_k, not before the last one."""
        steps = (now_s - plan.origin_s + self.lead_s) / self.dt_s
        if steps < plan.begin - 2:
            raise ClockJumpedBackError(
                f"the clock jumped back to {now_s} s: start again at the measured positions"
            )
        return max(plan.begin, math.ceil(steps - _GRID_TOLERANCE))

    def _publish(
        self,
        now_s: float,
        plan: _Plan,
        index: int,
        steps: tuple[FloatArray, FloatArray, Clamps] | None = None,
    ) -> TrajectoryPoints:
        """Join the published motion up to `index`, the steps from there, and the tail."""
        added: tuple[IntArray, ...] = ()
        executed = index - plan.begin
        if executed and plan.clamps is not None:
            added = tuple(kind[:executed].sum(axis=0) for kind in plan.clamps)
            for counts, more in zip(self.clamps, added, strict=True):
                counts += more
        present = math.floor((now_s - plan.origin_s) / self.dt_s - self._past + _GRID_TOLERANCE)
        begin = max(plan.first, min(present, index))
        first = max(plan.first, begin - self._history)
        parts = [plan.rows(first, index + 1)]
        clamps = None
        if steps is not None:
            parts.append(steps[:2])
            clamps = steps[2]
        parts.append(self._limiter.brake_to_rest(MotionState(parts[-1][0][-1], parts[-1][1][-1])))
        positions = np.concatenate([part[0] for part in parts])
        velocities = np.concatenate([part[1] for part in parts])
        positions.setflags(write=False)
        velocities.setflags(write=False)
        self._before = (plan, self.active, self._followed, added)
        self._plan = _Plan(plan.origin_s, positions, velocities, first, index, clamps)
        self._followed = True
        begin_row = begin - first
        return TrajectoryPoints(
            plan.origin_s + begin * self.dt_s,
            self.dt_s * np.arange(len(positions) - begin_row, dtype=np.float64),
            positions[begin_row:],
            velocities[begin_row:],
        )


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
