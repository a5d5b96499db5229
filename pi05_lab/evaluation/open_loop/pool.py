"""Evaluates many recordings: in this process, in several, or on a Ray cluster.

Each result is written to its own file as soon as it is there; a run that was killed goes on with
what is missing. A recording that fails, or kills its process, is reported and the others go on.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pi05_lab.evaluation.open_loop.notes import one_line
from pi05_lab.evaluation.open_loop.runs import Job, Plan, evaluate, result_key

KILLED = "its process was killed, by the lack of memory perhaps: try fewer --workers"


class RayUnavailable(RuntimeError):
    """Ray is not installed, or its cluster is not there."""


@dataclass(frozen=True)
class Done:
    """What became of one recording."""

    job: Job
    result: dict[str, Any] | None
    error: str = ""
    resumed: bool = False


def run_jobs(
    jobs: Sequence[Job],
    plan: Plan,
    folder: Path,
    workers: int = 1,
    ray_address: str | None = None,
    fresh: bool = False,
    on_done: Callable[[Done], None] = lambda _: None,
) -> list[Done]:
    """Evaluate all; what became of them, in the order of the jobs.

    Args:
        jobs: recordings.
        plan: how.
        folder: of the results; those of an earlier run that still hold are taken.
        workers: processes; 1 for none but this one.
        ray_address: of a Ray cluster, "auto" or "local"; None for none.
        fresh: take nothing from an earlier run.
        on_done: called for each as it ends.

    Raises:
        RayUnavailable: see there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    identity = plan.identity()
    done: dict[str, Done] = {}
    missing: list[Job] = []
    for job in jobs:
        kept = None if fresh else _read(folder, job, plan, identity)
        if kept is None:
            missing.append(job)
        else:
            done[job.name] = Done(job, kept, resumed=True)
            on_done(done[job.name])
    if ray_address is not None:
        outcomes = _by_ray(missing, plan, ray_address)
    elif min(workers, len(missing)) > 1:
        outcomes = _by_processes(missing, plan, workers)
    else:
        outcomes = (_evaluated(job, plan) for job in missing)
    for outcome in outcomes:
        if outcome.result is not None:
            _write(folder, outcome.job, identity, outcome.result)
            outcome = Done(outcome.job, _as_read(outcome.result))
        done[outcome.job.name] = outcome
        on_done(outcome)
    return [done[job.name] for job in jobs]


def _evaluated(job: Job, plan: Plan) -> Done:
    try:
        return Done(job, evaluate(job, plan))
    except Exception as error:  # one recording's fault must not end the others
        known = isinstance(error, ValueError) and str(error)
        return Done(job, None, " ".join(str(error).split()) if known else one_line(error))


def _by_processes(jobs: Sequence[Job], plan: Plan, workers: int) -> Iterator[Done]:
    """A process that dies takes the pool with it: what is left goes on one at a time."""
    finished: set[str] = set()
    try:
        for outcome in _pooled(jobs, plan, min(workers, len(jobs))):
            finished.add(outcome.job.name)
            yield outcome
        return
    except BrokenProcessPool:
        pass
    for job in jobs:
        if job.name in finished:
            continue
        try:
            yield from _pooled([job], plan, 1)
        except BrokenProcessPool:
            yield Done(job, None, KILLED)


def _pooled(jobs: Sequence[Job], plan: Plan, workers: int) -> Iterator[Done]:
    # torch's and OpenCV's threads do not outlive a fork
    context = multiprocessing.get_context("spawn")
    gpus = visible_gpus() if plan.device in ("auto", "cuda") else []
    pool = ProcessPoolExecutor(workers, context, _start, (gpus, context.Value("i", 0)))
    try:
        futures: list[Future[Done]] = [pool.submit(_evaluated, job, plan) for job in jobs]
        for future in as_completed(futures):
            yield future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [each.strip() for each in named.split(",") if each.strip()]
    try:
        importlib.import_module("pi05_ros.policy.policy")
    except ImportError:
        return []
    # loaded by the policy; counting makes no CUDA context in this process
    torch = sys.modules["torch"]
    return [str(index) for index in range(torch.cuda.device_count())]


def _start(gpus: Sequence[str], started: Any) -> None:
    """Set up a worker: one core, and one of the GPUs, in turn."""
    with started.get_lock():
        index = started.value
        started.value += 1
    if gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[index % len(gpus)]
    # each process has one core for itself
    os.environ["OMP_NUM_THREADS"] = "1"
    # Ctrl-C reaches the whole process group; the parent ends its workers itself
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _by_ray(jobs: Sequence[Job], plan: Plan, address: str) -> Iterator[Done]:
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
    """Ray hides the GPUs from a task that asks for none, and "auto" would then mean the CPU."""
    if plan.device == "cpu":
        return 0
    if ray.cluster_resources().get("GPU", 0) >= 1:
        return 1
    if plan.device == "auto":
        return 0
    raise RayUnavailable(
        f"--device {plan.device}: the Ray cluster has no GPU; add one or give --device cpu"
    )


def _read(folder: Path, job: Job, plan: Plan, identity: str) -> dict[str, Any] | None:
    """The result of an earlier run, if it still holds."""
    wanted = [path for name, path in (*plan.rerun, *plan.foxglove) if name == job.name]
    if not all(Path(path).exists() for path in wanted):
        return None
    try:
        document = json.loads((folder / f"{job.file_name}.json").read_text(encoding="utf-8"))
        result: dict[str, Any] = document["result"]
        return result if document["key"] == result_key(job, identity) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(folder: Path, job: Job, identity: str, result: dict[str, Any]) -> None:
    """A run that is killed in the midst of it leaves no half of a file."""
    path = folder / f"{job.file_name}.json"
    partial = path.with_suffix(".partial")
    document = {"key": result_key(job, identity), "result": result}
    partial.write_text(json.dumps(document, ensure_ascii=False), encoding="utf-8")
    partial.replace(path)


def _as_read(result: dict[str, Any]) -> dict[str, Any]:
    """As it will be when it is read from its file."""
    read: dict[str, Any] = json.loads(json.dumps(result))
    return read
