"""What is published, for arbitrary joint states, endings and restarts.

Faults pinned: a first point outside the limits or at a joint state that its neighbours contradict,
a start before the motion before it rests, motion while stopped.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pi05_lab.evaluation.simulated_executor import SimulatedExecutor
from pi05_ros.control.limits import MotionLimiter
from pi05_ros.control.scheduler import make_scheduler
from pi05_ros.control.start_check import StartCheck
from pi05_ros.control.tracking import TrackingMonitor
from pi05_ros.control.trajectory import CommandStream, TrajectoryPoints
from pi05_ros.executor import InferenceExecutor
from pi05_ros.observation.buffer import CameraStream, Gates, ObservationBuffer
from pi05_ros.runner import PolicyRunner, Tick
from pi05_ros.types import ActionChunk, ActionPrefix, FloatArray, JointGroup, JointSpec, Observation

DT_S = 0.02
SUBSTEPS = 4
"""Joint states come at up to 200 Hz."""
TOLERANCE = 0.03
JOINTS = JointGroup(
    [JointSpec("waist", -2.0, 2.0, 2.0, 10.0), JointSpec("elbow", -1.0, 1.0, 1.0, 8.0)]
)
SPAN = JOINTS.upper - JOINTS.lower
IMAGE = np.zeros((4, 4, 3), np.uint8)


@dataclass(frozen=True)
class Event:
    """What happens from one tick on."""

    kind: str
    tick: int
    ticks: int
    positions: FloatArray


class World:
    """An arm, its joint states and those of others, and a record of what was published."""

    def __init__(
        self,
        targets: list[FloatArray],
        events: list[Event],
        period: int,
        measured: tuple[float, float] = (0.3, -0.2),
    ) -> None:
        count = itertools.count()

        def infer(seen: Observation, prefix: ActionPrefix | None) -> ActionChunk:
            target = targets[next(count) % len(targets)]
            return ActionChunk(np.tile(target, (50, 1)), seen.stamp_s, DT_S, seen.instruction)

        self.now_s = 100.0
        self.executor = SimulatedExecutor(infer, 0.0)
        self.check = StartCheck(JOINTS, tolerance=TOLERANCE)
        self.buffer = ObservationBuffer([CameraStream("top")], JOINTS.names, Gates())
        self.stream = CommandStream(MotionLimiter(JOINTS, DT_S))
        self.runner = PolicyRunner(
            self.buffer,
            cast("InferenceExecutor", self.executor),
            make_scheduler("temporal_ensemble", gripper=JOINTS.gripper),
            self.stream,
            JOINTS,
            lambda message: message,
            start_check=self.check,
            tracking=TrackingMonitor(JOINTS),
        )
        self.measured = np.array(measured)
        self.states: list[tuple[float, FloatArray]] = []
        self.last: TrajectoryPoints | None = None
        self.published = self.starts = 0
        self._events = events
        self._period = period
        self._ticks = 0
        self.runner.set_instruction("wave")
        self.runner.activate()

    def step(self) -> None:
        present = [e for e in self._events if e.tick <= self._ticks < e.tick + e.ticks]
        first = [event for event in present if event.tick == self._ticks]
        self._ticks += 1
        for event in first:
            self._happen(event)
        kinds = {event.kind: event for event in present}
        for k in range(1, SUBSTEPS + 1):
            self._feel(self.now_s + DT_S * k / SUBSTEPS, k, kinds)
        self.now_s += DT_S
        self.buffer.put_image("top", self.now_s, IMAGE)
        self.executor.now_s = self.now_s
        was_active = self.stream.active
        tick = self.runner.tick(self.now_s)
        self._check_tick(tick, was_active)
        if "unsent" in kinds and tick.trajectory is not None:
            self.runner.not_published()
        elif tick.trajectory is not None:
            self.last = tick.trajectory

    def _happen(self, event: Event) -> None:
        braking = None
        if event.kind == "stop":
            braking = self.runner.stop(self.now_s)
        elif event.kind == "flap":
            braking = self.runner.come_to_rest(self.now_s)
        elif event.kind == "resume":
            self.runner.resume()
        elif event.kind == "cycle":
            braking = self.runner.deactivate(self.now_s)
            self.runner.activate()
        elif event.kind == "glitch":
            self._put(self.now_s + 0.6 * DT_S / SUBSTEPS, event.positions)
        if braking is not None and braking.trajectory is not None:
            self._check_points(braking.trajectory)
            self.last = braking.trajectory

    def _feel(self, stamp_s: float, k: int, kinds: dict[str, Event]) -> None:
        if "hand" in kinds:
            speed = np.clip(kinds["hand"].positions, -1.0, 1.0)
            self.measured = self.measured + speed * DT_S / SUBSTEPS
        elif "off" not in kinds and self.stream.rest_time_s > 0:
            wanted = self.stream.commanded(stamp_s).position
            self.measured = self.measured + 0.3 * (wanted - self.measured)
        if "silent" not in kinds and (self._ticks * SUBSTEPS + k) % self._period == 0:
            self._put(stamp_s, self.measured)
        if "second" in kinds:
            self._put(stamp_s - 0.3 * DT_S / SUBSTEPS, kinds["second"].positions)

    def _put(self, stamp_s: float, positions: FloatArray) -> None:
        self.buffer.put_joints(stamp_s, positions)
        self.states.append((stamp_s, positions.copy()))

    def _check_tick(self, tick: Tick, was_active: bool) -> None:
        if tick.braking is not None and tick.braking.trajectory is not None:
            self._check_points(tick.braking.trajectory)
            self.last = tick.braking.trajectory
        if tick.trajectory is None:
            return
        assert not self.runner.stopped and self.runner.active
        self._check_points(tick.trajectory)
        if not was_active:
            self._check_start(tick.trajectory)

    def _check_points(self, points: TrajectoryPoints) -> None:
        self.published += 1
        assert (points.positions >= JOINTS.lower - TOLERANCE * SPAN - 1e-9).all()
        assert (points.positions <= JOINTS.upper + TOLERANCE * SPAN + 1e-9).all()
        assert (np.abs(points.velocities) <= JOINTS.max_velocity + 1e-9).all()

    def _check_start(self, points: TrajectoryPoints) -> None:
        self.starts += 1
        rest_s = -np.inf
        if self.last is not None:
            rest_s = self.last.stamp_s + self.last.times_from_start_s[-1]
            assert self.now_s >= rest_s - 1e-6
        assert (points.velocities[0] == 0).all()
        states = sorted(self.states, key=lambda state: state[0])
        newest = [s for s in states if s[0] > self.now_s - 0.05 - DT_S]
        newest = newest if len(newest) >= 5 else states[-5:]
        assert all(stamp_s > rest_s - 1e-6 for stamp_s, _ in newest[-5:])
        for _, positions in newest[-5:]:
            away = np.abs(points.positions[0] - positions)
            # a standing arm moves by a tenth of its speed within the states that are compared
            span_s = newest[-1][0] - newest[-5][0] + 0.05
            assert (away <= 0.1 * JOINTS.max_velocity * span_s + self.check.noise).all()


anything: st.SearchStrategy[float] = st.one_of(
    st.floats(-1.2, 1.2), st.sampled_from([2.5, -50.0, 50.0, 1e9, -1e308])
)
joints = st.tuples(anything, anything).map(np.array)
events = st.builds(
    Event,
    kind=st.sampled_from(
        [
            "glitch",
            "glitch",
            "second",
            "silent",
            "off",
            "hand",
            "unsent",
            "stop",
            "flap",
            "resume",
            "cycle",
        ]
    ),
    tick=st.integers(0, 200),
    ticks=st.integers(1, 40),
    positions=joints,
)
FEW = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@FEW
@given(
    targets=st.lists(joints, min_size=1, max_size=6),
    happenings=st.lists(events, max_size=14),
    period=st.integers(1, 10),
    measured=st.tuples(st.floats(-2.3, 2.3), st.floats(-1.2, 1.2)),
)
def test_nothing_wrong_is_published_for_any_joint_states(
    targets: list[Any],
    happenings: list[Event],
    period: int,
    measured: tuple[float, float],
) -> None:
    """Every published point keeps the limits and the tolerance; every start is at rest, after the
    rest of the motion before, and within what a standing arm moves of the newest joint states."""
    bounded = [np.clip(target, -50, 50) for target in targets]
    world = World(bounded, happenings, period, measured)
    for _ in range(240):
        world.step()


def test_the_world_of_this_property_starts_and_moves() -> None:
    """The property would hold for a runner that never moves."""
    stop, resume = (
        Event(kind, tick, 1, np.zeros(2)) for kind, tick in (("stop", 80), ("resume", 90))
    )
    world = World([np.array([0.5, 0.5])], [stop, resume], 2)
    for _ in range(240):
        world.step()
    assert world.starts == 2 and world.published > 150
    np.testing.assert_allclose(world.measured, [0.5, 0.5], atol=0.02)
