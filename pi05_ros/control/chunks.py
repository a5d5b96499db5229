"""Overlapping action chunks on one time line: what every scheduler has in common.

When to infer again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from pi05_ros.types import ActionChunk, ActionPrefix, FloatArray

REPLAN_MODES = ("free", "steps", "remaining")

_TIME_TOLERANCE_S = 1e-6


@dataclass(frozen=True)
class Replan:
    """When an observation should become the next chunk.

    Whatever the mode, an inference begins in time for its chunk to arrive before the live chunks
    end, judged by the latency estimate.
    """

    mode: str = "free"
    """free: whenever the executor is; steps: after `steps` of the newest chunk; remaining: when
    no more than `remaining_s` would be left on arrival."""
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
        """Whether to infer.

        Args:
            since_s: since the observation of the newest chunk; inf before the first.
            left_s: how long the live chunks still reach.
            dt_s: a step of the newest chunk.
            latency_s: from an observation to its usable chunk, as far as known.
        """
        if since_s < self.interval_s - _TIME_TOLERANCE_S:
            return False
        left_on_arrival_s = left_s - latency_s
        if self.mode == "free" or left_on_arrival_s <= dt_s:
            return True
        if self.mode == "steps":
            return since_s >= self.steps * dt_s - _TIME_TOLERANCE_S
        return left_on_arrival_s <= self.remaining_s + _TIME_TOLERANCE_S


BoolArray = NDArray[np.bool_]

_COLUMNS = 6
TIME_TOLERANCE_S = 1e-6
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
    dropped_doubted: int = 0
    """`temporal_ensemble`: it disagreed with the others and was not confirmed."""
    crossovers: int = 0
    """`temporal_ensemble`: a chunk disagreed so much that it replaced the others."""


@dataclass(frozen=True, eq=False)
class LiveChunk:
    """A chunk as it will be executed."""

    start_s: float
    """When step 0 is due."""
    dt_s: float
    actions: FloatArray
    """[horizon, n_joints], not written to any more."""
    stamp_s: float
    """Of its observation; a mean of several's for a mixture."""
    end_s: float = field(init=False)
    """When the last step is due."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "end_s", self.start_s + (len(self.actions) - 1) * self.dt_s)


class ChunkScheduler:
    """Takes chunks as they arrive and says where the joints should be at any time.

    Step k of a chunk is due at chunk.stamp_s + k·dt_s, by the observation's stamp; when it arrives
    does not matter. The one exception is a robot that has stood since the observation: its plan
    still begins where the robot is, so it starts on arrival and no step is skipped. Between two
    steps the targets are interpolated linearly; beyond the last step that any chunk reaches they
    stay there.

    Not thread safe.
    """

    guided = False
    """Whether the next chunk should continue this one's motion; `prefix` has it then."""

    def __init__(
        self,
        gripper: Sequence[bool] | BoolArray,
        max_chunks: int,
        replan: Replan | None = None,
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
        self._chunks: list[LiveChunk] = []
        self._stacked: list[LiveChunk] = []
        self._taken: list[int] = []
        """Slots of the stacked chunks, in their order."""
        self._free: list[int] = []
        self._clear_slots(0)
        self._table: FloatArray = np.empty((_COLUMNS, 0))
        self._stack()

    def add(self, chunk: ActionChunk, now_s: float, *, standing: bool = False) -> bool:
        """Take a chunk, [horizon, n_joints] in the controller's units, that arrives at `now_s`.

        `standing` says that the robot has not been moved since the observation; a scheduler whose
        chunks had all ended by then knows it by itself. Returns False if the chunk is of no use;
        `statistics` has the reason. Raises ValueError for another shape, a non-finite value or a
        dt_s that is not above 0; it is not counted then.
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
        joined = self._joined(earlier, live, now_s)
        if joined is None:
            self.statistics.dropped_doubted += 1
            return False
        self.statistics.used += 1
        self._chunks = joined[-self._max_chunks :]
        self._stack()
        return True

    def adopt(self, other: ChunkScheduler) -> None:
        """Go on with what another scheduler was executing, for a change of method in motion."""
        self.statistics = other.statistics
        self._newest_stamp_s = other._newest_stamp_s
        self._chunks = other._chunks[-self._max_chunks :]
        self._stack()

    def targets(self, times_s: FloatArray) -> FloatArray | None:
        """[n] times → [n, n_joints] positions; None before the first chunk."""
        if not self._chunks:
            return None
        predictions, exists = self._predictions(np.asarray(times_s, dtype=np.float64))
        return self._merge(predictions, exists)

    def prefix(self, stamp_s: float, frozen_until_s: float) -> ActionPrefix | None:
        """What will be executed from `stamp_s` on, for a chunk predicted from that moment.

        It ends with the live chunks, so it may be shorter than a chunk and never holds a step that
        nobody predicted. None where nothing is left.

        Args:
            stamp_s: of the observation; step k is due at stamp_s + k·dt_s.
            frozen_until_s: steps before this are executed before the next chunk can arrive.
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
        frozen = math.ceil((frozen_until_s - stamp_s - TIME_TOLERANCE_S) / newest.dt_s)
        return ActionPrefix(actions, min(max(frozen, 0), steps))

    def stamp_s(self, time_s: float) -> float:
        """How old what is executed at `time_s` is: the stamp of its observation, a mean's mean.

        -inf before the first chunk.
        """
        return self._chunks[-1].stamp_s if self._chunks else -math.inf

    def remaining_s(self, now_s: float) -> float:
        """How long the live chunks still reach; 0 when none does."""
        return max(
            (chunk.end_s - now_s for chunk in self._chunks if chunk.end_s > now_s), default=0.0
        )

    def live_chunks(self, now_s: float) -> int:
        """How many chunks reach `now_s` or further."""
        return sum(chunk.end_s >= now_s - TIME_TOLERANCE_S for chunk in self._chunks)

    def wants_inference(self, now_s: float, latency_s: float = 0.0) -> bool:
        """Whether an observation stamped `now_s`, a chunk `latency_s` later, should be inferred."""
        if not self._chunks:
            return True
        return self._replan.due(
            now_s - self._newest_stamp_s,
            self.remaining_s(now_s),
            self._chunks[-1].dt_s,
            latency_s,
        )

    def clear(self) -> None:
        """Forget all chunks and stamps, for a clock that jumped or a plan that is void."""
        self._newest_stamp_s = -math.inf
        self._chunks = []
        self._stack()

    def _ended(self, stamp_s: float) -> bool:
        """Whether every chunk had been executed by then."""
        return bool(self._chunks) and self.remaining_s(stamp_s) <= TIME_TOLERANCE_S

    def _busy(self, now_s: float) -> bool:
        return False

    def _joined(
        self, earlier: list[LiveChunk], live: LiveChunk, now_s: float
    ) -> list[LiveChunk] | None:
        """The live chunks with a further one, oldest first; None to go on without it."""
        return [*earlier, live]

    def _merge(self, predictions: FloatArray, exists: BoolArray | None) -> FloatArray:
        """[n_chunks, n, n_joints] oldest first, [n_chunks, n] → [n, n_joints].

        For every time at least one prediction exists; None says that all do. Here: the newest
        chunk alone.
        """
        return np.asarray(predictions[-1])

    def _checked(self, chunk: ActionChunk) -> FloatArray:
        actions = np.array(chunk.actions, dtype=np.float64)
        if actions.ndim != 2 or not len(actions) or actions.shape[1] != len(self._gripper):
            raise ValueError(
                f"a chunk must have shape [horizon, {len(self._gripper)}], got {actions.shape}"
            )
        # a sum is cheaper than a look at each value, and only a sum that is finite proves it
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

    def _stack(self) -> None:
        """Lay the live chunks out in memory, for one gather per tick.

        Mostly old chunks leave and one joins: only the one that joins is copied then.
        """
        kept = len(self._chunks) - 1
        leaving = len(self._stacked) - kept
        joins = kept >= 0 and leaving >= 0 and self._stacked[leaving:] == self._chunks[:-1]
        if joins and len(self._chunks[-1].actions) == self._slots.shape[1]:
            self._free += self._taken[:leaving]
            del self._taken[:leaving]
            self._table = np.concatenate(
                (self._table[:, leaving:], self._place(self._chunks[-1])), axis=1
            )
        else:
            self._clear_slots(max((len(chunk.actions) for chunk in self._chunks), default=0))
            rows = [self._place(chunk) for chunk in self._chunks]
            self._table = np.concatenate((np.empty((_COLUMNS, 0)), *rows), axis=1)
        self._stacked = self._chunks
        table = self._table[..., None]
        self._starts_s, self._ends_s, self._rates_hz, self._lasts, self._befores = table[:5]
        self._firsts = table[5].astype(np.intp)

    def _clear_slots(self, length: int) -> None:
        self._slots = np.zeros((self._max_chunks, length, len(self._gripper)))
        self._actions = self._slots.reshape(-1, len(self._gripper))
        self._taken = []
        self._free = list(range(self._max_chunks))

    def _place(self, chunk: LiveChunk) -> FloatArray:
        """Copy a chunk into a free slot; its column of the table."""
        slot = self._free.pop()
        self._taken.append(slot)
        last = len(chunk.actions) - 1
        self._slots[slot, : last + 1] = chunk.actions
        column = (
            chunk.start_s, chunk.end_s, 1.0 / chunk.dt_s,
            last, max(last - 1, 0), slot * self._slots.shape[1],
        )  # fmt: skip
        return np.array(column)[:, None]

    def _predictions(self, times_s: FloatArray) -> tuple[FloatArray, BoolArray | None]:
        """What each chunk says [n_chunks, n, n_joints], and whether it has a say [n_chunks, n].

        Where no chunk reaches, the nearest ones in time do, with their first or last action. None
        for the second says that every chunk has a say at all times.
        """
        since_s = times_s - self._starts_s
        steps = since_s * self._rates_hz
        exists = None
        if np.minimum.reduce(steps, axis=None) < 0 or not (steps <= self._lasts).all():
            outside_s = np.maximum(-since_s, times_s - self._ends_s)
            nearest_s = np.maximum(np.minimum.reduce(outside_s, axis=0), 0.0)
            exists = outside_s <= nearest_s + TIME_TOLERANCE_S
            steps = np.minimum(np.maximum(steps, 0.0), self._lasts)
        before = np.minimum(steps, self._befores).astype(np.intp)
        share = (steps - before)[..., None]
        rows = before + self._firsts
        base = self._actions.take(rows, axis=0)
        # the row after a chunk of one step is another's or empty; its share is 0
        rows += 1
        after = self._actions.take(rows, axis=0, mode="clip")
        after *= share
        base *= 1.0 - share
        base += after
        return base, exists
