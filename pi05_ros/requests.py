"""When to infer, on which observation, and which results end the motion."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pi05_ros.control.chunks import ChunkScheduler
from pi05_ros.control.latency import LatencyTracker
from pi05_ros.control.speed import SpeedScaler
from pi05_ros.device_errors import ErrorKind
from pi05_ros.executor import ExecutorState, InferenceExecutor, InferenceResult
from pi05_ros.observation.buffer import FrameSetIncomplete, NotReady, ObservationBuffer
from pi05_ros.types import ActionPrefix, FloatArray, ImageArray, JointGroup

MIN_CHANGES = 3
FORGET_S = 2.0
"""A change this long ago no longer explains missing inferences."""
ROUND_S = 0.01
"""The largest skew of the frames of one trigger."""
PATIENCE_S = 0.03
"""The longest wait for the other frames of a trigger."""
RELEARN_S = 2.0
"""Time without waits after a wait in which no complete set of frames arrived."""


@dataclass(frozen=True)
class Fault:
    """Why the motion must end."""

    message: str
    """One line for the user."""
    device: bool
    """The policy must be loaded again: its device failed, or its thread ended."""
    sticky: bool = False
    """The device fails until the process ends: only a new process can load a policy."""


class Watchdog:
    """Detects hung inferences and repeated failures. No method waits.

    An inference is hung while it takes longer than `hang_timeout_s`. `max_failures` failures in a
    row are a fault, and so is one that lost the device. An observation that cannot be made,
    because an image is damaged, is no failure of the policy.
    """

    def __init__(self, hang_timeout_s: float = 2.0, max_failures: int = 3) -> None:
        self.hang_timeout_s = hang_timeout_s
        self.max_failures = max_failures
        self.hangs = 0
        self._hung_since_s: float | None = None
        self.reset()

    def hang(self, busy_since_s: float | None, now_s: float) -> str:
        """Describe the present hang; "" without one. Times by time.monotonic."""
        if busy_since_s is None or now_s - busy_since_s <= self.hang_timeout_s:
            return ""
        busy_s = now_s - busy_since_s
        return f"policy: no answer for {busy_s:.1f} s, limit {self.hang_timeout_s:g} s"

    def check_hang(self, busy_since_s: float | None, now_s: float) -> str:
        """Count and describe a hang that begins now; "" without a new one."""
        hang = self.hang(busy_since_s, now_s)
        if not hang or self._hung_since_s == busy_since_s:
            return ""
        self._hung_since_s = busy_since_s
        self.hangs += 1
        return hang

    def record_result(self, result: InferenceResult) -> Fault | None:
        """Count a result; return the fault that it causes."""
        if result.chunk is not None:
            self._failures = 0
        elif result.kind is ErrorKind.STICKY:
            return Fault(f"the device is lost: {result.error}", device=True, sticky=True)
        elif result.stamp_s is not None or result.kind is ErrorKind.OUT_OF_MEMORY:
            self._failures += 1
        if self._failures < self.max_failures:
            return None
        return Fault(
            f"{self._failures} inferences failed in a row, the last with {result.error}",
            device=False,
        )

    def reset(self) -> None:
        """Drop the failures counted so far, at a new activation."""
        self._failures = 0


class FrameSync:
    """Waits briefly for all frames of one trigger.

    Frames of cameras that are triggered together arrive one after the other; an inference that
    starts in between would combine one camera's new frame with another's last one. Cameras that
    are not triggered together never give a complete set, so a wait that fails disables waits for
    `RELEARN_S`. Times are seconds on the clock of the observation stamps.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self._waiting_since_s: float | None = None
        self._no_wait_until_s = -math.inf

    def max_skew_s(self, now_s: float) -> float:
        """The largest skew of the frames of an observation that is made now."""
        if now_s < self._no_wait_until_s:
            return math.inf
        if self._waiting_since_s is not None and now_s - self._waiting_since_s >= PATIENCE_S:
            return math.inf
        return ROUND_S

    def record_incomplete(self, now_s: float) -> None:
        """The newest frames exceed `max_skew_s`: begin or continue a wait."""
        if self._waiting_since_s is None:
            self._waiting_since_s = now_s

    def record_used(self, skew_s: float, now_s: float) -> None:
        """An observation used frames `skew_s` apart: end the wait."""
        if self._waiting_since_s is not None and skew_s > ROUND_S:
            self._no_wait_until_s = now_s + RELEARN_S
        self._waiting_since_s = None


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
        watchdog: Watchdog,
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

    def poll(self) -> tuple[Fault | None, str]:
        """Fault that ends the motion, and description of a hang that begins now, or ""."""
        if self._executor.state is ExecutorState.FAILED:
            message = f"the inference thread ended: {self._executor.failure}"
            return Fault(message, device=True, sticky=self._executor.device_lost), ""
        hang = self._watchdog.check_hang(self._executor.busy_since_s, time.monotonic())
        if hang:
            self._executor.discard()
        return None, hang

    def hang(self) -> str:
        """Description of the present hang; "" without one."""
        return self._watchdog.hang(self._executor.busy_since_s, time.monotonic())

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
        stamp_s = snapshot.stamp_s
        prefix = None
        if scheduler.guided:
            # Committed steps are executed before the chunk can take effect.
            committed_until_s = pace.plan_s(stamp_s + latency_s + reaction_s)
            prefix = scheduler.prefix(pace.plan_s(stamp_s), committed_until_s)
        if prefix is not None:
            actions = self._joints.to_policy(prefix.actions)
            if self._buffer.instruction != instruction:
                # Steps beyond the committed ones would delay the new instruction.
                actions = actions[: prefix.committed_steps]
            prefix = ActionPrefix(actions, prefix.committed_steps)
        self._executor.submit(
            # Decodes, on the inference thread.
            lambda: self._buffer.observe(snapshot, self._decode_image, self._joints.to_policy),
            prefix,
        )

    def reset(self) -> None:
        """Drop all requests; the next observation may have any stamp."""
        self._executor.discard()
        self._last_observation_s = -math.inf
        self._frame_sync.reset()
