"""Faults pinned: a bag is read differently from the node's topics; a wrong message, stamp or topic
ends the evaluation, or leaves no note.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from offline_world import (  # type: ignore[import-not-found]
    JOINTS,
    PARAMS,
    START_S,
    TYPES,
    FormulaPolicy,
    make_plan,
    motion,
    notes,
    oracle,
    rewrite,
    run,
    still,
    write_bag,
    write_dataset,
)
from rosbags.typesys import Stores, get_types_from_msg, get_typestore

from pi05_lab.data.bags import BagError
from pi05_lab.data.recording import JOINT_GROUP_COMMAND
from pi05_lab.data.topics import COMMAND_TYPES
from pi05_lab.evaluation.open_loop.evaluator import OpenLoopEvaluation
from pi05_lab.evaluation.open_loop.jobs import Job, find_jobs
from pi05_lab.evaluation.open_loop.runs import open_recording
from pi05_ros.types import FloatArray


def test_images_that_cannot_be_decoded_are_counted(tmp_path: Path) -> None:
    """Fault: one bad image ended the evaluation."""
    bag = rewrite(
        write_bag(tmp_path / "whole", 2.0),
        tmp_path / "bag",
        lambda topic, k, message: (
            replace(message, encoding="16UC1") if topic == "/top/image_raw" and k % 2 else message
        ),
    )
    plan = make_plan(tmp_path, control_every=0, every_s=0.1)
    result = run(bag, plan, oracle=oracle())
    dropped = [note for note in result.notes if "'16UC1'" in note.text]
    assert len(dropped) == 1 and dropped[0].count > 5
    assert result.observations > 5


def test_stamps_of_zero_become_the_receive_time(tmp_path: Path) -> None:
    def unstamp(topic: str, k: int, message: Any) -> Any:
        if hasattr(message, "header"):
            message.header.stamp.sec = message.header.stamp.nanosec = 0
        return message

    whole = write_bag(tmp_path / "whole", 2.0)
    plan = make_plan(tmp_path, control_every=0)
    result = run(rewrite(whole, tmp_path / "bag", unstamp), plan, oracle=oracle())
    before = run(whole, plan, oracle=oracle())
    assert sum("header stamps are 0" in text for text in notes(result)) == 2
    assert result.episodes == before.episodes


def test_stamps_of_another_clock_are_the_clock(tmp_path: Path) -> None:
    """`ros2 bag record` without --use-sim-time: received today, stamped from 0 s on."""

    def restamp(topic: str, k: int, message: Any) -> Any:
        if hasattr(message, "header"):
            message.header.stamp.sec += 5000
        return message

    whole = write_bag(tmp_path / "whole", 2.0)
    plan = make_plan(tmp_path, control_every=0)
    result = run(rewrite(whole, tmp_path / "bag", restamp), plan, still=still())
    assert result.observations == 10
    assert any("their clock was used" in text for text in notes(result))


def test_compressed_images_joints_by_name_and_no_commands(tmp_path: Path) -> None:
    """Joints in another order and with others; without commands they are the reference."""

    def change(topic: str, k: int, message: Any) -> Any:
        if topic.endswith("joint_trajectory"):
            return None
        if topic == "/joint_states":
            message.name = ["finger", *reversed(message.name)]
            message.position = np.array([9.0, *reversed(message.position)])
        if topic == "/top/image_raw":
            kind = "sensor_msgs/msg/CompressedImage"
            data = cv2.imencode(".png", np.full((12, 16, 3), k + 1, dtype=np.uint8))[1].ravel()
            jpeg = TYPES.types[kind](header=message.header, format="png", data=data)
            return f"{topic}/compressed", kind, jpeg
        return message

    bag = rewrite(write_bag(tmp_path / "whole", 2.0), tmp_path / "bag", change)
    policy = oracle()
    result = run(bag, make_plan(tmp_path, control_every=0), oracle=policy)
    assert [int(o.images["top"][0, 0, 0]) for o in policy.seen] == list(range(1, 101, 10))
    assert result.commanded_joints == []
    assert any("measured positions of its joints stand for them" in text for text in notes(result))
    assert any("/top/image_raw/compressed was used" in text for text in notes(result))
    errors = result.episodes[0].tracks["oracle"].errors["policy"]
    assert errors.by_joint[0] / sum(errors.steps) == pytest.approx(0.01, rel=0.05)


@pytest.mark.parametrize("output", ["forward_position", "interbotix", "joint_trajectory"])
def test_commands_of_every_controller_type_are_the_reference(tmp_path: Path, output: str) -> None:
    """As the node's outputs send them: bare numbers in the controller's order, or trajectories of
    several points, each of which ends the one before. The measured joints say something else.
    """
    types = get_typestore(Stores.ROS2_HUMBLE)
    types.register(get_types_from_msg(JOINT_GROUP_COMMAND, COMMAND_TYPES["interbotix"]))
    kind = COMMAND_TYPES[output]

    def change(topic: str, k: int, message: Any) -> Any:
        if topic == "/joint_states":
            message.position = message.position + 0.5
        if not topic.endswith("joint_trajectory"):
            return message
        values = message.points[0].positions
        if output == "forward_position":
            layout = types.types["std_msgs/msg/MultiArrayLayout"](dim=[], data_offset=0)
            return "/out", kind, types.types[kind](layout=layout, data=values)
        if output == "interbotix":
            data = values.astype(np.float32)
            return "/out", kind, types.types[kind](name="arm", cmd=data)
        stamp_s = message.header.stamp.sec + message.header.stamp.nanosec * 1e-9
        ahead_s = np.arange(1, 6) / 50
        rows = motion(stamp_s + ahead_s)
        rows[-1] += 1.0  # a tail that is never reached
        message.points = [
            replace(
                message.points[0],
                positions=row,
                time_from_start=replace(
                    message.points[0].time_from_start, sec=0, nanosec=round(1e9 * time_s)
                ),
            )
            for row, time_s in zip(rows, ahead_s, strict=True)
        ]
        return "/out", kind, message

    bag = rewrite(write_bag(tmp_path / "whole", 2.0), tmp_path / "bag", change, types)
    plan = make_plan(tmp_path, control_every=0)
    Path(str(plan.params_file)).write_text(
        PARAMS.replace("gripper]}\n", f"gripper], output: {output}, topic: /out}}\n")
    )
    result = run(bag, plan, oracle=oracle())
    assert result.commanded_joints == sorted(JOINTS, key=JOINTS.index)
    errors = result.episodes[0].tracks["oracle"].errors["policy"]
    assert errors.by_joint[1] / sum(errors.steps) == pytest.approx(0.01, rel=0.05)


def test_a_missing_topic_is_named_with_those_that_exist(tmp_path: Path) -> None:
    bag = write_bag(tmp_path / "bag", 0.2)
    plan = make_plan(tmp_path)
    params = Path(str(plan.params_file))

    def message(text: str = PARAMS, **changes: Any) -> str:
        params.write_text(text)
        with pytest.raises(BagError) as error:
            run(bag, replace(plan, **changes), oracle=oracle())
        return str(error.value)

    text = message(PARAMS.replace("top/image_raw", "front/image_raw"))
    assert "camera top: no /front/image_raw or /front/image_raw/compressed" in text
    assert "topics of that type: /top/image_raw" in text
    text = message(PARAMS, namespace="robot1")
    assert "/robot1/top/image_raw" in text and "--namespace" in text
    text = message(PARAMS.replace("topic: top/image_raw", "topic: joint_states"))
    assert "/joint_states is sensor_msgs/msg/JointState, needs sensor_msgs/msg/Image" in text
    silent = rewrite(bag, tmp_path / "silent", lambda t, k, m: None if t == "/instruction" else m)
    params.write_text(PARAMS)
    with pytest.raises(BagError, match=r"instruction: no /instruction .* or give --instruction"):
        run(silent, plan, oracle=oracle())
    given = run(silent, replace(plan, instruction="wave"), oracle=oracle())
    assert [e.instruction for e in given.episodes] == ["wave"]


def test_the_latched_instruction_is_enough(tmp_path: Path) -> None:
    """A recording that starts after the instruction has only the node's copy of it."""
    bag = rewrite(
        write_bag(tmp_path / "whole", 0.4),
        tmp_path / "bag",
        lambda topic, k, message: (
            ("/policy/active_instruction", "std_msgs/msg/String", message)
            if topic == "/instruction"
            else message
        ),
    )
    result = run(bag, make_plan(tmp_path), oracle=oracle())
    assert [e.instruction for e in result.episodes] == ["wave"]


@pytest.mark.slow
def test_a_dataset_is_a_recording_too(tmp_path: Path) -> None:
    jobs = find_jobs([write_dataset(tmp_path / "data", 100, "wave", "bow")])
    assert [j.name for j in jobs] == ["data#0", "data#1"]
    plan = make_plan(tmp_path, control_every=0)

    def shifted(observation: Any, times_s: FloatArray) -> FloatArray:
        return motion(times_s - 1.0 + START_S) + np.array([0.01, -0.01, 0.0])

    for k, text in enumerate(("wave", "bow")):
        policy = FormulaPolicy("shifted", shifted)
        robot = plan.robot()
        recording = open_recording(Job("it", jobs[k].path, jobs[k].episode), plan, robot)
        result = OpenLoopEvaluation(recording, {"it": policy}, robot, plan.settings).run()
        assert [e.instruction for e in result.episodes] == [text]
        assert [int(o.images["top"][0, 0, 0]) for o in policy.seen] == list(range(40, 140, 10))
        errors = result.episodes[0].tracks["it"].errors["policy"]
        assert errors.by_joint[0] / sum(errors.steps) == pytest.approx(0.01, rel=0.02)


def test_a_data_set_in_another_joint_order_is_refused(tmp_path: Path) -> None:
    """Fault: only the number of joints was compared."""
    root = write_dataset(tmp_path / "data", 5, "wave")
    info = root / "meta" / "info.json"
    names = ('"shoulder",\n                "elbow"', '"elbow",\n                "shoulder"')
    assert names[0] in info.read_text()
    info.write_text(info.read_text().replace(*names))
    plan = make_plan(tmp_path)
    with pytest.raises(BagError, match="'shoulder' is number 2 instead of 1"):
        open_recording(Job("data#0", root, 0), plan, plan.robot())
