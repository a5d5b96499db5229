"""A small checkpoint with random weights.

Its chunks are smooth, bounded and depend on images and instruction.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import torch
from small_policy import tokenizer as small_tokenizer
from small_policy.tokenizer import small_config

from pi05_ros.policy import processing as processors
from pi05_ros.policy.bundle import SETTINGS_FILE
from pi05_ros.policy.checkpoint import save_model
from pi05_ros.policy.config import PolicyConfig
from pi05_ros.policy.model import GemmaLayer, Pi0
from pi05_ros.policy.prompt import PromptTokenizer, pi05_prompt

HOME_RAD = (0.0, -0.96, 1.16, 0.0, -0.3, 0.0)
"""One arm's joints above the table, hand forward."""
HALF_RANGE_RAD = (0.45, 0.30, 0.22, 0.40, 0.40, 0.45)
"""Joints, grippers 0-1 aside, stay within about two of these around home."""

CONTRACTION = 5.0
ANCHOR = 8.0
BRANCH_SCALE = 0.3
QUERY_SCALE = 8.0
FAST_PAIRS = 10
CENTRING_ROUNDS = 4


def small_statistics() -> dict[str, dict[str, np.ndarray]]:
    """Quantiles of the simulated ALOHA: home ± the half ranges, grippers from closed to open."""
    center = np.array([*HOME_RAD, 0.5] * 2)
    half = np.array([*HALF_RANGE_RAD, 0.5] * 2)
    quantiles = {"q01": center - half, "q99": center + half}
    return {processors.STATE: quantiles, processors.ACTION: quantiles}


def create_small_checkpoint(directory: str | Path, seed: int = 0) -> None:
    """Write an untrained small checkpoint: weights, config, tokenizer, statistics, settings.

    The same seed gives the same checkpoint.

    Args:
        directory: created if missing; existing files are replaced.
        seed: of the random weights.
    """
    path = Path(directory)
    path.mkdir(parents=True, exist_ok=True)
    config = small_config()
    small_tokenizer.write_tokenizer(path)
    tokenizer = PromptTokenizer.from_directory(path, config.token_length, config.sizes.vocab)
    save_model(_untrained_model(config, tokenizer, seed), path)
    processors.write_processing(path, config, small_statistics(), tokenizer=".")
    settings = {
        "robot": "aloha",
        "adapt_to_pi": False,
        "delta_actions": False,
        "dt_s": 0.02,
        "trained": False,
        "note": f"random weights, seed {seed}",
    }
    text = json.dumps(settings, indent=2) + "\n"
    (path / SETTINGS_FILE).write_text(text, encoding="utf-8")


def _untrained_model(config: PolicyConfig, tokenizer: PromptTokenizer, seed: int) -> Pi0:
    """Random weights whose chunks are smooth and bounded, and depend on the inputs.

    Plainly random weights leave the noise in the chunk: every step another jump. Here the
    network's velocity is v = CONTRACTION · (x - a), which takes the noise away in 4 or more Euler
    steps, and a comes from the random attention over images and prompt:

    - action_in_proj places x on orthonormal directions beside an anchor, a constant that is
      ANCHOR times as long as the noise and keeps the final norm nearly linear; action_out_proj
      reads those directions back.
    - Random layers reach the stream through gate 1, BRANCH_SCALE keeps a near ±1.
    - Queries of the action expert are QUERY_SCALE times as large, so that the attention picks
      rather than averages, but 0 in the FAST_PAIRS fastest rotary pairs: what is left turns by
      less than 0.06 rad a step and makes a smooth in time.
    - The output bias is set such that grey images with the state at home ask for home.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = Pi0(config).eval()
        dim, size = config.max_action_dim, config.sizes.exp
        basis = torch.linalg.qr(torch.randn(size.width, dim + 1))[0]
        anchor = ANCHOR * math.sqrt(dim)
        model.action_in_proj.weight.copy_(basis[:, :dim])
        model.action_in_proj.bias.copy_(basis[:, dim] * anchor)
        readout = CONTRACTION * anchor / math.sqrt(size.width)
        model.action_out_proj.weight.copy_(basis[:, :dim].T * readout)
        expert = model.experts.action
        assert expert.modulation is not None
        expert.modulation.bias.view(-1, 3, size.width)[:, 2] = 1.0  # scale, shift, gate
        slow = (torch.arange(size.head_dim // 2) >= FAST_PAIRS).repeat(2)
        for layer in expert.layers:
            assert isinstance(layer, GemmaLayer)
            queries = layer.qkv.weight[: layer.query_dim].view(size.heads, size.head_dim, -1)
            queries.mul_(QUERY_SCALE * slow[:, None])
            layer.out.weight.mul_(BRANCH_SCALE)
            layer.down.weight.mul_(BRANCH_SCALE)
        _center(model, tokenizer)
    return model


def _center(model: Pi0, tokenizer: PromptTokenizer) -> None:
    config = model.config
    side, dim = config.image_size, config.max_action_dim
    prompt = tokenizer.encode(pi05_prompt("", np.zeros(config.state_dim or 0)))
    grey = torch.zeros(1, len(config.cameras), 3, side, side)
    # x moves the final norm a little, so that one round is not exact
    for _ in range(CENTRING_ROUNDS):
        chunk = model.sample_actions(
            grey,
            torch.ones(1, len(config.cameras), dtype=torch.bool),
            torch.from_numpy(prompt.ids)[None],
            torch.from_numpy(prompt.mask)[None],
            noise=torch.zeros(1, config.horizon, dim),
            num_steps=round(CONTRACTION),  # at 1 / CONTRACTION a step goes all the way to a
        )
        model.action_out_proj.bias.add_(CONTRACTION * chunk[0].mean(0))
