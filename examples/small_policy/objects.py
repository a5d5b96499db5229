"""Positions of a dataset's objects, on the table and in each camera's image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pi05_lab.data.lerobot_dataset import LeRobotDataset
from pi05_lab.training.config import ConfigError
from pi05_lab.training.data import Frame
from pi05_lab.training.processing import DataProcessor
from pi05_ros.policy.images import fitted_size

if TYPE_CHECKING:
    from small_policy.losses import AuxLossConfig


def read_positions(
    datasets: Sequence[LeRobotDataset], options: AuxLossConfig
) -> list[NDArray[np.float32] | None]:
    """[n, objects, 3] of every dataset, centred and scaled over all; None where one has none."""
    key, objects = options.positions, len(options.names)
    raw: list[NDArray[np.float32] | None] = []
    for dataset in datasets:
        if key not in dataset.extras:
            raw.append(None)
            continue
        values = dataset.extra(key).astype(np.float32).reshape(len(dataset), -1)
        if values.shape[1] != objects * 3:
            raise ConfigError(
                f"{dataset.root}: {key!r} has {values.shape[1]} numbers, for the {objects} names "
                f"of plugin_options.names it must have {objects * 3}"
            )
        raw.append(values.reshape(-1, objects, 3))
    known = [values for values in raw if values is not None]
    if not known:
        return raw
    joined = np.concatenate(known).reshape(-1, 3)
    mean = joined.mean(0)
    # One scale for all axes, so that an axis with little variation counts less.
    scale = np.sqrt(joined.var(0).mean()) + 1e-3
    return [None if values is None else (values - mean) / scale for values in raw]


def read_pixels(
    dataset: LeRobotDataset, options: AuxLossConfig, processor: DataProcessor
) -> NDArray[np.float32] | None:
    """[n, n_cameras, objects, 2] in the network's cameras and image; None without the feature."""
    key, objects = options.pixels, len(options.names)
    if key not in dataset.extras:
        return None
    raw = dataset.extra(key).astype(np.float32).reshape(len(dataset), -1)
    count = len(dataset.cameras) * objects * 2
    if raw.shape[1] != count:
        raise ConfigError(
            f"{dataset.root}: {key!r} has {raw.shape[1]} numbers, for {len(dataset.cameras)} "
            f"cameras and the {objects} names of plugin_options.names it must have {count}"
        )
    by_camera = raw.reshape(len(dataset), -1, objects, 2)
    cameras, side = processor.config.cameras, processor.config.image_size
    pixels = np.full((len(dataset), len(cameras), objects, 2), np.nan, dtype=np.float32)
    for index, camera in enumerate(dataset.cameras):
        height, width = fitted_size(*dataset.image_sizes[camera], side)
        inner = np.array([width, height]) / side
        squared = by_camera[:, index] * inner + (1 - inner) / 2
        absent = (by_camera[:, index] < 0).any(axis=-1, keepdims=True)
        pixels[:, cameras.index(processor.cameras[camera])] = np.where(absent, -1.0, squared)
    return pixels


def pick_rows(
    values: Sequence[NDArray[np.float32] | None], frames: Sequence[Frame], empty: tuple[int, ...]
) -> Tensor:
    """The values of some frames, NaN where their dataset has none.

    `empty` is the shape of a row where no dataset has any.
    """
    shape = next((known.shape[1:] for known in values if known is not None), empty)
    rows = np.full((len(frames), *shape), np.nan, dtype=np.float32)
    for row, frame in zip(rows, frames, strict=True):
        known = values[frame.dataset] if values else None
        if known is not None:
            row[...] = known[frame.number]
    return torch.from_numpy(rows)
