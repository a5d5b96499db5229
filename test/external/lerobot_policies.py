"""LeRobot's policies through the adapter, beside LeRobot's own rollout of them.

    python lerobot_policies.py FOLDER

Runs in an environment with lerobot and this package. Makes tiny ACT, Diffusion and SmolVLA policies
from configs, without downloads, and saves them in FOLDER. For each, the adapter's chunks must equal
what `select_action` returns step by step, and what the stand-in of `make test` promises must hold.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.policies.act.configuration_act import ACTConfig
from lerobot.policies.diffusion.configuration_diffusion import DiffusionConfig
from lerobot.policies.factory import get_policy_class, make_pre_post_processors
from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
from lerobot.policies.utils import prepare_observation_for_inference

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
import lerobot_stand_in  # type: ignore[import-not-found]

from pi05_ros.adapters.factory import open_policy
from pi05_ros.adapters.lerobot import LeRobotPolicy
from pi05_ros.types import Observation

CAMERAS = ("cam_high", "cam_left_wrist", "cam_right_wrist")
JOINTS = 14
SEED = 5
TOLERANCE = 1e-5
"""Of robot units; LeRobot computes in float32."""


def features(width: int, height: int) -> dict[str, Any]:
    images = {
        f"observation.images.{name}": PolicyFeature(FeatureType.VISUAL, (3, height, width))
        for name in CAMERAS
    }
    state = PolicyFeature(FeatureType.STATE, (JOINTS,))
    return {
        "input_features": images | {"observation.state": state},
        "output_features": {"action": PolicyFeature(FeatureType.ACTION, (JOINTS,))},
        "device": "cpu",
        "push_to_hub": False,
    }


def statistics() -> dict[str, dict[str, torch.Tensor]]:
    random = torch.Generator().manual_seed(0)
    made: dict[str, dict[str, torch.Tensor]] = {}
    for name in ("observation.state", "action"):
        mean = torch.randn(JOINTS, generator=random)
        std = torch.rand(JOINTS, generator=random) + 0.5
        made[name] = {"mean": mean, "std": std, "min": mean - 2 * std, "max": mean + 2 * std}
    for name in CAMERAS:
        shape = (3, 1, 1)
        made[f"observation.images.{name}"] = {
            "mean": torch.full(shape, 0.4), "std": torch.full(shape, 0.25),
            "min": torch.zeros(shape), "max": torch.ones(shape),
        }  # fmt: skip
    return made


def tiny_vlm(folder: Path) -> Path:
    """A SmolVLM of a few layers with a tokenizer of words, so that nothing is downloaded."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        PreTrainedTokenizerFast,
        SmolVLMConfig,
        SmolVLMForConditionalGeneration,
        SmolVLMImageProcessor,
        SmolVLMProcessor,
        SmolVLMVideoProcessor,
    )

    special = ["<unk>", "<pad>", "<bos>", "<eos>", "<image>", "<fake_token_around_image>",
               "<global-img>"]  # fmt: skip
    words = [*special, "wave", "touch", "the", "red", "cube"]
    bpe = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, "<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    named = {"image_token": "<image>", "fake_image_token": "<fake_token_around_image>",
             "global_image_token": "<global-img>"}  # fmt: skip
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, unk_token="<unk>", pad_token="<pad>", bos_token="<bos>",
        eos_token="<eos>", extra_special_tokens=named,
    )  # fmt: skip
    text = {
        "model_type": "llama", "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 4,
        "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 64,
        "pad_token_id": 1,
    }  # fmt: skip
    vision = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 2, "image_size": 64, "patch_size": 16,
    }  # fmt: skip
    config = SmolVLMConfig(
        text_config=text, vision_config=vision, scale_factor=2, image_token_id=4, pad_token_id=1
    )
    torch.manual_seed(0)
    SmolVLMForConditionalGeneration(config).save_pretrained(folder)
    images, videos = SmolVLMImageProcessor(), SmolVLMVideoProcessor()
    SmolVLMProcessor(images, tokenizer, videos).save_pretrained(folder)
    return folder


def configs(folder: Path) -> Iterator[tuple[str, Any]]:
    plain = {"pretrained_backbone_weights": None, **features(112, 84)}
    yield "act", ACTConfig(
        chunk_size=20, n_action_steps=20, dim_model=64, n_heads=4, dim_feedforward=64,
        n_encoder_layers=1, n_decoder_layers=1, n_vae_encoder_layers=1, latent_dim=8, **plain,
    )  # fmt: skip
    yield "diffusion", DiffusionConfig(
        n_obs_steps=2, horizon=16, n_action_steps=8, down_dims=(32, 64),
        diffusion_step_embed_dim=16, spatial_softmax_num_keypoints=8, use_group_norm=True,
        noise_scheduler_type="DDIM", num_inference_steps=4, **plain,
    )  # fmt: skip
    yield "smolvla", SmolVLAConfig(
        chunk_size=16, n_action_steps=16, vlm_model_name=str(tiny_vlm(folder / "vlm")),
        load_vlm_weights=False, num_vlm_layers=4, expert_width_multiplier=1.0,
        resize_imgs_with_padding=(64, 64), tokenizer_max_length=16, num_steps=3,
        **features(112, 84),
    )  # fmt: skip


def observations(count: int) -> list[Observation]:
    random = np.random.default_rng(1)
    return [
        Observation(
            {name: random.integers(0, 256, (84, 112, 3), dtype=np.uint8) for name in CAMERAS},
            random.uniform(-1, 1, JOINTS),
            "touch the red cube",
            0.02 * step,
        )
        for step in range(count)
    ]


def rollout(folder: Path, frames: list[Observation], seeds: list[int]) -> np.ndarray:
    """LeRobot's own actions [len(frames), 14]: `select_action` at every frame.

    `seeds` are those of the noise, one for each chunk.
    """
    config = json.loads((folder / "config.json").read_text())
    policy = get_policy_class(config["type"]).from_pretrained(str(folder))
    before, after = make_pre_post_processors(policy.config, pretrained_path=str(folder))
    policy.reset()
    actions = []
    for step, frame in enumerate(frames):
        raw: dict[str, Any] = {f"observation.images.{n}": i for n, i in frame.images.items()}
        raw["observation.state"] = frame.state.astype(np.float32)
        batch = before(
            prepare_observation_for_inference(raw, torch.device("cpu"), frame.instruction, "")
        )
        if step % config["n_action_steps"] == 0:
            torch.manual_seed(seeds[step // config["n_action_steps"]])
        actions.append(after(policy.select_action(batch))[0].numpy())
    return np.array(actions)


def compare(folder: Path) -> None:
    """Two chunks: the second one with a history of its own."""
    policy = open_policy(folder, device="cpu", seed=SEED)
    assert isinstance(policy, LeRobotPolicy)
    steps, history = policy.horizon, policy.history_steps
    frames = observations(2 * steps)
    random = torch.Generator().manual_seed(SEED)
    seeds = [int(torch.randint(1 << 62, (), generator=random)) for _ in range(2)]
    expected = rollout(folder, frames, seeds)
    for start in (0, steps):
        # LeRobot repeats the first frame where there is none before it
        past = tuple(frames[max(0, start - back)] for back in range(history, 0, -1))
        now = frames[start]
        observation = Observation(now.images, now.state, now.instruction, now.stamp_s, past)
        chunk = policy.infer(observation)
        worst = float(np.abs(chunk.actions - expected[start : start + steps]).max())
        print(f"{folder.name}: chunk at step {start}: largest difference {worst:.1e}")
        assert worst < TOLERANCE
    print(f"{folder.name}: {policy.description}")


def reaching_the_network(folder: Path, observation: Observation) -> tuple[dict[str, Any], Any]:
    """What the adapter passes to `predict_action_chunk`, and the chunk's shape."""
    policy = open_policy(folder, device="cpu", seed=SEED)
    assert isinstance(policy, LeRobotPolicy)
    network, seen = policy._network, []
    predict = network.predict_action_chunk

    def watched(batch: dict[str, Any]) -> Any:
        seen.append(dict(batch))
        return predict(batch)

    network.predict_action_chunk = watched
    chunk = policy.infer(observation)
    for name, queue in (getattr(network, "_queues", None) or {}).items():
        assert not queue, f"{folder.name}: predict_action_chunk fills the queue {name}"
    return seen[-1], chunk.actions.shape


def confirm_stand_in(folder: Path) -> None:
    """The stand-in of `make test` gives its network what LeRobot gives its own."""
    first, second = observations(2)
    config = json.loads((folder / "config.json").read_text())
    past = (first,) if config["n_obs_steps"] == 2 else ()
    now = Observation(second.images, second.state, second.instruction, second.stamp_s, past)
    real, shape = reaching_the_network(folder, now)
    with lerobot_stand_in.installed():
        stood_in, other = reaching_the_network(folder, now)
    assert shape == other, f"{folder.name}: the stand-in's chunk is {other}, LeRobot's {shape}"
    for name, value in stood_in.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(value, real[name], msg=f"{folder.name}: {name} differs")
        elif name == "task":
            assert value == real[name]
    given = {name for name, value in real.items() if isinstance(value, torch.Tensor)}
    assert given <= set(stood_in), f"the stand-in lacks {given - set(stood_in)}"
    print(f"{folder.name}: the stand-in of make test behaves like LeRobot")


def main() -> int:
    folder = Path(sys.argv[1])
    for name, config in configs(folder):
        torch.manual_seed(0)
        policy = get_policy_class(name)(config).eval()
        made = folder / name
        policy.save_pretrained(made)
        for processor in make_pre_post_processors(config, dataset_stats=statistics()):
            processor.save_pretrained(made)
        compare(made)
        if name in lerobot_stand_in.TYPES:
            confirm_stand_in(made)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
