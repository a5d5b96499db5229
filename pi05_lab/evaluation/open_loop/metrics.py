"""Measures and traces of one recording, added up sample by sample in bounded memory."""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from pi05_lab.evaluation import statistics
from pi05_lab.evaluation.open_loop.results import (
    ErrorRow,
    GripperRow,
    Numbers,
    StreamRow,
    TraceRow,
    WorstSample,
    percentiles,
    rounded,
)
from pi05_ros.types import FloatArray, ImageArray, JointGroup

BoolArray = NDArray[np.bool_]

WINDOW_S = 5.0
"""Smoothness is measured in windows of this length, so recordings of any length compare."""
MIN_WINDOW_S = 1.0
GRIPPER_TOLERANCE_S = 0.25
"""Largest distance of a predicted gripper change from the recorded one that it counts for."""
GAP_PERIODS = 3.0
"""A pause longer than this many typical periods is a gap."""
_TYPICAL_STEPS = 20
_LONGEST_GAPS = 5
TRACE_POINTS = 600
TRACE_CHUNKS = 60
CHUNK_POINTS = 12
THUMBNAIL_WIDTH = 200
_APART_S = 1.0


class Decimated:
    """Every 2^k-th item of a stream: all up to `limit`, then every second, fourth and so on."""

    def __init__(self, limit: int = 2000) -> None:
        self.items: list[Any] = []
        self.count = 0
        """Items that were added."""
        self._limit = limit
        self._stride = 1

    def add(self, item: Any) -> None:
        if self.count % self._stride == 0:
            self.items.append(item)
            if len(self.items) > self._limit:
                self.items = self.items[::2]
                self._stride *= 2
        self.count += 1


class Samples(Decimated):
    """Decimated numbers, with the largest of all of them."""

    largest = -math.inf

    def add(self, item: float) -> None:
        self.largest = max(self.largest, item)
        super().add(item)


class ErrorSums:
    """Errors of chunks [horizon, n_joints], summed by joint and by step."""

    def __init__(self, horizon: int, n_joints: int) -> None:
        self.chunks = 0
        self.absolute = np.zeros((horizon, n_joints))
        self.squared = np.zeros((horizon, n_joints))
        self.steps = np.zeros(horizon, dtype=np.int64)

    def add(self, predicted: FloatArray, reference: FloatArray, known: BoolArray) -> FloatArray:
        """Add a chunk [horizon, n_joints]; returns its mean absolute error by joint."""
        error = np.where(known[:, None], predicted - reference, 0.0)
        self.chunks += 1
        self.absolute += np.abs(error)
        self.squared += error**2
        self.steps += known
        return np.asarray(np.abs(error).sum(axis=0) / max(1, int(known.sum())))

    def row(self, arm: BoolArray) -> ErrorRow:
        """The sums; by step, means over the joints of `arm` (over all, if it is empty)."""
        by_step = self.absolute[:, arm].mean(axis=1) if arm.any() else self.absolute.mean(axis=1)
        return ErrorRow(
            self.chunks,
            rounded(self.absolute.sum(axis=0), 9),
            rounded(self.squared.sum(axis=0), 9),
            rounded(by_step, 9),
            self.steps.tolist(),
        )


@dataclass
class _Change:
    """A recorded opening or closing of one gripper."""

    time_s: float
    column: int
    opens: bool
    chunks: int = 0
    """Chunks that cover it."""
    found: int = 0


class GripperTally:
    """Whether chunks open or close a gripper as the recording does, and when.

    A gripper changes when it crosses the middle of its limits after the observation. A chunk finds
    the change if its first one has the same direction and is at most `GRIPPER_TOLERANCE_S` away;
    otherwise the recorded change is missed and the predicted one invented. Overlapping chunks cover
    the same change, so changes are also counted once each: a change is found if at least half of
    the chunks that cover it find it. Steps within the tolerance of unknown ones are not scored.
    """

    def __init__(self, joints: JointGroup) -> None:
        self.found = self.missed = self.invented = 0
        self.offsets_s = Decimated(1000)
        self.changes: list[_Change] = []
        self._columns = np.flatnonzero(joints.gripper)
        self._middle = (joints.lower + joints.upper) / 2

    def add(
        self,
        predicted: FloatArray,
        reference: FloatArray,
        known: BoolArray,
        now: FloatArray,
        stamp_s: float,
        dt_s: float,
    ) -> None:
        """Add a chunk [horizon, n_joints] from an observation at `now` [n_joints]."""
        steps = len(known) if known.all() else int(np.argmin(known))
        tolerance = GRIPPER_TOLERANCE_S / dt_s + 1e-9
        # A change closer than this to unknown steps may have its counterpart among them.
        scored = steps - 1 - tolerance
        for column in self._columns:
            middle = self._middle[column]
            side = bool(now[column] > middle)
            mine = _first((predicted[:, column] > middle) != side)
            real = _first((reference[:steps, column] > middle) != side)
            if real is None:
                self.invented += mine is not None and mine <= scored
                continue
            close = mine is not None and abs(mine - real) <= tolerance
            if not close and real > len(predicted) - 1 - tolerance:
                continue
            change = self._change(stamp_s + real * dt_s, int(column), not side, dt_s)
            change.chunks += 1
            if mine is not None and close:
                self.found += 1
                change.found += 1
                self.offsets_s.add(float((mine - real) * dt_s))
            else:
                self.missed += 1
                self.invented += mine is not None and mine <= scored

    def _change(self, time_s: float, column: int, opens: bool, dt_s: float) -> _Change:
        """The change at a time.

        Chunks of other stamps date it up to a step differently, or, where the measured gripper
        lags behind, at their first step.
        """
        for change in reversed(self.changes):
            same = change.column == column and change.opens == opens
            if same and abs(change.time_s - time_s) <= GRIPPER_TOLERANCE_S + dt_s:
                return change
        self.changes.append(_Change(time_s, column, opens))
        return self.changes[-1]

    def row(self) -> GripperRow:
        return GripperRow(
            self.found,
            self.missed,
            self.invented,
            len(self.changes),
            sum(2 * change.found >= change.chunks for change in self.changes),
            rounded(self.offsets_s.items, 6),
        )


def _first(changed: BoolArray) -> int | None:
    return int(np.argmax(changed)) if changed.any() else None


def gripper_f1(found: int, missed: int, invented: int) -> float:
    """2·TP / (2·TP + FN + FP); nan without any change."""
    total = 2 * found + missed + invented
    return 2 * found / total if total else math.nan


class MotionWindows:
    """Smoothness of a motion sampled every `dt_s`, of the joints `columns`, window by window."""

    def __init__(self, dt_s: float, columns: NDArray[np.int64]) -> None:
        self.windows: list[tuple[float, float, float, float]] = []
        """Duration in s, RMS jerk, LDLJ and SPARC of each; nan where nothing moves."""
        self._dt_s, self._columns = dt_s, columns
        self._samples: list[FloatArray] = []
        self._last_s = -math.inf

    def add(self, time_s: float, positions: FloatArray) -> None:
        """Add positions [n_joints]; after a gap they begin a new window."""
        if time_s - self._last_s > 1.5 * self._dt_s:
            self.end()
        self._last_s = time_s
        self._samples.append(positions[self._columns])
        if len(self._samples) * self._dt_s >= WINDOW_S:
            self.end()

    def end(self) -> None:
        """End the window; one shorter than `MIN_WINDOW_S` is dropped."""
        samples, self._samples = self._samples, []
        duration_s = len(samples) * self._dt_s
        if duration_s < MIN_WINDOW_S or not len(self._columns):
            return
        motion = np.array(samples)
        self.windows.append(
            (
                duration_s,
                statistics.rms_jerk(motion, self._dt_s),
                statistics.log_dimensionless_jerk(motion, self._dt_s),
                statistics.spectral_arc_length(motion, self._dt_s),
            )
        )

    def rows(self) -> list[Numbers]:
        return [rounded(window, 6) for window in self.windows]


class StreamStatistics:
    """Rate, gaps and age of one topic's messages."""

    def __init__(self, topic: str) -> None:
        self.topic = topic
        self.count = 0
        self.last_s = 0.0
        self._first_s = 0.0
        self._steps_s = Samples()
        self._ages_s = Decimated()
        self._typical_s = 0.0
        self._gaps: list[tuple[float, float]] = []
        self._gap_count = 0
        self._out_of_order = 0

    def add(self, stamp_s: float, received_s: float) -> None:
        if self.count == 0:
            self._first_s = self.last_s = stamp_s
        else:
            self._add_step(stamp_s - self.last_s)
            self.last_s = max(stamp_s, self.last_s)
        self.count += 1
        self._ages_s.add(received_s - stamp_s)

    def _add_step(self, step_s: float) -> None:
        if step_s <= 0:
            self._out_of_order += 1
            return
        self._steps_s.add(step_s)
        if self._steps_s.count <= _TYPICAL_STEPS:
            self._typical_s = float(np.median(self._steps_s.items))
        if self._steps_s.count >= _TYPICAL_STEPS and step_s > GAP_PERIODS * self._typical_s:
            self._gap_count += 1
            self._gaps.append((step_s, self.last_s))
            self._gaps = sorted(self._gaps, reverse=True)[:_LONGEST_GAPS]

    def row(self, start_s: float, end_s: float) -> StreamRow:
        """The figures; times count from `start_s`, silence up to `end_s`."""
        span_s = self.last_s - self._first_s
        periods_s = percentiles(self._steps_s.items, (50, 99))
        if self._steps_s.count:
            periods_s.append(self._steps_s.largest)
        return StreamRow(
            topic=self.topic,
            messages=self.count,
            rate_hz=round((self.count - 1) / span_s, 3) if span_s > 0 else 0.0,
            period_ms=rounded([1e3 * v for v in periods_s], 3),
            age_ms=rounded([1e3 * v for v in percentiles(self._ages_s.items)], 3),
            gaps=self._gap_count,
            longest_gaps=[
                [round(1e3 * gap_s, 1), round(at_s - start_s, 3)] for gap_s, at_s in self._gaps
            ],
            out_of_order=self._out_of_order,
            first_s=round(self._first_s - start_s, 3),
            silent_s=round(max(0.0, end_s - self.last_s), 3),
        )


class Traces:
    """Traces of one policy, thinned until they fit on a page."""

    def __init__(self) -> None:
        self.motion = Decimated(TRACE_POINTS)
        """(time, reference [n_joints], scheduler → commanded [n_joints])."""
        self.chunks = Decimated(TRACE_CHUNKS)
        """(times [m], positions [m, n_joints])."""
        self.dots = Decimated(TRACE_POINTS // 2)
        """(stamp, first step [n_joints])."""
        self.errors = Decimated(TRACE_POINTS)
        """(stamp, error of the policy, error of holding the position), rad."""

    def add_chunk(self, stamp_s: float, dt_s: float, positions: FloatArray) -> None:
        steps = np.unique(np.linspace(0, len(positions) - 1, CHUNK_POINTS).round().astype(int))
        self.chunks.add((stamp_s + dt_s * steps, positions[steps]))
        self.dots.add((stamp_s, positions[0]))

    def row(self, origin_s: float) -> TraceRow:
        """The traces; times count from `origin_s`."""
        motion = self.motion.items
        schedulers = sorted({name for _, _, commanded in motion for name in commanded})
        unknown = np.full(len(motion[0][1]), np.nan) if motion else np.zeros(0)
        return TraceRow(
            times_s=rounded([time_s - origin_s for time_s, _, _ in motion], 4),
            recorded=rounded(np.array([reference for _, reference, _ in motion]), 4),
            commanded={
                name: rounded(np.array([c.get(name, unknown) for _, _, c in motion]), 4)
                for name in schedulers
            },
            dots=[[round(t - origin_s, 4), rounded(row, 4)] for t, row in self.dots.items],
            chunks=[
                [rounded(times_s - origin_s, 4), rounded(rows, 4)]
                for times_s, rows in self.chunks.items
            ],
            errors=[rounded((t - origin_s, mine, hold), 5) for t, mine, hold in self.errors.items],
        )


class WorstSamples:
    """The `count` observations with the largest errors, at least 1 s apart."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._kept: list[WorstSample] = []

    def offer(
        self,
        error: float,
        hold: float,
        stamp_s: float,
        instruction: str,
        images: Mapping[str, ImageArray],
        current: Callable[[], Mapping[str, ImageArray]],
    ) -> None:
        """Keep an observation if it is one of the worst.

        `error` and `hold` are those of the policy and of holding the position, rad; `images` those
        of the observation; `current` returns those at the chunk's end, for a sample that is kept.
        """
        rivals = [kept for kept in self._kept if abs(kept.stamp_s - stamp_s) < _APART_S]
        if any(rival.error >= error for rival in rivals):
            return
        rest = [kept for kept in self._kept if kept not in rivals]
        if len(rest) >= self._count and (not rest or rest[-1].error >= error):
            return
        before, after = _thumbnails(images), _thumbnails(current())
        rest.append(WorstSample(error, hold, stamp_s, instruction, before, after))
        self._kept = sorted(rest, key=lambda kept: (-kept.error, kept.stamp_s))[: self._count]

    def rows(self, origin_s: float) -> list[WorstSample]:
        found = []
        for kept in self._kept:
            stamp_s = round(kept.stamp_s - origin_s, 3)
            error, hold = round(kept.error, 6), round(kept.hold, 6)
            found.append(replace(kept, error=error, hold=hold, stamp_s=stamp_s))
        return found


def _thumbnails(images: Mapping[str, ImageArray]) -> dict[str, str]:
    """Small JPEGs as base64."""
    found = {}
    for name, image in images.items():
        height = max(1, round(image.shape[0] * THUMBNAIL_WIDTH / image.shape[1]))
        small = cv2.resize(image, (THUMBNAIL_WIDTH, height), interpolation=cv2.INTER_AREA)
        encoded = cv2.imencode(".jpg", np.ascontiguousarray(small[:, :, ::-1]))[1]
        found[name] = base64.b64encode(encoded.tobytes()).decode()
    return found
