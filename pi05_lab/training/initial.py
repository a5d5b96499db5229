"""Fresh weights that a small network learns from faster than from plainly random ones.

In the network's own initialisation nothing tells two patches' places or two numbers apart but
chance, and each layer of the action expert begins as the identity. Pre-trained checkpoints have
learnt those; a network that starts from nothing is given them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pi05_ros.policy.model import Pi0
from pi05_ros.policy.prompt import BINS, PromptTokenizer

LONGEST_WAVELENGTH = 100.0
"""Of the image positions, in patches / 2π."""
FAST_PAIRS = 0.3
"""Fraction of the rotary pairs that turn too fast to compare contents over a prefix."""
ASKING_SCALE = 2.0
NUMBER_OCTAVES = 6.0
"""From the slowest to the fastest sine of a state bin's number."""


@torch.no_grad()
def prepare_fresh(network: Pi0, tokenizer: PromptTokenizer, action_dim: int) -> None:
    """Give a π0.5 with random weights places, numbers and open gates.

    Args:
        network: changed in place.
        tokenizer: numbers that are one token each get embeddings that lie in order.
        action_dim: the robot's; the padded dimensions are disconnected from the input.
    """
    _set_image_positions(network)
    _set_numbers(network, tokenizer)
    _ask(network)
    modulation = network.experts.action.modulation
    if modulation is not None:
        # scale, shift, gate
        modulation.bias.view(-1, 3, network.config.sizes.exp.width)[:, 2] = 1.0
    network.action_in_proj.weight[:, action_dim:] = 0.0
    network.action_out_proj.weight[action_dim:] = 0.0


def _set_image_positions(network: Pi0) -> None:
    """Sines and cosines of column and row (Vaswani et al. 2017, in two dimensions)."""
    position = network.vision.position
    tokens, width = position.shape
    side, quarter = math.isqrt(tokens), width // 4
    frequency = LONGEST_WAVELENGTH ** -(torch.arange(quarter) / quarter)
    row, column = (index.flatten().float()[:, None] * frequency for index in _grid(side))
    waves = torch.cat((column.sin(), column.cos(), row.sin(), row.cos()), dim=1)
    position.zero_()
    position[:, : 4 * quarter] = waves


def answer(embedding: Tensor) -> Tensor:
    """[..., width] → the same numbers in another order: what a word's query looks for.

    Not the embedding itself, which every word would find first of all in its own token.
    """
    return embedding.roll(embedding.shape[-1] // 2, dims=-1)


def _ask(network: Pi0) -> None:
    """Half of the language model's query heads begin by looking for the answer to their token.

    Their query of a token is the key of its answer, in the rotary pairs that turn slowly: the
    others would compare places, not contents.
    """
    half = network.config.sizes.vlm.head_dim // 2
    slow = (torch.arange(half) >= FAST_PAIRS * half).repeat(2)
    for layer in network.experts.vlm.stack:
        queries, keys, _ = layer.qkv.weight.split(
            (layer.query_dim, layer.kv_dim, layer.kv_dim), dim=0
        )
        heads = queries.view(-1, layer.head_dim, queries.shape[1])
        # q = K · answer(x), with the answer's rearrangement moved into the matrix
        asking = keys[: layer.head_dim].roll(-(keys.shape[1] // 2), dims=1)
        heads[: len(heads) // 2] = ASKING_SCALE * slow[:, None] * asking


def _grid(side: int) -> tuple[Tensor, ...]:
    return torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")


def _set_numbers(network: Pi0, tokenizer: PromptTokenizer) -> None:
    """The numbers of the state's bins: sines and cosines of the value in -1 to 1."""
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
