"""The policy node, and the simulated ALOHA unless `sim:=false`.

ros2 launch pi05_ros aloha.launch.py --show-args

The arguments are checked before anything starts. The launch ends with either process, with exit
code 1 where that is a fault; after a device error the policy node starts again.
"""

import os

from ament_index_python.packages import get_package_share_directory
from launch import LaunchDescription
from launch.actions import OpaqueFunction
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import LifecycleNode, Node

from pi05_ros.nodes.launch_support import (
    RESPAWN_DELAY_S,
    Ending,
    aloha_faults,
    argument,
    declare_arguments,
    refuse,
)

PARAMS_FILE = os.path.join(get_package_share_directory("pi05_ros"), "config", "aloha.yaml")
ARGUMENTS = {
    "sim": ("true", "start the simulated robot"),
    "checkpoint": ("", "checkpoint folder; empty takes the params file's"),
    "params_file": (PARAMS_FILE, "parameters of both nodes"),
    "namespace": ("", "namespace of both nodes"),
    "use_sim_time": ("false", "follow /clock; the simulated robot then publishes it"),
    "dry_run": ("false", "do everything but publish trajectories"),
    "instruction": (
        "",
        "instruction from the start; empty waits for the topic: ros2 topic pub --times 5 "
        '--rate 2 /instruction std_msgs/msg/String "{data: …}"',
    ),
    "autostart": ("true", "configure and activate the policy node"),
}


def nodes(context):
    """Both nodes, once the arguments are right; an empty one leaves the params file's value."""
    value = {name: LaunchConfiguration(name).perform(context) for name in ARGUMENTS}
    refuse(aloha_faults(value))
    given = [name for name in ("checkpoint", "instruction") if value[name]]
    flags = {name: argument(name, bool) for name in ("use_sim_time", "dry_run", "autostart")}
    common = {
        "package": "pi05_ros",
        "namespace": LaunchConfiguration("namespace"),
        "output": "both",
        "emulate_tty": True,
    }
    params_file = LaunchConfiguration("params_file")
    policy = LifecycleNode(
        executable="policy_node",
        name="policy",
        parameters=[params_file, flags | {name: argument(name, str) for name in given}],
        respawn=True,
        respawn_delay=RESPAWN_DELAY_S,
        **common,
    )
    ending = Ending()
    actions = [*ending.watch_policy(policy, value["autostart"].lower() == "true"), policy]
    if value["sim"].lower() == "true":
        sim = Node(
            executable="aloha_sim_node",
            name="aloha_sim",
            # it is the source of /clock, so it does not follow it
            parameters=[params_file, {"publish_clock": argument("use_sim_time", bool)}],
            **common,
        )
        actions += [ending.watch(sim, "the simulated robot has ended"), sim]
    return actions


def generate_launch_description():
    """Arguments, the FastDDS profile unless the user has one, and the nodes."""
    return LaunchDescription([*declare_arguments(ARGUMENTS), OpaqueFunction(function=nodes)])
