"""One control tick: finished chunks in, the next inference asked for, a trajectory out.

Knows neither ROS nor the network. The node drives it with ROS time and real messages; an
evaluation drives the same class with a simulator's clock.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from pi05_ros.control.latency import LatencyTracker
from pi05_ros.control.scheduler import ChunkScheduler
from pi05_ros.control.smoothing import TargetFollower
from pi05_ros.control.trajectory import ClockJumpedBackError, CommandStream, TrajectoryPoints
from pi05_ros.executor import ExecutorState, InferenceExecutor, InferenceResult
from pi05_ros.observation.buffer import NotReady, ObservationBuffer
from pi05_ros.types import ActionChunk, ActionPrefix, FloatArray, ImageArray, JointGroup


@dataclass(frozen=True)
class Tick:
    """What one control tick brought."""

    trajectory: TrajectoryPoints | None = None
    """To be published; None while there is nothing to follow."""
    chunks: list[tuple[ActionChunk, float]] = field(default_factory=list)
    """Chunks that arrived, in joint units, with their latency from stamp to use in seconds."""
    failures: list[str] = field(default_factory=list)
    """Inferences that failed, one line each."""


class PolicyRunner:
    """Connects the observation buffer, the executor, the scheduler and the command stream.

    All methods are called from one thread, the control thread. Times are seconds on the clock of
    the observation stamps.
    """

    def __init__(
        self,
        buffer: ObservationBuffer,
        executor: InferenceExecutor,
        scheduler: ChunkScheduler,
        stream: CommandStream,
        joints: JointGroup,
        decode_image: Callable[[Any], ImageArray],
        *,
        follower: TargetFollower | None = None,
        speed_scale: float = 1.0,
        on_change: bool = False,
    ) -> None:
        """Connect the parts.

        Args:
            buffer, executor, scheduler, stream, joints: the parts.
            decode_image: a stored picture → RGB [height, width, 3].
            follower: smooths the targets in front of the limits.
            speed_scale: above 0; below 1 the chunks are executed slower than they were meant.
            on_change: publish when the plan has changed or half of the last trajectory's
                lookahead is over, instead of with every tick.
        """
        if not speed_scale > 0:
            raise ValueError(f"speed_scale must be > 0, got {speed_scale}")
        self.speed_scale = speed_scale
        self.follower = follower
        self.buffer = buffer
        self.executor = executor
        self.scheduler = scheduler
        self.stream = stream
        self.latency = LatencyTracker()
        self.network_latency = LatencyTracker()
        self._joints = joints
        self._decode_image = decode_image
        self._active = False
        self._last_observation_s = float("-inf")
        self._last_tick_s = float("-inf")
        self._braking_s = (0.0, 0.0)
        self._instruction = ""
        self._on_change = on_change
        self._publish_by_s = float("-inf")

    @property
    def active(self) -> bool:
        return self._active

    def activate(self) -> None:
        """From the next tick on, infer and move. The first chunk starts at the measured state."""
        self._forget()
        self._active = True

    def deactivate(self, now_s: float) -> TrajectoryPoints | None:
        """Stop: results in flight are thrown away; the return value brakes the arms to rest."""
        self._active = False
        hold = None
        if self.stream.active:
            with contextlib.suppress(ClockJumpedBackError):  # the last trajectory's tail brakes
                hold = self.stream.hold(now_s)
            self._braking_s = (now_s, self.stream.rest_time_s)
        self._forget()
        return hold

    def set_instruction(self, text: str) -> str:
        """Take an instruction; what is in flight for another one is thrown away.

        Returns the instruction as it will be used.

        Raises:
            InstructionError: empty, too long or not text; the instruction stays as it was.
        """
        before = self.buffer.instruction
        instruction = self.buffer.set_instruction(text)
        if instruction != before:
            self.executor.discard()
        return instruction

    def use_scheduler(self, scheduler: ChunkScheduler) -> None:
        """Change the method in motion: the live chunks go on under another one."""
        scheduler.adopt(self.scheduler)
        self.scheduler = scheduler
        self._publish_by_s = float("-inf")

    def halt(self) -> None:
        """Forget the motion without a last command: nobody is there to follow it."""
        self._forget()

    def tick(self, now_s: float) -> Tick:
        """Advance to `now_s`; returns what to publish."""
        if not self._active:
            return Tick()
        if now_s < self._last_tick_s - self.stream.dt_s:
            self._start_over()
        self._last_tick_s = now_s
        tick = Tick()
        for result in self.executor.results():
            self._take(result, now_s, tick)
        self._request(now_s)
        if not self.stream.active:
            # arms that still brake after a deactivation would be asked to stand at once
            since_s, until_s = self._braking_s
            if self.scheduler.live_chunks(now_s) == 0 or since_s <= now_s < until_s:
                return tick
            self._start(self.buffer.positions(), now_s)
        if self._on_change and now_s < self._publish_by_s:
            return tick
        try:
            trajectory = self.stream.tick(now_s, self._targets)
        except ClockJumpedBackError:
            self._start_over()
            return tick
        self._publish_by_s = now_s + self.stream.lookahead_steps * self.stream.dt_s / 2
        return replace(tick, trajectory=trajectory)

    def _start(self, positions: FloatArray, now_s: float) -> None:
        self.stream.start(positions, now_s)
        self._publish_by_s = float("-inf")
        if self.follower is not None:
            self.follower.start(positions)

    def _targets(self, times_s: FloatArray) -> FloatArray | None:
        if self.follower is None:
            return self.scheduler.targets(times_s)
        return self.follower.course(times_s, self.scheduler.targets)

    def _take(self, result: InferenceResult, now_s: float, tick: Tick) -> None:
        if result.chunk is None:
            tick.failures.append(result.error or "inference failed without a reason")
            return
        chunk = replace(
            result.chunk,
            actions=self._joints.to_joints(result.chunk.actions),
            dt_s=result.chunk.dt_s / self.speed_scale,
        )
        if chunk.instruction != self._instruction:
            # chunks for another instruction are another plan: averaging both follows neither
            self.scheduler.clear()
            self._instruction = chunk.instruction
        latency_s = max(0.0, now_s - chunk.stamp_s)
        self.latency.add(latency_s)
        self.network_latency.add(result.infer_s)
        tick.chunks.append((chunk, latency_s))
        try:
            if self.scheduler.add(chunk, now_s, standing=not self.stream.active):
                self._publish_by_s = float("-inf")
        except ValueError as error:
            tick.failures.append(str(error))

    def _request(self, now_s: float) -> None:
        if self.executor.state is not ExecutorState.READY:
            return
        latency_s = self.latency.estimate_s or 0.0
        if not self.scheduler.wants_inference(now_s, latency_s):
            return
        try:
            snapshot = self.buffer.snapshot(now_s)
        except NotReady:
            return
        if snapshot.stamp_s <= self._last_observation_s:
            return
        self._last_observation_s = snapshot.stamp_s
        self.executor.submit(
            lambda: snapshot.decode(self._decode_image, self._to_policy),
            self._prefix(snapshot.stamp_s, latency_s),
        )

    def _prefix(self, stamp_s: float, latency_s: float) -> ActionPrefix | None:
        """What will be executed from the observation on, for a method that continues it.

        Frozen is what is executed until the chunk can take effect: it arrives after the latency,
        at a tick, and changes nothing before that tick's lead is over.
        """
        if not self.scheduler.guided:
            return None
        arrival_s = stamp_s + latency_s + self.stream.lead_s + self.stream.dt_s
        prefix = self.scheduler.prefix(stamp_s, arrival_s)
        if prefix is None:
            return None
        actions = self._joints.to_policy(prefix.actions)
        if self.buffer.instruction != self._instruction:
            # nothing beyond what happens anyway should hold a new instruction back
            actions = actions[: prefix.frozen]
        return ActionPrefix(actions, prefix.frozen)

    def _to_policy(self, positions: FloatArray) -> FloatArray:
        return self._joints.to_policy(positions)

    def _start_over(self) -> None:
        """The clock was set back, or a recording starts from its beginning."""
        self.buffer.clear()
        self._forget()

    def _forget(self) -> None:
        self.executor.discard()
        self.scheduler.clear()
        self.stream.stop()
        if self.follower is not None:
            self.follower.clear()
        self._last_observation_s = float("-inf")
        self._last_tick_s = float("-inf")
        self._instruction = ""
