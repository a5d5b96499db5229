"""The time line of overlapping action chunks that all schedulers share, and when to infer again.

Step k of a chunk is due at stamp_s + k·dt_s. Where chunks overlap, the method decides:

    chunk 1   o---o---o---o---o---o
    chunk 2           o---o---o---o---o---o
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from pi05_ros.types import ActionChunk, ActionPrefix, FloatArray

BoolArray = NDArray[np.bool_]

REPLAN_MODES = ("free", "steps", "remaining")
TIME_TOLERANCE_S = 1e-6
"""Times closer than this are equal; float64 epoch seconds resolve 0.24 µs."""

_COLUMNS = 6


@dataclass(frozen=True)
class Replan:
    """When to infer the next chunk.

    In every mode an inference starts early enough for its chunk to arrive before the live chunks
    end, by the latency estimate.
    """

    mode: str = "free"
    """free: whenever the executor is ready; steps: after `steps` of the newest chunk; remaining:
    when at most `remaining_s` will be left on arrival."""
    steps: int = 10
    remaining_s: float = 0.3
    interval_s: float = 0.0
    """Shortest time between two observations, in every mode."""

    def __post_init__(self) -> None:
        if self.mode not in REPLAN_MODES:
            raise ValueError(f"replan mode {self.mode!r}: choose one of {', '.join(REPLAN_MODES)}")
        if self.steps < 1:
            raise ValueError(f"replan steps must be >= 1, got {self.steps}")
        for name, value in (("remaining_s", self.remaining_s), ("interval_s", self.interval_s)):
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"replan_{name} must be finite and >= 0, got {value}")

    def due(self, since_s: float, left_s: float, dt_s: float, latency_s: float) -> bool:
        """Whether to infer now.

        Args:
            since_s: time since the observation of the newest chunk.
            left_s: time until the live chunks end.
            dt_s: step of the newest chunk.
            latency_s: estimated time from an observation to its chunk.
        """
        if since_s < self.interval_s - TIME_TOLERANCE_S:
            return False
        left_on_arrival_s = left_s - latency_s
        if self.mode == "free" or left_on_arrival_s <= dt_s:
            return True
        if self.mode == "steps":
            return since_s >= self.steps * dt_s - TIME_TOLERANCE_S
        return left_on_arrival_s <= self.remaining_s + TIME_TOLERANCE_S


@dataclass
class SchedulerStatistics:
    """Counts of chunks; received = used + all dropped."""

    received: int = 0
    used: int = 0
    dropped_late: int = 0
    """All of its steps were in the past on arrival."""
    dropped_old: int = 0
    """Its observation was not newer than that of an earlier chunk."""
    dropped_busy: int = 0
    """`sync`: the chunk before it was still being executed."""
    dropped_doubted: int = 0
    """`temporal_ensemble`: it disagreed with the others and was not confirmed."""
    crossovers: int = 0
    """`temporal_ensemble`: a chunk disagreed so much that it replaced the others."""


@dataclass(eq=False)
class LiveChunk:
    """A chunk on the time line."""

    start_s: float
    """When step 0 is due."""
    dt_s: float
    actions: FloatArray
    """[horizon, n_joints], never changed."""
    stamp_s: float
    """Of its observation, or the weighted mean of a blend."""
    slot: int = -1
    """Its place in the scheduler's memory."""
    end_s: float = field(init=False)
    """When the last step is due."""

    def __post_init__(self) -> None:
        self.end_s = self.start_s + (len(self.actions) - 1) * self.dt_s


class ChunkScheduler:
    """Takes chunks as they arrive and gives the joint targets for any time.

    Step k is due at chunk.stamp_s + k·dt_s, by the observation's stamp, whenever the chunk arrives.
    Exception: where the robot has not moved since the observation, the chunk starts on arrival and
    no step is skipped. Targets are interpolated linearly between steps and constant after the last
    step of all chunks.

    This class alone is the method `latest`: the newest chunk, from its arrival on. Another method
    overrides `join` or `merge`. Not thread safe.
    """

    guided = False
    """Whether the policy should be guided by `prefix` to continue the live chunks."""

    def __init__(
        self,
        gripper: Sequence[bool] | BoolArray,
        replan: Replan | None = None,
        max_chunks: int = 1,
    ) -> None:
        self._gripper = np.array(gripper, dtype=bool)
        if self._gripper.ndim != 1 or not len(self._gripper):
            raise ValueError(f"gripper must be one flag per joint, got shape {self._gripper.shape}")
        if max_chunks < 1:
            raise ValueError(f"max_chunks must be >= 1, got {max_chunks}")
        self._max_chunks = max_chunks
        self._replan = replan or Replan()
        self.statistics = SchedulerStatistics()
        self._newest_stamp_s = -math.inf
        self._all_slots = frozenset(range(max_chunks))
        self._table: FloatArray = np.zeros((_COLUMNS, max_chunks))
        self._allocate(0)
        self._set_chunks([])

    def add(self, chunk: ActionChunk, now_s: float, *, standing: bool = False) -> bool:
        """Take a chunk, [horizon, n_joints] in the controller's units, that arrives at `now_s`.

        `standing`: the robot has not moved since the observation. A scheduler whose chunks had all
        ended by then detects this itself.

        Returns:
            False if the chunk is dropped; `statistics` has the reason.

        Raises:
            ValueError: another shape, a non-finite value, or dt_s not above 0. Not counted.
        """
        actions = self._checked(chunk)
        self.statistics.received += 1
        if standing or self._ended(chunk.stamp_s):
            start_s = max(now_s, chunk.stamp_s)
        else:
            start_s = chunk.stamp_s
        live = LiveChunk(start_s, chunk.dt_s, actions, chunk.stamp_s)
        if chunk.stamp_s <= self._newest_stamp_s:
            self.statistics.dropped_old += 1
            return False
        if live.end_s < now_s - TIME_TOLERANCE_S:
            self.statistics.dropped_late += 1
            return False
        if self._busy(now_s):
            self.statistics.dropped_busy += 1
            return False
        self._newest_stamp_s = chunk.stamp_s
        earlier = [c for c in self._chunks if c.end_s >= now_s]
        joined = self.join(earlier, live, now_s)
        if joined is None:
            self.statistics.dropped_doubted += 1
            return False
        self.statistics.used += 1
        self._set_chunks(joined)
        return True

    def adopt(self, other: ChunkScheduler) -> None:
        """Continue another scheduler's chunks, for a change of method in motion."""
        self.statistics = other.statistics
        self._newest_stamp_s = other._newest_stamp_s
        self._allocate(0)
        self._set_chunks([replace(chunk) for chunk in other._chunks])

    def targets(self, times_s: FloatArray) -> FloatArray | None:
        """[n] times → [n, n_joints] positions; None before the first chunk."""
        if not self._chunks:
            return None
        predictions, covered = self._predictions(np.asarray(times_s, dtype=np.float64))
        return self.merge(predictions, covered)

    def prefix(self, stamp_s: float, committed_until_s: float) -> ActionPrefix | None:
        """The targets from `stamp_s` on, for guidance of a chunk predicted from there.

        Ends with the live chunks, so it may be shorter than a chunk; None where they have ended.

        Args:
            stamp_s: of the observation; step k is due at stamp_s + k·dt_s.
            committed_until_s: steps before this time are executed before the chunk takes effect.
        """
        if not self._chunks:
            return None
        newest = self._chunks[-1]
        steps = math.floor((newest.end_s - stamp_s + TIME_TOLERANCE_S) / newest.dt_s) + 1
        steps = min(steps, len(newest.actions))
        if steps < 1:
            return None
        actions = self.targets(stamp_s + newest.dt_s * np.arange(steps, dtype=np.float64))
        assert actions is not None
        committed = math.ceil((committed_until_s - stamp_s - TIME_TOLERANCE_S) / newest.dt_s)
        return ActionPrefix(actions, min(max(committed, 0), steps))

    def stamp_s(self, time_s: float) -> float:
        """The observation stamp of the target at `time_s`, a weighted mean for several chunks.

        -inf before the first chunk.
        """
        return self._chunks[-1].stamp_s if self._chunks else -math.inf

    def remaining_s(self, now_s: float) -> float:
        """Time until the live chunks end, at least 0."""
        return max(
            (chunk.end_s - now_s for chunk in self._chunks if chunk.end_s > now_s), default=0.0
        )

    def live_chunks(self, now_s: float) -> int:
        """Number of chunks that end at `now_s` or later."""
        return sum(chunk.end_s >= now_s - TIME_TOLERANCE_S for chunk in self._chunks)

    def wants_inference(self, now_s: float, latency_s: float = 0.0) -> bool:
        """Whether to infer on an observation of `now_s` whose chunk arrives `latency_s` later."""
        if not self._chunks:
            return True
        return self._replan.due(
            now_s - self._newest_stamp_s,
            self.remaining_s(now_s),
            self._chunks[-1].dt_s,
            latency_s,
        )

    def clear(self) -> None:
        """Drop all chunks and stamps, after a clock jump or when the plan is void."""
        self._newest_stamp_s = -math.inf
        self._set_chunks([])

    def _ended(self, stamp_s: float) -> bool:
        """Whether all chunks had been executed by `stamp_s`."""
        return bool(self._chunks) and self.remaining_s(stamp_s) <= TIME_TOLERANCE_S

    def _busy(self, now_s: float) -> bool:
        return False

    def join(
        self, earlier: list[LiveChunk], live: LiveChunk, now_s: float
    ) -> list[LiveChunk] | None:
        """The chunks to keep, oldest first and the new one last; None drops the new one."""
        return [*earlier, live]

    def merge(self, predictions: FloatArray, covered: BoolArray | None) -> FloatArray:
        """[n_chunks, n, n_joints] oldest first, coverage [n_chunks, n] → [n, n_joints].

        Each time has at least one prediction; coverage None: all chunks cover all times.
        """
        return np.asarray(predictions[-1])

    def _checked(self, chunk: ActionChunk) -> FloatArray:
        """A copy of the chunk's actions."""
        actions = np.array(chunk.actions, dtype=np.float64)
        if actions.ndim != 2 or not len(actions) or actions.shape[1] != len(self._gripper):
            raise ValueError(
                f"a chunk must have shape [horizon, {len(self._gripper)}], got {actions.shape}"
            )
        # One sum is cheaper than a test of each value, and a finite sum proves all finite.
        if not math.isfinite(np.add.reduce(actions, axis=None)) and not np.isfinite(actions).all():
            step, joint = np.argwhere(~np.isfinite(actions))[0]
            raise ValueError(
                f"a chunk must be finite: step {step}, joint {joint} is {actions[step, joint]}"
            )
        if not (math.isfinite(chunk.stamp_s) and math.isfinite(chunk.dt_s) and chunk.dt_s > 0):
            raise ValueError(
                f"a chunk needs a finite stamp and dt_s > 0, got {chunk.stamp_s}, {chunk.dt_s}"
            )
        return actions

    def _allocate(self, length: int) -> None:
        self._slots = np.zeros((self._max_chunks, length, len(self._gripper)))
        self._actions = self._slots.reshape(-1, len(self._gripper))

    def _set_chunks(self, chunks: list[LiveChunk]) -> None:
        """Replace the live chunks; copies the new one, the last, into a slot of one array.

        One gather per tick then reads all chunks.
        """
        self._chunks = chunks = chunks[-self._max_chunks :]
        if chunks and len(chunks[-1].actions) > self._slots.shape[1]:
            self._allocate(max(len(chunk.actions) for chunk in chunks))
            for slot, chunk in enumerate(chunks):
                self._place(chunk, slot)
        elif chunks:
            self._place(chunks[-1], min(self._all_slots - {c.slot for c in chunks[:-1]}))
        table = self._table.take([chunk.slot for chunk in chunks], axis=1)[..., None]
        self._starts_s, self._ends_s, self._rates_hz, self._lasts, self._befores = table[:5]
        self._firsts = table[5].astype(np.intp)

    def _place(self, chunk: LiveChunk, slot: int) -> None:
        chunk.slot = slot
        last = len(chunk.actions) - 1
        self._slots[slot, : last + 1] = chunk.actions
        self._table[:, slot] = (
            chunk.start_s, chunk.end_s, 1.0 / chunk.dt_s,
            last, max(last - 1, 0), slot * self._slots.shape[1],
        )  # fmt: skip

    def _predictions(self, times_s: FloatArray) -> tuple[FloatArray, BoolArray | None]:
        """Each chunk's targets [n_chunks, n, n_joints], and its coverage [n_chunks, n].

        Where no chunk covers a time, the nearest ones do, with their first or last action.
        Coverage None: all chunks cover all times.
        """
        since_s = times_s - self._starts_s
        steps = since_s * self._rates_hz
        covered = None
        if np.minimum.reduce(steps, axis=None) < 0 or not (steps <= self._lasts).all():
            outside_s = np.maximum(-since_s, times_s - self._ends_s)
            nearest_s = np.maximum(np.minimum.reduce(outside_s, axis=0), 0.0)
            covered = outside_s <= nearest_s + TIME_TOLERANCE_S
            steps = np.minimum(np.maximum(steps, 0.0), self._lasts)
        before = np.minimum(steps, self._befores).astype(np.intp)
        share = (steps - before)[..., None]
        rows = before + self._firsts
        base = self._actions.take(rows, axis=0)
        # The row after a chunk of one step belongs to another or is unused; its share is 0.
        rows += 1
        after = self._actions.take(rows, axis=0, mode="clip")
        after *= share
        base *= 1.0 - share
        base += after
        return base, covered
