"""Faults pinned: figures that differ from a hand computation, baselines that rank wrongly, gaps and
damage without a note, and memory that grows with the recording.
"""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from offline_world import (  # type: ignore[import-not-found]
    DT_S,
    HORIZON,
    JOINTS,
    PARAMS,
    START_S,
    flaky,
    grey_image,
    make_plan,
    motion,
    notes,
    oracle,
    rewrite,
    run,
    still,
    wild,
    write_bag,
)
from rosbags.highlevel import AnyReader

from pi05_lab.data.bags import BagError
from pi05_lab.evaluation.open_loop.conditions import EvaluationSettings, wrong_instruction
from pi05_lab.evaluation.open_loop.results import RecordingResult
from pi05_lab.evaluation.open_loop.runs import Plan
from pi05_lab.evaluation.open_loop.summary import summarize
from pi05_ros.types import FloatArray, JointGroup, JointSpec


def read_by_hand(path: Path) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Stamps [n], measured [n, joints] and commanded positions [n, joints] of a written bag."""
    measured: list[FloatArray] = []
    stamps: list[float] = []
    commanded: dict[int, dict[str, float]] = {}
    with AnyReader([path]) as reader:
        for connection, stamp_ns, data in reader.messages():
            message: Any = reader.deserialize(data, connection.msgtype)
            if connection.topic == "/joint_states":
                stamps.append(stamp_ns * 1e-9)
                measured.append(message.position)
            elif connection.topic.endswith("joint_trajectory"):
                row = commanded.setdefault(stamp_ns, {})
                row.update(zip(message.joint_names, message.points[0].positions, strict=True))
    order = list(next(iter(commanded.values())))
    table = np.array([[row[name] for name in order] for row in commanded.values()])
    return np.array(stamps), np.array(measured), table


def errors_by_hand(
    path: Path, chunks: list[tuple[float, FloatArray]], dt_s: float
) -> tuple[FloatArray, FloatArray]:
    """Sums over all chunks and recorded steps of |error| and error², by joint."""
    stamps, _, commanded = read_by_hand(path)
    absolute = np.zeros(commanded.shape[1])
    squared = np.zeros(commanded.shape[1])
    for stamp_s, actions in chunks:
        for k, row in enumerate(actions):
            due_s = stamp_s + k * dt_s
            if due_s > stamps[-1] + 1e-6:
                continue
            real = np.array([np.interp(due_s, stamps, column) for column in commanded.T])
            absolute += np.abs(row - real)
            squared += (row - real) ** 2
    return absolute, squared


def summary_of(*results: RecordingResult) -> Any:
    specs = [JointSpec(name, -2.0, 2.0, 3.0, 60.0) for name in JOINTS[:2]]
    gripper = JointSpec(JOINTS[2], 0.0, 0.04, 1.0, 20.0, gripper=True)
    return summarize(results, {}, JointGroup([*specs, gripper]), {})


def test_the_figures_are_those_of_a_hand_computation(tmp_path: Path) -> None:
    bag = write_bag(tmp_path / "bag", servo_lag_s=0.04)
    policy = oracle()
    result = run(bag, make_plan(tmp_path, every_s=0.2, control_every=0), it=policy)
    stamps, measured, commanded = read_by_hand(bag)
    assert [o.stamp_s for o in policy.seen] == pytest.approx(START_S + 0.2 * np.arange(20))
    errors = result.episodes[0].tracks["it"].errors

    shifted = [(o.stamp_s, motion(o.stamp_s + DT_S * np.arange(HORIZON))) for o in policy.seen]
    mine = [(stamp_s, rows + np.array([0.01, -0.01, 0.0])) for stamp_s, rows in shifted]
    absolute, squared = errors_by_hand(bag, mine, DT_S)
    np.testing.assert_allclose(errors["policy"].by_joint, absolute, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(errors["policy"].squared_by_joint, squared, rtol=1e-6, atol=1e-7)

    now = [measured[np.argmin(np.abs(stamps - o.stamp_s))] for o in policy.seen]
    held = [(o.stamp_s, np.tile(q, (HORIZON, 1))) for o, q in zip(policy.seen, now, strict=True)]
    absolute, _ = errors_by_hand(bag, held, DT_S)
    np.testing.assert_allclose(errors["hold"].by_joint, absolute, rtol=1e-6, atol=1e-7)

    summary = summary_of(result)
    low, high = np.percentile(commanded[:, 0], (1, 99))
    assert summary.ranges["shoulder"] == pytest.approx(high - low, rel=0.02)
    figures = summary.policies["it"].conditions["policy"]
    assert figures.mae_rad == pytest.approx(0.01, rel=0.05)
    assert figures.mae_rad_95 is None  # one episode gives no interval
    assert figures.by_step_rad == pytest.approx([0.01] * HORIZON, rel=0.1)


@pytest.mark.slow
def test_the_simulators_own_recording_by_hand(tmp_path: Path) -> None:
    """A bag of `pi05 record`, the small checkpoint, the node's params file."""
    from pi05_lab.evaluation.open_loop.runs import load_policy
    from pi05_ros.cli import main

    record = f"record --format mcap --episodes 1 --tasks wave --workers 1 --output {tmp_path / 'b'}"
    assert main([*record.split(), "--size", "32", "24"]) == 0
    bag = next((tmp_path / "b").iterdir())
    config = Path(__file__).parents[4] / "config" / "aloha.yaml"
    settings = EvaluationSettings(every_s=0.4, control_every=0, timings=False)
    plan = Plan(policies={}, settings=settings, params_file=str(config))
    small = load_policy("small", "aloha", device="cpu", threads=1, num_steps=2)
    kept: list[tuple[float, FloatArray]] = []
    infer = small.infer

    def spy(observation: Any, prefix: Any = None) -> Any:
        chunk = infer(observation, prefix)
        kept.append((chunk.stamp_s, plan.robot().config.joints.to_joints(chunk.actions)))
        return chunk

    small.infer = spy  # type: ignore[method-assign]
    result = run(bag, plan, small=small)
    assert notes(result) == [] and result.observations == len(kept) >= 3
    absolute, squared = errors_by_hand(bag, kept, small.dt_s)
    errors = result.episodes[0].tracks["small"].errors["policy"]
    np.testing.assert_allclose(errors.by_joint, absolute, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(errors.squared_by_joint, squared, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_policies_and_baselines_rank_as_expected(tmp_path: Path) -> None:
    """A good policy is closer than holding position, which is closer than chance."""
    bags = [
        write_bag(tmp_path / f"bag{k}", seconds=3.5 + k / 4, servo_lag_s=0.02) for k in range(5)
    ]
    plan = make_plan(tmp_path, control_every=2, others=("wave", "bow"))
    results = [run(bag, plan, oracle=oracle(), still=still(), wild=wild()) for bag in bags]
    summary = summary_of(*results)
    policies = summary.policies
    mae = {name: policies[name].conditions["policy"].mae_rad for name in policies}
    baseline = {name: figures.mae_rad for name, figures in policies["oracle"].conditions.items()}
    assert mae["oracle"] < baseline["linear"] < baseline["hold"] < baseline["random"]
    assert mae["still"] == pytest.approx(baseline["hold"])
    assert mae["wild"] > 2 * baseline["hold"]
    for name in ("shuffled", "black"):
        control = policies["oracle"].conditions[name]
        assert control.change.share > 1 and control.change.share_95[0] > 0
        assert control.chunks < policies["oracle"].conditions["policy"].chunks
        assert policies["still"].conditions[name].moves_plan_rad == 0
    assert policies["oracle"].conditions["shuffled"].moves_plan_rad == pytest.approx(0.1)
    assert policies["oracle"].conditions["policy"].gripper.f1 == pytest.approx(1.0)
    assert policies["still"].conditions["policy"].gripper.f1 == 0
    low, high = policies["oracle"].conditions["policy"].mae_rad_95
    assert low <= mae["oracle"] <= high


@pytest.mark.slow
def test_schedulers_run_side_by_side_and_a_smooth_plan_stays_smooth(tmp_path: Path) -> None:
    bag = write_bag(tmp_path / "bag", seconds=4.0)
    plan = make_plan(
        tmp_path, control_every=0, schedulers=("latest", "temporal_ensemble", "sync", "rtc")
    )
    result = run(bag, plan, oracle=oracle(), wild=wild())
    schedulers = result.policies["oracle"].schedulers
    assert list(schedulers) == ["latest", "temporal_ensemble", "sync", "rtc"]
    summary = summary_of(result)
    good = summary.policies["oracle"].schedulers
    rough = summary.policies["wild"].schedulers
    # The oracle's chunks agree with each other and with the recording: no jumps.
    assert good["latest"].seam_rad[1] < 0.02
    assert good["latest"].executed_mae_rad < 0.02
    assert rough["latest"].seam_rad[1] > 0.5
    assert good["latest"].rms_jerk < rough["latest"].rms_jerk / 5
    assert good["latest"].ldlj > rough["latest"].ldlj
    clamped = rough["latest"].clamped
    assert clamped["velocity"] + clamped["acceleration"] > 0.2
    assert schedulers["sync"].chunks["received"] < schedulers["latest"].chunks["received"]
    assert schedulers["latest"].chunks["received"] >= 18
    assert summary.recorded_motion["rms_jerk"] < rough["latest"].rms_jerk / 10


def test_a_new_instruction_begins_an_episode_and_ends_comparisons(tmp_path: Path) -> None:
    bag = write_bag(tmp_path / "bag", 4.0, lambda t: "wave" if t < 1.99 else "bow")
    result = run(bag, make_plan(tmp_path, control_every=0), oracle=oracle())
    assert [e.instruction for e in result.episodes] == ["wave", "bow"]
    assert [e.duration_s for e in result.episodes] == pytest.approx([2.0, 1.98], abs=0.03)
    first, second = (e.tracks["oracle"].errors["policy"] for e in result.episodes)
    assert first.chunks == 10 and sum(first.steps) < 10 * HORIZON
    assert np.array(second.by_joint)[0] / sum(second.steps) == pytest.approx(0.21, rel=0.05)


def test_commands_that_begin_late_are_the_only_reference(tmp_path: Path) -> None:
    """Fault: scored against the measured joints, but reported as against commands."""
    bag = write_bag(tmp_path / "bag", 4.0, servo_lag_s=0.2)
    late = rewrite(
        bag,
        tmp_path / "late",
        lambda topic, k, message: None if "trajectory" in topic and k < 50 else message,
    )
    result = run(late, make_plan(tmp_path, control_every=0), oracle=oracle())
    assert result.commanded_joints == ["shoulder", "elbow", "gripper"]
    track = result.episodes[0].tracks["oracle"]
    errors = track.errors["policy"]
    # Against the positions measured 0.2 s later the error would be far above 0.01.
    assert errors.by_joint[0] / sum(errors.steps) == pytest.approx(0.01, rel=0.05)
    assert 0 < errors.chunks < 20
    (text,) = [text for text in notes(result) if "begin" in text]
    assert text == (
        "the commands of shoulder, elbow, gripper begin 1.0 s after the first instruction: what "
        "comes before was not compared"
    )


def test_controllers_without_a_usable_command_are_reported(tmp_path: Path) -> None:
    def damage(topic: str, k: int, message: Any) -> Any:
        if "trajectory" in topic:
            message.joint_names = ["unknown"] * len(message.joint_names)
        return message

    bag = rewrite(write_bag(tmp_path / "bag", 1.0), tmp_path / "damaged", damage)
    result = run(bag, make_plan(tmp_path, control_every=0), oracle=oracle())
    assert "no usable command of shoulder, elbow, gripper: nothing was compared" in notes(result)
    assert result.commanded_joints == [] and not result.episodes[0].tracks


@pytest.mark.slow
def test_a_gap_in_the_commands_is_no_jerk(tmp_path: Path) -> None:
    """Fault: 1.4 rad/s³ became thousands where 0.6 s are missing."""
    bag = write_bag(tmp_path / "bag", 5.0)
    gap = rewrite(
        bag,
        tmp_path / "gap",
        lambda topic, k, message: None if "trajectory" in topic and 100 <= k < 130 else message,
    )
    plan = make_plan(tmp_path, control_every=0)
    whole, cut = (summary_of(run(path, plan, oracle=oracle())) for path in (bag, gap))
    assert cut.recorded_motion["rms_jerk"] < 1.3 * whole.recorded_motion["rms_jerk"]
    methods = [each.policies["oracle"].schedulers["latest"] for each in (whole, cut)]
    assert methods[1].rms_jerk < 1.3 * methods[0].rms_jerk


def test_measured_positions_are_no_reference_for_smoothness(tmp_path: Path) -> None:
    """Fault: the encoder's steps and the stamps' jitter were shown as the recorded jerk."""
    bag = rewrite(
        write_bag(tmp_path / "bag", 3.0),
        tmp_path / "measured",
        lambda topic, k, message: None if "trajectory" in topic else message,
    )
    plan = make_plan(tmp_path, control_every=0)
    result = run(bag, plan, oracle=oracle())
    summary = summary_of(result)
    assert summary.recorded_motion == {"rms_jerk": None, "ldlj": None, "sparc": None}
    assert summary.policies["oracle"].schedulers["latest"].rms_jerk > 0


def test_a_condition_that_fails_counts_for_no_condition(tmp_path: Path) -> None:
    """Fault: the means of the conditions were over different chunks."""
    policy = oracle()
    infer = policy.infer

    def infer_light_images(observation: Any, prefix: Any = None) -> Any:
        blind = not next(iter(observation.images.values())).any()
        if blind and observation.stamp_s > START_S + 2:
            raise RuntimeError("too dark")
        return infer(observation, prefix)

    policy.infer = infer_light_images  # type: ignore[method-assign]
    result = run(write_bag(tmp_path / "bag", 4.0), make_plan(tmp_path, control_every=1), it=policy)
    errors = result.episodes[0].tracks["it"].errors
    counts = {name: errors[name].chunks for name in ("plain", "shuffled", "black")}
    assert len(set(counts.values())) == 1 and 0 < counts["plain"] < errors["policy"].chunks


def test_a_camera_that_stops_is_reported_and_the_rest_is_used(tmp_path: Path) -> None:
    bag = write_bag(
        tmp_path / "bag", 4.0, cameras=lambda k: {"top": grey_image(k)} if k < 100 else {}
    )
    result = run(bag, make_plan(tmp_path, control_every=0), oracle=oracle())
    assert result.observations == 11 and result.moments == 20
    assert any(text.startswith("no observation: camera 'top': newest is") for text in notes(result))
    assert "/top/image_raw stopped 2.0 s before the end" in notes(result)
    errors = result.episodes[0].tracks["oracle"].errors["policy"]
    assert errors.steps == [11] * HORIZON  # the joints continue


def test_a_policy_that_fails_is_counted_and_the_rest_is_used(tmp_path: Path) -> None:
    bag = write_bag(tmp_path / "bag", 4.0)
    result = run(bag, make_plan(tmp_path, control_every=0), flaky=flaky())
    track = result.policies["flaky"]
    assert track.failures >= 5 and track.inferences >= 10
    assert any("flaky: RuntimeError: not this time" in text for text in notes(result))


def test_a_policy_for_another_robot_is_refused(tmp_path: Path) -> None:
    bag = write_bag(tmp_path / "bag", 0.2)
    policy = oracle()
    policy.action_dim = 7  # type: ignore[misc]
    with pytest.raises(BagError, match="it has 7 actions, the params file 3 joints"):
        run(bag, make_plan(tmp_path), it=policy)
    blind = oracle()
    blind.cameras = ("front",)  # type: ignore[misc, assignment]
    with pytest.raises(BagError, match="has the cameras"):
        run(bag, make_plan(tmp_path), it=blind)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_recording(tmp_path: Path) -> None:
    """Six times the recording, 28 MB more of images: the same peak."""
    large = {"top": np.zeros((120, 160, 3), dtype=np.uint8)}
    bags = [write_bag(tmp_path / f"bag{s}", s, cameras=lambda _: large) for s in (2.0, 12.0)]
    plan = make_plan(tmp_path, control_every=0, every_s=0.5)
    params = Path(str(plan.params_file))
    params.write_text(PARAMS.replace("control_rate_hz: 50.0", "control_rate_hz: 10.0"))
    peaks = []
    for bag in (bags[0], *bags):  # The first one loads libraries.
        policy = still()
        policy.seen = _Nothing()  # type: ignore[assignment]
        tracemalloc.start()
        run(bag, plan, still=policy)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[2] < peaks[1] + 1e6, [f"{peak / 1e6:.1f} MB" for peak in peaks]


class _Nothing:
    def append(self, _: object) -> None: ...

    def __len__(self) -> int:
        return 0


def test_a_still_joint_has_no_share_of_its_range(tmp_path: Path) -> None:
    """Pins: an error of 3000 % because a joint trembled by a ten-thousandth of a radian."""
    plan = make_plan(tmp_path, control_every=0)
    result = run(write_bag(tmp_path / "bag", 2.0), plan, oracle=oracle())
    trembling = result.episodes[0].positions
    for k, row in enumerate(trembling):
        row[1] = 1e-4 * (k % 2)
    figures = summary_of(result)
    joints = figures.policies["oracle"].joints
    assert joints["elbow"].mae_share is None and joints["elbow"].range == 0
    assert joints["shoulder"].mae_share == pytest.approx(0.01, rel=0.3)
    assert figures.policies["oracle"].conditions["policy"].mae_share == pytest.approx(
        joints["shoulder"].mae_share, rel=1e-3
    )


def test_the_wrong_instruction_differs() -> None:
    several = EvaluationSettings(others=("wave", "bow", "sit"))
    assert wrong_instruction("wave", several) in ("bow", "sit")
    assert wrong_instruction("wave", several) == wrong_instruction("wave", several)
    alone = EvaluationSettings(others=("pick up the cube",))
    shuffled = wrong_instruction("pick up the cube", alone)
    assert shuffled != "pick up the cube"
    assert sorted(shuffled.split()) == ["cube", "pick", "the", "up"]
    assert wrong_instruction("wave", EvaluationSettings()) not in ("", "wave")
