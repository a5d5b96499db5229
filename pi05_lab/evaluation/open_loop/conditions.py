"""One policy on one recording: its chunks, ablations and baselines, and their errors."""

from __future__ import annotations

import hashlib
import math
import random
import time
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pi05_lab.data.bags import Notes, one_line
from pi05_lab.data.reference import ReferenceTrajectory
from pi05_lab.evaluation.open_loop.metrics import (
    BoolArray,
    Decimated,
    ErrorSums,
    GripperTally,
    MotionWindows,
    Traces,
    WorstSamples,
)
from pi05_lab.evaluation.open_loop.results import (
    EpisodeRow,
    ExecutedRow,
    PolicyRow,
    TrackRow,
    rounded,
)
from pi05_lab.evaluation.open_loop.scheduler_replay import SchedulerReplay
from pi05_ros.executor import check_chunk
from pi05_ros.observation.buffer import History
from pi05_ros.robot_config import RobotConfig
from pi05_ros.types import (
    ActionChunk,
    ActionPrefix,
    FloatArray,
    ImageArray,
    JointGroup,
    Observation,
    Policy,
)


class Condition:
    """Where a prediction comes from."""

    POLICY = "policy"
    HOLD, CONSTANT_VELOCITY, RANDOM_POSE = BASELINES = ("hold", "linear", "random")
    SUBSET = "plain"
    """The policy on the observations that have ablations."""
    WRONG_INSTRUCTION, BLACK_IMAGES = "shuffled", "black"
    """Ablations; "black:<camera>" is that of one camera alone."""


LAG_S = 0.3
"""After this time a recorded sample has its neighbours."""
_RANGE_SAMPLES = 2000


@dataclass(frozen=True)
class EvaluationSettings:
    """Settings of an evaluation; the same settings and recording give the same figures.

    Raises:
        ValueError: a value is out of range.
    """

    every_s: float = 0.2
    """Recorded time between two inferences."""
    delay_s: float = 0.1
    """From an observation's stamp to its usable chunk, for the schedulers."""
    schedulers: tuple[str, ...] = ()
    """Empty: the params file's."""
    control_every: int = 4
    """Every nth observation also runs the ablations; 0 runs none."""
    others: tuple[str, ...] = ()
    """Instructions from which the wrong one is chosen."""
    worst: int = 3
    """Worst samples to show."""
    seed: int = 0
    timings: bool = True
    """Measured times in the result; without them two runs give the same bytes."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.every_s) and self.every_s > 0):
            raise ValueError(f"every_s must be above 0, got {self.every_s}")
        if not (math.isfinite(self.delay_s) and self.delay_s >= 0):
            raise ValueError(f"delay_s must be at least 0, got {self.delay_s}")
        if self.control_every < 0 or self.worst < 0:
            raise ValueError("control_every and worst must be at least 0")


def wrong_instruction(instruction: str, settings: EvaluationSettings) -> str:
    """One of `settings.others` that differs, else the words of the instruction in another order."""
    rng = random.Random(f"{settings.seed} {instruction}")
    others = sorted({text for text in settings.others if text and text != instruction})
    if others:
        return rng.choice(others)
    words = instruction.split()
    for _ in range(10):
        rng.shuffle(words)
        if " ".join(words) != instruction:
            return " ".join(words)
    return f"do not {instruction}"


@dataclass
class Executed:
    """The motion that one scheduler and the limits command in an episode."""

    windows: MotionWindows
    absolute: FloatArray
    """[n_joints] sum of |error| over the ticks."""
    ticks: int = 0


class EpisodeTrack:
    """Sums of one policy in one episode, by condition and by scheduler."""

    def __init__(
        self, horizon: int, joints: JointGroup, dt_s: float, schedulers: Iterable[str]
    ) -> None:
        count, arm = len(joints), np.flatnonzero(~joints.gripper)
        self.errors = defaultdict[str, ErrorSums](lambda: ErrorSums(horizon, count))
        self.grippers = defaultdict[str, GripperTally](lambda: GripperTally(joints))
        self.shifts = defaultdict[str, list[float]](lambda: [0.0, 0])
        """Ablation → sum over chunks of the mean |action change| in rad, and chunks."""
        self.executed = {
            name: Executed(MotionWindows(dt_s, arm), np.zeros(count)) for name in schedulers
        }

    def row(self, arm: BoolArray) -> TrackRow:
        return TrackRow(
            {name: sums.row(arm) for name, sums in self.errors.items()},
            {name: tally.row() for name, tally in self.grippers.items()},
            {name: [round(total, 9), int(n)] for name, (total, n) in self.shifts.items()},
            {
                name: ExecutedRow(own.windows.rows(), rounded(own.absolute, 9), own.ticks)
                for name, own in self.executed.items()
            },
        )


class Episode:
    """A stretch of a recording with one instruction."""

    def __init__(self, instruction: str, start_s: float, joints: JointGroup, dt_s: float) -> None:
        self.instruction = instruction
        self.start_s = self.end_s = start_s
        self.tracks: dict[str, EpisodeTrack] = {}
        self.recorded = MotionWindows(dt_s, np.flatnonzero(~joints.gripper))
        self.positions = Decimated(_RANGE_SAMPLES)
        self._arm = ~joints.gripper

    def end(self, now_s: float) -> None:
        self.end_s = now_s
        self.recorded.end()
        for track in self.tracks.values():
            for executed in track.executed.values():
                executed.windows.end()

    def row(self, origin_s: float) -> EpisodeRow:
        return EpisodeRow(
            self.instruction,
            round(self.start_s - origin_s, 3),
            round(self.end_s - self.start_s, 3),
            self.recorded.rows(),
            rounded(np.array(self.positions.items), 5),
            {name: track.row(self._arm) for name, track in self.tracks.items()},
        )


@dataclass
class _Pending:
    """An observation whose chunk lies in the future."""

    stamp_s: float
    episode: Episode
    now: FloatArray
    predictions: dict[str, FloatArray]
    images: Mapping[str, ImageArray]


class PolicyTrack:
    """Evaluates one policy, `name` in the report, in the caller's thread.

    `cameras` are those of all policies, `decode` decodes the recording's images, `notes` collects
    failures.
    """

    def __init__(
        self,
        name: str,
        policy: Policy,
        robot: RobotConfig,
        settings: EvaluationSettings,
        reference: ReferenceTrajectory,
        cameras: Collection[str],
        decode: Callable[[Any], ImageArray],
        notes: Notes,
    ) -> None:
        self.name, self.policy, self._robot = name, policy, robot
        self._joints, self._arm = robot.joints, ~robot.joints.gripper
        self._settings, self._reference, self._notes = settings, reference, notes
        self._reach_s = (policy.horizon - 1) * policy.dt_s
        self._inferences = self._failures = self._unscored = self._slow = 0
        self._stages = defaultdict[str, Decimated](Decimated)
        self._traces = Traces()
        self._worst = WorstSamples(settings.worst)
        self._pending: deque[_Pending] = deque()
        self._lagged: deque[tuple[float, Episode, dict[str, FloatArray]]] = deque()
        self._memo: dict[tuple[float, str], ActionChunk | Exception] = {}
        self.schedulers = {
            method: SchedulerReplay(
                method, robot, cameras, self._infer, settings.delay_s, decode, History.of(policy)
            )
            for method in settings.schedulers or (robot.scheduler.method,)
        }

    @property
    def oldest_s(self) -> float:
        """The earliest time whose reference is still needed."""
        times_s = [self._pending[0].stamp_s] if self._pending else []
        times_s += [self._lagged[0][0]] if self._lagged else []
        return min(times_s, default=np.inf)

    def _with_own_images(self, observation: Observation) -> Observation:
        images = {k: v for k, v in observation.images.items() if k in self.policy.cameras}
        past = tuple(map(self._with_own_images, observation.past))
        return replace(observation, images=images, past=past)

    def observe(
        self, observation: Observation, episode: Episode, decode_s: float, other: str
    ) -> FloatArray | None:
        """Infer on an observation; the chunk [horizon, n_joints] in rad and m, None for a failure.

        `decode_s` is the time that its images took, `other` the wrong instruction for the
        ablations, "" for none.
        """
        observation = self._with_own_images(observation)
        started_s = time.perf_counter()
        try:
            chunk = self._infer(observation, None)
        except Exception as error:  # a policy may raise anything
            self._failures += 1
            self._notes.add(f"{self.name}: {one_line(error)}")
            return None
        total_s = decode_s + time.perf_counter() - started_s
        self._inferences += 1
        self._slow += total_s > self._settings.delay_s
        for stage, seconds in {"decode": decode_s, **chunk.timings_s, "total": total_s}.items():
            self._stages[stage].add(seconds)
        if truncated := getattr(self.policy, "truncated_tokens", 0):
            self._notes.add(f"{self.name}: the prompt was cut by {truncated} tokens")
        now = self._joints.to_joints(observation.state)
        mine = self._joints.to_joints(chunk.actions)
        stamp_s = observation.stamp_s
        predictions = {Condition.POLICY: mine, **self._baselines(now, stamp_s)}
        if ablations := self._ablations(observation, other) if other else {}:
            predictions |= {Condition.SUBSET: mine, **ablations}
        self._pending.append(_Pending(stamp_s, episode, now, predictions, observation.images))
        self._traces.add_chunk(stamp_s, chunk.dt_s, mine)
        return mine

    def tick(self, now_s: float, episode: Episode, infer: bool) -> dict[str, FloatArray]:
        """Run one control tick of all schedulers; scheduler → commanded positions [n_joints]."""
        commanded = {}
        for method, scheduler in self.schedulers.items():
            if (positions := scheduler.tick(now_s, infer)) is not None:
                commanded[method] = positions
            for message in scheduler.messages:
                self._notes.add(f"{self.name}, {method}: {message}")
            scheduler.messages.clear()
        self._lagged.append((now_s, episode, commanded))
        return commanded

    def settle(
        self, now_s: float, current: Callable[[], Mapping[str, ImageArray]], final: bool
    ) -> None:
        """Compare what has a known reference by now; all of it if the episode ends (`final`)."""
        while self._pending and (
            final or self._pending[0].stamp_s + self._reach_s + LAG_S <= now_s
        ):
            self._score(self._pending.popleft(), now_s, current)
        while self._lagged and (final or self._lagged[0][0] + LAG_S <= now_s):
            self._compare_executed(*self._lagged.popleft(), now_s)

    def row(self, origin_s: float) -> PolicyRow:
        """The results; times count from `origin_s`."""
        timings = self._settings.timings
        policy = self.policy
        return PolicyRow(
            *(policy.description, policy.horizon, policy.dt_s),
            *(self._inferences, self._failures, self._unscored),
            slower_than_delay=self._slow if timings else None,
            stages_s={k: rounded(v.items, 6) for k, v in self._stages.items() if timings},
            schedulers={method: replay.row() for method, replay in self.schedulers.items()},
            traces=self._traces.row(origin_s),
            worst=self._worst.rows(origin_s),
        )

    def _infer(self, observation: Observation, prefix: ActionPrefix | None) -> ActionChunk:
        """The same chunk, or the same error, for the same observation of every scheduler."""
        if prefix is not None:
            return self._infer_now(observation, prefix)
        key = (observation.stamp_s, observation.instruction)
        if key not in self._memo:
            try:
                self._memo = {key: self._infer_now(observation, None)}
            except Exception as error:  # a policy may raise anything
                self._memo = {key: error}
        found = self._memo[key]
        if isinstance(found, Exception):
            raise found
        return found

    def _infer_now(self, observation: Observation, prefix: ActionPrefix | None) -> ActionChunk:
        observation = self._with_own_images(observation)
        chunk = self.policy.infer(observation, prefix)
        check_chunk(chunk, self.policy, observation)
        return chunk

    def _baselines(self, now: FloatArray, stamp_s: float) -> dict[str, FloatArray]:
        joints, horizon = self._joints, self.policy.horizon
        velocity = self._reference.velocity(stamp_s)
        ahead_s = self.policy.dt_s * np.arange(horizon)[:, None]
        straight = now + ahead_s * (0.0 if velocity is None else velocity)
        text = f"{self._settings.seed} {round(stamp_s * 1e9)}".encode()
        rng = np.random.default_rng(list(hashlib.sha256(text).digest()[:8]))
        pose = joints.lower + rng.random(len(joints)) * (joints.upper - joints.lower)
        return {
            Condition.HOLD: np.tile(now, (horizon, 1)),
            Condition.CONSTANT_VELOCITY: np.clip(straight, joints.lower, joints.upper),
            Condition.RANDOM_POSE: np.tile(pose, (horizon, 1)),
        }

    def _ablations(self, observation: Observation, other: str) -> dict[str, FloatArray]:
        """The chunks for a wrong instruction and for black images; empty if one of them fails.

        An observation counts for every condition or for none: errors compare on the same ones.
        """
        cameras = set(observation.images)
        altered = {
            Condition.WRONG_INSTRUCTION: replace(observation, instruction=other),
            Condition.BLACK_IMAGES: _blackened(observation, cameras),
        }
        if len(cameras) > 1:
            for name in observation.images:
                altered[f"{Condition.BLACK_IMAGES}:{name}"] = _blackened(observation, {name})
        found = {}
        for condition, each in altered.items():
            try:
                chunk = self._infer_now(each, None)
            except Exception as error:  # a policy may raise anything
                self._notes.add(f"{self.name}, {condition}: {one_line(error)}")
                return {}
            found[condition] = self._joints.to_joints(chunk.actions)
        return found

    def _score(
        self, pending: _Pending, now_s: float, current: Callable[[], Mapping[str, ImageArray]]
    ) -> None:
        dt_s = self.policy.dt_s
        times_s = pending.stamp_s + dt_s * np.arange(self.policy.horizon, dtype=np.float64)
        real, known = self._reference.at(times_s, now_s)
        if not known.any():
            self._unscored += 1
            return
        track = self._track(pending.episode)
        means = {}
        for condition, predicted in pending.predictions.items():
            by_joint = track.errors[condition].add(predicted, real, known)
            means[condition] = float(by_joint[self._arm if self._arm.any() else ...].mean())
            grippers = track.grippers[condition]
            grippers.add(predicted, real, known, pending.now, pending.stamp_s, dt_s)
            if condition.startswith((Condition.WRONG_INSTRUCTION, Condition.BLACK_IMAGES)):
                change = np.abs(predicted - pending.predictions[Condition.SUBSET])[:, self._arm]
                track.shifts[condition][0] += float(change.mean())
                track.shifts[condition][1] += 1
        error, hold = means[Condition.POLICY], means[Condition.HOLD]
        self._traces.errors.add((pending.stamp_s, error, hold))
        if 2 * int(known.sum()) >= len(known):
            instruction = pending.episode.instruction
            self._worst.offer(error, hold, pending.stamp_s, instruction, pending.images, current)

    def _compare_executed(
        self, time_s: float, episode: Episode, commanded: dict[str, FloatArray], now_s: float
    ) -> None:
        real, known = self._reference.at(np.array([time_s]), now_s)
        if not known[0] or not commanded:
            return
        self._traces.motion.add((time_s, real[0], commanded))
        for method, positions in commanded.items():
            executed = self._track(episode).executed[method]
            executed.windows.add(time_s, positions)
            executed.absolute += np.abs(positions - real[0])
            executed.ticks += 1

    def _track(self, episode: Episode) -> EpisodeTrack:
        if self.name not in episode.tracks:
            episode.tracks[self.name] = EpisodeTrack(
                self.policy.horizon, self._joints, self._robot.dt_s, self.schedulers
            )
        return episode.tracks[self.name]


def _blackened(observation: Observation, cameras: Collection[str]) -> Observation:
    """With black images of the cameras, the earlier ones too."""
    images = {
        name: np.zeros_like(image) if name in cameras else image
        for name, image in observation.images.items()
    }
    past = tuple(_blackened(earlier, cameras) for earlier in observation.past)
    return replace(observation, images=images, past=past)
