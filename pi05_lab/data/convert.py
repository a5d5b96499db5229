"""Recorded bags become episodes of a LeRobot data set, through the policy node's own rules.

Images, joint states and instructions pass the node's decoding, buffer and gates; state and action
are sampled on a regular grid in the policy's units. A bag is read twice: once for its numbers,
which decide on the frames, and once for the images of those frames. Neither pass keeps images.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np

from pi05_lab.data.bags import Bag, BagError, Notes
from pi05_lab.data.lerobot_format import DatasetError, Features, camera_name, is_image
from pi05_lab.data.lerobot_writer import DatasetWriter, read_journal
from pi05_lab.data.recording import BagRecording, CameraImage, Command, Event, Instruction, Joints
from pi05_lab.data.reference import ReferenceTrajectory
from pi05_lab.data.topics import EvaluatedRobot
from pi05_lab.files import partial_folder
from pi05_ros.observation.buffer import CameraStream, NotReady, ObservationBuffer
from pi05_ros.observation.decode import DecodeError
from pi05_ros.observation.instruction import InstructionError
from pi05_ros.types import FloatArray, ImageArray

LAG_S = 0.5
"""Messages are awaited this long after a frame's time: they arrive late and out of order."""
PAUSE_S = 5.0
"""A longer silence of all topics is skipped."""
MIN_EPISODE_S = 1.0
IDLE_PER_S = 0.02
"""Speed below which a joint is idle, in the policy's units (rad for most) per second."""
IDLE_MARGIN_S = 0.3
"""What `trim` leaves of an idle beginning and end."""


@dataclass(frozen=True)
class ConvertConfig:
    """Options of a conversion."""

    fps: int
    measured_actions: bool = False
    """The action is the measured position one frame later, instead of the command."""
    by_bag: bool = False
    """An episode lasts until the bag's end, not until the instruction changes."""
    trim: bool = False
    """Leave out the idle beginning and end of each episode."""
    instruction: str | None = None
    """Replaces the recorded ones."""
    size: tuple[int, int] | None = None
    """Width and height in pixels that images are scaled to; None keeps them."""


class Frame(NamedTuple):
    """One frame of an episode."""

    images: Mapping[str, ImageArray]
    """Camera → RGB uint8 [height, width, 3]."""
    state: FloatArray
    """[n_joints] in the policy's units."""
    action: FloatArray
    """[n_joints] likewise."""
    task: str


@dataclass(frozen=True)
class _Numbers:
    """The numbers of all frames of the grid, in the policy's units."""

    states: FloatArray
    """[n, n_joints]"""
    actions: FloatArray
    """[n, n_joints]"""
    tasks: list[str]
    """Empty where no frame can be made."""


class BagConverter:
    """Makes the frames of one bag.

    Args:
        bag: to read.
        robot: topics, joints and gates of the params file.
        config: options.
        notes: receives what is missing or dropped, with counts.

    Raises:
        BagError: the bag has no messages.
    """

    def __init__(
        self, bag: Bag, robot: EvaluatedRobot, config: ConvertConfig, notes: Notes
    ) -> None:
        self._bag, self._robot, self._config, self._notes = bag, robot, config, notes
        self.cameras = [
            camera.name
            for camera in robot.cameras
            if camera.required or any(bag.topics.get(t) == k for t, k in camera.topics.items())
        ]
        """A data set has all of its cameras in every frame, also those that are optional."""

    def frames(self) -> Iterator[Frame | None]:
        """The frames in order; None ends an episode.

        Raises:
            BagError: a required topic is missing, or nothing can be read.
        """
        numbers = self._read_numbers()
        spans = self._spans(numbers)
        ends = {last for _, last in spans}
        images = self._read_images({k for first, last in spans for k in range(first, last)})
        written = False
        for k, shown in images:
            if shown is not None:
                yield Frame(shown, numbers.states[k], numbers.actions[k], numbers.tasks[k])
                written = True
            # a damaged image splits an episode: its frames must be consecutive
            if written and (shown is None or k + 1 in ends):
                yield None
                written = False

    def _times(
        self, recording: BagRecording, buffer: ObservationBuffer, reference: ReferenceTrajectory
    ) -> Iterator[float]:
        """The grid's times, on the clock of the stamps.

        At each of them the buffer has what is stamped until then, and the reference what was
        received until `LAG_S` later.
        """
        waiting: list[tuple[float, int, Event]] = []
        step_s = 1.0 / self._config.fps
        next_s, latest_s = math.inf, -math.inf

        def due(until_s: float) -> Iterator[float]:
            nonlocal next_s
            if until_s - next_s > PAUSE_S:
                recording.notes.add(f"nothing was recorded for {until_s - next_s:.1f} s")
                next_s = until_s
            while next_s <= until_s:
                while waiting and waiting[0][0] <= next_s + 1e-9:
                    self._put(buffer, heapq.heappop(waiting)[2], recording.notes)
                yield next_s
                next_s += step_s

        for number, event in enumerate(recording.events()):
            received_s = event.time_ns * 1e-9
            yield from due(received_s - LAG_S)
            if isinstance(event, Command):
                if not self._config.measured_actions:
                    reference.put_command(event)
                continue
            if isinstance(event, Joints):
                reference.put_joints(event.stamp_s, event.positions)
            stamp_s = received_s if isinstance(event, Instruction) else event.stamp_s
            heapq.heappush(waiting, (stamp_s, number, event))
            if not isinstance(event, Instruction):
                next_s = stamp_s if next_s == math.inf else next_s
                latest_s = max(latest_s, stamp_s)
        yield from due(latest_s)

    def _put(self, buffer: ObservationBuffer, event: Event, notes: Notes) -> None:
        if isinstance(event, Joints):
            buffer.put_joints(event.stamp_s, event.positions)
        elif isinstance(event, CameraImage) and event.camera in self.cameras:
            buffer.put_image(event.camera, event.stamp_s, event.payload)
        elif isinstance(event, Instruction):
            try:
                buffer.set_instruction(event.text)
            except InstructionError as error:
                notes.add(f"instruction refused: {error}")

    def _open(self, bag: Bag, notes: Notes) -> tuple[BagRecording, ObservationBuffer]:
        config = self._robot.config
        recording = BagRecording(bag.path.name, bag, self._robot, notes, self._config.instruction)
        streams = [CameraStream(name) for name in self.cameras]
        return recording, ObservationBuffer(streams, config.joints.names, config.gates)

    def _read_numbers(self) -> _Numbers:
        """First pass: which frames can be made, and their states and actions."""
        joints, measured = self._robot.config.joints, self._config.measured_actions
        recording, buffer = self._open(self._bag, self._notes)
        reference = ReferenceTrajectory(len(joints), [] if measured else recording.commanded())
        ahead_s = 1.0 / self._config.fps if measured else 0.0
        rows: list[tuple[FloatArray, FloatArray]] = []
        tasks: list[str] = []
        for now_s in self._times(recording, buffer, reference):
            problems: list[str] = []
            try:
                buffer.snapshot(now_s)
            except NotReady as error:
                problems = [str(problem) for problem in error.problems]
            state, known = reference.measured.at(np.array([now_s]))
            action, covered = reference.at(np.array([now_s + ahead_s]), now_s + LAG_S)
            if not problems and not known[0]:
                problems = ["joint states: a gap"]
            if not problems and not covered[0]:
                problems = ["measured positions: the last one" if measured else "no commands yet"]
            for problem in problems:
                self._notes.add(f"frames dropped: {problem}")
            values = (state[0], action[0]) if not problems else np.zeros((2, len(joints)))
            rows.append((joints.to_policy(values[0]), joints.to_policy(values[1])))
            tasks.append("" if problems else buffer.instruction or "")
            reference.trim(now_s - 1.0)
        if not rows:
            raise BagError(f"{self._bag.path}: no images and no joint states")
        states, actions = zip(*rows, strict=True)
        return _Numbers(np.array(states), np.array(actions), tasks)

    def _spans(self, numbers: _Numbers) -> list[tuple[int, int]]:
        """First frame and end of each episode."""
        tasks = numbers.tasks
        marks = [bool(task) for task in tasks] if self._config.by_bag else tasks
        begins = [k for k in range(len(tasks)) if k == 0 or marks[k] != marks[k - 1]]
        spans = []
        for first, last in zip(begins, [*begins[1:], len(tasks)], strict=True):
            if not tasks[first]:
                continue
            if self._config.trim:
                begin, end = self._trimmed(numbers.actions, first, last)
                self._drop("idle beginning or end", (last - first) - (end - begin))
                first, last = begin, end
            if last - first < MIN_EPISODE_S * self._config.fps:
                self._drop(f"an episode shorter than {MIN_EPISODE_S:g} s", last - first)
            else:
                spans.append((first, last))
        return spans

    def _trimmed(self, actions: FloatArray, first: int, last: int) -> tuple[int, int]:
        fps = self._config.fps
        speed = np.abs(np.diff(actions[first:last], axis=0)).max(axis=1, initial=0.0) * fps
        moving = np.flatnonzero(speed > IDLE_PER_S)
        if not len(moving):
            return first, first
        margin = round(IDLE_MARGIN_S * fps)
        begin, end = first + int(moving[0]) - margin, first + int(moving[-1]) + 2 + margin
        return max(first, begin), min(last, end)

    def _drop(self, why: str, count: int) -> None:
        if count:
            self._notes.add(f"frames dropped: {why}", count=count)

    def _read_images(self, wanted: set[int]) -> Iterator[tuple[int, dict[str, ImageArray] | None]]:
        """Second pass: the images of these frames, in order; None where one cannot be decoded."""
        # the first pass has noted everything but damaged images
        recording, buffer = self._open(Bag(self._bag.path, Notes()), Notes())
        reference = ReferenceTrajectory(len(self._robot.config.joints), [])
        decoded: dict[int, tuple[Any, ImageArray]] = {}

        def decode(payload: Any) -> ImageArray:
            if id(payload) not in decoded:
                decoded[id(payload)] = payload, self._scaled(recording.decode(payload))
            return decoded[id(payload)][1]

        for k, now_s in enumerate(self._times(recording, buffer, reference)):
            reference.trim(now_s - 1.0)
            if k not in wanted:
                continue
            snapshot = buffer.snapshot(now_s)
            shown = {id(payload) for payload in snapshot.messages.values()}
            decoded = {key: entry for key, entry in decoded.items() if key in shown}
            try:
                yield k, dict(buffer.observe(snapshot, decode).images)
            except DecodeError as error:
                self._notes.add(f"frames dropped: {error}")
                yield k, None

    def _scaled(self, image: ImageArray) -> ImageArray:
        if self._config.size is None or image.shape[1::-1] == self._config.size:
            return image
        scaled = cv2.resize(image, self._config.size, interpolation=cv2.INTER_AREA)
        return np.asarray(scaled, dtype=np.uint8)


def convert_bags(
    bags: Sequence[Path],
    output: Path,
    robot: EvaluatedRobot,
    config: ConvertConfig,
    video: bool,
    report: Callable[[Path, str, Notes], None],
) -> int:
    """Convert bags into a new LeRobot data set.

    A bag that cannot be used is reported and left out. After an exception, or if the process is
    killed, the bags that are complete stay in the unfinished folder; the next call continues.

    Args:
        bags: in the order of their episodes.
        output: folder to make.
        robot: of the params file.
        config: options.
        video: H.264 video instead of PNG images.
        report: called after each bag with its path, what became of it, and its notes.

    Returns:
        The number of bags that were left out.

    Raises:
        DatasetError: no bag has an episode, or the unfinished folder is of other options.
        FileExistsError: `output` exists.
    """
    if output.exists():
        raise FileExistsError(f"output folder exists: {output}. Remove it or name another one")
    labels = {str(bag.resolve()): bag for bag in bags}
    sizes = _unfinished_sizes(partial_folder(output), labels)
    joints = robot.config.joints.names
    left_out = 0
    with ExitStack() as stack:

        def open_writer(sizes: Mapping[str, tuple[int, int]]) -> DatasetWriter:
            features = Features(sizes, joints, joints, use_video=video)
            return stack.enter_context(
                DatasetWriter(output, config.fps, features, robot.robot, resume=True)
            )

        writer = open_writer(sizes) if sizes else None
        for label, bag in labels.items():
            if writer is not None and label in writer.committed:
                report(bag, "converted before", Notes())
                continue
            notes = Notes()
            try:
                frames = BagConverter(Bag(bag, notes), robot, config, notes).frames()
                first = next(frames, None)
                if first is None:
                    raise BagError("no frame can be made")
                if writer is None:
                    writer = open_writer({c: image.shape[:2] for c, image in first.images.items()})
                before = writer.frames
                _write(writer, chain([first], frames))
            except (BagError, DatasetError) as error:
                if writer is not None:
                    writer.rollback()
                left_out += 1
                report(bag, f"left out: {error}", notes)
                continue
            report(bag, f"{writer.frames - before} frames", notes)
            writer.commit(label)
        if writer is None:
            raise DatasetError("no bag has an episode: nothing was written")
    return left_out


def _write(writer: DatasetWriter, frames: Iterator[Frame | None]) -> None:
    last: Mapping[str, ImageArray] = {}
    for frame in frames:
        if frame is None:
            writer.end_episode()
            last = {}
            continue
        same = last and all(last[c] is image for c, image in frame.images.items())
        writer.add_frame(None if same else frame.images, frame.state, frame.action, frame.task)
        last = frame.images


def _unfinished_sizes(folder: Path, labels: Mapping[str, Path]) -> dict[str, tuple[int, int]]:
    """Camera → image size of an unfinished conversion of these bags; empty if there is none."""
    journal = read_journal(folder)
    if journal is None:
        return {}
    others = sorted(set(journal["committed"]) - set(labels))
    if others:
        raise DatasetError(
            f"{folder} is of an unfinished conversion with other bags, such as {others[0]}: give "
            "them too, or remove it"
        )
    return {
        camera_name(key): (feature["shape"][0], feature["shape"][1])
        for key, feature in journal["settings"]["features"].items()
        if is_image(feature)
    }
