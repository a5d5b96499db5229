"""The control tick: what must hold between an arriving chunk and a published trajectory."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from runner_rig import DT_S, HOME, Rig  # type: ignore[import-not-found]

from pi05_ros.control.scheduler import make_scheduler
from pi05_ros.control.speed import LowPassFilter, StartRamp
from pi05_ros.executor import ExecutorState
from pi05_ros.observation.instruction import InstructionError
from pi05_ros.requests import Watchdog
from pi05_ros.runner import Tick
from pi05_ros.types import ActionChunk, ActionPrefix, Observation


def test_nothing_moves_without_an_instruction(rig: Rig) -> None:
    rig.runner.activate()
    assert all(rig.tick().trajectory is None for _ in range(20))
    assert rig.policy.seen == []


def test_nothing_moves_before_activation(rig: Rig) -> None:
    rig.runner.set_instruction("wave")
    assert all(rig.tick() == Tick() for _ in range(20))
    assert rig.policy.seen == []


def test_the_first_trajectory_starts_at_the_measured_state(rig: Rig) -> None:
    """Pins: a jump from where the arm is to where the chunk would like it to be."""
    trajectory = rig.start()
    assert np.allclose(trajectory.positions[0], HOME, atol=1e-3)
    assert np.allclose(trajectory.velocities[-1], 0.0)


def test_units_are_converted_on_both_ways(rig: Rig) -> None:
    """Pins: gripper metres given to a policy that was trained on 0-1, and the other way round."""
    rig.activate()
    tick = rig.until(lambda tick: tick.chunks)
    assert np.allclose(rig.policy.seen[0].state, [0.1, 0.25])
    assert np.allclose(tick.chunks[0][0].actions, [0.5, 0.06])
    final = rig.until(
        lambda tick: (
            tick.trajectory is not None
            and np.allclose(tick.trajectory.positions[-1], [0.5, 0.06], atol=1e-3)
        )
    )
    assert final.trajectory is not None


def test_a_chunk_is_used_on_arrival(rig: Rig) -> None:
    """Pins: a chunk that waits for the next tick, and the next inference that waits for the one
    after; between ticks with nothing new, nothing is published."""
    rig.start()
    while rig.executor.state is not ExecutorState.READY:
        time.sleep(0.002)
    rig.tick()
    deadline_s = time.monotonic() + 10.0
    while not rig.executor.has_results:
        assert time.monotonic() < deadline_s
        time.sleep(0.002)
    inferred = len(rig.policy.seen)
    tick = rig.runner.process_results(rig.now_s + 0.4 * DT_S)
    assert tick.chunks and tick.trajectory is not None and tick.finished_s is not None
    assert rig.runner.process_results(rig.now_s + 0.5 * DT_S) == Tick()
    rig.runner.published(tick)
    rig.now_s += 0.6 * DT_S
    rig.see()
    rig.runner.request_inference(rig.now_s)
    while len(rig.policy.seen) == inferred:
        assert time.monotonic() < deadline_s
        time.sleep(0.002)
    assert rig.policy.seen[-1].stamp_s == rig.now_s
    waits = rig.runner.start_wait.summary(), rig.runner.publish_wait.summary()
    assert all(wait.count and 0 <= wait.max_s < 10 for wait in waits)


def test_no_inference_is_requested_before_activation_or_after_a_stop(rig: Rig) -> None:
    """Pins: an inference after stop, before activation, or on a clock that has jumped."""
    rig.runner.set_instruction("wave")
    rig.see()
    rig.runner.request_inference(rig.now_s)
    rig.runner.activate()
    rig.runner.request_inference(rig.now_s)
    assert rig.runner.process_results(rig.now_s) == Tick()
    rig.runner.stop(rig.now_s)
    rig.runner.request_inference(rig.now_s)
    time.sleep(0.05)
    assert rig.policy.seen == []


def test_latency_is_measured_from_the_observation(rig: Rig) -> None:
    rig.activate()
    chunk, latency_s = rig.until(lambda tick: tick.chunks).chunks[0]
    assert latency_s == pytest.approx(rig.now_s - chunk.stamp_s)
    assert chunk.stamp_s == rig.policy.seen[0].stamp_s


def test_an_observation_is_used_once(rig: Rig) -> None:
    """Pins: inferring again and again on the last frame of a camera that stopped."""
    rig.activate()
    rig.until(lambda tick: tick.chunks)
    for _ in range(20):
        rig.tick(see=False)
        time.sleep(0.005)
    stamps = [observation.stamp_s for observation in rig.policy.seen]
    assert len(stamps) == len(set(stamps))


def test_deactivation_discards_what_is_in_flight(rig: Rig) -> None:
    """Pins: a chunk requested before the stop that moves the arm after it."""
    rig.start()
    rig.policy.gate = threading.Event()
    rig.until(lambda _: rig.executor.busy_since_s is not None)
    braking = rig.runner.deactivate(rig.now_s)
    assert braking is not None and braking.trajectory is not None
    assert np.allclose(braking.trajectory.velocities[-1], 0.0)
    rig.policy.gate.set()
    time.sleep(0.05)
    assert rig.tick() == Tick()
    rig.policy.gate = None
    rig.runner.activate()
    first = rig.tick()
    assert first.chunks == []


def test_motion_restarts_only_at_rest(rig: Rig) -> None:
    """Pins: an activation during braking that commands moving arms to stand at once."""
    rig.activate()
    rig.until(
        lambda tick: tick.trajectory is not None and np.abs(tick.trajectory.velocities[0]).max() > 1
    )
    braking = rig.runner.deactivate(rig.now_s)
    assert braking is not None and braking.trajectory is not None
    rest_s = braking.trajectory.stamp_s + braking.trajectory.times_from_start_s[-1]
    assert braking.rest_s == pytest.approx(rest_s) and braking.start_s == rig.now_s
    rig.runner.activate()
    tick = rig.until(lambda tick: tick.trajectory is not None)
    assert tick.trajectory is not None
    assert rig.now_s >= rest_s


def test_chunks_that_end_before_they_arrive_do_not_move_the_arm(rig: Rig) -> None:
    """Fault: stale chunks executed one by one from a standstill. Only `sync` is made for that."""
    rig.policy.horizon = 3
    passed = threading.Semaphore(0)
    rig.policy.gate = SimpleNamespace(  # type: ignore[assignment]
        wait=lambda timeout_s: passed.acquire(timeout=timeout_s), set=passed.release
    )
    rig.activate()

    def late_chunk() -> list[Tick]:
        ticks = [rig.until(lambda _: rig.executor.busy_since_s is not None)]
        ticks += [rig.tick() for _ in range(10)]
        passed.release()
        while not rig.executor.has_results:
            time.sleep(0.001)
        return [*ticks, rig.tick()]

    ticks = [tick for _ in range(4) for tick in late_chunk()]
    assert any(tick.chunks for tick in ticks) and not any(tick.trajectory for tick in ticks)
    assert any("a chunk lasts 0.04 s and arrives after" in text for text in rig.problems())
    rig.runner.use_scheduler(make_scheduler("sync", gripper=rig.joints.gripper))
    assert any(tick.trajectory for tick in late_chunk() + late_chunk())
    assert not any("a chunk lasts" in text for text in rig.problems())


def test_a_new_instruction_discards_the_old_ones_chunk(rig: Rig) -> None:
    """Pins: averaging the plans of two instructions, which follows neither."""
    rig.start("left")
    rig.policy.gate = threading.Event()
    rig.until(lambda _: rig.executor.busy_since_s is not None)
    rig.runner.set_instruction("right")
    rig.policy.gate.set()
    rig.policy.gate = None
    rig.policy.target = np.array([-0.5, 0.0])
    tick = rig.until(lambda tick: tick.chunks)
    assert tick.chunks[0][0].instruction == "right"
    assert rig.runner.scheduler.live_chunks(rig.now_s) == 1


def test_the_same_instruction_again_changes_nothing(rig: Rig) -> None:
    rig.runner.set_instruction("wave")
    before = rig.executor.statistics.discarded
    rig.runner.activate()
    rig.until(lambda tick: tick.chunks)
    rig.runner.set_instruction(" wave ")
    assert rig.runner.scheduler.live_chunks(rig.now_s) > 0
    assert rig.executor.statistics.discarded == before


def test_a_refused_instruction_leaves_the_one_before(rig: Rig) -> None:
    rig.runner.set_instruction("wave")
    with pytest.raises(InstructionError):
        rig.runner.set_instruction("   ")
    assert rig.runner.buffer.instruction == "wave"


def test_failures_are_reported_and_the_arm_comes_to_rest(rig: Rig) -> None:
    rig.start()
    rig.policy.fail = True
    tick = rig.until(lambda tick: tick.failures)
    assert "out of luck" in tick.failures[0]
    resting = rig.until(
        lambda tick: tick.trajectory is not None and np.allclose(tick.trajectory.velocities, 0.0)
    )
    assert resting.trajectory is not None


def test_a_clock_that_jumps_back_starts_over(rig: Rig) -> None:
    """Pins: a looping bag that replays old times into a trajectory of the future."""
    rig.start()
    rig.now_s -= 50.0
    assert rig.tick().trajectory is None
    trajectory = rig.trajectory()
    assert abs(trajectory.stamp_s - rig.now_s) < 1.0
    assert np.allclose(trajectory.positions[0], rig.measured, atol=1e-3)


def test_a_motion_that_came_to_rest_starts_at_the_measured_state(rig: Rig) -> None:
    rig.start()
    rig.runner.come_to_rest(rig.now_s)
    assert not rig.runner.stream.active
    trajectory = rig.trajectory()
    assert np.allclose(trajectory.positions[0], rig.measured, atol=1e-3)


def test_a_guided_method_gives_the_policy_what_will_be_executed(rig: Rig) -> None:
    """Pins: a prefix in the wrong units, or one that ends before the chunk can arrive."""
    rig.runner.use_scheduler(make_scheduler("rtc", gripper=rig.joints.gripper))
    rig.start()
    rig.until(lambda _: len(rig.policy.prefixes) > 2 and rig.policy.prefixes[-1] is not None)
    assert rig.policy.prefixes[0] is None
    prefix = rig.policy.prefixes[-1]
    assert prefix is not None
    np.testing.assert_allclose(prefix.actions, np.tile([0.5, 1.0], (len(prefix.actions), 1)))
    estimate_s = rig.runner.latency.estimate_s
    assert estimate_s is not None
    assert prefix.committed_steps * DT_S >= rig.runner.stream.lead_s + DT_S
    assert prefix.committed_steps <= len(prefix.actions) <= rig.policy.horizon


def test_a_method_that_is_not_guided_gives_no_prefix(rig: Rig) -> None:
    rig.activate()
    rig.until(lambda _: len(rig.policy.prefixes) > 3)
    assert set(rig.policy.prefixes) == {None}


def test_a_new_instruction_is_not_held_back_by_the_old_ones_plan(rig: Rig) -> None:
    """Only the committed steps continue the old plan."""
    rig.runner.use_scheduler(make_scheduler("rtc", gripper=rig.joints.gripper))
    rig.runner.set_instruction("left")
    rig.runner.activate()
    rig.until(lambda _: len(rig.policy.prefixes) > 2)
    seen = len(rig.policy.seen)
    rig.runner.set_instruction("right")
    rig.until(lambda _: any(o.instruction == "right" for o in rig.policy.seen[seen:]))
    first = next(i for i, o in enumerate(rig.policy.seen) if o.instruction == "right")
    prefix = rig.policy.prefixes[first]
    assert prefix is not None and len(prefix.actions) == prefix.committed_steps


def test_the_method_changes_in_motion_without_a_jump(rig: Rig) -> None:
    rig.start()
    before = rig.runner.stream.commanded(rig.now_s + DT_S).position
    for name in ("rtc", "blend", "latest", "sync", "temporal_ensemble"):
        rig.runner.use_scheduler(make_scheduler(name, gripper=rig.joints.gripper))
        tick = rig.tick()
        assert tick.trajectory is not None
        after = rig.runner.stream.commanded(rig.now_s + DT_S).position
        assert (np.abs(after - before) <= rig.joints.max_velocity * DT_S + 1e-9).all()
        before = after


def swing(rig: Rig, scale: float | None = None) -> None:
    """Activate with a policy that sweeps the elbow at 0.5 rad/s, and let it move."""

    def sweep(observation: Observation, prefix: ActionPrefix | None = None) -> ActionChunk:
        steps = np.arange(rig.policy.horizon) * DT_S
        elbow = observation.state[0] + 0.5 * steps
        actions = np.column_stack((elbow, np.full(len(steps), 0.25)))
        return ActionChunk(actions, observation.stamp_s, DT_S, observation.instruction)

    rig.policy.infer = sweep  # type: ignore[method-assign]
    rig.activate()
    if scale is not None:
        rig.runner.set_speed(scale, rig.now_s)
    rig.until(lambda tick: tick.trajectory is not None)


def commanded(rig: Rig) -> Any:
    return rig.runner.stream.commanded(rig.now_s)


@pytest.mark.parametrize("scale", [1.0, 0.5, 0.1])
def test_speed_scale_is_the_speed_of_the_arms(rig: Rig, scale: float) -> None:
    rig.runner.use_scheduler(make_scheduler("sync", gripper=rig.joints.gripper))
    swing(rig, scale)
    for _ in range(25):
        rig.tick()
    assert commanded(rig).velocity[0] == pytest.approx(0.5 * scale, rel=0.1)


def test_speed_zero_brings_to_rest_and_any_speed_resumes(rig: Rig) -> None:
    """Pins: a jump in position or velocity at either end, and an old plan that is taken up."""
    rig.runner.use_scheduler(make_scheduler("sync", gripper=rig.joints.gripper))
    swing(rig)
    for _ in range(20):
        rig.tick()
    states = [commanded(rig)]
    assert states[0].velocity[0] > 0.4

    def run(ticks: int) -> None:
        for _ in range(ticks):
            rig.tick()
            time.sleep(0.001)
            states.append(commanded(rig))

    rig.runner.set_speed(0.0, rig.now_s)
    run(60)
    rest = states[-1]
    assert abs(rest.velocity[0]) < 1e-6
    completed = rig.executor.statistics.completed
    run(20)
    assert rig.executor.statistics.completed == completed
    assert np.allclose(states[-1].position, rest.position, atol=1e-9)
    assert rig.runner.stream.active
    rig.runner.set_speed(0.5, rig.now_s)
    assert rig.runner.live_chunks(rig.now_s) == 0
    run(60)
    assert rig.executor.statistics.completed > completed
    assert abs(states[-1].velocity[0]) > 0.1
    positions = np.array([state.position for state in states])
    velocities = np.array([state.velocity for state in states])
    assert (np.abs(np.diff(positions, axis=0)) <= rig.joints.max_velocity * DT_S + 1e-9).all()
    assert (np.abs(np.diff(velocities, axis=0)) <= rig.joints.max_acceleration * DT_S + 1e-9).all()


def test_a_speed_out_of_range_changes_nothing(rig: Rig) -> None:
    with pytest.raises(ValueError, match="speed_scale"):
        rig.runner.set_speed(1.5, rig.now_s)
    assert rig.runner.pace.scale == 1.0


def test_stop_is_latched_until_resume(rig: Rig) -> None:
    """Pins: a chunk in flight that moves the arm after the stop, an activation that ends it."""
    swing(rig)
    braking = rig.runner.stop(rig.now_s)
    assert braking is not None and braking.trajectory is not None
    assert np.allclose(braking.trajectory.velocities[-1], 0.0)
    completed = rig.executor.statistics.completed
    time.sleep(0.02)
    assert all(rig.tick() == Tick() for _ in range(20))
    rig.runner.deactivate(rig.now_s)
    rig.runner.activate()
    assert all(rig.tick() == Tick() for _ in range(20))
    assert rig.executor.statistics.completed <= completed + 1
    assert rig.runner.stopped
    assert any("~/resume" in problem for problem in rig.problems())
    rig.runner.resume()
    trajectory = rig.trajectory()
    assert np.allclose(trajectory.positions[0], rig.measured, atol=1e-3)


def watched(rig: Rig, watchdog: Watchdog, **options: Any) -> None:
    """Give the rig a runner with a watchdog."""
    rig.runner = rig.make_runner(watchdog=watchdog, **options)
    rig.activate()


def test_a_hang_leads_to_the_tail_and_its_result_is_discarded(rig: Rig) -> None:
    """Pins: a control tick that waits, or a chunk of seconds ago that moves the arm."""
    watched(rig, Watchdog(hang_timeout_s=0.05))
    rig.until(lambda tick: tick.trajectory is not None)
    rig.policy.gate = threading.Event()
    rig.until(lambda _: rig.executor.busy_since_s is not None)
    tick = rig.until(lambda tick: tick.failures)
    assert "no answer" in tick.failures[0] and tick.fault is None
    assert any("no answer" in problem for problem in rig.problems())
    tick = rig.until(lambda _: rig.runner.misses == 1)
    for _ in range(10):
        tick = rig.tick()
    assert tick.trajectory is not None and np.allclose(tick.trajectory.velocities, 0.0)
    hung_s = rig.policy.seen[-1].stamp_s
    gate, rig.policy.gate = rig.policy.gate, None
    gate.set()
    tick = rig.until(lambda tick: tick.chunks)
    assert tick.chunks[0][0].stamp_s > hung_s
    assert not any("no answer" in problem for problem in rig.problems())


def test_failures_in_a_row_are_a_fault_of_the_tick(rig: Rig) -> None:
    watched(rig, Watchdog(max_failures=3))
    rig.until(lambda tick: tick.trajectory is not None)
    rig.policy.fail = True
    tick = rig.until(lambda tick: tick.fault)
    assert tick.fault is not None and "out of luck" in tick.fault.message
    assert tick.trajectory is None


def test_an_ended_inference_thread_is_a_fault_of_the_tick(rig: Rig) -> None:
    watched(rig, Watchdog())

    def end(observation: Observation, prefix: ActionPrefix | None = None) -> ActionChunk:
        raise SystemExit("a policy that calls sys.exit")

    rig.policy.infer = end  # type: ignore[method-assign]
    tick = rig.until(lambda tick: tick.fault)
    assert tick.fault is not None and tick.fault.device
    assert "sys.exit" in tick.fault.message


def test_a_far_first_command_is_ramped_to(rig: Rig) -> None:
    watched(rig, Watchdog(), start_ramp=StartRamp(rig.joints, "ramp", 0.2, 0.1))
    rig.until(lambda tick: tick.trajectory is not None)
    for _ in range(60):
        rig.tick()
        assert abs(commanded(rig).velocity[0]) <= 0.1 * 2.0 + 1e-6
    assert 0.0 < commanded(rig).position[0] - HOME[0] < 0.3


def test_a_ramp_ends_with_the_plan(rig: Rig) -> None:
    """Pins: arms that move to a far target for seconds after the end of the last chunk."""
    watched(rig, Watchdog(), start_ramp=StartRamp(rig.joints, "ramp", 0.2, 0.05))
    rig.until(lambda tick: tick.trajectory is not None)
    rig.until(lambda _: rig.runner.misses == 1, see=False)
    for _ in range(15):
        rig.tick(see=False)
    resting = commanded(rig)
    assert abs(resting.velocity[0]) < 1e-3
    assert resting.position[0] < 0.4
    for _ in range(60):
        rig.tick(see=False)
    assert commanded(rig).position[0] == pytest.approx(resting.position[0], abs=1e-3)
    rig.until(lambda tick: tick.chunks)
    for _ in range(30):
        rig.tick()
        assert abs(commanded(rig).velocity[0]) <= 0.05 * 2.0 + 1e-6
    assert commanded(rig).position[0] > resting.position[0]


def test_a_far_first_command_is_refused(rig: Rig) -> None:
    watched(rig, Watchdog(), start_ramp=StartRamp(rig.joints, "refuse", 0.2))
    rig.until(lambda _: rig.runner.refusal)
    assert not rig.runner.stream.active
    assert any("'elbow'" in problem for problem in rig.problems())
    rig.policy.target = np.array([0.15, 1.0])
    rig.until(lambda tick: tick.trajectory is not None)
    assert rig.runner.refusal == ""


def test_a_motion_waits_for_fresh_positions(rig: Rig) -> None:
    """Pins: a start at positions that the arm had when its driver died."""
    rig.policy.gate = threading.Event()
    rig.activate()
    rig.until(lambda _: rig.executor.busy_since_s is not None)
    for _ in range(10):
        rig.tick(see=False, feel=False)
    rig.policy.gate.set()
    rig.until(lambda tick: tick.chunks, see=False, feel=False)
    assert all(rig.tick(see=False, feel=False).trajectory is None for _ in range(5))
    assert rig.until(lambda tick: tick.trajectory is not None, ticks=6)


def test_a_clock_that_jumps_forward_starts_over(rig: Rig) -> None:
    """Pins: a motion that continues from a command of seconds ago."""
    swing(rig)
    for _ in range(20):
        rig.tick()
    rig.now_s += 30.0
    tick = rig.tick()
    assert tick.trajectory is None and "+30" in tick.notices[0]
    trajectory = rig.trajectory()
    assert np.allclose(trajectory.positions[0], rig.measured, atol=1e-3)


def test_running_out_of_chunks_is_counted_once(rig: Rig) -> None:
    swing(rig)
    assert rig.runner.misses == 0
    for _ in range(120):
        rig.tick(see=False)
    assert rig.runner.misses == 1


def test_the_reaction_to_an_instruction_is_measured(rig: Rig) -> None:
    rig.runner.set_instruction("left")
    rig.runner.activate()
    rig.until(lambda tick: tick.chunks)
    assert rig.runner.reaction_s is None
    before_s = rig.now_s
    rig.runner.set_instruction("right")
    rig.until(lambda _: rig.runner.reaction_s is not None)
    assert rig.runner.reaction_s == pytest.approx(rig.now_s - before_s)


def test_instructions_may_be_blended(rig: Rig) -> None:
    watched(rig, Watchdog(), blend_instructions=True)
    rig.until(lambda _: rig.runner.live_chunks(rig.now_s) > 1)
    discarded = rig.executor.statistics.discarded
    rig.runner.set_instruction("right")
    rig.until(lambda tick: any(chunk.instruction == "right" for chunk, _ in tick.chunks))
    assert rig.runner.live_chunks(rig.now_s) > 1
    assert rig.executor.statistics.discarded == discarded


def test_on_change_publishes_less_and_never_lets_the_lookahead_end(rig: Rig) -> None:
    """Pins: an arm that brakes between two chunks because nothing was published."""
    runner = rig.runner = rig.make_runner(on_change=True)
    runner.set_instruction("wave")
    runner.activate()
    rig.until(lambda tick: tick.trajectory is not None)
    rig.policy.gate = threading.Event()
    rig.until(lambda _: rig.executor.busy_since_s is not None)
    rig.tick()
    published = [tick.trajectory for tick in (rig.tick() for _ in range(40))]
    found = [trajectory for trajectory in published if trajectory is not None]
    assert 5 <= len(found) <= 12
    lookahead_s = runner.stream.lookahead_steps * DT_S
    stamps_s = [trajectory.stamp_s for trajectory in found]
    assert np.diff(stamps_s).max() < lookahead_s


def test_the_low_pass_starts_at_the_measured_positions(rig: Rig) -> None:
    rig.runner.low_pass = LowPassFilter(2.0, rig.joints.gripper)
    rig.activate()
    first = rig.until(lambda tick: tick.trajectory is not None).trajectory
    assert first is not None
    np.testing.assert_allclose(first.positions[0], HOME, atol=1e-3)
    rig.until(lambda tick: tick.trajectory is not None and tick.trajectory.positions[-1, 0] > 0.49)
