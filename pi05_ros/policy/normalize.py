"""Scaling of states and actions between the robot's units and the network's, by statistics.

Sources: LeRobot 0.6.1 `processor/normalize_processor.py`, openpi `transforms.py` (Normalize and
Unnormalize). Neither clips, in either direction, and neither does this.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pi05_ros.policy.weights import CheckpointError

Convention = Literal["lerobot", "openpi"]
"""Whose formulas a checkpoint was trained with: LeRobot's or openpi's."""

EPS = {"lerobot": 1e-8, "openpi": 1e-6}


class Mode(str, Enum):
    """What is scaled to what; the names are those of LeRobot's `normalization_mapping`."""

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


class Normalizer:
    """One feature's scaling: robot units ↔ what the network sees.

    MEAN_STD maps mean ± std to 0 ± 1. The other modes map their lower and upper statistic to -1
    and 1. With `lo`, `hi` those two, the two conventions are

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
            feature: the name for messages, for example "observation.state".
            mode: how to scale.
            statistics: name ("q01", "mean", …) → values [dim]. openpi's may be longer than the
                robot and are cut; LeRobot's have exactly `dim` values.
            dim: the robot's dimensions.
            convention: whose formulas.
            eps: LeRobot's `eps`, where its file has another than the default.

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
        self._eps = EPS[convention] if eps is None else eps
        names = STATISTICS[self.mode]
        values = [self._read(name, statistics) for name in names]
        self.statistics: dict[str, NDArray[Any]] = dict(zip(names, values, strict=True))
        """The statistics in use: name → values [dim]."""
        if self.mode is Mode.MEAN_STD:
            self._set_mean_std(*values)
        elif values:
            self._set_range(*values)

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
        wanted = f"{self.dim} values" if self.convention == "lerobot" else f"at least {self.dim}"
        short = array.ndim != 1 or len(array) < self.dim
        if short or (self.convention == "lerobot" and len(array) > self.dim):
            raise CheckpointError(
                f"{self.feature}.{name} has shape {list(array.shape)}, the robot needs {wanted}"
            )
        with np.errstate(over="ignore"):  # what float32 does not hold becomes infinite
            array = array[: self.dim].astype(self._dtype)
        for i in np.flatnonzero(~np.isfinite(array)):
            raise CheckpointError(f"{self.feature}.{name}[{i}] is {array[i]}")
        return array

    def _set_mean_std(self, mean: NDArray[Any], std: NDArray[Any]) -> None:
        for i in np.flatnonzero(std < 0):
            raise CheckpointError(f"{self.feature}.std[{i}] is negative: {std[i]}")
        self._offset, self._divisor = mean, std + self._dtype(self._eps)
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
            width = np.where(width == 0, self._dtype(self._eps), width)
        else:
            width = width + self._eps
        self._offset, self._divisor, self._factor = lower, width, width

    @property
    def widths(self) -> NDArray[Any]:
        """[dim]: how far apart in robot units what becomes -1 and 1 lies; empty for IDENTITY."""
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
        """[..., dim] in the network's units → the same shape in the robot's, unclipped."""
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
