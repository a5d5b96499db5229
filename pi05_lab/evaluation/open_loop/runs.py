"""What is to be evaluated, and how one recording of it is."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pi05_lab.data.lerobot_format import DatasetError
from pi05_lab.evaluation.open_loop.bag import SUFFIXES, Bag, BagError, is_bag
from pi05_lab.evaluation.open_loop.dataset import DatasetRecording, is_dataset
from pi05_lab.evaluation.open_loop.evaluator import OfflineEvaluation, Sink
from pi05_lab.evaluation.open_loop.identity import (
    code_identity,
    content,
    file_stamps,
    policy_identity,
)
from pi05_lab.evaluation.open_loop.notes import Notes
from pi05_lab.evaluation.open_loop.settings import OfflineSettings
from pi05_lab.evaluation.open_loop.sources import BagRecording, Recording
from pi05_lab.evaluation.open_loop.topics import EvaluatedRobot, read_evaluated_robot
from pi05_ros.types import Policy

_MAX_ASKED = 200
"""Recordings that are looked into for other instructions."""


@dataclass(frozen=True)
class Job:
    """One recording: a bag, or an episode of a dataset."""

    name: str
    path: Path
    episode: int | None = None

    @property
    def file_name(self) -> str:
        """The name as that of a file; different for different names."""
        safe = re.sub(r"[^A-Za-z0-9._-]+", "_", self.name).strip("._") or "recording"
        if safe == self.name:
            return safe
        return f"{safe}-{hashlib.sha256(self.name.encode()).hexdigest()[:8]}"


@dataclass(frozen=True)
class Plan:
    """What is the same for all recordings."""

    policies: tuple[tuple[str, str], ...]
    """Name in the report, and what `load_policy` takes."""
    settings: OfflineSettings = field(default_factory=OfflineSettings)
    params_file: str | None = None
    namespace: str = ""
    instruction: str | None = None
    device: str = "auto"
    num_steps: int | None = None
    threads: int | None = 1
    rerun: tuple[tuple[str, str], ...] = ()
    """Recording → file to write."""
    foxglove: tuple[tuple[str, str], ...] = ()
    urdf: str | None = None

    def robot(self) -> EvaluatedRobot:
        return read_evaluated_robot(self.params_file, self.namespace, urdf=self.urdf)

    def identity(self) -> str:
        """Changes with whatever all results depend on: settings, files, checkpoints, code."""
        kept = {
            k: v for k, v in asdict(self).items() if k not in ("rerun", "foxglove", "params_file")
        }
        state = {
            "plan": kept,
            "files": [content(f) for f in (self.params_file, self.urdf, self.robot().robot)],
            "policies": [policy_identity(source) for _, source in self.policies],
            "code": code_identity(),
        }
        return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def result_key(job: Job, identity: str) -> str:
    """Changes with whatever a recording's result depends on; `identity` is the plan's."""
    state = [identity, str(job.path.absolute()), job.episode, file_stamps(job.path)]
    return hashlib.sha256(json.dumps(state).encode()).hexdigest()


def find_jobs(paths: Sequence[Path]) -> list[Job]:
    """Bags, datasets, and folders of either, in the order of their names.

    Raises:
        BagError: a path with none.
    """
    if not paths:
        raise BagError("name a recording: a rosbag2, a LeRobot dataset or a folder of them")
    jobs: list[Job] = []
    for path in paths:
        if not path.exists():
            raise BagError(f"{path} does not exist")
        found = list(_jobs_of(path, path.name or "recording"))
        if not found:
            raise BagError(f"{path}: no rosbag2 and no LeRobot dataset in it")
        jobs += found
    seen: dict[str, int] = {}
    unique = []
    for job in jobs:
        seen[job.name] = seen.get(job.name, 0) + 1
        again = f"{job.name} ({seen[job.name]})" if seen[job.name] > 1 else job.name
        unique.append(Job(again, job.path, job.episode))
    return unique


def _jobs_of(path: Path, name: str) -> Iterable[Job]:
    if is_dataset(path):
        yield from _dataset_jobs(path, name)
    elif is_bag(path) and not _is_folder_of_files(path):
        yield Job(name, path)
    elif path.is_dir():
        for child in sorted(path.iterdir()):
            if (child.is_dir() and not child.name.startswith(".")) or child.suffix in SUFFIXES:
                label = child.stem if child.is_file() else child.name
                yield from _jobs_of(child, f"{name}/{label}")


def _dataset_jobs(path: Path, name: str) -> Iterable[Job]:
    from pi05_lab.data.lerobot_dataset import LeRobotDataset

    try:
        episodes = LeRobotDataset(path, cache_bytes=0).episodes.tolist()
    except DatasetError as error:
        raise BagError(str(error)) from None
    for episode in episodes:
        yield Job(f"{name}#{episode}", path, int(episode))


def _is_folder_of_files(path: Path) -> bool:
    """Loose bags beside each other, not the parts of one, which are numbered: name_0, name_1."""
    if path.is_file() or (path / "metadata.yaml").is_file():
        return False
    stems = {file.stem for file in path.iterdir() if file.suffix in SUFFIXES}
    return len({re.sub(r"_\d+$", "", stem) for stem in stems}) > 1


def open_recording(job: Job, plan: Plan, robot: EvaluatedRobot) -> Recording:
    """The recording of a job.

    Raises:
        BagError: it cannot be used at all.
    """
    notes = Notes()
    if job.episode is not None:
        return DatasetRecording(job.name, job.path, job.episode, robot, notes, plan.instruction)
    return BagRecording(job.name, Bag(job.path, notes), robot, notes, plan.instruction)


def evaluate(job: Job, plan: Plan) -> dict[str, Any]:
    """Evaluate one recording; see `OfflineEvaluation.run`.

    Raises:
        BagError: it cannot be used at all.
        CheckpointError: a policy that cannot be loaded.
    """
    robot = plan.robot()
    recording = open_recording(job, plan, robot)
    policies = {name: _policy(source, plan, robot) for name, source in plan.policies}
    sinks = _sinks(job, plan, robot)
    whole = False
    try:
        result = OfflineEvaluation(recording, policies, robot, plan.settings, sinks).run()
        whole = True
        return result
    finally:
        for sink in sinks:
            sink.close(whole)


def _sinks(job: Job, plan: Plan, robot: EvaluatedRobot) -> list[Sink]:
    sinks: list[Sink] = []
    for wanted, path in plan.rerun:
        if wanted == job.name:
            from pi05_lab.evaluation.open_loop.rerun import RerunFile

            sinks.append(RerunFile(Path(path), job.name, robot.config.joints.names))
    for wanted, path in plan.foxglove:
        if wanted == job.name:
            from pi05_lab.evaluation.open_loop.export import FoxgloveFile

            sinks.append(FoxgloveFile(Path(path), robot))
    return sinks


def _policy(source: str, plan: Plan, robot: EvaluatedRobot) -> Policy:
    key = (source, plan.params_file, plan.device, plan.num_steps, plan.settings.seed)
    if key not in _loaded:
        from pi05_lab.evaluation.open_loop.policy import load_policy

        parameters = robot.config.parameters
        _loaded[key] = load_policy(
            source,
            robot.robot,
            device=plan.device,
            dtype=None if parameters.dtype == "auto" else parameters.dtype,
            num_steps=plan.num_steps or parameters.num_steps,
            guidance=vars(robot.config.guidance),
            seed=plan.settings.seed,
            threads=plan.threads,
        )
    return _loaded[key]


_loaded: dict[tuple[Any, ...], Policy] = {}
"""Policies of this process."""


def instructions_of(jobs: Sequence[Job], plan: Plan) -> tuple[str, ...]:
    """The first instruction of each recording, to have others to compare with."""
    robot = plan.robot()
    found: set[str] = set()
    for job in jobs[:_MAX_ASKED]:
        try:
            recording = open_recording(job, plan, robot)
            text = recording.first_instruction()
        except BagError:
            continue
        if text:
            found.add(text.strip())
    return tuple(sorted(found))
