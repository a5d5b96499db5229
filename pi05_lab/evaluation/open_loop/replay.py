"""What replay.launch.py plays of a bag; free of launch and rclpy."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pi05_lab.evaluation.open_loop.bag import Bag, BagError
from pi05_lab.evaluation.open_loop.notes import Notes
from pi05_lab.evaluation.open_loop.topics import EvaluatedRobot, read_evaluated_robot
from pi05_ros.nodes.launch_checks import LaunchFaults, boolean_faults, common_faults
from pi05_ros.robot_config import RobotConfigError

RATES = (0.01, 100.0)
"""Of a replay; rosbag2 plays from 0.01 on."""


@dataclass(frozen=True)
class Replay:
    """What replay.launch.py plays, and what the node must be told for it."""

    topics: list[str]
    transports: dict[str, str]
    """Parameter of the node → "raw" or "compressed", by what the bag has of each camera."""


def replay_faults(values: Mapping[str, str]) -> list[str]:
    """What is wrong with the arguments of replay.launch.py, the bag's topics excepted."""
    faults = [*boolean_faults(values, ("loop", "dry_run")), *common_faults(values)]
    try:
        rate = float(values["rate"])
    except ValueError:
        rate = math.nan
    if not RATES[0] <= rate <= RATES[1]:
        faults.append(
            f"rate:={values['rate']} is not a speed from {RATES[0]:g} to {RATES[1]:g}; "
            "1.0 is that of the recording"
        )
    if shutil.which("ros2") is None:
        faults.append("the command ros2, which plays the bag, is not on the PATH: source ROS")
    return faults


def plan_replay(values: Mapping[str, str]) -> Replay:
    """Check all arguments and choose what is played.

    Raises:
        LaunchFaults: an argument is wrong, or the bag has not what the node reads.
    """
    faults = replay_faults(values)
    bag_topics: dict[str, str] = {}
    try:
        bag_topics = Bag(Path(values["bag"]).expanduser(), Notes()).topics
    except (BagError, OSError) as error:
        faults.append(f"bag:={values['bag']}: {error}")
    if faults:
        raise LaunchFaults(faults)
    try:
        robot = read_evaluated_robot(values["params_file"], values["namespace"])
    except RobotConfigError as error:
        raise LaunchFaults([f"params_file:={values['params_file']}: {error}"]) from None
    return _choose(values, robot, bag_topics)


def _choose(values: Mapping[str, str], robot: EvaluatedRobot, bag: Mapping[str, str]) -> Replay:
    topics, transports, faults = [], {}, []
    for camera in robot.cameras:
        recorded = [topic for topic, kind in camera.topics.items() if bag.get(topic) == kind]
        if recorded:
            topics.append(recorded[0])
            compressed = recorded[0] != camera.topic
            transports[f"cameras.{camera.name}.transport"] = "compressed" if compressed else "raw"
        elif camera.required:
            faults.append(f"camera {camera.name}: none of {', '.join(camera.topics)}")
    if robot.joint_topic in bag:
        topics.append(robot.joint_topic)
    else:
        faults.append(f"joint states: no {robot.joint_topic}")
    instruction = robot.instruction_topics[0]
    if not values["instruction"]:
        if instruction in bag:
            topics.append(instruction)
        else:
            faults.append(f'no {instruction}: give instruction:="…"')
    if faults:
        has = ", ".join(sorted(bag))
        remedy = "another params_file or namespace may fit"
        raise LaunchFaults([f"bag:={values['bag']} lacks {fault}" for fault in faults]
                           + [f"bag:={values['bag']} has {has}; {remedy}"])  # fmt: skip
    return Replay(topics, transports)
