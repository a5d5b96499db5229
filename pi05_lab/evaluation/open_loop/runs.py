"""Evaluates many recordings: in this process, in several, or on a Ray cluster.

Each result becomes a file as soon as it is complete; a run that was interrupted continues with
the missing ones. A recording that fails, or kills its process, is reported and the others continue.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

from pi05_lab.data.bags import Bag, BagError, Notes, one_line
from pi05_lab.data.recording import BagRecording, DatasetRecording, Recording
from pi05_lab.data.topics import EvaluatedRobot, read_evaluated_robot
from pi05_lab.evaluation.open_loop.conditions import EvaluationSettings
from pi05_lab.evaluation.open_loop.evaluator import OpenLoopEvaluation, Sink
from pi05_lab.evaluation.open_loop.identity import (
    code_identity,
    content,
    digest,
    file_stamps,
    policy_identity,
)  # fmt: skip
from pi05_lab.evaluation.open_loop.jobs import Job, names_function
from pi05_lab.evaluation.open_loop.results import RecordingResult, from_json, to_json
from pi05_lab.files import atomic_file
from pi05_lab.parallel import KILLED, WorkerDied, run_tasks
from pi05_lab.seeded_policy import SeededPolicy
from pi05_ros.types import Policy

_MAX_READ = 200
"""Recordings that are searched for other instructions."""


class RayUnavailable(RuntimeError):
    """Ray is not installed, or its cluster cannot be reached."""


@dataclass(frozen=True)
class Plan:
    """What all recordings have in common."""

    policies: Mapping[str, str]
    """Name in the report → source for `load_policy`."""
    settings: EvaluationSettings = field(default_factory=EvaluationSettings)
    params_file: str | None = None
    namespace: str = ""
    instruction: str | None = None
    device: str = "auto"
    num_steps: int | None = None
    head: str | None = None
    threads: int | None = 1
    rerun: Mapping[str, str] = field(default_factory=dict)
    """Recording → file to write."""
    foxglove: Mapping[str, str] = field(default_factory=dict)
    urdf: str | None = None

    def robot(self) -> EvaluatedRobot:
        return read_evaluated_robot(self.params_file, self.namespace, urdf=self.urdf)

    def identity(self) -> str:
        """A digest of what all results depend on: settings, files, checkpoints, code."""
        kept = asdict(self)
        for name in ("rerun", "foxglove", "params_file"):
            del kept[name]
        files = [content(f) for f in (self.params_file, self.urdf, self.robot().robot)]
        policies = map(policy_identity, self.policies.values())
        return digest([json.dumps(kept), *files, *policies, code_identity()])


@dataclass(frozen=True)
class Done:
    """The outcome of one recording."""

    job: Job
    result: RecordingResult | None
    error: str = ""
    resumed: bool = False


def open_recording(job: Job, plan: Plan, robot: EvaluatedRobot) -> Recording:
    """The recording of a job.

    Raises:
        BagError: it cannot be used at all.
    """
    notes = Notes()
    if job.episode is not None:
        return DatasetRecording(job.name, job.path, job.episode, robot, notes, plan.instruction)
    return BagRecording(job.name, Bag(job.path, notes), robot, notes, plan.instruction)


def instructions_of(jobs: Sequence[Job], plan: Plan) -> tuple[str, ...]:
    """The first instruction of each recording, as wrong instructions for the others."""
    robot = plan.robot()
    found: set[str] = set()
    for job in jobs[:_MAX_READ]:
        try:
            found.add((open_recording(job, plan, robot).first_instruction() or "").strip())
        except BagError:
            continue
    return tuple(sorted(found - {""}))


def load_policy(
    source: str,
    robot: str,
    *,
    device: str = "auto",
    dtype: str | None = None,
    num_steps: int | None = None,
    guidance: Mapping[str, Any] | None = None,
    seed: int = 0,
    threads: int | None = None,
    head: str | None = None,
) -> Policy:
    """A policy by name: folder, Hugging Face id, "small", or "module:function" that returns one.

    `guidance` are the node's parameters `guidance.*`, `seed` is that of the noise, the others are
    those of `Policy.from_pretrained`.

    Raises:
        CheckpointError: not a usable checkpoint.
        ValueError: no such function, or an unknown robot or device.
    """
    if names_function(source):
        module, _, name = source.partition(":")
        try:
            made: Policy = getattr(importlib.import_module(module), name)()
        except (ImportError, AttributeError) as error:
            raise ValueError(
                f'{source!r} must be "module:function" of an installed module: {error}'
            ) from None
        return made
    from pi05_ros.adapters.factory import open_policy

    policy = open_policy(
        source,
        robot,
        device=device,
        seed=seed,
        threads=threads,
        dtype=dtype,
        num_steps=num_steps,
        guidance=guidance or {},
        head=head,
    )
    return cast("Policy", SeededPolicy(policy, seed))


_loaded: dict[tuple[Any, ...], Policy] = {}
"""The policies of this process."""


def _policy(source: str, plan: Plan, robot: EvaluatedRobot) -> Policy:
    key = (source, plan.params_file, plan.device, plan.num_steps, plan.head, plan.settings.seed)
    if key not in _loaded:
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
            head=plan.head or (None if parameters.head == "auto" else parameters.head),
        )
    return _loaded[key]


def evaluate(job: Job, plan: Plan) -> RecordingResult:
    """Evaluate one recording.

    Raises:
        BagError: it cannot be used at all.
        CheckpointError: a policy that cannot be loaded.
    """
    robot = plan.robot()
    recording = open_recording(job, plan, robot)
    policies = {name: _policy(source, plan, robot) for name, source in plan.policies.items()}
    sinks: list[Sink] = []
    if job.name in plan.rerun:
        from pi05_lab.evaluation.open_loop.export import RerunFile

        sinks.append(RerunFile(Path(plan.rerun[job.name]), job.name, robot.config.joints.names))
    if job.name in plan.foxglove:
        from pi05_lab.evaluation.open_loop.export import FoxgloveFile

        sinks.append(FoxgloveFile(Path(plan.foxglove[job.name]), robot))
    result = None
    try:
        result = OpenLoopEvaluation(recording, policies, robot, plan.settings, sinks).run()
        return result
    finally:
        for sink in sinks:
            sink.close(whole=result is not None)


def run_jobs(
    jobs: Sequence[Job],
    plan: Plan,
    folder: Path,
    workers: int = 1,
    ray_address: str | None = None,
    fresh: bool = False,
    on_done: Callable[[Done], None] = lambda _: None,
) -> list[Done]:
    """Evaluate all recordings; their outcomes in the order of the jobs.

    Args:
        jobs: recordings.
        plan: what they have in common.
        folder: of the results; valid ones of an earlier run are reused.
        workers: processes; 1 uses this one.
        ray_address: of a Ray cluster, "auto" or "local"; None uses none.
        fresh: reuse nothing.
        on_done: called for each recording at its end.

    Raises:
        RayUnavailable: Ray is not installed, or has no cluster at the address.
    """
    folder.mkdir(parents=True, exist_ok=True)
    identity = plan.identity()
    keys = {job: _result_key(job, identity) for job in jobs}
    done: dict[Job, Done] = {}
    for job in jobs:
        kept = None if fresh else _read(folder, job, plan, keys[job])
        if kept is not None:
            done[job] = Done(job, kept, resumed=True)
            on_done(done[job])
    missing = [job for job in jobs if job not in done]
    by_ray = ray_address is not None
    for outcome in _by_ray(missing, plan, ray_address) if by_ray else _run(missing, plan, workers):
        job = outcome.job
        if outcome.result is not None:
            document = {"key": keys[job], "result": to_json(outcome.result)}
            with atomic_file(folder / f"{job.file_name}.json") as path:
                path.write_text(json.dumps(document, ensure_ascii=False), encoding="utf-8")
        done[job] = outcome
        on_done(outcome)
    return [done[job] for job in jobs]


def _read(folder: Path, job: Job, plan: Plan, key: str) -> RecordingResult | None:
    """The result of an earlier run, if it is still valid."""
    files = [exports[job.name] for exports in (plan.rerun, plan.foxglove) if job.name in exports]
    if not all(Path(file).exists() for file in files):
        return None
    try:
        document = json.loads((folder / f"{job.file_name}.json").read_text(encoding="utf-8"))
        valid = document["key"] == key
        return from_json(RecordingResult, document["result"]) if valid else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _result_key(job: Job, identity: str) -> str:
    """A digest of what a recording's result depends on; `identity` is the plan's."""
    return digest([identity, str(job.path.absolute()), repr((job.episode, file_stamps(job.path)))])


def _evaluated(job: Job, plan: Plan) -> Done:
    try:
        return Done(job, evaluate(job, plan))
    except Exception as error:  # one recording's failure must not end the others
        known = isinstance(error, ValueError) and str(error)
        return Done(job, None, " ".join(str(error).split()) if known else one_line(error))


def _evaluator(plan: Plan) -> Callable[[Job], Done]:
    return partial(_evaluated, plan=plan)


def _run(jobs: Sequence[Job], plan: Plan, workers: int) -> Iterator[Done]:
    """In this process or several; after one has died, the remaining jobs get one process each."""
    several = min(workers, len(jobs)) > 1
    gpus = visible_gpus() if several and plan.device in ("auto", "cuda") else []
    make = partial(_evaluator, plan)
    finished: set[str] = set()
    try:
        for outcome in run_tasks(make, jobs, workers, ordered=False, gpus=gpus):
            finished.add(outcome.job.name)
            yield outcome
    except WorkerDied:
        for job in jobs:
            if job.name in finished:
                continue
            try:
                yield from run_tasks(make, [job], isolated=True, gpus=gpus)
            except WorkerDied:
                yield Done(job, None, KILLED)


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [each.strip() for each in named.split(",") if each.strip()]
    try:
        importlib.import_module("pi05_ros.policy.policy")
    except ImportError:
        return []
    # Counting the GPUs creates no CUDA context in this process.
    torch = sys.modules["torch"]
    return [str(index) for index in range(torch.cuda.device_count())]


def _by_ray(jobs: Sequence[Job], plan: Plan, address: str | None) -> Iterator[Done]:
    try:
        ray: Any = importlib.import_module("ray")
    except ImportError:
        raise RayUnavailable("--ray needs Ray: pip install 'pi05_ros[ray]'") from None
    try:
        ray.init(address=address, ignore_reinit_error=True, log_to_driver=False)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise RayUnavailable(f"no Ray cluster at {address!r}: {error}") from None
    try:
        gpus = _gpus_per_task(ray, plan)
        remote = ray.remote(max_retries=1, num_gpus=gpus)(_evaluated)
        waiting = {remote.remote(job, plan): job for job in jobs}
        while waiting:
            ready, _ = ray.wait(list(waiting), num_returns=1)
            job = waiting.pop(ready[0])
            try:
                yield ray.get(ready[0])
            except ray.exceptions.RayError as error:
                yield Done(job, None, f"Ray: {' '.join(str(error).split())[:300]}")
    finally:
        ray.shutdown()


def _gpus_per_task(ray: Any, plan: Plan) -> int:
    """Ray hides the GPUs from a task that requests none; "auto" would then mean the CPU."""
    if plan.device == "cpu":
        return 0
    if ray.cluster_resources().get("GPU", 0) >= 1:
        return 1
    if plan.device == "auto":
        return 0
    raise RayUnavailable(
        f"--device {plan.device}: the Ray cluster has no GPU; add one or give --device cpu"
    )
