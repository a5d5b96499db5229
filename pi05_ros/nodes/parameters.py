"""Parameters, each declared once: name, type, default, range, choices and description.

A node's parameters are the fields of a dataclass; `docs/parameters.md` is generated from the same
declarations (`python -m pi05_ros.nodes.parameters`). Cameras, joints and controllers are lists of
names with a block of parameters for each name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from pi05_ros.nodes.declare import (
    ParameterError,
    declare,
    declare_named,
    fields_of,
    parameter,
    unknown_overrides,
)
from pi05_ros.nodes.fault_parameters import FaultParameters
from pi05_ros.nodes.limits_parameters import LimitsParameters
from pi05_ros.nodes.scheduler_parameters import SchedulerParameters
from pi05_ros.topic_checks import camera_topic, controller_topic
from pi05_ros.types import JointGroup, JointSpec

__all__ = [
    "CameraParameters",
    "ControllerParameters",
    "FaultParameters",
    "GuidanceParameters",
    "JointParameters",
    "LimitsParameters",
    "ParameterError",
    "PolicyParameters",
    "SchedulerParameters",
    "SimParameters",
    "controller_columns",
    "declare",
    "declare_named",
    "joint_group",
    "markdown",
    "unknown_overrides",
]

OUTPUTS = ("joint_trajectory", "forward_position", "forward_velocity", "interbotix")


@dataclass(frozen=True)
class PolicyParameters:
    """Parameters of the node `policy`, read when it is configured."""

    checkpoint: str = parameter("small", "folder, Hugging Face id (owner/name@revision) or small")
    robot: str = parameter("aloha", "name, or path of a YAML description (docs/robots.md)")
    device: str = parameter("auto", "device of the network", choices=("auto", "cuda", "cpu"))
    dtype: str = parameter(
        "auto",
        "precision of the weights; auto is bfloat16 on a GPU and float32 on a CPU",
        choices=("auto", "bfloat16", "float32"),
    )
    execution: str = parameter(
        "auto",
        "auto: graphs on CUDA, eager elsewhere; compile: fused kernels, minutes at the first start",
        choices=("auto", "eager", "graphs", "compile"),
    )
    fp8_prefix: bool = parameter(False, "run the prefix pass in 8-bit floats")
    realtime_priority: int = parameter(
        50,
        "SCHED_FIFO priority of the control thread where the system grants it (rtprio in "
        "limits.conf); 0 does not ask",
        lower=0,
        upper=99,
    )
    inference_nice: int = parameter(
        5, "how much the inference thread gives way to others, as by nice; Linux", lower=0, upper=19
    )
    num_steps: int = parameter(10, "Euler steps of the flow", lower=1, upper=100)
    seed: int = parameter(-1, "seed of the flow's noise; -1 takes a fresh one", lower=-1)
    threads: int = parameter(
        0, "CPU threads of the network; 0 leaves one core to the control loop", lower=0, upper=256
    )
    load_timeout_s: float = parameter(
        600.0, "how long configure waits for loading and warm-up", lower=1.0, upper=86400.0
    )
    autostart: bool = parameter(False, "configure and activate without being asked")
    instruction: str = parameter("", "instruction from the start; empty waits for the topic")
    max_instruction_chars: int = parameter(
        300, "longer instructions are refused", lower=1, upper=10000
    )
    dry_run: bool = parameter(False, "do everything but publish trajectories")
    control_rate_hz: float = parameter(50.0, "rate of the control timer", lower=1.0, upper=1000.0)
    publish: str = parameter(
        "control_rate",
        "trajectories at the control rate, or when the plan changed or lookahead_s/2 is over",
        choices=("control_rate", "on_change"),
    )
    lookahead_s: float = parameter(
        0.2,
        "how far a trajectory follows the chunks before its zero-velocity tail",
        lower=0.02,
        upper=2.0,
    )
    lead_s: float = parameter(
        0.03,
        "how far ahead of its publication a trajectory starts, to cover transport",
        lower=0.0,
        upper=0.5,
    )
    position_margin: float = parameter(
        0.02, "kept between commands and position limits, share of the range", lower=0.0, upper=0.4
    )
    max_image_age_s: float = parameter(
        0.2, "an older frame of a required camera stops inference", lower=0.001, upper=60.0
    )
    max_skew_s: float = parameter(
        0.05, "largest time between the frames of one observation", lower=0.001, upper=60.0
    )
    max_joint_age_s: float = parameter(
        0.1, "an older joint state stops inference", lower=0.001, upper=60.0
    )
    status_rate_hz: float = parameter(
        1.0, "rate of ~/status and /diagnostics", lower=0.1, upper=50.0
    )


@dataclass(frozen=True)
class GuidanceParameters:
    """Parameters `guidance.*`, for scheduler.method rtc."""

    method: str = parameter(
        "identity",
        "identity: the error itself corrects (LeRobot); vjp: pulled back through the network (the "
        "paper), slower; trained: clean prefix, for checkpoints trained for it",
        choices=("identity", "vjp", "trained"),
    )
    schedule: str = parameter(
        "exp", "how the pull to the old chunk decays", choices=("zeros", "ones", "linear", "exp")
    )
    execution_horizon: int = parameter(
        0, "steps of the old chunk that have a say; 0 is all that it has left", lower=0, upper=1000
    )
    max_weight: float = parameter(10.0, "cap of the guidance", lower=0.0, upper=1000.0)


@dataclass(frozen=True)
class CameraParameters:
    """Parameters `cameras.<name>.*`."""

    topic: str = parameter("", "image topic; empty is <name>/image_raw")
    transport: str = parameter(
        "raw", "compressed takes <topic>/compressed", choices=("raw", "compressed")
    )
    required: bool = parameter(True, "without its pictures no inference; else it is masked")

    def topic_of(self, name: str) -> str:
        """The topic that is subscribed to for the camera `name`."""
        return camera_topic(name, self.topic, self.transport)


@dataclass(frozen=True)
class JointParameters:
    """Parameters `joints.<name>.*`, in the controller's units: rad, or m for a gripper's finger."""

    lower: float = parameter(0.0, "lower position limit, rad or m")
    upper: float = parameter(0.0, "upper position limit, rad or m")
    max_velocity: float = parameter(0.0, "velocity limit, rad/s or m/s")
    max_acceleration: float = parameter(0.0, "acceleration limit, rad/s2 or m/s2")
    policy_zero: float = parameter(0.0, "the position that the policy calls 0")
    policy_one: float = parameter(1.0, "the position that the policy calls 1")
    gripper: bool = parameter(False, "taken from the newest chunk, never averaged")


@dataclass(frozen=True)
class ControllerParameters:
    """Parameters `controllers.<name>.*`."""

    joints: list[str] = parameter([""], "the joints it commands, in its order")
    output: str = parameter(
        "joint_trajectory",
        "what it takes: trajectories, Float64MultiArray at the control rate, or Interbotix's "
        "JointGroupCommand (positions)",
        choices=OUTPUTS,
    )
    topic: str = parameter(
        "", "empty is <controller>/joint_trajectory, /commands or /commands/joint_group"
    )
    group: str = parameter("arm", "interbotix: the name of the joint group")

    def topic_of(self, name: str) -> str:
        """The topic that the commands of the controller `name` go out on."""
        return controller_topic(name, self.topic, self.output)


@dataclass(frozen=True)
class SimParameters:
    """Parameters of the node `aloha_sim`."""

    cameras: list[str] = parameter(
        ["cam_high", "cam_left_wrist", "cam_right_wrist"], "the cameras that it has"
    )
    active_cameras: list[str] = parameter(
        ["cam_high", "cam_left_wrist", "cam_right_wrist"],
        "the cameras that publish; may be changed at run time to try out failures",
    )
    width: int = parameter(640, "of the pictures, pixels", lower=16, upper=4096)
    height: int = parameter(480, "of the pictures, pixels", lower=16, upper=4096)
    camera_rate_hz: float = parameter(30.0, "rate of each camera", lower=0.1, upper=240.0)
    joint_rate_hz: float = parameter(100.0, "rate of joint_states", lower=1.0, upper=1000.0)
    seed: int = parameter(0, "seed of the cubes' places at the start and at ~/reset", lower=0)
    publish_clock: bool = parameter(
        False, "publish /clock and stamp with simulation time, for use_sim_time elsewhere"
    )


def joint_group(joints: Mapping[str, JointParameters]) -> JointGroup:
    """The commanded joints of `joints.*`, in the policy's order."""
    specs = []
    for name, joint in joints.items():
        try:
            specs.append(
                JointSpec(
                    name=name,
                    lower=joint.lower,
                    upper=joint.upper,
                    max_velocity=joint.max_velocity,
                    max_acceleration=joint.max_acceleration,
                    policy_scale=joint.policy_one - joint.policy_zero,
                    policy_offset=joint.policy_zero,
                    gripper=joint.gripper,
                )
            )
        except ValueError as error:
            raise ParameterError(f"parameters 'joints.{name}.*': {error}") from error
    return JointGroup(specs)


def controller_columns(
    controllers: Mapping[str, ControllerParameters], joints: JointGroup
) -> dict[str, list[int]]:
    """Controller name → columns of its joints; every joint belongs to exactly one controller."""
    columns: dict[str, list[int]] = {}
    owner: dict[str, str] = {}
    for controller, parameters in controllers.items():
        for name in parameters.joints:
            key = f"parameter 'controllers.{controller}.joints'"
            if name not in joints.names:
                raise ParameterError(f"{key}: {name!r} is not in joints.names {joints.names}")
            if name in owner:
                raise ParameterError(f"{key}: {name!r} belongs to {owner[name]!r} already")
            owner[name] = controller
        columns[controller] = [joints.names.index(name) for name in parameters.joints]
    orphans = [name for name in joints.names if name not in owner]
    if orphans:
        raise ParameterError(f"no controller commands {orphans}; add them to controllers.*.joints")
    return columns


def markdown() -> str:
    """The parameters as the tables of docs/parameters.md."""
    sections = [
        ("Node `policy`", "", PolicyParameters),
        ("Scheduler, docs/scheduling.md says which when", "scheduler.", SchedulerParameters),
        ("When something is wrong, docs/reliability.md", "faults.", FaultParameters),
        ("Where the joints' limits come from", "limits.", LimitsParameters),
        ("Guidance of the sampler", "guidance.", GuidanceParameters),
        ("Cameras, one block for each of `cameras.names`", "cameras.<name>.", CameraParameters),
        ("Joints, one block for each of `joints.names`", "joints.<name>.", JointParameters),
        (
            "Controllers, one block for each of `controllers.names`",
            "controllers.<name>.",
            ControllerParameters,
        ),
        ("Node `aloha_sim`", "", SimParameters),
    ]
    lines = ["# Parameters", "", "Generated by `python -m pi05_ros.nodes.parameters`.", ""]
    for title, prefix, declaration in sections:
        lines += [f"## {title}", "", "| parameter | default | range | what |", "|---|---|---|---|"]
        for entry in fields_of(declaration):
            meta = entry.metadata
            default = (
                entry.default_factory()
                if entry.default_factory is not dataclasses.MISSING
                else entry.default
            )
            bounds = " / ".join(meta["choices"])
            if meta["lower"] is not None:
                bounds = f"{meta['lower']} … {'' if meta['upper'] is None else meta['upper']}"
            shown = "" if default in ("", [""]) else f"`{default}`"
            lines.append(f"| `{prefix}{entry.name}` | {shown} | {bounds} | {meta['description']} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown(), end="")
