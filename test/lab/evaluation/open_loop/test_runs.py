"""Faults pinned: one bad recording ends a run of many, an interrupted run starts again, the report
depends on the number of processes, results of another plan are reused.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from offline_world import make_plan, write_bag  # type: ignore[import-not-found]

from pi05_lab.data.bags import BagError
from pi05_lab.evaluation.open_loop import runs
from pi05_lab.evaluation.open_loop.jobs import Job, find_jobs
from pi05_lab.evaluation.open_loop.results import RecordingResult, to_json
from pi05_lab.evaluation.open_loop.runs import (
    KILLED,
    Done,
    Plan,
    RayUnavailable,
    instructions_of,
    run_jobs,
)
from pi05_lab.evaluation.open_loop.summary import summarize


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three valid bags, one with invalid content, one cut short."""
    folder = tmp_path_factory.mktemp("folder")
    for k, text in enumerate(("wave", "bow", "wave")):
        write_bag(folder / f"good{k}", 1.0 + 0.25 * k, lambda _, text=text: text)
    write_bag(folder / "bad", 1.0)
    next((folder / "bad").glob("*.mcap")).write_bytes(b"nothing")
    file = next(write_bag(folder / "short", 1.5).glob("*.mcap"))
    file.write_bytes(file.read_bytes()[: file.stat().st_size - 4000])
    return folder


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return make_plan(tmp_path, control_every=3, others=("wave", "bow"))


def outcome(done: list[Done], plan: Plan) -> list[str]:
    """Everything that the report shows."""
    results = [each.result for each in done if each.result is not None]
    failed = {each.job.name: each.error for each in done if each.result is None}
    summary = summarize(results, failed, plan.robot().config.joints, {"delay_s": 0.1})
    return [json.dumps(to_json(each)) for each in (summary, *results)]


def test_jobs_of_a_folder_are_its_bags_by_name(folder: Path, tmp_path: Path) -> None:
    names = [job.name for job in find_jobs([folder])]
    label = folder.name
    assert names == [f"{label}/{n}" for n in ("bad", "good0", "good1", "good2", "short")]
    assert [job.name for job in find_jobs([folder / "good0", folder / "good0"])] == [
        "good0",
        "good0 (2)",
    ]
    assert len({job.file_name for job in find_jobs([folder])}) == 5
    assert Job("a/b", folder).file_name != Job("a_b", folder).file_name
    with pytest.raises(BagError, match="no rosbag2 and no LeRobot dataset"):
        find_jobs([tmp_path])
    with pytest.raises(BagError, match="does not exist"):
        find_jobs([tmp_path / "nowhere"])


def test_loose_files_are_bags_of_their_own_and_numbered_parts_are_one(tmp_path: Path) -> None:
    file = next(write_bag(tmp_path / "bag", 0.2).glob("*.mcap"))
    for folder, names in (("parts", ("run_0", "run_1")), ("loose", ("monday", "tuesday"))):
        (tmp_path / folder).mkdir()
        for name in names:
            (tmp_path / folder / f"{name}.mcap").write_bytes(file.read_bytes())
    assert [job.name for job in find_jobs([tmp_path / "parts"])] == ["parts"]
    assert [job.name for job in find_jobs([tmp_path / "loose"])] == [
        "loose/monday",
        "loose/tuesday",
    ]


def test_other_instructions_are_those_of_all_recordings(folder: Path, plan: Plan) -> None:
    assert instructions_of(find_jobs([folder]), plan) == ("bow", "wave")


@pytest.mark.slow
def test_the_report_is_the_same_for_one_process_and_for_two(
    folder: Path, plan: Plan, tmp_path: Path
) -> None:
    jobs = find_jobs([folder])
    finished: list[str] = []
    alone = run_jobs(
        jobs, plan, tmp_path / "one", on_done=lambda done: finished.append(done.job.name)
    )
    assert finished == [job.name for job in jobs]
    assert [done.result is not None for done in alone] == [False, True, True, True, True]
    assert "nothing" not in alone[0].error and alone[0].error
    result = alone[4].result
    assert result and any("cut short" in note.text for note in result.notes)
    several = run_jobs(jobs, plan, tmp_path / "two", workers=2)
    assert outcome(several, plan) == outcome(alone, plan)


def test_an_interrupted_run_continues_with_the_missing_recordings(
    folder: Path, plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = [job for job in find_jobs([folder]) if "good" in job.name]
    evaluated: list[str] = []
    really = runs.evaluate
    limit = 2

    def evaluate(job: Job, plan: Plan) -> RecordingResult:
        if len(evaluated) == limit:
            raise KeyboardInterrupt
        evaluated.append(job.name)
        return really(job, plan)

    monkeypatch.setattr(runs, "evaluate", evaluate)
    with pytest.raises(KeyboardInterrupt):
        run_jobs(jobs, plan, tmp_path / "out")
    # An incomplete file.
    (tmp_path / "out" / f"{jobs[2].file_name}.json").write_text('{"key": "x", "resul')
    limit = 9
    done = run_jobs(jobs, plan, tmp_path / "out")
    assert evaluated == [job.name for job in jobs]
    assert [each.resumed for each in done] == [True, True, False]
    fresh = run_jobs(jobs, plan, tmp_path / "other")
    assert outcome(done, plan) == outcome(fresh, plan)


def test_results_of_another_plan_or_recording_are_not_reused(plan: Plan, tmp_path: Path) -> None:
    job = Job("bag", write_bag(tmp_path / "bag", 1.0))
    run_jobs([job], plan, tmp_path / "out")

    def resumed(plan: Plan, **options: bool) -> bool:
        return run_jobs([job], plan, tmp_path / "out", **options)[0].resumed  # type: ignore[arg-type]

    assert resumed(plan)
    assert resumed(replace(plan, foxglove={"another": "x.mcap"}))
    assert not resumed(replace(plan, foxglove={"bag": str(tmp_path / "x.mcap")}))
    assert not resumed(replace(plan, settings=replace(plan.settings, every_s=0.3)))
    assert not resumed(plan)
    assert not resumed(plan, fresh=True)
    params = Path(str(plan.params_file))
    params.write_text(params.read_text().replace("latest", "blend"))
    assert not resumed(plan)
    assert resumed(plan)
    (tmp_path / "bag" / "metadata.yaml").touch()
    assert not resumed(plan)


@pytest.mark.slow
def test_a_recording_that_kills_its_process_is_reported_and_the_others_continue(
    tmp_path: Path,
) -> None:
    for k, text in enumerate(("kill", "wave")):
        write_bag(tmp_path / "bags" / str(k), 0.4, lambda _, text=text: text)
    plan = make_plan(tmp_path, "deadly", control_every=0)
    done = run_jobs(find_jobs([tmp_path / "bags"]), plan, tmp_path / "out", workers=2)
    assert [each.error for each in done] == [KILLED, ""]
    assert done[1].result is not None


def test_ray_that_is_not_installed_is_named(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    job = Job("bag", write_bag(tmp_path / "bag", 0.2))
    with pytest.raises(RayUnavailable, match=r"pip install 'pi05_ros\[ray\]'"):
        run_jobs([job], plan, tmp_path / "out", ray_address="local")


def put_ray(monkeypatch: pytest.MonkeyPatch, gpus: dict[str, float], **functions: Any) -> None:
    """A stub replaces Ray, which is an optional extra."""
    errors = SimpleNamespace(RayError=OSError)
    resources = {"CPU": 4.0, **gpus}
    stub = SimpleNamespace(cluster_resources=lambda: resources, exceptions=errors, **functions)
    monkeypatch.setitem(sys.modules, "ray", stub)


@pytest.mark.parametrize(
    ("gpus", "requested"), [({}, "0 GPU"), ({"GPU": 2.0}, "1 GPU"), ({"GPU": 0.5}, "0 GPU")]
)
def test_a_ray_cluster_gets_all_recordings_and_one_failure_ends_nothing(
    gpus: dict[str, float],
    requested: str,
    folder: Path,
    plan: Plan,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The tasks end in the reverse order.

    A task that requests no GPU gets none, and `--device auto` would silently be the CPU.
    """

    calls: list[str] = []

    def remote(**options: int) -> Any:
        calls.append(f"{options['num_gpus']} GPU")
        return lambda function: SimpleNamespace(remote=partial(partial, function))

    def get(task: partial[Done]) -> Done:
        if task.args[0].name.endswith("good1"):
            raise OSError("the node died")
        return task()

    put_ray(
        monkeypatch,
        gpus,
        init=lambda **options: calls.append(f"init {options['address']}"),
        shutdown=lambda: calls.append("shutdown"),
        remote=remote,
        wait=lambda tasks, num_returns: (tasks[-1:], tasks[:-1]),
        get=get,
    )
    jobs = [job for job in find_jobs([folder]) if "good" in job.name]
    done = run_jobs(jobs, plan, tmp_path / "out", ray_address="local")
    assert calls == ["init local", requested, "shutdown"]
    assert [each.job.name for each in done] == [job.name for job in jobs]
    assert [each.error for each in done] == ["", "Ray: the node died", ""]


def test_a_ray_cluster_without_the_requested_gpu_is_named(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_ray(monkeypatch, {}, init=lambda **options: None, shutdown=lambda: None)
    job = Job("bag", write_bag(tmp_path / "bag", 0.2))
    with pytest.raises(RayUnavailable, match="--device cuda: the Ray cluster has no GPU"):
        run_jobs([job], replace(plan, device="cuda"), tmp_path / "out", ray_address="local")


@pytest.mark.slow
def test_workers_use_the_gpus_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert runs.visible_gpus() == ["3", "5"]
    monkeypatch.setenv("OFFLINE_WORLD_MEETING", str(tmp_path / "meeting"))
    (tmp_path / "meeting").mkdir()
    for k in range(2):
        write_bag(tmp_path / "bags" / str(k), 0.2)
    plan = make_plan(tmp_path, "gpu", control_every=0)
    done = run_jobs(find_jobs([tmp_path / "bags"]), plan, tmp_path / "out", workers=2)
    assert all(each.result for each in done)
    used = {each.result.policies["gpu"].description for each in done if each.result}
    assert used == {"3, a formula", "5, a formula"}
    # An empty list means no GPU, not the first one.
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert runs.visible_gpus() == []


def test_results_of_other_code_robot_or_checkpoint_are_not_reused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault: a policy is edited and run again, but the report has the old numbers."""
    job = Job("bag", write_bag(tmp_path / "bag", 0.4))
    own = tmp_path / "own"
    own.mkdir()
    (own / "my_policy.py").write_text("import offline_world\n\nmake = offline_world.oracle\n")
    monkeypatch.syspath_prepend(str(own))
    plan = make_plan(tmp_path, control_every=0)
    plan = replace(plan, policies={"mine": "my_policy:make"})

    def resumed(plan: Plan) -> bool:
        return run_jobs([job], plan, tmp_path / "out")[0].resumed

    assert not resumed(plan) and resumed(plan)
    (own / "helper.py").write_text("GAIN = 2\n")
    assert not resumed(plan) and resumed(plan)
    monkeypatch.setattr("pi05_lab.evaluation.open_loop.runs.code_identity", lambda: "another")
    assert not resumed(plan) and resumed(plan)
    params = Path(str(plan.params_file))
    params.write_text(params.read_text() + '    robot: "robot.yaml"\n')
    (tmp_path / "robot.yaml").write_text("name: one\n")
    assert not resumed(plan) and resumed(plan)
    (tmp_path / "robot.yaml").write_text("name: two\n")
    assert not resumed(plan) and resumed(plan)


def test_gpus_are_counted_without_the_environment_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert runs.visible_gpus() == ["0", "1"]
