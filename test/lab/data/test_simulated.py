"""Faults pinned: labels in other units than the state, an episode that ends before its task is
done, data that depend on how many processes recorded them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from pi05_lab.data.lerobot_format import CHUNK_KEY, CUBES_KEY, DatasetError
from pi05_lab.data.simulated import Frame, RecordConfig, SimulatedRecorder, episodes, features
from pi05_lab.sim.experts import GRIPPERS, HORIZON
from pi05_lab.sim.tasks import parse
from pi05_ros.types import ActionChunk, Observation


@pytest.fixture(scope="module")
def demonstration() -> Iterator[list[Frame]]:
    recorder = SimulatedRecorder(
        RecordConfig(verbs=("pick",), seed=3, chunks=True, fps=25, size_px=(32, 24))
    )
    yield recorder(0)
    recorder.close()


@pytest.fixture(scope="module")
def states() -> Iterator[list[Frame]]:
    recorder = SimulatedRecorder(
        RecordConfig(verbs=("touch", "wave"), states=True, size_px=(32, 24))
    )
    yield recorder(2)
    recorder.close()


def test_a_demonstration_does_its_task(demonstration: list[Frame]) -> None:
    task = parse(demonstration[0].task)
    assert task is not None and task.verb == "pick"
    assert {frame.task for frame in demonstration} == {demonstration[0].task}
    cube = ("red", "green", "blue").index(str(task.color))
    heights = [frame.extra[CUBES_KEY][3 * cube + 2] for frame in demonstration]
    assert heights[0] < 0.03 and heights[-1] > 0.08
    gripper = GRIPPERS[("left", "right").index(str(task.side))]
    openings = np.array([frame.state[gripper] for frame in demonstration])
    # a held cube keeps the fingers at 0.042 m, which is 0.6
    assert openings.max() > 0.85 and 0.45 < openings[-1] < 0.7


def test_the_label_is_in_the_units_and_at_the_rate_of_the_data(demonstration: list[Frame]) -> None:
    for k in (0, len(demonstration) // 2):
        chunk = demonstration[k].extra[CHUNK_KEY]
        assert chunk.shape == (HORIZON, 14) and chunk.dtype == np.float32
        later = demonstration[k + 10]
        arms = np.setdiff1d(np.arange(14), GRIPPERS)
        # the servos lag what is commanded by a few hundredths of a second
        assert np.abs(chunk[10] - later.state)[arms].max() < 0.25
        assert np.abs(chunk[10] - demonstration[k].state)[arms].max() > 0.1
        assert chunk[:, GRIPPERS].min() > -0.2 and chunk[:, GRIPPERS].max() < 1.2


def test_each_image_of_states_has_several_instructions(states: list[Frame]) -> None:
    assert len(states) % 4 == 0 and len(states) >= 12
    for start in range(0, len(states), 4):
        group = states[start : start + 4]
        assert [frame.images is None for frame in group] == [False, True, True, True]
        tasks = [parse(frame.task) for frame in group]
        assert len(set(tasks)) == 4 and tasks[0] is not None and tasks[1] is not None
        assert tasks[0].verb == tasks[1].verb and tasks[0] == parse(states[0].task)
        for frame in group[1:]:
            np.testing.assert_array_equal(frame.state, group[0].state)
            assert np.abs(frame.extra[CHUNK_KEY] - group[0].extra[CHUNK_KEY]).max() > 1e-3
    assert not np.array_equal(states[0].state, states[4].state)


def test_a_policy_moves_the_arms_and_the_expert_labels() -> None:
    """Fault: actions in other units than the simulator's, the policy's motion as the label."""
    seen: list[tuple[np.ndarray, str]] = []
    seeds: list[int] = []

    class Stretch:
        """Both waists outwards, the grippers open."""

        def restart(self, seed: int) -> None:
            seeds.append(seed)

        def infer(self, observation: Observation) -> ActionChunk:
            assert observation.images["cam_high"].shape == (24, 32, 3)
            seen.append((observation.state, observation.instruction))
            target = observation.state.copy()
            target[[0, 7]] += 0.1
            target[GRIPPERS] = 1.0
            return ActionChunk(np.repeat(target[None], HORIZON, axis=0), 0.0, 0.02)

    config = RecordConfig(verbs=("touch",), states=True, instructions=2, size_px=(32, 24))
    recorder = SimulatedRecorder(config, Stretch)
    samples = recorder(0)[::2]
    assert len(samples) == len(seen) > 8
    for frame, (state, instruction) in zip(samples, seen, strict=True):
        np.testing.assert_array_equal(frame.state, state)
        assert frame.task == instruction
        assert np.abs(frame.extra[CHUNK_KEY][-1] - state).max() < 3
    first, last = samples[0].state, samples[-1].state
    assert (last[[0, 7]] - first[[0, 7]] > 0.2).all()
    np.testing.assert_allclose(last[GRIPPERS], 1.0, atol=0.1)
    recorder(1)
    recorder(0)
    recorder.close()
    assert seeds[0] == seeds[2] != seeds[1], "an episode's noise follows from its number"


def test_frames_fit_their_features(states: list[Frame], demonstration: list[Frame]) -> None:
    for frame, config in (
        (states[0], RecordConfig(states=True, size_px=(32, 24))),
        (demonstration[0], RecordConfig(chunks=True, size_px=(32, 24))),
    ):
        expected = features(config)
        assert set(frame.images or {}) == set(expected.cameras)
        assert set(frame.extra) <= set(expected.extras)
        assert frame.state.shape == frame.action.shape == (len(expected.state_names),)


def same(a: Frame, b: Frame) -> bool:
    arrays = [(frame.state, frame.action, *frame.extra.values()) for frame in (a, b)]
    return (a.images, a.task) == (b.images, b.task) and all(map(np.array_equal, *arrays))


def test_the_number_of_workers_changes_nothing() -> None:
    config = RecordConfig(verbs=("home", "wave"), states=True, size_px=(32, 24), seed=5)
    alone = list(episodes(config, 4, workers=1))
    together = list(episodes(config, 4, workers=2))
    assert [len(frames) for frames in alone] == [len(frames) for frames in together]
    for frames, others in zip(alone, together, strict=True):
        assert all(map(same, frames, others))
    assert not same(alone[0][0], alone[1][0])


class Doomed(SimulatedRecorder):
    def _sample_states(self, rng: np.random.Generator) -> None:  # type: ignore[override]
        return None


def test_an_expert_that_keeps_failing_ends_recording() -> None:
    recorder = Doomed(RecordConfig(states=True, size_px=(32, 24)))
    with pytest.raises(DatasetError, match="failed 20 times at episode 7"):
        recorder(7)
    recorder.close()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"verbs": ("jump",)}, "tasks must be different ones of"),
        ({"verbs": ()}, "tasks must be different ones of"),
        ({"verbs": ("pick", "pick")}, "tasks must be different ones of"),
        ({"verbs": ("pick",), "weights": (0.0,)}, "weight above 0"),
        ({"fps": 30}, "fps must divide 50"),
        ({"states": True, "instructions": 0}, "needs an instruction"),
    ],
)
def test_an_invalid_config_is_rejected(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(DatasetError, match=reason):
        RecordConfig(**change)
