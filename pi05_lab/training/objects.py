"""Where the objects of a dataset are: on the table, and in each camera's picture."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pi05_lab.data.lerobot_dataset import LeRobotDataset
from pi05_lab.training.config import ConfigError, TrainConfig
from pi05_lab.training.preparation import DataProcessor
from pi05_ros.policy.images import fitted_size


def read_positions(
    datasets: Sequence[LeRobotDataset], config: TrainConfig
) -> list[NDArray[np.float32] | None]:
    """[n, objects, 3] of every dataset, centred and scaled over all; None where one has none."""
    key = config.helpers.positions
    objects = len(config.helpers.names)
    raw: list[NDArray[np.float32] | None] = []
    for dataset in datasets:
        if key not in dataset.extras:
            raw.append(None)
            continue
        values = dataset.extra(key).astype(np.float32).reshape(len(dataset), -1)
        if values.shape[1] != objects * 3:
            raise ConfigError(
                f"{dataset.root}: {key!r} has {values.shape[1]} numbers, for the {objects} names "
                f"of helpers.names it must have {objects * 3}"
            )
        raw.append(values.reshape(-1, objects, 3))
    known = [values for values in raw if values is not None]
    if not known:
        return raw
    joined = np.concatenate(known).reshape(-1, 3)
    mean = joined.mean(0)
    # One scale for all axes: an axis along which little happens shall not count as much.
    scale = np.sqrt(joined.var(0).mean()) + 1e-3
    return [None if values is None else (values - mean) / scale for values in raw]


def read_pixels(
    dataset: LeRobotDataset, config: TrainConfig, preparation: DataProcessor
) -> NDArray[np.float32] | None:
    """[n, n_cameras, objects, 2] in the network's cameras and squares.

    None without the feature, or where no stage asks for it.
    """
    key, objects = config.helpers.pixels, len(config.helpers.names)
    wanted = any(stage.losses.get("pixels", 0) > 0 for stage in config.stages)
    if not wanted or key not in dataset.extras:
        return None
    raw = dataset.extra(key).astype(np.float32).reshape(len(dataset), -1)
    count = len(dataset.cameras) * objects * 2
    if raw.shape[1] != count:
        raise ConfigError(
            f"{dataset.root}: {key!r} has {raw.shape[1]} numbers, for {len(dataset.cameras)} "
            f"cameras and the {objects} names of helpers.names it must have {count}"
        )
    by_camera = raw.reshape(len(dataset), -1, objects, 2)
    cameras, side = preparation.config.cameras, preparation.config.image_size
    pixels = np.full((len(dataset), len(cameras), objects, 2), np.nan, dtype=np.float32)
    for index, camera in enumerate(dataset.cameras):
        height, width = fitted_size(*dataset.image_sizes[camera], side)
        inner = np.array([width, height]) / side
        squared = by_camera[:, index] * inner + (1 - inner) / 2
        absent = (by_camera[:, index] < 0).any(axis=-1, keepdims=True)
        pixels[:, cameras.index(preparation.cameras[camera])] = np.where(absent, -1.0, squared)
    return pixels
