"""The topics that replay.launch.py plays of a bag; free of launch and rclpy."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pi05_lab.data.bags import Bag, BagError, Notes
from pi05_lab.data.topics import EvaluatedRobot, read_evaluated_robot
from pi05_ros.nodes.launch_support import LaunchFaults, boolean_faults, common_faults
from pi05_ros.robot_config import RobotConfigError

RATES = (0.01, 100.0)
"""Of a replay; rosbag2 plays from 0.01 on."""


@dataclass(frozen=True)
class Replay:
    """Topics to play, and parameters of the node for them."""

    topics: list[str]
    transports: dict[str, str]
    """Parameter of the node → "raw" or "compressed", as each camera was recorded."""


def _argument_faults(values: Mapping[str, str]) -> list[str]:
    """Faults of the arguments of replay.launch.py, except those of the bag."""
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
    """Check all arguments and choose the topics.

    Raises:
        LaunchFaults: an argument is wrong, or the bag lacks a topic that the node needs.
    """
    faults = _argument_faults(values)
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
    return _choose_topics(values, robot, bag_topics)


def _choose_topics(
    values: Mapping[str, str], robot: EvaluatedRobot, bag: Mapping[str, str]
) -> Replay:
    topics, transports, faults = [], {}, []
    for camera in robot.cameras:
        recorded = [topic for topic, kind in camera.topics.items() if bag.get(topic) == kind]
        if recorded:
            topics.append(recorded[0])
            transport = "raw" if recorded[0] == camera.topic else "compressed"
            transports[f"cameras.{camera.name}.transport"] = transport
        elif camera.required:
            faults.append(f"camera {camera.name}: none of {', '.join(camera.topics)}")
    instruction = robot.instruction_topics[0]
    needed = {robot.joint_topic: f"joint states: no {robot.joint_topic}"}
    if not values["instruction"]:
        needed[instruction] = f'no {instruction}: give instruction:="…"'
    for topic, fault in needed.items():
        if topic in bag:
            topics.append(topic)
        else:
            faults.append(fault)
    if faults:
        lines = [f"bag:={values['bag']} lacks {fault}" for fault in faults]
        has = ", ".join(sorted(bag))
        remedy = "another params_file or namespace may fit"
        raise LaunchFaults([*lines, f"bag:={values['bag']} has {has}; {remedy}"])
    return Replay(topics, transports)
