"""The part of LeRobot that the adapter calls, for tests without LeRobot.

It reads the same folders, so `test/external/lerobot_policies.py` runs both on the same policies and
compares what reaches `predict_action_chunk`, and how queues, shapes and wrong files behave. The
network is another one: its chunk shows the order of the history, the state and the noise.
"""

from __future__ import annotations

import json
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

TYPES = ("act", "diffusion")
STATE = "observation.state"


class Config:
    """`lerobot.configs.policies.PreTrainedConfig`."""

    @staticmethod
    def from_pretrained(path: str) -> SimpleNamespace:
        return SimpleNamespace(**json.loads((Path(path) / "config.json").read_text()))


class Network(nn.Module):
    """A policy with the file's tensors as parameters."""

    def __init__(self, config: SimpleNamespace, names: dict[str, Tensor]) -> None:
        super().__init__()
        self.config = config
        for name, tensor in names.items():
            self.register_buffer(name.replace(".", "_"), tensor)
        self._names = list(names)
        self.seen: list[dict[str, Any]] = []
        self.reset()

    @classmethod
    def from_pretrained(cls, path: str, *, config: SimpleNamespace, strict: bool) -> Network:
        assert strict
        return cls(config, load_file(Path(path) / "model.safetensors"))

    def state_dict(self, *_: Any, **__: Any) -> Any:
        return {name: getattr(self, name.replace(".", "_")) for name in self._names}

    def reset(self) -> None:
        self._queues: dict[str, deque[Any]] = {"action": deque(maxlen=self.config.n_action_steps)}
        if self.config.type == "diffusion":
            for name in (STATE, "observation.images"):
                self._queues[name] = deque(maxlen=self.config.n_obs_steps)

    def predict_action_chunk(self, batch: dict[str, Any]) -> Tensor:
        """[1, steps, action_dim]: the state, and what tells the images and their order apart."""
        self.seen.append(dict(batch))
        diffusion = self.config.type == "diffusion"
        steps = self.config.n_action_steps if diffusion else self.config.chunk_size
        (dim,) = self.config.output_features["action"]["shape"]
        images = torch.stack([batch[k] for k in sorted(batch) if "observation.images" in k])
        level = images.flatten(3 if diffusion else 2).mean(-1).mean(0)
        state = batch[STATE]
        if diffusion:
            level, state = level[:, -1] - level[:, 0], state[:, -1]
        ramp = torch.linspace(0, 1, steps)[None, :, None]
        chunk = torch.zeros(1, steps, dim) + ramp + level[:, None, None].reshape(1, 1, -1)[..., :1]
        shared = min(dim, state.shape[-1])
        chunk[..., :shared] += state[:, None, :shared]
        return chunk + 0.1 * torch.randn(chunk.shape) if diffusion else chunk


def processors(
    config: SimpleNamespace,
    pretrained_path: str,
    preprocessor_overrides: dict[str, Any],
    postprocessor_overrides: dict[str, Any],
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """`make_pre_post_processors`: rename, batch, normalise; and back."""
    folder = Path(pretrained_path)
    before, after = (_normalizer(folder, f"policy_{side}processor") for side in ("pre", "post"))

    def preprocess(raw: dict[str, Any]) -> dict[str, Any]:
        batch = {key: before(key, value, False) for key, value in raw.items()}
        return batch | {"task": [raw["task"]]}

    return preprocess, lambda action: after("action", action, True)


def _normalizer(folder: Path, name: str) -> Callable[[str, Any, bool], Any]:
    steps = json.loads((folder / f"{name}.json").read_text())["steps"]
    step = next(s for s in steps if "normalizer" in s["registry_name"])
    statistics = load_file(folder / step["state_file"])
    features, modes = step["config"]["features"], step["config"]["norm_map"]

    def change(key: str, value: Any, back: bool) -> Any:
        mode = modes.get(features[key]["type"], "IDENTITY") if key in features else "IDENTITY"
        if mode == "IDENTITY":
            return value
        first, second = ("mean", "std") if mode == "MEAN_STD" else ("min", "max")
        low, high = statistics[f"{key}.{first}"], statistics[f"{key}.{second}"]
        if mode == "MEAN_STD":
            return value * high + low if back else (value - low) / (high + 1e-8)
        return (
            (value + 1) / 2 * (high - low) + low if back else 2 * (value - low) / (high - low) - 1
        )

    return change


def _policy_class(kind: str) -> type[Network]:
    if kind not in TYPES:
        raise ValueError(f"Unknown policy name '{kind}'. Available policies: {list(TYPES)}")
    return Network


@contextmanager
def installed() -> Iterator[None]:
    """`import lerobot…` finds the stand-in."""
    modules = {
        name: ModuleType(name)
        for name in ("lerobot", "lerobot.configs", "lerobot.configs.policies", "lerobot.policies",
                     "lerobot.policies.factory")
    }  # fmt: skip
    modules["lerobot.configs.policies"].PreTrainedConfig = Config  # type: ignore[attr-defined]
    factory: Any = modules["lerobot.policies.factory"]
    factory.get_policy_class, factory.make_pre_post_processors = _policy_class, processors
    hidden = {n: m for n, m in sys.modules.items() if n == "lerobot" or n.startswith("lerobot.")}
    for name in hidden:
        del sys.modules[name]
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in modules:
            del sys.modules[name]
        sys.modules.update(hidden)
