"""LeRobot policies in the executor, with a stand-in for LeRobot.

`test/external/lerobot_policies.py` holds the stand-in and the adapter against LeRobot itself.
Faults: a random network taken for a trained one, a history of other times, images of another shape,
statistics left out, an ensembling that runs twice.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import lerobot_stand_in  # type: ignore[import-not-found]
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pi05_ros.adapters.factory import open_policy
from pi05_ros.adapters.lerobot import LeRobotPolicy, read_features
from pi05_ros.check import check
from pi05_ros.executor import InferenceExecutor, black_observation
from pi05_ros.policy.weights import CheckpointError
from pi05_ros.types import ActionPrefix, Observation

CAMERAS = ("cam_high", "cam_left_wrist", "cam_right_wrist")
WIDTH, HEIGHT = 64, 48
MEAN, STD = 0.25, 2.0


@pytest.fixture(autouse=True)
def lerobot() -> Iterator[None]:
    with lerobot_stand_in.installed():
        yield


def write(folder: Path, kind: str = "act", **changes: Any) -> Path:
    """A policy as LeRobot saves it."""
    folder.mkdir()
    images = {
        f"observation.images.{name}": {"type": "VISUAL", "shape": [3, HEIGHT, WIDTH]}
        for name in CAMERAS
    }
    inputs = images | {"observation.state": {"type": "STATE", "shape": [14]}}
    outputs = {"action": {"type": "ACTION", "shape": [14]}}
    sizes: dict[str, Any] = {"n_obs_steps": 1, "chunk_size": 20, "n_action_steps": 20}
    if kind == "diffusion":
        sizes = {"n_obs_steps": 2, "horizon": 16, "n_action_steps": 8}
    config = {"type": kind, "input_features": inputs, "output_features": outputs, "device": "cuda"}
    (folder / "config.json").write_text(json.dumps(config | sizes | changes))
    modes = {"VISUAL": "IDENTITY", "STATE": "MEAN_STD", "ACTION": "MEAN_STD"}
    scaling = {"features": inputs | outputs, "norm_map": modes}
    statistics = {
        f"{name}.{key}": torch.full((14,), value)
        for name in ("observation.state", "action")
        for key, value in (("mean", MEAN), ("std", STD))
    }
    save_file(statistics, folder / "stats.safetensors")
    device = {"registry_name": "device_processor", "config": {"device": "cuda"}}
    for side, step in (("pre", "normalizer_processor"), ("post", "unnormalizer_processor")):
        normalize = {"registry_name": step, "config": scaling, "state_file": "stats.safetensors"}
        document = {"name": f"policy_{side}processor", "steps": [device, normalize]}
        (folder / f"policy_{side}processor.json").write_text(json.dumps(document))
    save_file({"model.weight": torch.ones(3)}, folder / "model.safetensors")
    return folder


def change(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def observe(level: int = 100, stamp_s: float = 0.0, size: tuple[int, int] = (WIDTH, HEIGHT)) -> Any:
    shape = (size[1], size[0], 3)
    images = {name: np.full(shape, level, np.uint8) for name in CAMERAS}
    return Observation(images, np.linspace(-0.5, 0.5, 14), "wave", stamp_s)


def load(folder: Path, **options: Any) -> LeRobotPolicy:
    policy = open_policy(folder, device="cpu", **options)
    assert isinstance(policy, LeRobotPolicy)
    return policy


def test_a_chunk_in_robot_units(tmp_path: Path) -> None:
    """State and chunk pass LeRobot's statistics; the whole chunk is used."""
    policy = load(write(tmp_path / "act"))
    assert (policy.horizon, policy.dt_s, policy.history_steps) == (20, 0.02, 0)
    assert policy.cameras == CAMERAS and policy.image_size_px == (WIDTH, HEIGHT)
    assert "act" in policy.description and "ignores the instruction" in policy.description
    observation = observe()
    chunk = policy.infer(observation)
    normalized = (observation.state - MEAN) / STD
    ramp = np.linspace(0, 1, 20)[:, None]
    expected = (normalized + ramp + 100 / 255) * STD + MEAN
    np.testing.assert_allclose(chunk.actions, expected, atol=1e-5)
    assert chunk.stamp_s == observation.stamp_s and chunk.actions.dtype == np.float64
    assert set(chunk.timings_s) == {"preprocess", "network", "postprocess"}


def test_a_history_has_a_time_axis_oldest_first(tmp_path: Path) -> None:
    policy = load(write(tmp_path / "diffusion", "diffusion"), seed=3)
    assert (policy.horizon, policy.history_steps) == (8, 1)
    past = observe(50, -0.02)
    now = replace(observe(100), past=(past,))
    policy.infer(now)
    batch = policy._network.seen[-1]
    assert batch["observation.state"].shape == (1, 2, 14)
    images = batch["observation.images.cam_high"]
    assert images.shape == (1, 2, 3, HEIGHT, WIDTH)
    np.testing.assert_allclose(images[0, :, 0, 0, 0], [50 / 255, 100 / 255], atol=1e-6)
    assert not any(policy._network._queues.values()), "LeRobot's own queues stay empty"
    with pytest.raises(ValueError, match="needs 1 earlier observations, got 0"):
        policy.infer(observe())


def test_a_seed_repeats_the_noise_and_leaves_torchs_alone(tmp_path: Path) -> None:
    folder = write(tmp_path / "diffusion", "diffusion")
    now = replace(observe(), past=(observe(),))
    first = [load(folder, seed=3).infer(now).actions for _ in range(2)]
    np.testing.assert_array_equal(first[0], first[1])
    policy = load(folder, seed=3)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    np.testing.assert_array_equal(policy.infer(now).actions, first[0])
    assert not np.array_equal(policy.infer(now).actions, first[0])
    assert torch.equal(before, torch.get_rng_state())
    policy.restart(3)
    np.testing.assert_array_equal(policy.infer(now).actions, first[0])


def test_images_get_the_size_of_the_training_data(tmp_path: Path) -> None:
    """Fault: ACT takes any size, and sees another scene."""
    policy = load(write(tmp_path / "act"))
    policy.infer(observe(size=(640, 480)))
    assert policy._network.seen[-1]["observation.images.cam_high"].shape == (1, 3, HEIGHT, WIDTH)
    with pytest.raises(ValueError, match=r"the image is 640 × 360.*were 64 × 48: crop it"):
        policy.infer(observe(size=(640, 360)))


def test_the_executor_warms_it_up_and_runs_it(tmp_path: Path) -> None:
    """The warm-up's observation has a history too."""
    folder = write(tmp_path / "diffusion", "diffusion")
    executor = InferenceExecutor(lambda: load(folder))
    executor.start()
    policy = executor.wait_ready(30.0)
    assert len(black_observation(policy).past) == 1
    executor.submit(lambda: replace(observe(), past=(observe(),)))
    assert executor.stop(10.0)


def test_bad_input_is_named(tmp_path: Path) -> None:
    policy = load(write(tmp_path / "act"))
    now = observe()
    one = {name: image for name, image in now.images.items() if name != "cam_high"}
    for wrong, message in (
        (replace(now, images=one), "camera 'cam_high' has no image"),
        (replace(now, state=now.state[:3]), r"state must have shape \[14\]"),
        (replace(now, state=now.state * np.nan), r"state\[0\] is nan"),
        (replace(now, images=now.images | {"cam_high": np.zeros((48, 64))}), "uint8"),
    ):
        with pytest.raises(ValueError, match=message):
            policy.infer(wrong)
    with pytest.raises(
        ValueError, match="cannot continue a prefix: use another scheduler than rtc"
    ):
        policy.infer(now, ActionPrefix(np.zeros((2, 14)), 1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"type": "vqbet"}, "predicts from queues of its own"),
        ({"use_peft": True}, "merge them into the policy"),
        ({"input_features": {}, "output_features": {}}, "no usable features"),
        (
            {"input_features": {"observation.environment_state": {"type": "ENV", "shape": [3]}}},
            "environment_state, which is neither an image",
        ),
        ({"type": "unheard_of"}, "LeRobot cannot load it: ValueError: Unknown policy name"),
        (
            {"output_features": {"action": {"type": "ACTION", "shape": [7]}}},
            "robot 'aloha' has action_dim 14, the checkpoint 7",
        ),
        ({"n_action_steps": 1, "chunk_size": 1}, "which is no chunk"),
    ],
)
def test_a_policy_that_cannot_be_used_is_named(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    folder = write(tmp_path / "policy")
    change(folder, **changes)
    with pytest.raises(CheckpointError, match=message):
        load(folder)


def test_files_that_do_not_fit_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault: LeRobot's loaders print a warning and return a random network."""
    folder = write(tmp_path / "act")

    def forgetful(path: str, **options: Any) -> Any:
        tensors = load_file(Path(path) / "model.safetensors")
        tensors["model.weight"] += 1
        tensors["model.bias"] = torch.zeros(2)
        return lerobot_stand_in.Network(options["config"], tensors)

    with monkeypatch.context() as patch:
        patch.setattr(lerobot_stand_in.Network, "from_pretrained", forgetful)
        with pytest.raises(
            CheckpointError, match=r"1 missing: model.bias; 1 not loaded: model.weight"
        ):
            load(folder)
    (folder / "policy_preprocessor.json").unlink()
    with pytest.raises(CheckpointError, match="migrate_policy_normalization"):
        load(folder)


def test_cameras_and_units_come_from_the_robot(tmp_path: Path) -> None:
    folder = write(tmp_path / "act")
    names = ["front", "cam_left_wrist", "cam_right_wrist"]
    robot = {
        "name": "mine", "state": [f"j{n}" for n in range(14)], "dt_s": 0.1,
        "action": [f"j{n}" for n in range(14)], "cameras": {n: n for n in names},
        "signs": [-1] * 14,
    }  # fmt: skip
    with pytest.raises(CheckpointError, match="no match for camera front"):
        load(folder, robot=robot)
    (folder / "pi05_ros.json").write_text(json.dumps({"cameras": {"front": "cam_high"}}))
    policy = load(folder, robot=robot)
    assert policy.cameras[0] == "front" and policy.dt_s == 0.1
    now = observe()
    images = {"front": now.images["cam_high"]} | {n: now.images[n] for n in names[1:]}
    flipped = policy.infer(replace(now, images=images)).actions
    (folder / "pi05_ros.json").unlink()
    plain = load(folder).infer(replace(now, state=-now.state)).actions
    np.testing.assert_allclose(flipped, -plain, atol=1e-6)
    (folder / "pi05_ros.json").write_text(json.dumps({"cameras": {"front": "cam_left_wrist"}}))
    with pytest.raises(CheckpointError, match=r"no camera for cam_high.*needs all"):
        load(folder, robot=robot | {"cameras": {"front": "front", names[2]: names[2]}})


def test_options_of_other_networks_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "act")
    with pytest.raises(ValueError, match=r"execution 'compile' is for π0\.5 and π0"):
        load(folder, execution="compile")
    assert load(folder, execution="auto", head=None, num_steps=10).horizon == 20


def test_without_lerobot_one_line_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    folder = write(tmp_path / "act")
    monkeypatch.setitem(sys.modules, "lerobot.configs.policies", None)
    with pytest.raises(
        CheckpointError, match=r"LeRobot act policy: pip install 'pi05_ros\[lerobot"
    ):
        load(folder)


def test_check_describes_it_without_lerobot(tmp_path: Path) -> None:
    folder = write(tmp_path / "diffusion", "diffusion")
    report = check(folder)
    assert report.kind == "diffusion" and (report.state_dim, report.action_dim) == (14, 14)
    assert report.cameras == {name: name for name in CAMERAS}
    assert report.history_steps == 1 and report.runs, report.problems
    assert read_features(folder).uses_text is False
    assert check(folder, robot="droid").problems
