"""The small policy's network and its initial weights, which learn faster than random ones.

With π0.5's own initialisation, places of patches and values of numbers are random and each layer of
the action expert is the identity. Pre-trained checkpoints have learnt those; here they are set.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from pi05_lab.data.lerobot_dataset import LeRobotDataset
from pi05_lab.training.config import TrainConfig
from pi05_ros.policy.config import DEFAULT_NORMALIZATION, GemmaSize, VisionSize
from pi05_ros.policy.model import Pi0
from pi05_ros.policy.prompt import BINS, PromptTokenizer
from small_policy.tokenizer import small_config, write_tokenizer

LONGEST_WAVELENGTH = 100.0
"""Of the image positions, in patches / 2π."""
FAST_PAIRS = 0.3
"""Fraction of the rotary pairs that turn too fast to compare contents over a prefix."""
QUERY_SCALE = 2.0
NUMBER_OCTAVES = 6.0
"""From the slowest to the fastest sine of a state bin's number."""


def make_network(config: TrainConfig, dataset: LeRobotDataset, folder: Path) -> Pi0:
    """The small network for a dataset, with the sizes that the YAML file replaces."""
    wanted = config.network
    plain = small_config()
    sizes = plain.sizes
    sizes = replace(
        sizes,
        vlm=GemmaSize(*wanted.vlm) if wanted.vlm else sizes.vlm,
        exp=GemmaSize(*wanted.exp) if wanted.exp else sizes.exp,
        vis=VisionSize(*wanted.vis) if wanted.vis else sizes.vis,
        image=wanted.image or sizes.image,
        patch=wanted.patch or sizes.patch,
        vocab=sizes.vocab + _action_tokens(config),
    )
    kind = wanted.kind or plain.kind
    changed = replace(
        plain,
        kind=kind,
        normalization_mapping=DEFAULT_NORMALIZATION[kind],
        sizes=sizes,
        horizon=wanted.horizon or plain.horizon,
        cameras=plain.cameras if config.robot == "aloha" else tuple(dataset.cameras),
        state_dim=dataset.state_dim,
        action_dim=dataset.action_dim,
    )
    write_tokenizer(folder)
    network = Pi0(changed)
    _initialize(network, PromptTokenizer.from_directory(folder, changed.token_length, sizes.vocab))
    return network


def _action_tokens(config: TrainConfig) -> int:
    """Embeddings beyond the prompt's, in steps of 64, for the loss `fast`."""
    if not any(stage.losses.get("fast", 0.0) > 0 for stage in config.stages):
        return 0
    return math.ceil((config.fast.vocab_size + config.fast.skip) / 64) * 64


@torch.no_grad()
def _initialize(network: Pi0, tokenizer: PromptTokenizer) -> None:
    """Set image positions, number embeddings, queries and gates of a π0.5 with random weights."""
    _set_image_positions(network)
    _set_numbers(network, tokenizer)
    _set_queries(network)
    modulation = network.experts.action.modulation
    if modulation is not None:
        # scale, shift, gate
        modulation.bias.view(-1, 3, network.config.sizes.exp.width)[:, 2] = 1.0
    action_dim = network.config.action_dim
    network.action_in_proj.weight[:, action_dim:] = 0.0
    network.action_out_proj.weight[action_dim:] = 0.0
    # Padded dimensions are not trained and have other values in inference than in training, so
    # they stay disconnected from the input.
    mask = torch.ones_like(network.action_in_proj.weight)
    mask[:, action_dim:] = 0.0
    network.action_in_proj.weight.register_hook(lambda gradient: gradient * mask.to(gradient))


def _set_image_positions(network: Pi0) -> None:
    """Sines and cosines of column and row (Vaswani et al. 2017, in two dimensions)."""
    position = network.vision.position
    tokens, width = position.shape
    side, quarter = math.isqrt(tokens), width // 4
    frequency = LONGEST_WAVELENGTH ** -(torch.arange(quarter) / quarter)
    grid = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    row, column = (index.flatten().float()[:, None] * frequency for index in grid)
    waves = torch.cat((column.sin(), column.cos(), row.sin(), row.cos()), dim=1)
    position.zero_()
    position[:, : 4 * quarter] = waves


def answer(embedding: Tensor) -> Tensor:
    """[..., width] → a fixed permutation P: what the query of a word matches.

    The embedding itself would match the word's own token.
    """
    return embedding.roll(embedding.shape[-1] // 2, dims=-1)


def _set_queries(network: Pi0) -> None:
    """Initialise half of the query heads with W_q = QUERY_SCALE · W_k · P, see `answer`.

    Only in rotary pairs that turn slowly: the others compare positions, not contents.
    """
    half = network.config.sizes.vlm.head_dim // 2
    slow = (torch.arange(half) >= FAST_PAIRS * half).repeat(2)
    for layer in network.experts.vlm.layers:
        queries, keys, _ = layer.qkv.weight.split((layer.query_dim, layer.kv_dim, layer.kv_dim))
        heads = queries.view(-1, layer.head_dim, queries.shape[1])
        # q = K · answer(x), with the permutation moved into the matrix
        matching = keys[: layer.head_dim].roll(-(keys.shape[1] // 2), dims=1)
        heads[: len(heads) // 2] = QUERY_SCALE * slow[:, None] * matching


def _set_numbers(network: Pi0, tokenizer: PromptTokenizer) -> None:
    """Embeddings of the state's bins: sines and cosines of their value in -1 to 1.

    Numbers that the tokenizer splits keep their random embeddings.
    """
    weight = network.embedder.weight
    half = weight.shape[1] // 2
    frequency = 2.0 ** (torch.arange(half) * NUMBER_OCTAVES / half)
    for number in range(BINS):
        tokens = tokenizer.encode(f" {number}")
        ids = tokens.ids[tokens.mask][1:]
        if len(ids) == 1:
            angle = (2 * number / (BINS - 1) - 1) * frequency
            wave = torch.cat((angle.sin(), angle.cos()))
            weight[int(ids[0]), : 2 * half] = wave / math.sqrt(weight.shape[1])
