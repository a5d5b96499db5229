"""The language model's own answer: a chunk as FAST tokens, one after the other.

π0-FAST (arXiv 2501.09747) and the first stage of π0.5 (arXiv 2504.16054) predict actions so. Images
and prompt are one bidirectional block; action tokens follow causally, and the logits are products
with the token embedding.

Decoding sees what training showed. That differs from two details of the originals' decoding: openpi
leaves out the position after the prompt, and LeRobot lets the prompt see the BOS behind it.

Sources: openpi `models/tokenizer.py` (FASTTokenizer), `models/pi0_fast.py`; LeRobot 0.6.1
`modeling_pi0_fast.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from pi05_ros.policy.action_tokens import ActionTokenError, ActionTokenizer
from pi05_ros.policy.checkpoint import cached_tokenizer
from pi05_ros.policy.config import PolicyConfig
from pi05_ros.policy.inference import Mark, SampleInputs
from pi05_ros.policy.model import KeyValue, Pi0, Rotary, attention, rotary
from pi05_ros.policy.prompt import (
    PromptTokenizer,
    clean_instruction,
    discretize,
    pi05_prompt,
)
from pi05_ros.policy.weights import CheckpointError

ACTION_TOKENIZER = "action_tokenizer"
"""The folder of the action tokenizer in a checkpoint."""
UNIVERSAL = "physical-intelligence/fast"
"""The action tokenizer of openpi's checkpoints, FAST+."""
CONFIG_KEY = "fast"
"""Of `FastConfig` in config.json."""
PROMPTS = ("pi05", "openpi", "lerobot")
PALIGEMMA_SKIP = 128
"""PaliGemma's last entries, `<seg…>`, which action tokens leave alone."""
END = "|"


@dataclass(frozen=True)
class FastConfig:
    """How action tokens stand in a network's vocabulary and sequence."""

    prompt: str = "pi05"
    """pi05: π0.5's own, which ends with "Action: "; openpi: π0-FAST's, in lower case, where
    "Action: " begins the answer; lerobot: the same with the case kept, and a BOS before it."""
    skip: int = PALIGEMMA_SKIP
    """The vocabulary's last entries that are not used."""
    length: int = 256
    """Largest number of tokens of an answer, with its end."""

    @classmethod
    def read(cls, config: PolicyConfig) -> FastConfig | None:
        """The checkpoint's; None without one. Raises CheckpointError for a bad value.

        π0-FAST's without an entry is LeRobot's, whose fields have other names.
        """
        document = config.raw.get(CONFIG_KEY)
        if document is None and not config.has_expert:
            document = {"prompt": "lerobot"} | {
                ours: config.raw[theirs]
                for ours, theirs in (("skip", "fast_skip_tokens"), ("length", "max_action_tokens"))
                if theirs in config.raw
            }
        if document is None:
            return None
        try:
            made = cls(**document)
            ok = made.prompt in PROMPTS and made.skip >= 0 and made.length >= 1
        except TypeError:
            ok = False
        if not ok:
            raise CheckpointError(f"config.json: {CONFIG_KEY} must not be {document!r:.200}")
        return made


class ActionLanguage:
    """Prompts and answers in a network's tokens.

    Args:
        tokenizer: of chunks.
        text: of the network's vocabulary.
        config: placement and prompt.

    Raises:
        CheckpointError: the vocabulary has no room for the action tokens.
    """

    def __init__(
        self, tokenizer: ActionTokenizer, text: PromptTokenizer, config: FastConfig
    ) -> None:
        if tokenizer.vocab_size + config.skip > text.vocab:
            raise CheckpointError(
                f"{tokenizer.vocab_size} action tokens and {config.skip} skipped ones do not fit "
                f"the network's vocabulary of {text.vocab}"
            )
        self.tokenizer, self.text, self.config = tokenizer, text, config
        self._last = text.vocab - 1 - config.skip
        self._end = text.token_ids(END)
        self.stop = {text.eos, *self._end}
        """Tokens that end an answer."""
        begin = [] if config.prompt == "pi05" else text.token_ids("Action: ")
        self.begin = [text.bos, *begin] if config.prompt == "lerobot" else begin
        """What every answer begins with."""

    def to_network(self, ids: Sequence[int]) -> list[int]:
        """Action tokens → the network's, from its last ones backwards; its own inverse."""
        return [self._last - token for token in ids]

    def prompt(self, instruction: str, state: ArrayLike) -> str:
        """The prompt's text; `state` [state_dim] is normalised."""
        if self.config.prompt == "pi05":
            return pi05_prompt(instruction, state)
        text = clean_instruction(instruction)
        text = text.lower() if self.config.prompt == "openpi" else text
        return f"Task: {text}, State: {' '.join(map(str, discretize(state)))};\n"

    def answer(self, chunk: ArrayLike) -> tuple[list[int], int]:
        """The network's tokens of a normalised chunk [horizon, dim], and its clipped symbols.

        Raises:
            ActionTokenError: it is longer than `FastConfig.length`.
        """
        encoded = self.tokenizer.encode(chunk)
        ids = [*self.begin, *self.to_network(encoded.ids), *self._end, self.text.eos]
        if len(ids) > self.config.length:
            raise ActionTokenError(
                f"a chunk needs {len(ids)} tokens, and an answer has at most {self.config.length}"
            )
        return ids, encoded.clipped

    def read(self, ids: Sequence[int], horizon: int, action_dim: int) -> NDArray[np.float64]:
        """The chunk [horizon, action_dim] of an answer's tokens, without its beginning.

        Raises:
            ActionTokenError: it is no chunk.
        """
        tokens = []
        for token in ids:
            if token in self.stop:
                break
            tokens.append(self._last - token)
        return self.tokenizer.decode(tokens, horizon, action_dim).actions


def open_action_language(
    directory: Path, config: PolicyConfig, text: PromptTokenizer
) -> ActionLanguage | None:
    """A checkpoint's; None if it predicts no action tokens.

    The folder's own action tokenizer, or the one that config.json names, from the Hugging Face
    cache.

    Raises:
        CheckpointError: a damaged one, or no action tokenizer.
    """
    fast = FastConfig.read(config)
    if fast is None:
        return None
    folder = directory / ACTION_TOKENIZER
    if not folder.is_dir():
        name = str(config.raw.get("action_tokenizer_name") or UNIVERSAL)
        cached = cached_tokenizer(name)
        if cached is None:
            raise CheckpointError(
                f"{directory} has no {ACTION_TOKENIZER}/, and {name} is not in the Hugging Face "
                f"cache: put {name}'s files into that folder"
            )
        folder = cached
    return ActionLanguage(ActionTokenizer.load(folder), text, fast)


def language_model(
    network: Pi0,
    x: Tensor,
    angles: Rotary,
    mask: Tensor | None,
    past: Sequence[KeyValue] = (),
) -> tuple[Tensor, list[KeyValue]]:
    """All layers of the language model and its final norm.

    Args:
        network: π0.5 or π0.
        x: [B, S, width] embeddings.
        angles: of their positions.
        mask: bool, broadcastable to [B, 1, S, T + S]; None where everything is seen.
        past: keys and values of T tokens before, by layer.

    Returns:
        [B, S, width], and the keys and values of all T + S tokens.
    """
    expert = network.experts.vlm
    x = x.to(expert.dtype)
    cache: list[KeyValue] = []
    for index, layer in enumerate(expert.layers):
        query, own, _ = layer.before_attention(x, angles)
        if past:
            seen = past[index]
            own = KeyValue(*(torch.cat(pair, dim=2) for pair in zip(seen, own, strict=True)))
        cache.append(own)
        x = layer.after_attention(x, attention(query, own.key, own.value, mask), None)
    return expert.final_norm(x)[0], cache


def embed(network: Pi0, tokens: Tensor) -> Tensor:
    """[B, S] tokens → [B, S, width] scaled embeddings, float32."""
    return network.embedder(tokens).float() * math.sqrt(network.config.sizes.vlm.width)


class TokenSampler:
    """Greedy decoding with a cache of keys and values, in place of a flow sampler."""

    def __init__(self, network: Pi0, language: ActionLanguage, action_dim: int) -> None:
        self._network, self._language, self._action_dim = network, language, action_dim
        self._black = not network.config.has_expert and language.config.prompt == "openpi"
        self.tokens = 0
        """Of the latest answer."""

    @torch.inference_mode()
    def sample(self, inputs: SampleInputs, mark: Mark) -> Tensor:
        """[1, H, D] normalised actions; ends the stages "vision", "prefix" and "denoise".

        Raises:
            ActionTokenError: the answer is no chunk.
        """
        network, language = self._network, self._language
        device, head_dim = network.device, network.config.sizes.vlm.head_dim
        # openpi's π0-FAST was trained on black images for absent cameras, and sees them
        shown = slice(None) if self._black else inputs.cameras
        images = inputs.images[:, shown]
        features = network.embed_images(images)
        mark("vision")
        kept = inputs.tokens.ids[inputs.tokens.mask]
        tokens = torch.from_numpy(kept)[None].to(device)
        present = torch.ones((1, images.shape[1]), dtype=torch.bool, device=device)
        there = torch.ones_like(tokens, dtype=torch.bool)
        x, valid = network.embed_prefix(features, present, tokens, there)
        count = valid.shape[1]
        positions = torch.arange(count, device=device)[None]
        hidden, cache = language_model(network, x, rotary(positions, head_dim), None)
        mark("prefix")

        def follow(token: int) -> None:
            nonlocal hidden, cache, count
            x = embed(network, torch.tensor([[token]], device=device))
            angles = rotary(torch.tensor([[count]], device=device), head_dim)
            hidden, cache = language_model(network, x, angles, None, cache)
            count += 1

        for token in language.begin:
            follow(token)
        ids: list[int] = []
        while len(ids) < language.config.length - len(language.begin):
            ids.append(int(self._next(hidden[:, -1])))
            if ids[-1] in language.stop:
                break
            follow(ids[-1])
        self.tokens = len(ids)
        chunk = language.read(ids, network.config.horizon, self._action_dim)
        actions = torch.zeros(1, network.config.horizon, network.config.max_action_dim)
        actions[0, :, : self._action_dim] = torch.from_numpy(chunk)
        mark("denoise")
        return actions

    def _next(self, hidden: Tensor) -> Tensor:
        weight = self._network.embedder.weight
        return (hidden.to(weight.dtype) @ weight.T).argmax(-1)


def with_fast(config: PolicyConfig, fast: FastConfig) -> PolicyConfig:
    """A network's configuration that names its action tokens in config.json."""
    raw: dict[str, Any] = {**config.raw, CONFIG_KEY: dict(vars(fast))}
    return replace(config, raw=raw)
