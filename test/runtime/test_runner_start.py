"""A motion's end and the next one's start.

Faults pinned: a restart in mid-motion after a lost controller or a jump of the clock, at a joint
state from before the rest, at one wrong joint state; a trajectory that was not sent and counts.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from runner_rig import DT_S, HOME, Rig  # type: ignore[import-not-found]

from pi05_ros.control import trajectory as trajectory_module
from pi05_ros.control.scheduler import make_scheduler
from pi05_ros.control.trajectory import Braking
from pi05_ros.runner import Tick


def moving(rig: Rig) -> None:
    """Start a motion and wait until it is fast."""
    rig.start()
    rig.until(lambda tick: abs(rig.stream.commanded(rig.now_s).velocity[0]) > 0.5)


ENDINGS: dict[str, Callable[[Rig], Braking | None]] = {
    "stop": lambda rig: rig.runner.stop(rig.now_s),
    "deactivate": lambda rig: rig.runner.deactivate(rig.now_s),
    "come_to_rest": lambda rig: rig.runner.come_to_rest(rig.now_s),
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_an_ending_gives_the_braking_from_here_to_rest(rig: Rig, ending: str) -> None:
    moving(rig)
    before = rig.stream.commanded(rig.now_s)
    braking = ENDINGS[ending](rig)
    assert braking is not None and braking.trajectory is not None
    assert braking.start_s == rig.now_s < braking.rest_s
    np.testing.assert_allclose(rig.stream.commanded(rig.now_s).position, before.position)
    np.testing.assert_allclose(rig.stream.commanded(braking.rest_s).velocity, 0.0, atol=1e-12)
    assert (braking.trajectory.velocities[-1] == 0).all()


def test_coming_to_rest_again_continues_the_braking_and_is_nothing_at_rest(rig: Rig) -> None:
    """A caller that brakes at every tick gets one trajectory, and the same rest each time."""
    moving(rig)
    first = rig.runner.come_to_rest(rig.now_s)
    assert first is not None
    while rig.now_s + DT_S < first.rest_s:
        rig.now_s += DT_S
        again = rig.runner.come_to_rest(rig.now_s)
        assert again == Braking(None, rig.now_s, first.rest_s)
    rig.now_s += DT_S
    assert rig.runner.come_to_rest(rig.now_s) is None
    assert rig.runner.stop(rig.now_s) is None and rig.runner.deactivate(rig.now_s) is None


def test_a_stop_during_the_braking_is_latched_and_gives_what_is_left(rig: Rig) -> None:
    moving(rig)
    first = rig.runner.come_to_rest(rig.now_s)
    rig.now_s += DT_S
    left = rig.runner.stop(rig.now_s)
    assert first is not None and left == Braking(None, rig.now_s, first.rest_s)
    assert rig.runner.stopped


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_start_needs_joint_states_from_after_the_rest(rig: Rig, ending: str) -> None:
    """Pins: a velocity step when a controller flaps, and a start behind arms that braked."""
    moving(rig)
    braking = ENDINGS[ending](rig)
    assert braking is not None
    rig.runner.resume()
    rig.runner.activate()
    rig.trajectory()
    # five joint states at the tick rate, all stamped after the rest
    assert rig.now_s > braking.rest_s + 4 * DT_S
    np.testing.assert_allclose(rig.stream.commanded(rig.now_s).velocity, 0.0, atol=1e-9)


def test_joint_states_stamped_ahead_do_not_end_the_braking(rig: Rig) -> None:
    """Pins: a driver whose clock is ahead, whose joint states seem to come from after the rest."""
    moving(rig)
    braking = rig.runner.come_to_rest(rig.now_s)
    assert braking is not None
    for now_s in np.arange(rig.now_s, braking.rest_s + 0.1, 0.01):
        rig.buffer.put_joints(now_s + 0.09, rig.measured)
        assert rig.runner._checked_start(now_s) is None or now_s >= braking.rest_s
    assert rig.runner._checked_start(now_s) is not None


@pytest.mark.parametrize("jump_s", [30.0, -30.0])
def test_a_jump_of_the_clock_brakes_by_the_tail_before_the_next_start(
    rig: Rig, jump_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pins: a start at the first joint state on the other clock, while the arms still brake."""
    monkeypatch.setattr(trajectory_module, "time", SimpleNamespace(monotonic=lambda: 0.4 * DT_S))
    moving(rig)
    before_s = rig.now_s
    speed = abs(rig.stream.commanded(before_s + DT_S).velocity[0])
    rig.now_s += jump_s
    tick = rig.tick()
    braking = tick.braking
    assert braking is not None and braking.trajectory is None and tick.trajectory is None
    # on the stream's clock, which is the old one
    assert braking.start_s == pytest.approx(before_s + DT_S)
    assert braking.rest_s == pytest.approx(rig.stream.rest_time_s, abs=1e-9)
    assert braking.rest_s > braking.start_s
    assert speed > 0.5
    jumped_s = rig.now_s
    rig.trajectory()
    assert rig.now_s - jumped_s > braking.rest_s - braking.start_s + 4 * DT_S


def test_a_clock_set_back_after_the_end_delays_the_start_by_one_braking_at_most(rig: Rig) -> None:
    """Pins: arms that wait for hours because the clock was set back between stop and resume."""
    moving(rig)
    braking = rig.runner.stop(rig.now_s)
    assert braking is not None
    rig.now_s -= 3600.0
    rig.runner.buffer.clear()
    rig.runner.resume()
    rig.trajectory(ticks=round((braking.rest_s - braking.start_s) / DT_S) + 60)


def test_a_trajectory_that_was_not_sent_is_retracted(rig: Rig) -> None:
    """Pins: a next trajectory that continues from states that no controller ever got."""
    rig.runner = rig.make_runner(on_change=True)
    moving(rig)
    times_s = rig.now_s + DT_S * np.arange(30)

    def plan() -> list[float]:
        return [float(rig.stream.commanded(time_s).position[0]) for time_s in times_s]

    before = plan()
    rig.policy.target = np.array([-0.5, 1.0])
    rig.until(lambda tick: tick.trajectory is not None and not np.allclose(plan(), before))
    before = plan()
    rig.runner.use_scheduler(make_scheduler("latest", gripper=rig.joints.gripper))
    assert rig.tick().trajectory is not None
    assert not np.allclose(plan(), before)
    rig.runner.not_published()
    assert plan() == before
    # although nothing has changed since
    assert rig.tick().trajectory is not None


def test_a_first_trajectory_that_was_not_sent_is_another_start(rig: Rig) -> None:
    """Pins: a motion that begins at positions from when the thread was held up."""
    rig.start()
    rig.runner.not_published()
    assert not rig.stream.active
    rig.measured = HOME + np.array([0.01, 0.0])
    trajectory = rig.trajectory()
    np.testing.assert_allclose(trajectory.positions[0], rig.measured)


def feed(rig: Rig, positions: Any, after_s: float) -> None:
    rig.buffer.put_joints(rig.now_s + after_s, np.asarray(positions))


@pytest.mark.parametrize("wrong", [0.9, -0.5, 50.0, 1e9])
def test_one_wrong_joint_state_is_never_commanded(rig: Rig, wrong: float) -> None:
    """Pins: an encoder's glitch, or another robot's joint state, as the first commanded point."""
    rig.policy.gate = threading.Event()
    rig.activate()
    rig.until(lambda _: rig.executor.busy_since_s is not None)
    rig.policy.gate.set()
    deadline_s = time.monotonic() + 10.0
    while not rig.executor.has_results:
        assert time.monotonic() < deadline_s
        time.sleep(0.002)
    feed(rig, [wrong, 0.03], 1.5 * DT_S)
    rig.now_s += DT_S
    tick = rig.tick()
    assert tick.chunks and tick.trajectory is None
    assert any(
        problem.startswith("start: joint 'elbow' ") and f"{wrong:.4g}" in problem
        for problem in rig.problems()
    )
    np.testing.assert_allclose(rig.trajectory().positions[0], HOME, atol=1e-3)
    assert not any(problem.startswith("start") for problem in rig.problems())


def test_a_second_publisher_prevents_start_and_inference(rig: Rig) -> None:
    """Pins: two robots' joint states in turns; the network must not see the other robot's."""
    rig.activate()
    for _ in range(30):
        feed(rig, [0.9, 0.03], 0.3 * DT_S)
        assert rig.tick().trajectory is None
    time.sleep(0.02)
    assert rig.policy.seen == []
    (problem,) = (p for p in rig.problems() if p.startswith("start"))
    assert "'elbow' jumps from" in problem and "second publisher" in problem
    np.testing.assert_allclose(rig.trajectory().positions[0], HOME, atol=1e-3)
    assert all(abs(observation.state[0] - HOME[0]) < 0.01 for observation in rig.policy.seen[:1])


def test_a_second_publisher_whose_clock_is_behind_prevents_a_start(rig: Rig) -> None:
    """Its joint states are older than the newest, and the wrong one of the two may be that one."""
    rig.activate()
    for _ in range(30):
        tick = rig.tick()
        feed(rig, [0.9, 0.03], -0.4 * DT_S)
        assert tick.trajectory is None
    assert any("'elbow' jumps" in problem for problem in rig.problems())


def test_a_joint_outside_its_limits_is_a_problem_and_prevents_a_start(rig: Rig) -> None:
    rig.measured = np.array([1.2, 0.03])
    rig.activate()
    assert all(rig.tick().trajectory is None for _ in range(20))
    (problem,) = (p for p in rig.problems() if p.startswith("start"))
    assert "'elbow' is at 1.2, outside its limits -1 to 1" in problem
    rig.measured = np.array([1.05, 0.03])
    trajectory = rig.trajectory()
    assert trajectory.positions[:, 0].max() <= 1.05 + 1e-9


def test_too_few_joint_states_are_a_problem_after_a_second(rig: Rig) -> None:
    moving(rig)
    rig.runner.come_to_rest(rig.now_s)
    rig.runner.resume()
    told_s = None
    ended_s = rig.now_s
    for k in range(120):
        rig.tick(see=False, feel=k % 12 == 0)
        if told_s is None and any("20 Hz" in p for p in rig.problems()):
            told_s = rig.now_s
    assert told_s is not None and told_s - ended_s > 1.0


def test_a_stopped_runner_has_no_start_problem(rig: Rig) -> None:
    rig.measured = np.array([1.2, 0.03])
    rig.runner.activate()
    rig.tick()
    for _ in range(10):
        rig.tick()
    assert any(p.startswith("start") for p in rig.problems())
    rig.runner.stop(rig.now_s)
    assert not any(p.startswith("start") for p in rig.problems())
    assert rig.tick() == Tick()
