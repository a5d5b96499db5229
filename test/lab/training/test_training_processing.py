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
from pi05_ros.policy.checkpoint import CAMERAS, TOKENIZER_PATTERNS
from pi05_ros.policy.inference import SampleInputs
from pi05_ros.policy.model import Pi0
from pi05_ros.policy.policy import Policy
from pi05_ros.policy.robots import NAMED
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


def describe(robot: str) -> dict[str, Any]:
    """A description's keys of each named robot, and of one in YAML."""
    if robot == "my_ur5e.yaml":
        return UR5E
    named = NAMED[robot]
    return {key: getattr(named, key) for key in ("state", "action", "cameras", "dt_s", "grippers")}


UNITS = [{}, {"delta_actions": True}, {"adapt_to_pi": True},
         {"delta_actions": True, "adapt_to_pi": True}]  # fmt: skip


@pytest.mark.parametrize("units", UNITS, ids=["plain", "delta", "adapted", "both"])
@pytest.mark.parametrize("robot", [*NAMED, "my_ur5e.yaml"])
def test_every_robots_actions_are_served_as_they_were_trained(
    tmp_path: Path, robot: str, units: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Labels of one constant motion: absolute or relative, with gripper maps and signs.

    Fault: trained relative to the state, served as absolute: "hold still" became 0 rad.
    """
    described = describe(robot)
    source = robot
    if robot == "my_ur5e.yaml":
        source = str(tmp_path / robot)
        Path(source).write_text(yaml.safe_dump(UR5E))
    rng = np.random.default_rng(0)
    cameras = dict.fromkeys(described["cameras"], (24, 40))
    features = Features(cameras, described["state"], described["action"])
    with DatasetWriter(tmp_path / "data", round(1 / described["dt_s"]), features) as writer:
        for _ in range(2):
            state = rng.uniform(0.2, 0.8, len(described["state"]))
            # velocities stay within their range, grippers are open or closed
            label = (state if robot != "droid" else state + 0.1)[: len(described["action"])]
            for index, name in enumerate(described["action"]):
                if name in described["grippers"]:
                    label[index] = 1.0
            for _ in range(8):
                images = random_images(rng, cameras)
                writer.add_frame(images, state, label, "hold still")
            writer.end_episode()
    data = LeRobotDataset(tmp_path / "data")
    config = make_config(tmp_path, tmp_path / "data", robot=source, **units)
    processor = save_start(tmp_path / "c", config, data)
    policy = Policy.from_pretrained(tmp_path / "c", robot=source, device="cpu", seed=0)
    sample = data.sample(5, HORIZON)
    shown, _ = processor.images(sample.images)
    _, actions, tokens = processor.numbers(sample.state, sample.actions, sample.task)
    given = answer_with(actions, policy, monkeypatch)
    state = sample.state.astype(np.float64)
    chunk = policy.infer(Observation(sample.images, state, sample.task, 0.0))
    torch.testing.assert_close(given["images"][0], shown, atol=0, rtol=0)
    assert given["ids"] == tokens.ids.tolist()
    np.testing.assert_allclose(chunk.actions, sample.actions, atol=1e-5)


def test_renamed_cameras_are_served(tmp_path: Path, aloha: Path) -> None:
    """The rename is in LeRobot's processor file and reaches the node."""
    rng = np.random.default_rng(0)
    source, base = LeRobotDataset(aloha), tmp_path / "base"
    save_start(base, make_config(tmp_path, aloha, robot="aloha"), source)
    cameras = dict.fromkeys(("front", "wrist"), (24, 40))
    features = Features(
        cameras, source.meta.names("observation.state"), source.meta.names("action")
    )
    with DatasetWriter(tmp_path / "data", 50, features) as writer:
        for _ in range(2):
            for _ in range(3):
                images = random_images(rng, cameras)
                writer.add_frame(images, source.state[0], source.action[0], "go")
            writer.end_episode()
    data = LeRobotDataset(tmp_path / "data")
    roots = [{"root": str(tmp_path / "data")}]
    common: dict[str, Any] = {"robot": "aloha", "network": {"start": str(base)}}

    def begin(**rename: str) -> TrainConfig:
        return make_config(tmp_path, data={"datasets": roots, "rename": rename}, **common)

    with pytest.raises(ConfigError, match=r"no match for camera front, wrist.*data\.rename"):
        start(begin(), [data])
    with pytest.raises(ConfigError, match="has no camera 'side'; it has front, wrist"):
        start(begin(side="cam_high"), [data])
    with pytest.raises(ConfigError, match="no camera 'cam_low'"):
        start(begin(front="cam_low", wrist="cam_left_wrist"), [data])
    config = begin(front="cam_high", wrist="cam_left_wrist")
    processor = save_start(tmp_path / "c", config, data)
    assert processor.cameras == {"front": "cam_high", "wrist": "cam_left_wrist"}
    policy = Policy.from_pretrained(tmp_path / "c", robot="aloha", device="cpu", seed=0)
    assert {"front", "wrist"} <= set(policy.cameras)
    sample = data.sample(0, HORIZON)
    state = sample.state.astype(np.float64)
    policy.infer(Observation(sample.images, state, sample.task, 0.0))


def test_joints_in_another_order_are_refused(tmp_path: Path) -> None:
    """Fault: only the number of joints was compared."""
    names = list(UR5E["state"])
    for key, order in (("a", names), ("b", [names[1], names[0], *names[2:]])):
        with DatasetWriter(tmp_path / key, 20, Features({}, order, order)) as writer:
            for value in (0.0, 1.0):
                writer.add_frame({}, np.full(7, value), np.full(7, value), "go")
                writer.end_episode()
    robot = tmp_path / "my_ur5e.yaml"
    robot.write_text(yaml.safe_dump(UR5E))
    right, wrong = LeRobotDataset(tmp_path / "a"), LeRobotDataset(tmp_path / "b")
    with pytest.raises(ConfigError, match="'j1' is number 2 instead of 1"):
        start(make_config(tmp_path, tmp_path / "b", robot=str(robot)), [wrong])
    both = make_config(tmp_path, tmp_path / "a", tmp_path / "b", robot=str(robot))
    with pytest.raises(ConfigError, match=r"names of observation\.state \['j1', 'j2'"):
        start(both, [right, wrong])


def test_training_starts_from_the_shipped_policy_or_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`small`; an id with its revision, whose tokenizer is elsewhere in the hub's cache."""
    names = list(NAMED["aloha"].state)
    cameras = dict.fromkeys(CAMERAS, (24, 40))
    rng = np.random.default_rng(0)
    with DatasetWriter(tmp_path / "data", 50, Features(cameras, names, names)) as writer:
        for _ in range(2):
            writer.add_frame(random_images(rng, cameras), rng.random(14), rng.random(14), "go")
            writer.end_episode()
    data = LeRobotDataset(tmp_path / "data")
    common: dict[str, Any] = {"robot": "aloha"}
    small = make_config(tmp_path, tmp_path / "data", network={"start": "small"}, **common)
    network, processor = start(small, [data])
    assert "tokenizer.json" in processor.tokenizer_files
    save_start(tmp_path / "snapshot", small, data)
    steps = tmp_path / "snapshot" / "policy_preprocessor.json"
    steps.write_text(
        steps.read_text().replace('"tokenizer_name": "."', '"tokenizer_name": "o/tok"')
    )
    (tmp_path / "tok").mkdir()
    for name in TOKENIZER_PATTERNS:
        if (tmp_path / "snapshot" / name).exists():
            (tmp_path / "snapshot" / name).rename(tmp_path / "tok" / name)
    asked: list[tuple[str, str | None]] = []

    def snapshot(repo: str, revision: str | None = None, **_: Any) -> str:
        asked.append((repo, revision))
        return str(tmp_path / {"lab/base": "snapshot", "o/tok": "tok"}[repo])

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    of_hub = make_config(tmp_path, tmp_path / "data", network={"start": "lab/base@v2"}, **common)
    again, processor_again = start(of_hub, [data])
    assert ("lab/base", "v2") in asked and ("o/tok", None) in asked
    assert processor_again.tokenizer_files == processor.tokenizer_files
    # saved in bfloat16
    for mine, theirs in zip(network.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=0, rtol=0.01)


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
