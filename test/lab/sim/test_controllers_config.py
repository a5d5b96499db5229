"""config/controllers.yaml fits config/aloha.yaml and has the settings that hold the limits."""

from __future__ import annotations

from pathlib import Path

import yaml

CONFIG = Path(__file__).parents[3] / "config"


def test_the_controllers_are_those_of_the_policy_node() -> None:
    """Pins: joints in another order, a controller that is not loaded, a parameter left out."""
    policy = yaml.safe_load((CONFIG / "aloha.yaml").read_text())["/**/policy"]["ros__parameters"]
    controllers = yaml.safe_load((CONFIG / "controllers.yaml").read_text())
    loaded = controllers["/controller_manager"]["ros__parameters"]
    for name in policy["controllers"]["names"]:
        assert loaded[name]["type"].startswith("joint_trajectory_controller/")
        given = controllers[f"/{name}"]["ros__parameters"]
        assert given["joints"] == policy["controllers"][name]["joints"]
        assert given["interpolate_from_desired_state"] is True
        assert given["allow_trajectory_replacement"] is False
        assert given["command_interfaces"] == ["position"]
    assert loaded["update_rate"] >= 50
