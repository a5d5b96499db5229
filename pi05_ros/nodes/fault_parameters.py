"""Parameters of what happens when something is wrong."""

from __future__ import annotations

from dataclasses import dataclass

from pi05_ros.control.approach import FIRST_COMMANDS
from pi05_ros.nodes.declare import parameter


@dataclass(frozen=True)
class FaultParameters:
    """Parameters `faults.*`, read when the node is configured."""

    hang_timeout_s: float = parameter(
        2.0,
        "an inference that takes longer counts as hung: ERROR, and its result is thrown away",
        lower=0.05,
        upper=3600.0,
    )
    max_failures: int = parameter(
        3, "so many failed inferences in a row deactivate the node", lower=1, upper=1000
    )
    error_after_s: float = parameter(
        1.0, "a stream that is not as it should be is a WARN, after this time an ERROR",
        lower=0.0, upper=3600.0,
    )  # fmt: skip
    first_command: str = parameter(
        "ramp",
        "a first command that is far from the measured joints: go there slowly, or not at all",
        choices=FIRST_COMMANDS,
    )
    first_command_distance: float = parameter(
        0.5, "rad or m, from which on that is far; grippers excepted", lower=0.0, upper=10.0
    )
    first_command_speed: float = parameter(
        0.25, "ramp: share of the velocity limits", lower=0.01, upper=1.0
    )
    speed_ramp_s: float = parameter(
        0.5, "time in which scheduler.speed_scale goes from 0 to 1", lower=0.0, upper=10.0
    )
    new_instruction: str = parameter(
        "replace",
        "replace: the chunks of the instruction before give way to the first of the new one, and "
        "one in flight is thrown away; blend: the scheduler merges them until they end",
        choices=("replace", "blend"),
    )
