"""The small network that comes with the package: π0.5 with 3.9 million parameters.

Every part and file is that of a full checkpoint; only the sizes are small. As long as no trained
one is shipped, an untrained one is made on first use, with weights that move a simulated ALOHA
visibly and smoothly, and to no purpose.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch

from pi05_ros.policy import processors, small_tokenizer
from pi05_ros.policy.checkpoint import save_model
from pi05_ros.policy.config import GemmaSize, PolicyConfig, Sizes, VisionSize
from pi05_ros.policy.gemma import GemmaLayer
from pi05_ros.policy.model import Pi0
from pi05_ros.policy.prompt import PromptTokenizer, pi05_prompt
from pi05_ros.policy.robots import SETTINGS_FILE

SMALL = "small"
"""The name that `Policy.from_pretrained` takes for this checkpoint."""
SHIPPED = Path(__file__).resolve().parents[1] / "checkpoints" / "small_aloha"

CAMERAS = ("cam_high", "cam_left_wrist", "cam_right_wrist")
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


def small_checkpoint() -> Path:
    """The folder of the small checkpoint: the shipped one, else an untrained one in the cache.

    The cache is $XDG_CACHE_HOME/pi05_ros, by default ~/.cache/pi05_ros. The untrained checkpoint
    appears there whole or not at all, also when several processes make it at once.

    Raises:
        OSError: the cache cannot be written.
    """
    if (SHIPPED / "config.json").is_file():
        return SHIPPED
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pi05_ros"
    target = cache / f"small_aloha_untrained_{_recipe_hash()}"
    if target.is_dir():
        return target
    try:
        cache.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=".small_aloha_", dir=cache))
    except OSError as error:
        raise OSError(
            f"the small checkpoint needs a writable cache, {cache} is not ({error.strerror}): "
            "set XDG_CACHE_HOME"
        ) from error
    try:
        create_small_checkpoint(partial)
        partial.chmod(0o755)
        try:
            partial.rename(target)
        except OSError:
            if not target.is_dir():  # not another process that was first
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _recipe_hash() -> str:
    """Names the cached folder, so that another version of the recipe does not meet an old one."""
    digest = hashlib.sha256()
    for source in (__file__, small_tokenizer.__file__, processors.__file__):
        digest.update(Path(source).read_bytes())
    return digest.hexdigest()[:12]


def small_config() -> PolicyConfig:
    """The small network's sizes, for three 112-pixel cameras and ALOHA's 14 joints."""
    # room for new words, in steps that suit the matrix kernels
    vocab = math.ceil(small_tokenizer.vocabulary_size() / 64) * 64
    return PolicyConfig(
        kind="pi05",
        sizes=Sizes(
            vlm=GemmaSize(width=128, depth=5, mlp_dim=384, heads=4, kv_heads=1, head_dim=64),
            exp=GemmaSize(width=128, depth=5, mlp_dim=512, heads=4, kv_heads=1, head_dim=64),
            vis=VisionSize(width=128, depth=3, heads=4, mlp_dim=512),
            vocab=vocab,
            image=112,
            patch=16,
        ),
        horizon=50,
        # 23 tokens of frame and state, and 73 for the instruction: as many ASCII characters
        token_length=96,
        cameras=CAMERAS,
        state_dim=14,
        action_dim=14,
    )


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
        directory: made if it is not there; files of the same names are replaced.
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
    """Random weights whose chunks are smooth and bounded, and follow what the policy sees.

    Plainly random weights leave the noise in the chunk: every step another jump. Here the
    network's velocity is v = CONTRACTION · (x - a), which takes the noise away in 4 or more Euler
    steps, and a comes from the random attention over pictures and prompt:

    - action_in_proj places x on orthonormal directions beside an anchor, a constant that is
      ANCHOR times as long as the noise and keeps the final norm nearly linear; action_out_proj
      reads those directions back.
    - Random layers reach the stream through gate 1, BRANCH_SCALE keeps a near ±1.
    - Queries of the action expert are QUERY_SCALE times as large, so that the attention picks
      rather than averages, but 0 in the FAST_PAIRS fastest rotary pairs: what is left turns by
      less than 0.06 rad a step and makes a smooth in time.
    - The output bias is set such that grey pictures with the state at home ask for home.
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
