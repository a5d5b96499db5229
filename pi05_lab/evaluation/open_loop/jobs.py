"""The recordings to evaluate: the bags and episodes in folders, and the choice among episodes."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from pi05_lab.data.bags import SUFFIXES, BagError, is_bag
from pi05_lab.data.lerobot_dataset import LeRobotDataset
from pi05_lab.data.lerobot_format import DatasetError

ALL, HELD_OUT = "all", "held-out"
TRAINING_FILES = "train_config*.yaml"
"""In a checkpoint's folder: its datasets, seed and held-out fraction."""
_NUMBERS = re.compile(r"\d+(-\d+)?(,\d+(-\d+)?)*")


@dataclass(frozen=True)
class Job:
    """One recording: a bag, or an episode of a dataset."""

    name: str
    path: Path
    episode: int | None = None

    @property
    def file_name(self) -> str:
        """The name for a file; different for different names."""
        safe = re.sub(r"[^A-Za-z0-9._-]+", "_", self.name).strip("._") or "recording"
        if safe == self.name:
            return safe
        return f"{safe}-{hashlib.sha256(self.name.encode()).hexdigest()[:8]}"


def names_function(source: str) -> bool:
    """Whether a policy's source is "module:function", which runs code of that module."""
    return ":" in source and not source.startswith(("/", "."))


def find_jobs(paths: Sequence[Path]) -> list[Job]:
    """Bags, datasets, and those in folders, in the order of their names.

    Raises:
        BagError: a path has none.
    """
    if not paths:
        raise BagError("name a recording: a rosbag2, a LeRobot dataset or a folder of them")
    jobs: list[Job] = []
    seen: Counter[str] = Counter()
    for path in paths:
        if not path.exists():
            raise BagError(f"{path} does not exist")
        found = list(_jobs_of(path, path.name or "recording"))
        if not found:
            raise BagError(f"{path}: no rosbag2 and no LeRobot dataset in it")
        for job in found:
            seen[job.name] += 1
            count = seen[job.name]
            jobs.append(replace(job, name=f"{job.name} ({count})") if count > 1 else job)
    return jobs


def _jobs_of(path: Path, name: str) -> Iterator[Job]:
    if (path / "meta" / "info.json").is_file():
        try:
            episodes = LeRobotDataset(path, cache_bytes=0).episodes.tolist()
        except DatasetError as error:
            raise BagError(str(error)) from None
        yield from (Job(f"{name}#{episode}", path, int(episode)) for episode in episodes)
    elif is_bag(path) and not _has_loose_bags(path):
        yield Job(name, path)
    elif path.is_dir():
        for child in sorted(path.iterdir()):
            if (child.is_dir() and not child.name.startswith(".")) or child.suffix in SUFFIXES:
                label = child.stem if child.is_file() else child.name
                yield from _jobs_of(child, f"{name}/{label}")


def _has_loose_bags(path: Path) -> bool:
    """Whether a folder has several bags' files, not the parts of one: name_0, name_1."""
    if path.is_file() or (path / "metadata.yaml").is_file():
        return False
    stems = {file.stem for file in path.iterdir() if file.suffix in SUFFIXES}
    return len({re.sub(r"_\d+$", "", stem) for stem in stems}) > 1


@dataclass(frozen=True)
class Choice:
    """The recordings to evaluate."""

    jobs: list[Job]
    trained_on: dict[str, list[str]]
    """Policy → the chosen recordings that it was trained on, by its training configuration."""
    lines: list[str]
    """Messages about episodes that are left out."""


def choose_episodes(jobs: Sequence[Job], policies: Mapping[str, str], wanted: str | None) -> Choice:
    """Choose episodes of datasets; all bags are kept.

    Args:
        jobs: all recordings.
        policies: name in the report → source.
        wanted: "all", "held-out", or numbers as in "0,4-7"; None is "held-out" where a policy's
            training configuration names the dataset, else "all".

    Raises:
        BagError: no episode matches, or `wanted` is invalid.
    """
    numbers = _numbers(wanted)
    trained = _trained_episodes(jobs, policies)
    kept: list[Job] = []
    lines: list[str] = []
    for path in dict.fromkeys(job.path for job in jobs):
        chosen = mine = [job for job in jobs if job.path == path]
        by_policy = [episodes for (_, dataset), episodes in trained.items() if dataset == path]
        if mine[0].episode is None:
            pass
        elif numbers is not None:
            chosen = [job for job in mine if job.episode in numbers]
        elif wanted == HELD_OUT and not by_policy:
            raise BagError(
                f"{path}: no policy has a {TRAINING_FILES} that names this dataset, so its "
                "held-out episodes are not known; give --episodes all or numbers"
            )
        elif wanted != ALL and by_policy:
            seen = set[int]().union(*by_policy)
            chosen = [job for job in mine if job.episode not in seen]
            if not chosen and wanted is None:
                chosen = mine
            if len(chosen) < len(mine):
                lines.append(
                    f"{path}: {len(chosen)} of {len(mine)} episodes, those that the training held "
                    "out; --episodes all adds the others"
                )
        kept += chosen
    if jobs and not kept:
        raise BagError(f"--episodes {wanted}: no such episode in {jobs[0].path}")
    trained_on = {
        name: names
        for name in policies
        if (names := [j.name for j in kept if j.episode in trained.get((name, j.path), ())])
    }
    return Choice(kept, trained_on, lines)


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


def _trained_episodes(
    jobs: Sequence[Job], policies: Mapping[str, str]
) -> dict[tuple[str, Path], set[int]]:
    """(policy, dataset) → the episodes that the policy was trained on, where this is known."""
    datasets = list(dict.fromkeys(job.path for job in jobs if job.episode is not None))
    found: dict[tuple[str, Path], set[int]] = {}
    for name, source in policies.items() if datasets else ():
        for root, held_out, seed in _training_data(source):
            trained = Path(root).expanduser()
            for dataset in datasets if root else ():
                # The dataset of a training on another machine is known by its name.
                whole = dataset.resolve()
                if trained.resolve() == whole or trained.name == whole.name:
                    split = LeRobotDataset(dataset, cache_bytes=0).split(held_out, seed)
                    found.setdefault((name, dataset), set()).update(split.train.tolist())
    return found


def _training_data(source: str) -> list[tuple[str, float, int]]:
    """Root, held-out fraction and seed of each dataset that a checkpoint was trained on."""
    if names_function(source):
        return []
    from pi05_ros.policy.checkpoint import checkpoint_folder
    from pi05_ros.policy.weights import CheckpointError

    try:
        folder = checkpoint_folder(source)
    except CheckpointError:
        # Every recording's result reports it.
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
                f"{file}: no data, seed and held-out fraction of a training "
                f"({' '.join(str(error).split())[:200]}): correct or remove it"
            ) from None
    return found
