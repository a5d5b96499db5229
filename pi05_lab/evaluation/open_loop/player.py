"""What a scheduler and the limits would have made of a policy's chunks.

The policy node's own runner plays, on the recording's clock, with a fixed delay from an
observation's stamp to its usable chunk. The robot does not follow: it does what was recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pi05_lab.evaluation.open_loop.notes import one_line
from pi05_lab.evaluation.open_loop.series import Samples
from pi05_lab.evaluation.simulated_executor import (
    SimulatedExecutor,
    evaluation_runner,
    sent_trajectory,
)
from pi05_ros.executor import ExecutorState, InferenceResult
from pi05_ros.robot_config import RobotConfig
from pi05_ros.types import ActionChunk, ActionPrefix, FloatArray, ImageArray, Observation

Infer = Callable[[Observation, ActionPrefix | None], ActionChunk]


@dataclass
class _Result:
    due_s: float
    result: InferenceResult


class RecordedExecutor(SimulatedExecutor):
    """Stands in for `InferenceExecutor` in a `PolicyRunner`, on a recording's clock.

    Args:
        infer: gives the chunk; the same one for the same observation.
        delay_s: from an observation's stamp to its usable chunk.
    """

    def __init__(self, infer: Infer, delay_s: float) -> None:
        super().__init__()
        self.open = False
        """Whether this is a moment that is inferred on."""
        self._infer = infer
        self._delay_s = delay_s
        self._waiting: list[_Result] = []

    @property
    def state(self) -> ExecutorState:
        return super().state if self.open else ExecutorState.BUSY

    def submit(self, source: Callable[[], Observation], prefix: ActionPrefix | None = None) -> None:
        chunk, error, stamp_s = None, None, None
        try:
            observation = source()
            stamp_s = observation.stamp_s
            chunk = self._infer(observation, prefix)
        except Exception as exception:  # as the executor takes whatever a policy raises
            error = one_line(exception)
        due_s = (self.now_s if stamp_s is None else stamp_s) + self._delay_s
        self._begin(due_s)
        self._waiting.append(
            _Result(due_s, InferenceResult(chunk, error, stamp_s, 0.0, 0.0, 0.0, 0.0))
        )

    def results(self) -> list[InferenceResult]:
        due = [each for each in self._waiting if self.now_s >= each.due_s - 1e-9]
        self._waiting = [each for each in self._waiting if self.now_s < each.due_s - 1e-9]
        return [each.result for each in due]

    def discard(self) -> None:
        self._waiting.clear()


class SchedulerReplay:
    """The node's runner with one scheduler, fed with a recording and a policy's chunks.

    Args:
        method: of the scheduler; its other parameters are the params file's, but for the speed: a
            recording goes on at its own.
        robot: the params file.
        cameras: those that some policy looks through.
        infer: see `RecordedExecutor`.
        delay_s: see `RecordedExecutor`.
        decode_image: of the recording.
    """

    def __init__(
        self,
        method: str,
        robot: RobotConfig,
        cameras: Collection[str],
        infer: Infer,
        delay_s: float,
        decode_image: Callable[[Any], ImageArray],
    ) -> None:
        self.method = method
        self.ticks = 0
        self.moving_ticks = 0
        self.seams = Samples()
        """Largest change of any arm joint's target where a chunk arrives, rad."""
        self.messages: list[str] = []
        """What the node would have said, one line each; the caller takes them."""
        self._lead_s = robot.parameters.lead_s
        self._arm = ~robot.joints.gripper
        self._executor = RecordedExecutor(infer, delay_s)
        scheduling = replace(robot.scheduler, method=method, speed_scale=1.0)
        # the recorded robot moves by itself and does not follow
        watching = replace(robot, parameters=replace(robot.parameters, dry_run=True))
        self.runner = evaluation_runner(
            watching, scheduling, cameras, self._executor, decode_image, prove_starts=False
        )
        self.runner.activate()

    def instruct(self, text: str) -> None:
        """Take an instruction that the evaluation's buffer has accepted."""
        self.runner.set_instruction(text)

    def tick(self, now_s: float, infer: bool) -> FloatArray | None:
        """One control tick; the commanded positions [n_joints], None before the first chunk.

        After a fault nothing is commanded, as with the node, until the recording's end.

        Args:
            now_s: on the recording's clock.
            infer: whether this is a moment that is inferred on.
        """
        self._executor.now_s, self._executor.open = now_s, infer
        at_s = np.array([now_s + self._lead_s])
        before = self._targets(at_s)
        moved = self.runner.stream.active
        tick = self.runner.tick(now_s)
        sent_trajectory(self.runner, tick, now_s)
        self.ticks += 1
        self.messages += [*tick.failures, *tick.notices]
        if self.runner.refusal:
            self.messages.append(self.runner.refusal)
        if tick.fault is not None:
            self.messages.append(f"{tick.fault.message}: the node deactivates, the motion ends")
        after = self._targets(at_s)
        if tick.chunks and moved and before is not None and after is not None and self._arm.any():
            self.seams.add(float(np.abs(after - before)[0, self._arm].max()))
        if not self.runner.stream.active:
            return None
        self.moving_ticks += 1
        return self.runner.stream.commanded(now_s).position

    def _targets(self, times_s: FloatArray) -> FloatArray | None:
        return self.runner.scheduler.targets(self.runner.pace.plan_times_s(times_s))

    def to_dict(self) -> dict[str, Any]:
        """What the limits took off and what became of the chunks."""
        clamps, statistics = self.runner.stream.clamps, self.runner.scheduler.statistics
        return {
            "ticks": self.moving_ticks,
            "clamps": {
                kind: getattr(clamps, kind).tolist()
                for kind in ("position", "velocity", "acceleration", "held")
            },
            "chunks": {key: int(value) for key, value in vars(statistics).items()},
            "seams_rad": [round(value, 6) for value in self.seams.items],
            "seam_max_rad": None if not self.seams.count else round(self.seams.largest, 6),
        }
