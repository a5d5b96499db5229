"""`pi05 evaluate`: policies on recordings, open loop; report.html and metrics.json."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from pi05_lab.console import make_console, progress_bar, say
from pi05_lab.data.bags import BagError
from pi05_lab.data.topics import EvaluatedRobot, read_evaluated_robot
from pi05_lab.evaluation.open_loop.conditions import EvaluationSettings
from pi05_lab.evaluation.open_loop.export import rerun_library
from pi05_lab.evaluation.open_loop.jobs import Job, choose_episodes, find_jobs, names_function
from pi05_lab.evaluation.open_loop.report import render
from pi05_lab.evaluation.open_loop.results import to_json
from pi05_lab.evaluation.open_loop.runs import Done, Plan, RayUnavailable, instructions_of, run_jobs
from pi05_lab.evaluation.open_loop.summary import summarize
from pi05_lab.evaluation.open_loop.verdict import BAD, GOOD, UNSURE, overview, verdicts
from pi05_ros.cli import CommandError, ValueIfBare, one_of
from pi05_ros.control.scheduler import SCHEDULERS
from pi05_ros.robot_config import RobotConfigError, default_params_file
from pi05_ros.types import HEADS

Option = typer.Option
COLORS = {GOOD: "bold green", UNSURE: "bold yellow", BAD: "bold red"}


def evaluate(
    recordings: Annotated[list[Path] | None, typer.Argument(
        help="rosbag2 (MCAP or sqlite3), LeRobot dataset, or folder of them.")] = None,
    checkpoint: Annotated[list[str] | None, Option(
        metavar="POLICY", show_default="the params file's",
        help="Folder, Hugging Face id, small, or module:function. One or more.")] = None,
    scheduler: Annotated[list[str] | None, Option(
        **one_of(SCHEDULERS), show_default="the params file's", help="One or more.")] = None,
    params_file: Annotated[str | None, Option(
        help="The policy node's params file.", show_default="aloha.yaml")] = None,
    urdf: Annotated[str | None, Option(
        help="The robot's URDF, if limits.source is urdf.")] = None,
    namespace: Annotated[str, Option(help="Of the recorded topics.")] = "",
    instruction: Annotated[str | None, Option(help="Replaces the recorded ones.")] = None,
    every: Annotated[float, Option(metavar="S", help="Recorded time between inferences.")] = 0.2,
    delay_ms: Annotated[float, Option(
        help="From an image to its usable chunk, for the schedulers.")] = 100.0,
    control_every: Annotated[int, Option(
        metavar="N", help="Run ablations (wrong instruction, black images) at every Nth "
        "inference; 0: never.")] = 4,
    other_instruction: Annotated[list[str] | None, Option(
        show_default="those of the other recordings", help="Wrong instructions.")] = None,
    episodes: Annotated[str | None, Option(
        metavar="WHICH", show_default="held-out where the checkpoint names the dataset, else all",
        help="Of a dataset: all, held-out, or numbers as 0,4-7.")] = None,
    limit: Annotated[int | None, Option(help="Evaluate the first N recordings.")] = None,
    seed: Annotated[int, Option(help="Of the policy's noise.")] = 0,
    device: Annotated[str, Option(help="Of the network.")] = "auto",
    num_steps: Annotated[int | None, Option(help="Euler steps of the flow.")] = None,
    head: Annotated[str | None, Option(
        **one_of(HEADS), help="What predicts the actions: the action expert's flow, or the "
        "language model's tokens.", show_default="the checkpoint's")] = None,
    workers: Annotated[int, Option(help="Processes.")] = 1,
    threads: Annotated[int, Option(
        help="CPU threads of the network per process; their number may change rounding.")] = 1,
    ray: Annotated[str | None, ValueIfBare("auto"), Option(
        metavar="[ADDRESS]", help="Use a Ray cluster; local: one on this machine.")] = None,
    output: Annotated[Path, Option(help="Folder of the results.")] = Path("evaluate_out"),
    fresh: Annotated[bool, Option("--fresh", help="Ignore earlier results in --output.")] = False,
    no_timings: Annotated[bool, Option(
        "--no-timings", help="Omit measured times: two runs give the same bytes.")] = False,
    rerun: Annotated[Path | None, Option(
        metavar="FILE", help="Also write a .rrd; a folder for several recordings.")] = None,
    foxglove: Annotated[Path | None, Option(
        metavar="FILE", help="Also write an .mcap; a folder for several recordings.")] = None,
    record_command: Annotated[bool, Option(
        "--record-command", help="Print the `ros2 bag record` command for the params file.")
    ] = False,
) -> int:  # fmt: skip
    """Evaluate and report; 0 if there is a result."""
    console = make_console()
    try:
        robot = read_evaluated_robot(params_file, namespace, urdf=urdf)
        if record_command:
            say(console, robot.record_command())
            return 0
        for name, value in (("workers", workers), ("threads", threads)):
            if value < 1:
                raise ValueError(f"--{name} must be at least 1, got {value}")
        settings = EvaluationSettings(
            every_s=every,
            delay_s=delay_ms / 1e3,
            schedulers=tuple(dict.fromkeys(scheduler or ())),
            control_every=control_every,
            others=tuple(other_instruction or ()),
            seed=seed,
            timings=not no_timings,
        )
        policies = _policies(checkpoint or [], robot, params_file)
        choice = choose_episodes(find_jobs(recordings or []), policies, episodes)
        for line in choice.lines:
            say(console, line)
        jobs = choice.jobs[:limit]
        if rerun:
            rerun_library()
        plan = Plan(
            policies=policies,
            settings=settings,
            params_file=params_file or str(default_params_file()),
            namespace=namespace,
            instruction=instruction,
            device=device,
            num_steps=num_steps,
            head=head,
            threads=threads,
            rerun=_files(rerun, jobs, ".rrd"),
            foxglove=_files(foxglove, jobs, ".mcap"),
            urdf=urdf,
        )
        if control_every and not settings.others:
            settings = replace(settings, others=instructions_of(jobs, plan))
            plan = replace(plan, settings=settings)
        failures = 0
        with progress_bar(console, "evaluating", len(jobs)) as advance:

            def on_done(done: Done) -> None:
                nonlocal failures
                failures += done.result is None
                advance(f"evaluating ({failures} failed)" if failures else None)

            done = run_jobs(jobs, plan, output / "recordings", workers, ray, fresh, on_done)
        results = [each.result for each in done if each.result is not None]
        failed = {each.job.name: each.error for each in done if each.result is None}
        for name, reason in failed.items():
            say(console, f"{name}: {reason}", "bold red")
        if not results:
            return 1
        joints, shown = robot.config.joints, _shown_settings(plan, robot, episodes)
        evaluated = {result.name for result in results}
        trained_on = {
            policy: [name for name in names if name in evaluated]
            for policy, names in choice.trained_on.items()
        }
        summary = summarize(results, failed, joints, shown, trained_on)
        metrics = json.dumps(to_json(summary), indent=1, ensure_ascii=False) + "\n"
        (output / "metrics.json").write_text(metrics, encoding="utf-8")
        (output / "report.html").write_text(render(summary, results, joints), encoding="utf-8")
        say(console, overview(summary))
        for verdict in verdicts(summary):
            say(console, f"{verdict.policy}: {verdict.headline}", COLORS[verdict.grade])
            for detail in verdict.details:
                say(console, f"  {detail}")
        if resumed := sum(each.resumed for each in done):
            say(console, f"{resumed} of {len(done)} recordings reused from an earlier run")
        say(console, f"{output}: report.html, metrics.json")
        return 0
    except (BagError, RobotConfigError, RayUnavailable, OSError, ValueError) as error:
        raise CommandError(str(error)) from None
    except KeyboardInterrupt:
        raise CommandError("Interrupted. Re-run the command to continue.") from None


def _policies(
    sources: Sequence[str], robot: EvaluatedRobot, params_file: str | None
) -> dict[str, str]:
    """Name → source of these policies, or of the params file's; short names if they differ."""
    robot.config.check_limits()
    if not sources and names_function(robot.checkpoint):
        # The params file may come from elsewhere and must not name code to run.
        raise ValueError(
            f"{params_file}: checkpoint {robot.checkpoint!r} names code; a params file names a "
            f"folder, a Hugging Face id or small. To run it: --checkpoint {robot.checkpoint}"
        )
    sources = list(dict.fromkeys(sources or [robot.checkpoint]))
    short = [Path(source).name or source for source in sources]
    return {
        name if short.count(name) == 1 else source: source
        for name, source in zip(short, sources, strict=True)
    }


def _files(path: Path | None, jobs: Sequence[Job], suffix: str) -> dict[str, str]:
    """Recording → file: the path itself, or files in the folder that it names."""
    if path is None:
        return {}
    if len(jobs) == 1 and path.suffix == suffix:
        path.parent.mkdir(parents=True, exist_ok=True)
        return {jobs[0].name: str(path)}
    path.mkdir(parents=True, exist_ok=True)
    return {job.name: str(path / f"{job.file_name}{suffix}") for job in jobs}


def _shown_settings(plan: Plan, robot: EvaluatedRobot, episodes: str | None) -> dict[str, Any]:
    settings = plan.settings
    shown: dict[str, Any] = {
        "policies": list(plan.policies.values()),
        "params_file": plan.params_file,
        "episodes": episodes or "held-out where the checkpoint says so",
        "every_s": settings.every_s,
        "delay_s": settings.delay_s,
        "schedulers": list(settings.schedulers) or [robot.config.scheduler.method],
        "control_every": settings.control_every,
        "other_instructions": list(settings.others),
        "instruction": plan.instruction,
        "namespace": plan.namespace,
        "num_steps": plan.num_steps,
        "head": plan.head,
        "seed": settings.seed,
        "worst": settings.worst,
    }
    if settings.timings:
        shown["date"] = time.strftime("%Y-%m-%d %H:%M:%S %z")
    return shown
