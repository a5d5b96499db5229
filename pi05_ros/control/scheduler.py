"""Which action, when: overlapping action chunks become one course of joint targets."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pi05_ros.types import ActionChunk, FloatArray

BoolArray = NDArray[np.bool_]

_TIME_TOLERANCE_S = 1e-6
"""Two times closer than this are the same; float64 epoch seconds resolve 0.24 µs."""


@dataclass
class SchedulerStatistics:
    """What became of the chunks; received = used + the dropped ones."""

    received: int = 0
    used: int = 0
    dropped_late: int = 0
    """Every step's time was over on arrival."""
    dropped_old: int = 0
    """Its observation was not newer than that of a chunk taken before."""
    dropped_busy: int = 0
    """`sync`: the chunk before it was still being executed."""


@dataclass(frozen=True)
class _LiveChunk:
    start_s: float
    """When step 0 is due."""
    dt_s: float
    actions: FloatArray

    @property
    def end_s(self) -> float:
        return self.start_s + (len(self.actions) - 1) * self.dt_s


class ChunkScheduler(ABC):
    """Takes chunks as they arrive and says where the joints should be at any time.

    Step k of a chunk is due at chunk.stamp_s + k·dt_s, by the observation's stamp; when it arrives
    does not matter (`sync` differs, see there). Between two steps the targets are interpolated
    linearly; beyond the last step that any chunk reaches they stay there.

    Not thread safe.
    """

    def __init__(self, gripper: Sequence[bool] | BoolArray, max_chunks: int) -> None:
        self._gripper = np.array(gripper, dtype=bool)
        if self._gripper.ndim != 1 or not len(self._gripper):
            raise ValueError(f"gripper must be one flag per joint, got shape {self._gripper.shape}")
        if max_chunks < 1:
            raise ValueError(f"max_chunks must be >= 1, got {max_chunks}")
        self._max_chunks = max_chunks
        self.statistics = SchedulerStatistics()
        self._newest_stamp_s = -math.inf
        self._chunks: list[_LiveChunk] = []
        self._stack()

    def add(self, chunk: ActionChunk, now_s: float) -> bool:
        """Take a chunk, [horizon, n_joints] in the controller's units, that arrives at `now_s`.

        Returns False if it is of no use; `statistics` has the reason. Raises ValueError for
        another shape, a non-finite value or a dt_s that is not above 0; it is not counted then.
        """
        actions = self._checked(chunk)
        self.statistics.received += 1
        live = _LiveChunk(self._start_s(chunk, now_s), chunk.dt_s, actions)
        if chunk.stamp_s <= self._newest_stamp_s:
            self.statistics.dropped_old += 1
            return False
        if live.end_s < now_s - _TIME_TOLERANCE_S:
            self.statistics.dropped_late += 1
            return False
        if self._busy(now_s):
            self.statistics.dropped_busy += 1
            return False
        self.statistics.used += 1
        self._newest_stamp_s = chunk.stamp_s
        self._chunks = [c for c in self._chunks if c.end_s >= now_s] + [live]
        self._chunks = self._chunks[-self._max_chunks :]
        self._stack()
        return True

    def targets(self, times_s: FloatArray) -> FloatArray | None:
        """[n] times → [n, n_joints] positions; None before the first chunk."""
        if not self._chunks:
            return None
        predictions, exists = self._predictions(np.asarray(times_s, dtype=np.float64))
        return self._merge(predictions, exists)

    def remaining_s(self, now_s: float) -> float:
        """How long the live chunks still reach; 0 when none does."""
        return max(
            (chunk.end_s - now_s for chunk in self._chunks if chunk.end_s > now_s), default=0.0
        )

    def live_chunks(self, now_s: float) -> int:
        """How many chunks reach `now_s` or further."""
        return sum(chunk.end_s >= now_s - _TIME_TOLERANCE_S for chunk in self._chunks)

    @abstractmethod
    def wants_inference(self, now_s: float) -> bool:
        """Whether an observation stamped `now_s` should become a chunk."""

    def clear(self) -> None:
        """Forget all chunks and stamps, for a clock that jumped or a plan that is void."""
        self._newest_stamp_s = -math.inf
        self._chunks = []
        self._stack()

    def _start_s(self, chunk: ActionChunk, now_s: float) -> float:
        return chunk.stamp_s

    def _busy(self, now_s: float) -> bool:
        return False

    @abstractmethod
    def _merge(self, predictions: FloatArray, exists: BoolArray) -> FloatArray:
        """[n_chunks, n, n_joints] oldest first, [n_chunks, n] → [n, n_joints].

        For every time at least one prediction exists.
        """

    def _checked(self, chunk: ActionChunk) -> FloatArray:
        actions = np.array(chunk.actions, dtype=np.float64)
        if actions.ndim != 2 or not len(actions) or actions.shape[1] != len(self._gripper):
            raise ValueError(
                f"a chunk must have shape [horizon, {len(self._gripper)}], got {actions.shape}"
            )
        if not np.isfinite(actions).all():
            step, joint = np.argwhere(~np.isfinite(actions))[0]
            raise ValueError(
                f"a chunk must be finite: step {step}, joint {joint} is {actions[step, joint]}"
            )
        if not (math.isfinite(chunk.stamp_s) and math.isfinite(chunk.dt_s) and chunk.dt_s > 0):
            raise ValueError(
                f"a chunk needs a finite stamp and dt_s > 0, got {chunk.stamp_s}, {chunk.dt_s}"
            )
        return actions

    def _stack(self) -> None:
        """Lay the live chunks side by side, shorter ones filled with their last action."""
        chunks = self._chunks
        longest = max((len(chunk.actions) for chunk in chunks), default=0)
        self._starts_s = np.array([[chunk.start_s] for chunk in chunks])
        self._dts_s = np.array([[chunk.dt_s] for chunk in chunks])
        self._lasts = np.array([[len(chunk.actions) - 1] for chunk in chunks])
        self._actions = np.empty((len(chunks), longest, len(self._gripper)))
        for stacked, chunk in zip(self._actions, chunks, strict=True):
            stacked[: len(chunk.actions)] = chunk.actions
            stacked[len(chunk.actions) :] = chunk.actions[-1]

    def _predictions(self, times_s: FloatArray) -> tuple[FloatArray, BoolArray]:
        """What each chunk says [n_chunks, n, n_joints], and whether it has a say [n_chunks, n].

        Where no chunk reaches, the nearest ones in time do, with their first or last action.
        """
        elapsed_s = times_s - self._starts_s
        outside_s = np.maximum(-elapsed_s, elapsed_s - self._lasts * self._dts_s)
        exists = outside_s <= np.maximum(outside_s.min(axis=0), 0.0) + _TIME_TOLERANCE_S
        steps = np.minimum(np.maximum(elapsed_s / self._dts_s, 0.0), self._lasts)
        whole = np.rint(steps)
        steps = np.where(np.abs(steps - whole) * self._dts_s < _TIME_TOLERANCE_S, whole, steps)
        before = steps.astype(np.intp)
        after = np.minimum(before + 1, self._lasts)
        rows = np.arange(len(self._actions))[:, None]
        share = (steps - before)[..., None]
        predictions = self._actions[rows, before] * (1 - share) + self._actions[rows, after] * share
        return predictions, exists


class SyncScheduler(ChunkScheduler):
    """Stop, infer, replay: a chunk is executed as a whole, then the robot stands and infers.

    The one scheduler whose time line is shifted: step k is due k·dt_s after the chunk's arrival.
    The robot has not moved since the observation, so the plan still begins where the robot is, and
    no step may be lost. A chunk that arrives during the execution of another is dropped.
    """

    def __init__(self, gripper: Sequence[bool] | BoolArray) -> None:
        super().__init__(gripper, max_chunks=1)

    def wants_inference(self, now_s: float) -> bool:
        return not self._busy(now_s)

    def _start_s(self, chunk: ActionChunk, now_s: float) -> float:
        return now_s

    def _busy(self, now_s: float) -> bool:
        return self.remaining_s(now_s) > _TIME_TOLERANCE_S

    def _merge(self, predictions: FloatArray, exists: BoolArray) -> FloatArray:
        return np.asarray(predictions[-1])


class _ReplanningScheduler(ChunkScheduler):
    """Infers again while the chunks are being executed."""

    def __init__(
        self, gripper: Sequence[bool] | BoolArray, max_chunks: int, replan_interval_s: float
    ) -> None:
        if not (math.isfinite(replan_interval_s) and replan_interval_s >= 0):
            raise ValueError(f"replan_interval_s must be finite and >= 0, got {replan_interval_s}")
        super().__init__(gripper, max_chunks)
        self._replan_interval_s = replan_interval_s

    def wants_inference(self, now_s: float) -> bool:
        since_s = now_s - self._newest_stamp_s
        return since_s >= self._replan_interval_s - _TIME_TOLERANCE_S


class LatestScheduler(_ReplanningScheduler):
    """The newest chunk alone, from its arrival on."""

    def __init__(
        self, gripper: Sequence[bool] | BoolArray, *, replan_interval_s: float = 0.0
    ) -> None:
        super().__init__(gripper, 1, replan_interval_s)

    def _merge(self, predictions: FloatArray, exists: BoolArray) -> FloatArray:
        return np.asarray(predictions[-1])


class TemporalEnsembleScheduler(_ReplanningScheduler):
    """The weighted mean of all predictions for a time (ACT, arXiv 2304.13705, section 4.2).

    The i-th oldest of the chunks that reach the time weighs exp(-m·i); the grippers come from the
    newest of them, since a mean of open and closed is a command that no chunk asked for.
    """

    def __init__(
        self,
        gripper: Sequence[bool] | BoolArray,
        *,
        m: float = 0.01,
        max_chunks: int = 32,
        replan_interval_s: float = 0.0,
    ) -> None:
        if not math.isfinite(m):
            raise ValueError(f"m must be finite, got {m}")
        super().__init__(gripper, max_chunks, replan_interval_s)
        self._m = m

    def _merge(self, predictions: FloatArray, exists: BoolArray) -> FloatArray:
        age_rank = np.cumsum(exists, axis=0) - 1
        exponents = np.where(exists, -self._m * age_rank, -np.inf)
        # The largest weight becomes 1, so that no m overflows.
        weights = np.exp(exponents - exponents.max(axis=0))
        weights /= weights.sum(axis=0)
        merged = np.einsum("cn,cnd->nd", weights, predictions)
        if self._gripper.any():
            newest = len(exists) - 1 - np.argmax(exists[::-1], axis=0)
            latest = predictions[newest, np.arange(len(newest))]
            merged[:, self._gripper] = latest[:, self._gripper]
        return np.asarray(merged)


SCHEDULERS = ("sync", "latest", "temporal_ensemble")


def make_scheduler(
    name: str,
    *,
    gripper: Sequence[bool] | BoolArray,
    m: float = 0.01,
    max_chunks: int = 32,
    replan_interval_s: float = 0.0,
) -> ChunkScheduler:
    """Make a scheduler by its name; an unknown name or a value out of range raises ValueError.

    Args:
        name: one of `SCHEDULERS`.
        gripper: [n_joints] the joints that are never averaged.
        m: temporal_ensemble's weight exp(-m·i) of the i-th oldest chunk; below 0 favours new ones.
        max_chunks: temporal_ensemble keeps no more than this, the newest.
        replan_interval_s: shortest time between two observations to infer from; not for sync.
    """
    if name == "sync":
        return SyncScheduler(gripper)
    if name == "latest":
        return LatestScheduler(gripper, replan_interval_s=replan_interval_s)
    if name == "temporal_ensemble":
        return TemporalEnsembleScheduler(
            gripper, m=m, max_chunks=max_chunks, replan_interval_s=replan_interval_s
        )
    raise ValueError(f"unknown scheduler {name!r}: choose one of {', '.join(SCHEDULERS)}")
