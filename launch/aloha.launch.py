"""The policy node, and the simulated ALOHA unless `sim:=false`.

ros2 launch pi05_ros aloha.launch.py --show-args

The arguments are checked before anything starts. The launch ends with either process, with exit
code 1 where that is a fault; after a device error the policy node starts again.
"""

import os

from ament_index_python.packages import get_package_share_directory
from launch import LaunchDescription
from launch.actions import DeclareLaunchArgument, OpaqueFunction, SetEnvironmentVariable
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import LifecycleNode, Node
from launch_ros.parameter_descriptions import ParameterValue

from pi05_ros.nodes.launch_actions import RESPAWN_DELAY_S, Ending, refuse
from pi05_ros.nodes.launch_checks import BOOLEANS, aloha_faults

SHARE = get_package_share_directory("pi05_ros")

ARGUMENTS = {
    "sim": ("true", "start the simulated robot"),
    "checkpoint": ("", "checkpoint folder; empty takes the params file's"),
    "params_file": (
        os.path.join(SHARE, "config", "aloha.yaml"),
        "parameters of both nodes",
    ),
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
FLAGS = ("sim", "use_sim_time", "dry_run", "autostart")


def flag(name):
    """A launch argument as a boolean parameter."""
    return ParameterValue(LaunchConfiguration(name), value_type=bool)


def text(name):
    """A launch argument as a string parameter, whatever YAML would make of it."""
    return ParameterValue(LaunchConfiguration(name), value_type=str)


def nodes(context):
    """Both nodes, once the arguments are right; an empty one leaves the params file's value."""
    value = {name: LaunchConfiguration(name).perform(context) for name in ARGUMENTS}
    refuse(aloha_faults(value))
    overrides = {
        "use_sim_time": flag("use_sim_time"),
        "dry_run": flag("dry_run"),
        "autostart": flag("autostart"),
    }
    for name in ("checkpoint", "instruction"):
        if value[name]:
            overrides[name] = text(name)
    params_file = LaunchConfiguration("params_file")
    namespace = LaunchConfiguration("namespace")
    policy = LifecycleNode(
        package="pi05_ros",
        executable="policy_node",
        name="policy",
        namespace=namespace,
        parameters=[params_file, overrides],
        respawn=True,
        respawn_delay=RESPAWN_DELAY_S,
        output="both",
        emulate_tty=True,
    )
    ending = Ending()
    actions = [*ending.watch_policy(policy, value["autostart"].lower() == "true"), policy]
    if value["sim"].lower() == "true":
        sim = Node(
            package="pi05_ros",
            executable="aloha_sim_node",
            name="aloha_sim",
            namespace=namespace,
            # it is the source of /clock, so it does not follow it
            parameters=[params_file, {"publish_clock": flag("use_sim_time")}],
            output="both",
            emulate_tty=True,
        )
        actions += [ending.watch(sim, "the simulated robot has ended"), sim]
    return actions


def generate_launch_description():
    """Arguments, the FastDDS profile unless the user has one, and the nodes."""
    actions = [
        DeclareLaunchArgument(
            name,
            default_value=default,
            description=description,
            choices=BOOLEANS if name in FLAGS else None,
        )
        for name, (default, description) in ARGUMENTS.items()
    ]
    if not os.environ.get("FASTDDS_DEFAULT_PROFILES_FILE"):
        profile = os.path.join(SHARE, "config", "fastdds_shm.xml")
        actions.append(SetEnvironmentVariable("FASTDDS_DEFAULT_PROFILES_FILE", profile))
    return LaunchDescription([*actions, OpaqueFunction(function=nodes)])
