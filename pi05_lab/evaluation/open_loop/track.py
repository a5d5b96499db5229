"""One policy on one recording: chunks, controls, baselines, errors."""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pi05_lab.evaluation.open_loop.figures import Episode, Traces, TrackFigures
from pi05_lab.evaluation.open_loop.fit import for_policy
from pi05_lab.evaluation.open_loop.notes import Notes, one_line
from pi05_lab.evaluation.open_loop.player import SchedulerReplay
from pi05_lab.evaluation.open_loop.reference import ReferenceTrajectory
from pi05_lab.evaluation.open_loop.series import Decimated
from pi05_lab.evaluation.open_loop.settings import OfflineSettings
from pi05_lab.evaluation.open_loop.worst import WorstMoments
from pi05_ros.executor import check_chunk
from pi05_ros.robot_config import RobotConfig
from pi05_ros.types import ActionChunk, ActionPrefix, FloatArray, ImageArray, Observation, Policy

POLICY, HOLD, LINEAR, RANDOM = "policy", "hold", "linear", "random"
PLAIN, SHUFFLED, BLACK = "plain", "shuffled", "black"
"""Conditions; `plain` is the policy on those observations that have controls."""
LAG_S = 0.3
"""A recorded sample this long ago has its neighbours by now."""


@dataclass
class _Pending:
    """An observation whose future has not been seen yet."""

    stamp_s: float
    episode: Episode
    now: FloatArray
    predictions: dict[str, FloatArray]
    images: Mapping[str, ImageArray]


class PolicyTrack:
    """Evaluates one policy.

    Args:
        name: of the policy in the report.
        policy: is asked in the caller's thread.
        robot: joints and control settings.
        settings: of the evaluation.
        cameras: those that some policy looks through.
        decode: of the recording's pictures.
        notes: take failures.
    """

    def __init__(
        self,
        name: str,
        policy: Policy,
        robot: RobotConfig,
        settings: OfflineSettings,
        cameras: Collection[str],
        decode: Callable[[Any], ImageArray],
        notes: Notes,
    ) -> None:
        self.name = name
        self.policy = policy
        self.traces = Traces()
        self.worst = WorstMoments(settings.worst)
        self.stages: dict[str, Decimated] = {}
        self.inferences = self.failures = self.unscored = self.slow = 0
        self._robot = robot
        self._joints = robot.joints
        self._arm = ~robot.joints.gripper
        self._settings = settings
        self._notes = notes
        self._pending: deque[_Pending] = deque()
        self._memo: dict[tuple[float, str], ActionChunk | Exception] = {}
        self._lagged: deque[tuple[float, Episode, dict[str, FloatArray]]] = deque()
        self.players = [
            SchedulerReplay(method, robot, cameras, self._infer, settings.delay_s, decode)
            for method in settings.schedulers or (robot.scheduler.method,)
        ]

    @property
    def reach_s(self) -> float:
        """How long after an observation's stamp its last step is due."""
        return (self.policy.horizon - 1) * self.policy.dt_s

    @property
    def oldest_s(self) -> float:
        """The earliest time that will be asked for."""
        times_s = [self._pending[0].stamp_s] if self._pending else []
        times_s += [self._lagged[0][0]] if self._lagged else []
        return min(times_s, default=np.inf)

    def observe(
        self,
        observation: Observation,
        episode: Episode,
        truth: ReferenceTrajectory,
        decode_s: float,
        other: str,
    ) -> FloatArray | None:
        """Infer on an observation; the chunk [horizon, n_joints] in rad and m, None for a failure.

        Args:
            observation: in the policy's units.
            episode: that it belongs to.
            truth: the measured positions up to it.
            decode_s: what its pictures took.
            other: an instruction that it does not belong to; "" leaves the controls out.
        """
        started_s = time.perf_counter()
        try:
            chunk = self._infer(observation, None)
        except Exception as error:  # a policy may raise anything; the node goes on as well
            self.failures += 1
            self._notes.add(f"{self.name}: {one_line(error)}")
            return None
        total_s = decode_s + time.perf_counter() - started_s
        self.inferences += 1
        self.slow += total_s > self._settings.delay_s
        for stage, seconds in {"decode": decode_s, **chunk.timings_s, "total": total_s}.items():
            self.stages.setdefault(stage, Decimated()).add(seconds)
        truncated = getattr(self.policy, "truncated_tokens", 0)
        if truncated:
            self._notes.add(f"{self.name}: the prompt was cut by {truncated} tokens")
        now = self._joints.to_joints(observation.state)
        mine = self._joints.to_joints(chunk.actions)
        predictions = {POLICY: mine, **self._baselines(now, observation.stamp_s, truth)}
        controls = self._controls(observation, other) if other else {}
        if controls:
            predictions.update({PLAIN: mine, **controls})
        self._pending.append(
            _Pending(observation.stamp_s, episode, now, predictions, observation.images)
        )
        self.traces.add_chunk(observation.stamp_s, chunk.dt_s, mine)
        return mine

    def put_image(self, camera: str, stamp_s: float, payload: Any) -> None:
        for player in self.players:
            player.runner.buffer.put_image(camera, stamp_s, payload)

    def put_joints(self, stamp_s: float, positions: FloatArray) -> None:
        for player in self.players:
            player.runner.buffer.put_joints(stamp_s, positions)

    def instruct(self, text: str) -> None:
        for player in self.players:
            player.instruct(text)

    def tick(self, now_s: float, episode: Episode, infer: bool) -> dict[str, FloatArray]:
        """One control tick of all schedulers; scheduler → commanded positions [n_joints]."""
        commanded = {}
        for player in self.players:
            position = player.tick(now_s, infer)
            if position is not None:
                commanded[player.method] = position
            for message in player.messages:
                self._notes.add(f"{self.name}, {player.method}: {message}")
            player.messages.clear()
        self._lagged.append((now_s, episode, commanded))
        return commanded

    def settle(
        self,
        now_s: float,
        truth: ReferenceTrajectory,
        current: Callable[[], Mapping[str, ImageArray]],
        final: bool = False,
    ) -> None:
        """Compare what has come true by now.

        Args:
            now_s: on the recording's clock.
            truth: what was recorded.
            current: the newest pictures.
            final: nothing more of these episodes will come.
        """
        while self._pending and (final or self._pending[0].stamp_s + self.reach_s + LAG_S <= now_s):
            self._score(self._pending.popleft(), now_s, truth, current)
        while self._lagged and (final or self._lagged[0][0] + LAG_S <= now_s):
            self._compare(*self._lagged.popleft(), now_s, truth)

    def figures(self, episode: Episode) -> TrackFigures:
        if self.name not in episode.tracks:
            names = tuple(player.method for player in self.players)
            episode.tracks[self.name] = TrackFigures(
                self.policy.horizon, self._joints, self._robot.dt_s, names
            )
        return episode.tracks[self.name]

    def _infer(self, observation: Observation, prefix: ActionPrefix | None) -> ActionChunk:
        """The same chunk, or the same error, for the same observation, whoever asks."""
        if prefix is not None:
            return self._asked(observation, prefix)
        key = (observation.stamp_s, observation.instruction)
        if key not in self._memo:
            try:
                self._memo = {key: self._asked(observation, None)}
            except Exception as error:  # whatever a policy raises
                self._memo = {key: error}
        found = self._memo[key]
        if isinstance(found, Exception):
            raise found
        return found

    def _asked(self, observation: Observation, prefix: ActionPrefix | None) -> ActionChunk:
        observation = for_policy(observation, self.policy)
        chunk = self.policy.infer(observation, prefix)
        check_chunk(chunk, self.policy, observation)
        return chunk

    def _baselines(
        self, now: FloatArray, stamp_s: float, truth: ReferenceTrajectory
    ) -> dict[str, FloatArray]:
        joints, horizon = self._joints, self.policy.horizon
        velocity = truth.velocity(stamp_s)
        ahead_s = self.policy.dt_s * np.arange(horizon)[:, None]
        straight = now + ahead_s * (0.0 if velocity is None else velocity)
        text = f"{self._settings.seed} {round(stamp_s * 1e9)}".encode()
        rng = np.random.default_rng(list(hashlib.sha256(text).digest()[:8]))
        pose = joints.lower + rng.random(len(joints)) * (joints.upper - joints.lower)
        return {
            HOLD: np.tile(now, (horizon, 1)),
            LINEAR: np.clip(straight, joints.lower, joints.upper),
            RANDOM: np.tile(pose, (horizon, 1)),
        }

    def _controls(self, observation: Observation, other: str) -> dict[str, FloatArray]:
        """The chunks for another instruction and for black pictures; all of them, or none.

        An observation counts for every condition or for none, so that the errors are compared on
        the same ones.
        """
        dark = {name: np.zeros_like(picture) for name, picture in observation.images.items()}
        asked = {SHUFFLED: replace(observation, instruction=other)}
        asked[BLACK] = replace(observation, images=dark)
        if len(dark) > 1 and self._settings.black_each:
            for name in dark:
                images = {**observation.images, name: dark[name]}
                asked[f"{BLACK}:{name}"] = replace(observation, images=images)
        found = {}
        for condition, altered in asked.items():
            try:
                chunk = self._asked(altered, None)
            except Exception as error:
                self._notes.add(f"{self.name}, {condition}: {one_line(error)}")
                return {}
            found[condition] = self._joints.to_joints(chunk.actions)
        return found

    def _score(
        self,
        pending: _Pending,
        now_s: float,
        truth: ReferenceTrajectory,
        current: Callable[[], Mapping[str, ImageArray]],
    ) -> None:
        times_s = pending.stamp_s + self.policy.dt_s * np.arange(
            self.policy.horizon, dtype=np.float64
        )
        real, known = truth.at(times_s, now_s)
        if not known.any():
            self.unscored += 1
            return
        figures = self.figures(pending.episode)
        means = {}
        for condition, predicted in pending.predictions.items():
            by_joint = figures.error(condition).add(predicted, real, known)
            means[condition] = float(by_joint[self._arm if self._arm.any() else ...].mean())
            figures.gripper(condition).add(
                predicted, real, known, pending.now, pending.stamp_s, self.policy.dt_s
            )
            if condition.startswith((SHUFFLED, BLACK)):
                moved = np.abs(predicted - pending.predictions[PLAIN])[:, self._arm]
                total = figures.shifts.setdefault(condition, [0.0, 0])
                total[0] += float(moved.mean())
                total[1] += 1
        self.traces.errors.add((pending.stamp_s, means[POLICY], means[HOLD]))
        if 2 * int(known.sum()) >= len(known):
            self.worst.offer(
                means[POLICY], means[HOLD], pending.stamp_s, pending.episode.instruction,
                pending.images, current,
            )  # fmt: skip

    def _compare(
        self,
        time_s: float,
        episode: Episode,
        commanded: dict[str, FloatArray],
        now_s: float,
        truth: ReferenceTrajectory,
    ) -> None:
        real, known = truth.at(np.array([time_s]), now_s)
        if not known[0]:
            return
        if commanded:
            self.traces.motion.add((time_s, real[0], commanded))
        for name, position in commanded.items():
            executed = self.figures(episode).executed[name]
            executed.windows.add(time_s, position)
            executed.absolute += np.abs(position - real[0])
            executed.ticks += 1
