"""Plays a recording into policies in the order of its receipt and adds up their figures."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from pi05_lab.data.bags import BagError, Notes
from pi05_lab.data.recording import (
    Command,
    Event,
    Instruction,
    Joints,
    Recording,
)
from pi05_lab.data.reference import MAX_GAP_S, ReferenceTrajectory
from pi05_lab.data.topics import EvaluatedRobot
from pi05_lab.evaluation.open_loop.conditions import (
    LAG_S,
    Episode,
    EvaluationSettings,
    PolicyTrack,
    wrong_instruction,
)
from pi05_lab.evaluation.open_loop.metrics import Decimated, StreamStatistics
from pi05_lab.evaluation.open_loop.results import (
    Numbers,
    RecordingResult,
    percentiles,
    rounded,
)
from pi05_ros.observation.buffer import CameraStream, History, NotReady, ObservationBuffer
from pi05_ros.observation.decode import DecodeError
from pi05_ros.observation.instruction import InstructionError
from pi05_ros.types import FloatArray, ImageArray, Policy

_PAUSE_NS = 5_000_000_000
"""A longer silence of all streams is skipped."""
_STOPPED_S = 1.0


class Sink(Protocol):
    """Writes the recording and the predicted motion for a viewer; see `export`."""

    def event(self, event: Event, decode: Callable[[Any], ImageArray]) -> None: ...

    def chunk(self, policy: str, stamp_s: float, dt_s: float, positions: FloatArray) -> None: ...

    def commanded(self, policy: str, method: str, now_s: float, positions: FloatArray) -> None: ...

    def close(self, whole: bool) -> None:
        """End; `whole` is false after an exception."""


class OpenLoopEvaluation:
    """Evaluates policies (by name in the report) on one recording.

    Raises:
        BagError: a policy that does not fit the robot.
        RobotConfigError: the limits are a URDF's, and none was given.
    """

    def __init__(
        self,
        recording: Recording,
        policies: Mapping[str, Policy],
        robot: EvaluatedRobot,
        settings: EvaluationSettings,
        sinks: Sequence[Sink] = (),
    ) -> None:
        for name, policy in policies.items():
            _check_fit(name, policy, robot)
        self._recording, self._robot = recording, robot
        self._settings, self._sinks = settings, sinks
        self._notes: Notes = recording.notes
        config = robot.config
        used = {name for policy in policies.values() for name in policy.cameras}
        self._cameras = {camera.name for camera in robot.cameras if camera.name in used}
        self._buffer = ObservationBuffer(
            [CameraStream(c.name, c.required) for c in robot.cameras if c.name in used],
            config.joints.names,
            config.gates,
            common_history(policies),
        )
        self._decoded: dict[int, tuple[Any, ImageArray]] = {}
        self._reference = ReferenceTrajectory(len(config.joints), recording.commanded())
        self._tracks = [
            PolicyTrack(
                name, policy, config, settings, self._reference, self._cameras, self._decode,
                self._notes,
            )
            for name, policy in policies.items()
        ]  # fmt: skip
        self._runners = [s.runner for track in self._tracks for s in track.schedulers.values()]
        self._buffers = [self._buffer, *(runner.buffer for runner in self._runners)]
        self._arm_columns = np.flatnonzero(~config.joints.gripper).tolist()
        self._streams: dict[str, StreamStatistics] = {}
        self._episodes: list[Episode] = []
        self._tick_ns = round(config.dt_s * 1e9)
        self._every_ns = round(settings.every_s * 1e9)
        self._next_tick_ns: int | None = None
        self._next_infer_ns = 0
        self._now_ns = self._origin_ns = 0
        self._last_stamp_s = -np.inf
        self._due = self._observations = 0
        self._skews_s, self._ages_s = Decimated(), Decimated()
        self._sampled: list[float] = []

    def run(self) -> RecordingResult:
        """Play the recording.

        Raises:
            BagError: it has no images and no joint states.
        """
        started_s = time.perf_counter()
        for event in self._recording.events():
            self._advance(event)
            self._take(event)
            for sink in self._sinks:
                sink.event(event, self._recording.decode)
        if self._next_tick_ns is None:
            raise BagError(f"{self._recording.name}: no images and no joint states")
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
        """Run the ticks before a time: a tick sees what was received at its own time."""
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
            self._take_instruction(event)
            return
        stamp_s = event.start_s if isinstance(event, Command) else event.stamp_s
        stream = self._streams.setdefault(event.topic, StreamStatistics(event.topic))
        stream.add(stamp_s, event.time_ns * 1e-9)
        if isinstance(event, Command):
            self._reference.put_command(event)
        elif isinstance(event, Joints):
            for buffer in self._buffers:
                buffer.put_joints(stamp_s, event.positions)
            self._reference.put_joints(stamp_s, event.positions)
        elif event.camera in self._cameras:
            try:
                for buffer in self._buffers:
                    buffer.put_image(event.camera, event.stamp_s, event.payload)
            except ValueError as error:
                self._notes.add(str(error), (event.time_ns - self._origin_ns) * 1e-9)

    def _take_instruction(self, event: Instruction) -> None:
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
        for runner in self._runners:
            runner.set_instruction(text)
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
        for track in self._tracks:
            for method, positions in track.tick(self._now_s, self._episodes[-1], infer).items():
                for sink in self._sinks:
                    sink.commanded(track.name, method, self._now_s, positions)
        self._sampled.append(self._now_s)
        self._settle()

    def _observe(self) -> bool:
        """Infer on the newest observation; whether there was one."""
        self._due += 1
        at_s = self._now_s - self._origin_s
        try:
            snapshot = self._buffer.snapshot(self._now_s)
        except NotReady as error:
            for problem in error.problems:
                self._notes.add(f"no observation: {problem}", at_s)
            return False
        if snapshot.stamp_s <= self._last_stamp_s:
            self._notes.add("no observation: no new image since the last one", at_s)
            return False
        self._last_stamp_s = snapshot.stamp_s
        started_s = time.perf_counter()
        try:
            observation = self._buffer.observe(
                snapshot, self._decode, self._robot.config.joints.to_policy
            )
        except DecodeError as error:
            self._notes.add(f"no observation: {error}", at_s)
            return False
        decode_s = time.perf_counter() - started_s
        self._skews_s.add(snapshot.skew_s)
        self._ages_s.add(self._now_s - snapshot.stamp_s)
        every = self._settings.control_every
        other = ""
        if every and self._observations % every == 0:
            other = wrong_instruction(snapshot.instruction, self._settings)
        self._observations += 1
        for track in self._tracks:
            positions = track.observe(observation, self._episodes[-1], decode_s, other)
            if positions is not None:
                for sink in self._sinks:
                    sink.chunk(track.name, snapshot.stamp_s, track.policy.dt_s, positions)
        return True

    def _settle(self, final: bool = False) -> None:
        for track in self._tracks:
            track.settle(self._now_s, self._current_images, final)
        lag_s = 0.0 if final else LAG_S
        while self._sampled and self._sampled[0] + lag_s <= self._now_s:
            time_s = self._sampled.pop(0)
            real, known = self._reference.at(np.array([time_s]), self._now_s)
            if not known[0] or not self._episodes:
                continue
            self._episodes[-1].positions.add(real[0])
            if self._reference.is_dense(time_s, self._arm_columns, self._robot.config.dt_s):
                self._episodes[-1].recorded.add(time_s, real[0])
        oldest_s = min([track.oldest_s for track in self._tracks], default=np.inf)
        self._reference.trim(min(oldest_s, self._now_s - 1.0))

    def _current_images(self) -> Mapping[str, ImageArray]:
        try:
            messages = self._buffer.snapshot(self._now_s).messages
            return {name: self._decode(message) for name, message in messages.items()}
        except (NotReady, DecodeError):
            return {}

    def _decode(self, payload: Any) -> ImageArray:
        """Decode each image once for all policies and schedulers."""
        key = id(payload)
        if key not in self._decoded or self._decoded[key][0] is not payload:
            if len(self._decoded) >= 2 * len(self._cameras):
                self._decoded.pop(next(iter(self._decoded)))
            self._decoded[key] = (payload, self._recording.decode(payload))
        return self._decoded[key][1]

    def _result(self, wall_s: float) -> RecordingResult:
        end_s = max((s.last_s for s in self._streams.values()), default=0.0)
        streams = [s.row(self._origin_s, end_s) for s in self._streams.values()]
        for stream in streams:
            longest_ms = max((v for v in stream.period_ms if v is not None), default=0.0)
            if stream.silent_s > max(_STOPPED_S, 3e-3 * longest_ms):
                self._notes.add(
                    f"{stream.topic} stopped {stream.silent_s:.1f} s before the end",
                    end_s - stream.silent_s - self._origin_s,
                )
        self._note_late_commands()
        return RecordingResult(
            name=self._recording.name,
            duration_s=round(self._now_s - self._origin_s, 3),
            moments=self._due,
            observations=self._observations,
            skew_ms=_milliseconds(self._skews_s),
            age_ms=_milliseconds(self._ages_s),
            streams=streams,
            commanded_joints=self._joint_names(self._reference.commanded_columns),
            notes=[
                replace(note, first_s=None if note.first_s is None else round(note.first_s, 3))
                for note in self._notes
            ],
            episodes=[episode.row(self._origin_s) for episode in self._episodes],
            policies={track.name: track.row(self._origin_s) for track in self._tracks},
            wall_s=round(wall_s, 3) if self._settings.timings else None,
        )

    def _note_late_commands(self) -> None:
        """Commands are the reference: note where they are missing."""
        for columns in self._reference.awaited:
            joints = ", ".join(self._joint_names(columns))
            self._notes.add(f"no usable command of {joints}: nothing was compared")
        instructed_s = self._episodes[0].start_s if self._episodes else -np.inf
        for columns, begun_s in self._reference.begun_s.items():
            late_s = begun_s - instructed_s
            if np.isfinite(late_s) and late_s > MAX_GAP_S:
                self._notes.add(
                    f"the commands of {', '.join(self._joint_names(columns))} begin {late_s:.1f} s "
                    "after the first instruction: what comes before was not compared"
                )

    def _joint_names(self, columns: Sequence[int]) -> list[str]:
        return [self._robot.config.joints.names[column] for column in columns]


def _check_fit(name: str, policy: Policy, robot: EvaluatedRobot) -> None:
    """Raise BagError unless the policy has the params file's joints and one of its cameras."""
    count = len(robot.config.joints)
    for what, dim in (("states", policy.state_dim), ("actions", policy.action_dim)):
        if dim != count:
            raise BagError(f"{name} has {dim} {what}, the params file {count} joints")
    cameras = [camera.name for camera in robot.cameras]
    if not set(policy.cameras) & set(cameras):
        raise BagError(f"{name} has the cameras {list(policy.cameras)}, the params file {cameras}")


def common_history(policies: Mapping[str, Policy]) -> History:
    """The history of the policies that need one; BagError if they need different ones."""
    needed = {name: History.of(policy) for name, policy in policies.items()}
    needed = {name: history for name, history in needed.items() if history.steps}
    if len(set(needed.values())) > 1:
        raise BagError(f"evaluate one after the other: {', '.join(needed)} need other histories")
    return next(iter(needed.values()), History())


def _milliseconds(samples_s: Decimated) -> Numbers:
    numbers: Numbers = rounded([1e3 * value for value in percentiles(samples_s.items)], 3)
    return numbers
