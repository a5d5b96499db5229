"""What both launch files do with faults: refuse the start, end the launch with an exit code.

launch ends with exit code 1 if an action raises, and then stops the processes that it started.
launch itself is imported where it is used: only a ROS installation has it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pi05_ros.nodes.launch_checks import RESPAWNS, AfterExit, ExitPolicy

if TYPE_CHECKING:
    from launch import LaunchContext
    from launch.actions import ExecuteProcess
    from launch.events.process import ProcessExited
    from launch_ros.actions import LifecycleNode

RESPAWN_DELAY_S = 1.0
"""launch respawns after every exit; within this time the launch is ended instead where it must."""


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
    """Ends the launch once, for whichever process ends first."""

    def __init__(self, respawns: int = RESPAWNS) -> None:
        self._exits = ExitPolicy(respawns)
        self._ended = False
        self._started = False

    def watch_policy(self, node: LifecycleNode, autostart: bool) -> list[Any]:
        """Handlers for the policy node, which has `RESPAWN_DELAY_S` where it may respawn."""
        from launch.actions import OpaqueFunction, RegisterEventHandler
        from launch.event_handlers import OnProcessExit
        from launch_ros.event_handlers import OnStateTransition

        handlers = [
            OnProcessExit(target_action=node, on_exit=self._policy_exited),
            OnStateTransition(
                target_lifecycle_node=node,
                goal_state="active",
                entities=[OpaqueFunction(function=self._policy_active)],
            ),
        ]
        if autostart:
            handlers.append(
                OnStateTransition(
                    target_lifecycle_node=node,
                    start_state="configuring",
                    goal_state="unconfigured",
                    entities=[OpaqueFunction(function=self._configure_failed)],
                )
            )
        return [RegisterEventHandler(handler) for handler in handlers]

    def watch(self, process: ExecuteProcess, end: str) -> Any:
        """A handler that ends the launch with the process; `end` is the reason at exit code 0."""
        from launch.actions import RegisterEventHandler
        from launch.event_handlers import OnProcessExit

        def exited(event: ProcessExited, context: LaunchContext) -> list[Any]:
            if event.returncode == 0:
                return self._end(context, end)
            return self._fail(context, f"{event.process_name} ended with code {event.returncode}")

        return RegisterEventHandler(OnProcessExit(target_action=process, on_exit=exited))

    def _policy_exited(self, event: ProcessExited, context: LaunchContext) -> list[Any]:
        if self._ended or context.is_shutdown:
            return []
        after = self._exits.after(event.returncode, time.monotonic())
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
        if self._ended or context.is_shutdown:
            return []
        from launch.actions import Shutdown

        self._ended = True
        return [Shutdown(reason=reason)]

    def _fail(self, context: LaunchContext, reason: str) -> list[Any]:
        if self._ended or context.is_shutdown:
            return []
        from launch.actions import OpaqueFunction

        self._ended = True

        def fail(_: LaunchContext) -> None:
            raise RuntimeError(reason)

        return [OpaqueFunction(function=fail)]
