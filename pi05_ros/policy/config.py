"""config.json of a checkpoint: kind, sizes, horizon, cameras, dimensions.

Sources: LeRobot 0.6.1 `PI05Config`, `PI0Config` and `PI0FastConfig`; openpi's
`convert_jax_model_to_pytorch.py` (the five fields that it writes) and `gemma.get_config`. The key
`sizes` is specific to this package: LeRobot's fields cannot express a small network.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pi05_ros.policy.weights import (
    CheckpointError,
    find_weights,
    kind_from_tensors,
    read_json,
    require_directory,
    tensor_index,
)

NAMES = {"pi05": "π0.5", "pi0": "π0", "pi0_fast": "π0-FAST"}
"""Kind → the name that people know."""
OPENPI_FIELDS = ("action_dim", "action_horizon", "precision")
FLOAT_FIELDS = {
    "min_period": "min_period",
    "max_period": "max_period",
    "time_alpha": "time_sampling_beta_alpha",
    "time_beta": "time_sampling_beta_beta",
    "time_scale": "time_sampling_scale",
    "time_offset": "time_sampling_offset",
}
"""Field of `PolicyConfig` → field of LeRobot's config.json."""
CONFIG_FILE = "config.json"
IMAGE_PREFIX = "observation.images."
DEFAULT_CAMERAS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
DEFAULT_TOKEN_LENGTH = {"pi05": 200, "pi0": 48, "pi0_fast": 200}
DEFAULT_NORMALIZATION = {
    "pi05": {"VISUAL": "IDENTITY", "STATE": "QUANTILES", "ACTION": "QUANTILES"},
    "pi0": {"VISUAL": "IDENTITY", "STATE": "MEAN_STD", "ACTION": "MEAN_STD"},
    "pi0_fast": {"VISUAL": "IDENTITY", "STATE": "MEAN_STD", "ACTION": "MEAN_STD"},
}


@dataclass(frozen=True)
class GemmaSize:
    """One language expert, in the order of `sizes.vlm` and `sizes.exp`."""

    width: int
    depth: int
    mlp_dim: int
    heads: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class VisionSize:
    """The vision encoder, in the order of `sizes.vis`."""

    width: int
    depth: int
    heads: int
    mlp_dim: int


GEMMA_VARIANTS = {
    "gemma_2b": GemmaSize(2048, 18, 16_384, 8, 1, 256),
    "gemma_300m": GemmaSize(1024, 18, 4_096, 8, 1, 256),
    "dummy": GemmaSize(64, 4, 128, 8, 1, 16),
}
SO400M = VisionSize(1152, 27, 16, 4304)


@dataclass(frozen=True)
class Sizes:
    """The sizes that determine the shapes of all tensors. The defaults are π0.5's."""

    vlm: GemmaSize = GEMMA_VARIANTS["gemma_2b"]
    exp: GemmaSize = GEMMA_VARIANTS["gemma_300m"]
    vis: VisionSize = SO400M
    vocab: int = 257_152
    image: int = 224
    """Side of the square input image, in pixels."""
    patch: int = 14

    def __post_init__(self) -> None:
        shared = ("depth", "heads", "kv_heads", "head_dim")
        if any(getattr(self.vlm, name) != getattr(self.exp, name) for name in shared):
            raise ValueError(f"vlm and exp attend jointly and must agree in {shared}: {self}")
        if self.vlm.heads % self.vlm.kv_heads or self.vlm.head_dim % 2:
            raise ValueError(f"heads must be a multiple of kv_heads, head_dim even: {self.vlm}")
        if self.vis.width % self.vis.heads:
            heads = self.vis.heads
            raise ValueError(f"vis width {self.vis.width} does not divide by {heads} heads")
        if self.image % self.patch:
            raise ValueError(f"image side {self.image} does not divide by patch {self.patch}")
        if self.exp.width % 2:
            raise ValueError(f"exp width {self.exp.width} is odd; the time embedding needs halves")

    @property
    def image_tokens(self) -> int:
        """Tokens of one camera: 256 for 224-pixel images in 14-pixel patches."""
        return (self.image // self.patch) ** 2


@dataclass(frozen=True)
class PolicyConfig:
    """A π0.5, π0 or π0-FAST policy as its config.json describes it.

    The defaults are π0.5's; `parse_config({}, "pi0")` gives π0's.
    """

    kind: str = "pi05"
    sizes: Sizes = field(default_factory=Sizes)
    horizon: int = 50
    max_action_dim: int = 32
    max_state_dim: int = 32
    token_length: int = 200
    cameras: tuple[str, ...] = DEFAULT_CAMERAS
    """Names in the order of the prefix, without LeRobot's `empty_camera_` features."""
    state_dim: int | None = None
    action_dim: int | None = None
    num_steps: int = 10
    normalization_mapping: Mapping[str, str] = field(
        default_factory=lambda: dict(DEFAULT_NORMALIZATION["pi05"])
    )
    """Feature type (VISUAL, STATE, ACTION) → IDENTITY, QUANTILES, MEAN_STD, …"""
    min_period: float = 0.004
    max_period: float = 4.0
    time_alpha: float = 1.5
    time_beta: float = 1.0
    time_scale: float = 0.999
    time_offset: float = 0.001
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)
    """The fields of config.json, so that `to_json` keeps those that are not used here."""

    def __post_init__(self) -> None:
        if self.kind not in NAMES:
            raise ValueError(f"kind must be one of {tuple(NAMES)}, not {self.kind!r}")

    @property
    def name(self) -> str:
        """The policy's name for messages."""
        return NAMES[self.kind]

    @property
    def has_expert(self) -> bool:
        """Whether an action expert predicts the actions; π0-FAST is a language model alone."""
        return self.kind != "pi0_fast"

    @property
    def has_state_prompt(self) -> bool:
        """Whether the prompt is made for the state; π0 has a projection of it."""
        return self.kind != "pi0"

    @property
    def image_size(self) -> int:
        return self.sizes.image

    def to_json(self) -> dict[str, Any]:
        """LeRobot's fields, and `sizes` only for a network that those cannot express."""
        image = {"type": "VISUAL", "shape": [3, self.image_size, self.image_size]}
        inputs: dict[str, Any] = {IMAGE_PREFIX + name: image for name in self.cameras}
        if self.state_dim is not None:
            inputs["observation.state"] = {"type": "STATE", "shape": [self.state_dim]}
        outputs = {}
        if self.action_dim is not None:
            outputs["action"] = {"type": "ACTION", "shape": [self.action_dim]}
        document = {key: value for key, value in self.raw.items() if key not in OPENPI_FIELDS}
        document.pop("sizes", None)
        executed = _int(self.raw, "n_action_steps", self.horizon)
        document |= {
            "type": self.kind,
            "input_features": inputs,
            "output_features": outputs,
            "chunk_size": self.horizon,
            "n_action_steps": min(executed, self.horizon),
            "max_state_dim": self.max_state_dim,
            "max_action_dim": self.max_action_dim,
            "num_inference_steps": self.num_steps,
            "image_resolution": [self.image_size, self.image_size],
            "empty_cameras": 0,
            "tokenizer_max_length": self.token_length,
            "normalization_mapping": dict(self.normalization_mapping),
            **{theirs: getattr(self, ours) for ours, theirs in FLOAT_FIELDS.items()},
        }
        if self.sizes != Sizes():
            document["sizes"] = {
                "vlm": list(vars(self.sizes.vlm).values()),
                "exp": list(vars(self.sizes.exp).values()),
                "vis": list(vars(self.sizes.vis).values()),
                "vocab": self.sizes.vocab,
                "chunk": self.horizon,
                "toklen": self.token_length,
                "image": self.sizes.image,
                "patch": self.sizes.patch,
            }
        return document


def read_config(directory: str | Path) -> PolicyConfig:
    """Read a checkpoint folder's config.json, LeRobot's or openpi's; unknown fields are ignored.

    If the folder has weights, their tensors decide on the kind, not the field `type`.

    Raises:
        CheckpointError: no folder, no or bad config.json, or none of `NAMES`.
    """
    path = require_directory(directory)
    weights = find_weights(path)
    document = read_json(path / CONFIG_FILE)
    kind = kind_from_tensors(tensor_index(path)) if weights else document.get("type")
    if kind not in NAMES:
        raise CheckpointError(
            f"{path} is not π0.5, π0 or π0-FAST: type {document.get('type')!r} in {CONFIG_FILE}, "
            "and no tensor time_mlp_in (π0.5) or state_proj (π0), nor PaliGemma's alone (π0-FAST)"
        )
    try:
        return parse_config(document, kind)
    except (TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{path / CONFIG_FILE}: {error}") from None


def foreign_type(directory: str | Path) -> str | None:
    """The type of a LeRobot policy that is none of `NAMES`; None for those, and for no policy."""
    file = require_directory(directory) / CONFIG_FILE
    kind = read_json(file).get("type") if file.is_file() else None
    return kind if isinstance(kind, str) and kind not in NAMES else None


def parse_config(document: Mapping[str, Any], kind: str) -> PolicyConfig:
    """A PolicyConfig from config.json's fields; missing ones get the kind's default.

    Raises:
        ValueError, TypeError: a field of the wrong type or value, named in the message.
    """
    small = _mapping(document, "sizes")
    inputs = _mapping(document, "input_features")
    outputs = _mapping(document, "output_features")
    cameras = tuple(
        name.removeprefix(IMAGE_PREFIX)
        for name, feature in inputs.items()
        if isinstance(feature, Mapping)
        and feature.get("type") == "VISUAL"
        and not name.startswith(IMAGE_PREFIX + "empty_camera_")
    )
    horizon = _horizon(document, small)
    token_length = _int(document, "tokenizer_max_length", DEFAULT_TOKEN_LENGTH[kind])
    action_dim = _int(document, "action_dim", _int(document, "max_action_dim", 32))
    return PolicyConfig(
        kind=kind,
        sizes=_sizes(document, small),
        horizon=horizon,
        max_action_dim=action_dim,
        max_state_dim=_int(document, "max_state_dim", action_dim),
        token_length=_int(small, "toklen", token_length),
        cameras=cameras or DEFAULT_CAMERAS,
        state_dim=_feature_dim(inputs, "observation.state"),
        action_dim=_feature_dim(outputs, "action"),
        num_steps=_int(document, "num_inference_steps", 10),
        normalization_mapping=DEFAULT_NORMALIZATION[kind]
        | {str(k): str(v) for k, v in _mapping(document, "normalization_mapping").items()},
        raw=dict(document),
        **{
            ours: _float(document, theirs, getattr(PolicyConfig, ours))
            for ours, theirs in FLOAT_FIELDS.items()
        },
    )


def _horizon(document: Mapping[str, Any], small: Mapping[str, Any]) -> int:
    fields = {"sizes.chunk": small.get("chunk")}
    fields |= {key: document.get(key) for key in ("action_horizon", "chunk_size")}
    given = {key: _positive(value, key) for key, value in fields.items() if value is not None}
    if len(set(given.values())) > 1:
        raise ValueError("the horizon is " + " and ".join(f"{k} {v}" for k, v in given.items()))
    horizon = next(iter(given.values()), 50)
    executed = _int(document, "n_action_steps", horizon)
    if executed > horizon:
        raise ValueError(f"n_action_steps {executed} is above the horizon of {horizon}")
    return horizon


def _sizes(document: Mapping[str, Any], small: Mapping[str, Any]) -> Sizes:
    resolution = document.get("image_resolution") or (224, 224)
    if not isinstance(resolution, Sequence) or len(set(resolution)) != 1:
        raise ValueError(f"image_resolution must be two equal numbers, not {resolution!r}")
    return Sizes(
        vlm=_gemma_size(document, small, "vlm", "paligemma_variant", "gemma_2b"),
        exp=_gemma_size(document, small, "exp", "action_expert_variant", "gemma_300m"),
        vis=VisionSize(*_ints(small, "vis", 4)) if "vis" in small else SO400M,
        vocab=_int(small, "vocab", 257_152),
        image=_int(small, "image", _positive(resolution[0], "image_resolution")),
        patch=_int(small, "patch", 14),
    )


def _gemma_size(
    document: Mapping[str, Any], small: Mapping[str, Any], key: str, variant: str, default: str
) -> GemmaSize:
    if key in small:
        return GemmaSize(*_ints(small, key, 6))
    name = document.get(variant) or default
    # A LoRA variant has its base's sizes; unmerged adapters fail later as unexpected tensors.
    base = str(name).removesuffix("_lora")
    if base not in GEMMA_VARIANTS:
        raise ValueError(f"{variant} {name!r} is unknown; known are {sorted(GEMMA_VARIANTS)}")
    return GEMMA_VARIANTS[base]


def _mapping(document: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = document.get(key)
    if not isinstance(value, (Mapping, type(None))):
        raise TypeError(f"{key} must be an object, not {value!r}")
    return value or {}


def _positive(value: object, key: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise TypeError(f"{key} must be a positive whole number, not {value!r}")
    return value


def _int(document: Mapping[str, Any], key: str, default: int) -> int:
    value = document.get(key)
    return default if value is None else _positive(value, key)


def _ints(document: Mapping[str, Any], key: str, count: int) -> list[int]:
    values = document[key]
    if not isinstance(values, Sequence) or isinstance(values, str) or len(values) != count:
        raise ValueError(f"sizes.{key} must be {count} numbers, not {values!r}")
    return [_positive(value, f"sizes.{key}") for value in values]


def _float(document: Mapping[str, Any], key: str, default: float) -> float:
    value = document.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float, type(None))):
        raise TypeError(f"{key} must be a number, not {value!r}")
    return default if value is None else float(value)


def _feature_dim(features: Mapping[str, Any], name: str) -> int | None:
    shape = _mapping(features, name).get("shape")
    if shape is None:
        return None
    if not isinstance(shape, Sequence) or len(shape) != 1:
        raise ValueError(f"feature {name!r} must have one dimension, not shape {shape!r}")
    return _positive(shape[0], f"feature {name!r}")
