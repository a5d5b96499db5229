"""Which episodes of a dataset are evaluated, and which of them a policy was trained on."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from pi05_lab.data.lerobot_dataset import LeRobotDataset
from pi05_lab.evaluation.open_loop.bag import BagError
from pi05_lab.evaluation.open_loop.runs import Job, Plan

ALL, HELD_OUT = "all", "held-out"
TRAINING_FILES = "train_config*.yaml"
"""In a checkpoint's folder: what it was trained on, with the seed and fraction of the hold-out."""
_NUMBERS = re.compile(r"\d+(-\d+)?(,\d+(-\d+)?)*")


@dataclass(frozen=True)
class Choice:
    """The recordings to evaluate."""

    jobs: tuple[Job, ...]
    trained_on: dict[str, list[str]]
    """Policy → those of the recordings that it was trained on, by its training configuration."""
    lines: tuple[str, ...]
    """For a person: what was left out."""


def choose_episodes(jobs: Sequence[Job], plan: Plan, wanted: str | None) -> Choice:
    """Choose among the episodes of datasets; bags are all taken.

    Args:
        jobs: all that was found.
        plan: with the policies.
        wanted: "all", "held-out", or numbers as in "0,4-7"; None is "held-out" where a policy's
            training configuration names the dataset, and "all" elsewhere.

    Raises:
        BagError: nothing is left, or `wanted` is none of these.
    """
    numbers = _numbers(wanted)
    trained = _trained_episodes(jobs, plan)
    kept: list[Job] = []
    lines: list[str] = []
    for path in dict.fromkeys(job.path for job in jobs):
        mine = [job for job in jobs if job.path == path]
        if mine[0].episode is None:
            kept += mine
            continue
        by_policy = [episodes for (_, dataset), episodes in trained.items() if dataset == path]
        known, seen = bool(by_policy), set[int]().union(*by_policy)
        if wanted == HELD_OUT and not known:
            raise BagError(
                f"{path}: no policy has a {TRAINING_FILES} that names this dataset, so its "
                "held-out episodes are not known; give --episodes all or numbers"
            )
        if numbers is not None:
            chosen = [job for job in mine if job.episode in numbers]
        elif wanted == ALL or not known:
            chosen = mine
        else:
            chosen = [job for job in mine if job.episode not in seen]
            if not chosen and wanted is None:
                chosen = mine
            if len(chosen) < len(mine):
                lines.append(
                    f"{path}: {len(chosen)} of {len(mine)} episodes, those that the training held "
                    "out; --episodes all takes the others too"
                )
        kept += chosen
    if jobs and not kept:
        raise BagError(f"--episodes {wanted}: no such episode in {jobs[0].path}")
    trained_on = {
        name: names
        for name, _ in plan.policies
        if (names := [j.name for j in kept if j.episode in trained.get((name, j.path), ())])
    }
    return Choice(tuple(kept), trained_on, tuple(lines))


def _numbers(wanted: str | None) -> set[int] | None:
    if wanted is None or wanted in (ALL, HELD_OUT):
        return None
    if _NUMBERS.fullmatch(wanted) is None:
        raise BagError(f"--episodes {wanted!r} must be {ALL}, {HELD_OUT}, or numbers such as 0,4-7")
    found: set[int] = set()
    for part in wanted.split(","):
        first, _, last = part.partition("-")
        found.update(range(int(first), min(int(last or first), int(first) + 10**6) + 1))
    return found


def _trained_episodes(jobs: Sequence[Job], plan: Plan) -> dict[tuple[str, Path], set[int]]:
    """(policy, dataset) → the episodes that the policy was trained on, where it says so."""
    datasets = list(dict.fromkeys(job.path for job in jobs if job.episode is not None))
    found: dict[tuple[str, Path], set[int]] = {}
    if not datasets:
        return found
    for name, source in plan.policies:
        for root, held_out, seed in _training_data(source):
            for dataset in datasets:
                if _is_same(root, dataset):
                    split = LeRobotDataset(dataset, cache_bytes=0).split(held_out, seed)
                    found.setdefault((name, dataset), set()).update(split.train.tolist())
    return found


def _training_data(source: str) -> list[tuple[str, float, int]]:
    """Root, held-out fraction and seed of each dataset that a checkpoint was trained on."""
    module, colon, _ = source.partition(":")
    if colon and module and not source.startswith(("/", ".")):
        return []
    from pi05_ros.policy.checkpoint import checkpoint_folder
    from pi05_ros.policy.weights import CheckpointError

    try:
        folder = checkpoint_folder(source)
    except CheckpointError:
        # every recording's result says so
        return []
    found = []
    for file in sorted(folder.glob(TRAINING_FILES)):
        try:
            document = yaml.safe_load(file.read_text(encoding="utf-8"))
            data, seed = document["data"], int(document["seed"])
            held_out = float(data["held_out"])
            if not 0 <= held_out < 1:
                raise ValueError(f"held_out is {held_out}")
            found += [(str(entry["root"]), held_out, seed) for entry in data["datasets"]]
        except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
            raise BagError(
                f"{file} does not say what was trained on ({' '.join(str(error).split())[:200]}): "
                "correct or remove it"
            ) from None
    return found


def _is_same(root: str, dataset: Path) -> bool:
    """Whether a training's dataset is this one: by its path, or by its name on another machine."""
    trained = Path(root).expanduser()
    return bool(root) and (
        trained.resolve() == dataset.resolve() or trained.name == dataset.resolve().name
    )
