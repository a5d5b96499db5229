"""The node's params file, read without ROS: joints, controllers and control settings."""

from __future__ import annotations

import os
import reprlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import yaml

from pi05_ros.control.ensemble import Guard
from pi05_ros.control.replan import Replan
from pi05_ros.control.scheduler import ChunkScheduler, make_scheduler
from pi05_ros.observation.buffer import Gates
from pi05_ros.types import JointGroup, JointSpec

T = TypeVar("T", bound=object)

MAX_ERROR_CHARS = 500


class RobotConfigError(ValueError):
    """A params file that cannot be used; one line names the key and the remedy."""

    def __init__(self, text: str) -> None:
        super().__init__(text if len(text) <= MAX_ERROR_CHARS else text[:MAX_ERROR_CHARS] + " …")


@dataclass(frozen=True)
class SchedulerConfig:
    """Parameters `scheduler.*` of the policy node, with its defaults."""

    method: str = "temporal_ensemble"
    ensemble_m: float = 0.01
    ensemble_order: str = "oldest_first"
    ensemble_max_chunks: int = 16
    guard_disagreement: float = 0.2
    guard_crossover_s: float = 0.2
    guard_confirmations: int = 2
    blend_old_share: float = 0.3
    newest_only: tuple[str, ...] = ()
    replan: str = "free"
    replan_steps: int = 10
    replan_remaining_s: float = 0.3
    replan_interval_s: float = 0.0
    speed_scale: float = 1.0
    smoothing_hz: float = 0.0

    def make(self, joints: JointGroup) -> ChunkScheduler:
        """The scheduler that these parameters describe.

        Raises:
            ValueError: a value is out of range.
        """
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
class ControlConfig:
    """Parameters of the policy node that decide how targets become motion, with its defaults."""

    control_rate_hz: float = 50.0
    lookahead_s: float = 0.2
    lead_s: float = 0.03
    position_margin: float = 0.02
    max_image_age_s: float = 0.2
    max_skew_s: float = 0.05
    max_joint_age_s: float = 0.1

    @property
    def dt_s(self) -> float:
        """Of a control tick."""
        return 1.0 / self.control_rate_hz

    @property
    def gates(self) -> Gates:
        return Gates(self.max_image_age_s, self.max_skew_s, self.max_joint_age_s)


@dataclass(frozen=True)
class RobotConfig:
    """A robot as its params file describes it."""

    joints: JointGroup
    controllers: dict[str, list[int]]
    """Controller → columns of its joints in `joints`."""
    control: ControlConfig
    scheduler: SchedulerConfig
    camera_rate_hz: float = 30.0
    """Of the simulated cameras."""


def default_params_file() -> Path:
    """`config/aloha.yaml` of the checkout that the package runs from, or as it was installed.

    Raises:
        RobotConfigError: there is none.
    """
    prefixes = [*filter(None, os.environ.get("AMENT_PREFIX_PATH", "").split(os.pathsep))]
    shares = [Path(prefix) / "share" / "pi05_ros" for prefix in (*prefixes, sys.prefix)]
    for folder in (Path(__file__).parents[2], *shares):
        file = folder / "config" / "aloha.yaml"
        if file.is_file():
            return file
    raise RobotConfigError("config/aloha.yaml is not installed; give --params-file")


def read_robot_config(path: str | Path | None = None) -> RobotConfig:
    """Read a params file.

    Args:
        path: the file; None is `default_params_file`.

    Raises:
        RobotConfigError: not there, not YAML, or a key is missing or of the wrong type.
    """
    file = default_params_file() if path is None else Path(path)
    try:
        document = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise RobotConfigError(f"{file} cannot be read: {error.strerror}") from None
    except Exception as error:
        # beside YAMLError what int(), dates and UTF-8 raise for bad values, and RecursionError
        raise RobotConfigError(
            f"{file} is not valid YAML: {' '.join(str(error).split())}"
        ) from None
    try:
        return _parse(document)
    except (ValueError, TypeError, OverflowError) as error:
        raise RobotConfigError(f"{file}: {error}") from None


def _parse(document: object) -> RobotConfig:
    nodes = [
        _mapping(node, "ros__parameters")
        for node in (document.values() if isinstance(document, Mapping) else ())
        if isinstance(node, Mapping) and "ros__parameters" in node
    ]
    policy = next((node for node in nodes if "joints" in node), None)
    if policy is None:
        raise ValueError("no node has ros__parameters with joints")
    simulator = next((node for node in nodes if "camera_rate_hz" in node), {})
    joints = _joints(_mapping(policy, "joints"))
    camera_rate_hz = _number(simulator, "camera_rate_hz", 30.0)
    if camera_rate_hz <= 0:
        raise ValueError(f"camera_rate_hz must be above 0, got {camera_rate_hz}")
    controllers = _controllers(_mapping(policy, "controllers"), joints)
    control = _read(ControlConfig(), policy)
    if control.control_rate_hz <= 0:
        raise ValueError(f"control_rate_hz must be above 0, got {control.control_rate_hz}")
    block = _mapping(policy, "scheduler") if "scheduler" in policy else {}
    scheduler = _read(SchedulerConfig(), block, "scheduler.")
    try:
        scheduler.make(joints)
    except ValueError as error:
        raise ValueError(f"scheduler: {error}") from None
    return RobotConfig(joints, controllers, control, scheduler, camera_rate_hz)


def _joints(block: Mapping[str, Any]) -> JointGroup:
    specs = []
    for name in _names(block, "joints"):
        joint = _mapping(block, name, "joints.")
        try:
            zero = _number(joint, "policy_zero", 0.0)
            specs.append(
                JointSpec(
                    name=name,
                    lower=_number(joint, "lower"),
                    upper=_number(joint, "upper"),
                    max_velocity=_number(joint, "max_velocity"),
                    max_acceleration=_number(joint, "max_acceleration"),
                    policy_scale=_number(joint, "policy_one", 1.0) - zero,
                    policy_offset=zero,
                    gripper=bool(joint.get("gripper", False)),
                )
            )
        except ValueError as error:
            raise ValueError(f"joints.{name}: {error}") from None
    return JointGroup(specs)


def _controllers(block: Mapping[str, Any], joints: JointGroup) -> dict[str, list[int]]:
    columns: dict[str, list[int]] = {}
    for name in _names(block, "controllers"):
        commanded = _mapping(block, name, "controllers.").get("joints")
        if not isinstance(commanded, list) or not set(commanded) <= set(joints.names):
            raise ValueError(
                f"controllers.{name}.joints must be a list of joints.names, got {_shown(commanded)}"
            )
        columns[name] = [joints.names.index(joint) for joint in commanded]
    if sorted(chain.from_iterable(columns.values())) != list(range(len(joints))):
        raise ValueError("every joint must belong to exactly one of controllers.*.joints")
    return columns


def _read(defaults: T, block: Mapping[str, Any], prefix: str = "") -> T:
    """The values of a block over the defaults, of the same types."""
    values: dict[str, Any] = {}
    for name, default in vars(defaults).items():
        value = block.get(name, default)
        valid, kind = type(value) is type(default), f"of type {type(default).__name__}"
        if isinstance(default, float):
            valid, kind = type(value) in (int, float), "a number"
        elif isinstance(default, tuple):
            valid, kind = isinstance(value, (list, tuple)), "a list of names"
            value = tuple(str(each) for each in value if each) if valid else value
        if not valid:
            raise ValueError(f"{prefix}{name} must be {kind}, got {_shown(value)}")
        values[name] = float(value) if isinstance(default, float) else value
    return type(defaults)(**values)


def _names(block: Mapping[str, Any], where: str) -> list[str]:
    names = block.get("names")
    if not isinstance(names, list) or not names:
        raise ValueError(f"{where}.names must be a list, got {_shown(names)}")
    return [str(name) for name in names]


def _mapping(parent: Mapping[str, Any], key: str, prefix: str = "") -> Mapping[str, Any]:
    value = parent.get(key)
    if not isinstance(value, Mapping):
        kind = "nothing" if value is None else f"a {type(value).__name__}"
        raise ValueError(f"{prefix}{key} must be a block of parameters, got {kind}")
    return value


def _number(block: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = block.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{key} must be a number, got {_shown(value)}")
    return float(value)


def _shown(value: object) -> str:
    """A value for an error: YAML's aliases make few lines into a text of gigabytes."""
    short = reprlib.Repr()
    short.maxlevel = 2
    return short.repr(value)
