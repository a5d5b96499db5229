"""Which action, when: the methods by which overlapping chunks become one course of targets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from pi05_ros.control.chunks import (
    TIME_TOLERANCE_S,
    BoolArray,
    ChunkScheduler,
    LiveChunk,
    SchedulerStatistics,
)
from pi05_ros.control.ensemble import Guard, TemporalEnsembleScheduler
from pi05_ros.control.replan import Replan
from pi05_ros.types import ActionChunk

__all__ = [
    "SCHEDULERS",
    "BlendScheduler",
    "ChunkScheduler",
    "LatestScheduler",
    "RtcScheduler",
    "SchedulerStatistics",
    "SyncScheduler",
    "make_scheduler",
]


class SyncScheduler(ChunkScheduler):
    """Stop, infer, replay: a chunk is executed as a whole, then the robot stands and infers.

    The robot stands from each observation to the chunk's arrival, so every chunk starts then. One
    that arrives during the execution of another is dropped.
    """

    def __init__(self, gripper: Sequence[bool] | BoolArray) -> None:
        super().__init__(gripper, max_chunks=1)

    def wants_inference(self, now_s: float, latency_s: float = 0.0) -> bool:
        return not self._busy(now_s)

    def add(self, chunk: ActionChunk, now_s: float, *, standing: bool = False) -> bool:
        return super().add(chunk, now_s, standing=True)

    def _busy(self, now_s: float) -> bool:
        return self.remaining_s(now_s) > TIME_TOLERANCE_S


class LatestScheduler(ChunkScheduler):
    """The newest chunk alone, from its arrival on."""

    def __init__(self, gripper: Sequence[bool] | BoolArray, replan: Replan | None = None) -> None:
        super().__init__(gripper, 1, replan)


class RtcScheduler(LatestScheduler):
    """Real-time chunking (arXiv 2506.07339): the newest chunk, sampled to continue the one before.

    What makes it continue is the policy's guidance by `prefix`. With a policy that takes none it
    is `latest`.
    """

    guided = True


class BlendScheduler(ChunkScheduler):
    """A fixed share of the old course and of the new chunk wherever both exist.

    LeRobot's asynchronous client (`weighted_average`: 0.3 old, 0.7 new). Grippers are the new
    chunk's.
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
        super().__init__(gripper, 1, replan)
        self._old_share = old_share

    def _joined(self, earlier: list[LiveChunk], live: LiveChunk, now_s: float) -> list[LiveChunk]:
        if not earlier:
            return [live]
        times_s = live.start_s + live.dt_s * np.arange(len(live.actions), dtype=np.float64)
        old = earlier[-1]
        common = (times_s >= old.start_s) & (times_s <= old.end_s + TIME_TOLERANCE_S)
        if not common.any():
            return [live]
        course = self.targets(times_s[common])
        assert course is not None
        actions = live.actions.copy()
        mixed = self._old_share * course + (1.0 - self._old_share) * actions[common]
        actions[common] = np.where(self._gripper, actions[common], mixed)
        stamp_s = self._old_share * old.stamp_s + (1.0 - self._old_share) * live.stamp_s
        return [replace(live, actions=actions, stamp_s=stamp_s)]


SCHEDULERS = ("sync", "latest", "blend", "temporal_ensemble", "rtc")


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
    """Make a scheduler by its name; an unknown name or a value out of range raises ValueError.

    Args:
        name: one of `SCHEDULERS`.
        gripper: [n_joints] the joints that are never averaged: grippers, and others that are
            to follow the newest chunk alone.
        m: temporal_ensemble's weight exp(-m·i) of the i-th oldest chunk; below 0 favours new ones.
        newest_first: count i from the newest chunk instead.
        max_chunks: temporal_ensemble keeps no more than this, the newest.
        guard: when temporal_ensemble crosses over to the newest chunk; None never does.
        blend_old_share: blend's share of the old course.
        replan_interval_s: shortest time between two observations to infer from; not for sync.
        replan: when to infer otherwise; by default as soon as the executor is free.
    """
    replan = replan or Replan()
    replan = replace(replan, interval_s=max(replan.interval_s, replan_interval_s))
    if replan_interval_s < 0 or replan_interval_s != replan_interval_s:
        raise ValueError(f"replan_interval_s must be finite and >= 0, got {replan_interval_s}")
    if name == "sync":
        return SyncScheduler(gripper)
    if name == "latest":
        return LatestScheduler(gripper, replan)
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
