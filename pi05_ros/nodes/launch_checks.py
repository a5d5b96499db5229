"""Launch arguments, checked before a launch file starts anything; free of launch and rclpy.

Each fault is one line with the argument, its value and the remedy.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import Enum
from pathlib import Path

from pi05_ros.nodes.params_files import params_file_fault
from pi05_ros.policy.checkpoint import HUB_ID, SMALL

BOOLEANS = ("true", "false", "True", "False")
DEVICE_ERROR_EXIT = 70
"""Exit code of the policy node after a device error that only a new process recovers from."""
RESPAWNS = 3
RESPAWN_WINDOW_S = 600.0
_NAMESPACE = re.compile(r"/?[A-Za-z_][A-Za-z0-9_]*(/[A-Za-z_][A-Za-z0-9_]*)*|/?")


class LaunchFaults(ValueError):
    """Launch arguments that are refused; one line each."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__("\n".join(lines))
        self.lines = lines


def aloha_faults(values: Mapping[str, str]) -> list[str]:
    """What is wrong with the arguments of aloha.launch.py."""
    names = ("sim", "use_sim_time", "dry_run", "autostart")
    return [*boolean_faults(values, names), *common_faults(values)]


def boolean_faults(values: Mapping[str, str], names: tuple[str, ...]) -> list[str]:
    return [
        f"{name}:={values[name]} is neither true nor false"
        for name in names
        if values[name] not in BOOLEANS
    ]


def common_faults(values: Mapping[str, str]) -> list[str]:
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
