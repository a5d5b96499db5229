"""The YAML file of a training as dataclasses; errors name the key and the remedy."""

from __future__ import annotations

import contextlib
import difflib
import json
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import yaml

LOSSES = ("flow", "fast")
"""Losses of every training; a plug-in has others."""
TRACKERS = ("tensorboard", "wandb")
PARTS = ("vision", "projector", "embedder", "prefix", "bridge", "expert")
T = TypeVar("T")


class ConfigError(ValueError):
    """An unusable configuration; the message names the key and the remedy."""


@dataclass(frozen=True)
class DatasetConfig:
    """One LeRobot v3 dataset."""

    root: str
    """A folder, or a Hugging Face id: `owner/name` or `owner/name@revision`."""
    weight: float = 1.0
    """Relative frequency of its images, compared with one image of another dataset."""
    statistics: bool = True
    """Whether the normalisation statistics include it. Data added to a trained checkpoint should
    be excluded, or the meaning of the checkpoint's numbers changes."""


@dataclass(frozen=True)
class DataConfig:
    """Datasets and sampling."""

    datasets: tuple[DatasetConfig, ...]
    held_out: float = 0.05
    """Fraction of the episodes of each dataset that is used for validation only. A hash of an
    episode's content decides, so episodes that are added later move none."""
    rename: dict[str, str] = field(default_factory=dict)
    """The data's camera name → the checkpoint's: `{front: base_0_rgb}`."""
    rotated_images: bool = False
    """The data's images are rotated already as the checkpoint needs them, as openpi's LIBERO data
    are; otherwise the robot's `rotated_cameras` are rotated, as in inference."""
    augment: bool = False
    """openpi's random crop, rotation and colours; see `augmentation`."""
    minimum_half_range: float = 0.0
    """Lower bound of (q99 - q01) / 2 in robot units, for joints that hardly move."""
    workers: int = 0
    """Processes that prepare batches; 0 is a thread."""
    cache_gb: float = 4.0
    """Encoded images that each of them keeps in memory."""
    window_files: int = 0
    """For data larger than memory or disk: a step draws from this many image files, and the files
    of a random order take turns. 0: from all frames."""
    disk_gb: float = 0.0
    """Videos of Hugging Face data sets that are kept on the disk, each fetched when it is needed;
    use it with `window_files`. 0: all, fetched before the training."""
    task_weights: dict[str, float] = field(default_factory=dict)
    """Word of an instruction → relative frequency of frames with it; others have 1."""


@dataclass(frozen=True)
class NetworkConfig:
    """The network that the training starts from."""

    start: str = "scratch"
    """A checkpoint folder; a Hugging Face id, `owner/name` or `owner/name@revision`; "small", the
    shipped policy; or "scratch": fresh weights of the plug-in's network."""
    kind: str = ""
    """"pi05": a π0 checkpoint becomes a π0.5; see `migration`. From scratch the kind of the network
    that the plug-in makes, "pi05" or "pi0"."""
    # The sizes are for "scratch" and default to the plug-in's.
    vlm: tuple[int, ...] = ()
    """(width, depth, mlp_dim, heads, kv_heads, head_dim), as `exp`."""
    exp: tuple[int, ...] = ()
    vis: tuple[int, ...] = ()
    """(width, depth, heads, mlp_dim)."""
    image: int | None = None
    patch: int | None = None
    horizon: int | None = None


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (LoRA) in place of whole matrices."""

    rank: int = 16
    alpha: float = 16.0
    """The adapters' product is scaled by alpha / rank."""
    parts: tuple[str, ...] = ("expert",)
    """`expert` and `prefix` (the language model). Projections around the expert learn whole."""
    merge: bool = True
    """Save the whole network; false: the adapters alone, which name the start checkpoint."""


@dataclass(frozen=True)
class FastTokens:
    """Action tokens (FAST) for the loss `fast`."""

    tokenizer: str = "fit"
    """A folder of `physical-intelligence/fast`'s format, "start": the start checkpoint's, or "fit":
    learnt from the training data."""
    scale: float = 10.0
    vocab_size: int = 1024
    """Of "fit"."""
    prompt: str = "pi05"
    """pi05, openpi or lerobot; see `pi05_ros.policy.next_token.FastConfig`."""
    skip: int = 128
    """The network's last vocabulary entries that are not used: 128 in PaliGemma."""
    length: int = 256
    """Largest number of tokens of a chunk."""


@dataclass(frozen=True)
class StageConfig:
    """One stage. It starts from the averaged weights of the stage before."""

    name: str
    losses: dict[str, float]
    """Loss → weight: `flow`, `fast` and the plug-in's losses."""
    steps: int | None = None
    minutes: float | None = None
    """Instead of `steps`: time spent in steps. One process only; not exactly repeatable."""
    train: tuple[str, ...] = PARTS
    """`PARTS` that learn. `bridge` is the key and value projection of the prefix's last layer."""
    batch: int = 16
    """Frames per step, of all processes together, each with the images of all cameras."""
    accumulate: int = 1
    """Passes per step and process, which share its frames: less memory, the same result."""
    tasks_per_picture: int = 1
    """Instructions per frame, where a dataset has several."""
    samples_per_prefix: int = 1
    """Pairs of noise and time per frame and instruction; the prefix is encoded once."""
    insulate: bool = False
    """Knowledge insulation: the flow loss does not reach the language model, whose keys and values
    the expert sees as constants. Without the loss `fast` it trains the bridge, which no other loss
    does."""
    optimizer: str = "adamw"
    """"muon" for the matrices inside the transformers, AdamW for the rest."""
    lr: float = 2.5e-5
    warmup_steps: int = 0
    hold: float = 0.0
    """Fraction of the stage with the full rate, before the cosine."""
    final_lr: float = 0.1
    """Fraction of `lr` at the end of the cosine."""
    rtc_max_delay: int = 0
    """Training-time real-time chunking (arXiv 2512.05964): each chunk's first steps, 0 to this
    many, are given clean, and the loss is on the others."""
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.01
    clip: float = 1.0
    """Largest norm of the gradient."""
    ema: float = 0.99
    """Of the averaged weights, which are validated, saved and shipped; 0 in all stages: no
    averages, and no memory for them."""


@dataclass(frozen=True)
class ValidationConfig:
    """Losses on held-out episodes, with the averaged weights."""

    every_steps: int = 200
    frames: int = 256


@dataclass(frozen=True)
class SaveConfig:
    """Checkpoints beside the final one, in the folder `checkpoints` of the output."""

    every_steps: int = 0
    """0: none."""
    keep: int = 3
    """The latest ones that stay."""
    best: str = ""
    """A figure of the validation, such as `flow` or `action_error`: the checkpoint in which it is
    lowest stays as `checkpoints/best`."""


@dataclass(frozen=True)
class EvaluationConfig:
    """Closed-loop evaluation by a function."""

    function: str = ""
    """"module:function", called with the checkpoint's folder; returns name → figure."""
    every_minutes: float = 0.0
    """0: only at the end."""


@dataclass(frozen=True)
class TrainConfig:
    """One training, as its YAML file has it."""

    output: str
    data: DataConfig
    stages: tuple[StageConfig, ...]
    network: NetworkConfig = field(default_factory=NetworkConfig)
    plugin: str = ""
    """Python file or module with auxiliary losses and a network to train from scratch; see
    `plugins.Plugin`. A path is relative to the YAML file or to the working directory."""
    plugin_options: dict[str, Any] = field(default_factory=dict)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    save: SaveConfig = field(default_factory=SaveConfig)
    lora: LoraConfig | None = None
    fast: FastTokens = field(default_factory=FastTokens)
    robot: str = "aloha"
    """A name, "generic", or a YAML description, relative to this file or the working directory."""
    adapt_to_pi: bool = False
    delta_actions: bool = False
    freeze_vision_encoder: bool = False
    """LeRobot's: the vision encoder does not learn, its projector does."""
    train_expert_only: bool = False
    """LeRobot's: no part of PaliGemma learns."""
    gradient_checkpointing: bool = False
    """LeRobot's: layers are recomputed in the backward pass; less memory, more time."""
    device: str = "auto"
    precision: str = "bfloat16"
    """Of the matrix products (autocast); weights are float32."""
    optimizer_precision: str = "float32"
    """Of AdamW's two moments; bfloat16 halves their memory."""
    ema_device: str = ""
    """Device of the averaged weights: "cpu" frees the GPU's memory and slows each step."""
    save_precision: str = "bfloat16"
    accelerate: bool = False
    """Several processes or GPUs, as Hugging Face accelerate is configured: replicas, or with its
    FSDP version 2 a sharded network."""
    seed: int = 0
    threads: int = 0
    """CPU threads; 0 leaves it to PyTorch."""
    log_steps: int = 10
    checkpoint_steps: int = 200
    """Steps between two saved states, from which a killed training resumes."""
    trackers: tuple[str, ...] = ()
    """`TRACKERS` that also receive the figures."""
    note: str = ""
    """For the checkpoint's settings and model card."""

    def __post_init__(self) -> None:
        for key in ("precision", "save_precision", "optimizer_precision"):
            require_known(key, getattr(self, key), ("float32", "bfloat16"))
        require_known("fast.prompt", self.fast.prompt, ("pi05", "openpi", "lerobot"))
        require_known("ema_device", self.ema_device, ("", "cpu"))
        require_known("network.kind", self.network.kind, ("", "pi05", "pi0"))
        _require(
            self.network.kind != "pi0" or self.network.start == "scratch",
            "network.kind: a checkpoint cannot become pi0, which is for start: scratch",
        )
        for tracker in self.trackers:
            require_known("trackers", tracker, TRACKERS)
        for key, count in (
            ("log_steps", self.log_steps),
            ("checkpoint_steps", self.checkpoint_steps),
            ("validation.every_steps", self.validation.every_steps),
            ("save.keep", self.save.keep),
        ):
            _require(count >= 1, f"{key} must be at least 1, not {count}")
        _require(bool(self.data.datasets), "data.datasets: at least one is needed")
        held_out = self.data.held_out
        _require(0 <= held_out < 1, f"data.held_out must be from 0 to below 1, not {held_out}")
        for key in ("workers", "cache_gb", "window_files", "disk_gb"):
            value = getattr(self.data, key)
            _require(value >= 0, f"data.{key} must be at least 0, not {value}")
        _require(bool(self.stages), "stages: at least one is needed")
        names = [stage.name for stage in self.stages]
        _require(len({*names}) == len(names), f"stages: a name repeats: {', '.join(names)}")
        for stage in self.stages:
            self._check_stage(stage)
        if self.lora is not None:
            self._check_lora(self.lora)
        losses = {name for stage in self.stages for name, w in stage.losses.items() if w > 0}
        _require(
            self.fast.prompt == "pi05" or not losses.issuperset(LOSSES),
            f"fast.prompt: {self.fast.prompt} is for the loss fast alone: the flow head reads "
            "π0.5's prompt",
        )

    def _check_lora(self, lora: LoraConfig) -> None:
        for part in lora.parts:
            require_known("lora.parts", part, ("expert", "prefix"))
        _require(bool(lora.parts), "lora.parts: at least one is needed")
        _require(lora.rank >= 1 and lora.alpha > 0, "lora: rank and alpha must be above 0")
        _require(
            lora.merge or self.network.start != "scratch",
            "lora.merge: false saves the adapters of a start checkpoint; scratch has none",
        )
        _require(
            lora.merge or not self.network.kind,
            "lora.merge: false cannot name a start that network.kind changed: use merge: true",
        )

    def _check_stage(self, stage: StageConfig) -> None:
        where = f"stage {stage.name!r}"
        for loss in stage.losses:
            _require(
                loss in LOSSES or bool(self.plugin),
                f"{where}: losses: {loss!r} is unknown; known: {', '.join(LOSSES)}. Others come "
                "from a plug-in: set plugin, as in examples/small_policy/train_small.yaml",
            )
        compact = self.optimizer_precision == "bfloat16"
        _require(
            not compact or max(stage.betas) <= 0.98,
            f"{where}: betas must be at most 0.98 with optimizer_precision: bfloat16, whose "
            "rounding would stop slower averages",
        )
        positive = any(weight > 0 for weight in stage.losses.values())
        _require(positive, f"{where}: losses needs a weight above 0")
        for part in stage.train:
            require_known(f"{where}: train", part, PARTS)
        require_known(f"{where}: optimizer", stage.optimizer, ("adamw", "muon"))
        one = (stage.steps is None) != (stage.minutes is None)
        _require(one, f"{where}: give either steps or minutes")
        repeatable = stage.minutes is None or not self.accelerate
        _require(repeatable, f"{where}: with accelerate give steps, the processes' clocks differ")
        for key in ("batch", "accumulate", "tasks_per_picture", "samples_per_prefix"):
            _require(getattr(stage, key) >= 1, f"{where}: {key} must be at least 1")
        _require(
            stage.batch % stage.accumulate == 0,
            f"{where}: batch {stage.batch} cannot be divided into accumulate {stage.accumulate}",
        )
        _require(stage.rtc_max_delay >= 0, f"{where}: rtc_max_delay must be at least 0")
        for key in ("lr", "clip"):
            _require(getattr(stage, key) > 0, f"{where}: {key} must be above 0")
        for key in ("hold", "final_lr", "ema"):
            _require(0 <= getattr(stage, key) <= 1, f"{where}: {key} must be from 0 to 1")

    def to_dict(self) -> dict[str, Any]:
        """Mappings, lists and plain values, as YAML and JSON hold them."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return plain


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def require_known(where: str, value: str, known: tuple[str, ...]) -> None:
    _require(value in known, f"{where}: {value!r} is unknown; known: {', '.join(known)}")


def read_config(path: str | Path, changes: Sequence[str] = ()) -> TrainConfig:
    """Read a training's YAML file.

    `changes` replace values of the file: `stages.0.lr=1e-4`, the value in YAML.

    Raises:
        ConfigError: the file is missing or not YAML; an unknown or missing key; a wrong type.
    """
    file = Path(path)
    try:
        document = yaml.safe_load(file.read_text(encoding="utf-8"))
        for change in changes:
            _set_value(document, change)
        config = parse_config(document)
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{file} is not valid YAML: {error}") from None
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None
    for key in ("plugin", "robot"):
        beside = file.parent / getattr(config, key)
        if beside.is_file():
            changed: dict[str, Any] = {key: str(beside)}
            config = replace(config, **changed)
    return config


def _set_value(document: Any, change: str) -> None:
    """Apply `key.key=value` to a YAML document; the parser then checks key and value."""
    path, equals, text = change.partition("=")
    *parents, last = (int(key) if key.isdigit() else key for key in path.split("."))
    try:
        value = yaml.safe_load(text)
        for key in parents:
            document = document.setdefault(key, {}) if isinstance(key, str) else document[key]
        if not equals or isinstance(document, dict) == isinstance(last, int):
            raise KeyError(last)
        document[last] = value
    except (yaml.YAMLError, AttributeError, LookupError, TypeError):
        raise ConfigError(
            f"--set {change}: expected KEY=VALUE with the key of a value, as stages.0.lr=1e-4"
        ) from None


def parse_config(document: object) -> TrainConfig:
    """A TrainConfig from YAML's mappings and lists.

    Raises:
        ConfigError: an unknown or missing key, a value of the wrong type; with the key's path.
    """
    if isinstance(document, Mapping) and "helpers" in document:
        raise ConfigError(
            "helpers is now plugin_options, of the plug-in that brings these losses: "
            "plugin: examples/small_policy/losses.py"
        )
    if isinstance(document, Mapping) and "tensorboard" in document:  # of earlier versions
        document = dict(document)
        if document.pop("tensorboard"):
            document["trackers"] = ["tensorboard"]
    return parse_dataclass(TrainConfig, document, "")


def parse_dataclass(kind: type[T], document: object, where: str) -> T:
    """A dataclass from YAML's mappings and lists; `where` is the path for messages.

    Raises:
        ConfigError: see `parse_config`.
    """
    if not isinstance(document, Mapping):
        raise ConfigError(f"{where or 'the file'} must be a mapping, not {document!r}")
    hints = typing.get_type_hints(kind)
    known = {f.name: f for f in fields(kind)}  # type: ignore[arg-type]
    prefix = f"{where}." if where else ""
    for key in document:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
            raise ConfigError(f"unknown key {prefix}{key}; {hint}")
    for name, entry in known.items():
        optional = entry.default is not MISSING or entry.default_factory is not MISSING
        _require(optional or name in document, f"{prefix}{name} is missing")
    return kind(**{key: _parse(hints[key], value, prefix + key) for key, value in document.items()})


def _parse(kind: Any, value: object, where: str) -> Any:
    if kind is Any:
        return value
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return None if value is None else _parse(arguments[0], value, where)
    if is_dataclass(kind):
        return parse_dataclass(typing.cast("type[Any]", kind), value, where)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{where} must be a list, not {value!r}")
        if arguments[-1] is Ellipsis:
            arguments = arguments[:1] * len(value)
        count = len(arguments)
        _require(count == len(value), f"{where} must have {count} entries, not {len(value)}")
        kinds = enumerate(zip(arguments, value, strict=True))
        return tuple(_parse(each, entry, f"{where}[{index}]") for index, (each, entry) in kinds)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where} must be a mapping, not {value!r}")
        return {str(k): _parse(arguments[1], v, f"{where}.{k}") for k, v in value.items()}
    if kind is float and isinstance(value, str):
        # YAML 1.1 reads 1e-3, without a dot, as text
        with contextlib.suppress(ValueError):
            return float(value)
    allowed = (int, float) if kind is float else kind
    if not isinstance(value, allowed) or (isinstance(value, bool) and kind is not bool):
        raise ConfigError(f"{where} must be {_NAMES[kind]}, not {value!r}")
    return kind(value)


_NAMES = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
