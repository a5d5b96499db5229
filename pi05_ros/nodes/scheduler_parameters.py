"""Parameters of when to infer, and of how chunks become one course."""

from __future__ import annotations

from dataclasses import dataclass

from pi05_ros.control.ensemble import Guard
from pi05_ros.control.replan import REPLAN_MODES, Replan
from pi05_ros.control.scheduler import SCHEDULERS, ChunkScheduler, make_scheduler
from pi05_ros.nodes.declare import ParameterError, parameter
from pi05_ros.types import JointGroup

ENSEMBLE_ORDERS = ("oldest_first", "newest_first")


@dataclass(frozen=True)
class SchedulerParameters:
    """Parameters `scheduler.*`; all but smoothing_hz may be changed in motion."""

    method: str = parameter(
        "temporal_ensemble", "how overlapping chunks become one motion", choices=SCHEDULERS
    )
    ensemble_m: float = parameter(
        0.01, "weight exp(-m*i) of the i-th chunk; 0 is the mean", lower=-10.0, upper=10.0
    )
    ensemble_order: str = parameter(
        "oldest_first", "which end i counts from", choices=ENSEMBLE_ORDERS
    )
    ensemble_max_chunks: int = parameter(
        16, "no more than this, the newest, are averaged", lower=1, upper=64
    )
    guard_disagreement: float = parameter(
        0.2, "rad; RMS beyond which a chunk replaces the mean, 0 never", lower=0.0, upper=10.0
    )
    guard_crossover_s: float = parameter(
        0.2, "time in which the motion passes to that chunk", lower=0.01, upper=2.0
    )
    guard_confirmations: int = parameter(
        2, "so many disagreeing chunks in a row make another plan", lower=1, upper=10
    )
    blend_old_share: float = parameter(0.3, "blend: share of the old course", lower=0.0, upper=1.0)
    newest_only: list[str] = parameter(
        [""], "joints besides the grippers that are never averaged, by name"
    )
    replan: str = parameter(
        "free",
        "when to infer again: whenever the executor is free, after replan_steps, or when no more "
        "than replan_remaining_s is left; always in time before the chunks run out",
        choices=REPLAN_MODES,
    )
    replan_steps: int = parameter(10, "steps of a chunk between observations", lower=1, upper=1000)
    replan_remaining_s: float = parameter(
        0.3, "of the chunks when the next one arrives", lower=0.0, upper=10.0
    )
    replan_interval_s: float = parameter(
        0.0, "shortest time between two observations", lower=0.0, upper=10.0
    )
    speed_scale: float = parameter(
        1.0,
        "below 1 chunks are executed slower than they were meant; at 0 the arms come to rest",
        lower=0.0,
        upper=1.0,
    )
    smoothing_hz: float = parameter(
        0.0, "low-pass in front of the limits, 0 is off; its lag is in /diagnostics",
        lower=0.0, upper=50.0,
    )  # fmt: skip

    def make(self, joints: JointGroup) -> ChunkScheduler:
        """The scheduler that these parameters describe."""
        unknown = sorted(set(self.newest_only) - {"", *joints.names})
        if unknown:
            raise ParameterError(f"parameter 'scheduler.newest_only': no joint is called {unknown}")
        if self.ensemble_order not in ENSEMBLE_ORDERS:
            raise ParameterError(
                f"parameter 'scheduler.ensemble_order' is {self.ensemble_order!r}; it may be "
                f"{', '.join(ENSEMBLE_ORDERS)}"
            )
        try:
            return make_scheduler(
                self.method,
                gripper=[
                    joint.gripper or joint.name in self.newest_only for joint in joints.joints
                ],
                m=self.ensemble_m,
                newest_first=self.ensemble_order == "newest_first",
                max_chunks=self.ensemble_max_chunks,
                guard=Guard(
                    self.guard_disagreement, self.guard_crossover_s, self.guard_confirmations
                ),
                blend_old_share=self.blend_old_share,
                replan=Replan(
                    self.replan,
                    self.replan_steps,
                    self.replan_remaining_s,
                    self.replan_interval_s,
                ),
            )
        except ValueError as error:
            raise ParameterError(f"parameters 'scheduler.*': {error}") from error
