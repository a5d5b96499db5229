"""Joint limits from a URDF, laid over those that a robot's parameters give.

Sources: the URDF's joint element (`limit`, `safety_controller`), and the `command_interface`
parameters `min` and `max` of ros2_control's joints.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from xml.etree import ElementTree

from pi05_ros.types import JointGroup, JointSpec

MAX_CHARS = 16 * 2**20
BOUNDED = ("revolute", "prismatic")
MOVABLE = (*BOUNDED, "continuous")
INTERFACES = ("position", "velocity", "acceleration")


class UrdfError(ValueError):
    """A URDF that cannot be used for its limits; one line names the joint and the remedy."""


@dataclass(frozen=True)
class UrdfLimits:
    """What a URDF says of one joint, in rad or m; infinite where it says nothing."""

    lower: float = -math.inf
    upper: float = math.inf
    max_velocity: float = math.inf
    max_acceleration: float = math.inf

    def and_also(self, other: UrdfLimits) -> UrdfLimits:
        """What both allow."""
        return UrdfLimits(
            max(self.lower, other.lower),
            min(self.upper, other.upper),
            min(self.max_velocity, other.max_velocity),
            min(self.max_acceleration, other.max_acceleration),
        )


def read_urdf_limits(text: str, names: Iterable[str]) -> dict[str, UrdfLimits]:
    """The limits of the joints `names`: what all places that speak of a joint allow together.

    Position and velocity come from `limit` (no position for a continuous joint), the soft limits of
    `safety_controller` where they are given, and ros2_control's command interfaces, unless
    `<limits enable="false"/>` takes one out. What is said of other joints is not read.

    Raises:
        UrdfError: not a URDF, with a document type declaration, or a joint of `names` is missing,
            given twice, of a type that does not move, or has a limit that is none.
    """
    robot = _root(text)
    joints: dict[str, ElementTree.Element] = {}
    wanted = list(names)
    for joint in robot.findall("joint"):
        name = joint.get("name", "")
        if name in joints and name in wanted:
            raise UrdfError(f"the URDF has joint {name!r} twice")
        joints[name] = joint
    missing = [name for name in wanted if name not in joints]
    if missing:
        raise UrdfError(
            f"the URDF has no joint {', '.join(map(repr, missing))}; correct joints.names or the "
            "URDF, or set limits.source to params"
        )
    limits = {name: _joint_limits(name, joints[name]) for name in wanted}
    for joint in robot.findall("ros2_control/joint"):
        name = joint.get("name", "")
        if name in limits:
            limits[name] = limits[name].and_also(_interface_limits(name, joint))
    for name, joint_limits in limits.items():
        if joint_limits.lower >= joint_limits.upper:
            raise UrdfError(
                f"joint {name!r}: the URDF's limits leave {joint_limits.lower:g} to "
                f"{joint_limits.upper:g}, lower must be below upper"
            )
    return limits


def tightened(joints: JointGroup, limits: Mapping[str, UrdfLimits]) -> JointGroup:
    """The joints with what both they and `limits` allow; a wider URDF widens nothing.

    Raises:
        UrdfError: the two leave a joint no room.
    """
    return JointGroup([_tightened(joint, limits[joint.name]) for joint in joints.joints])


def _tightened(joint: JointSpec, limits: UrdfLimits) -> JointSpec:
    lower, upper = max(joint.lower, limits.lower), min(joint.upper, limits.upper)
    if lower >= upper:
        raise UrdfError(
            f"joint {joint.name!r}: the parameters allow {joint.lower:g} to {joint.upper:g}, the "
            f"URDF {limits.lower:g} to {limits.upper:g}, which leaves nothing; are both in rad or "
            "m, with the same zero?"
        )
    return dataclasses.replace(
        joint,
        lower=lower,
        upper=upper,
        max_velocity=min(joint.max_velocity, limits.max_velocity),
        max_acceleration=min(joint.max_acceleration, limits.max_acceleration),
    )


def _root(text: str) -> ElementTree.Element:
    if len(text) > MAX_CHARS:
        raise UrdfError(f"the URDF has {len(text)} characters, the limit is {MAX_CHARS}")
    # entities, which grow exponentially or read files, need a declaration; no URDF does
    if "<!DOCTYPE" in text:
        raise UrdfError("the URDF has a document type declaration, remove <!DOCTYPE …>")
    try:
        root = ElementTree.fromstring(text)
    except (ElementTree.ParseError, ValueError) as error:
        raise UrdfError(f"the URDF is not XML: {error}") from None
    if root.tag != "robot":
        raise UrdfError(f"the URDF's first element is <{root.tag[:40]}>, not <robot>")
    return root


def _joint_limits(name: str, joint: ElementTree.Element) -> UrdfLimits:
    kind = joint.get("type", "")
    if kind not in MOVABLE:
        raise UrdfError(
            f"joint {name!r} is of type {kind[:40]!r} in the URDF; commanded joints are "
            f"{', '.join(MOVABLE)}"
        )
    limit = joint.find("limit")
    if limit is None:
        if kind in BOUNDED:
            raise UrdfError(f"joint {name!r} has no <limit> in the URDF, which {kind} ones need")
        return UrdfLimits()
    velocity = _number(name, limit, "velocity", math.inf)
    if velocity <= 0:
        raise UrdfError(
            f"joint {name!r}: velocity {velocity:g} in the URDF is no limit to move within; give "
            "the real one or set limits.source to params"
        )
    if kind not in BOUNDED:
        return UrdfLimits(max_velocity=velocity)
    # both are 0 where they are left out
    hard = UrdfLimits(_number(name, limit, "lower", 0.0), _number(name, limit, "upper", 0.0))
    return hard.and_also(_soft_limits(name, joint)).and_also(UrdfLimits(max_velocity=velocity))


def _soft_limits(name: str, joint: ElementTree.Element) -> UrdfLimits:
    """Those that are written: one that is left out would be 0, which nobody means."""
    safety = joint.find("safety_controller")
    if safety is None:
        return UrdfLimits()
    return UrdfLimits(
        _number(name, safety, "soft_lower_limit", -math.inf),
        _number(name, safety, "soft_upper_limit", math.inf),
    )


def _interface_limits(name: str, joint: ElementTree.Element) -> UrdfLimits:
    limits = UrdfLimits()
    if _disabled(joint):
        return limits
    for interface in joint.findall("command_interface"):
        kind = interface.get("name", "")
        if kind not in INTERFACES or _disabled(interface):
            continue
        low, high = -math.inf, math.inf
        for param in interface.findall("param"):
            where = f"{kind} {param.get('name', '')[:40]}"
            if param.get("name") == "min":
                low = _parsed(name, where, param.text or "")
            elif param.get("name") == "max":
                high = _parsed(name, where, param.text or "")
        if kind == "position":
            limits = limits.and_also(UrdfLimits(low, high))
            continue
        size = min(high, -low)
        if size <= 0:
            raise UrdfError(f"joint {name!r}: {kind} from {low:g} to {high:g} in ros2_control")
        limits = limits.and_also(UrdfLimits(**{f"max_{kind}": size}))
    return limits


def _disabled(element: ElementTree.Element) -> bool:
    limits = element.find("limits")
    return limits is not None and limits.get("enable", "true").lower() == "false"


def _number(name: str, element: ElementTree.Element, key: str, default: float) -> float:
    text = element.get(key)
    return default if text is None else _parsed(name, f"{element.tag} {key}", text)


def _parsed(name: str, where: str, text: str) -> float:
    try:
        # Python's float takes 1_000 too
        value = float(text.replace("_", "?"))
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UrdfError(f"joint {name!r}: {where} is {text[:40]!r} in the URDF, not a number")
    return value
