"""Batches; faults: a resumed training that sees other data, held-out frames that are learnt."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from squares_world import HORIZON, OPTIONS, make_config, stage, write_dataset  # type: ignore

from pi05_lab.data.lerobot_dataset import LeRobotDataset
from pi05_lab.data.lerobot_format import Extra, Features
from pi05_lab.data.lerobot_writer import DatasetWriter
from pi05_lab.data.simulated import CUBES_KEY, PIXELS_KEY
from pi05_lab.training.config import ConfigError, TrainConfig
from pi05_lab.training.data import Batch, Examples, Groups, _Windows, group_frames, load_batches
from pi05_lab.training.plugins import load_plugin
from pi05_lab.training.processing import start


def load(config: TrainConfig) -> Examples:
    datasets = [LeRobotDataset(d.root) for d in config.data.datasets]
    plugin = load_plugin(config)
    assert plugin is not None
    _, processor = start(config, datasets, plugin)
    losses = {loss for stage in config.stages for loss in stage.losses} - {"flow"}
    auxiliary = plugin.make_losses(config, processor, datasets, losses)
    return Examples(datasets, config, processor, auxiliary)


@pytest.fixture(scope="module")
def config(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    stages = [stage(batch=3, tasks_per_picture=2, samples_per_prefix=2)]
    return make_config(tmp_path_factory.mktemp("out"), dataset, stages=stages)


@pytest.fixture(scope="module")
def examples(config: TrainConfig) -> Examples:
    return load(config)


def same(a: Batch, b: Batch) -> bool:
    mine, theirs = (
        {k: v for k, v in (vars(x) | x.targets).items() if v is not x.targets} for x in (a, b)
    )
    assert mine.pop("has_delays") == theirs.pop("has_delays")
    for answers in ("answers", "answer_masks"):
        assert mine.pop(answers) is None and theirs.pop(answers) is None
    return all(torch.equal(mine[k].nan_to_num(9.0), theirs[k].nan_to_num(9.0)) for k in mine)


def test_a_seed_decides_the_batch(examples: Examples, config: TrainConfig) -> None:
    chosen = config.stages[0]
    assert same(examples.batch(chosen, (0, 1, 2)), examples.batch(chosen, (0, 1, 2)))
    assert not same(examples.batch(chosen, (0, 1, 2)), examples.batch(chosen, (0, 1, 3)))


def test_shapes_and_ranges(examples: Examples, config: TrainConfig) -> None:
    batch = examples.batch(config.stages[0], (0,))
    assert batch.images.shape == (3, 1, 3, 32, 32)
    assert batch.actions.shape == (6, HORIZON, 32) and not batch.actions[:, :, 2:].any()
    assert batch.noise.shape == (12, HORIZON, 32) and batch.times.shape == (12,)
    assert batch.times.min() > 0 and batch.times.max() <= 1
    assert batch.images.abs().max() <= 1
    assert batch.targets["positions"].shape == (3, 2, 3)
    # both instructions of every picture, in any order
    assert [sorted(pair) for pair in batch.targets["named"].view(3, 2).tolist()] == [[0, 1]] * 3


def test_times_are_beta_distributed(examples: Examples) -> None:
    """Fault: uniform times, or Beta with its parameters exchanged: mean 0.6 becomes 0.4."""
    many = stage(batch=8, tasks_per_picture=2, samples_per_prefix=200)
    config = make_config(Path("x"), Path("x"), stages=[many])
    times = examples.batch(config.stages[0], (5,)).times.double()
    assert times.mean() == pytest.approx(0.6 * 0.999 + 0.001, abs=0.02)
    assert times.std() == pytest.approx(0.999 * (1.5 / (2.5**2 * 3.5)) ** 0.5, abs=0.02)


def test_rows_belong_together(examples: Examples, config: TrainConfig) -> None:
    """Fault: a picture with another frame's actions. The goal is where the named square is."""
    batch = examples.batch(config.stages[0], (3,))
    for row in range(6):
        picture = (batch.images[row // 2, 0] + 1) / 2 * 255
        channel = 0 if batch.targets["named"][row] == 0 else 2
        y, x = torch.nonzero(picture[channel] > 180)[0].tolist()
        goal = examples.processor.processing.action.unnormalize(batch.actions[row, -1, :2])
        np.testing.assert_allclose(goal, np.array([x, y]) / 26 * 2 - 1, atol=1e-5)


def test_held_out_pictures_are_never_learnt(examples: Examples, config: TrainConfig) -> None:
    held, learnt = (
        {frame for group in groups for _, frame in group}
        for groups in (examples.held_out, examples.train)
    )
    assert held and not held & learnt
    episodes = examples.datasets[0].episode_index
    assert not set(episodes[list(held)]) & set(episodes[list(learnt)])
    assert examples.counts() == {"images": 34, "frames": 68, "held_out_images": 6}


def test_validation_is_the_same_every_time(examples: Examples) -> None:
    first, again = (list(examples.validation(3, 2, seed=0)) for _ in range(2))
    assert [len(batch.tokens) for batch in first] == [2, 1]
    assert all(same(a, b) for a, b in zip(first, again, strict=True))
    (other, _) = examples.validation(3, 2, seed=0, other_text=True)
    assert torch.equal(other.images, first[0].images)
    assert torch.equal(other.actions, first[0].actions)
    assert other.targets["named"].tolist() == first[0].targets["named"].tolist()[::-1]


@pytest.mark.parametrize("workers", [0, 1])
def test_the_loader_gives_the_steps_in_order(
    examples: Examples, config: TrainConfig, workers: int
) -> None:
    """Fault: batches that depend on who prepares them, or on where a resumed training begins."""
    chosen = config.stages[0]
    with load_batches(examples, chosen, (0, 0), 2, workers) as loader:
        for step in (2, 3, 4):
            assert same(next(loader), examples.batch(chosen, (0, 0, step)))


def test_the_loader_passes_errors_on(
    examples: Examples, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault: a training that waits for ever when its data cannot be read."""

    def fail(*_: Any) -> None:
        raise OSError("the disk is gone")

    monkeypatch.setattr(examples, "batch", fail)
    with (
        load_batches(examples, config.stages[0], (0,), 0, 0) as loader,
        pytest.raises(OSError, match="the disk is gone"),
    ):
        next(loader)


def test_weights_of_datasets_and_tasks(tmp_path: Path, dataset: Path) -> None:
    other = write_dataset(tmp_path / "other", 3, seed=9)
    data = {
        "datasets": [{"root": str(dataset), "weight": 0.0}, {"root": str(other), "weight": 2}],
        "held_out": 0.1,
        "task_weights": {"red": 0.0},
    }
    examples = load(make_config(tmp_path, data=data))
    batch = examples.batch(make_config(tmp_path, other, stages=[stage(batch=20)]).stages[0], (1,))
    assert set(batch.targets["named"].tolist()) == {1}
    source = examples.datasets[1]
    learnt = {source.state[f].tobytes() for g in examples.train for d, f in g if d}
    states = examples.processor.processing.state.unnormalize(batch.states[:, :2])
    nearest = np.abs(source.state[None] - states[:, None]).max(-1).argmin(1)
    assert {source.state[f].tobytes() for f in nearest} <= learnt


def test_recordings_without_labels(tmp_path: Path) -> None:
    """A user's own recording: every frame alone, actions those that followed, no positions."""
    root = write_dataset(tmp_path / "plain", 3, chunks=False)
    source = LeRobotDataset(root)
    frames, lengths = group_frames(source, np.arange(4))
    assert frames.tolist() == [0, 1, 2, 3] and lengths.tolist() == [1, 1, 1, 1]
    config = make_config(tmp_path, root, plugin_options=OPTIONS | {"positions": "none"})
    examples = load(config)
    batch = examples.batch(make_config(tmp_path, root, stages=[stage()]).stages[0], (0,))
    assert batch.targets["positions"].shape == (4, 0, 3)


def test_pixels_are_where_the_padded_picture_shows_them(tmp_path: Path) -> None:
    """Fault: coordinates of the recorded picture, which padding moves; another camera's."""
    cameras = {"left": (24, 32), "right": (24, 32)}
    features = Features(cameras, ["x"], ["x"], {PIXELS_KEY: Extra((8,))})
    pictures = np.zeros((2, 24, 32, 3), dtype=np.uint8)
    pictures[0, 4:8, 20:24, 0] = 255  # the left camera sees red at column 22, row 6
    pictures[1, 16:20, 8:12, 2] = 255  # and the right one sees blue at 10, 18
    pixels = [22 / 32, 6 / 24, -1, -1, -1, -1, 10 / 32, 18 / 24]
    with DatasetWriter(tmp_path / "data", 10, features, robot_type="squares") as writer:
        for _ in range(2):
            for _ in range(HORIZON + 1):
                images = dict(zip(cameras, pictures, strict=True))
                writer.add_frame(images, np.zeros(1), np.zeros(1), "go", {PIXELS_KEY: pixels})
            writer.end_episode()
    stages = [stage(losses={"pixels": 1.0}, batch=1)]
    config = make_config(tmp_path / "out", tmp_path / "data", stages=stages)
    examples = load(config)
    batch = examples.batch(config.stages[0], (0,))
    for camera, channel in ((0, 0), (1, 2)):
        rows, columns = np.nonzero(batch.images[0, camera, channel].numpy() > 0)
        middle = np.array([columns.mean() + 0.5, rows.mean() + 0.5]) / batch.images.shape[-1]
        np.testing.assert_allclose(batch.targets["pixels"][0, camera, camera], middle, atol=1e-3)
        assert (batch.targets["pixels"][0, camera, 1 - camera] < 0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"names": ["red", "green", "blue"]}, "has 6 numbers, for the 3 names .* must have 9"),
        ({"pixels": CUBES_KEY}, "has 6 numbers, for 1 cameras and the 2 names.*4"),
    ],
)
def test_objects_of_another_shape_are_named(
    tmp_path: Path, dataset: Path, options: dict[str, Any], message: str
) -> None:
    stages = [stage(losses={"pixels": 1.0})]
    options = OPTIONS | options
    with pytest.raises(ConfigError, match=message):
        load(make_config(tmp_path, dataset, stages=stages, plugin_options=options))


def test_a_prompt_that_does_not_fit_is_named(tmp_path: Path, dataset: Path) -> None:
    """Fault: the state cut off the prompt's end, in silence, for the whole training."""
    examples = load(make_config(tmp_path, dataset))
    state = examples.datasets[0].state[0]
    with pytest.raises(ConfigError, match="shorten the instruction"):
        examples.processor.numbers(state, np.zeros((HORIZON, 2), np.float32), "x" * 100)


@settings(max_examples=20, deadline=None)
@given(files=st.integers(1, 12), per_file=st.integers(1, 9), size=st.integers(1, 15))
def test_windows_take_every_file_in_turn(files: int, per_file: int, size: int) -> None:
    """Few files at a time; over the whole data each as often. Fault: files that are never drawn."""
    source = SimpleNamespace(image_files=lambda: np.repeat(np.arange(files), per_file))
    count = files * per_file
    groups = Groups(np.zeros(count, np.int32), np.arange(count), np.arange(1, count + 1))
    config: Any = SimpleNamespace(seed=0, data=SimpleNamespace(window_files=size))
    windows = _Windows([cast("LeRobotDataset", source)], groups, config)
    times = np.zeros(count)
    for drawn in range(count):
        candidates = windows.groups(drawn)
        assert len({*(candidates // per_file).tolist()}) == min(size, files)
        times[candidates] += 1 / len(candidates)
    np.testing.assert_allclose(times, 1.0)


def test_a_window_draws_from_its_files_alone(tmp_path: Path) -> None:
    roots = [
        write_dataset(tmp_path / name, 4, seed, chunks=False) for seed, name in enumerate("ab")
    ]
    data = {"datasets": [{"root": str(root)} for root in roots], "held_out": 0.2, "window_files": 1}
    config = make_config(tmp_path, data=data, plugin_options=OPTIONS | {"positions": "none"})
    examples = load(config)
    states = [set(map(bytes, dataset.state)) for dataset in examples.datasets]
    chosen = make_config(tmp_path, roots[0], stages=[stage(batch=6)]).stages[0]
    seen = set()
    for step in range(8):
        batch = examples.batch(chosen, (0, 0, step))
        decoded = examples.processor.processing.state.unnormalize(batch.states[:, :2])
        owners = {
            number
            for row in decoded
            for number, dataset in enumerate(examples.datasets)
            if np.abs(dataset.state - row).max(1).min() < 1e-5
        }
        assert len(owners) == 1
        seen |= owners
    assert seen == {0, 1} and states[0] != states[1]


def test_weights_of_tasks_apply_to_ordinary_data(tmp_path: Path) -> None:
    """Fault: they applied only to data with several instructions per image."""
    root = write_dataset(tmp_path / "plain", 20, chunks=False)
    data = {"datasets": [{"root": str(root)}], "held_out": 0.1, "task_weights": {"red": 3.0}}
    options = OPTIONS | {"positions": "none"}
    examples = load(make_config(tmp_path, data=data, plugin_options=options))
    rows = [examples.train[int(k)] for k in examples._draw(np.linspace(0, 1, 4000)[:-1], 0)]
    tasks = [examples.datasets[d].task(frame) for ((d, frame),) in rows]
    assert np.mean(["red" in task for task in tasks]) == pytest.approx(0.75, abs=0.02)
