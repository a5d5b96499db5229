"""Every parameter of the nodes, declared once: name, type, default, range, unit, description.

Each block of parameters is a dataclass. `nodes/parameters.py` declares ROS parameters from its
fields, `robot_config.py` reads the same YAML into it, and `python -m pi05_ros.config` generates
`docs/parameters.md` from it. Cameras, joints and controllers are lists of names with a block of
parameters for each name.
"""

from __future__ import annotations

import dataclasses
import math
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from pi05_ros.control.chunks import REPLAN_MODES, Replan
from pi05_ros.control.scheduler import SCHEDULERS, ChunkScheduler, Guard, make_scheduler
from pi05_ros.control.speed import FIRST_COMMANDS
from pi05_ros.types import HEADS, JointGroup, JointSpec

ENSEMBLE_ORDERS = ("oldest_first", "newest_first")
LIMIT_SOURCES = ("params", "urdf")
OUTPUTS = {
    "joint_trajectory": "joint_trajectory",
    "forward_position": "commands",
    "forward_velocity": "commands",
    "interbotix": "commands/joint_group",
}
"""Output of a controller → the end of its default topic."""


class ParameterError(ValueError):
    """A parameter that is missing, unknown or out of range; the message names it."""


def parameter(
    default: Any,
    description: str,
    *,
    within: tuple[float | None, float | None] = (None, None),
    choices: Iterable[str] = (),
) -> Any:
    """A dataclass field that is a ROS parameter; `within`: its smallest and largest value."""
    metadata = {"description": description, "within": within, "choices": tuple(choices)}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def fields_of(declaration: type) -> Iterator[dataclasses.Field[Any]]:
    yield from dataclasses.fields(declaration)


def default_of(entry: dataclasses.Field[Any]) -> Any:
    factory = entry.default_factory
    return entry.default if factory is dataclasses.MISSING else factory()


def check_value(name: str, entry: dataclasses.Field[Any], value: object) -> None:
    """Raise ParameterError if a value of the declared type is no choice or out of range."""
    choices, (lower, upper) = entry.metadata["choices"], entry.metadata["within"]
    if choices and value not in choices:
        raise ParameterError(
            f"parameter {shown(name)} is {shown(value)}; it may be {', '.join(choices)}"
        )
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return
    fits = (lower is None or value >= lower) and (upper is None or value <= upper)
    # A whole number may be too large for isfinite.
    if not fits or (isinstance(value, float) and not math.isfinite(value)):
        until = "" if upper is None else f" to {upper:g}"
        allowed = "finite" if lower is None else f"from {lower:g}{until}"
        raise ParameterError(f"parameter {shown(name)} must be {allowed}, got {shown(value)}")


def shown(value: object) -> str:
    """Short form for a message: YAML aliases can turn a few lines into gigabytes of text."""
    short = reprlib.Repr()
    short.maxlevel = 2
    short.maxstring = short.maxother = 80
    return short.repr(value)


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
    head: str = parameter(
        "auto",
        "what predicts the actions: flow, the action expert; fast, the language model's next "
        "tokens; auto is the checkpoint's",
        choices=("auto", *HEADS),
    )
    execution: str = parameter(
        "auto",
        "auto: graphs on CUDA (compile with fp8_prefix), eager elsewhere; compile: fused kernels, "
        "minutes at the first start",
        choices=("auto", "eager", "graphs", "compile"),
    )
    fp8_prefix: bool = parameter(
        False, "run the prefix pass in 8-bit floats; needs a GPU and execution compile or auto"
    )
    realtime_priority: int = parameter(
        50,
        "SCHED_FIFO priority of the control thread, where the system grants it (rtprio in "
        "limits.conf); 0 leaves the scheduling as it is",
        within=(0, 99),
    )
    inference_nice: int = parameter(5, "nice value of the inference thread; Linux", within=(0, 19))
    num_steps: int = parameter(10, "Euler steps of the flow", within=(1, 100))
    seed: int = parameter(-1, "seed of the flow's noise; -1 takes a random one", within=(-1, None))
    threads: int = parameter(
        0, "CPU threads of the network; 0 leaves one core to the control loop", within=(0, 256)
    )
    load_timeout_s: float = parameter(
        600.0, "time limit of loading and warm-up in configure", within=(1.0, 86400.0)
    )
    autostart: bool = parameter(False, "configure and activate at the start")
    instruction: str = parameter("", "first instruction; empty waits for the topic")
    max_instruction_chars: int = parameter(
        300, "longer instructions are refused", within=(1, 10000)
    )
    dry_run: bool = parameter(False, "run without publishing trajectories")
    control_rate_hz: float = parameter(50.0, "rate of the control timer", within=(1.0, 1000.0))
    publish: str = parameter(
        "control_rate",
        "publish at the control rate, or when the plan changes or lookahead_s/2 has passed",
        choices=("control_rate", "on_change"),
    )
    lookahead_s: float = parameter(
        0.2,
        "part of a trajectory that follows the chunks, before its zero-velocity tail",
        within=(0.02, 2.0),
    )
    lead_s: float = parameter(
        0.03,
        "largest delay of a trajectory to its controller, one controller period included; changes "
        "take effect that much later",
        within=(0.0, 0.5),
    )
    position_margin: float = parameter(
        0.02,
        "distance of commands from position limits, share of the range; none for grippers",
        within=(0.0, 0.4),
    )
    max_image_age_s: float = parameter(
        0.2, "an older frame of a required camera stops inference", within=(0.001, 60.0)
    )
    max_skew_s: float = parameter(
        0.05, "largest time between the frames of one observation", within=(0.001, 60.0)
    )
    max_joint_age_s: float = parameter(
        0.1, "an older joint state stops inference", within=(0.001, 60.0)
    )
    status_rate_hz: float = parameter(1.0, "rate of ~/status and /diagnostics", within=(0.1, 50.0))


@dataclass(frozen=True)
class SchedulerParameters:
    """Parameters `scheduler.*`; all but smoothing_hz may be changed in motion."""

    method: str = parameter(
        "temporal_ensemble", "how overlapping chunks are combined", choices=SCHEDULERS
    )
    ensemble_m: float = parameter(
        0.01, "weight exp(-m*i) of the i-th chunk; 0 is the mean", within=(-10.0, 10.0)
    )
    ensemble_order: str = parameter("oldest_first", "the chunk with i = 0", choices=ENSEMBLE_ORDERS)
    ensemble_max_chunks: int = parameter(
        16, "at most this many chunks, the newest, are averaged", within=(1, 64)
    )
    guard_disagreement: float = parameter(
        0.2,
        "rad; a chunk whose RMS distance is above replaces the mean; 0 is off",
        within=(0.0, 10.0),
    )
    guard_crossover_s: float = parameter(
        0.2, "time of the transition to that chunk", within=(0.01, 2.0)
    )
    guard_confirmations: int = parameter(
        2, "disagreeing chunks in a row before the transition", within=(1, 10)
    )
    blend_old_share: float = parameter(0.3, "blend: share of the old trajectory", within=(0.0, 1.0))
    newest_only: list[str] = parameter(
        [""], "names of joints that are never averaged; grippers never are"
    )
    replan: str = parameter(
        "free",
        "when to infer again: when the executor is free, after replan_steps, or when at most "
        "replan_remaining_s is left; always before the chunks run out",
        choices=REPLAN_MODES,
    )
    replan_steps: int = parameter(10, "steps of a chunk between observations", within=(1, 1000))
    replan_remaining_s: float = parameter(
        0.3, "remaining time of the chunks when the next one arrives", within=(0.0, 10.0)
    )
    replan_interval_s: float = parameter(
        0.0, "shortest time between two observations", within=(0.0, 10.0)
    )
    speed_scale: float = parameter(
        1.0,
        "below 1 chunks are executed slower than predicted; at 0 the arms come to rest",
        within=(0.0, 1.0),
    )
    smoothing_hz: float = parameter(
        0.0,
        "cut-off of the low-pass before the limits, 0 is off; /diagnostics has its lag",
        within=(0.0, 50.0),
    )

    def make(self, joints: JointGroup) -> ChunkScheduler:
        """The scheduler that these parameters describe; ParameterError if they cannot be used."""
        for entry in fields_of(SchedulerParameters):
            check_value(f"scheduler.{entry.name}", entry, getattr(self, entry.name))
        unknown = sorted(set(self.newest_only) - {"", *joints.names})
        if unknown:
            raise ParameterError(f"parameter 'scheduler.newest_only': no joint is called {unknown}")
        return make_scheduler(
            self.method,
            gripper=[joint.gripper or joint.name in self.newest_only for joint in joints.joints],
            m=self.ensemble_m,
            newest_first=self.ensemble_order == "newest_first",
            max_chunks=self.ensemble_max_chunks,
            guard=Guard(self.guard_disagreement, self.guard_crossover_s, self.guard_confirmations),
            blend_old_share=self.blend_old_share,
            replan=Replan(
                self.replan, self.replan_steps, self.replan_remaining_s, self.replan_interval_s
            ),
        )


@dataclass(frozen=True)
class FaultParameters:
    """Parameters `faults.*`, read when the node is configured."""

    hang_timeout_s: float = parameter(
        2.0, "a longer inference is hung: ERROR, and its result is discarded", within=(0.05, 3600.0)
    )
    max_failures: int = parameter(
        3, "failed inferences in a row that deactivate the node", within=(1, 1000)
    )
    error_after_s: float = parameter(
        1.0, "a faulty stream is a WARN, after this time an ERROR", within=(0.0, 3600.0)
    )
    frozen_image_s: float = parameter(
        1.0,
        "a camera whose images stay equal to the byte this long is a WARN, after error_after_s "
        "more an ERROR that stops inference; 0 is off, for a simulator without noise",
        within=(0.0, 3600.0),
    )
    refuse_one_colour: bool = parameter(
        True,
        "a camera whose images have one colour is a WARN, after error_after_s an ERROR that stops "
        "inference",
    )
    first_command: str = parameter(
        "ramp",
        "a first command far from the measured joints: approach it slowly, or refuse it",
        choices=FIRST_COMMANDS,
    )
    first_command_distance: float = parameter(
        0.5, "rad or m; a larger distance is far; grippers excepted", within=(0.0, 10.0)
    )
    first_command_speed: float = parameter(
        0.25, "ramp: share of the velocity limits", within=(0.01, 1.0)
    )
    start_states: int = parameter(
        5,
        "successive joint states, spanning at least 0.05 s, that must agree before a motion starts",
        within=(2, 20),
    )
    start_tolerance: float = parameter(
        0.03,
        "distance outside its limits that a joint may have at a start, share of its range",
        within=(0.0, 0.5),
    )
    tracking_time_s: float = parameter(
        0.5,
        "a joint farther from its command than joints.<name>.max_tracking_error is a WARN; after "
        "this time the arms brake and wait for ~/resume. Missing joint states end a motion after "
        "the same time. 0 switches both off",
        within=(0.0, 60.0),
    )
    speed_ramp_s: float = parameter(
        0.5, "duration of a change of scheduler.speed_scale from 0 to 1", within=(0.0, 10.0)
    )
    new_instruction: str = parameter(
        "replace",
        "replace: the first chunk of a new instruction replaces the old chunks, and a running "
        "inference is discarded; blend: the scheduler merges both until the old ones end",
        choices=("replace", "blend"),
    )


@dataclass(frozen=True)
class LimitsParameters:
    """Parameters `limits.*`, read when the node is configured."""

    source: str = parameter(
        "params",
        "params: joints.*.lower, upper, max_velocity, max_acceleration; urdf: the tighter of these "
        "and the URDF's",
        choices=LIMIT_SOURCES,
    )
    topic: str = parameter(
        "robot_description", "urdf: topic of the latched String from robot_state_publisher"
    )
    timeout_s: float = parameter(
        5.0, "urdf: time limit of waiting for it in configure", within=(0.1, 600.0)
    )


@dataclass(frozen=True)
class GuidanceParameters:
    """Parameters `guidance.*`, for scheduler.method rtc."""

    method: str = parameter(
        "identity",
        "identity: correction by the error itself (LeRobot); vjp: by the error pulled back through "
        "the network (the paper), slower; trained: clean prefix, for checkpoints trained with it",
        choices=("identity", "vjp", "trained"),
    )
    schedule: str = parameter(
        "exp", "decay of the weight of the old chunk", choices=("zeros", "ones", "linear", "exp")
    )
    execution_horizon: int = parameter(
        0, "steps of the old chunk with a weight; 0 is all that remain", within=(0, 1000)
    )
    max_weight: float = parameter(10.0, "upper bound of the guidance gain", within=(0.0, 1000.0))


@dataclass(frozen=True)
class CameraParameters:
    """Parameters `cameras.<name>.*`."""

    topic: str = parameter("", "image topic; empty is <name>/image_raw")
    transport: str = parameter(
        "raw", "compressed takes <topic>/compressed", choices=("raw", "compressed")
    )
    required: bool = parameter(True, "no inference without its images; else it is masked")

    def topic_of(self, name: str) -> str:
        """The topic that is subscribed to for the camera `name`."""
        raw = self.topic or f"{name}/image_raw"
        return f"{raw}/compressed" if self.transport == "compressed" else raw


@dataclass(frozen=True)
class JointParameters:
    """Parameters `joints.<name>.*`, in the controller's units: rad, or m for a gripper's finger."""

    lower: float = parameter(0.0, "lower position limit, rad or m")
    upper: float = parameter(0.0, "upper position limit, rad or m")
    max_velocity: float = parameter(0.0, "velocity limit, rad/s or m/s")
    max_acceleration: float = parameter(0.0, "acceleration limit, rad/s2 or m/s2")
    policy_zero: float = parameter(0.0, "position at the policy's 0")
    policy_one: float = parameter(1.0, "position at the policy's 1")
    gripper: bool = parameter(False, "taken from the newest chunk, never averaged")
    max_tracking_error: float = parameter(
        0.0,
        "rad or m; largest distance of the joint from its command. Set it for arms that lag by "
        "more than 0.15 s. 0: the distance at max_velocity in the measured delay plus 0.045 s, at "
        "least 2 % of the range; no limit for grippers",
        within=(0.0, 100.0),
    )


@dataclass(frozen=True)
class ControllerParameters:
    """Parameters `controllers.<name>.*`."""

    joints: list[str] = parameter([""], "joints of the controller, in its order")
    output: str = parameter(
        "joint_trajectory",
        "message type: trajectories, Float64MultiArray at the control rate, or Interbotix's "
        "JointGroupCommand (positions)",
        choices=OUTPUTS,
    )
    topic: str = parameter(
        "", "empty is <controller>/joint_trajectory, /commands or /commands/joint_group"
    )
    group: str = parameter("arm", "interbotix: name of the joint group")
    node: str = parameter(
        "", "node that must subscribe before motion; empty accepts any but recorders and viewers"
    )

    def topic_of(self, name: str) -> str:
        """The topic that the commands of the controller `name` go out on."""
        return self.topic or f"{name}/{OUTPUTS[self.output]}"


@dataclass(frozen=True)
class SimParameters:
    """Parameters of the node `aloha_sim`."""

    cameras: list[str] = parameter(["cam_high", "cam_left_wrist", "cam_right_wrist"], "cameras")
    active_cameras: list[str] = parameter(
        ["cam_high", "cam_left_wrist", "cam_right_wrist"],
        "cameras that publish; may be changed at run time to test failures",
    )
    width: int = parameter(640, "of the images, pixels", within=(16, 4096))
    height: int = parameter(480, "of the images, pixels", within=(16, 4096))
    camera_rate_hz: float = parameter(30.0, "rate of each camera", within=(0.1, 240.0))
    joint_rate_hz: float = parameter(100.0, "rate of joint_states", within=(1.0, 1000.0))
    seed: int = parameter(
        0, "seed of the cube positions at the start and at ~/reset", within=(0, None)
    )
    publish_clock: bool = parameter(
        False, "publish /clock and stamp with simulation time, for nodes with use_sim_time"
    )


def joint_group(joints: Mapping[str, JointParameters]) -> JointGroup:
    """Commanded joints of `joints.*`, in the policy's order."""
    specs = []
    for name, joint in joints.items():
        values = vars(joint).copy()
        zero, one = values.pop("policy_zero"), values.pop("policy_one")
        try:
            spec = JointSpec(name, policy_scale=one - zero, policy_offset=zero, **values)
        except ValueError as error:
            raise ParameterError(f"parameters 'joints.{name}.*': {error}") from error
        specs.append(spec)
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
        ("Scheduler, see docs/scheduling.md", "scheduler.", SchedulerParameters),
        ("Faults, see docs/reliability.md", "faults.", FaultParameters),
        ("Source of the joint limits", "limits.", LimitsParameters),
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
    lines = ["# Parameters", "", "Generated by `python -m pi05_ros.config`.", ""]
    for title, prefix, declaration in sections:
        lines += [
            f"## {title}",
            "",
            "| parameter | default | range | meaning |",
            "|---|---|---|---|",
        ]
        for entry in fields_of(declaration):
            lower, upper = entry.metadata["within"]
            bounds = " / ".join(entry.metadata["choices"])
            if lower is not None:
                bounds = f"{lower} … {'' if upper is None else upper}"
            default = default_of(entry)
            value = "" if default in ("", [""]) else f"`{default}`"
            text = entry.metadata["description"]
            lines.append(f"| `{prefix}{entry.name}` | {value} | {bounds} | {text} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown(), end="")
