"""Which episodes are evaluated; fault: figures on the training's data that look like those of new
situations."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from offline_world import (  # type: ignore[import-not-found]
    JOINTS,
    START_S,
    make_plan,
    motion,
    picture,
    write_bag,
    write_params,
)

from pi05_lab.data.lerobot_dataset import LeRobotDataset
from pi05_lab.data.lerobot_format import Features
from pi05_lab.data.lerobot_writer import DatasetWriter
from pi05_lab.evaluation.open_loop import command as offline_command
from pi05_lab.evaluation.open_loop.bag import BagError
from pi05_lab.evaluation.open_loop.episodes import choose_episodes
from pi05_lab.evaluation.open_loop.runs import Job, Plan, find_jobs

COUNT, HELD_OUT, SEED = 10, 0.3, 4


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "demonstrations"
    with DatasetWriter(root, 50, Features({"top": (12, 16)}, JOINTS, JOINTS, {}, False)) as writer:
        for _ in range(COUNT):
            for k in range(20):
                now = motion(np.array([START_S + k / 50]))[0] / (1.0, 1.0, 0.04)
                values = now.astype(np.float32)
                writer.add_frame({"top": picture(k)}, values, values, "wave")
            writer.end_episode()
    return root


def checkpoint(folder: Path, *roots: object, **changes: Any) -> Path:
    """A folder with nothing of a checkpoint but what it was trained on."""
    folder.mkdir(exist_ok=True)
    data = {"datasets": [{"root": str(r)} for r in roots], "held_out": HELD_OUT}
    (folder / "train_config.yaml").write_text(
        yaml.safe_dump({"data": data, "seed": SEED} | changes)
    )
    return folder


def plan_for(folder: Path, *sources: Path | str) -> Plan:
    base = make_plan(folder)
    return Plan(
        tuple((Path(source).name, str(source)) for source in sources),
        base.settings,
        base.params_file,
    )


def episodes(jobs: tuple[Job, ...]) -> list[int | None]:
    return [job.episode for job in jobs]


@pytest.mark.parametrize("moved", [False, True])
def test_those_that_the_training_held_out_are_the_default(
    moved: bool, dataset: Path, tmp_path: Path
) -> None:
    """Also where the checkpoint comes from another machine, whose dataset has the same name."""
    root = "/elsewhere/demonstrations" if moved else dataset
    plan = plan_for(tmp_path, checkpoint(tmp_path / "net", root))
    choice = choose_episodes(find_jobs([dataset]), plan, None)
    split = LeRobotDataset(dataset).split(HELD_OUT, SEED)
    assert episodes(choice.jobs) == split.held_out.tolist() and len(choice.jobs) == 3
    assert choice.trained_on == {}
    assert choice.lines == (
        f"{dataset}: 3 of 10 episodes, those that the training held out; --episodes all takes the "
        "others too",
    )


def test_all_of_them_are_evaluated_where_asked_and_the_trained_ones_named(
    dataset: Path, tmp_path: Path
) -> None:
    plan = plan_for(tmp_path, checkpoint(tmp_path / "net", dataset))
    choice = choose_episodes(find_jobs([dataset]), plan, "all")
    assert episodes(choice.jobs) == list(range(COUNT))
    trained = LeRobotDataset(dataset).split(HELD_OUT, SEED).train.tolist()
    assert choice.trained_on == {"net": [f"demonstrations#{k}" for k in trained]}
    assert choice.lines == ()


def test_what_one_of_two_policies_was_trained_on_is_left_out(dataset: Path, tmp_path: Path) -> None:
    one = checkpoint(tmp_path / "one", dataset)
    two = checkpoint(tmp_path / "two", dataset, seed=SEED + 1)
    choice = choose_episodes(find_jobs([dataset]), plan_for(tmp_path, one, two), None)
    held = [
        set(LeRobotDataset(dataset).split(HELD_OUT, s).held_out.tolist()) for s in (SEED, SEED + 1)
    ]
    both = sorted(held[0] & held[1])
    # with none in common all are taken, and the report says whose training they are of
    assert episodes(choice.jobs) == (both or list(range(COUNT)))
    assert bool(choice.trained_on) == (not both)


def test_numbers_choose_episodes(dataset: Path, tmp_path: Path) -> None:
    plan = plan_for(tmp_path, "offline_world:oracle")
    choice = choose_episodes(find_jobs([dataset]), plan, "0,4-6")
    assert episodes(choice.jobs) == [0, 4, 5, 6]


def test_a_bag_and_an_unknown_dataset_are_taken_whole(dataset: Path, tmp_path: Path) -> None:
    bag = write_bag(tmp_path / "bag", 0.2)
    plan = plan_for(tmp_path, checkpoint(tmp_path / "net", "data/others"))
    choice = choose_episodes(find_jobs([bag, dataset]), plan, None)
    assert episodes(choice.jobs) == [None, *range(COUNT)] and not choice.lines


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("held-out", "no policy has a train_config"),
        ("some", "must be all, held-out, or numbers"),
        ("77", "--episodes 77: no such episode"),
    ],
)
def test_what_cannot_be_chosen_is_named(
    wanted: str, message: str, dataset: Path, tmp_path: Path
) -> None:
    with pytest.raises(BagError, match=message):
        choose_episodes(find_jobs([dataset]), plan_for(tmp_path, "offline_world:oracle"), wanted)


@pytest.mark.parametrize(
    "text", ["data: 3", "- 1", "data: {datasets: [{}]}", "seed: [", "data: {}"]
)
def test_a_training_configuration_that_says_nothing_is_named(
    text: str, dataset: Path, tmp_path: Path
) -> None:
    net = checkpoint(tmp_path / "net")
    (net / "train_config.yaml").write_text(text)
    with pytest.raises(BagError, match=r"train_config\.yaml does not say what was trained on"):
        choose_episodes(find_jobs([dataset]), plan_for(tmp_path, net), None)


def test_the_report_says_that_training_episodes_were_evaluated(
    dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(
        "pi05_lab.evaluation.open_loop.episodes._training_data",
        lambda source: [(str(dataset), HELD_OUT, SEED)],
    )
    parser = argparse.ArgumentParser()
    offline_command.add_arguments(parser)

    def evaluate(*more: str) -> tuple[str, dict[str, Any], str]:
        arguments = [str(dataset), "--params-file", str(write_params(tmp_path))]
        arguments += ["--control-every", "0", "--output", str(tmp_path / "out"), *more]
        arguments += ["--checkpoint", "offline_world:oracle"]
        assert offline_command.run(parser.parse_args(arguments)) == 0
        metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
        page = (tmp_path / "out" / "report.html").read_text()
        return " ".join(capsys.readouterr().out.split()), metrics, page

    printed, metrics, page = evaluate()
    assert "3 of 10 episodes, those that the training held out" in printed
    assert metrics["totals"]["recordings"] == 3 and metrics["trained_on"] == {}
    assert "was trained on" not in page
    printed, metrics, page = evaluate("--episodes", "all")
    line = "offline_world:oracle was trained on 7 of these recordings"
    assert line in printed and line in page
    assert len(metrics["trained_on"]["offline_world:oracle"]) == 7
