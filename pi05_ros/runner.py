"""One control tick: finished chunks in, the next inference asked for, a trajectory out.

What a control tick brings.

Instructions that change faster than the policy can follow.

From which measured positions a motion may start, and from when on.

When to infer, on what, and what to make of the answer.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from pi05_ros.control.braking import Braking, Rest
from pi05_ros.control.chunks import ChunkScheduler
from pi05_ros.control.latency import LatencyTracker
from pi05_ros.control.scheduler import SyncScheduler
from pi05_ros.control.speed import LowPassFilter, SpeedScaler, StartRamp
from pi05_ros.control.start_check import StartCheck
from pi05_ros.control.tracking import TrackingMonitor
from pi05_ros.control.trajectory import ClockJumpedBackError, CommandStream, TrajectoryPoints
from pi05_ros.executor import ExecutorState, Fault, InferenceExecutor, InferenceResult, Watchdog
from pi05_ros.observation.buffer import NotReady, ObservationBuffer, RoundIncomplete, Snapshot
from pi05_ros.observation.frame_sync import FrameSync
from pi05_ros.types import (
    ActionChunk,
    ActionPrefix,
    FloatArray,
    ImageArray,
    JointGroup,
    Observation,
)


@dataclass(frozen=True)
class Tick:
    """What one control tick brought."""

    trajectory: TrajectoryPoints | None = None
    """To be published; None while there is nothing to follow."""
    chunks: list[tuple[ActionChunk, float]] = field(default_factory=list)
    """Chunks that arrived, in joint units, with their latency from stamp to use in seconds."""
    failures: list[str] = field(default_factory=list)
    """Inferences that failed, one line each."""
    notices: list[str] = field(default_factory=list)
    """What else a person should know, one line each."""
    finished_s: float | None = None
    """When the last of the chunks was there, by time.monotonic."""
    fault: Fault | None = None
    """Why the motion must end: the caller deactivates."""
    braking: Braking | None = None
    """The runner ended the motion in this tick; `trajectory` is None then."""


MIN_CHANGES = 3
FORGET_S = 2.0
"""So long after the last change another problem prevents inference."""


class InstructionChanges:
    """Counts changes of the instruction that discard an inference, since one last finished.

    An inference in flight for an instruction that has changed is discarded: the executor cannot
    abort it, so the next one begins at the same time either way, and the arms never move for an
    outdated instruction. Changes that come faster than inferences end leave no result at all.
    """

    def __init__(self) -> None:
        self._times_s: deque[float] = deque(maxlen=1000)

    def record_discard(self, now_s: float) -> None:
        """A changed instruction discards an inference in flight."""
        if math.isfinite(now_s):
            self._times_s.append(now_s)

    def clear(self) -> None:
        """An inference for the newest instruction has finished, or none is wanted."""
        self._times_s.clear()

    def problem(self, now_s: float, inference_s: float | None) -> str:
        """One line if at least `MIN_CHANGES` have discarded inferences of `inference_s`."""
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


SHOWN_AFTER_S = 1.0
"""Joint states that are too few are a problem if they are still after this time."""


class StartGate:
    """Waits for the rest of the last motion and for joint states, stamped later, that agree."""

    def __init__(self, buffer: ObservationBuffer, rest: Rest, check: StartCheck | None) -> None:
        """Without a `check`, the newest joint state is enough."""
        self.problem = ""
        self._buffer = buffer
        self._rest = rest
        self._check = check

    def positions(self, now_s: float) -> FloatArray | None:
        """[n_joints] to start at; None while no motion may start. Sets `problem`."""
        self.problem = ""
        rest_s = self._rest.rest_s(now_s)
        if now_s < rest_s:
            return None
        try:
            newest = self._buffer.positions(now_s)
        except NotReady:
            return None
        stamps_s, states = self._buffer.joint_history(rest_s)
        if self._check is None:
            return newest if len(stamps_s) else None
        proof = self._check.check(stamps_s, states)
        if not proof.too_few or now_s - rest_s > SHOWN_AFTER_S:
            self.problem = proof.problem
        return proof.positions


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
        self._rounds = FrameSync()
        self._last_observation_s = -math.inf
        self._ready_s = self._free_s = -math.inf

    def poll(self) -> tuple[Fault | None, str | None]:
        """The fault that ends the motion, and the hang that begins now, if there is one."""
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
        """The inference that hangs at the moment."""
        if self._watchdog is None:
            return None
        return self._watchdog.hang(self._executor.busy_since_s, time.monotonic())

    def record_result(self, result: InferenceResult) -> Fault | None:
        """The fault that this result completes."""
        return None if self._watchdog is None else self._watchdog.record_result(result)

    def measure(self, result: InferenceResult, latency_s: float) -> None:
        """Take a usable chunk's latencies."""
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
                prefix = ActionPrefix(
                    prefix.actions[: prefix.committed_steps], prefix.committed_steps
                )
        self._executor.submit(lambda: self._observe(snapshot), prefix)

    def reset(self) -> None:
        """Throw away what was asked for; the next observation may be of any time."""
        self._executor.discard()
        self._last_observation_s = -math.inf
        self._rounds.reset()

    def _prefix(
        self, scheduler: ChunkScheduler, stamp_s: float, frozen_until_s: float
    ) -> ActionPrefix | None:
        prefix = scheduler.prefix(stamp_s, frozen_until_s)
        if prefix is None:
            return None
        return ActionPrefix(self._joints.to_policy(prefix.actions), prefix.committed_steps)

    def _observe(self, snapshot: Snapshot) -> Observation:
        """Decode; called on the inference thread."""
        return self._buffer.observe(snapshot, self._decode_image, self._joints.to_policy)


CLOCK_JUMP_S = 1.0
"""Ticks farther apart than this, and than 5 periods: what was planned is not continued."""


class PolicyRunner:
    """Connects the observation buffer, the executor, the scheduler and the command stream.

    No method is thread safe, nor is any property but `active`, `stopped` and `hung`: a caller with
    several threads holds one lock around each call, `set_speed`, `use_scheduler`, `live_chunks`,
    `horizon_left_s` and `problems` included, which read or change what a tick changes. The parts
    `buffer` and `executor` have locks of their own: they may be used at any time. Times are seconds
    on the clock of the observation stamps.
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
        follower: LowPassFilter | None = None,
        approach: StartRamp | None = None,
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
            decode_image: a stored picture → RGB [height, width, 3].
            follower: smooths the targets in front of the limits.
            approach: leads into a first command that is far away; None goes there at once.
            start_check: proves the joint states that a motion starts at; None believes the newest.
            tracking: compares commanded and measured positions; None does not.
            watchdog: looks after the executor; None leaves hangs and failures to the caller.
            speed_scale: 0 to 1; below 1 the chunks are executed slower than they were meant, at 0
                the arms stand.
            speed_ramp_s: time for a change of the speed from 0 to 1.
            blend_instructions: chunks of an earlier instruction go on until they end, and the
                scheduler merges them with those of the next; else they give way to its first.
            on_change: publish when the plan has changed or half of the last trajectory's
                lookahead is over, instead of with every tick.
        """
        self.follower = follower
        self.watchdog = watchdog
        self.pace = SpeedScaler(speed_scale, speed_ramp_s)
        self.buffer = buffer
        self.executor = executor
        self.scheduler = scheduler
        self.stream = stream
        self._requests = Requests(buffer, executor, joints, decode_image, watchdog)
        self.latency = self._requests.latency
        self.network_latency = self._requests.network_latency
        self.start_wait = self._requests.start_wait
        self.publish_wait = LatencyTracker()
        """From a chunk's end of inference to the published trajectory that it changed."""
        self.misses = 0
        """Times that the chunks ran out before the next one came, `sync` left out."""
        self.reaction_s: float | None = None
        """From the last instruction to its first chunk."""
        self.refusal = ""
        """Why the last motion was not begun."""
        self._joints = joints
        self._approach = approach
        self._blend_instructions = blend_instructions
        self._active = self._stopped = False
        self._last_tick_s = -math.inf
        self.tracking = tracking or TrackingMonitor(joints, time_s=0.0)
        self._rest = Rest(stream)
        self._start_check = start_check
        self._start_gate = StartGate(buffer, self._rest, start_check)
        self._start_at: FloatArray | None = None
        self._stop_reason = ""
        self._changes = InstructionChanges()
        self._began = False
        self._instruction = ""
        self._instructed_s = -math.inf
        self._had_plan = self._stands = False
        self._plan_end_s = -math.inf
        self._on_change = on_change
        self._publish_by_s = -math.inf

    @property
    def active(self) -> bool:
        return self._active

    @property
    def stopped(self) -> bool:
        """Between `stop` and `resume`; an activation does not end it."""
        return self._stopped

    @property
    def stop_reason(self) -> str:
        """Why the runner stopped itself; empty after `stop` by a caller."""
        return self._stop_reason

    def activate(self) -> None:
        """From the next tick on, infer and move. The first chunk starts at the measured state."""
        self._forget()
        self.buffer.accept_sizes()
        if self.watchdog is not None:
            self.watchdog.reset()
        self._active = True

    def deactivate(self, now_s: float) -> Braking | None:
        """End inference and motion; results in flight are discarded. None: nothing moves."""
        self._active = False
        return self.come_to_rest(now_s)

    def stop(self, now_s: float) -> Braking | None:
        """As `deactivate`, and latched: nothing moves or infers until `resume`."""
        self._stopped = True
        return self.come_to_rest(now_s)

    def come_to_rest(self, now_s: float) -> Braking | None:
        """Brake; the next tick may plan another motion, which starts at the measured state.

        May be called at every tick while something prevents motion: the first call has the
        trajectory, those during the braking have None for it, and those at rest return None.
        """
        braking = self._rest.brake(now_s)
        self._forget()
        return braking

    def not_published(self) -> None:
        """The last tick's trajectory was not sent: the next tick continues from the one before."""
        self.stream.retract()
        self._publish_by_s = -math.inf
        if self._began:
            # Nothing was commanded since the start, and the measured state gets old.
            self.stream.stop()

    def braking_not_published(self, now_s: float) -> Braking | None:
        """The braking's trajectory was not sent: the tail of the last one sent brakes instead."""
        return self._rest.retract(now_s)

    def resume(self) -> None:
        """End `stop`: if active, the next motion starts at the measured state."""
        self._stopped = False
        self._stop_reason = ""

    def set_instruction(self, text: str) -> str:
        """Take an instruction; what is in flight for another one is thrown away.

        Returns the instruction as it will be used.

        Raises:
            InstructionError: empty, too long or not text; the instruction stays as it was.
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
        """Execute the chunks at another speed, 0 to 1; 0 brings the arms to rest on their way.

        A plan that has come to stand is not taken up again: the world may have changed since.
        """
        stood = self.pace.scale == 0 and self.pace.rate(now_s) == 0
        self.pace.set_scale(scale, now_s)
        self._publish_by_s = -math.inf
        if stood and scale > 0:
            self.executor.discard()
            self.scheduler.clear()
            self._stands = True

    def live_chunks(self, now_s: float) -> int:
        """How many chunks have an action for `now_s` or later."""
        return self.scheduler.live_chunks(self.pace.plan_s(now_s))

    def horizon_left_s(self, now_s: float) -> float:
        """Seconds at full speed that the live chunks still reach."""
        return self.scheduler.remaining_s(self.pace.plan_s(now_s))

    def problems(self, now_s: float) -> list[str]:
        """Why no inference can start or the arms do not move; one line each."""
        found = []
        if self._stopped:
            found.append(f"stopped: {self._stop_reason or '~/resume ends it'}")
        if self.pace.scale == 0:
            found.append("speed: scheduler.speed_scale is 0")
        found += self.buffer.problems(now_s)
        found += [self._start_gate.problem, self.tracking.problem]
        found.append(self._changes.problem(now_s, self.network_latency.estimate_s))
        found += [self._requests.hang() or "", self.refusal]
        return [text for text in found if text]

    @property
    def hung(self) -> bool:
        """Whether the policy has not answered for too long."""
        return self._requests.hang() is not None

    def use_scheduler(self, scheduler: ChunkScheduler) -> None:
        """Change the method in motion: the live chunks go on under another one."""
        scheduler.adopt(self.scheduler)
        self.scheduler = scheduler
        self._publish_by_s = -math.inf

    def process_results(self, now_s: float) -> Tick:
        """Between two ticks: a chunk that has come makes a tick of its own.

        Its trajectory should go out at once, and `ask` follow.
        """
        if not self._active or self._stopped or not self.executor.has_results:
            return Tick()
        return self.tick(now_s, request=False)

    def published(self, tick: Tick) -> None:
        """The tick's trajectory is out."""
        if tick.finished_s is not None and tick.trajectory is not None:
            self.publish_wait.add(max(0.0, time.monotonic() - tick.finished_s))

    def request_inference(self, now_s: float) -> None:
        """Ask for the next inference, if it is time for one; part of a tick."""
        if not self._active or self._stopped or abs(now_s - self._last_tick_s) > CLOCK_JUMP_S:
            return
        if not self.stream.active and self._start_at is None:
            # Joint states that do not prove a start would be the state that the network sees.
            return
        effect_s = self.stream.lead_s + self.stream.dt_s
        self._requests.request_inference(
            now_s, self.scheduler, self.pace, effect_s, self._instruction, self._plausible
        )

    def tick(self, now_s: float, request: bool = True) -> Tick:
        """Advance to `now_s`; returns what to publish.

        Without `ask`, the caller does that when the rest is published: the inference's first steps
        would hold it up.
        """
        if not self._active or self._stopped:
            return Tick()
        tick = self._check_clock(now_s)
        if self.stream.active:
            ended = self._check_tracking(now_s)
            if ended is not None:
                return ended
        else:
            self._start_at = self._start_gate.positions(now_s)
        fault, hang = self._requests.poll()
        if hang:
            tick.failures.append(hang)
        results = self.executor.results()
        for result in results:
            fault = self._take(result, now_s, tick) or fault
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
        self._rest.record_tick(now_s)
        self._publish_by_s = now_s + self.stream.lookahead_steps * self.stream.dt_s / 2
        return replace(tick, trajectory=trajectory)

    def _plausible(self, state_s: float, positions: FloatArray) -> bool:
        """Whether an inference may see these measured positions [n_joints]."""
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
        """The tick that ends the motion if the arms do not follow it."""
        commanded = self.stream.commanded(now_s).position
        fault = self.tracking.check(now_s, commanded, self.buffer.newest_joints())
        if fault is None:
            return None
        notice = f"tracking: {fault.reason}: the arms brake"
        if fault.stale:
            return Tick(notices=[notice], braking=self.come_to_rest(now_s))
        self._stop_reason = f"{fault.reason}; ~/resume starts again at the measured joints"
        return Tick(notices=[notice], braking=self.stop(now_s))

    def _start(self, now_s: float) -> bool:
        """Begin a motion at the proven positions, if there is one and nothing prevents it."""
        positions = self._start_at
        if positions is None or self.live_chunks(now_s) == 0 or not self._lead_in(positions, now_s):
            return False
        self._start_at = None
        self.stream.start(positions, now_s)
        self._publish_by_s = -math.inf
        if self.follower is not None:
            self.follower.start(self.stream.commanded(now_s).position)
        return True

    def _lead_in(self, positions: FloatArray, now_s: float) -> bool:
        """Prepare the way from `positions`, where the robot stands, into the plan."""
        if self._approach is None:
            return True
        begin_s = self.pace.plan_s(now_s + self.stream.lead_s)
        target = self.scheduler.targets(np.array([begin_s]))
        assert target is not None
        begin_s = self.pace.plan_s(now_s)
        self.refusal = self._approach.begin(positions, target[0], begin_s) or ""
        if self.refusal:
            self.scheduler.clear()
        return not self.refusal

    def _targets(self, times_s: FloatArray) -> FloatArray | None:
        if self.follower is None:
            return self._plan(times_s)
        return self.follower.course(times_s, self._plan)

    def _plan(self, times_s: FloatArray) -> FloatArray | None:
        plan_s = self.pace.plan_times_s(times_s)
        targets = self.scheduler.targets(plan_s)
        if targets is None or self._approach is None:
            return targets
        # a way into the plan ends with the plan: nothing moves on what nobody predicted
        return self._approach.course(np.minimum(plan_s, self._plan_end_s), targets)

    def _take(self, result: InferenceResult, now_s: float, tick: Tick) -> Fault | None:
        fault = self._requests.record_result(result)
        if result.chunk is None:
            tick.failures.append(result.error or "inference failed without a reason")
            return fault
        chunk = replace(result.chunk, actions=self._joints.to_joints(result.chunk.actions))
        if chunk.instruction != self._instruction:
            if not self._blend_instructions:
                # chunks for another instruction are another plan: averaging both follows neither
                self.scheduler.clear()
            self._instruction = chunk.instruction
            if math.isfinite(self._instructed_s):
                self.reaction_s = now_s - self._instructed_s
        latency_s = max(0.0, now_s - chunk.stamp_s)
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
                    self._lead_in(self.stream.commanded(now_s).position, now_s)
        except ValueError as error:
            tick.failures.append(str(error))
        return fault

    def _start_over(self, now_s: float) -> Braking | None:
        """The clock was set back, or a bag starts from its beginning."""
        braking = self._rest.brake_by_tail(now_s)
        self.buffer.clear()
        self._forget()
        return braking

    def _forget(self) -> None:
        self._requests.reset()
        self.scheduler.clear()
        self.stream.stop()
        if self.follower is not None:
            self.follower.clear()
        self.pace.reset()
        self.refusal = self._start_gate.problem = ""
        self._start_at = None
        self.tracking.stop()
        self._changes.clear()
        self._had_plan = self._stands = False
        self._last_tick_s = -math.inf
        self._instruction = ""
