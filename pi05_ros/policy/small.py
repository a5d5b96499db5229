"""The small network that comes with the package: π0.5 with 4 million parameters.

Every part and file is that of a full checkpoint; only the sizes are small. It was trained by
`pi05 train config/train_small.yaml` on demonstrations in the simulator; its model card is beside
its weights.
"""

from __future__ import annotations

import math
from pathlib import Path

from pi05_ros.policy import small_tokenizer
from pi05_ros.policy.config import GemmaSize, PolicyConfig, Sizes, VisionSize

SMALL = "small"
"""The name that `Policy.from_pretrained` takes for this checkpoint."""
SHIPPED = Path(__file__).resolve().parents[1] / "checkpoints" / "small_aloha"

CAMERAS = ("cam_high", "cam_left_wrist", "cam_right_wrist")


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
