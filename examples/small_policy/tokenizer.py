"""The small network's tokenizer: byte-fallback BPE like Gemma's, with under a thousand entries.

Every merge appends one character to a known prefix of a word, so the longest known prefix is one
token. The prompt's numbers and the demo's words are single tokens with their space; other
characters are one token each or UTF-8 bytes, so no text is lost.
"""

from __future__ import annotations

import json
import math
import string
from pathlib import Path

from pi05_ros.policy.checkpoint import CAMERAS
from pi05_ros.policy.config import GemmaSize, PolicyConfig, Sizes, VisionSize


def small_config() -> PolicyConfig:
    """The small network's sizes, for three 112-pixel cameras and ALOHA's 14 joints."""
    # a multiple that suits the matrix kernels
    vocab = math.ceil(vocabulary_size() / 64) * 64
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


SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>")
"""Ids 0 to 3, as Gemma's."""

_PROMPT = ("Task:", " State:", "Action:", *(f" {number}" for number in range(-1, 256)))
_WORDS = """
a all and any arm arms away back black block blocks blue both bottom box by can center close
cube cubes don't down drop first from front gently get give go grab grasp green gripper grippers
hand hands high hold home in into it it's left lift low middle motion move near next no not
object of off on onto open orange other over pick place please point pull push put raise reach
red release return right robot rotate side slide slowly stack stand stay stop swing table take
tap that the them then this to together top touch towards turn up using wait wave with yellow
your zero
"""


def entries() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The vocabulary (token → id) and the merges, always the same."""
    characters = ["\n", " ", *sorted(string.digits + string.ascii_letters + string.punctuation)]
    tokens = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *characters]
    known = set(tokens)
    merges = []
    for text in (*_PROMPT, *(f" {word}" for word in _WORDS.split())):
        for end in range(2, len(text) + 1):
            if text[:end] not in known:
                known.add(text[:end])
                tokens.append(text[:end])
                merges.append((text[: end - 1], text[end - 1]))
    return {token: index for index, token in enumerate(tokens)}, merges


def vocabulary_size() -> int:
    """Embeddings that the network needs."""
    return len(entries()[0])


def write_tokenizer(directory: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json, which transformers' AutoTokenizer loads."""
    # imported here: only making a checkpoint needs it
    from tokenizers import AddedToken, Tokenizer, decoders, models

    vocabulary, merges = entries()
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=False)
    )
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<pad>",
        "eos_token": "<eos>",
        "bos_token": "<bos>",
        "unk_token": "<unk>",
        "padding_side": "right",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1_000_000,
    }
    text = json.dumps(settings, indent=2) + "\n"
    (directory / "tokenizer_config.json").write_text(text, encoding="utf-8")
