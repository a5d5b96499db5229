"""The simulated ALOHA for LeRobot's tools, a package because LeRobot discovers packages alone.

lerobot-eval --env.discover_packages_path=pi05_lab.sim.lerobot_plugin --env.type=pi05_aloha
    --policy.path=CHECKPOINT --env.verbs=touch,pick
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.envs.configs import EnvConfig

from pi05_lab.sim import env
from pi05_lab.sim.rendering import CAMERAS


@EnvConfig.register_subclass("pi05_aloha")  # type: ignore[untyped-decorator, unused-ignore]
@dataclass
class AlohaCubesConfig(EnvConfig):  # type: ignore[misc, unused-ignore]
    """Options of `pi05_lab.sim.env.AlohaCubes`."""

    task: str | None = "AlohaCubes-v0"
    fps: int = env.FPS
    verbs: str = "touch"
    """Tasks, separated by commas."""
    held_out: bool = True
    width: int = 112
    height: int = 84
    episode_length: int = 500
    features: dict[str, PolicyFeature] = field(default_factory=dict)
    features_map: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.features = {
            "action": PolicyFeature(FeatureType.ACTION, (14,)),
            "agent_pos": PolicyFeature(FeatureType.STATE, (14,)),
        }
        self.features_map = {"action": "action", "agent_pos": "observation.state"}
        for name in CAMERAS:
            self.features[f"pixels/{name}"] = PolicyFeature(
                FeatureType.VISUAL, (self.height, self.width, 3)
            )
            self.features_map[f"pixels/{name}"] = f"observation.images.{name}"

    @property
    def package_name(self) -> str:
        return "pi05_lab.sim.env"

    @property
    def gym_id(self) -> str:
        return env.ENV_ID

    @property
    def gym_kwargs(self) -> dict[str, Any]:
        return {
            "tasks": tuple(self.verbs.split(",")),
            "held_out": self.held_out,
            "size_px": (self.width, self.height),
            "max_episode_steps": self.episode_length,
        }
