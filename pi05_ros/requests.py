"""When to infer, on what, and what the results mean."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from pi05_ros.control.chunks import ChunkScheduler
from pi05_ros.control.latency import LatencyTracker
from pi05_ros.control.speed import SpeedScaler
from pi05_ros.executor import ExecutorState, InferenceExecutor, InferenceResult
from pi05_ros.observation.buffer import FrameSetIncomplete, NotReady, ObservationBuffer, Snapshot
from pi05_ros.observation.frame_sync import FrameSync
from pi05_ros.types import ActionPrefix, FloatArray, ImageArray, JointGroup, Observation
from pi05_ros.watchdog import Fault, Watchdog

MIN_CHANGES = 3
FORGET_S = 2.0
"""A change this long ago no longer explains missing inferences."""


class InstructionChanges:
    """Counts instruction changes that discard a running inference, since one last finished.

    The executor cannot abort an inference, so discarding its result costs no time, and the arms
    never move for an outdated instruction. Changes faster than inferences leave no result at all.
    """

    def __init__(self) -> None:
        self._times_s: deque[float] = deque(maxlen=1000)

    def record_discard(self, now_s: float) -> None:
        """A changed instruction discards a running inference."""
        if math.isfinite(now_s):
            self._times_s.append(now_s)

    def clear(self) -> None:
        """An inference for the newest instruction has finished, or inference has ended."""
        self._times_s.clear()

    def problem(self, now_s: float, inference_s: float | None) -> str:
        """One line if at least `MIN_CHANGES` changes discarded inferences of `inference_s`."""
        times_s = self._times_s
        if len(times_s) < MIN_CHANGES:
            return ""
        if not 0 <= now_s - times_s[-1] <= FORGET_S + (inference_s or 0.0):
            return ""
        takes = "" if inference_s is None else f", an inference takes {inference_s:.2f} s"
        return (
            f"instruction: {len(times_s)} changes in {times_s[-1] - times_s[0]:.1f} s{takes}: "
            "no instruction is followed; publish it once"
        )


class InferenceRequests:
    """Requests inferences and records their results. Never waits; uses no observation twice."""

    def __init__(
        self,
        buffer: ObservationBuffer,
        executor: InferenceExecutor,
        joints: JointGroup,
        decode_image: Callable[[Any], ImageArray],
        watchdog: Watchdog | None,
    ) -> None:
        self.latency = LatencyTracker()
        """From an observation's stamp to the tick that uses its chunk."""
        self.network_latency = LatencyTracker()
        self.start_wait = LatencyTracker()
        """From the last frame, or the end of the previous inference, to the start of the next."""
        self._buffer = buffer
        self._executor = executor
        self._joints = joints
        self._decode_image = decode_image
        self._watchdog = watchdog
        self._frame_sync = FrameSync()
        self._last_observation_s = -math.inf
        self._ready_s = self._free_s = -math.inf

    def poll(self) -> tuple[Fault | None, str | None]:
        """Fault that ends the motion, and description of a hang that begins now."""
        if self._watchdog is None:
            return None, None
        if self._executor.state is ExecutorState.FAILED:
            message = f"the inference thread ended: {self._executor.failure}"
            return Fault(message, device=True, sticky=self._executor.device_lost), None
        hang = self._watchdog.check_hang(self._executor.busy_since_s, time.monotonic())
        if hang:
            self._executor.discard()
        return None, hang

    def hang(self) -> str | None:
        """Description of the present hang."""
        if self._watchdog is None:
            return None
        return self._watchdog.hang(self._executor.busy_since_s, time.monotonic())

    def record_result(self, result: InferenceResult) -> Fault | None:
        """Fault that this result causes."""
        return None if self._watchdog is None else self._watchdog.record_result(result)

    def measure(self, result: InferenceResult, latency_s: float) -> None:
        """Record the latencies of a usable chunk."""
        self.latency.add(latency_s)
        self.network_latency.add(result.infer_s)
        self.start_wait.add(max(0.0, result.started_s - max(self._ready_s, self._free_s)))
        self._free_s = result.finished_s

    def request_inference(
        self,
        now_s: float,
        scheduler: ChunkScheduler,
        pace: SpeedScaler,
        reaction_s: float,
        instruction: str,
        plausible: Callable[[float, FloatArray], bool],
    ) -> None:
        """Submit an inference if the scheduler wants one and an observation is complete.

        Args:
            now_s: time on the clock of the observation stamps.
            scheduler: decides whether a chunk is wanted, and what is executed until it arrives.
            pace: time of the plan.
            reaction_s: time from a chunk's arrival to its effect.
            instruction: instruction of the live chunks.
            plausible: whether the robot can be at positions [n_joints] at a time.
        """
        if self._executor.state is not ExecutorState.READY or pace.scale == 0:
            return
        latency_s = self.latency.estimate_s or 0.0
        plan_s = pace.plan_s(now_s)
        ahead_s = pace.plan_s(now_s + latency_s) - plan_s
        if not scheduler.wants_inference(plan_s, ahead_s):
            return
        try:
            snapshot = self._buffer.snapshot(now_s, self._frame_sync.max_skew_s(now_s))
        except FrameSetIncomplete:
            self._frame_sync.record_incomplete(now_s)
            return
        except NotReady:
            return
        if snapshot.stamp_s <= self._last_observation_s:
            return
        if not plausible(snapshot.joints_stamp_s, snapshot.positions):
            return
        self._frame_sync.record_used(snapshot.skew_s, now_s)
        self._last_observation_s = snapshot.stamp_s
        self._ready_s = self._buffer.arrived_s
        prefix = None
        if scheduler.guided:
            stamp_s = snapshot.stamp_s
            # Committed steps are executed before the chunk can take effect.
            effect_s = stamp_s + latency_s + reaction_s
            prefix = self._prefix(scheduler, pace.plan_s(stamp_s), pace.plan_s(effect_s))
            if prefix is not None and self._buffer.instruction != instruction:
                # Steps beyond the committed ones would delay the new instruction.
                prefix = ActionPrefix(
                    prefix.actions[: prefix.committed_steps], prefix.committed_steps
                )
        self._executor.submit(lambda: self._observe(snapshot), prefix)

    def reset(self) -> None:
        """Drop all requests; the next observation may have any stamp."""
        self._executor.discard()
        self._last_observation_s = -math.inf
        self._frame_sync.reset()

    def _prefix(
        self, scheduler: ChunkScheduler, stamp_s: float, committed_until_s: float
    ) -> ActionPrefix | None:
        prefix = scheduler.prefix(stamp_s, committed_until_s)
        if prefix is None:
            return None
        return ActionPrefix(self._joints.to_policy(prefix.actions), prefix.committed_steps)

    def _observe(self, snapshot: Snapshot) -> Observation:
        """Decode, on the inference thread."""
        return self._buffer.observe(snapshot, self._decode_image, self._joints.to_policy)
