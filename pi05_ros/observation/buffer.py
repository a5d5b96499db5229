"""What the robot saw last: newest frame per camera, recent joint positions, the instruction.

Callbacks put, the control side asks whether an observation can be made, and nothing is decoded
until the executor wants the picture. All stamps and every `now_s` are seconds on one clock, the
clock of the message stamps; the buffer has none of its own.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pi05_ros.observation.decode import DecodeError
from pi05_ros.observation.image_watch import ImageRules, ImageWatch, same_bytes
from pi05_ros.observation.instruction import checked_instruction
from pi05_ros.observation.stream import CLOCK_JUMP_S, Stamped, Stream, StreamStatistics
from pi05_ros.types import FloatArray, ImageArray, Observation

JOINT_HISTORY_S = 1.0
MAX_JOINT_HISTORY = 2000
"""Joint states kept at most: 1 s of two publishers at 1000 Hz."""


class NotReady(RuntimeError):
    """No observation can be made; `problems` has one line per stream that prevents it."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = tuple(problems)


class RoundIncomplete(NotReady):
    """The newest frames are farther apart than was asked for."""


@dataclass(frozen=True)
class CameraStream:
    """A camera that the policy looks through; without a required one there is no observation."""

    name: str
    required: bool = True


@dataclass(frozen=True)
class Gates:
    """How old and how far apart the parts of one observation may be."""

    max_image_age_s: float = 0.2
    max_skew_s: float = 0.05
    """Between the used frames. Below the slowest camera's period it rejects sound pictures."""
    max_joint_age_s: float = 0.1
    """Of the newest joint positions, and between the used ones and the pictures."""
    max_instruction_chars: int = 500
    images: ImageRules = field(default_factory=ImageRules)
    """Which images are taken for a camera's fault; all are accepted without rules."""

    def __post_init__(self) -> None:
        for name in ("max_image_age_s", "max_skew_s", "max_joint_age_s"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be a finite number of seconds above 0, got {value}")
        if self.max_instruction_chars < 1:
            raise ValueError(
                f"max_instruction_chars must be at least 1, got {self.max_instruction_chars}"
            )


@dataclass(frozen=True)
class Snapshot:
    """The undecoded parts of one observation."""

    messages: Mapping[str, Any]
    """Camera name → message as it was put, in the order of the cameras."""
    frame_stamps_s: Mapping[str, float]
    positions: FloatArray
    """[n_joints] as on the topic."""
    joints_stamp_s: float
    instruction: str
    stamp_s: float
    """Stamp of the newest used frame: the positions are those nearest to it, and a chunk that
    counts from it wastes the fewest of its first steps on the past."""

    @property
    def skew_s(self) -> float:
        """Between the oldest and the newest used frame."""
        return max(self.frame_stamps_s.values()) - min(self.frame_stamps_s.values())

    def decode(
        self,
        decode_image: Callable[[Any], ImageArray],
        to_policy: Callable[[FloatArray], FloatArray] | None = None,
    ) -> Observation:
        """Decode the pictures and convert the positions to the policy's units.

        Args:
            decode_image: Message as it was put → RGB uint8 [height, width, 3].
            to_policy: Positions [n_joints] → state [state_dim]; left as they are without it.

        Raises:
            DecodeError: If `decode_image` raises anything, naming the camera.
        """
        images, failures = self._decode_images(decode_image)
        for name, error in failures.items():
            raise _undecodable(name, error) from error
        return self._observation(images, to_policy)

    def _decode_images(
        self, decode_image: Callable[[Any], ImageArray]
    ) -> tuple[dict[str, ImageArray], dict[str, Exception]]:
        """The images, and what was raised, by camera."""
        images: dict[str, ImageArray] = {}
        failures: dict[str, Exception] = {}
        for name, message in self.messages.items():
            try:
                images[name] = decode_image(message)
            except Exception as error:
                failures[name] = error
        return images, failures

    def _observation(
        self,
        images: Mapping[str, ImageArray],
        to_policy: Callable[[FloatArray], FloatArray] | None,
    ) -> Observation:
        state = self.positions.copy() if to_policy is None else to_policy(self.positions)
        return Observation(images, state, self.instruction, self.stamp_s)


class ObservationBuffer:
    """Collects streams from any thread and hands out what one inference needs."""

    def __init__(
        self, cameras: Sequence[CameraStream], joint_names: Sequence[str], gates: Gates
    ) -> None:
        names = [camera.name for camera in cameras]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"camera names must be given once each, got {names}")
        if not joint_names or len(set(joint_names)) != len(joint_names):
            raise ValueError(f"joint names must be given once each, got {list(joint_names)}")
        self.cameras = tuple(cameras)
        self.joint_names = tuple(joint_names)
        self.gates = gates
        self._lock = threading.Lock()
        self._frames: dict[str, Stream[Any]] = {name: Stream(history_s=0.0) for name in names}
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
        """Keep `message`, unopened, as the newest frame of `camera`.

        `content` is the message as bytes without its stamp, which tell whether the image repeats;
        nothing is looked at without it.

        A stamp not later than the newest one is counted and not kept, unless it is more than 1 s
        earlier: then the clock jumped back, and the stream starts over.

        Raises:
            ValueError: For a camera that is not one of ours or a stamp that is not finite.
        """
        stream = self._frames.get(camera)
        if stream is None:
            raise ValueError(f"camera {camera!r} is not one of {list(self._frames)}")
        stamp_s = _finite_stamp(stamp_s, f"camera {camera!r}")
        watch = self._watches[camera]
        watched = content is not None and self.gates.images.frozen_after_s > 0
        # outside of the lock, which the control thread waits for
        same = watched and same_bytes(content, watch.content)
        with self._lock:
            if stream.put(stamp_s, message) and watched:
                watch.arrived(stamp_s, content, same)
            self._arrived_s = time.monotonic()

    def put_joints(self, stamp_s: float, positions: FloatArray) -> None:
        """Keep a copy of `positions` [n_joints], in the order of `joint_names`, for 1 s.

        Raises:
            ValueError: For another shape, or a position or stamp that is not finite.
        """
        stamp_s = _finite_stamp(stamp_s, "joint positions")
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
        """Take what the robot is asked to do, without surrounding blanks, and return it.

        Raises:
            InstructionError: If it is not text, empty, too long or has control characters; the
                instruction before stays.
        """
        text = checked_instruction(text, self.gates.max_instruction_chars)
        with self._lock:
            self._instruction = text
        return text

    @property
    def arrived_s(self) -> float:
        """When the last frame came, by time.monotonic; -inf before the first."""
        with self._lock:
            return self._arrived_s

    def clear_instruction(self) -> None:
        with self._lock:
            self._instruction = None

    @property
    def instruction(self) -> str | None:
        with self._lock:
            return self._instruction

    def positions(self, now_s: float) -> FloatArray:
        """The newest positions [n_joints], to begin a motion at.

        Raises:
            NotReady: If there are none that are fresh.
        """
        with self._lock:
            fault = self._joints.fault(now_s, self.gates.max_joint_age_s)
            if fault or self._joints.newest is None:
                raise NotReady([f"joint positions: {fault}"])
            return self._joints.newest.payload.copy()

    def newest_joints(self) -> tuple[float, FloatArray] | None:
        """Stamp and positions [n_joints] of the newest joint state, of any age."""
        with self._lock:
            newest = self._joints.newest
            return None if newest is None else (newest.stamp_s, newest.payload)

    def joint_history(self, since_s: float) -> tuple[FloatArray, FloatArray]:
        """Joint states stamped after `since_s`, at most those of the last second.

        Joint states that came too late or repeat a stamp are included: a second publisher whose
        clock is behind shows in them.

        Returns:
            Stamps [n] in increasing order, equal ones in the order of arrival, and positions
            [n, n_joints].
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

    def problems(self, now_s: float) -> list[str]:
        """Why no observation can be made, and what is wrong with the images, one line each."""
        with self._lock:
            found = self._select(now_s)[1]
            for name, watch in self._watches.items():
                lines = [f"camera {name!r}: {text}" for text in watch.faults()]
                found += [line for line in lines if line not in found]
            return found

    def snapshot(self, now_s: float, within_s: float = math.inf) -> Snapshot:
        """Choose the newest frames, the positions nearest to them and the instruction.

        An optional camera without a fresh frame, or with one too far from the required cameras'
        frames, is left out.

        Args:
            now_s: The time that ages are counted to.
            within_s: Frames farther apart than this are not of one round: the rest of it is about
                to come.

        Raises:
            NotReady: With the problems, if there are any.
            RoundIncomplete: If `within_s` alone is not kept.
        """
        with self._lock:
            snapshot, problems = self._select(now_s)
            if snapshot is None:
                raise NotReady(problems)
            if snapshot.skew_s > within_s:
                raise RoundIncomplete([f"frames are {snapshot.skew_s:.3f} s apart"])
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
        self,
        snapshot: Snapshot,
        decode_image: Callable[[Any], ImageArray],
        to_policy: Callable[[FloatArray], FloatArray] | None = None,
    ) -> Observation:
        """`snapshot.decode`, and note what the images look like.

        All images are decoded, so that each camera's faults come and go with its own. An optional
        camera whose images are unusable is left out.

        Raises:
            DecodeError: If `decode_image` raises anything, or a required camera's images are of
                one colour for too long, naming the camera.
        """
        images, failures = snapshot._decode_images(decode_image)
        with self._lock:
            for name, error in failures.items():
                self._watches[name].undecodable(_reason(error))
            unusable = {}
            for name, image in images.items():
                fault = self._watches[name].decoded(snapshot.frame_stamps_s[name], image)
                if fault is not None and fault.unusable:
                    unusable[name] = fault
        self.note_sizes(images)
        for name, error in failures.items():
            raise _undecodable(name, error) from error
        for camera in self.cameras:
            if camera.required and camera.name in unusable:
                raise DecodeError(f"camera {camera.name!r}: {unusable[camera.name].text}")
        used = {name: image for name, image in images.items() if name not in unusable}
        return snapshot._observation(used, to_policy)

    def note_sizes(self, images: Mapping[str, ImageArray]) -> None:
        """Remember how large the decoded pictures are, and whether that changed in mid-stream."""
        with self._lock:
            for name, image in images.items():
                height, width = image.shape[:2]
                before = self._sizes.setdefault(name, (width, height))
                if before != (width, height):
                    self._sizes[name] = (width, height)
                    self._size_changes[name] = (
                        f"size changed from {before[0]} × {before[1]} to {width} × {height}; "
                        "the policy sees another picture than at the start"
                    )

    @property
    def size_changes(self) -> dict[str, str]:
        """Camera → the last change of its pictures' size since `accept_sizes`."""
        with self._lock:
            return dict(self._size_changes)

    def accept_sizes(self) -> None:
        """Take the next images' sizes as the usual ones and clear the changes."""
        with self._lock:
            for watch in self._watches.values():
                watch.forget_decoded()
            self._sizes.clear()
            self._size_changes.clear()

    def clear(self) -> None:
        """Forget all frames and positions, as after a jump of the clock; counts and text stay."""
        with self._lock:
            for stream in (*self._frames.values(), self._joints):
                stream.clear()
            self._joint_arrivals.clear()
            self._watches = {name: ImageWatch(self.gates.images) for name in self._watches}

    def _select(self, now_s: float) -> tuple[Snapshot | None, list[str]]:
        chosen, problems = self._select_frames(now_s)
        joints_fault = self._joints.fault(now_s, self.gates.max_joint_age_s)
        if joints_fault:
            problems.append(f"joint positions: {joints_fault}")
        if self._instruction is None:
            problems.append("instruction: none given")
        if problems or self._instruction is None:
            return None, problems
        stamp_s = max(frame.stamp_s for frame in chosen.values())
        joints = self._joints.nearest(stamp_s)
        distance_s = abs(joints.stamp_s - stamp_s)
        if distance_s > self.gates.max_joint_age_s:
            return None, [
                f"joint positions: the nearest are {distance_s:.3f} s from the pictures, "
                f"limit {self.gates.max_joint_age_s:.3f} s"
            ]
        snapshot = Snapshot(
            messages={name: frame.payload for name, frame in chosen.items()},
            frame_stamps_s={name: frame.stamp_s for name, frame in chosen.items()},
            positions=joints.payload,
            joints_stamp_s=joints.stamp_s,
            instruction=self._instruction,
            stamp_s=stamp_s,
        )
        return snapshot, []

    def _select_frames(self, now_s: float) -> tuple[dict[str, Stamped[Any]], list[str]]:
        """The frames to use, in the cameras' order, and what speaks against using them."""
        problems: list[str] = []
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
                problems.append(f"camera {camera.name!r}: {fault}")
        skew_s = _skew(required.values())
        if skew_s > self.gates.max_skew_s:
            oldest = min(required, key=lambda name: required[name].stamp_s)
            newest = max(required, key=lambda name: required[name].stamp_s)
            problems.append(
                f"cameras {oldest!r} and {newest!r}: frames are {skew_s:.3f} s apart, "
                f"limit {self.gates.max_skew_s:.3f} s"
            )
        chosen = dict(required)
        for name, frame in sorted(optional.items(), key=lambda item: -item[1].stamp_s):
            if _skew([*chosen.values(), frame]) <= self.gates.max_skew_s:
                chosen[name] = frame
        if not chosen and not problems:
            problems.append("cameras: all are optional and none has a fresh frame")
        return {c.name: chosen[c.name] for c in self.cameras if c.name in chosen}, problems


def _undecodable(camera: str, error: Exception) -> DecodeError:
    return DecodeError(f"camera {camera!r}: {_reason(error)}")


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__


def _skew(frames: Iterable[Stamped[Any]]) -> float:
    stamps_s = [frame.stamp_s for frame in frames]
    return max(stamps_s) - min(stamps_s) if stamps_s else 0.0


def _finite_stamp(stamp_s: float, label: str) -> float:
    stamp_s = float(stamp_s)
    if not math.isfinite(stamp_s):
        raise ValueError(f"{label}: stamp {stamp_s} is not a time")
    return stamp_s
