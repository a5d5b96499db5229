"""A task learnt in seconds: two coloured squares, and an arm that has to reach one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pi05_lab.data.lerobot_format import CHUNK_KEY, Extra, Features
from pi05_lab.data.lerobot_writer import DatasetWriter
from pi05_lab.data.simulated import CUBES_KEY, PICTURE_KEY, PIXELS_KEY
from pi05_lab.training.config import TrainConfig, parse_config

SIDE, HORIZON = 32, 4
COLORS = {"red": (230, 40, 30), "blue": (40, 60, 230)}
NETWORK = {
    "vlm": [48, 2, 96, 2, 1, 16],
    "exp": [48, 2, 96, 2, 1, 16],
    "vis": [48, 1, 2, 96],
    "image": SIDE,
    "patch": 8,
    "horizon": HORIZON,
}
PLUGIN = Path(__file__).parents[3] / "examples/small_policy/losses.py"
OPTIONS = {
    "names": list(COLORS),
    "position_layers": [1],
    "chunk_layers": [1],
    "scene_camera": "cam",
}


def squares(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """An image [32, 32, 3], and x and y of the red and the blue square's corners in -1 to 1."""
    image = np.full((SIDE, SIDE, 3), 120, dtype=np.uint8)
    while True:
        corners = rng.integers(0, SIDE - 6, (2, 2))
        if np.abs(corners[0] - corners[1]).max() >= 8:
            break
    for (x, y), color in zip(corners, COLORS.values(), strict=True):
        image[y : y + 6, x : x + 6] = color
    return image, corners / (SIDE - 6) * 2 - 1


def path(state: np.ndarray, goal: np.ndarray) -> np.ndarray:
    """[horizon, 2] halfway, then at the goal."""
    return np.stack([(state + goal) / 2, *[goal] * (HORIZON - 1)])


def write_dataset(root: Path, episodes: int, seed: int = 0, chunks: bool = True) -> Path:
    """Episodes of two samples, each with both instructions, or of plain recorded motion."""
    rng = np.random.default_rng(seed)
    extras = {CUBES_KEY: Extra((6,)), PIXELS_KEY: Extra((4,))}
    if chunks:
        extras |= {CHUNK_KEY: Extra((HORIZON, 2)), PICTURE_KEY: Extra((1,), "int64")}
    features = Features({"cam": (SIDE, SIDE)}, ["x", "y"], ["x", "y"], extras)
    number = 0
    with DatasetWriter(root, 10, features, robot_type="squares") as writer:
        for _ in range(episodes):
            for _ in range(2):
                image, goals = squares(rng)
                state = rng.uniform(-1, 1, 2)
                images: dict[str, Any] | None = {"cam": image}
                for color, goal in zip(COLORS, goals, strict=True):
                    chunk = path(state, goal)
                    extra: dict[str, Any] = {
                        CUBES_KEY: np.insert(goals, 2, 0.0, axis=1).ravel(),
                        PIXELS_KEY: (((goals + 1) / 2 * (SIDE - 6) + 3) / SIDE).ravel(),
                    }
                    if chunks:
                        extra |= {CHUNK_KEY: chunk, PICTURE_KEY: [number]}
                    task = f"touch the {color} cube"
                    writer.add_frame(images, state, chunk[0], task, extra)
                    images = None if chunks else {"cam": image}
                number += 1
            writer.end_episode()
    return root


def stage(**changes: Any) -> dict[str, Any]:
    """A short stage of flow matching."""
    values = {"name": "flow", "losses": {"flow": 1.0}, "steps": 3, "batch": 4, "lr": 1e-3}
    return values | changes


def make_config(output: Path, *datasets: Path, **changes: Any) -> TrainConfig:
    """A training of the tiny network; `changes` replace keys of the YAML."""
    document: dict[str, Any] = {
        "output": str(output),
        "robot": "generic",
        "device": "cpu",
        "precision": "float32",
        "save_precision": "float32",
        "network": NETWORK,
        "plugin": str(PLUGIN),
        "plugin_options": OPTIONS,
        "data": {"datasets": [{"root": str(d)} for d in datasets], "held_out": 0.2},
        "validation": {"every_steps": 100, "frames": 4},
        "log_steps": 1,
        "checkpoint_steps": 100,
        "stages": [stage()],
    }
    return parse_config(document | changes)
