"""Training's inputs; faults: other pictures, prompts or units than the policy will see."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from small_policy.initial import QUERY_SCALE, answer
from squares_world import HORIZON, NETWORK, make_config, write_dataset  # type: ignore

from pi05_lab.data.lerobot_dataset import LeRobotDataset
from pi05_lab.data.lerobot_format import CHUNK_KEY, Extra, Features
from pi05_lab.data.lerobot_writer import DatasetWriter
from pi05_lab.training import processing
from pi05_lab.training.checkpoints import save_checkpoint
from pi05_lab.training.config import ConfigError, TrainConfig
from pi05_lab.training.plugins import load_plugin
from pi05_lab.training.processing import DataProcessor, compute_statistics
from pi05_lab.training.state import Position
from pi05_ros.policy.checkpoint import CAMERAS
from pi05_ros.policy.inference import SampleInputs
from pi05_ros.policy.model import Pi0
from pi05_ros.policy.policy import Policy
from pi05_ros.types import Observation

UR5E: dict[str, Any] = {
    "name": "my_ur5e",
    "state": ["j1", "j2", "j3", "j4", "j5", "j6", "gripper"],
    "action": ["j1", "j2", "j3", "j4", "j5", "j6", "gripper"],
    "dt_s": 0.05,
    "cameras": {"base_rgb": "base_0_rgb", "wrist_rgb": "left_wrist_0_rgb"},
    "grippers": ["gripper"],
    "delta_mask": [True] * 6 + [False],
}


def start(config: TrainConfig, datasets: list[LeRobotDataset]) -> tuple[Pi0, DataProcessor]:
    return processing.start(config, datasets, load_plugin(config))


def save_start(folder: Path, config: TrainConfig, source: LeRobotDataset) -> DataProcessor:
    """Write the checkpoint of a training without steps."""
    network, processor = start(config, [source])
    save_checkpoint(folder, network.state_dict(), processor, config, Position(), {})
    return processor


def random_images(rng: np.random.Generator, cameras: Iterable[str]) -> dict[str, Any]:
    return {name: rng.integers(0, 256, (24, 40, 3), dtype=np.uint8) for name in cameras}


def answer_with(
    actions: np.ndarray, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Any]:
    """The network returns normalised actions; the result holds its latest inputs."""
    given: dict[str, Any] = {}

    def sample(inputs: SampleInputs, mark: Any) -> torch.Tensor:
        given.update(images=inputs.images, present=list(inputs.present))
        given.update(ids=inputs.tokens.ids.tolist(), token_mask=inputs.tokens.mask.tolist())
        padded = torch.zeros(1, HORIZON, 32)
        padded[0, :, : actions.shape[1]] = torch.from_numpy(actions)
        return padded

    monkeypatch.setattr(policy.sampler, "sample", sample)
    return given


@pytest.fixture(scope="module")
def aloha(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random ALOHA states, pictures of another size than the network's, and chunks."""
    rng = np.random.default_rng(0)
    names = [f"joint_{i}" for i in range(14)]
    extras = {CHUNK_KEY: Extra((HORIZON, 14))}
    features = Features(dict.fromkeys(CAMERAS, (24, 40)), names, names, extras)
    root = tmp_path_factory.mktemp("aloha") / "data"
    with DatasetWriter(root, 50, features) as writer:
        for _ in range(4):
            for _ in range(3):
                images, state = random_images(rng, CAMERAS), rng.uniform(0.1, 0.9, 14)
                chunk = state + rng.normal(0, 0.1, (HORIZON, 14))
                writer.add_frame(images, state, chunk[0], "go_home \n now", {CHUNK_KEY: chunk})
            writer.end_episode()
    return root


@pytest.mark.parametrize(
    "units",
    [{}, {"delta_actions": True}, {"adapt_to_pi": True, "delta_actions": True}],
    ids=["plain", "delta", "adapted"],
)
def test_the_policy_sees_and_means_the_same(
    aloha: Path, tmp_path: Path, units: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`Policy.infer` gives the network training's inputs, and turns its output into the actions."""
    config = make_config(tmp_path, aloha, robot="aloha", **units)
    source = LeRobotDataset(aloha)
    processor = save_start(tmp_path / "c", config, source)
    policy = Policy.from_pretrained(tmp_path / "c", robot="aloha", device="cpu", seed=0)
    sample = source.sample(5, HORIZON)
    images, masks = processor.images(sample.images)
    _, actions, tokens = processor.numbers(sample.state, sample.actions, sample.task)
    given = answer_with(actions, policy, monkeypatch)
    observation = Observation(sample.images, sample.state.astype(np.float64), sample.task, 0.0)
    chunk = policy.infer(observation)
    torch.testing.assert_close(given["images"][0], images, atol=0, rtol=0)
    assert given["present"] == masks.tolist() == [True] * 3
    assert given["ids"] == tokens.ids.tolist()
    assert given["token_mask"] == tokens.mask.tolist()
    np.testing.assert_allclose(chunk.actions, sample.actions, atol=1e-5)
    assert np.abs(actions).max() < 2.5


@pytest.mark.parametrize("units", [{}, {"delta_actions": True}], ids=["plain", "delta"])
@pytest.mark.parametrize("own", [False, True], ids=["ur5e", "my_ur5e.yaml"])
def test_another_robots_actions_are_served_as_they_were_trained(
    tmp_path: Path, own: bool, units: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault: trained relative to the state, served as absolute: "hold still" became 0 rad."""
    robot = "ur5e"
    if own:
        robot = str(tmp_path / "my_ur5e.yaml")
        Path(robot).write_text(yaml.safe_dump(UR5E))
    rng = np.random.default_rng(0)
    cameras = dict.fromkeys(UR5E["cameras"], (24, 40))
    features = Features(cameras, UR5E["state"], UR5E["state"])
    with DatasetWriter(tmp_path / "data", 20, features) as writer:
        for _ in range(2):
            for _ in range(8):
                images = random_images(rng, cameras)
                state = np.append(rng.uniform(0.5, 1.5, 6), rng.uniform(0, 1))
                writer.add_frame(images, state, state + 0.01, "hold still")
            writer.end_episode()
    source = LeRobotDataset(tmp_path / "data")
    config = make_config(tmp_path, tmp_path / "data", robot=robot, **units)
    processor = save_start(tmp_path / "c", config, source)
    policy = Policy.from_pretrained(tmp_path / "c", robot=robot, device="cpu", seed=0)
    sample = source.sample(5, HORIZON)
    _, actions, tokens = processor.numbers(sample.state, sample.actions, sample.task)
    given = answer_with(actions, policy, monkeypatch)
    state = sample.state.astype(np.float64)
    chunk = policy.infer(Observation(sample.images, state, sample.task, 0.0))
    assert given["ids"] == tokens.ids.tolist()
    np.testing.assert_allclose(chunk.actions, sample.actions, atol=1e-5)


def test_statistics_are_of_what_the_network_sees(aloha: Path, tmp_path: Path) -> None:
    """Fault: the data set's own quantiles for actions that are taken relative to the state."""
    config = make_config(tmp_path, aloha, robot="aloha", delta_actions=True)
    _, processor = start(config, [LeRobotDataset(aloha)])
    action = processor.statistics["action"]
    relative = np.ones(14, dtype=bool)
    relative[[6, 13]] = False
    assert np.abs((action["q01"] + action["q99"])[relative]).max() < 0.2
    assert (action["mean"][[6, 13]] > 0.3).all()


def test_a_floor_for_joints_that_hardly_move(tmp_path: Path, aloha: Path) -> None:
    """Fault: a joint of 1 mrad range blown up to all of [-1, 1] (openpi #814)."""
    data = {"datasets": [{"root": str(aloha)}], "minimum_half_range": 3.0}
    _, processor = start(make_config(tmp_path, robot="aloha", data=data), [LeRobotDataset(aloha)])
    for feature in processor.statistics.values():
        np.testing.assert_allclose(feature["q99"] - feature["q01"], 6.0, atol=1e-12)


def test_added_data_leaves_the_statistics_alone(
    aloha: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault: a checkpoint whose numbers mean something else after it has learnt on."""
    counted: list[LeRobotDataset] = []

    def note(datasets: list[LeRobotDataset], *rest: Any) -> Any:
        counted.extend(datasets)
        return compute_statistics(datasets, *rest)

    monkeypatch.setattr("pi05_lab.training.processing.compute_statistics", note)
    first, added = LeRobotDataset(aloha), LeRobotDataset(aloha)
    roots: list[dict[str, Any]] = [{"root": str(aloha)}, {"root": str(aloha), "statistics": False}]
    config = make_config(tmp_path, robot="aloha", data={"datasets": roots})
    start(config, [first, added])
    assert counted == [first]
    config = make_config(tmp_path, robot="aloha", data={"datasets": roots[1:]})
    with pytest.raises(ConfigError, match="statistics: true"):
        start(config, [added])


def test_going_on_from_a_checkpoint(aloha: Path, tmp_path: Path) -> None:
    """The weights and the tokenizer of the folder, with the statistics of the data."""
    source = LeRobotDataset(aloha)
    config = make_config(tmp_path, aloha, robot="aloha")
    network, processor = start(config, [source])
    save_checkpoint(tmp_path / "c", network.state_dict(), processor, config, Position(), {})
    of_start = {"start": str(tmp_path / "c")}
    again = make_config(tmp_path, aloha, robot="aloha", network=of_start)
    network_again, processor_again = start(again, [source])
    for mine, theirs in zip(network.parameters(), network_again.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert processor_again.tokenizer_files == processor.tokenizer_files
    with pytest.raises(ConfigError, match=r"network\.image is for start: scratch"):
        start(make_config(tmp_path, aloha, network=of_start | {"image": 32}), [source])


@pytest.mark.parametrize(
    ("readme", "licence"),
    [
        ("---\nlicense: other\nlicense_name: gemma\ntags: [x]\n---\n# Base", ["other", "gemma"]),
        ("# A card without metadata", [None, None]),
        ("---\nlicense: [\n---\n", [None, None]),
    ],
)
def test_a_fine_tune_has_its_starts_licence(
    aloha: Path, tmp_path: Path, readme: str, licence: list[str | None]
) -> None:
    """Fault: an invented licence. A training from scratch names none."""
    source, card = LeRobotDataset(aloha), tmp_path / "c" / "README.md"
    save_start(tmp_path / "c", make_config(tmp_path, aloha, robot="aloha"), source)
    assert ModelCard.load(card).data.get("license") is None
    card.write_text(readme)
    config = make_config(tmp_path, aloha, robot="aloha", network={"start": str(tmp_path / "c")})
    save_start(tmp_path / "d", config, source)
    data = ModelCard.load(tmp_path / "d" / "README.md").data
    assert [data.get("license"), data.get("license_name")] == licence
    assert (data.library_name, data.pipeline_tag) == ("pi05_ros", "robotics")


def test_data_that_does_not_fit_is_named(aloha: Path, dataset: Path, tmp_path: Path) -> None:
    def begin(*roots: Path, **changes: Any) -> None:
        start(make_config(tmp_path, *roots, **changes), [LeRobotDataset(root) for root in roots])

    with pytest.raises(ConfigError, match=r"cannot be trained on together: fps 50\.0 and 10\.0"):
        begin(aloha, dataset, robot="aloha")
    with pytest.raises(ConfigError, match="'aloha' has state_dim 14, the checkpoint 2"):
        begin(dataset, robot="aloha")
    with pytest.raises(ConfigError, match="unknown robot 'arm'"):
        begin(dataset, robot="arm")
    with pytest.raises(ConfigError, match=r"network: .*patch"):
        begin(dataset, network=NETWORK | {"patch": 5})


def test_fresh_weights_know_places_and_numbers(tmp_path: Path) -> None:
    root = write_dataset(tmp_path / "d", 2)
    network, processor = start(make_config(tmp_path, root), [LeRobotDataset(root)])
    position = network.vision.position.detach()
    distance = torch.cdist(position, position).view(4, 4, 4, 4)
    assert distance[1, 1, 1, 2] < distance[1, 1, 1, 3] and distance[1, 1, 2, 1] > 0.5
    ids = [int(processor.tokenizer.encode(f" {n}").ids[1]) for n in (100, 101, 140)]
    numbers = network.embedder.weight[ids].detach()
    assert (numbers[0] - numbers[1]).norm() < 0.3 * (numbers[0] - numbers[2]).norm()
    layer = network.experts.vlm.layers[0]
    x = torch.randn(5, 48)
    queries, keys = layer.qkv(x)[:, :16].detach(), layer.qkv(answer(x))[:, 32:48].detach()
    slow = torch.arange(16) % 8 >= 3
    torch.testing.assert_close(queries[:, slow], QUERY_SCALE * keys[:, slow])
    assert not queries[:, ~slow].any()
    assert not network.action_in_proj.weight[:, 2:].any()
    assert network.action_in_proj.weight[:, :2].any()
