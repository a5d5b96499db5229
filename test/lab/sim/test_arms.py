"""Pins the simulated robot's behaviour: it stands still, tracks, keeps limits, repeats by seed."""

from __future__ import annotations

from pathlib import Path

import mujoco
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pi05_lab.sim.arms import CUBE_REGION_M, CUBE_SPACING_M, HOME_POSITIONS, SimulatedAloha
from pi05_lab.sim.scene import GRIPPER_CLOSED_M, GRIPPER_OPEN_M, JOINT_NAMES

GRIPPERS = [6, 13]
_SHARED = SimulatedAloha(cubes=())


@pytest.fixture
def sim() -> SimulatedAloha:
    return SimulatedAloha()


def test_stands_still_at_home(sim: SimulatedAloha) -> None:
    """Without gravity compensation the arms would sag and every episode start elsewhere."""
    sim.reset(seed=3)
    before = [sim.cube_position(name) for name in sim.cubes]
    sim.step(400)
    assert sim.time_s == pytest.approx(2.0)
    assert np.abs(sim.positions() - HOME_POSITIONS).max() < 1e-3
    assert np.abs(sim.velocities()).max() < 1e-3
    np.testing.assert_allclose([sim.cube_position(n) for n in sim.cubes], before, atol=1e-3)


def test_tracks_a_slow_sinusoid(sim: SimulatedAloha) -> None:
    """±0.2 rad at 0.25 Hz within 0.02 rad: a lag of about 50 ms."""
    amplitude = np.full(14, 0.2)
    amplitude[GRIPPERS] = 0.01
    center = HOME_POSITIONS.copy()
    center[GRIPPERS] = 0.04
    errors = []
    for k in range(1000):
        targets = center + amplitude * np.sin(0.5 * np.pi * k * 0.005)
        sim.set_targets(targets)
        sim.step()
        errors.append(np.abs(sim.positions() - targets))
    worst = np.max(errors[200:], axis=0)
    hinges = np.delete(worst, GRIPPERS)
    assert 0.005 < hinges.max() < 0.02
    assert worst[GRIPPERS].max() < 1e-3


def test_velocities_are_the_derivative_of_positions(sim: SimulatedAloha) -> None:
    """A gripper's sign or a joint's index could be wrong in one of the two readings alone."""
    targets = HOME_POSITIONS + 0.1 * np.arange(14) / 14
    targets[GRIPPERS] = GRIPPER_OPEN_M
    sim.set_targets(targets)
    sim.step(20)
    before = sim.positions()
    sim.step(1)
    np.testing.assert_allclose(sim.velocities(), (sim.positions() - before) / 0.005, atol=1e-6)
    assert sim.velocities()[6] > 0


@pytest.mark.parametrize("index", range(14), ids=JOINT_NAMES)
@pytest.mark.parametrize("target", [-50.0, 50.0])
def test_a_joint_stops_at_its_limit(index: int, target: float) -> None:
    """Slammed against its soft stop, alone: 0.01 rad or 1 mm of give."""
    sim = SimulatedAloha(cubes=())
    lifted = HOME_POSITIONS.copy()
    lifted[[1, 8]] = -1.5
    lifted[[2, 9]] = 0.0
    targets = lifted.copy()
    targets[index] = target
    sim.set_targets(lifted)
    sim.step(300)
    sim.set_targets(targets)
    give = 1e-3 if index in GRIPPERS else 0.01
    for _ in range(60):
        sim.step(10)
        assert sim.lower[index] - give <= sim.positions()[index] <= sim.upper[index] + give


@given(targets=st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=14, max_size=14))
@settings(max_examples=100, deadline=None)
def test_any_finite_target_is_clipped(targets: list[float]) -> None:
    sim = _SHARED
    sim.set_targets(targets)
    low, high = sim.model.actuator_ctrlrange.T
    assert (sim.data.ctrl >= low).all() and (sim.data.ctrl <= high).all()


def test_closed_fingers_meet_and_do_not_pass(sim: SimulatedAloha) -> None:
    targets = HOME_POSITIONS.copy()
    targets[GRIPPERS] = GRIPPER_CLOSED_M
    sim.set_targets(targets)
    sim.step(200)
    np.testing.assert_allclose(sim.positions()[GRIPPERS], 0.0224, atol=7e-4)


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=25, deadline=None)
def test_reset_repeats_by_seed_and_spaces_the_cubes(seed: int) -> None:
    sim = SimulatedAloha()
    sim.reset(seed)
    first = sim.qpos()
    sim.set_targets(np.zeros(14))
    sim.step(10)
    sim.reset(seed)
    np.testing.assert_array_equal(sim.qpos(), first)
    assert sim.time_s == 0.0
    cubes = np.array([sim.cube_position(name)[:2] for name in sim.cubes])
    distances = np.linalg.norm(cubes[:, None] - cubes[None], axis=-1)[np.triu_indices(3, k=1)]
    assert (distances >= CUBE_SPACING_M).all()
    low, high = np.array(CUBE_REGION_M).T
    assert (cubes >= low).all() and (cubes <= high).all()


def test_seeds_differ(sim: SimulatedAloha) -> None:
    sim.reset(1)
    first = sim.cube_position("red")
    sim.reset(2)
    assert np.linalg.norm(sim.cube_position("red") - first) > 1e-3


def test_a_closing_gripper_lifts_a_cube() -> None:
    """Pads, friction and solver settings together: a cube must not slip or shoot away."""
    sim = SimulatedAloha(cubes=("red",))
    down = np.array([0.0, 0.5, 0.06, 0.0, 1.0, 0.0, 0.05])
    targets = np.concatenate([down, HOME_POSITIONS[7:]])
    qpos = sim.qpos()
    qpos[:8] = [*down[:6], 0.05, -0.05]
    sim.set_qpos(qpos)
    tool = sim.tool_position("left")
    qpos[16:23] = [tool[0], tool[1], 0.02, 1.0, 0.0, 0.0, 0.0]
    # The wrist angle is solved for by bringing the tool to the cube's height with the shoulder.
    for _ in range(60):
        error = tool[2] - 0.02
        qpos[1] += 1.5 * error
        sim.set_qpos(qpos)
        tool = sim.tool_position("left")
        qpos[16:18] = tool[:2]
    sim.set_qpos(qpos)
    assert tool[2] == pytest.approx(0.02, abs=1e-4)
    targets[1] = qpos[1]
    targets[6] = GRIPPER_CLOSED_M
    sim.set_targets(targets)
    sim.step(100)
    assert 0.038 < sim.positions()[6] < 0.046
    for lift in np.linspace(0.0, 0.35, 100):
        targets[1] = qpos[1] - lift
        sim.set_targets(targets)
        sim.step(4)
    sim.step(400)
    assert sim.cube_position("red")[2] > 0.1
    np.testing.assert_allclose(sim.cube_position("red"), sim.tool_position("left"), atol=0.02)


def test_set_qpos_restores_a_recorded_state(sim: SimulatedAloha) -> None:
    sim.reset(5)
    sim.set_targets(HOME_POSITIONS + 0.1)
    sim.step(100)
    recorded, cube = sim.qpos(), sim.cube_position("blue")
    sim.reset(6)
    sim.set_qpos(recorded)
    np.testing.assert_array_equal(sim.qpos(), recorded)
    np.testing.assert_array_equal(sim.cube_position("blue"), cube)
    assert not sim.velocities().any()


@pytest.mark.parametrize("bad", [np.zeros(13), np.full(14, np.nan), np.full(14, np.inf)])
def test_bad_targets_are_rejected(sim: SimulatedAloha, bad: np.ndarray) -> None:
    before = sim.data.ctrl.copy()
    with pytest.raises(ValueError, match="14 finite"):
        sim.set_targets(bad)
    np.testing.assert_array_equal(sim.data.ctrl, before)


def test_unknown_names_are_rejected(sim: SimulatedAloha) -> None:
    with pytest.raises(ValueError, match="purple"):
        sim.cube_position("purple")
    with pytest.raises(ValueError, match="middle"):
        sim.tool_position("middle")
    with pytest.raises(ValueError, match="qpos"):
        sim.set_qpos(np.zeros(3))


def test_divergence_is_reported(
    sim: SimulatedAloha, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MuJoCo resets a diverged state silently, which would look like a jump to zero."""
    monkeypatch.chdir(tmp_path)  # MuJoCo writes its warning to a file there
    sim.data.qvel[0] = np.inf
    with pytest.raises(RuntimeError, match="diverged"):
        sim.step()
    sim.reset(0)
    sim.step()


def test_names_match_positions(sim: SimulatedAloha) -> None:
    """Each joint moved alone shows up under its own name."""
    for index, name in enumerate(JOINT_NAMES):
        qpos = sim.qpos()
        first = name.replace("gripper", "left_finger")
        qpos[sim.model.joint(first).qposadr[0]] += 0.01
        expected = HOME_POSITIONS.copy()
        expected[index] += 0.005 if name.endswith("gripper") else 0.01
        data = mujoco.MjData(sim.model)
        data.qpos[:] = qpos
        sim.set_qpos(qpos)
        np.testing.assert_allclose(sim.positions(), expected, atol=1e-12)
        sim.reset()
