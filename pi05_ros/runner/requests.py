"""When to infer, on what, and what to make of the answer."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

from pi05_ros.control.chunks import ChunkScheduler
from pi05_ros.control.latency import LatencyTracker
from pi05_ros.control.pacing import PlanClock
from pi05_ros.executor import (
    ExecutorState,
    Fault,
    InferenceExecutor,
    InferenceResult,
    Watchdog,
)
from pi05_ros.observation.buffer import NotReady, ObservationBuffer, RoundIncomplete, Snapshot
from pi05_ros.runner.rounds import Rounds
from pi05_ros.types import ActionPrefix, FloatArray, ImageArray, JointGroup, Observation


class Requests:
    """The runner's side of the executor: it never waits, and no observation is used twice."""

    def __init__(
        self,
        buffer: ObservationBuffer,
        executor: InferenceExecutor,
        joints: JointGroup,
        decode_image: Callable[[Any], ImageArray],
        watchdog: Watchdog | None,
    ) -> None:
        self.latency = LatencyTracker()
        """From an observation's stamp to the tick that takes its chunk."""
        self.network_latency = LatencyTracker()
        self.start_wait = LatencyTracker()
        """From the last frame, or the end of the inference before, to the start of one."""
        self._buffer = buffer
        self._executor = executor
        self._joints = joints
        self._decode_image = decode_image
        self._watchdog = watchdog
        self._rounds = Rounds()
        self._last_observation_s = -math.inf
        self._ready_s = self._free_s = -math.inf

    def watch(self) -> tuple[Fault | None, str | None]:
        """The fault that ends the motion, and the hang that begins now, if there is one."""
        if self._watchdog is None:
            return None, None
        if self._executor.state is ExecutorState.FAILED:
            message = f"the inference thread ended: {self._executor.failure}"
            return Fault(message, device=True, sticky=self._executor.device_lost), None
        hang = self._watchdog.look(self._executor.busy_since_s, time.monotonic())
        if hang:
            self._executor.discard()
        return None, hang

    def hang(self) -> str | None:
        """The inference that hangs at the moment."""
        if self._watchdog is None:
            return None
        return self._watchdog.hang(self._executor.busy_since_s, time.monotonic())

    def judge(self, result: InferenceResult) -> Fault | None:
        """The fault that this result completes."""
        return None if self._watchdog is None else self._watchdog.judge(result)

    def measure(self, result: InferenceResult, latency_s: float) -> None:
        """Take a usable chunk's latencies."""
        self.latency.add(latency_s)
        self.network_latency.add(result.infer_s)
        self.start_wait.add(max(0.0, result.started_s - max(self._ready_s, self._free_s)))
        self._free_s = result.finished_s

    def ask(
        self,
        now_s: float,
        scheduler: ChunkScheduler,
        pace: PlanClock,
        reaction_s: float,
        instruction: str,
        plausible: Callable[[float, FloatArray], bool],
    ) -> None:
        """Submit an inference if one is due and an observation can be made.

        Args:
            now_s: the observations' clock.
            scheduler: says whether a chunk is wanted, and what will be executed until it comes.
            pace: the plan's time.
            reaction_s: how long after its arrival a chunk takes effect.
            instruction: what the live chunks were predicted for.
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
            snapshot = self._buffer.snapshot(now_s, self._rounds.within_s(now_s))
        except RoundIncomplete:
            self._rounds.missed(now_s)
            return
        except NotReady:
            return
        if snapshot.stamp_s <= self._last_observation_s:
            return
        if not plausible(snapshot.joints_stamp_s, snapshot.positions):
            return
        self._rounds.taken(snapshot.skew_s, now_s)
        self._last_observation_s = snapshot.stamp_s
        self._ready_s = self._buffer.arrived_s
        prefix = None
        if scheduler.guided:
            stamp_s = snapshot.stamp_s
            # frozen is what is executed until the chunk can take effect
            effect_s = stamp_s + latency_s + reaction_s
            prefix = self._prefix(scheduler, pace.plan_s(stamp_s), pace.plan_s(effect_s))
            if prefix is not None and self._buffer.instruction != instruction:
                # nothing beyond what happens anyway should hold a new instruction back
                prefix = ActionPrefix(prefix.actions[: prefix.frozen], prefix.frozen)
        self._executor.submit(lambda: self._observe(snapshot), prefix)

    def forget(self) -> None:
        """Throw away what was asked for; the next observation may be of any time."""
        self._executor.discard()
        self._last_observation_s = -math.inf
        self._rounds.forget()

    def _prefix(
        self, scheduler: ChunkScheduler, stamp_s: float, frozen_until_s: float
    ) -> ActionPrefix | None:
        prefix = scheduler.prefix(stamp_s, frozen_until_s)
        if prefix is None:
            return None
        return ActionPrefix(self._joints.to_policy(prefix.actions), prefix.frozen)

    def _observe(self, snapshot: Snapshot) -> Observation:
        """Decode; called on the inference thread."""
        return self._buffer.observe(snapshot, self._decode_image, self._joints.to_policy)
