"""The training's YAML; faults: a misspelt key that is a default in silence, vague errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from pi05_lab.training.config import ConfigError, parse_config, read_config
from pi05_lab.training.plugins import load_plugin

ROOT = Path(__file__).parents[3]


def document(**changes: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "output": "runs/x",
        "data": {"datasets": [{"root": "d"}]},
        "stages": [{"name": "a", "losses": {"flow": 1}, "steps": 5}],
    }
    return base | changes


def stages(**changes: Any) -> dict[str, Any]:
    return document(stages=[{"name": "a", "losses": {"flow": 1.0}, "steps": 5} | changes])


def test_defaults_are_openpis_optimiser() -> None:
    """Fault: fine-tuning of a published checkpoint with a small network's rates."""
    (stage,) = parse_config(document()).stages
    assert (stage.lr, stage.betas, stage.clip, stage.ema) == (2.5e-5, (0.9, 0.95), 1.0, 0.99)
    assert stage.optimizer == "adamw" and "vision" in stage.train


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (document(stage=[]), r"unknown key stage; did you mean 'stages'"),
        (stages(learning=1), r"unknown key stages\[0\]\.learning; known: name"),
        (stages(sample_per_prefix=2), r"stages\[0\].*did you mean 'samples_per_prefix'"),
        ({"output": "x", "stages": []}, r"^data is missing"),
        (document(data={}), r"data\.datasets is missing"),
        (document(seed="one"), r"seed must be a whole number, not 'one'"),
        (document(seed=True), r"seed must be a whole number"),
        (document(accelerate=1), r"accelerate must be true or false"),
        (document(stages={}), r"stages must be a list"),
        (stages(betas=[0.9]), r"stages\[0\]\.betas must have 2 entries"),
        (stages(losses={"flow": "much"}), r"stages\[0\]\.losses\.flow must be a number"),
        (stages(losses={"sound": 1}), r"stage 'a': losses: 'sound' is unknown; known: flow, fast"),
        (stages(losses={"flow": 0}), r"losses needs a weight above 0"),
        (stages(train=["tower"]), r"train: 'tower' is unknown"),
        (stages(minutes=2), r"either steps or minutes"),
        (stages(steps=None), r"either steps or minutes"),
        (stages(batch=0), r"batch must be at least 1"),
        (stages(lr=0), r"lr must be above 0"),
        (stages(hold=1.5), r"hold must be from 0 to 1"),
        (document(precision="float16"), r"precision: 'float16' is unknown"),
        (document(log_steps=0), r"log_steps must be at least 1, not 0"),
        (document(validation={"every_steps": 0}), r"validation\.every_steps must be at least 1"),
        (document(stages=[]), r"at least one"),
        (document(data={"datasets": []}), r"data\.datasets: at least one"),
        (document(stages=document()["stages"] * 2), r"a name repeats"),
        (stages(steps=None, minutes=1) | {"accelerate": True}, r"with accelerate give steps"),
        (document(data={"datasets": [{"root": "d"}], "held_out": 1.0}), r"held_out must be from 0"),
        (document(helpers={}), r"helpers is now plugin_options"),
        ([], r"the file must be a mapping"),
    ],
)
def test_what_is_wrong_is_named(bad: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config(bad)


def test_numbers_that_yaml_takes_for_text() -> None:
    """Fault: YAML 1.1 reads 2e-3 as a string, and the training refuses what looks like a number."""
    assert parse_config(stages(lr=yaml.safe_load("2e-3"))).stages[0].lr == 2e-3


def test_what_is_written_is_read_again() -> None:
    """Fault: the configuration beside the checkpoint does not repeat the training."""
    config = parse_config(stages(betas=[0.8, 0.9], train=["expert"]))
    assert parse_config(yaml.safe_load(yaml.safe_dump(config.to_dict()))) == config


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("a: [")
    (tmp_path / "key.yaml").write_text("colour: red")
    for name, message in (
        ("none", " cannot be read"),
        ("bad", " is not valid YAML"),
        ("key", ": unknown key colour"),
    ):
        with pytest.raises(ConfigError, match=rf"{name}\.yaml{message}"):
            read_config(tmp_path / f"{name}.yaml")


def test_the_shipped_configuration_is_valid() -> None:
    """Fault: the recipe of the shipped checkpoint has a key that the code dropped."""
    for name in ("train_small", "train_small_dagger"):
        config = read_config(ROOT / "examples/small_policy" / f"{name}.yaml")
        assert config.robot == "aloha"
        assert any("flow" in stage.losses for stage in config.stages)
        load_plugin(config)


def test_set_replaces_values(tmp_path: Path) -> None:
    file = tmp_path / "train.yaml"
    file.write_text(yaml.safe_dump(document()))
    changes = ["stages.0.lr=1e-4", "seed=7", "network.start=/c", "stages.0.train=[expert]"]
    config = read_config(file, changes)
    assert (config.seed, config.network.start) == (7, "/c")
    assert (config.stages[0].lr, config.stages[0].train) == (1e-4, ("expert",))
    for change, message in (
        ("stages.0.lrr=1", r"unknown key stages\[0\]\.lrr; did you mean 'lr'"),
        ("stages.4.lr=1", r"--set stages\.4\.lr=1: expected KEY=VALUE"),
        ("seed.x=1", r"seed must be a whole number, not \{'x': 1\}"),
        ("seed", r"--set seed: expected"),
        ("seed=[", r"--set seed=\["),
    ):
        with pytest.raises(ConfigError, match=message):
            read_config(file, [change])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"no file .*plug\.py"),
        ("import nothing_like_this", r"cannot be imported \(No module named 'nothing_like_this'"),
        ("LOSSES = ()", r"has no make_losses, make_network"),
        ("LOSSES = ('sharp',)\nmake_losses = make_network = print",
         r"stage 'a': losses: 'sound' is unknown; known: flow, fast, sharp"),
    ],
)  # fmt: skip
def test_plugins_that_do_not_fit_are_named(tmp_path: Path, text: str | None, message: str) -> None:
    file = tmp_path / f"plug{len(text or '')}plug.py"
    if text is not None:
        file.write_text(text)
    config = parse_config(stages(losses={"sound": 1.0}) | {"plugin": str(file)})
    with pytest.raises(ConfigError, match=message):
        load_plugin(config)
