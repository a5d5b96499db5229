"""The methods that turn overlapping chunks into joint targets, by name."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from pi05_ros.control.chunks import (
    TIME_TOLERANCE_S,
    BoolArray,
    ChunkScheduler,
    LiveChunk,
    Replan,
)
from pi05_ros.types import ActionChunk, FloatArray

SCHEDULERS = ("sync", "latest", "blend", "temporal_ensemble", "rtc")

_CROSSOVER_POINTS = 33
"""Points of the outgoing trajectory that are kept; more cost more and change nothing visible."""
_GUARD_SHARES = np.linspace(0.0, 1.0, 6)
"""Where in their common time two plans are compared."""


class SyncScheduler(ChunkScheduler):
    """Stop, infer, replay: executes a whole chunk, then holds position and infers.

    The robot stands from each observation to the chunk's arrival, so every chunk starts on arrival.
    A chunk that arrives during the execution of another is dropped.
    """

    def wants_inference(self, now_s: float, latency_s: float = 0.0) -> bool:
        return not self._busy(now_s)

    def add(self, chunk: ActionChunk, now_s: float, *, standing: bool = False) -> bool:
        return super().add(chunk, now_s, standing=True)

    def _busy(self, now_s: float) -> bool:
        return self.remaining_s(now_s) > TIME_TOLERANCE_S


class RtcScheduler(ChunkScheduler):
    """Real-time chunking (arXiv 2506.07339): `latest`, with chunks that continue the one before.

    The policy's guidance by `prefix` does that; with a policy without guidance this is `latest`.
    """

    guided = True


class BlendScheduler(ChunkScheduler):
    """A fixed share of the old trajectory and of the new chunk where both exist.

    LeRobot's asynchronous client (`weighted_average`: 0.3 old, 0.7 new). Grippers follow the new
    chunk.
    """

    def __init__(
        self,
        gripper: Sequence[bool] | BoolArray,
        *,
        old_share: float = 0.3,
        replan: Replan | None = None,
    ) -> None:
        if not 0 <= old_share <= 1:
            raise ValueError(f"blend_old_share must be from 0 to 1, got {old_share}")
        super().__init__(gripper, replan)
        self._old_share = old_share

    def join(self, earlier: list[LiveChunk], live: LiveChunk, now_s: float) -> list[LiveChunk]:
        if not earlier:
            return [live]
        times_s = live.start_s + live.dt_s * np.arange(len(live.actions), dtype=np.float64)
        old = earlier[-1]
        common = (times_s >= old.start_s) & (times_s <= old.end_s + TIME_TOLERANCE_S)
        if not common.any():
            return [live]
        trajectory = self.targets(times_s[common])
        assert trajectory is not None
        actions = live.actions.copy()
        mixed = self._old_share * trajectory + (1.0 - self._old_share) * actions[common]
        actions[common] = np.where(self._gripper, actions[common], mixed)
        stamp_s = self._old_share * old.stamp_s + (1.0 - self._old_share) * live.stamp_s
        return [replace(live, actions=actions, stamp_s=stamp_s)]


@dataclass(frozen=True)
class Guard:
    """When chunks count as two plans, and how fast the newest one replaces the others."""

    disagreement: float = 0.0
    """rad or m: the largest joint's RMS difference over the common time; 0 always averages."""
    crossover_s: float = 0.2
    """Duration of the transition to the newest plan."""
    confirmations: int = 2
    """Number of consecutive chunks that must disagree; those before the last one are dropped. A
    value above 1 keeps the plan while the policy alternates between two, and reacts that many
    chunks later. Ignored when at most `crossover_s` of the plan is left."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.disagreement) and self.disagreement >= 0):
            raise ValueError(f"guard disagreement must be finite, >= 0, got {self.disagreement}")
        if not (math.isfinite(self.crossover_s) and self.crossover_s > 0):
            raise ValueError(f"guard crossover_s must be finite and > 0, got {self.crossover_s}")
        if self.confirmations < 1:
            raise ValueError(f"guard confirmations must be >= 1, got {self.confirmations}")


@functools.lru_cache(maxsize=256)
def _guard_steps(first: int, last: int) -> NDArray[np.intp]:
    """[6] steps from the first to the last."""
    return (first + (last - first) * _GUARD_SHARES).astype(np.intp)


class TemporalEnsembleScheduler(ChunkScheduler):
    """The weighted mean of all predictions for a time (ACT, arXiv 2304.13705, section 4.2).

    The i-th oldest of the chunks that cover the time has the weight exp(-m·i), or with
    `newest_first` the i-th newest. Grippers follow the newest: the mean of open and closed is in no
    chunk.

    A chunk that disagrees with the mean of the others by more than the guard allows is another
    plan, and the mean of two plans may hit an obstacle that both avoid. Once confirmed, it replaces
    the others, with a smooth transition within `crossover_s`.
    """

    def __init__(
        self,
        gripper: Sequence[bool] | BoolArray,
        *,
        m: float = 0.01,
        newest_first: bool = False,
        max_chunks: int = 32,
        guard: Guard | None = None,
        replan: Replan | None = None,
    ) -> None:
        if not math.isfinite(m):
            raise ValueError(f"m must be finite, got {m}")
        super().__init__(gripper, replan, max_chunks)
        self._m = m
        self._newest_first = newest_first
        self._guard = guard or Guard()
        self._cached_weights = np.empty(0)
        self._doubts = 0
        self._outgoing: tuple[FloatArray, FloatArray] | None = None
        """Times [n] of a crossover, and the trajectory [n, n_joints] before it."""

    def targets(self, times_s: FloatArray) -> FloatArray | None:
        merged = super().targets(times_s)
        if merged is None or self._outgoing is None:
            return merged
        outgoing_s, trajectory = self._outgoing
        times_s = np.asarray(times_s, dtype=np.float64)
        if times_s[0] >= outgoing_s[-1]:
            return merged
        share = np.clip((times_s - outgoing_s[0]) / (outgoing_s[-1] - outgoing_s[0]), 0.0, 1.0)
        # Smoothstep: the velocity is continuous at both ends.
        share = (share * share * (3.0 - 2.0 * share))[:, None]
        before = np.stack([np.interp(times_s, outgoing_s, joint) for joint in trajectory.T], axis=1)
        crossed = merged * share + before * (1.0 - share)
        crossed[:, self._gripper] = merged[:, self._gripper]
        return np.asarray(crossed)

    def stamp_s(self, time_s: float) -> float:
        if not self._chunks:
            return -math.inf
        _, covered = self._predictions(np.array([time_s]))
        count = len(self._chunks)
        weights = self._weights(count) if covered is None else self._shares(covered)[:, 0]
        return float(weights @ np.array([chunk.stamp_s for chunk in self._chunks]))

    def clear(self) -> None:
        super().clear()
        self._outgoing = None
        self._doubts = 0

    def join(
        self, earlier: list[LiveChunk], live: LiveChunk, now_s: float
    ) -> list[LiveChunk] | None:
        guard = self._guard
        if not (guard.disagreement > 0 and earlier and self._disagrees(live, now_s)):
            self._doubts = 0
            return [*earlier, live]
        self._doubts += 1
        if self._doubts < guard.confirmations and self.remaining_s(now_s) > guard.crossover_s:
            return None
        times_s = now_s + np.linspace(0.0, guard.crossover_s, _CROSSOVER_POINTS)
        trajectory = self.targets(times_s)
        assert trajectory is not None
        self._outgoing = (times_s, trajectory)
        self._doubts = 0
        self.statistics.crossovers += 1
        return [live]

    def _disagrees(self, live: LiveChunk, now_s: float) -> bool:
        """Whether a chunk is another plan than the mean of those before it.

        Compares a few of its steps with the others' nearest ones, which is fast.
        """
        first = max(0, math.ceil((now_s - live.start_s) / live.dt_s))
        end_s = max(chunk.end_s for chunk in self._chunks)
        last = min(len(live.actions) - 1, math.floor((end_s - live.start_s) / live.dt_s))
        if last < first:
            return False
        steps = _guard_steps(first, last)
        elapsed_s = (live.start_s + live.dt_s * steps) - self._starts_s
        nearest = np.rint(elapsed_s * self._rates_hz)
        inside = np.minimum(np.maximum(nearest, 0.0), self._lasts)
        others = self._actions.take(inside.astype(np.intp) + self._firsts, axis=0)
        reach = nearest == inside
        shares = reach / np.maximum(np.add.reduce(reach, axis=0), 1.0)
        mean = (shares.T[:, None] @ others.swapaxes(0, 1))[:, 0]
        difference = mean - live.actions.take(steps, axis=0)
        difference *= difference
        worst = np.add.reduce(difference, axis=0)
        worst[self._gripper] = 0.0
        return bool(np.maximum.reduce(worst) > self._guard.disagreement**2 * len(steps))

    def merge(self, predictions: FloatArray, covered: BoolArray | None) -> FloatArray:
        if covered is None:
            count = len(predictions)
            merged = self._weights(count) @ predictions.reshape(count, -1)
            merged = merged.reshape(predictions.shape[1:])
            latest = predictions[-1]
        else:
            merged = (self._shares(covered)[..., None] * predictions).sum(axis=0)
            newest = len(covered) - 1 - np.argmax(covered[::-1], axis=0)
            latest = predictions[newest, np.arange(len(newest))]
        np.copyto(merged, latest, where=self._gripper)
        return np.asarray(merged)

    def _shares(self, covered: BoolArray) -> FloatArray:
        """Coverage → weights [n_chunks, n]; ranks the covering chunks of each time."""
        counts = np.cumsum(covered, axis=0)
        rank = counts[-1] - counts if self._newest_first else counts - 1
        shares = np.where(covered, self._exponentials(rank, counts[-1]), 0.0)
        return np.asarray(shares / shares.sum(axis=0))

    def _weights(self, count: int) -> FloatArray:
        """[count] weights where all chunks cover the time, oldest first."""
        if len(self._cached_weights) != count:
            rank = np.arange(count)
            weights = self._exponentials(rank[::-1] if self._newest_first else rank, count)
            self._cached_weights = weights / weights.sum()
        return self._cached_weights

    def _exponentials(self, rank: NDArray[np.intp], count: NDArray[np.intp] | int) -> FloatArray:
        """exp(-m·rank), scaled so that the largest is 1: no overflow for any m."""
        largest = np.maximum(0.0, -self._m * (np.asarray(count) - 1.0))
        return np.asarray(np.exp(np.minimum(-self._m * rank - largest, 0.0)))


def make_scheduler(
    name: str,
    *,
    gripper: Sequence[bool] | BoolArray,
    m: float = 0.01,
    newest_first: bool = False,
    max_chunks: int = 32,
    guard: Guard | None = None,
    blend_old_share: float = 0.3,
    replan_interval_s: float = 0.0,
    replan: Replan | None = None,
) -> ChunkScheduler:
    """Make a scheduler by name.

    Args:
        name: one of `SCHEDULERS`.
        gripper: [n_joints] joints that are never averaged but follow the newest chunk.
        m: temporal_ensemble's weight exp(-m·i) of the i-th oldest chunk; below 0 favours new ones.
        newest_first: count i from the newest chunk instead.
        max_chunks: temporal_ensemble keeps at most this many chunks, the newest.
        guard: when temporal_ensemble switches to the newest chunk; None: never.
        blend_old_share: blend's share of the old trajectory.
        replan_interval_s: shortest time between two observations to infer from; not for sync.
        replan: when to infer; by default whenever the executor is ready.

    Raises:
        ValueError: an unknown name or a value out of range.
    """
    if not replan_interval_s >= 0:
        raise ValueError(f"replan_interval_s must be finite and >= 0, got {replan_interval_s}")
    replan = replan or Replan()
    replan = replace(replan, interval_s=max(replan.interval_s, replan_interval_s))
    if name == "sync":
        return SyncScheduler(gripper)
    if name == "latest":
        return ChunkScheduler(gripper, replan)
    if name == "rtc":
        return RtcScheduler(gripper, replan)
    if name == "blend":
        return BlendScheduler(gripper, old_share=blend_old_share, replan=replan)
    if name == "temporal_ensemble":
        return TemporalEnsembleScheduler(
            gripper,
            m=m,
            newest_first=newest_first,
            max_chunks=max_chunks,
            guard=guard,
            replan=replan,
        )
    raise ValueError(f"unknown scheduler {name!r}: choose one of {', '.join(SCHEDULERS)}")
