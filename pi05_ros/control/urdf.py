"""Joint limits from a URDF, intersected with those of the robot's parameters.

Sources: the URDF's joint element (`limit`, `safety_controller`), and the parameters `min` and `max`
of ros2_control's command interfaces.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from xml.etree.ElementTree import Element, ParseError

from defusedxml.common import DefusedXmlException
from defusedxml.ElementTree import fromstring

from pi05_ros.types import JointGroup

MAX_CHARS = 16 * 2**20
BOUNDED = ("revolute", "prismatic")
MOVABLE = (*BOUNDED, "continuous")
INTERFACES = ("position", "velocity", "acceleration")


class UrdfError(ValueError):
    """A URDF whose limits cannot be used; one line with the joint and the remedy."""


@dataclass(frozen=True)
class UrdfLimits:
    """One joint's limits, in rad or m; infinite where the URDF has none."""

    lower: float = -math.inf
    upper: float = math.inf
    max_velocity: float = math.inf
    max_acceleration: float = math.inf

    def intersect(self, other: UrdfLimits) -> UrdfLimits:
        return UrdfLimits(
            max(self.lower, other.lower),
            min(self.upper, other.upper),
            min(self.max_velocity, other.max_velocity),
            min(self.max_acceleration, other.max_acceleration),
        )


def read_urdf_limits(text: str, names: Iterable[str]) -> dict[str, UrdfLimits]:
    """The limits of the joints `names`: the intersection of all that the URDF has.

    Position and velocity come from `limit` (no position for a continuous joint), the soft limits of
    `safety_controller`, and ros2_control's command interfaces without `<limits enable="false"/>`.
    Other joints are ignored.

    Raises:
        UrdfError: not a URDF, a document type declaration, or a joint of `names` that is missing,
            given twice, of a type that does not move, or with an invalid limit.
    """
    robot = _root(text)
    joints: dict[str, Element] = {}
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
            limits[name] = limits[name].intersect(_interface_limits(name, joint))
    for name, found in limits.items():
        if found.lower >= found.upper:
            raise UrdfError(
                f"joint {name!r}: the URDF's limits leave {found.lower:g} to {found.upper:g}, "
                "lower must be below upper"
            )
    return limits


def intersect_limits(joints: JointGroup, limits: Mapping[str, UrdfLimits]) -> JointGroup:
    """The joints with the tighter of their own and the URDF's limits.

    Raises:
        UrdfError: the two leave a joint no range.
    """
    tight = []
    for joint in joints.joints:
        ours = UrdfLimits(joint.lower, joint.upper, joint.max_velocity, joint.max_acceleration)
        theirs = limits[joint.name]
        both = ours.intersect(theirs)
        if both.lower >= both.upper:
            raise UrdfError(
                f"joint {joint.name!r}: the parameters allow {ours.lower:g} to {ours.upper:g}, the "
                f"URDF {theirs.lower:g} to {theirs.upper:g}, which leaves nothing; are both in rad "
                "or m, with the same zero?"
            )
        tight.append(dataclasses.replace(joint, **vars(both)))
    return JointGroup(tight)


def _root(text: str) -> Element:
    if len(text) > MAX_CHARS:
        raise UrdfError(f"the URDF has {len(text)} characters, the limit is {MAX_CHARS}")
    try:
        root = fromstring(text, forbid_dtd=True)
    except DefusedXmlException:
        raise UrdfError("the URDF has a document type declaration, remove <!DOCTYPE …>") from None
    except (ParseError, ValueError) as error:
        raise UrdfError(f"the URDF is not XML: {error}") from None
    if root.tag != "robot":
        raise UrdfError(f"the URDF's first element is <{root.tag[:40]}>, not <robot>")
    return root


def _joint_limits(name: str, joint: Element) -> UrdfLimits:
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
            f"joint {name!r}: velocity {velocity:g} in the URDF, must be above 0; correct it or "
            "set limits.source to params"
        )
    if kind not in BOUNDED:
        return UrdfLimits(max_velocity=velocity)
    # The URDF's default for both is 0.
    lower, upper = _number(name, limit, "lower", 0.0), _number(name, limit, "upper", 0.0)
    limits = UrdfLimits(lower, upper, velocity)
    safety = joint.find("safety_controller")
    if safety is None:
        return limits
    # Here the default of 0 for a missing soft limit is ignored.
    lower = _number(name, safety, "soft_lower_limit", -math.inf)
    upper = _number(name, safety, "soft_upper_limit", math.inf)
    return limits.intersect(UrdfLimits(lower, upper))


def _interface_limits(name: str, joint: Element) -> UrdfLimits:
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
            limits = limits.intersect(UrdfLimits(low, high))
            continue
        size = min(high, -low)
        if size <= 0:
            raise UrdfError(f"joint {name!r}: {kind} from {low:g} to {high:g} in ros2_control")
        limits = limits.intersect(UrdfLimits(**{f"max_{kind}": size}))
    return limits


def _disabled(element: Element) -> bool:
    limits = element.find("limits")
    return limits is not None and limits.get("enable", "true").lower() == "false"


def _number(name: str, element: Element, key: str, default: float) -> float:
    text = element.get(key)
    return default if text is None else _parsed(name, f"{element.tag} {key}", text)


def _parsed(name: str, where: str, text: str) -> float:
    try:
        # Python's float accepts 1_000.
        value = float(text.replace("_", "?"))
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UrdfError(f"joint {name!r}: {where} is {text[:40]!r} in the URDF, not a number")
    return value
