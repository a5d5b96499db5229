"""Reads the policy node's params file into the dataclasses of `pi05_ros.config`, without ROS.

Types, ranges, choices and unknown names are checked as in the node.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

from pi05_ros.config import (
    CameraParameters,
    ControllerParameters,
    FaultParameters,
    GuidanceParameters,
    JointParameters,
    LimitsParameters,
    PolicyParameters,
    SchedulerParameters,
    SimParameters,
    check_value,
    controller_columns,
    default_of,
    fields_of,
    joint_group,
    shown,
)
from pi05_ros.control.urdf import UrdfError, intersect_limits, read_urdf_limits
from pi05_ros.observation.buffer import Gates
from pi05_ros.types import JointGroup

T = TypeVar("T")

MAX_ERROR_CHARS = 500
MAX_ENTRIES = 10_000
"""Of one file; YAML aliases can turn a few lines into more entries than fit in memory."""
MAX_DEPTH = 20
_OF_ROS = ("use_sim_time", "start_type_description_service", "qos_overrides")
"""Parameters of every ROS node; the last one is a prefix."""
_KINDS = {
    "str": ("text", str),
    "bool": ("true or false", bool),
    "int": ("a whole number", int),
    "float": ("a number with a decimal point", float),
    "list[str]": ("a list of names", list),
}


class RobotConfigError(ValueError):
    """A params file that cannot be used; one line names the parameter and the remedy."""

    def __init__(self, text: str) -> None:
        super().__init__(text if len(text) <= MAX_ERROR_CHARS else text[:MAX_ERROR_CHARS] + " …")


@dataclass(frozen=True)
class RobotConfig:
    """The contents of a params file."""

    parameters: PolicyParameters
    scheduler: SchedulerParameters
    faults: FaultParameters
    limits: LimitsParameters
    guidance: GuidanceParameters
    cameras: dict[str, CameraParameters]
    joints: JointGroup
    """With the limits of the URDF, if one was read."""
    controllers: dict[str, ControllerParameters]
    columns: dict[str, list[int]]
    """Controller → columns of its joints in `joints`."""
    camera_rate_hz: float = 30.0
    """Of the simulated cameras."""
    urdf: str = ""
    """File whose limits are in `joints`."""

    @property
    def dt_s(self) -> float:
        """Of a control tick."""
        return 1.0 / self.parameters.control_rate_hz

    @property
    def gates(self) -> Gates:
        """Limits of age and skew, as in the node's runner."""
        return Gates(
            max_image_age_s=self.parameters.max_image_age_s,
            max_skew_s=self.parameters.max_skew_s,
            max_joint_age_s=self.parameters.max_joint_age_s,
            max_instruction_chars=self.parameters.max_instruction_chars,
        )

    def check_limits(self) -> None:
        """Raise RobotConfigError if the limits come from a URDF and none was read."""
        if self.limits.source == "urdf" and not self.urdf:
            raise RobotConfigError(
                "limits.source is urdf: give the robot's URDF with --urdf FILE (xacro expanded), "
                "or set limits.source to params"
            )


def default_params_file() -> Path:
    """`config/aloha.yaml` of the checkout or of the installation.

    Raises:
        RobotConfigError: neither has it.
    """
    prefixes = [*filter(None, os.environ.get("AMENT_PREFIX_PATH", "").split(os.pathsep))]
    shares = [Path(prefix) / "share" / "pi05_ros" for prefix in (*prefixes, sys.prefix)]
    for folder in (Path(__file__).parents[1], *shares):
        file = folder / "config" / "aloha.yaml"
        if file.is_file():
            return file
    raise RobotConfigError("config/aloha.yaml is not installed; give --params-file")


def read_robot_config(
    path: str | Path | None = None, urdf: str | Path | None = None
) -> RobotConfig:
    """Read a params file.

    Args:
        path: the file; None is `default_params_file`.
        urdf: the text that the node gets on `limits.topic`, as a file; for limits.source urdf.

    Raises:
        RobotConfigError: the file is missing or not YAML; a parameter is missing, unknown, of the
            wrong type or out of range; or the URDF does not fit.
    """
    file = default_params_file() if path is None else Path(path)
    try:
        document = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise RobotConfigError(f"{file} cannot be read: {error.strerror}") from None
    except Exception as error:
        # YAMLError, errors of int(), dates and UTF-8 for bad values, and RecursionError.
        raise RobotConfigError(
            f"{file} is not valid YAML: {' '.join(str(error).split())}"
        ) from None
    try:
        config = _parse(document)
    except (ValueError, TypeError, OverflowError) as error:
        raise RobotConfigError(f"{file}: {' '.join(str(error).split())}") from None
    return config if urdf is None else _with_urdf(config, Path(urdf), file)


def _with_urdf(config: RobotConfig, urdf: Path, file: Path) -> RobotConfig:
    if config.limits.source != "urdf":
        raise RobotConfigError(
            f"{file}: limits.source is {config.limits.source}, so the node reads no URDF; leave "
            "--urdf out or set limits.source to urdf"
        )
    try:
        text = urdf.read_text(encoding="utf-8")
        joints = intersect_limits(config.joints, read_urdf_limits(text, config.joints.names))
    except OSError as error:
        raise RobotConfigError(f"{urdf} cannot be read: {error.strerror}") from None
    except (UrdfError, UnicodeDecodeError) as error:
        raise RobotConfigError(f"{urdf}: {error}") from None
    return dataclasses.replace(config, joints=joints, urdf=str(urdf))


def _parse(document: object) -> RobotConfig:
    blocks = [
        _Block(node["ros__parameters"])
        for node in (document.values() if isinstance(document, Mapping) else ())
        if isinstance(node, Mapping) and "ros__parameters" in node
    ]
    policy = next((block for block in blocks if block.has("joints.")), None)
    if policy is None:
        raise ValueError("no node has ros__parameters with joints")
    simulator = next((block for block in blocks if block.has("camera_rate_hz")), _Block({}))
    config = make_robot_config(policy.read, policy.read_named)
    config.scheduler.make(config.joints)
    policy.check_all_known()
    rate = next(entry for entry in fields_of(SimParameters) if entry.name == "camera_rate_hz")
    return dataclasses.replace(config, camera_rate_hz=simulator.value(rate, ""))


def make_robot_config(
    read: Callable[[type[Any], str], Any], read_named: Callable[[str, type[Any]], dict[str, Any]]
) -> RobotConfig:
    """The configuration of the parameters that `read` and `read_named` return.

    Args:
        read: dataclass and prefix → an instance with the values of the parameters.
        read_named: group and dataclass → name → an instance for each of `<group>.names`.
    """
    joints = joint_group(read_named("joints", JointParameters))
    controllers = read_named("controllers", ControllerParameters)
    return RobotConfig(
        parameters=read(PolicyParameters, ""),
        scheduler=read(SchedulerParameters, "scheduler."),
        faults=read(FaultParameters, "faults."),
        limits=read(LimitsParameters, "limits."),
        guidance=read(GuidanceParameters, "guidance."),
        cameras=read_named("cameras", CameraParameters),
        joints=joints,
        controllers=controllers,
        columns=controller_columns(controllers, joints),
    )


class _Block:
    """Parameters of one node by full name: nested blocks and dotted names are equal."""

    def __init__(self, parameters: object) -> None:
        self._values: dict[str, object] = {}
        self._known: set[str] = set()
        self._entries = 0
        if not isinstance(parameters, Mapping):
            raise ValueError(f"ros__parameters must be a block, got {shown(parameters)}")
        self._flatten(parameters, "", 0)

    def _flatten(self, block: Mapping[Any, Any], prefix: str, depth: int) -> None:
        if depth > MAX_DEPTH:
            raise ValueError(f"parameters are nested more than {MAX_DEPTH} deep")
        for key, value in block.items():
            self._entries += 1
            if self._entries > MAX_ENTRIES:
                raise ValueError(f"more than {MAX_ENTRIES} parameters")
            if not isinstance(key, str):
                raise ValueError(f"parameter names must be text, got {shown(key)}")
            name = prefix + key
            if isinstance(value, Mapping):
                self._flatten(value, f"{name}.", depth + 1)
            elif name in self._values:
                raise ValueError(f"parameter {shown(name)} is given twice")
            else:
                self._values[name] = value

    def has(self, prefix: str) -> bool:
        return any(name.startswith(prefix) for name in self._values)

    def read(self, declaration: type[T], prefix: str) -> T:
        """Read the parameters below a prefix; the defaults fill the rest."""
        values = {entry.name: self.value(entry, prefix) for entry in fields_of(declaration)}
        return declaration(**values)

    def read_named(self, group: str, declaration: type[T]) -> dict[str, T]:
        """Read `<group>.names` and the block of parameters of each name."""
        key = f"{group}.names"
        self._known.add(key)
        names = self._values.get(key)
        if not isinstance(names, list) or not names or not all(_is_name(name) for name in names):
            raise ValueError(f"parameter '{key}' must be a list of names, got {shown(names)}")
        if len(set(names)) != len(names):
            raise ValueError(f"parameter '{key}' repeats a name: {shown(names)}")
        return {name: self.read(declaration, f"{group}.{name}.") for name in names}

    def value(self, entry: dataclasses.Field[Any], prefix: str) -> Any:
        """Check and return one parameter, or its default."""
        name = prefix + entry.name
        self._known.add(name)
        if name not in self._values:
            return default_of(entry)
        value = self._values[name]
        what, kind = _KINDS[str(entry.type)]
        if type(value) is not kind or not _are_names(value):
            raise ValueError(f"parameter {shown(name)} must be {what}, got {shown(value)}")
        check_value(name, entry, value)
        return value

    def check_all_known(self) -> None:
        """Raise ValueError for an unknown name."""
        for name in self._values:
            if name in self._known or name.startswith(_OF_ROS):
                continue
            near = difflib.get_close_matches(name[:200], sorted(self._known), 1)
            hint = f"did you mean {near[0]!r}?" if near else "docs/parameters.md lists them"
            raise ValueError(f"parameter {shown(name)} is unknown; {hint}")


def _are_names(value: object) -> bool:
    """Whether a list has strings only; True for other types."""
    return not isinstance(value, list) or all(isinstance(each, str) for each in value)


def _is_name(value: object) -> bool:
    return isinstance(value, str) and bool(value)
