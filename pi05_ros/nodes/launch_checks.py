"""Launch arguments, checked before a launch file starts anything; free of launch and rclpy.

Each fault is one line with the argument, its value and the remedy.
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from pi05_ros.evaluation.offline_bag import Bag, BagError
from pi05_ros.evaluation.offline_notes import Notes
from pi05_ros.evaluation.offline_topics import EvaluatedRobot, read_evaluated_robot
from pi05_ros.evaluation.robot_config import RobotConfigError
from pi05_ros.nodes.params_files import params_file_fault
from pi05_ros.policy.hub import HUB_ID
from pi05_ros.policy.small import SMALL

BOOLEANS = ("true", "false", "True", "False")
DEVICE_ERROR_EXIT = 70
"""Exit code of the policy node after a device error that only a new process recovers from."""
RESPAWNS = 3
RESPAWN_WINDOW_S = 600.0
RATES = (0.01, 100.0)
"""Of a replay; rosbag2 plays from 0.01 on."""
_NAMESPACE = re.compile(r"/?[A-Za-z_][A-Za-z0-9_]*(/[A-Za-z_][A-Za-z0-9_]*)*|/?")


class LaunchFaults(ValueError):
    """Launch arguments that are refused; one line each."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__("\n".join(lines))
        self.lines = lines


def aloha_faults(values: Mapping[str, str]) -> list[str]:
    """What is wrong with the arguments of aloha.launch.py."""
    names = ("sim", "use_sim_time", "dry_run", "autostart")
    return [*_boolean_faults(values, names), *_common_faults(values)]


def _boolean_faults(values: Mapping[str, str], names: tuple[str, ...]) -> list[str]:
    return [
        f"{name}:={values[name]} is neither true nor false"
        for name in names
        if values[name] not in BOOLEANS
    ]


def _common_faults(values: Mapping[str, str]) -> list[str]:
    faults = []
    params = params_file_fault(values["params_file"])
    if params:
        faults.append(f"params_file:={values['params_file']}: {params}")
    checkpoint = checkpoint_fault(values["checkpoint"])
    if checkpoint:
        faults.append(f"checkpoint:={values['checkpoint']} {checkpoint}")
    if not _NAMESPACE.fullmatch(values["namespace"]):
        faults.append(
            f"namespace:={values['namespace']} is no ROS namespace: letters, digits and _, "
            "parts separated by /, such as robot or /lab/robot"
        )
    return faults


def checkpoint_fault(value: str) -> str:
    """What keeps a checkpoint argument from being loaded, as far as names tell; "" if nothing.

    Empty is the params file's; an id of Hugging Face is left to the node.
    """
    if value in ("", SMALL):
        return ""
    folder = Path(value).expanduser()
    if folder.is_dir():
        if (folder / "config.json").is_file():
            return ""
        return f"has no config.json; `pi05 check {value}` says what it is"
    if folder.exists():
        return "is not a folder; give the folder that holds config.json and the weights"
    if HUB_ID.fullmatch(value) and not value.startswith("."):
        return ""
    return f"is not there; give a folder, a Hugging Face id such as owner/name, or {SMALL}"


@dataclass(frozen=True)
class Replay:
    """What replay.launch.py plays, and what the node must be told for it."""

    topics: list[str]
    transports: dict[str, str]
    """Parameter of the node → "raw" or "compressed", by what the bag has of each camera."""


def replay_faults(values: Mapping[str, str]) -> list[str]:
    """What is wrong with the arguments of replay.launch.py, the bag's topics excepted."""
    faults = [*_boolean_faults(values, ("loop", "dry_run")), *_common_faults(values)]
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


class AfterExit(Enum):
    """What a launch does when a process has ended."""

    RESPAWN = "the process starts again"
    END = "the launch ends with exit code 0"
    FAIL = "the launch ends with exit code 1"


class ExitPolicy:
    """Decides what the policy node's end means: `respawns` in `RESPAWN_WINDOW_S` come back."""

    def __init__(self, respawns: int = RESPAWNS) -> None:
        self._respawns = respawns
        self._respawns_s: list[float] = []

    def after(self, code: int, now_s: float) -> AfterExit:
        """What follows on exit code `code` (negative: ended by a signal)."""
        if code == 0:
            return AfterExit.END
        if code != DEVICE_ERROR_EXIT:
            return AfterExit.FAIL
        self._respawns_s = [t for t in self._respawns_s if now_s - t < RESPAWN_WINDOW_S]
        if len(self._respawns_s) >= self._respawns:
            return AfterExit.FAIL
        self._respawns_s.append(now_s)
        return AfterExit.RESPAWN
