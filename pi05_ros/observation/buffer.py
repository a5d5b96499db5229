"""The newest frame of each camera, the recent joint states and the instruction.

Subscriptions put messages, the runner takes snapshots, and the executor decodes them. All stamps
and every `now_s` are seconds on the clock of the message stamps; the buffer reads no clock.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pi05_ros.observation.decode import DecodeError
from pi05_ros.observation.instruction import checked_instruction
from pi05_ros.observation.stream import (
    CLOCK_JUMP_S,
    ImageFault,
    ImageRules,
    ImageWatch,
    Stamped,
    Stream,
    StreamStatistics,
    same_bytes,
)
from pi05_ros.types import FloatArray, ImageArray, Observation, Policy, Problem

JOINT_HISTORY_S = 1.0
MAX_JOINT_HISTORY = 2000
"""1 s of two publishers at 1000 Hz."""


HISTORY = "(the policy needs earlier observations)"


DecodeImage = Callable[[Any], ImageArray]
ToPolicy = Callable[[FloatArray], FloatArray]


class NotReady(RuntimeError):
    """No observation can be made; `problems` has one line per cause."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__("; ".join(map(str, problems)))
        self.problems = tuple(problems)


class FrameSetIncomplete(NotReady):
    """The newest frames are farther apart than the caller allows."""


@dataclass(frozen=True)
class CameraStream:
    """A camera of the policy; an observation needs all required ones."""

    name: str
    required: bool = True


@dataclass(frozen=True)
class Gates:
    """How old and how far apart the parts of one observation may be."""

    max_image_age_s: float = 0.2
    max_skew_s: float = 0.05
    """Between the used frames; below the slowest camera's period it rejects good frames."""
    max_joint_age_s: float = 0.1
    """Of the newest joint state, and between the used one and the newest frame."""
    max_instruction_chars: int = 500
    images: ImageRules = field(default_factory=ImageRules)

    def __post_init__(self) -> None:
        for name in ("max_image_age_s", "max_skew_s", "max_joint_age_s"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be a finite number of seconds above 0, got {value}")
        if self.max_instruction_chars < 1:
            raise ValueError(
                f"max_instruction_chars must be >= 1, got {self.max_instruction_chars}"
            )


@dataclass(frozen=True)
class History:
    """Earlier observations that a policy needs: `steps` of them, `dt_s` apart."""

    steps: int = 0
    dt_s: float = 0.0

    def __post_init__(self) -> None:
        if self.steps < 0 or not 0 <= self.duration_s <= JOINT_HISTORY_S:
            raise ValueError(
                f"a history of {self.steps} steps of {self.dt_s} s: it must be at most "
                f"{JOINT_HISTORY_S:g} s long"
            )

    @property
    def duration_s(self) -> float:
        return self.steps * self.dt_s

    @classmethod
    def of(cls, policy: Policy) -> History:
        """What the policy declares; ValueError if it is too long."""
        return cls(getattr(policy, "history_steps", 0), policy.dt_s)


@dataclass(frozen=True)
class Snapshot:
    """The undecoded parts of one observation."""

    messages: Mapping[str, Any]
    """Camera name → message, in the order of the cameras."""
    frame_stamps_s: Mapping[str, float]
    positions: FloatArray
    """[n_joints] as on the topic."""
    joints_stamp_s: float
    instruction: str
    stamp_s: float
    """Stamp of the newest used frame, at which the chunk's first step is due."""
    past: tuple[Snapshot, ...] = ()
    """Of the earlier observations, oldest first."""

    @property
    def skew_s(self) -> float:
        """Between the oldest and the newest used frame."""
        return max(self.frame_stamps_s.values()) - min(self.frame_stamps_s.values())


class ObservationBuffer:
    """Collects messages from any thread and selects those of one inference. Thread safe."""

    def __init__(
        self,
        cameras: Sequence[CameraStream],
        joint_names: Sequence[str],
        gates: Gates,
        history: History | None = None,
    ) -> None:
        names = [camera.name for camera in cameras]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"camera names must be unique, got {names}")
        if not joint_names or len(set(joint_names)) != len(joint_names):
            raise ValueError(f"joint names must be unique, got {list(joint_names)}")
        self.cameras = tuple(cameras)
        self.joint_names = tuple(joint_names)
        self.gates = gates
        self._lock = threading.Lock()
        self.history = history or History()
        self._frames: dict[str, Stream[Any]] = {
            name: Stream(history_s=self.history.duration_s) for name in names
        }
        self._watches = {name: ImageWatch(gates.images) for name in names}
        self._joints: Stream[FloatArray] = Stream(history_s=JOINT_HISTORY_S)
        self._joint_arrivals: deque[Stamped[FloatArray]] = deque(maxlen=MAX_JOINT_HISTORY)
        self._instruction: str | None = None
        self._arrived_s = -math.inf
        self._sizes: dict[str, tuple[int, int]] = {}
        self._size_changes: dict[str, str] = {}

    @property
    def camera_names(self) -> tuple[str, ...]:
        return tuple(self._frames)

    def put_image(
        self, camera: str, stamp_s: float, message: Any, content: Any | None = None
    ) -> None:
        """Keep `message`, still encoded, as the newest frame of `camera`.

        A frame that is not later than the newest one is dropped, unless it is more than 1 s
        earlier: then the clock jumped back, and the stream starts over.

        Args:
            camera: one of `camera_names`.
            stamp_s: of the frame.
            message: passed to `decode_image` later.
            content: the message's bytes without its stamp, to detect repeated images; None skips
                the check.

        Raises:
            ValueError: unknown camera, or a stamp that is not finite.
        """
        stream = self._frames.get(camera)
        if stream is None:
            raise ValueError(f"camera {camera!r} is not one of {list(self._frames)}")
        _check_stamp(stamp_s, f"camera {camera!r}")
        watch = self._watches[camera]
        watched = content is not None and self.gates.images.frozen_after_s > 0
        # Not under the lock, since the control thread waits for it.
        same = watched and same_bytes(content, watch.content)
        with self._lock:
            if stream.put(stamp_s, message) and watched:
                watch.record_arrival(stamp_s, content, same)
            self._arrived_s = time.monotonic()

    def put_joints(self, stamp_s: float, positions: FloatArray) -> None:
        """Keep a copy of `positions` [n_joints], in the order of `joint_names`, for 1 s.

        Raises:
            ValueError: another shape, or a position or stamp that is not finite.
        """
        _check_stamp(stamp_s, "joint positions")
        values = np.array(positions, dtype=np.float64)
        if values.shape != (len(self.joint_names),):
            raise ValueError(f"expected {len(self.joint_names)} positions, got {values.shape}")
        if not np.isfinite(values).all():
            bad = self.joint_names[int(np.flatnonzero(~np.isfinite(values))[0])]
            raise ValueError(f"position of joint {bad!r} is not finite")
        values.flags.writeable = False
        with self._lock:
            newest = self._joints.newest
            if newest is not None and stamp_s < newest.stamp_s - CLOCK_JUMP_S:
                self._joint_arrivals.clear()
            self._joints.put(stamp_s, values)
            self._joint_arrivals.append(Stamped(stamp_s, values))
            while self._joint_arrivals[0].stamp_s < stamp_s - JOINT_HISTORY_S:
                self._joint_arrivals.popleft()

    def set_instruction(self, text: str) -> str:
        """Set the instruction and return it without surrounding blanks.

        Raises:
            InstructionError: see `checked_instruction`; the instruction is not changed.
        """
        text = checked_instruction(text, self.gates.max_instruction_chars)
        with self._lock:
            self._instruction = text
        return text

    @property
    def arrived_s(self) -> float:
        """When the last frame arrived, by time.monotonic; -inf before the first."""
        with self._lock:
            return self._arrived_s

    @property
    def instruction(self) -> str | None:
        with self._lock:
            return self._instruction

    def positions(self, now_s: float) -> FloatArray:
        """The newest positions [n_joints], for the start of a motion.

        Raises:
            NotReady: none received, or too old.
        """
        with self._lock:
            fault = self._joints.fault(now_s, self.gates.max_joint_age_s)
            if fault or self._joints.newest is None:
                raise NotReady([_joint_problem(fault)])
            return self._joints.newest.payload.copy()

    def newest_joints(self) -> tuple[float, FloatArray] | None:
        """Stamp and positions [n_joints] of the newest joint state, of any age."""
        with self._lock:
            newest = self._joints.newest
            return None if newest is None else (newest.stamp_s, newest.payload)

    def joint_history(self, since_s: float) -> tuple[FloatArray, FloatArray]:
        """Joint states of the last second that are stamped after `since_s`.

        Late ones and equal stamps are included: they reveal a second publisher.

        Returns:
            Stamps [n], ascending, equal ones in the order of arrival; positions [n, n_joints].
        """
        with self._lock:
            newest = self._joints.newest
            if newest is None:
                return np.empty(0), np.empty((0, len(self.joint_names)))
            since_s = max(since_s, newest.stamp_s - JOINT_HISTORY_S)
            states = [state for state in self._joint_arrivals if state.stamp_s > since_s]
        states.sort(key=lambda state: state.stamp_s)
        stamps_s = np.array([state.stamp_s for state in states])
        positions = np.array([state.payload for state in states])
        return stamps_s, positions.reshape(len(states), len(self.joint_names))

    def problems(self, now_s: float) -> list[Problem]:
        """Why no observation can be made, and what is wrong with the images."""
        with self._lock:
            found = self._select(now_s)[1]
            for name, watch in self._watches.items():
                own = [_camera_problem(name, text) for text in watch.faults()]
                found += [problem for problem in own if problem not in found]
            return found

    def snapshot(self, now_s: float, within_s: float = math.inf) -> Snapshot:
        """Select the newest frames, the positions nearest to them, and the instruction.

        Leaves out an optional camera whose frame is too old or too far from the required ones.

        Args:
            now_s: reference for ages.
            within_s: the largest skew of frames of one trigger; above it more frames of the
                trigger are about to arrive.

        Raises:
            FrameSetIncomplete: only `within_s` is exceeded.
            NotReady: any other problem.
        """
        with self._lock:
            snapshot, problems = self._select(now_s)
            if snapshot is None:
                raise NotReady(problems)
            if snapshot.skew_s > within_s:
                raise FrameSetIncomplete(
                    [Problem("camera", f"frames are {snapshot.skew_s:.3f} s apart")]
                )
            for name, stamp_s in snapshot.frame_stamps_s.items():
                self._frames[name].mark_used(stamp_s)
            return snapshot

    def camera_statistics(self, now_s: float) -> dict[str, StreamStatistics]:
        with self._lock:
            return {name: stream.statistics(now_s) for name, stream in self._frames.items()}

    def joint_statistics(self, now_s: float) -> StreamStatistics:
        with self._lock:
            return self._joints.statistics(now_s)

    def observe(
        self, snapshot: Snapshot, decode_image: DecodeImage, to_policy: ToPolicy | None = None
    ) -> Observation:
        """Decode the images, check them, and convert the positions to the policy's units.

        Decodes all images even if one fails, since each camera's faults are tracked separately.
        Leaves out an optional camera whose images are unusable.

        Args:
            snapshot: of this buffer.
            decode_image: message → RGB uint8 [height, width, 3].
            to_policy: positions [n_joints] → state [state_dim]; None keeps them.

        Raises:
            DecodeError: `decode_image` raised an exception, or a required camera's images have had
                one colour for too long; names the camera.
        """
        images: dict[str, ImageArray] = {}
        failures: dict[str, Exception] = {}
        for name, message in snapshot.messages.items():
            try:
                images[name] = decode_image(message)
            except Exception as error:
                failures[name] = error
        unusable: dict[str, ImageFault] = {}
        with self._lock:
            for name, failure in failures.items():
                self._watches[name].record_undecodable(_reason(failure))
            for name, image in images.items():
                fault = self._watches[name].record_decoded(snapshot.frame_stamps_s[name], image)
                if fault is not None and fault.unusable:
                    unusable[name] = fault
                self._record_size(name, image)
        for name, failure in failures.items():
            raise DecodeError(f"camera {name!r}: {_reason(failure)}") from failure
        for camera in self.cameras:
            if camera.required and camera.name in unusable:
                raise DecodeError(f"camera {camera.name!r}: {unusable[camera.name].text}")
        used = {name: image for name, image in images.items() if name not in unusable}

        def state(positions: FloatArray) -> FloatArray:
            return positions.copy() if to_policy is None else to_policy(positions)

        past = []
        for earlier in snapshot.past:
            try:
                before = {name: decode_image(earlier.messages[name]) for name in used}
            except Exception as error:
                raise DecodeError(f"an earlier image: {_reason(error)}") from error
            then = Observation(
                before, state(earlier.positions), snapshot.instruction, earlier.stamp_s
            )
            past.append(then)
        return Observation(
            used, state(snapshot.positions), snapshot.instruction, snapshot.stamp_s, tuple(past)
        )

    def _record_size(self, camera: str, image: ImageArray) -> None:
        height, width = image.shape[:2]
        before = self._sizes.setdefault(camera, (width, height))
        if before != (width, height):
            self._sizes[camera] = (width, height)
            self._size_changes[camera] = (
                f"size changed from {before[0]} × {before[1]} to {width} × {height}; "
                "the policy sees another image than at the start"
            )

    @property
    def size_changes(self) -> dict[str, str]:
        """Camera → the last change of its images' size since `accept_sizes`."""
        with self._lock:
            return dict(self._size_changes)

    def accept_sizes(self) -> None:
        """Clear the size changes and the faults of decoded images; the next sizes are normal."""
        with self._lock:
            for watch in self._watches.values():
                watch.reset_decoded()
            self._sizes.clear()
            self._size_changes.clear()

    def clear(self) -> None:
        """Drop all frames and joint states; counts and the instruction stay."""
        with self._lock:
            for stream in (*self._frames.values(), self._joints):
                stream.clear()
            self._joint_arrivals.clear()
            self._watches = {name: ImageWatch(self.gates.images) for name in self._watches}

    def _select(self, now_s: float) -> tuple[Snapshot | None, list[Problem]]:
        chosen, problems = self._select_frames(now_s)
        joints_fault = self._joints.fault(now_s, self.gates.max_joint_age_s)
        if joints_fault:
            problems.append(_joint_problem(joints_fault))
        if self._instruction is None:
            problems.append(Problem("instruction", "instruction: none given"))
        if problems or self._instruction is None:
            return None, problems
        stamp_s = max(frame.stamp_s for frame in chosen.values())
        joints = self._joints.nearest(stamp_s)
        distance_s = abs(joints.stamp_s - stamp_s)
        if distance_s > self.gates.max_joint_age_s:
            return None, [
                _joint_problem(
                    f"the nearest are {distance_s:.3f} s from the images, "
                    f"limit {self.gates.max_joint_age_s:.3f} s"
                )
            ]
        past, problems = self._select_past(chosen, stamp_s, self._instruction)
        if problems:
            return None, problems
        return Snapshot(
            messages={name: frame.payload for name, frame in chosen.items()},
            frame_stamps_s={name: frame.stamp_s for name, frame in chosen.items()},
            positions=joints.payload,
            joints_stamp_s=joints.stamp_s,
            instruction=self._instruction,
            stamp_s=stamp_s,
            past=past,
        ), []

    def _select_past(
        self, cameras: Collection[str], stamp_s: float, instruction: str
    ) -> tuple[tuple[Snapshot, ...], list[Problem]]:
        """The earlier observations of one at `stamp_s`, oldest first, from the same cameras."""
        past = []
        limit_s = max(self.history.dt_s / 2, self.gates.max_skew_s)
        for step in range(self.history.steps, 0, -1):
            ago_s = step * self.history.dt_s
            then_s = stamp_s - ago_s
            frames: dict[str, Stamped[Any]] = {}
            for name in cameras:
                stream = self._frames[name]
                if not _reaches(stream, then_s + self.history.dt_s / 2):
                    return (), [_camera_problem(name, f"no frame of {ago_s:.2f} s ago {HISTORY}")]
                frames[name] = stream.nearest(then_s)
                off_s = abs(frames[name].stamp_s - then_s)
                if off_s > limit_s:
                    text = f"the frame nearest to {ago_s:.2f} s ago is {off_s:.3f} s off, limit "
                    return (), [_camera_problem(name, f"{text}{limit_s:.3f} s {HISTORY}")]
            if not _reaches(self._joints, then_s + self.history.dt_s / 2):
                return (), [_joint_problem(f"none of {ago_s:.2f} s ago {HISTORY}")]
            joints = self._joints.nearest(then_s)
            off_s = abs(joints.stamp_s - then_s)
            if off_s > self.gates.max_joint_age_s:
                text = f"the nearest to {ago_s:.2f} s ago are {off_s:.3f} s off"
                return (), [_joint_problem(f"{text} {HISTORY}")]
            past.append(
                Snapshot(
                    messages={name: frame.payload for name, frame in frames.items()},
                    frame_stamps_s={name: frame.stamp_s for name, frame in frames.items()},
                    positions=joints.payload,
                    joints_stamp_s=joints.stamp_s,
                    instruction=instruction,
                    stamp_s=then_s,
                )
            )
        return tuple(past), []

    def _select_frames(self, now_s: float) -> tuple[dict[str, Stamped[Any]], list[Problem]]:
        """The frames to use, in the cameras' order, and the problems."""
        problems: list[Problem] = []
        required: dict[str, Stamped[Any]] = {}
        optional: dict[str, Stamped[Any]] = {}
        for camera in self.cameras:
            stream = self._frames[camera.name]
            fault = stream.fault(now_s, self.gates.max_image_age_s)
            frozen = self._watches[camera.name].frozen()
            if fault is None and frozen is not None and frozen.unusable:
                fault = frozen.text
            if fault is None and stream.newest is not None:
                (required if camera.required else optional)[camera.name] = stream.newest
            elif camera.required:
                problems.append(_camera_problem(camera.name, fault))
        skew_s = _skew(required.values())
        if skew_s > self.gates.max_skew_s:
            oldest = min(required, key=lambda name: required[name].stamp_s)
            newest = max(required, key=lambda name: required[name].stamp_s)
            text = (
                f"cameras {oldest!r} and {newest!r}: frames are {skew_s:.3f} s apart, "
                f"limit {self.gates.max_skew_s:.3f} s"
            )
            problems.append(Problem("camera", text, names=(oldest, newest)))
        chosen = dict(required)
        for name, frame in sorted(optional.items(), key=lambda item: -item[1].stamp_s):
            if _skew([*chosen.values(), frame]) <= self.gates.max_skew_s:
                chosen[name] = frame
        if not chosen and not problems:
            problems.append(
                Problem("camera", "cameras: all are optional and none has a fresh frame")
            )
        return {c.name: chosen[c.name] for c in self.cameras if c.name in chosen}, problems


def _reaches(stream: Stream[Any], stamp_s: float) -> bool:
    """Whether the stream has an item of that time or before."""
    return stream.oldest is not None and stream.oldest.stamp_s <= stamp_s


def _camera_problem(camera: str, text: str | None) -> Problem:
    return Problem("camera", f"camera {camera!r}: {text}", names=(camera,))


def _joint_problem(text: str | None) -> Problem:
    return Problem("joints", f"joint positions: {text}")


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__


def _skew(frames: Iterable[Stamped[Any]]) -> float:
    stamps_s = [frame.stamp_s for frame in frames]
    return max(stamps_s) - min(stamps_s) if stamps_s else 0.0


def _check_stamp(stamp_s: float, label: str) -> None:
    if not math.isfinite(stamp_s):
        raise ValueError(f"{label}: stamp {stamp_s} is not finite")
