"""Schedulers against delays on the two-mode obstacle task: one episode, and many on all cores."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
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
)
from pi05_lab.evaluation import statistics as measures
from pi05_ros.control.latency import LatencyTracker
from pi05_ros.control.limits import MotionLimiter
from pi05_ros.control.scheduler import ChunkScheduler, Guard, make_scheduler
from pi05_ros.policy.guidance import Guidance
from pi05_ros.types import ActionChunk, FloatArray, JointGroup, JointSpec

OBSERVATION_NOISE_M = 0.002
REACHED_M = 0.03
LIMIT_S = 6.0
STALL_M_S = 0.02
"""Slower than this, away from the goal and after the start, the robot stalls."""
INSTRUCTION_CHANGE_S = 0.6
REPLAN_INTERVAL_S = 0.1
JOINTS = JointGroup([JointSpec(axis, -3.0, 3.0, 2.0, 20.0) for axis in "xy"])


@dataclass(frozen=True)
class Delay:
    """From an observation to its usable chunk."""

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
    """A method as it is compared."""

    name: str
    method: str
    settings: dict[str, Any] = field(default_factory=dict)
    guidance: Guidance = field(default_factory=Guidance)

    def make(self) -> ChunkScheduler:
        return make_scheduler(
            self.method,
            gripper=[False, False],
            replan_interval_s=REPLAN_INTERVAL_S,
            **self.settings,
        )


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
"""The methods with the node's defaults under their own names (the guard in this task's metres)."""


@dataclass(frozen=True)
class Episode:
    """What one run gave; times in s, lengths in the task's unit: m, or rad of all arm joints."""

    variant: str
    delay: str
    seed: int
    success: bool
    time_s: float
    """To the goal; the limit where it was not reached."""
    stall_s: float
    largest_step: float
    """Of the targets per control tick, in front of the limits, as the three below."""
    largest_acceleration: float
    seam_jump: float
    """The largest change of a target by a chunk's arrival."""
    rms_jerk: float
    """Of the executed motion, as the two below."""
    ldlj: float
    sparc: float
    action_age_s: float
    reaction_s: float
    """From a changed instruction to motion for it, in an episode of its own; NaN if not measured.
    """


class World:
    """A point robot behind a scheduler and the motion limits, on a simulated clock."""

    def __init__(self, variant: Variant, delay: Delay, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.scheduler = variant.make()
        self.now_s = 0.0
        self.instruction = "goal"
        self.positions: list[FloatArray] = []
        self.targets: list[FloatArray] = []
        self.seam_jumps_m: list[float] = [0.0]
        self.ages_s: list[float] = []
        self._delay = delay
        self._policy = TwoModePolicy(variant.guidance, self.rng)
        self._limiter = MotionLimiter(JOINTS, DT_S)
        self._state = self._limiter.at_rest(np.array([0.0, self.rng.normal() * 0.005]))
        self._latency = LatencyTracker()
        self._in_flight: tuple[float, ActionChunk] | None = None
        self._executed = ""
        self._moved = False

    @property
    def position(self) -> FloatArray:
        return self._state.position

    def tick(self) -> None:
        """One control tick: request, collect, command."""
        self._request()
        self._collect()
        self._command()
        self.now_s += DT_S

    def _request(self) -> None:
        latency_s = self._latency.estimate_s or 0.0
        if self._in_flight or not self.scheduler.wants_inference(self.now_s, latency_s):
            return
        prefix = None
        if self.scheduler.guided:
            prefix = self.scheduler.prefix(self.now_s, self.now_s + latency_s + DT_S)
            if prefix is not None and self.instruction != self._executed:
                prefix = type(prefix)(
                    prefix.actions[: prefix.committed_steps], prefix.committed_steps
                )
        seen = self.position + self.rng.normal(size=2) * OBSERVATION_NOISE_M
        chunk = self._policy.infer(seen, self.now_s, self.instruction, prefix)
        self._in_flight = (self.now_s + self._delay.draw(self.rng), chunk)

    def _collect(self) -> None:
        if self._in_flight is None or self.now_s < self._in_flight[0] - 1e-9:
            return
        chunk = self._in_flight[1]
        self._in_flight = None
        if chunk.instruction != self.instruction:
            return
        due_s = np.array([self.now_s + DT_S])
        before = self.scheduler.targets(due_s)
        if chunk.instruction != self._executed:
            self.scheduler.clear()
            self._executed = chunk.instruction
        self._latency.add(self.now_s - chunk.stamp_s)
        self.scheduler.add(chunk, self.now_s, standing=not self._moved)
        after = self.scheduler.targets(due_s)
        if before is not None and after is not None:
            self.seam_jumps_m.append(float(np.linalg.norm(after - before)))

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
    """To the goal around the obstacle, and once more with the instruction changed on the way."""
    world = World(variant, delay, seed)
    hit = reached = False
    while not reached and world.now_s < LIMIT_S:
        world.tick()
        hit = hit or bool(np.linalg.norm(world.position - OBSTACLE) < OBSTACLE_RADIUS_M)
        reached = bool(np.linalg.norm(world.position - GOAL) < REACHED_M)
    executed, targets = np.stack(world.positions), np.stack(world.targets)
    started = int(np.argmax(np.linalg.norm(executed - executed[0], axis=1) > 1e-6))
    speeds = np.linalg.norm(np.diff(executed[started:], axis=0), axis=1) / DT_S
    return Episode(
        variant.name,
        delay.name,
        seed,
        reached and not hit,
        world.now_s,
        float((speeds[2:] < STALL_M_S).sum() * DT_S),
        measures.largest_step(targets[started:]),
        measures.largest_acceleration(targets[started:], DT_S),
        max(world.seam_jumps_m),
        measures.rms_jerk(executed[started:], DT_S),
        measures.log_dimensionless_jerk(executed[started:], DT_S),
        measures.spectral_arc_length(executed[started:], DT_S),
        float(np.mean(world.ages_s)),
        _reaction_s(variant, delay, seed),
    )


def _reaction_s(variant: Variant, delay: Delay, seed: int) -> float:
    """Until the robot is 2 cm away from a twin with the same seed that was not told."""
    told, untold = (World(variant, delay, seed) for _ in range(2))
    change_s = INSTRUCTION_CHANGE_S + delay.high_s
    while told.now_s < change_s - 1e-9:
        told.tick()
        untold.tick()
    told.instruction = "other"
    while told.now_s < change_s + 3.0:
        told.tick()
        untold.tick()
        if np.linalg.norm(told.position - untold.position) > 0.02:
            break
    return told.now_s - change_s


def _episodes(job: tuple[Variant, Delay, range]) -> list[Episode]:
    variant, delay, seeds = job
    return [run_episode(variant, delay, seed) for seed in seeds]


def run_all(seeds: range, workers: int) -> Iterator[list[Episode]]:
    """All variants × delays × seeds; one list for each pair, as they are done."""
    jobs = [(variant, delay, seeds) for variant, delay in product(VARIANTS, DELAYS)]
    if workers == 1:
        yield from map(_episodes, jobs)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        yield from pool.map(_episodes, jobs)


@dataclass(frozen=True)
class Cost:
    """Processor time of one control tick, µs."""

    p50_us: float
    p99_us: float


def measure_cost(ticks: int = 3000, joints: int = 14, live: int = 10) -> dict[str, Cost]:
    """Adding a chunk of 50 steps and sampling a tick's 12 times, with `live` chunks alive.

    Time of this thread's processor, so that other programs on the machine do not count.
    """
    rng = np.random.default_rng(0)
    gripper = [index % 7 == 6 for index in range(joints)]
    guard = Guard(1e9, 0.2)  # compares, and never finds two plans
    costs = {}
    for variant in VARIANTS:
        settings = dict(variant.settings)
        if "guard" in settings:
            settings["guard"] = guard
        scheduler = make_scheduler(variant.method, gripper=gripper, max_chunks=live, **settings)
        plan = rng.normal(size=(HORIZON, joints))
        spent_us = []
        for index in range(ticks):
            now_s = index * DT_S
            chunk = ActionChunk(plan, now_s - 0.05, DT_S)
            times_s = now_s + DT_S * np.arange(12, dtype=np.float64)
            began = time.thread_time_ns()
            scheduler.add(chunk, now_s)
            scheduler.targets(times_s)
            spent_us.append((time.thread_time_ns() - began) / 1000)
        p50, p99 = np.percentile(spent_us[live * 5 :], (50, 99))
        costs[variant.name] = Cost(float(p50), float(p99))
    return costs
