"""docs/training.md from a bag to a moving arm, at toy size.

Faults: a step whose output the next one cannot read; a command of the tutorial that does not exist.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
import rclpy
from harness import ROOT, NodeProcess
from ros_domain_setup import ros
from sensor_msgs.msg import JointState
from std_msgs.msg import String

from pi05_lab.training.metrics import LOG_FILE, read_log
from pi05_ros.cli import main
from pi05_ros.nodes.messages import INSTRUCTION_QOS

__all__ = ["ros"]

pytestmark = pytest.mark.slow

TUTORIAL = (ROOT / "docs" / "training.md").read_text()
TOY = {
    "network.start": "small", "device": "cpu", "precision": "float32",
    "adapt_to_pi": "false", "delta_actions": "false", "data.workers": "0", "data.held_out": "0.3",
    "stages.0.steps": "30", "stages.0.batch": "4", "stages.0.lr": "1e-4",
    "stages.0.warmup_steps": "5", "validation.every_steps": "15", "validation.frames": "8",
    "save.every_steps": "15", "checkpoint_steps": "15", "log_steps": "5", "threads": "1",
    "gradient_checkpointing": "false",
}  # fmt: skip


def run(*arguments: object) -> None:
    """Run a command of the tutorial."""
    name = str(arguments[0])
    assert f"pi05 {name} " in TUTORIAL
    for option in (str(a) for a in arguments if str(a).startswith("--")):
        known = option in TUTORIAL or option in ("--output", "--workers")
        assert known or option in ("--tasks", "--control-every"), option
    assert main([str(argument) for argument in arguments]) == 0, arguments


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bags, data set, checkpoint and report."""
    folder = tmp_path_factory.mktemp("tutorial")
    bags, data, output = (folder / name for name in ("bags", "data", "run"))
    run("record", "--output", bags, "--format", "mcap", "--episodes", 4, "--tasks", "wave,touch",
        "--workers", 1)  # fmt: skip
    run("convert", *sorted(bags.iterdir()), data, "--trim")
    settings = TOY | {"data.datasets": f"[{{root: {data}}}]"}
    changes = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    run("train", ROOT / "config" / "finetune_pi05.yaml", "--output", output, *changes)
    report = ("--output", folder / "report", "--control-every", 0, "--workers", 1)
    run("evaluate", data, "--checkpoint", output / "checkpoint", *report)
    run("check", output / "checkpoint", "--robot", "aloha")
    return folder


def test_the_training_learns(folder: Path) -> None:
    log = read_log(folder / "run" / LOG_FILE)
    assert [entry["step"] for entry in log if entry["kind"] == "train"] == [5, 10, 15, 20, 25, 30]
    names = {path.name for path in (folder / "run" / "checkpoints").iterdir()}
    assert names == {"000015", "000030", "best"}
    config = json.loads((folder / "run" / "checkpoint" / "config.json").read_text())
    assert config["rtc_training_max_delay"] == 10


def test_held_out_episodes_are_evaluated(folder: Path) -> None:
    metrics = json.loads((folder / "report" / "metrics.json").read_text())
    assert 1 <= metrics["totals"]["recordings"] < 4 and metrics["trained_on"] == {}


def test_the_policy_moves_the_simulated_arm(folder: Path, ros: None) -> None:
    checkpoint = ("-p", f"checkpoint:={folder / 'run' / 'checkpoint'}", "-p", "autostart:=true")
    small = ("-p", "width:=112", "-p", "height:=84")
    simulator = NodeProcess("aloha_sim_node", folder / "sim.log", *small)
    policy = NodeProcess("policy_node", folder / "policy.log", *checkpoint)
    node = rclpy.create_node("operator")
    instruct = node.create_publisher(String, "instruction", INSTRUCTION_QOS)
    positions: list[np.ndarray] = []
    node.create_subscription(
        JointState, "joint_states", lambda m: positions.append(np.array(m.position)), 10
    )
    deadline_s = time.monotonic() + 60.0
    moved = 0.0
    try:
        while moved < 0.05 and time.monotonic() < deadline_s:
            instruct.publish(String(data="wave with the left arm"))
            rclpy.spin_once(node, timeout_sec=0.5)
            moved = float(np.abs(np.ptp(positions, axis=0)).max()) if positions else 0.0
    finally:
        codes = [process.stop() for process in (policy, simulator)]
        node.destroy_node()
    assert codes == [0, 0]
    assert moved >= 0.05, (folder / "policy.log").read_text()[-2000:]
