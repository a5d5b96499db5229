"""The control step: chunks in, the next inference requested, a trajectory out. No ROS, no torch.

The node drives `PolicyRunner` with ROS time and messages, an evaluation with a simulated clock.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from pi05_ros.control.chunks import ChunkScheduler
from pi05_ros.control.latency import LatencyTracker
from pi05_ros.control.scheduler import SyncScheduler
from pi05_ros.control.speed import LowPassFilter, SpeedScaler, StartRamp
from pi05_ros.control.start_check import StartCheck
from pi05_ros.control.tracking import TrackingMonitor
from pi05_ros.control.trajectory import (
    BrakeState,
    Braking,
    ClockJumpedBackError,
    CommandStream,
    TrajectoryPoints,
)
from pi05_ros.executor import ExecutorState, InferenceExecutor, InferenceResult
from pi05_ros.observation.buffer import NotReady, ObservationBuffer
from pi05_ros.requests import Fault, InferenceRequests, InstructionChanges, Watchdog
from pi05_ros.types import ActionChunk, FloatArray, ImageArray, JointGroup, Level, Problem


@dataclass(frozen=True)
class Tick:
    """Result of one control tick."""

    trajectory: TrajectoryPoints | None = None
    """To be published; None without a motion."""
    chunks: list[tuple[ActionChunk, float]] = field(default_factory=list)
    """New chunks in joint units, each with its latency from stamp to use in seconds."""
    failures: list[str] = field(default_factory=list)
    """Failed inferences, one line each."""
    notices: list[str] = field(default_factory=list)
    """Other messages for the user, one line each."""
    finished_s: float | None = None
    """When the last chunk was ready, by time.monotonic."""
    fault: Fault | None = None
    """Why the motion must end; the caller deactivates."""
    braking: Braking | None = None
    """Set if this tick ended the motion; `trajectory` is None then."""


CLOCK_JUMP_S = 1.0
"""A gap between ticks above this and above 5 periods ends the plan."""
TOO_FEW_SHOWN_S = 1.0
"""Too few joint states since the last motion become a problem after this time."""


class PolicyRunner:
    """Connects the observation buffer, the executor, the scheduler and the command stream.

    Other threads may read `active` and `stopped`; a caller with several threads holds one lock
    around every call. `buffer` and `executor` have locks of their
    own. Times are seconds on the clock of the observation stamps.
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
        low_pass: LowPassFilter | None = None,
        start_ramp: StartRamp | None = None,
        start_check: StartCheck | None = None,
        tracking: TrackingMonitor | None = None,
        watchdog: Watchdog | None = None,
        speed_scale: float = 1.0,
        speed_ramp_s: float = 0.5,
        blend_instructions: bool = False,
        on_change: bool = False,
    ) -> None:
        """Connect the parts.

        Args:
            buffer, executor, scheduler, stream, joints: the parts.
            decode_image: stored image → RGB [height, width, 3].
            low_pass: filters the targets before the limits.
            start_ramp: leads to a distant first target; None goes there at once.
            start_check: checks the joint states that a motion starts at; None takes the newest.
            tracking: compares commanded and measured positions.
            watchdog: detects hangs and failures of the executor; None takes its defaults.
            speed_scale: 0 to 1; below 1 the chunks are executed slower than predicted, 0 holds
                the arms.
            speed_ramp_s: duration of a speed change from 0 to 1.
            blend_instructions: merge chunks of the last instruction with those of the new one;
                else the first new chunk replaces them.
            on_change: publish when the plan changes or half of the last trajectory's lookahead
                has passed, instead of at every tick.
        """
        self.low_pass = low_pass
        self.watchdog = watchdog or Watchdog()
        self.pace = SpeedScaler(speed_scale, speed_ramp_s)
        self.buffer = buffer
        self.executor = executor
        self.scheduler = scheduler
        self.stream = stream
        self._requests = InferenceRequests(buffer, executor, joints, decode_image, self.watchdog)
        self.latency = self._requests.latency
        self.network_latency = self._requests.network_latency
        self.start_wait = self._requests.start_wait
        self.publish_wait = LatencyTracker()
        """From the end of a chunk's inference to the published trajectory that uses it."""
        self.misses = 0
        """How often the chunks ran out before the next arrived, except with `sync`."""
        self.reaction_s: float | None = None
        """From the last instruction to its first chunk."""
        self.refusal = ""
        """Why the last motion did not start."""
        self._joints = joints
        self._start_ramp = start_ramp
        self._blend_instructions = blend_instructions
        self.active = False
        self.stopped = False
        """True from `stop` to `resume`; activation does not end it."""
        self.stop_reason = ""
        """Why the runner stopped by itself; empty after `stop` by the caller."""
        self._last_tick_s = -math.inf
        self.tracking = tracking or TrackingMonitor(joints, time_s=0.0)
        self._brake = BrakeState(stream)
        self._start_check = start_check
        self._start_problem = ""
        self._start_at: FloatArray | None = None
        self._changes = InstructionChanges()
        self._began = False
        self._instruction = ""
        self._instructed_s = -math.inf
        self._had_plan = self._stands = False
        self._plan_end_s = -math.inf
        self._chunk_s = math.inf
        self._on_change = on_change
        self._publish_by_s = -math.inf

    def activate(self) -> None:
        """Infer and move from the next tick on, starting at the measured state."""
        self._reset()
        self.buffer.accept_sizes()
        self.watchdog.reset()
        self.active = True

    def deactivate(self, now_s: float) -> Braking | None:
        """End inference and motion; None if nothing moves."""
        self.active = False
        return self.come_to_rest(now_s)

    def stop(self, now_s: float) -> Braking | None:
        """End the motion; no inference or motion until `resume`."""
        self.stopped = True
        return self.come_to_rest(now_s)

    def come_to_rest(self, now_s: float) -> Braking | None:
        """Brake; the next tick may start another motion at the measured state.

        May be called at every tick: the first result has the braking trajectory, later ones have
        None in its place, and None is returned at rest.
        """
        braking = self._brake.brake(now_s)
        self._reset()
        return braking

    def not_published(self) -> None:
        """The last trajectory was not sent: the next tick continues from the one before it."""
        self.stream.retract()
        self._publish_by_s = -math.inf
        if self._began:
            # Nothing was commanded yet, and the measured start gets old.
            self.stream.stop()

    def braking_not_published(self, now_s: float) -> Braking | None:
        """The braking trajectory was not sent: the tail of the last sent one brakes."""
        return self._brake.retract(now_s)

    def resume(self) -> None:
        """End `stop`: the next motion starts at the measured state."""
        self.stopped = False
        self.stop_reason = ""

    def set_instruction(self, text: str) -> str:
        """Set the instruction, discard inferences for another one; return its cleaned text.

        Raises:
            InstructionError: empty, too long or not text; the old instruction stays.
        """
        before = self.buffer.instruction
        instruction = self.buffer.set_instruction(text)
        if instruction != before:
            self._instructed_s = self._last_tick_s
            if not self._blend_instructions:
                if self.executor.state is ExecutorState.BUSY:
                    self._changes.record_discard(self._last_tick_s)
                self.executor.discard()
        return instruction

    def set_speed(self, scale: float, now_s: float) -> None:
        """Set the speed of execution, 0 to 1; 0 brings the arms to rest on their path.

        After a standstill the old plan is dropped, because the scene may have changed.
        """
        stood = self.pace.scale == 0 and self.pace.rate(now_s) == 0
        self.pace.set_scale(scale, now_s)
        self._publish_by_s = -math.inf
        if stood and scale > 0:
            self.executor.discard()
            self.scheduler.clear()
            self._stands = True

    def live_chunks(self, now_s: float) -> int:
        """Number of chunks with an action for `now_s` or later."""
        return self.scheduler.live_chunks(self.pace.plan_s(now_s))

    def horizon_left_s(self, now_s: float) -> float:
        """Seconds at full speed until the live chunks end."""
        return self.scheduler.remaining_s(self.pace.plan_s(now_s))

    def problems(self, now_s: float) -> list[Problem]:
        """Why no inference can start or the arms do not move."""
        found = []
        if self.stopped:
            stopped = f"stopped: {self.stop_reason or '~/resume ends it'}"
            level = Level.ERROR if self.stop_reason else Level.WARN
            found.append(Problem("stopped", stopped, level))
        if self.pace.scale == 0:
            found.append(Problem("speed", "speed: scheduler.speed_scale is 0"))
        found += self.buffer.problems(now_s)
        changes = self._changes.problem(now_s, self.network_latency.estimate_s)
        for part, text, level in (
            ("start", self._start_problem, Level.WARN),
            ("tracking", self.tracking.problem, Level.WARN),
            ("instruction", changes, Level.WARN),
            ("policy", self._requests.hang(), Level.ERROR),
            ("policy", self._late(), Level.ERROR),
            ("first command", self.refusal, Level.ERROR),
        ):
            if text:
                found.append(Problem(part, text, level))
        return found

    def use_scheduler(self, scheduler: ChunkScheduler) -> None:
        """Change the scheduler in motion; the live chunks stay."""
        scheduler.adopt(self.scheduler)
        self.scheduler = scheduler
        self._publish_by_s = -math.inf

    def process_results(self, now_s: float) -> Tick:
        """Tick between two control periods if a chunk is ready.

        The caller publishes the trajectory at once, then calls `request_inference`.
        """
        if not self.active or self.stopped or not self.executor.has_results:
            return Tick()
        return self.tick(now_s, request=False)

    def published(self, tick: Tick) -> None:
        """The tick's trajectory was sent."""
        if tick.finished_s is not None and tick.trajectory is not None:
            self.publish_wait.add(max(0.0, time.monotonic() - tick.finished_s))

    def request_inference(self, now_s: float) -> None:
        """Request the next inference if it is due; part of a tick."""
        if not self.active or self.stopped or abs(now_s - self._last_tick_s) > CLOCK_JUMP_S:
            return
        if not self.stream.active and self._start_at is None:
            # The network would see joint states that do not pass the start check.
            return
        effect_s = self.stream.lead_s + self.stream.dt_s
        self._requests.request_inference(
            now_s, self.scheduler, self.pace, effect_s, self._instruction, self._plausible
        )

    def tick(self, now_s: float, request: bool = True) -> Tick:
        """Advance to `now_s`; return what to publish.

        With `request=False` the caller calls `request_inference` after publishing, because the
        start of an inference would delay the messages.
        """
        if not self.active or self.stopped:
            return Tick()
        tick = self._check_clock(now_s)
        if self.stream.active:
            ended = self._check_tracking(now_s)
            if ended is not None:
                return ended
        else:
            self._start_at = self._checked_start(now_s)
        fault, hang = self._requests.poll()
        if hang:
            tick.failures.append(hang)
        results = self.executor.results()
        for result in results:
            fault = self._process(result, now_s, tick) or fault
        if tick.chunks:
            tick = replace(tick, finished_s=results[-1].finished_s)
        if fault is not None:
            return replace(tick, fault=fault)
        if request:
            self.request_inference(now_s)
        self._count_misses(now_s)
        self._began = False
        if not self.stream.active:
            if not self._start(now_s):
                return tick
            self._began = True
        if self._on_change and now_s < self._publish_by_s:
            return tick
        try:
            trajectory = self.stream.tick(now_s, self._targets)
        except ClockJumpedBackError:
            return replace(tick, braking=self._start_over(now_s))
        self._brake.record_tick(now_s)
        self._publish_by_s = now_s + self.stream.lookahead_steps * self.stream.dt_s / 2
        return replace(tick, trajectory=trajectory)

    def _plausible(self, state_s: float, positions: FloatArray) -> bool:
        """Whether an inference may use measured positions [n_joints]."""
        if self._start_check is not None and not self._start_check.inside(positions):
            return False
        return not self.stream.active or self.tracking.plausible(state_s, positions)

    def _check_clock(self, now_s: float) -> Tick:
        passed_s = now_s - self._last_tick_s
        self._last_tick_s = now_s
        dt_s = self.stream.dt_s
        if not math.isfinite(passed_s):
            return Tick()
        if passed_s < -dt_s or passed_s > max(CLOCK_JUMP_S, 5 * dt_s):
            braking = self._start_over(now_s)
            self._last_tick_s = now_s
            notice = (
                f"the clock went {passed_s:+.2f} s between two ticks: frames and chunks are "
                "discarded, the motion starts again at the measured joints"
            )
            return Tick(notices=[notice], braking=braking)
        return Tick()

    def _count_misses(self, now_s: float) -> None:
        has_plan = self.horizon_left_s(now_s) > 0
        if self._had_plan and not has_plan and not isinstance(self.scheduler, SyncScheduler):
            self.misses += 1
        self._had_plan = has_plan

    def _check_tracking(self, now_s: float) -> Tick | None:
        """Result of the tick if the arms do not follow the motion, which ends it."""
        commanded = self.stream.commanded(now_s).position
        fault = self.tracking.check(now_s, commanded, self.buffer.newest_joints())
        if fault is None:
            return None
        notice = f"tracking: {fault.reason}: the arms brake"
        if fault.stale:
            return Tick(notices=[notice], braking=self.come_to_rest(now_s))
        self.stop_reason = f"{fault.reason}; ~/resume starts again at the measured joints"
        return Tick(notices=[notice], braking=self.stop(now_s))

    def _checked_start(self, now_s: float) -> FloatArray | None:
        """Positions [n_joints] at which a motion may start; None while none may.

        Needs the last motion at rest, and joint states stamped after it that agree.
        """
        self._start_problem = ""
        rest_s = self._brake.rest_s(now_s)
        if now_s < rest_s:
            return None
        try:
            newest = self.buffer.positions(now_s)
        except NotReady:
            return None
        stamps_s, states = self.buffer.joint_history(rest_s)
        if self._start_check is None:
            return newest if len(stamps_s) else None
        proof = self._start_check.check(stamps_s, states)
        if not proof.too_few or now_s - rest_s > TOO_FEW_SHOWN_S:
            self._start_problem = proof.problem
        return proof.positions

    def _start(self, now_s: float) -> bool:
        """Start a motion at the checked positions if a plan exists and nothing prevents it."""
        positions = self._start_at
        if positions is None or self.live_chunks(now_s) == 0 or self._late():
            return False
        if not self._ramp_in(positions, now_s):
            return False
        self._start_at = None
        self.stream.start(positions, now_s)
        self._publish_by_s = -math.inf
        if self.low_pass is not None:
            self.low_pass.start(self.stream.commanded(now_s).position)
        return True

    def _late(self) -> str:
        """One line if all recent chunks ended before they arrived; "" otherwise.

        Each would be executed from its first step, from a standstill: only `sync` is made for that.
        """
        latency_s = self.latency.fastest_s
        if isinstance(self.scheduler, SyncScheduler) or latency_s is None:
            return ""
        if latency_s < self._chunk_s:
            return ""
        return (
            f"policy: a chunk lasts {self._chunk_s:.2f} s and arrives after {latency_s:.2f} s: use "
            "fewer denoising steps, longer chunks (n_action_steps), a faster device, or scheduler "
            "sync"
        )

    def _ramp_in(self, positions: FloatArray, now_s: float) -> bool:
        """Prepare the ramp from measured `positions` to the plan."""
        if self._start_ramp is None:
            return True
        begin_s = self.pace.plan_s(now_s + self.stream.lead_s)
        target = self.scheduler.targets(np.array([begin_s]))
        assert target is not None
        begin_s = self.pace.plan_s(now_s)
        self.refusal = self._start_ramp.begin(positions, target[0], begin_s) or ""
        if self.refusal:
            self.scheduler.clear()
        return not self.refusal

    def _targets(self, times_s: FloatArray) -> FloatArray | None:
        if self.low_pass is None:
            return self._plan(times_s)
        return self.low_pass.filter(times_s, self._plan)

    def _plan(self, times_s: FloatArray) -> FloatArray | None:
        plan_s = self.pace.plan_times_s(times_s)
        targets = self.scheduler.targets(plan_s)
        if targets is None or self._start_ramp is None:
            return targets
        # The ramp ends with the plan: no motion without a prediction.
        return self._start_ramp.apply(np.minimum(plan_s, self._plan_end_s), targets)

    def _process(self, result: InferenceResult, now_s: float, tick: Tick) -> Fault | None:
        fault = self.watchdog.record_result(result)
        if result.chunk is None:
            tick.failures.append(result.error or "inference failed without a reason")
            return fault
        chunk = replace(result.chunk, actions=self._joints.to_joints(result.chunk.actions))
        if chunk.instruction != self._instruction:
            if not self._blend_instructions:
                # Averaging chunks of two instructions follows neither.
                self.scheduler.clear()
            self._instruction = chunk.instruction
            if math.isfinite(self._instructed_s):
                self.reaction_s = now_s - self._instructed_s
        latency_s = max(0.0, now_s - chunk.stamp_s)
        self._chunk_s = (chunk.horizon - 1) * chunk.dt_s
        self._requests.measure(result, latency_s)
        if chunk.instruction == self.buffer.instruction:
            self._changes.clear()
        tick.chunks.append((chunk, latency_s))
        in_plan = replace(chunk, stamp_s=self.pace.plan_s(chunk.stamp_s))
        standing = self._stands or not self.stream.active
        ran_out = self.horizon_left_s(now_s) <= 0
        try:
            if self.scheduler.add(in_plan, self.pace.plan_s(now_s), standing=standing):
                self._publish_by_s = -math.inf
                self._stands = False
                self._plan_end_s = self.pace.plan_s(now_s) + self.horizon_left_s(now_s)
                if ran_out and self.stream.active:
                    self._ramp_in(self.stream.commanded(now_s).position, now_s)
        except ValueError as error:
            tick.failures.append(str(error))
        return fault

    def _start_over(self, now_s: float) -> Braking | None:
        """Brake and reset after a clock jump."""
        braking = self._brake.brake_by_tail(now_s)
        self.buffer.clear()
        self._reset()
        return braking

    def _reset(self) -> None:
        self._requests.reset()
        self.scheduler.clear()
        self.stream.stop()
        if self.low_pass is not None:
            self.low_pass.clear()
        self.pace.reset()
        self.refusal = self._start_problem = ""
        self._start_at = None
        self.tracking.reset()
        self._changes.clear()
        self._had_plan = self._stands = False
        self._last_tick_s = -math.inf
        self._instruction = ""
