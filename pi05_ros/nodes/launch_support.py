"""Shared by the launch files: arguments and their checks, exit codes of the nodes.

launch ends with exit code 1 if an action raises, and then stops the processes that it started.
launch itself is imported where it is used: only a ROS installation has it.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pi05_ros.nodes import EXIT_DEVICE
from pi05_ros.nodes.main import params_file_fault, share_directory
from pi05_ros.policy.checkpoint import HUB_ID, SMALL

if TYPE_CHECKING:
    from launch import LaunchContext
    from launch.actions import ExecuteProcess
    from launch.events.process import ProcessExited
    from launch_ros.actions import LifecycleNode

BOOLEANS = ("true", "false", "True", "False")
RESPAWNS = 3
RESPAWN_WINDOW_S = 600.0
RESPAWN_DELAY_S = 1.0
"""launch respawns after every exit; within this time the launch is ended instead where it must."""
_NAMESPACE = re.compile(r"/?[A-Za-z_][A-Za-z0-9_]*(/[A-Za-z_][A-Za-z0-9_]*)*|/?")


class LaunchFaults(ValueError):
    """Launch arguments that are refused; one line each with argument, value and remedy."""

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
    """What is wrong with params file, checkpoint and namespace."""
    faults = []
    if fault := params_file_fault(values["params_file"]):
        faults.append(f"params_file:={values['params_file']}: {fault}")
    if fault := _checkpoint_fault(values["checkpoint"]):
        faults.append(f"checkpoint:={values['checkpoint']} {fault}")
    if not _NAMESPACE.fullmatch(values["namespace"]):
        faults.append(
            f"namespace:={values['namespace']} is no ROS namespace: letters, digits and _, "
            "parts separated by /, such as robot or /lab/robot"
        )
    return faults


def _checkpoint_fault(value: str) -> str:
    """Empty stands for the params file's checkpoint; the node checks an id of Hugging Face."""
    if value in ("", SMALL):
        return ""
    folder = Path(value).expanduser()
    if folder.is_dir():
        has_config = (folder / "config.json").is_file()
        return "" if has_config else f"has no config.json; `pi05 check {value}` says what it is"
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


def declare_arguments(arguments: Mapping[str, tuple[str | None, str]]) -> list[Any]:
    """Actions that declare name → (default, description), and FastDDS's profile if there is none.

    An argument whose default is true or false takes nothing else.
    """
    from launch.actions import DeclareLaunchArgument, SetEnvironmentVariable

    actions: list[Any] = [
        DeclareLaunchArgument(
            name,
            default_value=default,
            description=description,
            choices=BOOLEANS if default in BOOLEANS else None,
        )
        for name, (default, description) in arguments.items()
    ]
    if not os.environ.get("FASTDDS_DEFAULT_PROFILES_FILE"):
        profile = str(share_directory() / "config" / "fastdds_shm.xml")
        actions.append(SetEnvironmentVariable("FASTDDS_DEFAULT_PROFILES_FILE", profile))
    return actions


def argument(name: str, value_type: type) -> Any:
    """A launch argument as a parameter of this type, however YAML would read it."""
    from launch.substitutions import LaunchConfiguration
    from launch_ros.parameter_descriptions import ParameterValue

    return ParameterValue(LaunchConfiguration(name), value_type=value_type)


def refuse(faults: Sequence[str]) -> None:
    """Log each fault as an error and raise, before anything has started."""
    if faults:
        for fault in faults:
            _log_error(fault)
        raise RuntimeError("nothing was started, because of the arguments above")


def _log_error(text: str) -> None:
    from launch.logging import get_logger

    get_logger("pi05_ros").error(text)


class Ending:
    """Ends the launch once, with the first process that ends.

    The policy node respawns after a device error, `respawns` times in `RESPAWN_WINDOW_S`.
    """

    def __init__(self, respawns: int = RESPAWNS) -> None:
        self._respawns = respawns
        self._respawns_s: list[float] = []
        self._ended = self._started = False

    def after(self, code: int, now_s: float) -> AfterExit:
        """What follows on the policy node's exit code `code` (negative: ended by a signal)."""
        if code != EXIT_DEVICE:
            return AfterExit.FAIL if code else AfterExit.END
        self._respawns_s = [t for t in self._respawns_s if now_s - t < RESPAWN_WINDOW_S]
        if len(self._respawns_s) >= self._respawns:
            return AfterExit.FAIL
        self._respawns_s.append(now_s)
        return AfterExit.RESPAWN

    def watch_policy(self, node: LifecycleNode, autostart: bool) -> list[Any]:
        """Handlers for the policy node, which has `RESPAWN_DELAY_S` where it may respawn."""
        from launch.actions import OpaqueFunction, RegisterEventHandler
        from launch.event_handlers import OnProcessExit
        from launch_ros.event_handlers import OnStateTransition

        def on_transition(action: Any, **states: str) -> Any:
            entities = [OpaqueFunction(function=action)]
            return OnStateTransition(target_lifecycle_node=node, entities=entities, **states)

        handlers = [
            OnProcessExit(target_action=node, on_exit=self._policy_exited),
            on_transition(self._policy_active, goal_state="active"),
        ]
        if autostart:
            failed = {"start_state": "configuring", "goal_state": "unconfigured"}
            handlers.append(on_transition(self._configure_failed, **failed))
        return [RegisterEventHandler(handler) for handler in handlers]

    def watch(self, process: ExecuteProcess, end: str) -> Any:
        """A handler that ends the launch with the process; `end` is the reason at exit code 0."""
        from launch.actions import RegisterEventHandler
        from launch.event_handlers import OnProcessExit

        def exited(event: ProcessExited, context: LaunchContext) -> list[Any]:
            failure = f"{event.process_name} ended with code {event.returncode}"
            return self._fail(context, failure) if event.returncode else self._end(context, end)

        return RegisterEventHandler(OnProcessExit(target_action=process, on_exit=exited))

    def _policy_exited(self, event: ProcessExited, context: LaunchContext) -> list[Any]:
        if self._ended or context.is_shutdown:
            return []
        after = self.after(event.returncode, time.monotonic())
        if after is AfterExit.RESPAWN:
            _log_error("the policy node ended after a device error and starts again")
            self._started = False
            return []
        if after is AfterExit.END:
            return self._end(context, "the policy node has ended")
        return self._fail(context, f"the policy node ended with code {event.returncode}")

    def _policy_active(self, _: LaunchContext) -> None:
        self._started = True

    def _configure_failed(self, context: LaunchContext) -> list[Any]:
        # later the user may correct a parameter and configure again
        return [] if self._started else self._fail(context, "the policy node cannot be configured")

    def _end(self, context: LaunchContext, reason: str) -> list[Any]:
        from launch.actions import Shutdown

        return self._once(context, Shutdown(reason=reason))

    def _fail(self, context: LaunchContext, reason: str) -> list[Any]:
        from launch.actions import OpaqueFunction

        def fail(_: LaunchContext) -> None:
            raise RuntimeError(reason)

        return self._once(context, OpaqueFunction(function=fail))

    def _once(self, context: LaunchContext, action: Any) -> list[Any]:
        if self._ended or context.is_shutdown:
            return []
        self._ended = True
        return [action]
