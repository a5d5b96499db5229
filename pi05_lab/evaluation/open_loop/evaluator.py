"""Plays a recording into policies, in the order in which it was received, and adds up figures."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from pi05_lab.evaluation.open_loop.bag import BagError
from pi05_lab.evaluation.open_loop.figures import Episode
from pi05_lab.evaluation.open_loop.fit import (
    check_fit,
    common_cameras,
    for_policy,
    other_instruction,
)
from pi05_lab.evaluation.open_loop.notes import Notes
from pi05_lab.evaluation.open_loop.reference import MAX_GAP_S, ReferenceTrajectory
from pi05_lab.evaluation.open_loop.series import Decimated, percentiles, rounded
from pi05_lab.evaluation.open_loop.settings import OfflineSettings
from pi05_lab.evaluation.open_loop.sources import (
    Command,
    Event,
    Instruction,
    Joints,
    Picture,
    Recording,
)
from pi05_lab.evaluation.open_loop.streams import StreamStatistics
from pi05_lab.evaluation.open_loop.topics import EvaluatedRobot
from pi05_lab.evaluation.open_loop.track import LAG_S, PolicyTrack
from pi05_ros.observation.buffer import CameraStream, NotReady, ObservationBuffer, Snapshot
from pi05_ros.observation.decode import DecodeError
from pi05_ros.observation.instruction import InstructionError
from pi05_ros.types import FloatArray, ImageArray, Policy

_PAUSE_NS = 5_000_000_000
"""Over a longer silence of all streams time is not played."""
_STOPPED_S = 1.0


class Sink(Protocol):
    """Is told everything as it happens, to show it beside the recording."""

    def event(self, event: Event, decode: Callable[[Any], ImageArray]) -> None: ...

    def chunk(self, policy: str, stamp_s: float, dt_s: float, positions: FloatArray) -> None: ...

    def commanded(self, policy: str, method: str, now_s: float, positions: FloatArray) -> None: ...

    def close(self, whole: bool) -> None:
        """End; `whole` says that the evaluation went through."""


class OfflineEvaluation:
    """Evaluates policies on one recording.

    Args:
        recording: what is played.
        policies: name → policy, all with the robot's joints.
        robot: topics, joints, control settings.
        settings: how.
        sinks: are told what happens.

    Raises:
        BagError: a policy that does not fit the robot.
        RobotConfigError: the limits are a URDF's, and none was given.
    """

    def __init__(
        self,
        recording: Recording,
        policies: Mapping[str, Policy],
        robot: EvaluatedRobot,
        settings: OfflineSettings,
        sinks: Sequence[Sink] = (),
    ) -> None:
        for name, policy in policies.items():
            check_fit(name, policy, robot)
        self._recording = recording
        self._robot = robot
        self._settings = settings
        self._sinks = sinks
        self._notes: Notes = recording.notes
        config = robot.config
        self._cameras = common_cameras(policies, robot)
        self._buffer = ObservationBuffer(
            [CameraStream(c.name, c.required) for c in robot.cameras if c.name in self._cameras],
            config.joints.names,
            config.gates,
        )
        self._decoded: dict[int, tuple[Any, ImageArray]] = {}
        self._tracks = [
            PolicyTrack(name, policy, config, settings, self._cameras, self._decode, self._notes)
            for name, policy in policies.items()
        ]
        self._truth = ReferenceTrajectory(len(config.joints), recording.commanded())
        self._arm_columns = np.flatnonzero(~config.joints.gripper).tolist()
        self._streams: dict[str, StreamStatistics] = {}
        self._episodes: list[Episode] = []
        self._tick_ns = round(config.dt_s * 1e9)
        self._every_ns = round(settings.every_s * 1e9)
        self._next_tick_ns: int | None = None
        self._next_infer_ns = 0
        self._now_ns = self._origin_ns = 0
        self._last_stamp_s = -np.inf
        self._moments = self._observations = 0
        self._skews_s = Decimated()
        self._ages_s = Decimated()
        self._sampled: list[float] = []

    def run(self) -> dict[str, Any]:
        """Play all of it; the figures, ready for JSON.

        Raises:
            BagError: no picture and no joint state in it.
        """
        started_s = time.perf_counter()
        for event in self._recording.events():
            self._advance(event)
            self._take(event)
            for sink in self._sinks:
                sink.event(event, self._recording.decode)
        if self._next_tick_ns is None:
            raise BagError(f"{self._recording.name}: no pictures and no joint states")
        self._advance_to(self._now_ns + 1)
        self._settle(final=True)
        if self._episodes:
            self._episodes[-1].end(self._now_s)
        return self._result(time.perf_counter() - started_s)

    @property
    def _now_s(self) -> float:
        return self._now_ns * 1e-9

    @property
    def _origin_s(self) -> float:
        return self._origin_ns * 1e-9

    def _advance(self, event: Event) -> None:
        if self._next_tick_ns is None:
            if isinstance(event, Instruction | Command):
                return
            self._origin_ns = self._next_tick_ns = self._next_infer_ns = event.time_ns
            self._now_ns = event.time_ns
            for episode in self._episodes:
                episode.start_s = self._origin_s
        self._advance_to(event.time_ns)
        self._now_ns = max(self._now_ns, event.time_ns)

    def _advance_to(self, time_ns: int) -> None:
        """Play the ticks before a time; what was received at a tick's time is there for it."""
        assert self._next_tick_ns is not None
        if time_ns - self._next_tick_ns > _PAUSE_NS:
            pause_s = (time_ns - self._next_tick_ns) * 1e-9
            at_s = (self._next_tick_ns - self._origin_ns) * 1e-9
            self._notes.add(f"nothing was recorded for {pause_s:.1f} s", at_s)
            self._next_tick_ns = time_ns
        while self._next_tick_ns < time_ns:
            self._now_ns = self._next_tick_ns
            self._next_tick_ns += self._tick_ns
            self._tick()

    def _take(self, event: Event) -> None:
        if isinstance(event, Instruction):
            self._instruct(event)
            return
        stamp_s = event.start_s if isinstance(event, Command) else event.stamp_s
        stream = self._streams.setdefault(event.topic, StreamStatistics(event.topic))
        stream.add(stamp_s, event.time_ns * 1e-9)
        if isinstance(event, Picture):
            if event.camera in self._cameras:
                self._put_picture(event)
        elif isinstance(event, Joints):
            self._put_joints(stamp_s, event.positions)
            self._truth.put_joints(stamp_s, event.positions)
        else:
            self._truth.put_command(event)

    def _put_picture(self, event: Picture) -> None:
        try:
            self._buffer.put_image(event.camera, event.stamp_s, event.payload)
        except ValueError as error:
            self._notes.add(str(error), (event.time_ns - self._origin_ns) * 1e-9)
            return
        for track in self._tracks:
            track.put_image(event.camera, event.stamp_s, event.payload)

    def _put_joints(self, stamp_s: float, positions: FloatArray) -> None:
        self._buffer.put_joints(stamp_s, positions)
        for track in self._tracks:
            track.put_joints(stamp_s, positions)

    def _instruct(self, event: Instruction) -> None:
        before = self._buffer.instruction
        at_s = (event.time_ns - self._origin_ns) * 1e-9 if self._origin_ns else 0.0
        try:
            text = self._buffer.set_instruction(event.text)
        except InstructionError as error:
            self._notes.add(f"instruction refused: {error}", at_s)
            return
        if text == before:
            return
        if self._episodes:
            self._settle(final=True)
            self._episodes[-1].end(self._now_s)
        for track in self._tracks:
            track.instruct(text)
        config = self._robot.config
        self._episodes.append(Episode(text, self._now_s, config.joints, config.dt_s))

    def _tick(self) -> None:
        infer = False
        if self._now_ns >= self._next_infer_ns:
            late = (self._now_ns - self._next_infer_ns) // self._every_ns
            self._next_infer_ns += (late + 1) * self._every_ns
            infer = self._observe()
        if not self._episodes:
            return
        episode = self._episodes[-1]
        for track in self._tracks:
            for method, positions in track.tick(self._now_s, episode, infer).items():
                for sink in self._sinks:
                    sink.commanded(track.name, method, self._now_s, positions)
        self._sampled.append(self._now_s)
        self._settle()

    def _observe(self) -> bool:
        """Infer on what is there now; whether there was an observation."""
        self._moments += 1
        at_s = self._now_s - self._origin_s
        try:
            snapshot = self._buffer.snapshot(self._now_s)
        except NotReady as error:
            for problem in error.problems:
                self._notes.add(f"no observation: {problem}", at_s)
            return False
        if snapshot.stamp_s <= self._last_stamp_s:
            self._notes.add("no observation: no new picture since the last one", at_s)
            return False
        self._last_stamp_s = snapshot.stamp_s
        started_s = time.perf_counter()
        try:
            observation = snapshot.decode(self._decode, self._robot.config.joints.to_policy)
        except DecodeError as error:
            self._notes.add(f"no observation: {error}", at_s)
            return False
        decode_s = time.perf_counter() - started_s
        self._count(snapshot)
        controlled = self._settings.control_every
        other = ""
        if controlled and (self._observations - 1) % controlled == 0:
            other = other_instruction(snapshot.instruction, self._settings)
        for track in self._tracks:
            seen = for_policy(observation, track.policy)
            positions = track.observe(seen, self._episodes[-1], self._truth, decode_s, other)
            if positions is not None:
                for sink in self._sinks:
                    sink.chunk(track.name, snapshot.stamp_s, track.policy.dt_s, positions)
        return True

    def _count(self, snapshot: Snapshot) -> None:
        self._observations += 1
        self._skews_s.add(snapshot.skew_s)
        self._ages_s.add(self._now_s - snapshot.stamp_s)

    def _settle(self, final: bool = False) -> None:
        for track in self._tracks:
            track.settle(self._now_s, self._truth, self._pictures, final)
        lag_s = 0.0 if final else LAG_S
        while self._sampled and self._sampled[0] + lag_s <= self._now_s:
            time_s = self._sampled.pop(0)
            real, known = self._truth.at(np.array([time_s]), self._now_s)
            if not known[0] or not self._episodes:
                continue
            self._episodes[-1].positions.add(real[0])
            dt_s = self._robot.config.dt_s
            if self._truth.is_dense(time_s, self._arm_columns, dt_s):
                self._episodes[-1].recorded.add(time_s, real[0])
        oldest_s = min([track.oldest_s for track in self._tracks], default=np.inf)
        self._truth.trim(min(oldest_s, self._now_s - 1.0))

    def _pictures(self) -> Mapping[str, ImageArray]:
        try:
            messages = self._buffer.snapshot(self._now_s).messages
            return {name: self._decode(message) for name, message in messages.items()}
        except (NotReady, DecodeError):
            return {}

    def _decode(self, payload: Any) -> ImageArray:
        """Each picture once, although every scheduler asks for it."""
        key = id(payload)
        if key not in self._decoded or self._decoded[key][0] is not payload:
            if len(self._decoded) >= 2 * len(self._cameras):
                self._decoded.pop(next(iter(self._decoded)))
            self._decoded[key] = (payload, self._recording.decode(payload))
        return self._decoded[key][1]

    def _result(self, wall_s: float) -> dict[str, Any]:
        end_s = max((s.last_s for s in self._streams.values()), default=0.0)
        streams = [s.to_dict(self._origin_s, end_s) for s in self._streams.values()]
        duration_s = self._now_s - self._origin_s
        for stream in streams:
            if stream["silent_s"] > max(_STOPPED_S, 3e-3 * max(stream["period_ms"], default=0.0)):
                self._notes.add(
                    f"{stream['topic']} stopped {stream['silent_s']:.1f} s before the end",
                    end_s - stream["silent_s"] - self._origin_s,
                )
        self._note_late_commands()
        names = self._robot.config.joints.names
        return {
            "name": self._recording.name,
            "duration_s": round(duration_s, 3),
            "moments": self._moments,
            "observations": self._observations,
            "skew_ms": rounded([1e3 * v for v in percentiles(self._skews_s.items)], 3),
            "age_ms": rounded([1e3 * v for v in percentiles(self._ages_s.items)], 3),
            "streams": streams,
            "commanded_joints": [names[column] for column in self._truth.commanded_columns],
            "notes": [
                {
                    "text": note.text,
                    "count": note.count,
                    "first_s": None if note.first_s is None else round(note.first_s, 3),
                }
                for note in self._notes
            ],
            "episodes": [episode.to_dict(self._origin_s) for episode in self._episodes],
            "policies": {track.name: self._track(track) for track in self._tracks},
            "wall_s": round(wall_s, 3) if self._settings.timings else None,
        }

    def _note_late_commands(self) -> None:
        """The report says where commands, which are the reference, are missing."""
        names = self._robot.config.joints.names
        for columns in self._truth.awaited:
            joints = ", ".join(names[column] for column in columns)
            self._notes.add(f"no usable command of {joints}: nothing was compared")
        instructed_s = self._episodes[0].start_s if self._episodes else -np.inf
        for columns, begun_s in self._truth.begun_s.items():
            late_s = begun_s - instructed_s
            if np.isfinite(late_s) and late_s > MAX_GAP_S:
                joints = ", ".join(names[column] for column in columns)
                self._notes.add(
                    f"the commands of {joints} begin {late_s:.1f} s after the first instruction: "
                    "what comes before was not compared"
                )

    def _track(self, track: PolicyTrack) -> dict[str, Any]:
        timings = self._settings.timings
        return {
            "description": track.policy.description,
            "horizon": track.policy.horizon,
            "dt_s": track.policy.dt_s,
            "inferences": track.inferences,
            "failures": track.failures,
            "unscored": track.unscored,
            "slower_than_delay": track.slow if timings else None,
            "stages_s": {
                stage: rounded(samples.items, 6)
                for stage, samples in track.stages.items()
                if timings
            },
            "schedulers": {player.method: player.to_dict() for player in track.players},
            "traces": track.traces.to_dict(self._origin_s),
            "worst": track.worst.to_list(self._origin_s),
        }
