"""The policy node, and the simulated ALOHA unless `sim:=false`.

ros2 launch pi05_ros aloha.launch.py --show-args
"""

import os

from ament_index_python.packages import get_package_share_directory
from launch import LaunchDescription
from launch.actions import DeclareLaunchArgument, OpaqueFunction, SetEnvironmentVariable
from launch.conditions import IfCondition
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import LifecycleNode, Node
from launch_ros.parameter_descriptions import ParameterValue

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
    "instruction": ("", "instruction from the start; empty waits for the topic"),
    "autostart": ("true", "configure and activate the policy node"),
}


def flag(name):
    """A launch argument as a boolean parameter."""
    return ParameterValue(LaunchConfiguration(name), value_type=bool)


def text(name):
    """A launch argument as a string parameter, whatever YAML would make of it."""
    return ParameterValue(LaunchConfiguration(name), value_type=str)


def nodes(context):
    """Both nodes; an empty argument leaves the params file's value."""
    overrides = {
        "use_sim_time": flag("use_sim_time"),
        "dry_run": flag("dry_run"),
        "autostart": flag("autostart"),
    }
    for name in ("checkpoint", "instruction"):
        if LaunchConfiguration(name).perform(context):
            overrides[name] = text(name)
    params_file = LaunchConfiguration("params_file")
    namespace = LaunchConfiguration("namespace")
    return [
        LifecycleNode(
            package="pi05_ros",
            executable="policy_node",
            name="policy",
            namespace=namespace,
            parameters=[params_file, overrides],
            output="both",
            emulate_tty=True,
        ),
        Node(
            package="pi05_ros",
            executable="aloha_sim_node",
            name="aloha_sim",
            namespace=namespace,
            # it is the source of /clock, so it does not follow it
            parameters=[params_file, {"publish_clock": flag("use_sim_time")}],
            output="both",
            emulate_tty=True,
            condition=IfCondition(LaunchConfiguration("sim")),
        ),
    ]


def generate_launch_description():
    """Arguments, the FastDDS profile unless the user has one, and the nodes."""
    actions = [
        DeclareLaunchArgument(name, default_value=default, description=description)
        for name, (default, description) in ARGUMENTS.items()
    ]
    if not os.environ.get("FASTDDS_DEFAULT_PROFILES_FILE"):
        profile = os.path.join(SHARE, "config", "fastdds_shm.xml")
        actions.append(SetEnvironmentVariable("FASTDDS_DEFAULT_PROFILES_FILE", profile))
    return LaunchDescription([*actions, OpaqueFunction(function=nodes)])
