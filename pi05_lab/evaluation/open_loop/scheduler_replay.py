"""A scheduler and the limits on a policy's chunks, over a recording.

The policy node's own runner on the recording's clock, with a fixed delay from an observation's
stamp to its usable chunk. The robot does not follow the commands: it moves as recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

import numpy as np

from pi05_lab.evaluation.open_loop.metrics import Samples
from pi05_lab.evaluation.open_loop.results import SchedulerRow
from pi05_lab.evaluation.simulated_executor import (
    Infer,
    SimulatedExecutor,
    evaluation_runner,
    sent_trajectory,
)
from pi05_ros.observation.buffer import History
from pi05_ros.robot_config import RobotConfig
from pi05_ros.types import FloatArray, ImageArray


class SchedulerReplay:
    """The node's runner with one scheduler, on a recording and a policy's chunks.

    The scheduler's parameters are the params file's, except the speed: a recording has its own.
    `infer` returns the same chunk for the same observation; `delay_s` is the time from an
    observation's stamp to its usable chunk; `decode_image` is that of the recording.
    """

    def __init__(
        self,
        method: str,
        robot: RobotConfig,
        cameras: Collection[str],
        infer: Infer,
        delay_s: float,
        decode_image: Callable[[Any], ImageArray],
        history: History | None = None,
    ) -> None:
        self.messages: list[str] = []
        """What the node would log, one line each; the caller clears them."""
        self._moving_ticks = 0
        self._boundary_changes = Samples()
        """Largest change of an arm joint's target at a chunk boundary, rad."""
        self._lead_s = robot.parameters.lead_s
        self._arm = ~robot.joints.gripper
        self._executor = SimulatedExecutor(infer, delay_s)
        scheduling = replace(robot.scheduler, method=method, speed_scale=1.0)
        # The recorded robot does not follow the commands.
        dry = replace(robot, parameters=replace(robot.parameters, dry_run=True))
        self.runner = evaluation_runner(
            dry, scheduling, cameras, self._executor, decode_image, False, history
        )
        self.runner.activate()

    def tick(self, now_s: float, infer: bool) -> FloatArray | None:
        """Run one control tick; the commanded positions [n_joints], None before the first chunk.

        After a fault nothing is commanded until the recording's end: the node deactivates.
        `now_s` is on the recording's clock, `infer` whether an inference is due.
        """
        self._executor.now_s, self._executor.accepts_requests = now_s, infer
        before = self._target(now_s + self._lead_s)
        moved = self.runner.stream.active
        tick = self.runner.tick(now_s)
        sent_trajectory(self.runner, tick, now_s)
        self.messages += [*tick.failures, *tick.notices]
        if self.runner.refusal:
            self.messages.append(self.runner.refusal)
        if tick.fault is not None:
            self.messages.append(f"{tick.fault.message}: the node deactivates, the motion ends")
        after = self._target(now_s + self._lead_s)
        if tick.chunks and moved and before is not None and after is not None and after.size:
            self._boundary_changes.add(float(np.abs(after - before).max()))
        if not self.runner.stream.active:
            return None
        self._moving_ticks += 1
        return self.runner.stream.commanded(now_s).position

    def _target(self, at_s: float) -> FloatArray | None:
        """Arm joints of the scheduler's target at a time; None before the first chunk."""
        targets = self.runner.scheduler.targets(self.runner.pace.plan_times_s(np.array([at_s])))
        return None if targets is None else targets[0, self._arm]

    def row(self) -> SchedulerRow:
        clamps, statistics = self.runner.stream.clamps, self.runner.scheduler.statistics
        changes = self._boundary_changes
        kinds = ("position", "velocity", "acceleration", "held")
        return SchedulerRow(
            ticks=self._moving_ticks,
            clamps={kind: getattr(clamps, kind).tolist() for kind in kinds},
            chunks={key: int(value) for key, value in vars(statistics).items()},
            seams_rad=[round(value, 6) for value in changes.items],
            seam_max_rad=round(changes.largest, 6) if changes.count else None,
        )
