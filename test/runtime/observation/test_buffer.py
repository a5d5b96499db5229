"""Faults pinned: a frame older than the limit or from a clock that jumped, cameras apart, positions
far from the frames, a bad instruction that replaces a good one, a loss that is not counted."""

from __future__ import annotations

import math
import threading
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pi05_ros.observation.buffer import CameraStream, Gates, NotReady, ObservationBuffer
from pi05_ros.observation.decode import DecodeError
from pi05_ros.observation.instruction import InstructionError

JOINTS = ("waist", "shoulder")
NOW_S = 100.0


def make_buffer(*, wrist_required: bool = True, gates: Gates | None = None) -> ObservationBuffer:
    cameras = [CameraStream("high"), CameraStream("wrist", required=wrist_required)]
    return ObservationBuffer(cameras, JOINTS, gates or Gates())


def texts(buffer: ObservationBuffer) -> list[str]:
    return [problem.text for problem in buffer.problems(NOW_S)]


def filled(
    high_s: float | None = NOW_S - 0.02,
    wrist_s: float | None = NOW_S - 0.01,
    joints_s: float | None = NOW_S,
    **options: Any,
) -> ObservationBuffer:
    """A buffer with one frame per camera, one joint state and an instruction."""
    buffer = make_buffer(**options)
    buffer.set_instruction("lift the cube")
    for camera, stamp_s in (("high", high_s), ("wrist", wrist_s)):
        if stamp_s is not None:
            buffer.put_image(camera, stamp_s, f"{camera} {stamp_s}")
    if joints_s is not None:
        buffer.put_joints(joints_s, np.array([1.0, 2.0]))
    return buffer


def image_of(message: Any) -> np.ndarray:
    return np.full((2, 3, 3), len(str(message)), np.uint8)


def test_frames_of_two_triggers_are_not_combined_within_a_skew_limit() -> None:
    """Fault: an inference on one camera's new frame and the other's last one, 33 ms before."""
    buffer = filled(high_s=NOW_S - 0.040, wrist_s=NOW_S - 0.007)
    with pytest.raises(NotReady, match=r"0\.033 s apart"):
        buffer.snapshot(NOW_S, within_s=0.01)
    assert buffer.camera_statistics(NOW_S)["high"].used == 0
    buffer.put_image("high", NOW_S - 0.008, "of this trigger")
    assert buffer.snapshot(NOW_S, within_s=0.01).messages["high"] == "of this trigger"


def test_the_arrival_of_the_last_frame_is_recorded() -> None:
    buffer = make_buffer()
    assert buffer.arrived_s == -math.inf
    before_s = time.monotonic()
    buffer.put_image("high", NOW_S, "frame")
    assert before_s <= buffer.arrived_s <= time.monotonic()


def test_snapshot_has_the_newest_frames_and_the_newest_frames_stamp() -> None:
    buffer = filled()
    buffer.put_image("high", NOW_S - 0.005, "newer")
    snapshot = buffer.snapshot(NOW_S)
    assert dict(snapshot.messages) == {"high": "newer", "wrist": "wrist 99.99"}
    assert snapshot.stamp_s == NOW_S - 0.005
    assert snapshot.skew_s == pytest.approx(0.005)
    assert snapshot.instruction == "lift the cube"
    assert buffer.camera_names == ("high", "wrist")


def test_snapshot_decodes_into_an_observation() -> None:
    buffer = filled()
    snapshot = buffer.snapshot(NOW_S)
    observation = buffer.observe(snapshot, image_of, lambda positions: positions * 10)
    assert list(observation.images) == ["high", "wrist"]
    assert observation.images["wrist"][0, 0, 0] == len("wrist 99.99")
    assert observation.state.tolist() == [10.0, 20.0]
    assert observation.stamp_s == NOW_S - 0.01
    state = buffer.observe(snapshot, image_of).state
    state[0] = 5.0
    assert buffer.observe(snapshot, image_of).state.tolist() == [1.0, 2.0]


def test_an_image_that_cannot_be_decoded_names_its_camera() -> None:
    def fail(message: Any) -> np.ndarray:
        if message.startswith("wrist"):
            raise DecodeError("width: 0")
        return image_of(message)

    buffer = filled()
    with pytest.raises(DecodeError, match=r"camera 'wrist': width: 0") as error:
        buffer.observe(buffer.snapshot(NOW_S), fail)
    assert isinstance(error.value.__cause__, DecodeError)


@pytest.mark.parametrize(
    ("stamps", "problem"),
    [
        ({"high_s": None}, "camera 'high': nothing received"),
        ({"wrist_s": NOW_S - 0.21}, "camera 'wrist': newest is 0.210 s old, limit 0.200 s"),
        ({"wrist_s": NOW_S + 0.25}, "camera 'wrist': stamp is 0.250 s in the future"),
        ({"wrist_s": 0.0}, "camera 'wrist': stamps are 0, the driver must fill header.stamp"),
        ({"high_s": NOW_S - 0.07}, "cameras 'high' and 'wrist': frames are 0.060 s apart"),
        ({"joints_s": None}, "joint positions: nothing received"),
        ({"joints_s": NOW_S - 0.11}, "joint positions: newest is 0.110 s old, limit 0.100 s"),
        (
            {"high_s": NOW_S - 0.18, "wrist_s": NOW_S - 0.17},
            "joint positions: the nearest are 0.170 s from the images, limit 0.100 s",
        ),
    ],
)
def test_each_gate_blocks_alone_and_names_stream_and_limit(
    stamps: dict[str, float | None], problem: str
) -> None:
    buffer = filled(**stamps)  # type: ignore[arg-type]
    problems = buffer.problems(NOW_S)
    assert len(problems) == 1 and problems[0].text.startswith(problem)
    with pytest.raises(NotReady) as error:
        buffer.snapshot(NOW_S)
    assert error.value.problems == tuple(problems)


def test_all_problems_are_reported_at_once() -> None:
    assert texts(make_buffer()) == [
        "camera 'high': nothing received",
        "camera 'wrist': nothing received",
        "joint positions: nothing received",
        "instruction: none given",
    ]


@pytest.mark.parametrize("wrist_s", [None, NOW_S - 1.0, NOW_S + 1.0, NOW_S - 0.15, 0.0])
def test_an_optional_camera_without_fresh_frames_is_left_out(wrist_s: float | None) -> None:
    buffer = filled(wrist_s=wrist_s, wrist_required=False)
    assert texts(buffer) == []
    snapshot = buffer.snapshot(NOW_S)
    assert list(snapshot.messages) == ["high"]
    assert snapshot.stamp_s == NOW_S - 0.02


def test_an_optional_camera_that_is_fresh_is_used() -> None:
    assert list(filled(wrist_required=False).snapshot(NOW_S).messages) == ["high", "wrist"]


def test_without_any_frame_optional_cameras_block_too() -> None:
    buffer = ObservationBuffer([CameraStream("high", required=False)], JOINTS, Gates())
    buffer.set_instruction("lift")
    buffer.put_joints(NOW_S, np.zeros(2))
    assert texts(buffer) == ["cameras: all are optional and none has a fresh frame"]


def test_positions_are_those_nearest_to_the_images() -> None:
    buffer = filled(joints_s=None)
    for i in range(20):
        buffer.put_joints(NOW_S - 0.1 + 0.005 * i, np.array([i, 0.0]))
    assert buffer.snapshot(NOW_S).positions[0] == 18  # at NOW_S - 0.01
    assert buffer.positions(NOW_S)[0] == 19


def test_positions_are_copied_and_checked() -> None:
    buffer = filled(joints_s=None)
    with pytest.raises(NotReady, match="joint positions: nothing received"):
        buffer.positions(NOW_S)
    positions = np.array([1.0, 2.0])
    buffer.put_joints(NOW_S, positions)
    positions[0] = 9.0
    assert buffer.positions(NOW_S).tolist() == [1.0, 2.0]
    with pytest.raises(ValueError, match="joint 'shoulder' is not finite"):
        buffer.put_joints(NOW_S, np.array([0.0, math.nan]))
    with pytest.raises(ValueError, match="expected 2 positions"):
        buffer.put_joints(NOW_S, np.zeros(3))
    with pytest.raises(ValueError, match="stamp nan"):
        buffer.put_joints(math.nan, np.zeros(2))


def test_a_motion_never_begins_at_old_positions() -> None:
    with pytest.raises(NotReady, match=r"newest is 0\.200 s old"):
        filled(joints_s=NOW_S - 0.2).positions(NOW_S)


def test_a_changed_image_size_is_reported_until_it_is_accepted() -> None:
    """Pins: a camera driver that restarts with another resolution without a warning."""
    small, large = np.zeros((2, 3, 3), np.uint8), np.zeros((4, 6, 3), np.uint8)
    buffer = filled(None, None)
    for i, (high, wrist, changed) in enumerate(
        [(small, large, set()), (small, large, set()), (large, large, {"high"})]
    ):
        buffer.put_image("high", NOW_S + 0.001 * i, high)
        buffer.put_image("wrist", NOW_S + 0.001 * i, wrist)
        buffer.observe(buffer.snapshot(NOW_S), lambda message: message)
        assert set(buffer.size_changes) == changed
    assert "from 3 × 2 to 6 × 4" in buffer.size_changes["high"]
    buffer.accept_sizes()
    buffer.observe(buffer.snapshot(NOW_S), lambda message: message)
    assert buffer.size_changes == {}


def test_joint_statistics() -> None:
    buffer = make_buffer()
    for i in range(101):
        buffer.put_joints(NOW_S + i / 100, np.zeros(2))
    statistics = buffer.joint_statistics(NOW_S + 1.01)
    assert statistics.rate_hz == pytest.approx(100.0)
    assert statistics.age_s == pytest.approx(0.01)


def test_a_clock_that_jumps_back_flushes_the_stream() -> None:
    """A bag that loops: the first frame of the second pass is the newest one."""
    buffer = filled()
    buffer.put_image("high", 3.0, "second pass")
    assert buffer.camera_statistics(3.0)["high"].clock_jumps == 1
    assert buffer.camera_statistics(3.0)["wrist"].clock_jumps == 0
    problems = [(problem.part, problem.names) for problem in buffer.problems(3.0)]
    assert problems == [("camera", ("wrist",)), ("joints", ())]
    buffer.put_image("wrist", 3.01, "second pass")
    buffer.put_joints(3.0, np.zeros(2))
    assert set(buffer.snapshot(3.05).messages.values()) == {"second pass"}


def test_a_late_frame_does_not_replace_a_newer_one() -> None:
    buffer = filled()
    buffer.put_image("high", NOW_S - 0.5, "late")
    buffer.put_image("high", NOW_S - 0.02, "repeated")
    assert buffer.snapshot(NOW_S).messages["high"] == "high 99.98"
    statistics = buffer.camera_statistics(NOW_S)["high"]
    assert (statistics.received, statistics.clock_jumps) == (3, 0)


def test_clear_forgets_streams_and_keeps_instruction_and_counts() -> None:
    buffer = filled()
    buffer.clear()
    assert buffer.instruction == "lift the cube"
    assert len(buffer.problems(NOW_S)) == 3
    assert buffer.camera_statistics(NOW_S)["high"].received == 1
    buffer.put_image("high", 5.0, "an earlier time")
    assert buffer.camera_statistics(5.0)["high"].age_s == 0.0


def test_camera_statistics() -> None:
    buffer = filled(high_s=None)
    for i in range(150):
        buffer.put_image("high", NOW_S - 5.0 + i / 30, i)
    last_s = NOW_S - 5.0 + 149 / 30
    statistics = buffer.camera_statistics(last_s + 0.01)["high"]
    assert statistics.received == 150
    assert statistics.rate_hz == pytest.approx(30.0)
    assert statistics.age_s == pytest.approx(0.01)
    stopped = buffer.camera_statistics(last_s + 3.0)["high"]
    assert (stopped.rate_hz, stopped.age_s) == (0.0, pytest.approx(3.0))
    silent = make_buffer().camera_statistics(NOW_S)["high"]
    assert (silent.received, silent.rate_hz, silent.age_s) == (0, 0.0, math.inf)


def test_a_frame_counts_as_used_once() -> None:
    buffer = filled()
    buffer.snapshot(NOW_S)
    buffer.snapshot(NOW_S)
    buffer.put_image("high", NOW_S, "next")
    buffer.snapshot(NOW_S)
    used = {name: s.used for name, s in buffer.camera_statistics(NOW_S).items()}
    assert used == {"high": 2, "wrist": 1}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty"),
        (" \n\t ", "empty"),
        (None, "must be text, got NoneType"),
        (b"lift", "must be text, got bytes"),
        ("x" * 501, "has 501 characters, shorten it to 500"),
        ("lift\nthe cube", r"U\+000A at 4"),
        ("lift\x00", r"U\+0000"),
        ("lift\ud800", r"U\+D800"),
        ("lift\u2028it", r"U\+2028"),
    ],
)
def test_an_invalid_instruction_is_refused_and_the_old_one_stays(text: Any, reason: str) -> None:
    buffer = filled()
    with pytest.raises(InstructionError, match=reason):
        buffer.set_instruction(text)
    assert buffer.instruction == "lift the cube"


@given(st.text(max_size=600) | st.binary() | st.integers())
def test_any_instruction_is_used_whole_or_refused(text: Any) -> None:
    buffer = make_buffer()
    try:
        taken = buffer.set_instruction(text)
    except InstructionError as error:
        assert len(str(error).splitlines()) == 1
        assert buffer.instruction is None
    else:
        assert taken == buffer.instruction == text.strip()
        assert taken.isprintable() or all(ord(c) > 0x7F for c in taken if not c.isprintable())


def test_without_instruction_there_is_no_observation() -> None:
    buffer = make_buffer()
    for camera in buffer.camera_names:
        buffer.put_image(camera, NOW_S, "frame")
    buffer.put_joints(NOW_S, np.zeros(2))
    assert buffer.instruction is None
    assert texts(buffer) == ["instruction: none given"]
    assert buffer.set_instruction("  put it back ") == "put it back"
    assert buffer.snapshot(NOW_S).instruction == "put it back"


def test_configuration_that_cannot_work_is_refused() -> None:
    with pytest.raises(ValueError, match="camera names"):
        ObservationBuffer([], JOINTS, Gates())
    with pytest.raises(ValueError, match="camera names"):
        ObservationBuffer([CameraStream("a"), CameraStream("a")], JOINTS, Gates())
    with pytest.raises(ValueError, match="joint names"):
        ObservationBuffer([CameraStream("a")], ["j", "j"], Gates())
    with pytest.raises(ValueError, match="max_skew_s must be a finite"):
        Gates(max_skew_s=math.nan)
    with pytest.raises(ValueError, match="max_instruction_chars"):
        Gates(max_instruction_chars=0)
    with pytest.raises(ValueError, match="camera 'front' is not one of"):
        make_buffer().put_image("front", NOW_S, "frame")
    with pytest.raises(ValueError, match="camera 'high': stamp inf"):
        make_buffer().put_image("high", math.inf, "frame")


STAMPS_S = st.floats(NOW_S - 3.0, NOW_S + 1.0) | st.floats(NOW_S - 0.25, NOW_S + 0.05)
PUTS = st.lists(st.tuples(st.sampled_from(["high", "wrist", "joints"]), STAMPS_S), max_size=30)


@settings(max_examples=300, deadline=None)
@given(puts=PUTS, wrist_required=st.booleans(), now_s=st.floats(NOW_S - 0.1, NOW_S + 0.1))
def test_no_order_of_messages_gets_an_observation_past_the_gates(
    puts: list[tuple[str, float]], wrist_required: bool, now_s: float
) -> None:
    gates = Gates()
    buffer = make_buffer(wrist_required=wrist_required)
    buffer.set_instruction("lift")
    for stream, stamp_s in puts:
        if stream == "joints":
            buffer.put_joints(stamp_s, np.array([stamp_s, 0.0]))
        else:
            buffer.put_image(stream, stamp_s, stamp_s)
    problems = buffer.problems(now_s)
    try:
        snapshot = buffer.snapshot(now_s)
    except NotReady as error:
        assert problems and error.problems == tuple(problems)
        return
    assert problems == []
    assert "high" in snapshot.messages and (not wrist_required or "wrist" in snapshot.messages)
    stamps_s = list(snapshot.messages.values())
    assert all(abs(now_s - stamp_s) <= gates.max_image_age_s for stamp_s in stamps_s)
    assert max(stamps_s) - min(stamps_s) <= gates.max_skew_s
    assert snapshot.stamp_s == max(stamps_s)
    assert abs(snapshot.positions[0] - snapshot.stamp_s) <= gates.max_joint_age_s
    assert set(stamps_s) <= {stamp_s for _, stamp_s in puts}


def test_threads_may_put_while_another_takes() -> None:
    """Image, stamp and positions of a snapshot were put together."""
    buffer = ObservationBuffer([CameraStream("high")], JOINTS, Gates(max_joint_age_s=10.0))
    buffer.set_instruction("lift")
    buffer.put_joints(NOW_S, np.zeros(2))
    done = threading.Event()

    def put() -> None:
        for i in range(3000):
            stamp_s = NOW_S + i * 1e-5
            buffer.put_image("high", stamp_s, stamp_s)
            buffer.put_joints(stamp_s, np.array([stamp_s, stamp_s]))
        done.set()

    writer = threading.Thread(target=put)
    writer.start()
    taken = 0
    while not done.is_set() or taken == 0:
        try:
            snapshot = buffer.snapshot(NOW_S)
        except NotReady as error:
            assert str(error) == "camera 'high': nothing received"
            continue
        taken += 1
        assert snapshot.messages["high"] == snapshot.frame_stamps_s["high"] == snapshot.stamp_s
        assert snapshot.positions[0] == snapshot.positions[1]
    writer.join()
    assert buffer.camera_statistics(NOW_S)["high"].received == 3000
