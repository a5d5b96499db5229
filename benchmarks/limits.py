"""Random and extreme targets through the motion limits; counts violations.

    python benchmarks/limits.py [--ticks 1000000] [--seed 0] [--stream]

Joints and margin are config/aloha.yaml's, 14 joints at 50 Hz. Without `--stream` each tick is one
step of `MotionLimiter`. With it each tick is a message of `CommandStream`, as the node publishes
it: every point of every message is checked, ticks are up to 30 ms late, and each message must equal
its predecessor from its first point to its t_k (a chunk boundary) and begin before its publication.
Position is checked at both ends of every step and at its turning point within the step.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pi05_ros.control.limits import MotionLimiter, MotionState
from pi05_ros.control.trajectory import CommandStream, TrajectoryPoints
from pi05_ros.robot_config import RobotConfig, read_robot_config
from pi05_ros.types import FloatArray

PARAMS_FILE = Path(__file__).parents[1] / "config" / "aloha.yaml"
BLOCK_TICKS = 2000
"""Ticks of one kind of targets, from a random state at rest."""
TOLERANCE = 1e-9
LEAD_S = 0.02
PAST_S = 0.02
"""Time by which a message begins before its publication."""
MAX_DELAY_S = 0.03
"""Of a tick, as on a machine without real-time priority."""
ROUNDING_S = 1e-5
"""Of float64 epoch seconds on the grid."""


def walk(rng: np.random.Generator, low: FloatArray, high: FloatArray, n: int) -> FloatArray:
    """A random walk near the limits' range."""
    steps = rng.normal(0.0, 0.02, (n, len(low))) * (high - low)
    return rng.uniform(low, high) + np.cumsum(steps, axis=0)


def boundaries(rng: np.random.Generator, low: FloatArray, high: FloatArray, n: int) -> FloatArray:
    """Straight segments with random starts, as from chunks that disagree."""
    starts = rng.uniform(low, high, (n // 25 + 1, len(low)))
    slopes = rng.normal(0.0, 0.05, starts.shape) * (high - low)
    segment, step = np.divmod(np.arange(n), 25)
    return np.asarray(starts[segment] + slopes[segment] * step[:, None])


def jumps(rng: np.random.Generator, low: FloatArray, high: FloatArray, n: int) -> FloatArray:
    return rng.uniform(low, high, (n, len(low)))


def extreme(rng: np.random.Generator, low: FloatArray, high: FloatArray, n: int) -> FloatArray:
    """Of any magnitude of a float."""
    return np.asarray(rng.choice([-1.0, 1.0], (n, len(low))) * 10 ** rng.uniform(-3, 300, (n, 1)))


def bounds(rng: np.random.Generator, low: FloatArray, high: FloatArray, n: int) -> FloatArray:
    """Beyond one end and then the other."""
    ends = np.repeat(rng.random((n // 50 + 1, len(low))) < 0.5, 50, axis=0)[:n]
    return np.where(ends, low - 1.0, high + 1.0)


def not_finite(rng: np.random.Generator, low: FloatArray, high: FloatArray, n: int) -> FloatArray:
    trajectory = walk(rng, low, high, n)
    trajectory[rng.random(trajectory.shape) < 0.3] = np.nan
    trajectory[rng.random(trajectory.shape) < 0.1] = np.inf
    trajectory[rng.random(trajectory.shape) < 0.1] = -np.inf
    return trajectory


KINDS = (walk, boundaries, jumps, extreme, bounds, not_finite)


def violations(
    limiter: MotionLimiter, positions: FloatArray, velocities: FloatArray
) -> tuple[int, int, int]:
    """Joint steps beyond position, velocity and acceleration, of states [n, n_joints]."""
    before, after = velocities[:-1], velocities[1:]
    turns = before * after < 0
    share = np.where(turns, before / np.where(turns, before - after, 1.0), 0.0)
    turning = positions[:-1] + np.where(turns, 0.5 * share * limiter.dt_s * before, 0.0)
    position = np.zeros(turning.shape, dtype=bool)
    for q in (positions[1:], turning):
        position |= (q < limiter.lower - TOLERANCE) | (q > limiter.upper + TOLERANCE)
    velocity = np.abs(after) > limiter.max_velocity + TOLERANCE
    acceleration = np.abs(after - before) > limiter.velocity_step + TOLERANCE
    broken = ~np.isfinite(positions[1:]) | ~np.isfinite(after)
    return tuple(int((v | broken).sum()) for v in (position, velocity, acceleration))  # type: ignore[return-value]


def through_limiter(
    limiter: MotionLimiter, targets: FloatArray, rng: np.random.Generator
) -> tuple[list[int], float]:
    """Violations of position, velocity and acceleration, and the seconds of all ticks."""
    speeds = np.gradient(targets, limiter.dt_s, axis=0)
    state = limiter.at_rest(rng.uniform(limiter.lower, limiter.upper))
    states: list[MotionState] = [state]
    started_s = time.perf_counter()
    for target, speed in zip(targets, speeds, strict=True):
        state, _ = limiter.step(state, target, speed)
        states.append(state)
    spent_s = time.perf_counter() - started_s
    positions = np.array([s.position for s in states])
    velocities = np.array([s.velocity for s in states])
    return [*violations(limiter, positions, velocities)], spent_s


def breaks_boundary(
    before: TrajectoryPoints, after: TrajectoryPoints, end_s: float, dt_s: float
) -> bool:
    """Whether `after` differs from `before` between its first point and its t_k, `end_s`."""
    shift = round((after.stamp_s - before.stamp_s) / dt_s)
    steps = np.arange(round((end_s - after.stamp_s) / dt_s) + 1)
    rows = np.minimum(shift + steps, len(before.positions) - 1)
    return shift < 0 or not (
        np.abs(after.positions[steps] - before.positions[rows]).max() <= TOLERANCE
        and np.abs(after.velocities[steps] - before.velocities[rows]).max() <= TOLERANCE
    )


def through_stream(
    robot: RobotConfig, limiter: MotionLimiter, targets: FloatArray, rng: np.random.Generator
) -> tuple[list[int], float]:
    """As `through_limiter` for every message's points, and chunk boundaries and late messages."""
    stream = CommandStream(limiter, lead_s=LEAD_S)
    began_s, spent_s = 1.8e9, 0.0
    now_s = began_s
    stream.start(rng.uniform(limiter.lower, limiter.upper), began_s)
    last = len(targets) - 1
    counts = np.zeros(5, dtype=np.int64)
    before: TrajectoryPoints | None = None

    def ahead(times_s: FloatArray) -> FloatArray:
        rows = np.rint((times_s - began_s) / limiter.dt_s).astype(np.int64)
        return targets[np.clip(rows, 0, last)]

    delays_s = rng.uniform(0.0, MAX_DELAY_S, len(targets)) * (rng.random(len(targets)) < 0.1)
    for tick, delay_s in enumerate(delays_s):
        now_s = max(now_s, began_s + tick * limiter.dt_s + delay_s)
        tick_s = time.perf_counter()
        points = stream.tick(now_s, ahead)
        spent_s += time.perf_counter() - tick_s
        counts[:3] += violations(limiter, points.positions, points.velocities)
        if before is not None:
            counts[3] += breaks_boundary(before, points, now_s + LEAD_S, limiter.dt_s)
            # A new motion is at rest until its first t_k.
            moves = points.velocities[0].any()
            counts[4] += moves and points.stamp_s > now_s - PAST_S + ROUNDING_S
        before = points
    return [int(count) for count in counts], spent_s


def main(args: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ticks", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stream", action="store_true", help="messages instead of single steps")
    options = parser.parse_args(args)
    robot = read_robot_config(PARAMS_FILE)
    limiter = MotionLimiter(robot.joints, robot.dt_s, robot.parameters.position_margin)
    rng = np.random.default_rng(options.seed)
    columns = ["ticks", "beyond position", "beyond velocity", "beyond acceleration"]
    if options.stream:
        columns += ["jumps at chunk boundaries", "messages that begin late"]
    counts = {kind: np.zeros(len(columns), dtype=np.int64) for kind in KINDS}
    spent_s = 0.0
    done = 0
    while done < options.ticks:
        kind = KINDS[done // BLOCK_TICKS % len(KINDS)]
        n = min(BLOCK_TICKS, options.ticks - done)
        targets = kind(rng, limiter.lower, limiter.upper, n)
        with np.errstate(all="ignore"):
            if options.stream:
                found, block_s = through_stream(robot, limiter, targets, rng)
            else:
                found, block_s = through_limiter(limiter, targets, rng)
        counts[kind] += [n, *found]
        spent_s += block_s
        done += n
    print(f"| targets | {' | '.join(columns)} |")
    print("|---" * (len(columns) + 1) + "|")
    for kind, row in counts.items():
        print(f"| {kind.__name__} | {' | '.join(str(int(v)) for v in row)} |")
    total = np.sum(list(counts.values()), axis=0)
    print(f"| all | {' | '.join(str(int(v)) for v in total)} |")
    print(
        f"\n{1e6 * spent_s / done:.1f} µs a tick, {len(robot.joints)} joints, seed {options.seed}"
    )
    return int(total[1:].any())


if __name__ == "__main__":
    raise SystemExit(main())
