"""Scaling of states and actions, and the processing files of a checkpoint folder.

Sources: LeRobot 0.6.1 `processor/normalize_processor.py`, and `policy_preprocessor.json` and
`policy_postprocessor.json` as `make_pi05_pre_post_processors` writes them; openpi `transforms.py`
(Normalize, Unnormalize) and `normalize.py` (norm_stats.json). Neither clips in either direction.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from pi05_ros.policy.config import IMAGE_PREFIX, PolicyConfig
from pi05_ros.policy.weights import CheckpointError, read_json, require_regular_file

Convention = Literal["lerobot", "openpi"]
"""The code base whose formulas a checkpoint was trained with."""

EPS = {"lerobot": 1e-8, "openpi": 1e-6}
STATE, ACTION = "observation.state", "action"
PREPROCESSOR, POSTPROCESSOR = "policy_preprocessor", "policy_postprocessor"
NORM_STATS = "norm_stats.json"
PALIGEMMA = "google/paligemma-3b-pt-224"
STATE_PROMPT_STEP = "pi05_prepare_state_tokenizer_processor_step"
FAST_PROMPT_STEP = "pi0_fast_prepare_state_tokenizer_processor_step"
# LeRobot 0.5 named the relative step delta_actions_processor.
RELATIVE_STEPS = ("relative_actions_processor", "delta_actions_processor")
KNOWN_STEPS = {
    "rename_observations_processor",
    "to_batch_processor",
    *RELATIVE_STEPS,
    "normalizer_processor",
    STATE_PROMPT_STEP,
    FAST_PROMPT_STEP,
    "pi0_new_line_processor",
    "tokenizer_processor",
    # of actions, in training alone
    "action_tokenizer_processor",
    "device_processor",
    "unnormalizer_processor",
    "absolute_actions_processor",
}

Statistics = Mapping[str, Mapping[str, ArrayLike | None]]
"""Feature → statistic → values [dim]."""
Steps = Mapping[str, Mapping[str, Any]]
"""A pipeline's step entries by their registry names."""


class Mode(str, Enum):
    """A scaling, as named in LeRobot's `normalization_mapping`."""

    IDENTITY = "IDENTITY"
    MEAN_STD = "MEAN_STD"
    MIN_MAX = "MIN_MAX"
    QUANTILES = "QUANTILES"
    QUANTILE10 = "QUANTILE10"


STATISTICS = {
    Mode.IDENTITY: (),
    Mode.MEAN_STD: ("mean", "std"),
    Mode.MIN_MAX: ("min", "max"),
    Mode.QUANTILES: ("q01", "q99"),
    Mode.QUANTILE10: ("q10", "q90"),
}
"""Mode → the two statistics that it needs."""


class Normalizer:
    """One feature's scaling between robot units and the network's.

    MEAN_STD maps mean ± std to 0 ± 1. The other modes map their lower and upper statistic, `lo`
    and `hi`, to -1 and 1:

    ========  ==========================================  =====================================
    ..        lerobot, float32                            openpi, float64
    ========  ==========================================  =====================================
    range     2 (x - lo) / d - 1, d = hi - lo, or eps     the same with d = hi - lo + 1e-6
              where that is 0
    MEAN_STD  (x - mean) / (std + eps), y·std + mean      (x - mean) / (std + 1e-6) and back
    ========  ==========================================  =====================================
    """

    def __init__(
        self,
        feature: str,
        mode: Mode | str,
        statistics: Mapping[str, ArrayLike | None],
        dim: int,
        convention: Convention = "lerobot",
        eps: float | None = None,
    ) -> None:
        """Take the first `dim` values of each statistic that `mode` needs.

        Args:
            feature: name for messages, for example "observation.state".
            mode: the scaling.
            statistics: name ("q01", "mean", …) → values [dim]. openpi's may have more values than
                the robot and are cut; LeRobot's have exactly `dim` values.
            dim: the robot's dimensions.
            convention: the formulas.
            eps: LeRobot's `eps`, if a file changes the default.

        Raises:
            CheckpointError: a statistic is missing, of the wrong length, not finite, or its upper
                value is below the lower one; the message names the feature and the dimension.
        """
        try:
            self.mode = Mode(mode)
        except ValueError:
            known = ", ".join(m.value for m in Mode)
            raise CheckpointError(f"{feature}: unknown mode {mode!r}; known: {known}") from None
        self.feature = feature
        self.dim = dim
        self.convention = convention
        self._dtype: Any = np.float32 if convention == "lerobot" else np.float64
        self._eps = self._dtype(EPS[convention] if eps is None else eps)
        self.statistics: dict[str, NDArray[Any]] = {
            name: self._read(name, statistics) for name in STATISTICS[self.mode]
        }
        """The statistics in use: name → values [dim]."""
        if self.mode is Mode.MEAN_STD:
            self._set_mean_std(*self.statistics.values())
        elif self.statistics:
            self._set_range(*self.statistics.values())

    def _read(self, name: str, statistics: Mapping[str, ArrayLike | None]) -> NDArray[Any]:
        value = statistics.get(name)
        if value is None:
            have = ", ".join(sorted(k for k, v in statistics.items() if v is not None)) or "none"
            raise CheckpointError(
                f"{self.feature} has no {name}, which {self.mode.value} needs (there: {have}): "
                "compute the statistics of the data that the checkpoint was trained on"
            )
        try:
            array = np.asarray(value, dtype=np.float64)
        except (TypeError, ValueError, OverflowError):
            raise CheckpointError(f"{self.feature}.{name} must be a list of numbers") from None
        exact = self.convention == "lerobot"
        if array.ndim != 1 or len(array) < self.dim or (exact and len(array) > self.dim):
            wanted = f"{self.dim} values" if exact else f"at least {self.dim}"
            raise CheckpointError(
                f"{self.feature}.{name} has shape {list(array.shape)}, the robot needs {wanted}"
            )
        with np.errstate(over="ignore"):  # values beyond float32's range become infinite
            array = array[: self.dim].astype(self._dtype)
        for i in np.flatnonzero(~np.isfinite(array)):
            raise CheckpointError(f"{self.feature}.{name}[{i}] is {array[i]}")
        return array

    def _set_mean_std(self, mean: NDArray[Any], std: NDArray[Any]) -> None:
        for i in np.flatnonzero(std < 0):
            raise CheckpointError(f"{self.feature}.std[{i}] is negative: {std[i]}")
        self._offset, self._divisor = mean, std + self._eps
        self._factor = std if self.convention == "lerobot" else self._divisor

    def _set_range(self, lower: NDArray[Any], upper: NDArray[Any]) -> None:
        low, high = STATISTICS[self.mode]
        for i in np.flatnonzero(upper < lower):
            raise CheckpointError(
                f"{self.feature}.{high}[{i}] = {upper[i]} is below {low}[{i}] = {lower[i]}"
            )
        with np.errstate(over="ignore"):
            width = upper - lower
        for i in np.flatnonzero(~np.isfinite(width)):
            raise CheckpointError(f"{self.feature}: {low}[{i}] and {high}[{i}] are too far apart")
        if self.convention == "lerobot":
            width = np.where(width == 0, self._eps, width)
        else:
            width = width + self._eps
        self._offset, self._divisor, self._factor = lower, width, width

    @property
    def widths(self) -> NDArray[Any]:
        """[dim]: distance in robot units between the values of -1 and 1; empty for IDENTITY."""
        if not self.statistics:
            return np.zeros(0)
        first, second = (array.astype(np.float64) for array in self.statistics.values())
        return 2 * second if self.mode is Mode.MEAN_STD else second - first

    def normalize(self, x: ArrayLike) -> NDArray[Any]:
        """[..., dim] in robot units → the same shape in the network's."""
        x = self._checked(x)
        if self.mode is Mode.IDENTITY:
            return x
        scaled = (x - self._offset) / self._divisor
        return scaled if self.mode is Mode.MEAN_STD else 2 * scaled - 1

    def unnormalize(self, y: ArrayLike) -> NDArray[Any]:
        """[..., dim] in the network's units → the same shape in the robot's, not clipped."""
        y = self._checked(y)
        if self.mode is Mode.IDENTITY:
            return y
        scaled = y if self.mode is Mode.MEAN_STD else (y + 1) / 2
        return scaled * self._factor + self._offset

    def _checked(self, x: ArrayLike) -> NDArray[Any]:
        array = np.asarray(x, dtype=self._dtype)
        if array.ndim == 0 or array.shape[-1] != self.dim:
            raise ValueError(
                f"{self.feature} needs {self.dim} values in its last axis, "
                f"got shape {list(array.shape)}"
            )
        return array


@dataclass(frozen=True)
class Processing:
    """The processing between the robot's numbers and the network's."""

    convention: Convention
    state: Normalizer
    action: Normalizer
    rename: Mapping[str, str] = field(default_factory=dict)
    """Camera name in the data → in the checkpoint, from LeRobot's rename step."""
    delta_mask: tuple[bool, ...] | None = None
    """LeRobot's relative actions: dimensions relative to the state. None: the robot's apply."""
    state_in_prompt: bool | None = None
    """Whether π0.5's prompt has the state; None: not stated, as in openpi's files."""
    tokenizer: str = PALIGEMMA
    """Hugging Face id of the tokenizer."""


def convention_of(directory: Path) -> Convention:
    """The code base whose processing files the folder has.

    Raises:
        CheckpointError: neither LeRobot's nor openpi's.
    """
    if (directory / f"{PREPROCESSOR}.json").is_file():
        return "lerobot"
    if _norm_stats_files(directory):
        return "openpi"
    raise CheckpointError(
        f"{directory} has no normalisation statistics: neither {PREPROCESSOR}.json (LeRobot) nor "
        f"assets/<name>/{NORM_STATS} (openpi)"
    )


def read_processing(
    directory: Path, config: PolicyConfig, state_dim: int, action_dim: int
) -> Processing:
    """Read the folder's statistics and steps for a robot of these dimensions.

    Raises:
        CheckpointError: files or statistics are missing, damaged or do not fit, or the pipeline
            has a step whose effect is unknown here.
    """
    if convention_of(directory) == "lerobot":
        return _read_lerobot(directory, config, state_dim, action_dim)
    return _read_openpi(directory, config, state_dim, action_dim)


def _norm_stats_files(directory: Path) -> list[Path]:
    plain = directory / NORM_STATS
    # An asset's name may have a slash, such as physical-intelligence/libero.
    return [plain] if plain.is_file() else sorted((directory / "assets").rglob(NORM_STATS))


def _read_openpi(
    directory: Path, config: PolicyConfig, state_dim: int, action_dim: int
) -> Processing:
    files = _norm_stats_files(directory)
    if len(files) > 1:
        names = ", ".join(str(file.parent.relative_to(directory)) for file in files)
        raise CheckpointError(
            f"{directory} has several {NORM_STATS} ({names}): keep the robot's one"
        )
    document = read_json(files[0])
    stats = document.get("norm_stats", document)
    mode = Mode.MEAN_STD if config.kind == "pi0" else Mode.QUANTILES
    parts = []
    for feature, dim in (("state", state_dim), ("actions", action_dim)):
        if not isinstance(stats, dict) or not isinstance(stats.get(feature), dict):
            raise CheckpointError(f"{files[0]} has no {feature!r}")
        parts.append(Normalizer(feature, mode, stats[feature], dim, "openpi"))
    return Processing("openpi", parts[0], parts[1])


def _read_lerobot(
    directory: Path, config: PolicyConfig, state_dim: int, action_dim: int
) -> Processing:
    before = _read_steps(directory / f"{PREPROCESSOR}.json")
    after = _read_steps(directory / f"{POSTPROCESSOR}.json")
    rename = _names(_settings(before, "rename_observations_processor"), "rename_map")
    return Processing(
        "lerobot",
        _lerobot_normalizer(directory, before, "normalizer_processor", STATE, state_dim, config),
        _lerobot_normalizer(directory, after, "unnormalizer_processor", ACTION, action_dim, config),
        rename={
            old.removeprefix(IMAGE_PREFIX): new.removeprefix(IMAGE_PREFIX)
            for old, new in rename.items()
            if old.startswith(IMAGE_PREFIX)
        },
        delta_mask=_relative_mask(before, action_dim),
        state_in_prompt=STATE_PROMPT_STEP in before or FAST_PROMPT_STEP in before,
        tokenizer=tokenizer_name(directory),
    )


def _read_steps(path: Path) -> Steps:
    steps = read_json(path).get("steps")
    if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
        raise CheckpointError(f"{path} has no list of steps")
    named = {str(step.get("registry_name") or step.get("class")): step for step in steps}
    for name in sorted(set(named) - KNOWN_STEPS):
        raise CheckpointError(
            f"{path}: step {name!r} is not known here; leaving it out would change the data"
        )
    return named


def _settings(steps: Steps, step: str) -> Mapping[str, Any]:
    """A step's config; empty without the step."""
    settings = steps.get(step, {}).get("config") or {}
    if not isinstance(settings, Mapping):
        raise CheckpointError(f"{step}: config must be an object, not {settings!r:.100}")
    return settings


def tokenizer_name(directory: Path) -> str:
    """The Hugging Face id of a checkpoint's tokenizer; PaliGemma's where none is named."""
    file = directory / f"{PREPROCESSOR}.json"
    steps = _read_steps(file) if file.is_file() else {}
    return str(_settings(steps, "tokenizer_processor").get("tokenizer_name") or PALIGEMMA)


def _names(settings: Mapping[str, Any], key: str) -> dict[str, str]:
    names = settings.get(key) or {}
    if not isinstance(names, Mapping) or not all(isinstance(v, str) for v in names.values()):
        raise CheckpointError(f"{key} must map names to names, not {names!r:.100}")
    return dict(names)


def _words(settings: Mapping[str, Any], key: str) -> list[str]:
    words = settings.get(key) or []
    if not isinstance(words, list):
        raise CheckpointError(f"{key} must be a list of names, not {words!r:.100}")
    return [str(word).lower() for word in words]


def _lerobot_normalizer(
    directory: Path, steps: Steps, step_name: str, feature: str, dim: int, config: PolicyConfig
) -> Normalizer:
    if step_name not in steps:
        raise CheckpointError(f"{directory}: the processor files have no step {step_name!r}")
    settings = _settings(steps, step_name)
    modes = {**config.normalization_mapping, **_names(settings, "norm_map")}
    if modes.get("VISUAL", "IDENTITY") != "IDENTITY":
        raise CheckpointError(
            f"{directory}: {step_name} scales images by {modes['VISUAL']}; π0 and π0.5 take "
            "IDENTITY"
        )
    eps = settings.get("eps", EPS["lerobot"])
    if not isinstance(eps, (int, float)) or not 0 <= eps < 1:
        raise CheckpointError(f"eps must be a number from 0 to 1, not {eps!r:.100}")
    mode = modes["STATE" if feature == STATE else "ACTION"]
    statistics: dict[str, NDArray[Any]] = {}
    if mode != "IDENTITY":
        tensors = _read_state_file(directory, steps[step_name].get("state_file"), step_name)
        prefix = f"{feature}."
        statistics = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    return Normalizer(feature, mode, statistics, dim, "lerobot", float(eps))


def _read_state_file(directory: Path, name: object, step_name: str) -> dict[str, NDArray[Any]]:
    if name is None:
        raise CheckpointError(
            f"{directory}: {step_name} has no state_file: the checkpoint has no normalisation "
            "statistics, as a base model has none. Fine-tune it, or add those of your data"
        )
    if not isinstance(name, str) or Path(name).name != name:
        raise CheckpointError(f"{directory}: state_file {name!r} of {step_name} is no file name")
    require_regular_file(directory / name)
    try:
        return load_file(directory / name)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{directory / name} cannot be read: {error}") from None


def _relative_mask(steps: Steps, action_dim: int) -> tuple[bool, ...] | None:
    """LeRobot's rule: relative unless the joint's name contains an excluded word."""
    step = next((name for name in RELATIVE_STEPS if name in steps), "")
    settings = _settings(steps, step)
    if not settings.get("enabled", False):
        return None
    words = _words(settings, "exclude_joints")
    names = _words(settings, "action_names")[:action_dim]
    mask = [not any(word in name for word in words) for name in names]
    return tuple(mask + [True] * (action_dim - len(mask)))


def write_processing(
    directory: Path,
    config: PolicyConfig,
    statistics: Statistics,
    tokenizer: str = PALIGEMMA,
    rename: Mapping[str, str] | None = None,
    delta_mask: Sequence[bool] | None = None,
) -> None:
    """Write LeRobot's two pipelines and their statistics, as LeRobot's own save does.

    Args:
        directory: an existing folder.
        config: kind, features and `normalization_mapping`.
        statistics: "observation.state" and "action" → statistic → values [dim].
        tokenizer: id or folder of LeRobot's tokenizer.
        rename: LeRobot's rename map with full feature names.
        delta_mask: which actions are relative to the state; empty: none.
    """
    if config.state_dim is None or config.action_dim is None:
        raise ValueError("state_dim and action_dim must be set to write processor files")
    document = config.to_json()
    action = document["output_features"]
    scaling = {
        "eps": EPS["lerobot"],
        "features": document["input_features"] | action,
        "norm_map": document["normalization_mapping"],
    }
    relative: dict[str, Any] = {
        "enabled": False,
        "exclude_joints": ["gripper"],
        "action_names": None,
    }
    if delta_mask:
        # Names for LeRobot's rule: a joint is absolute if its name contains an excluded word.
        kinds = ["relative" if flag else "absolute" for flag in delta_mask]
        names = [f"{kind}_{i}" for i, kind in enumerate(kinds)]
        relative = {"enabled": True, "exclude_joints": ["absolute"], "action_names": names}
    tokenize = {
        "max_length": config.token_length,
        "task_key": "task",
        "padding_side": "right",
        "padding": "max_length",
        "truncation": True,
        "tokenizer_name": tokenizer,
    }
    rename_step = {"rename_observations_processor": {"rename_map": dict(rename or {})}}
    normalize = {"relative_actions_processor": relative, "normalizer_processor": scaling}
    prompt = {"tokenizer_processor": tokenize}
    device: dict[str, Any] = {"device_processor": {"device": "cpu", "float_dtype": None}}
    before: dict[str, Any] = {**rename_step, "to_batch_processor": {}}
    if config.kind == "pi05":
        before |= {**normalize, STATE_PROMPT_STEP: {}, **prompt, **device}
    else:
        before |= {"pi0_new_line_processor": {}, **prompt, **device, **normalize}
    after: dict[str, Any] = {
        # LeRobot unnormalises the action alone but stores every statistic.
        "unnormalizer_processor": {**scaling, "features": action},
        "absolute_actions_processor": {"enabled": bool(delta_mask)},
        **device,
    }
    tensors = {
        f"{feature}.{name}": np.ascontiguousarray(value, dtype=np.float32)
        for feature, stats in statistics.items()
        for name, value in stats.items()
        if value is not None
    }
    _write_pipeline(directory, PREPROCESSOR, before, tensors)
    _write_pipeline(directory, POSTPROCESSOR, after, tensors)


def _write_pipeline(
    directory: Path, name: str, steps: Mapping[str, Any], tensors: dict[str, NDArray[np.float32]]
) -> None:
    entries: list[dict[str, Any]] = []
    for index, (step, settings) in enumerate(steps.items()):
        entry: dict[str, Any] = {"registry_name": step, "config": settings}
        if step in ("normalizer_processor", "unnormalizer_processor") and tensors:
            entry["state_file"] = f"{name}_step_{index}_{step}.safetensors"
            save_file(tensors, directory / entry["state_file"])
        entries.append(entry)
    document = {"name": name, "steps": entries}
    (directory / f"{name}.json").write_text(json.dumps(document, indent=2), encoding="utf-8")
