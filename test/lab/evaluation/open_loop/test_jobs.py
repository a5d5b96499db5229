"""Fault pinned: figures on training data that look like figures on new situations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from offline_world import (  # type: ignore[import-not-found]
    write_bag,
    write_dataset,
    write_params,
)

from pi05_lab.data.bags import BagError
from pi05_lab.data.lerobot_dataset import LeRobotDataset
from pi05_lab.evaluation.open_loop.jobs import Job, choose_episodes, find_jobs
from pi05_ros.cli import main

COUNT, HELD_OUT, SEED = 10, 0.3, 4


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "demonstrations"
    return write_dataset(root, 20, *["wave"] * COUNT)


def checkpoint(folder: Path, *roots: object, **changes: Any) -> Path:
    """A checkpoint's folder with its training configuration alone."""
    folder.mkdir(exist_ok=True)
    data = {"datasets": [{"root": str(r)} for r in roots], "held_out": HELD_OUT}
    (folder / "train_config.yaml").write_text(
        yaml.safe_dump({"data": data, "seed": SEED} | changes)
    )
    return folder


def policies(*sources: Path | str) -> dict[str, str]:
    return {Path(source).name: str(source) for source in sources}


def episodes(jobs: list[Job]) -> list[int | None]:
    return [job.episode for job in jobs]


@pytest.mark.parametrize("moved", [False, True])
def test_held_out_episodes_are_the_default(moved: bool, dataset: Path, tmp_path: Path) -> None:
    """Also for a checkpoint of another machine, whose dataset has the same name."""
    root = "/elsewhere/demonstrations" if moved else dataset
    net = policies(checkpoint(tmp_path / "net", root))
    choice = choose_episodes(find_jobs([dataset]), net, None)
    split = LeRobotDataset(dataset).split(HELD_OUT, SEED)
    count = len(split.held_out)
    assert episodes(choice.jobs) == split.held_out.tolist() and 1 <= count < COUNT
    assert choice.trained_on == {}
    assert choice.lines == [
        f"{dataset}: {count} of 10 episodes, those that the training held out; --episodes all adds "
        "the others"
    ]


def test_all_episodes_include_the_trained_ones_by_name(dataset: Path, tmp_path: Path) -> None:
    net = policies(checkpoint(tmp_path / "net", dataset))
    choice = choose_episodes(find_jobs([dataset]), net, "all")
    assert episodes(choice.jobs) == list(range(COUNT))
    trained = LeRobotDataset(dataset).split(HELD_OUT, SEED).train.tolist()
    assert choice.trained_on == {"net": [f"demonstrations#{k}" for k in trained]}
    assert choice.lines == []


def test_training_episodes_of_either_policy_are_left_out(dataset: Path, tmp_path: Path) -> None:
    one = checkpoint(tmp_path / "one", dataset)
    two = checkpoint(tmp_path / "two", dataset, seed=SEED + 1)
    choice = choose_episodes(find_jobs([dataset]), policies(one, two), None)
    held = [
        set(LeRobotDataset(dataset).split(HELD_OUT, s).held_out.tolist()) for s in (SEED, SEED + 1)
    ]
    both = sorted(held[0] & held[1])
    # With none in common all are evaluated, and the report names the trained policies.
    assert episodes(choice.jobs) == (both or list(range(COUNT)))
    assert bool(choice.trained_on) == (not both)


def test_numbers_choose_episodes(dataset: Path, tmp_path: Path) -> None:
    net = policies("offline_world:oracle")
    choice = choose_episodes(find_jobs([dataset]), net, "0,4-6")
    assert episodes(choice.jobs) == [0, 4, 5, 6]


def test_bags_and_unknown_datasets_are_complete(dataset: Path, tmp_path: Path) -> None:
    bag = write_bag(tmp_path / "bag", 0.2)
    net = policies(checkpoint(tmp_path / "net", "data/others"))
    choice = choose_episodes(find_jobs([bag, dataset]), net, None)
    assert episodes(choice.jobs) == [None, *range(COUNT)] and not choice.lines


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("held-out", "no policy has a train_config"),
        ("some", "must be all, held-out, or numbers"),
        ("77", "--episodes 77: no such episode"),
    ],
)
def test_an_invalid_choice_is_named(
    wanted: str, message: str, dataset: Path, tmp_path: Path
) -> None:
    with pytest.raises(BagError, match=message):
        choose_episodes(find_jobs([dataset]), policies("offline_world:oracle"), wanted)


@pytest.mark.parametrize(
    "text", ["data: 3", "- 1", "data: {datasets: [{}]}", "seed: [", "data: {}"]
)
def test_an_unusable_training_configuration_is_named(
    text: str, dataset: Path, tmp_path: Path
) -> None:
    net = checkpoint(tmp_path / "net")
    (net / "train_config.yaml").write_text(text)
    with pytest.raises(BagError, match=r"train_config\.yaml: no data, seed and held-out fraction"):
        choose_episodes(find_jobs([dataset]), policies(net), None)


def test_the_report_says_that_training_episodes_were_evaluated(
    dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(
        "pi05_lab.evaluation.open_loop.jobs._training_data",
        lambda source: [(str(dataset), HELD_OUT, SEED)],
    )
    for plot in ("error_plot", "joint_plot"):
        monkeypatch.setattr(f"pi05_lab.evaluation.open_loop.report.{plot}", lambda *_: "")

    def evaluate(*more: str) -> tuple[str, dict[str, Any], str]:
        arguments = [str(dataset), "--params-file", str(write_params(tmp_path))]
        arguments += ["--control-every", "0", "--output", str(tmp_path / "out"), *more]
        arguments += ["--checkpoint", "offline_world:oracle"]
        assert main(["evaluate", *arguments]) == 0
        metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
        page = (tmp_path / "out" / "report.html").read_text()
        return " ".join(capsys.readouterr().out.split()), metrics, page

    printed, metrics, page = evaluate()
    held_out = len(LeRobotDataset(dataset).split(HELD_OUT, SEED).held_out)
    assert f"{held_out} of 10 episodes, those that the training held out" in printed
    assert metrics["totals"]["recordings"] == held_out and metrics["trained_on"] == {}
    assert "was trained on" not in page
    printed, metrics, page = evaluate("--episodes", "all")
    trained = COUNT - held_out
    line = f"offline_world:oracle was trained on {trained} of these recordings"
    assert line in printed and line in page
    assert len(metrics["trained_on"]["offline_world:oracle"]) == trained
