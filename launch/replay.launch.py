"""The policy node on a recorded bag: what it would have done, seen live.

ros2 launch pi05_ros replay.launch.py bag:=BAG [rate:=0.5] [instruction:="…"]

Only the node's inputs are played, so recorded commands reach no controller; `dry_run` holds back
the node's own commands. Each camera is played, and read by the node, as it was recorded: raw or
compressed. The launch ends with the bag, with exit code 0; arguments and bag are checked before
anything starts.
"""

import os

from ament_index_python.packages import get_package_share_directory
from launch import LaunchDescription
from launch.actions import ExecuteProcess, OpaqueFunction, RegisterEventHandler
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import LifecycleNode
from launch_ros.event_handlers import OnStateTransition

from pi05_lab.evaluation.open_loop.replay import plan_replay
from pi05_ros.nodes.launch_support import (
    Ending,
    LaunchFaults,
    argument,
    declare_arguments,
    refuse,
)

PARAMS_FILE = os.path.join(get_package_share_directory("pi05_ros"), "config", "aloha.yaml")
ARGUMENTS = {
    "bag": (None, "rosbag2 to play"),
    "rate": ("1.0", "speed of the replay; below 1 for a policy that is slow here"),
    "loop": ("false", "play it again and again"),
    "checkpoint": ("", "checkpoint folder; empty takes the params file's"),
    "params_file": (PARAMS_FILE, "parameters of the policy node"),
    "namespace": ("", "namespace of the node and of the recorded topics"),
    "dry_run": ("true", "publish chunks but no trajectories"),
    "instruction": ("", "instruction from the start; empty takes the recorded ones"),
}


def actions(context):
    """The node, and the player as soon as the node is active."""
    value = {name: LaunchConfiguration(name).perform(context) for name in ARGUMENTS}
    try:
        replay = plan_replay(value)
    except LaunchFaults as faults:
        refuse(faults.lines)
    given = [name for name in ("checkpoint", "instruction") if value[name]]
    overrides = {
        "use_sim_time": True,
        "autostart": True,
        "dry_run": argument("dry_run", bool),
        **replay.transports,
        **{name: argument(name, str) for name in given},
    }
    node = LifecycleNode(
        package="pi05_ros",
        executable="policy_node",
        name="policy",
        namespace=LaunchConfiguration("namespace"),
        parameters=[LaunchConfiguration("params_file"), overrides],
        output="both",
        emulate_tty=True,
    )
    command = ["ros2", "bag", "play", value["bag"], "--clock", "100", "--rate", value["rate"]]
    if value["loop"].lower() == "true":
        command.append("--loop")
    play = ExecuteProcess(cmd=[*command, "--topics", *replay.topics], output="both")
    ending = Ending(respawns=0)
    when_active = OnStateTransition(
        target_lifecycle_node=node, goal_state="active", entities=[play], handle_once=True
    )
    return [
        *ending.watch_policy(node, autostart=True),
        ending.watch(play, "the bag has ended"),
        RegisterEventHandler(when_active),
        node,
    ]


def generate_launch_description():
    """Arguments, the FastDDS profile unless the user has one, node and player."""
    return LaunchDescription([*declare_arguments(ARGUMENTS), OpaqueFunction(function=actions)])
