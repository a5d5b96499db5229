"""The obstacle task of the scheduler benchmark: a point robot with a two-mode policy."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from typing import Any

import numpy as np

from pi05_lab.bench.two_mode_policy import (
    DT_S,
    GOAL,
    HORIZON,
    OBSTACLE,
    OBSTACLE_RADIUS_M,
    TwoModePolicy,
)  # fmt: skip
from pi05_lab.evaluation import statistics as measures
from pi05_lab.evaluation.simulated_executor import SimulatedExecutor
from pi05_lab.parallel import run_tasks
from pi05_ros.control.chunks import Replan
from pi05_ros.control.latency import LatencyTracker
from pi05_ros.control.limits import MotionLimiter
from pi05_ros.control.scheduler import Guard, make_scheduler
from pi05_ros.executor import ExecutorState
from pi05_ros.policy.guidance import Guidance
from pi05_ros.types import ActionChunk, FloatArray, JointGroup, JointSpec, Observation

OBSERVATION_NOISE_M = 0.002
REACHED_M = 0.03
LIMIT_S = 6.0
STALL_M_S = 0.02
"""A robot in motion that is slower stalls."""
INSTRUCTION_CHANGE_S = 0.6
REPLAN_INTERVAL_S = 0.1
JOINTS = JointGroup([JointSpec(axis, -3.0, 3.0, 2.0, 20.0) for axis in "xy"])


@dataclass(frozen=True)
class Delay:
    """Time from an observation to its usable chunk."""

    name: str
    low_s: float
    high_s: float

    def draw(self, rng: np.random.Generator) -> float:
        return float(rng.uniform(self.low_s, self.high_s))


DELAYS = (
    *(Delay(f"{ms} ms", ms / 1000, ms / 1000) for ms in (0, 50, 100, 200, 300)),
    Delay("50–250 ms", 0.05, 0.25),
)


@dataclass(frozen=True)
class Variant:
    """A scheduler with its settings."""

    name: str
    method: str
    settings: dict[str, Any] = field(default_factory=dict)
    guidance: Guidance = field(default_factory=Guidance)


VARIANTS = (
    Variant("sync", "sync"),
    Variant("latest", "latest"),
    Variant("blend", "blend"),
    Variant("ensemble, no guard", "temporal_ensemble"),
    Variant("ensemble, newest first", "temporal_ensemble", {"m": 0.5, "newest_first": True}),
    Variant("ensemble, guard at once", "temporal_ensemble", {"guard": Guard(0.03, 0.2, 1)}),
    Variant("temporal_ensemble", "temporal_ensemble", {"guard": Guard(0.03, 0.2)}),
    Variant("rtc", "rtc"),
    Variant("rtc, vjp", "rtc", {}, Guidance("vjp")),
    Variant("rtc, 10 steps", "rtc", {}, Guidance(execution_horizon=10)),
)
"""A name that is a method's alone has the node's defaults, with the guard in metres."""


@dataclass(frozen=True)
class Episode:
    """Measures of one episode; times in s, lengths in the task's unit: m, or rad of all arm joints.

    Field names are keys of the metrics file.
    """

    variant: str
    delay: str
    seed: int
    success: bool
    time_s: float
    """To the goal; the limit if it was not reached."""
    stall_s: float
    largest_step: float
    """Of the targets per control tick, before the limits, as the next two."""
    largest_acceleration: float
    seam_jump: float
    """Largest change of a target at a chunk boundary."""
    rms_jerk: float
    """Of the executed motion, as the next two."""
    ldlj: float
    sparc: float
    action_age_s: float
    reaction_s: float
    """From a changed instruction to motion for it, in an episode of its own; NaN if not measured.
    """


def motion_measures(
    executed: FloatArray, targets: FloatArray, dt_s: float, stall_speed: float
) -> dict[str, float]:
    """Measures of `Episode` for an executed motion [n, dims] and its targets [m, dims]."""
    speeds = np.linalg.norm(np.diff(executed, axis=0), axis=1) / dt_s
    return {
        "stall_s": float((speeds[2:] < stall_speed).sum() * dt_s),
        "largest_step": measures.largest_step(targets),
        "largest_acceleration": measures.largest_acceleration(targets, dt_s),
        "rms_jerk": measures.rms_jerk(executed, dt_s),
        "ldlj": measures.log_dimensionless_jerk(executed, dt_s),
        "sparc": measures.spectral_arc_length(executed, dt_s),
    }


def first_motion(executed: FloatArray, distance: float) -> int:
    """Index of the first sample [n, dims] farther than `distance` from the start."""
    return int(np.argmax(np.linalg.norm(executed - executed[0], axis=1) > distance))


class World:
    """A point robot behind a scheduler and the motion limits, on a simulated clock."""

    def __init__(self, variant: Variant, delay: Delay, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.scheduler = make_scheduler(
            variant.method, gripper=[False, False], replan=Replan(interval_s=REPLAN_INTERVAL_S),
            **variant.settings,
        )  # fmt: skip
        self.now_s = 0.0
        self.instruction = "goal"
        self.positions: list[FloatArray] = []
        self.targets: list[FloatArray] = []
        self.jumps_m: list[float] = [0.0]
        self.ages_s: list[float] = []
        policy = TwoModePolicy(variant.guidance, self.rng)
        self._executor = SimulatedExecutor(policy.infer, lambda: delay.draw(self.rng))
        self._limiter = MotionLimiter(JOINTS, DT_S)
        self._state = self._limiter.at_rest(np.array([0.0, self.rng.normal() * 0.005]))
        self._latency = LatencyTracker()
        self._executed = ""
        self._moved = False

    @property
    def position(self) -> FloatArray:
        return self._state.position

    def tick(self) -> None:
        """One control tick: take a chunk or request one, then command."""
        self._executor.now_s = self.now_s
        results = self._executor.results()
        if not results and self._executor.state is ExecutorState.READY:
            self._request()
            results = self._executor.results()
        for result in results:
            assert result.chunk is not None, result.error
            if result.chunk.instruction == self.instruction:
                self._use(result.chunk)
        self._command()
        self.now_s += DT_S

    def _request(self) -> None:
        latency_s = self._latency.estimate_s or 0.0
        if not self.scheduler.wants_inference(self.now_s, latency_s):
            return
        prefix = None
        if self.scheduler.guided:
            prefix = self.scheduler.prefix(self.now_s, self.now_s + latency_s + DT_S)
            if prefix is not None and self.instruction != self._executed:
                prefix = replace(prefix, actions=prefix.actions[: prefix.committed_steps])
        self._executor.submit(self._observe, prefix)

    def _observe(self) -> Observation:
        position = self.position + self.rng.normal(size=2) * OBSERVATION_NOISE_M
        return Observation({}, position, self.instruction, self.now_s)

    def _use(self, chunk: ActionChunk) -> None:
        due_s = np.array([self.now_s + DT_S])
        before = self.scheduler.targets(due_s)
        if chunk.instruction != self._executed:
            self.scheduler.clear()
            self._executed = chunk.instruction
        self._latency.add(self.now_s - chunk.stamp_s)
        self.scheduler.add(chunk, self.now_s, standing=not self._moved)
        after = self.scheduler.targets(due_s)
        if before is not None and after is not None:
            self.jumps_m.append(float(np.linalg.norm(after - before)))

    def _command(self) -> None:
        wanted = self.scheduler.targets(self.now_s + DT_S * np.arange(3, dtype=np.float64))
        if wanted is None:
            self.targets.append(self.position)
        else:
            self._moved = True
            velocity = (wanted[2] - wanted[0]) / (2 * DT_S)
            self._state, _ = self._limiter.step(self._state, wanted[1], velocity)
            self.targets.append(wanted[1])
            self.ages_s.append(self.now_s - self.scheduler.stamp_s(self.now_s))
        self.positions.append(self.position)


def run_episode(variant: Variant, delay: Delay, seed: int) -> Episode:
    """To the goal around the obstacle; the reaction is from a second run with a new instruction."""
    world = World(variant, delay, seed)
    hit = reached = False
    while not reached and world.now_s < LIMIT_S:
        world.tick()
        hit = hit or bool(np.linalg.norm(world.position - OBSTACLE) < OBSTACLE_RADIUS_M)
        reached = bool(np.linalg.norm(world.position - GOAL) < REACHED_M)
    executed, targets = np.stack(world.positions), np.stack(world.targets)
    start = first_motion(executed, 1e-6)
    return Episode(
        variant=variant.name,
        delay=delay.name,
        seed=seed,
        success=reached and not hit,
        time_s=world.now_s,
        seam_jump=max(world.jumps_m),
        action_age_s=float(np.mean(world.ages_s)),
        reaction_s=_reaction_s(variant, delay, seed),
        **motion_measures(executed[start:], targets[start:], DT_S, STALL_M_S),
    )


def _reaction_s(variant: Variant, delay: Delay, seed: int) -> float:
    """Until the robot is 2 cm from a run with the same seed and the old instruction."""
    changed, unchanged = (World(variant, delay, seed) for _ in range(2))
    change_s = INSTRUCTION_CHANGE_S + delay.high_s
    while changed.now_s < change_s + 3.0:
        if changed.now_s >= change_s - 1e-9:
            changed.instruction = "other"
        changed.tick()
        unchanged.tick()
        if np.linalg.norm(changed.position - unchanged.position) > 0.02:
            break
    return changed.now_s - change_s


def run_all(seeds: range, workers: int) -> Iterator[list[Episode]]:
    """The episodes of each variant and delay."""
    return run_tasks(partial(_make_run, seeds), list(product(VARIANTS, DELAYS)), workers)


def _make_run(seeds: range) -> Callable[[tuple[Variant, Delay]], list[Episode]]:
    return lambda task: [run_episode(*task, seed) for seed in seeds]


@dataclass(frozen=True)
class Cost:
    """Processor time of one control tick, µs."""

    p50_us: float
    p99_us: float


def measure_cost(ticks: int = 3000) -> dict[str, Cost]:
    """Cost by variant of adding a chunk of 50 steps × 14 joints, with 10 live, and 12 targets.

    CPU time of this thread, so that other programs on the machine do not count.
    """
    rng = np.random.default_rng(0)
    gripper = [index % 7 == 6 for index in range(14)]
    costs = {}
    for variant in VARIANTS:
        settings = dict(variant.settings)
        if "guard" in settings:
            settings["guard"] = Guard(1e9, 0.2)  # compares, and finds no disagreement
        scheduler = make_scheduler(variant.method, gripper=gripper, max_chunks=10, **settings)
        plan = rng.normal(size=(HORIZON, 14))
        spent_us = []
        for index in range(ticks):
            now_s = index * DT_S
            chunk = ActionChunk(plan, now_s - 0.05, DT_S)
            times_s = now_s + DT_S * np.arange(12, dtype=np.float64)
            started_ns = time.thread_time_ns()
            scheduler.add(chunk, now_s)
            scheduler.targets(times_s)
            spent_us.append((time.thread_time_ns() - started_ns) / 1000)
        p50, p99 = np.percentile(spent_us[50:], (50, 99))
        costs[variant.name] = Cost(float(p50), float(p99))
    return costs
