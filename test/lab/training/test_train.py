"""Whole trainings of a tiny network.

Faults: a loss that does not fall, a policy that ignores instruction or images, a resumed training
that ends elsewhere than one that was never stopped.
"""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from squares_world import OPTIONS, make_config, squares, stage, write_dataset  # type: ignore
from torch.distributed.checkpoint import FileSystemWriter

from pi05_lab.training import train as train_module
from pi05_lab.training.config import ConfigError, TrainConfig, parse_config
from pi05_lab.training.metrics import LOG_FILE, read_log
from pi05_lab.training.state import (
    POSITION_FILE,
    STATES,
    Position,
    has_state,
    read_position,
)
from pi05_lab.training.train import Trainer, train
from pi05_ros.policy.policy import Policy
from pi05_ros.types import Observation

HELPED = {"flow": 1.0, "chunk": 1.0, "named_position": 1.0, "scene": 0.1}


def weights(folder: Path) -> bytes:
    return (folder / "checkpoint" / "model.safetensors").read_bytes()


def two_stages(output: Path, dataset: Path, **changes: Any) -> TrainConfig:
    stages = [
        stage(name="helped", losses=HELPED, steps=4, optimizer="muon", tasks_per_picture=2),
        stage(name="expert", train=["expert", "bridge"], steps=4, samples_per_prefix=2),
    ]
    return make_config(output, dataset, stages=stages, checkpoint_steps=3, **changes)


@pytest.fixture(scope="module")
def whole(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a training that nothing interrupted."""
    output = tmp_path_factory.mktemp("whole")
    assert train(two_stages(output, dataset)) == output / "checkpoint"
    return output


class Killed(BaseException):
    """Stands for SIGKILL: nothing of the training's own runs after it."""


@pytest.mark.parametrize("steps", [1, 3, 4, 5, 7])
def test_a_killed_training_ends_as_one_that_was_not(
    dataset: Path, whole: Path, tmp_path: Path, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, killed in a step: before the first state, between states, at a stage's end."""
    config = two_stages(tmp_path, dataset)
    step = Trainer._step

    def killed(self: Trainer, *args: Any) -> None:
        step(self, *args)
        if self.position.total_steps == steps:
            raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_step", killed)
        with pytest.raises(Killed):
            train(config)
    resumable = has_state(tmp_path)
    assert resumable == (steps > 3)
    train(config, resume=resumable)
    assert weights(tmp_path) == weights(whole)
    mine, theirs = (
        [entry for entry in read_log(folder / LOG_FILE) if entry["kind"] == "train"]
        for folder in (tmp_path, whole)
    )
    # losses are running means, which restart at a resumption
    for key in ("step", "norm", "lr"):
        assert [entry[key] for entry in mine] == [entry[key] for entry in theirs]
    assert [entry.keys() for entry in mine] == [entry.keys() for entry in theirs]


def test_a_stopped_training_goes_on(dataset: Path, whole: Path, tmp_path: Path) -> None:
    """Ctrl-C: the state of the very step, and no checkpoint that claims to be done."""
    config = two_stages(tmp_path, dataset)
    asked = iter([False, True])
    assert train(config, stop=lambda: next(asked)) is None
    assert not (tmp_path / "checkpoint").exists()
    with pytest.raises(ConfigError, match="has a training: continue it with --resume"):
        train(config)
    assert train(config, resume=True) is not None
    assert weights(tmp_path) == weights(whole)


def test_resuming_what_is_not_there_or_another_training(
    dataset: Path, whole: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="has no state to resume from"):
        train(two_stages(tmp_path, dataset), resume=True)
    shutil.copytree(whole / STATES, tmp_path / STATES)
    with pytest.raises(ConfigError, match="of a training with another seed: 0 instead of 3"):
        train(two_stages(tmp_path, dataset, seed=3), resume=True)
    (state,) = (tmp_path / STATES).iterdir()
    for file in (next(state.glob("*.distcp")), state / POSITION_FILE):
        file.write_bytes(b"cut off")
        with pytest.raises(ConfigError, match="is damaged"):
            train(two_stages(tmp_path, dataset), resume=True)


@pytest.mark.parametrize(("step", "changeable"), [(0, True), (1, False)])
def test_a_stage_may_change_until_its_first_step(
    dataset: Path, tmp_path: Path, step: int, changeable: bool
) -> None:
    """Fault: at the end of a stage, the next one counted as begun; and the message was a page."""
    config = two_stages(tmp_path, dataset)
    position = Position(stage=1, step=step)
    folder = tmp_path / STATES / "000000001.001"
    folder.mkdir(parents=True)
    document = {"config": config.to_dict(), "position": vars(position)}
    (folder / POSITION_FILE).write_text(json.dumps(document))
    other = config.to_dict()
    other["stages"][1]["lr"] = 0.5
    if changeable:
        assert read_position(tmp_path, parse_config(other))[0] == position
        other["stages"][0]["lr"] = 0.5
    name = "stages.0.lr" if changeable else "stages.1.lr"
    with pytest.raises(ConfigError, match=rf"with another {re.escape(name)}: \S+ instead of 0.5;"):
        read_position(tmp_path, parse_config(other))


def test_what_may_change_between_a_stop_and_its_resumption(
    dataset: Path, whole: Path, tmp_path: Path
) -> None:
    """Workers, passes per step, and stages that have not begun; fault: the whole run lost."""
    config = two_stages(tmp_path, dataset)
    polls = iter([False, True])
    assert train(config, stop=lambda: next(polls)) is None
    document = config.to_dict()
    document["data"] |= {"workers": 1, "cache_gb": 0.5}
    document["stages"][0]["accumulate"] = 2
    longer = copy.deepcopy(document)
    longer["stages"][0]["steps"] = 5
    with pytest.raises(ConfigError, match="another stages"):
        train(parse_config(longer), resume=True)
    document["stages"].append(document["stages"][1] | {"name": "more", "steps": 1})
    document["checkpoint_steps"] = 8
    assert train(parse_config(document), resume=True) is not None
    mine, theirs = (
        [e["norm"] for e in read_log(f / LOG_FILE) if e["kind"] == "train"]
        for f in (tmp_path, whole)
    )
    # two passes round otherwise
    assert len(mine) == 9 and mine[:8] == pytest.approx(theirs, rel=1e-3)


def test_a_full_disk_keeps_the_state_before(
    dataset: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault: a traceback, and half a state in place of a whole one."""
    config = two_stages(tmp_path, dataset)
    write = FileSystemWriter.write_data
    calls = iter(range(9))

    def fill(self: FileSystemWriter, *arguments: Any) -> Any:
        if next(calls) == 1:
            raise OSError(28, "No space left on device")
        return write(self, *arguments)

    monkeypatch.setattr(FileSystemWriter, "write_data", fill)
    with pytest.raises(ConfigError, match=r"cannot be written to .*No space left on device"):
        train(config)
    monkeypatch.undo()
    assert [p.name for p in (tmp_path / STATES).iterdir()] == ["000000003.000"]
    assert train(config, resume=True) is not None
    assert weights(tmp_path) == weights(whole)


def test_checkpoints_on_the_way(dataset: Path, tmp_path: Path) -> None:
    """The latest ones and the best; the final one stands alone."""
    config = make_config(
        tmp_path,
        dataset,
        stages=[stage(steps=7)],
        save={"every_steps": 2, "keep": 2, "best": "flow"},
        validation={"every_steps": 2, "frames": 4},
    )
    train(config)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [
        "000004",
        "000006",
        "best",
    ]
    for folder in (*(tmp_path / "checkpoints").iterdir(), tmp_path / "checkpoint"):
        assert Policy.from_pretrained(folder, robot="generic", device="cpu").description
    figures = {
        e["step"]: e["flow"] for e in read_log(tmp_path / LOG_FILE) if e["kind"] == "validation"
    }
    best = json.loads((tmp_path / "checkpoints/best/pi05_ros.json").read_text())["note"]
    assert best.startswith(f"{min(figures, key=lambda step: figures[step])} steps")
    wrong = make_config(
        tmp_path / "w", dataset, save={"best": "succes"}, validation={"every_steps": 1, "frames": 4}
    )
    with pytest.raises(ConfigError, match=r"save\.best: the validation has no 'succes'; it has"):
        train(wrong)


def test_seeds_decide(dataset: Path, whole: Path, tmp_path: Path) -> None:
    train(two_stages(tmp_path / "again", dataset))
    train(two_stages(tmp_path / "other", dataset, seed=1))
    assert weights(tmp_path / "again") == weights(whole)
    assert weights(tmp_path / "other") != weights(whole)


def test_only_what_shall_learn_learns(dataset: Path, whole: Path, tmp_path: Path) -> None:
    """The second stage leaves all but the expert as the first one's average has it."""
    first = two_stages(tmp_path, dataset)
    train(make_config(tmp_path, dataset, stages=first.to_dict()["stages"][:1]))
    before = Policy.from_pretrained(tmp_path / "checkpoint", robot="generic", device="cpu").model
    after = Policy.from_pretrained(whole / "checkpoint", robot="generic", device="cpu").model
    pairs = zip(before.named_parameters(), after.parameters(), strict=True)
    moved = [name for (name, a), b in pairs if not torch.equal(a, b)]
    learning = ("experts.action.", "action_", "time_", "experts.vlm.layers.1.")
    assert moved and all(name.startswith(learning) for name in moved)
    assert not after.action_in_proj.weight[:, 2:].any()


def test_a_stage_of_minutes_ends(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(10_000))
    monkeypatch.setattr(train_module.time, "perf_counter", lambda: 4.0 * next(clock))
    stages = [stage(steps=None, minutes=1.0)]
    train(make_config(tmp_path, dataset, stages=stages))
    (done,) = (e for e in read_log(tmp_path / LOG_FILE) if e["kind"] == "stage")
    # four readings of the clock per step: 12 s
    assert (done["steps"], done["minutes"]) == (5, pytest.approx(1.0))


def test_the_callers_evaluation(dataset: Path, tmp_path: Path) -> None:
    """It gets a checkpoint that loads, while training and at the end; the card has its figures.

    Its policy's number of threads is the process's, and must not stay that of the training.
    """
    seen: list[str] = []
    threads = torch.get_num_threads()

    def evaluate(folder: Path) -> Mapping[str, float]:
        policy = Policy.from_pretrained(folder, robot="generic", device="cpu", threads=threads + 1)
        seen.append(policy.description)
        return {"touch_success": 0.25 + len(seen)}

    every = {"every_minutes": 1e-9}
    config = make_config(tmp_path, dataset, evaluation=every, precision="bfloat16")
    train(config, evaluate=evaluate)
    assert len(seen) == 4 and "trained" in seen[0]
    assert torch.get_num_threads() == threads
    card = (tmp_path / "checkpoint" / "README.md").read_text()
    assert "## Closed loop" in card and "4.25" in card
    entries = [e for e in read_log(tmp_path / LOG_FILE) if e["kind"] == "evaluation"]
    assert [e["touch_success"] for e in entries] == [1.25, 2.25, 3.25, 4.25]


def test_a_loss_that_explodes_stops_the_training(dataset: Path, tmp_path: Path) -> None:
    """Fault: hours spent on NaN, and a checkpoint of it."""
    config = make_config(tmp_path, dataset, stages=[stage(lr=1e30, steps=20)])
    with pytest.raises(ConfigError, match=r"stage 'flow', step \d+: the gradient is not finite"):
        train(config)
    assert not (tmp_path / "checkpoint").exists()


def test_positions_that_no_dataset_has_are_named(dataset: Path, tmp_path: Path) -> None:
    stages = [stage(losses={"scene": 1.0})]
    with pytest.raises(ConfigError, match="need the feature 'cubes', which no dataset has"):
        options = OPTIONS | {"positions": "cubes"}
        train(make_config(tmp_path, dataset, stages=stages, plugin_options=options))


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training that is long enough to reach the squares."""
    folder = tmp_path_factory.mktemp("learnt")
    dataset = write_dataset(folder / "data", 300, seed=1)
    helped = {"named_position": 1.0, "chunk": 1.0, "flow": 1.0}
    common = {"optimizer": "muon", "hold": 0.5, "final_lr": 0.02, "tasks_per_picture": 2}
    stages = [
        stage(name="see", losses={"scene": 1.0}, steps=90, batch=32, lr=4e-3, **common),
        stage(name="do", losses=helped, insulate=True, steps=220, batch=16, lr=4e-3, **common)
        | {"samples_per_prefix": 2},
    ]
    # the picture says where the square is by a sine and cosine of its patch
    changes: dict[str, Any] = {
        "stages": stages,
        "log_steps": 10,
        "save_precision": "bfloat16",
        "validation": {"every_steps": 1000, "frames": 32},
    }
    train(make_config(folder / "out", dataset, **changes), console=Console(quiet=True))
    return folder / "out"


@pytest.mark.slow
def test_the_loss_falls(learnt: Path) -> None:
    losses = [e["flow"] for e in read_log(learnt / LOG_FILE) if "flow" in e and "lr" in e]
    assert losses[-1] < 0.25 * losses[0]


@pytest.mark.slow
def test_the_policy_uses_images_and_instruction(learnt: Path) -> None:
    """It reaches the square that is named, in pictures that it has not seen."""
    policy = Policy.from_pretrained(learnt / "checkpoint", robot="generic", device="cpu", seed=0)
    rng = np.random.default_rng(99)
    distances, wrong = [], []
    for _ in range(30):
        picture, goals = squares(rng)
        for index, color in enumerate(("red", "blue")):
            state, task = rng.uniform(-1, 1, 2), f"touch the {color} cube"
            observation = Observation({"cam": picture}, state, task, 0.0)
            reached = policy.infer(observation).actions[-1]
            distances.append(np.linalg.norm(reached - goals[index]))
            wrong.append(np.linalg.norm(reached - goals[1 - index]))
    # squares are at least 0.6 apart, random places 1.1 on average
    assert np.median(distances) < 0.3
    assert np.mean(np.array(distances) < np.array(wrong)) > 0.9


@pytest.mark.slow
def test_validation_shows_that_it_does(learnt: Path) -> None:
    entry = [e for e in read_log(learnt / LOG_FILE) if e["kind"] == "validation"][-1]
    assert entry["flow_other_text"] > 1.5 * entry["flow"]
    assert entry["flow_black"] > 1.5 * entry["flow"]
    assert entry["action_error"] < 0.2


@pytest.mark.slow
def test_the_checkpoint_describes_itself(learnt: Path) -> None:
    folder = learnt / "checkpoint"
    settings = json.loads((folder / "pi05_ros.json").read_text())
    assert settings["trained"] is True and settings["robot"] == "generic"
    assert "310 steps" in settings["note"]
    card = (folder / "README.md").read_text()
    for text in ("π0.5", "| see |", "held-out flow", "labelled frames | 944", "## Held-out"):
        assert text in card, text
    assert (folder / "train_config.yaml").is_file() and (folder / LOG_FILE).is_file()
    policy = Policy.from_pretrained(folder, robot="generic", device="cpu")
    assert policy.description.startswith("π0.5, 0.2 M parameters, float32, trained (310 steps")
