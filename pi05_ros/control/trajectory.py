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

_TICK_JITTER = 0.1
"""Share of a step by which a tick may be late without planning from the next grid time."""

_PAST_S = 0.02
"""How far before its publication a message begins at least.

It covers a controller whose clock was read at the beginning of the cycle that takes the message,
and clocks of two machines that differ.
"""

_HISTORY_S = 1.0
"""How far back `commanded` reaches at least."""


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


@dataclass(frozen=True)
class _Plan:
    """The commanded motion, [n, n_joints] by grid time, at rest beyond its last row."""

    origin_s: float
    """The time of grid index 0."""
    positions: FloatArray
    velocities: FloatArray
    first: int
    """Grid index of the first row."""
    begin: int
    """Grid index from which it differs from the plan before."""
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

    A tick plans from t_k, the first grid time at or after now + lead_s. The state at t_k is the one
    that was published for it, the tail included; `lookahead_steps` limited steps from there follow
    the targets, then every joint brakes to rest. What was published for the time up to t_k stays.

    A message begins 20 ms or more before its publication with the states that were commanded for
    that time. A controller that takes it before t_k is on the same motion already: it cuts off the
    points in the past and continues on the segment that it was on. A message whose first point lay
    in the future would instead be bridged from the state commanded last or from the measured one,
    neither of which is the commanded state now (`sim.controller`). docs/controllers.md lists the
    controllers' settings under which this holds.

    A controller that still follows the message before at t_k jumps to the new motion when the next
    message comes. With T for the controller's period, that happens neither to a message that takes
    lead_s - T at most, nor after n messages in a row are lost if n·dt_s + delay + T <= lead_s.
    `in_time` and `retract` keep a message that the sender itself delayed from going out.

    Where the controllers' command is not known, a new motion begins at its first t_k, at rest at
    the measured positions. A controller that interpolates from its desired state has until then to
    move to them.

    Not thread safe, but `commanded` and `rest_time_s` may be read by other threads.
    """

    def __init__(
        self,
        joints: JointGroup,
        limiter: MotionLimiter,
        dt_s: float,
        lookahead_steps: int = 10,
        lead_s: float = 0.02,
        transport_s: float = 0.012,
    ) -> None:
        """Raises ValueError if the limiter has another grid or joints, or a value is out of range.

        Args:
            joints: the commanded joints.
            limiter: made for the same joints and `dt_s`.
            dt_s: the grid.
            lookahead_steps: steps that follow the targets before the tail, at least 1.
            lead_s: how late a message may reach the controller.
            transport_s: how long a message usually takes to the controller, one period of the
                controller included, for `in_time`; more than lead_s counts as that.
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
        self._half_dt_s = dt_s / 2
        self._past = _PAST_S / dt_s
        self._history = math.ceil(_HISTORY_S / dt_s)
        self._active = False
        self._followed = False
        """Whether the controllers command the plan."""
        self._plan: _Plan | None = None
        self._before: tuple[_Plan, bool, bool, tuple[IntArray, ...]] | None = None
        """Plan, `_active`, `_followed` and what was added to `clamps`, for `retract`."""

    @property
    def active(self) -> bool:
        """Between `start` and `hold`."""
        return self._active

    @property
    def rest_time_s(self) -> float:
        """When the commanded motion comes to rest; -inf before the first `start`."""
        plan = self._plan
        if plan is None:
            return -math.inf
        return plan.origin_s + (plan.first + len(plan.positions) - 1) * self.dt_s

    def start(self, position: FloatArray, now_s: float) -> None:
        """Begin at rest at the measured positions [n_joints].

        Where the motion published before has come to rest and every joint is measured within
        max_velocity · dt_s of that, the controllers still command it: the new motion begins there,
        without a step by what gravity or a lagging servo leaves. `forget` excludes that.

        A non-finite position raises ValueError. After `hold`, wait for `rest_time_s`: a start
        while the arms still move would ask them to stand at once.
        """
        state = self._limiter.at_rest(position)
        rows = 1
        if self._plan is not None and self._followed and now_s >= self.rest_time_s:
            rest = self._plan.positions[-1]
            near = np.abs(rest - state.position) <= self._limiter.max_velocity * self.dt_s
            if near.all():
                state, rows = self._limiter.at_rest(rest), self._history
        # The first t_k, with room for ticks that are a little late, is grid index 0.
        origin_s = now_s + self.lead_s + _TICK_JITTER * self.dt_s
        positions = np.tile(state.position, (rows, 1))
        self._plan = _Plan(origin_s, positions, np.zeros_like(positions), 1 - rows, 0, None)
        self._before = None
        self._followed = rows > 1
        self._active = True

    def reset(self) -> None:
        """The controllers no longer command what was published, because they were restarted, say.

        The next `start` then begins at the measured positions.
        """
        self._followed = False

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
        if not self._active or self._plan is None:
            raise RuntimeError("the command stream is not started: call start() first")
        plan = self._plan
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
        """Whether the trajectory made last, sent at `now_s`, is taken before its t_k.

        Later, a controller would jump from the motion published before to this one.
        """
        plan = self._plan
        if plan is None:
            raise RuntimeError("the command stream is not started: call start() first")
        begin_s = plan.origin_s + (plan.begin + _GRID_TOLERANCE) * self.dt_s
        return now_s + self.transport_s <= begin_s

    def retract(self) -> None:
        """Undo the last `tick` or `hold`, whose trajectory was not published.

        `active` and `clamps` are as before it, and the next tick plans from what was published.
        Raises RuntimeError if there is none since the last `start`, `stop` or `retract`.
        """
        if self._before is None:
            raise RuntimeError("there is no trajectory to retract")
        self._plan, self._active, self._followed, added = self._before
        self._before = None
        for counts, more in zip(self._counts(), added, strict=False):
            counts -= more

    def hold(self, now_s: float) -> TrajectoryPoints:
        """The trajectory that brakes to rest from the commanded state at now + lead; ends ticks.

        May be called again. Raises RuntimeError if the stream was never started, and
        ClockJumpedBackError as `tick` does.
        """
        if self._plan is None:
            raise RuntimeError("the command stream is not started: call start() first")
        points = self._publish(now_s, self._plan, self._index(now_s, self._plan))
        self._active = False
        return points

    def stop(self) -> None:
        """End ticks without a last trajectory: what was published brakes by its own tail.

        After `hold` it changes nothing.
        """
        if self._active:
            self._active, self._before = False, None

    def commanded(self, time_s: float) -> MotionState:
        """The state that is commanded at `time_s`, back to 1 s ago or the last `start`.

        At rest after the published trajectory's end, and before the start's first t_k.
        """
        plan = self._plan
        if plan is None:
            raise RuntimeError("the command stream is not started: call start() first")
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

    def _index(self, now_s: float, plan: _Plan) -> int:
        """The grid index of t_k; never before the last one."""
        steps = (now_s - plan.origin_s + self.lead_s) / self.dt_s
        if steps < plan.begin - 2:
            raise ClockJumpedBackError(
                f"the clock jumped back to {now_s} s: start again from measured positions"
            )
        return max(plan.begin, math.ceil(steps - _GRID_TOLERANCE))

    def _counts(self) -> tuple[IntArray, ...]:
        clamps = self.clamps
        return clamps.position, clamps.velocity, clamps.acceleration, clamps.held

    def _publish(
        self,
        now_s: float,
        plan: _Plan,
        index: int,
        steps: tuple[FloatArray, FloatArray, Clamps] | None = None,
    ) -> TrajectoryPoints:
        """Join what was published up to `index`, the steps from there, and the tail."""
        added: tuple[IntArray, ...] = ()
        executed = index - plan.begin
        if executed and plan.clamps is not None:
            clamps = plan.clamps
            kinds = (clamps.position, clamps.velocity, clamps.acceleration, clamps.held)
            added = tuple(kind[:executed].sum(axis=0) for kind in kinds)
            for counts, more in zip(self._counts(), added, strict=True):
                counts += more
        present = math.floor((now_s - plan.origin_s) / self.dt_s - self._past + _GRID_TOLERANCE)
        begin = max(plan.first, min(present, index))
        first = max(plan.first, begin - self._history)
        position, velocity = plan.rows(first, index + 1)
        way: list[FloatArray] = [position]
        speeds: list[FloatArray] = [velocity]
        if steps is not None:
            way.append(steps[0])
            speeds.append(steps[1])
        tail, tail_speeds = self._limiter.brake_to_rest(MotionState(way[-1][-1], speeds[-1][-1]))
        positions = np.concatenate((*way, tail))
        velocities = np.concatenate((*speeds, tail_speeds))
        positions.setflags(write=False)
        velocities.setflags(write=False)
        self._before = (plan, self._active, self._followed, added)
        self._plan = _Plan(
            plan.origin_s, positions, velocities, first, index, None if steps is None else steps[2]
        )
        self._followed = True
        begin_row = begin - first
        return TrajectoryPoints(
            plan.origin_s + begin * self.dt_s,
            self.dt_s * np.arange(len(positions) - begin_row, dtype=np.float64),
            positions[begin_row:],
            velocities[begin_row:],
        )
