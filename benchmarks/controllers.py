"""Random command streams through joint_trajectory_controller's rules; counts broken limits.

    python benchmarks/controllers.py [--streams 2000] [--seed 0] [--jobs 2] [--only TEXT]

Every stream is one run of 2.2 s: ticks at 50 Hz with jitter, additional ticks, targets that jump,
vanish and become NaN, a stop, and a start at the measured positions. The controller is
`pi05_lab.sim.controller`; its commands are measured at its own rate. A cell counts the streams
beyond the velocity and beyond the acceleration limits, and gives the largest shares of the limits.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np

from pi05_lab.sim.controller import JointTrajectoryController, Trajectory, TrajectoryRejected
from pi05_ros.control.limits import MotionLimiter
from pi05_ros.control.trajectory import CommandStream, TrajectoryPoints
from pi05_ros.types import FloatArray, JointGroup, JointSpec

JOINTS = JointGroup(
    [
        JointSpec("shoulder", -1.5, 1.5, 2.0, 10.0),
        JointSpec("wrist", -3.0, 3.0, 2.5, 15.0),
        JointSpec("finger", 0.0, 0.05, 0.15, 2.0, gripper=True),
    ]
)
DT_S = 0.02
DURATION_S = 2.2
STOP_S = (0.9, 1.1)
"""Between these times the stream is stopped."""
REST_S = 0.15
"""From rest to the next start."""
BEGIN_S = 0.05
TOLERANCE = 1e-4
"""Share of a limit that rounding may add: stamps are whole nanoseconds."""


@dataclass(frozen=True)
class Setup:
    """A controller with its hardware."""

    from_desired: bool = True
    replacement: bool = False
    rate_hz: float = 500.0
    lag_s: float = 0.0
    """The joints' first-order lag behind their command; 0: one cycle."""
    velocity_interface: bool = True
    offset: float = 0.0
    """Measured positions minus command at rest, in steps at max_velocity."""


@dataclass(frozen=True)
class Network:
    """Delay, order and loss of messages between sender and controller."""

    delay_s: tuple[float, float] = (0.0002, 0.003)
    ordered: bool = True
    loss: float = 0.0
    """Share of the messages that are lost."""
    losses_in_a_row: int = 100
    """Largest number of consecutive losses."""
    overload: float = 0.0
    """Share of the messages that the sender delays by up to 80 ms; it retracts late ones."""
    lead_s: float = 0.03
    """Of the stream."""


@dataclass
class Result:
    """The largest shares of the limits, of all joints."""

    velocity: float = 0.0
    acceleration: float = 0.0
    rejected: int = 0
    retracted: int = 0

    @property
    def held(self) -> bool:
        return max(self.velocity, self.acceleration) <= 1 + TOLERANCE


class _Targets:
    """Segments of random length: ramps with random starts, none, or NaN for one joint."""

    def __init__(self, rng: np.random.Generator) -> None:
        count = 40
        low, high = JOINTS.lower, JOINTS.upper
        self._ends_s = np.cumsum(rng.uniform(0.02, 0.3, count))
        self._from = rng.uniform(low, high, (count, len(JOINTS)))
        self._slope = rng.normal(0.0, 1.0, self._from.shape) * JOINTS.max_velocity
        self._kind = rng.choice(3, count, p=(0.86, 0.07, 0.07))
        near = rng.random((count, 1)) < 0.5
        self._from[:] = np.where(near, self._from[:1] + 0.05 * self._from, self._from)

    def segment(self, now_s: float, times_s: FloatArray) -> FloatArray | None:
        k = int(np.searchsorted(self._ends_s, now_s))
        if self._kind[k] == 1:
            return None
        targets = self._from[k] + self._slope[k] * (times_s - self._ends_s[k])[:, None]
        if self._kind[k] == 2:
            targets[:, 1] = math.nan
        return targets


class _Hardware:
    """Joints behind a position command."""

    def __init__(self, setup: Setup, positions: FloatArray) -> None:
        self._setup = setup
        self._sag = setup.offset * JOINTS.max_velocity * DT_S
        self.positions = positions + self._sag
        self.velocities = np.zeros_like(positions)

    def follow(self, command: FloatArray) -> None:
        period_s = 1.0 / self._setup.rate_hz
        command = command + self._sag
        share = 1.0
        if self._setup.lag_s > 0:
            share = -math.expm1(-period_s / self._setup.lag_s)
        moved = share * (command - self.positions)
        self.positions = self.positions + moved
        self.velocities = moved / period_s


def run(setup: Setup, network: Network, seed: int, known: bool = False) -> Result:
    """One stream through one controller.

    With `known`, the measurement begins after the first start, where the measured positions may
    differ from the controller's.
    """
    rng = np.random.default_rng(seed)
    home = rng.uniform(JOINTS.lower, JOINTS.upper)
    stream = CommandStream(MotionLimiter(JOINTS, DT_S, 0.02), 10, network.lead_s)
    controller = JointTrajectoryController(
        JOINTS.names,
        update_rate_hz=setup.rate_hz,
        interpolate_from_desired_state=setup.from_desired,
        allow_trajectory_replacement=setup.replacement,
    )
    controller.hold(home)
    hardware = _Hardware(setup, home)
    sender = _Sender(stream, network, rng)
    targets = _Targets(rng)
    period_s = 1.0 / setup.rate_hz
    phase_s = rng.uniform(0.0, period_s)
    ticks_s: FloatArray = np.arange(BEGIN_S, DURATION_S, DT_S)
    ticks_s = ticks_s + rng.uniform(0.0, 0.1 * DT_S, len(ticks_s))
    between_s = rng.uniform(BEGIN_S, DURATION_S, 10)
    ticks_s = np.sort(np.concatenate((ticks_s, between_s)))
    result = Result()
    commands = []
    tick = 0
    for cycle in range(int(DURATION_S / period_s)):
        cycle_s = phase_s + cycle * period_s
        # A message is read by the running cycle, whose clock was read a little earlier.
        taken_s = cycle_s + rng.uniform(0.0, 0.5) * period_s
        while tick < len(ticks_s) and ticks_s[tick] <= taken_s:
            sender.tick(float(ticks_s[tick]), targets, hardware.positions)
            tick += 1
        for arrival_s, points in sender.arrived(taken_s):
            message = Trajectory(
                JOINTS.names,
                round(points.stamp_s, 9),
                np.round(points.times_from_start_s, 9),
                points.positions,
                points.velocities,
            )
            try:
                controller.accept(message, arrival_s)
            except TrajectoryRejected:
                result.rejected += 1
        speeds = hardware.velocities if setup.velocity_interface else None
        command, _ = controller.update(cycle_s, hardware.positions, speeds)
        hardware.follow(command)
        commands.append(command)
    skipped = int(BEGIN_S / period_s) + round(2 * network.lead_s / period_s) if known else 0
    velocity = np.diff(np.array(commands[skipped:]), axis=0) / period_s
    acceleration = np.diff(velocity, axis=0) / period_s
    result.velocity = float((np.abs(velocity) / JOINTS.max_velocity).max())
    result.acceleration = float((np.abs(acceleration) / JOINTS.max_acceleration).max())
    result.retracted = sender.retracted
    return result


class _Sender:
    """The node's use of a stream, and the network."""

    def __init__(self, stream: CommandStream, network: Network, rng: np.random.Generator) -> None:
        self.retracted = 0
        self._stream, self._network, self._rng = stream, network, rng
        self._sent: list[tuple[float, TrajectoryPoints]] = []
        self._free_s = self._last_arrival_s = 0.0
        self._lost = 0

    def tick(self, now_s: float, targets: _Targets, measured: FloatArray) -> None:
        stream = self._stream
        if now_s < self._free_s:
            return  # still busy with the previous message
        if STOP_S[0] <= now_s < STOP_S[1]:
            if stream.active or now_s < stream.rest_time_s:
                self._publish(now_s, lambda t_s: stream.brake(t_s))
            return
        if not stream.active:
            if now_s < stream.rest_time_s + REST_S:
                return
            stream.start(measured, now_s)
        self._publish(
            now_s, lambda t_s: stream.tick(t_s, lambda times_s: targets.segment(t_s, times_s))
        )

    def _publish(self, now_s: float, make: Callable[[float], TrajectoryPoints]) -> None:
        network, rng = self._network, self._rng
        points = make(now_s)
        if rng.random() < network.overload:
            now_s += rng.uniform(0.0, 0.08)
            self._free_s = now_s
            if not self._stream.in_time(now_s):
                self._stream.retract()
                self.retracted += 1
                points = make(now_s)
        lost = rng.random() < network.loss and self._lost < network.losses_in_a_row
        self._lost = self._lost + 1 if lost else 0
        if lost:
            return
        arrival_s = now_s + rng.uniform(*network.delay_s)
        if network.ordered:
            arrival_s = max(arrival_s, self._last_arrival_s)
        self._last_arrival_s = arrival_s
        self._sent.append((arrival_s, points))

    def arrived(self, now_s: float) -> list[tuple[float, TrajectoryPoints]]:
        """Messages until `now_s`, in the order of their arrival."""
        ready = sorted((m for m in self._sent if m[0] <= now_s), key=lambda m: m[0])
        self._sent = [m for m in self._sent if m[0] > now_s]
        return ready


HARDWARE = {
    "perfect": {},
    "lag 30 ms": {"lag_s": 0.03},
    "lag 30 ms, no velocity": {"lag_s": 0.03, "velocity_interface": False},
}
NETWORKS = {
    "0.2–3 ms": Network(),
    "0.2–20 ms": Network((0.0002, 0.02)),
    "one lost in a row, lead_s 0.05": Network(
        (0.0002, 0.018), loss=0.3, losses_in_a_row=1, lead_s=0.05
    ),
    "re-ordered, lead_s 0.05": Network((0.0, 0.009), ordered=False, lead_s=0.05),
    "late sender": Network((0.0002, 0.002), overload=0.1),
    "0.2–80 ms": Network((0.0002, 0.08)),
    "10 % lost": Network(loss=0.1),
}


def cell(setup: Setup, network: Network, seeds: Sequence[int], jobs: int) -> str:
    """Streams beyond velocity / beyond acceleration, and the largest shares."""
    with ProcessPoolExecutor(jobs) as pool:
        results = list(pool.map(partial(run, setup, network), seeds, chunksize=20))
    limit = 1 + TOLERANCE
    fast = sum(result.velocity > limit for result in results)
    hard = sum(result.acceleration > limit for result in results)
    velocity = max(result.velocity for result in results)
    acceleration = max(result.acceleration for result in results)
    return f"{fast} / {hard} ({velocity:.2f}, {acceleration:.2f})"


def main(args: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", default="", help="rows that contain this text")
    options = parser.parse_args(args)
    seeds = range(options.seed, options.seed + options.streams)
    print(f"| desired | replacement | Hz | hardware | {' | '.join(NETWORKS)} |")
    print(f"|---|---|---|---|{'---|' * len(NETWORKS)}")
    for replacement in (False, True):
        for desired in (True, False):
            for rate_hz in (500.0, 100.0):
                for name, options_of in HARDWARE.items():
                    setup = Setup(desired, replacement, rate_hz, **options_of)  # type: ignore[arg-type]
                    flags = f"{desired} | {replacement} | {rate_hz:g} | {name}"
                    if options.only not in flags:
                        continue
                    cells = [cell(setup, n, seeds, options.jobs) for n in NETWORKS.values()]
                    print(f"| {flags} | {' | '.join(cells)} |", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
