"""`pi05 evaluate`: a policy on recordings, open loop; report.html and metrics.json."""

from __future__ import annotations

import argparse
import importlib
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from pi05_lab.evaluation.open_loop.policy import names_function
from pi05_ros.control.scheduler import SCHEDULERS

if TYPE_CHECKING:
    from pi05_lab.evaluation.open_loop.episodes import Choice
    from pi05_lab.evaluation.open_loop.pool import Done
    from pi05_lab.evaluation.open_loop.runs import Job, Plan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument(
        "recordings",
        nargs="*",
        type=Path,
        help="rosbag2 (MCAP or sqlite3), LeRobot dataset, or folder of them",
    )
    parser.add_argument(
        "--checkpoint",
        nargs="+",
        default=[],
        metavar="POLICY",
        help="folder, Hugging Face id, small, or module:function (default: the params file's)",
    )
    parser.add_argument(
        "--scheduler",
        nargs="+",
        choices=SCHEDULERS,
        default=[],
        help="one or more, side by side (default: the params file's)",
    )
    parser.add_argument("--params-file", help="the policy node's (default: aloha.yaml)")
    parser.add_argument("--urdf", help="the robot's URDF, where limits.source is urdf")
    parser.add_argument("--namespace", default="", help="of the recorded topics")
    parser.add_argument("--instruction", help="in place of the recorded ones")
    parser.add_argument(
        "--every", type=float, default=0.2, metavar="S", help="between inferences (default: 0.2)"
    )
    parser.add_argument(
        "--delay-ms",
        type=float,
        default=100.0,
        help="from a picture to its usable chunk, for the schedulers (default: 100)",
    )
    parser.add_argument(
        "--control-every",
        type=int,
        default=4,
        metavar="N",
        help="every Nth inference also with another instruction and black pictures; 0: never",
    )
    parser.add_argument(
        "--other-instruction", nargs="+", default=[], help="default: those of the other recordings"
    )
    parser.add_argument(
        "--episodes",
        metavar="WHICH",
        help="of a dataset: all, held-out, or numbers as 0,4-7 (default: those that the "
        "checkpoint's training held out, or all where it does not say)",
    )
    parser.add_argument("--limit", type=int, help="evaluate the first N recordings alone")
    parser.add_argument("--seed", type=int, default=0, help="of the policy's noise")
    parser.add_argument("--device", default="auto", help="of the network (default: auto)")
    parser.add_argument("--num-steps", type=int, help="Euler steps of the flow")
    parser.add_argument("--workers", type=int, default=1, help="processes (default: 1)")
    parser.add_argument(
        "--threads",
        type=int,
        default=1,
        help="of the network on a CPU, in each process; another number may round differently",
    )
    parser.add_argument(
        "--ray",
        nargs="?",
        const="auto",
        metavar="ADDRESS",
        help="spread the recordings over a Ray cluster (local: one on this machine)",
    )
    parser.add_argument("--output", type=Path, default=Path("evaluate_out"), help="folder")
    parser.add_argument(
        "--fresh", action="store_true", help="repeat what an earlier run in --output has"
    )
    parser.add_argument(
        "--no-timings", action="store_true", help="two runs give the same bytes: no measured times"
    )
    parser.add_argument(
        "--rerun", type=Path, metavar="FILE", help="also a .rrd; a folder for several recordings"
    )
    parser.add_argument(
        "--foxglove", type=Path, metavar="FILE", help="also an .mcap; a folder for several"
    )

    parser.add_argument(
        "--record-command",
        action="store_true",
        help="print the `ros2 bag record` command for the params file, and end",
    )


def run(options: argparse.Namespace) -> int:
    """Evaluate and report; 0 if there is something to report, 1 otherwise."""
    console = Console()
    from pi05_lab.evaluation.open_loop.bag import BagError
    from pi05_lab.evaluation.open_loop.episodes import choose_episodes
    from pi05_lab.evaluation.open_loop.pool import RayUnavailable
    from pi05_lab.evaluation.open_loop.runs import find_jobs
    from pi05_lab.evaluation.open_loop.topics import read_evaluated_robot
    from pi05_ros.robot_config import RobotConfigError

    try:
        if options.record_command:
            robot = read_evaluated_robot(options.params_file, options.namespace)
            print(robot.record_command())
            return 0
        # before the work that it is to show
        importlib.import_module("pi05_lab.evaluation.open_loop.report")
        plan = _plan(options)
        choice = choose_episodes(find_jobs(options.recordings), plan, options.episodes)
        for line in choice.lines:
            console.print(line, markup=False, highlight=False)
        jobs = choice.jobs[: options.limit]
        plan = _for_jobs(plan, jobs, options)
        done = _run(jobs, plan, options, console)
        return _report(done, choice, plan, options, console)
    except ModuleNotFoundError as error:
        text = f"{error}: pip install 'pi05_ros[eval,train]'"
        console.print(text, style="bold red", markup=False, highlight=False)
        return 1
    except (BagError, RobotConfigError, RayUnavailable, ImportError, OSError, ValueError) as error:
        console.print(str(error), style="bold red", markup=False, highlight=False)
        return 1
    except KeyboardInterrupt:
        console.print("Interrupted. Re-run the command to continue.", style="bold red")
        return 1


def _plan(options: argparse.Namespace) -> Plan:
    from pi05_lab.evaluation.open_loop.runs import Plan
    from pi05_lab.evaluation.open_loop.settings import OfflineSettings
    from pi05_ros.robot_config import default_params_file

    for name in ("workers", "threads"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(options, name)}")
    params_file = options.params_file or str(default_params_file())
    settings = OfflineSettings(
        every_s=options.every,
        delay_s=options.delay_ms / 1e3,
        schedulers=tuple(dict.fromkeys(options.scheduler)),
        control_every=options.control_every,
        others=tuple(options.other_instruction),
        seed=options.seed,
        timings=not options.no_timings,
    )
    plan = Plan(
        policies=(),
        settings=settings,
        params_file=params_file,
        namespace=options.namespace,
        instruction=options.instruction,
        device=options.device,
        num_steps=options.num_steps,
        threads=options.threads,
        urdf=options.urdf,
    )
    robot = plan.robot()
    robot.config.check_limits()
    sources = options.checkpoint or [_checkpoint_of(robot.checkpoint, params_file)]
    return replace(plan, policies=_named(sources))


def _checkpoint_of(source: str, params_file: str) -> str:
    """The params file's checkpoint, which may come from elsewhere and must not name code to run."""
    if names_function(source):
        raise ValueError(
            f"{params_file}: checkpoint {source!r} names code; a params file names a folder, a "
            f"Hugging Face id or small. To run it: --checkpoint {source}"
        )
    return source


def _for_jobs(plan: Plan, jobs: Sequence[Job], options: argparse.Namespace) -> Plan:
    """The plan with what depends on the recordings: files to write, other instructions."""
    from pi05_lab.evaluation.open_loop.runs import instructions_of

    plan = replace(
        plan,
        rerun=_files(options.rerun, jobs, ".rrd"),
        foxglove=_files(options.foxglove, jobs, ".mcap"),
    )
    if plan.rerun:
        from pi05_lab.evaluation.open_loop.rerun import rerun_library

        rerun_library()
    if plan.settings.control_every and not plan.settings.others:
        others = instructions_of(jobs, plan)
        plan = replace(plan, settings=replace(plan.settings, others=others))
    return plan


def _files(path: Path | None, jobs: Sequence[Job], suffix: str) -> tuple[tuple[str, str], ...]:
    """Recording → file: the path itself, or files in the folder that it names."""
    if path is None:
        return ()
    if len(jobs) == 1 and path.suffix == suffix:
        path.parent.mkdir(parents=True, exist_ok=True)
        return ((jobs[0].name, str(path)),)
    path.mkdir(parents=True, exist_ok=True)
    return tuple((job.name, str(path / f"{job.file_name}{suffix}")) for job in jobs)


def _named(sources: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """Short names, unless they would be the same."""
    sources = list(dict.fromkeys(sources))
    short = [Path(source).name or source for source in sources]
    return tuple(
        (name if short.count(name) == 1 else source, source)
        for name, source in zip(short, sources, strict=True)
    )


def _run(
    jobs: Sequence[Job], plan: Plan, options: argparse.Namespace, console: Console
) -> list[Done]:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from pi05_lab.evaluation.open_loop.pool import run_jobs

    columns = (
        TextColumn("evaluating"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("", total=len(jobs), note="")
        failed = 0

        def count(outcome: Done) -> None:
            nonlocal failed
            failed += outcome.result is None
            note = f"{failed} failed, {outcome.job.name}" if failed else outcome.job.name
            progress.update(bar, advance=1, note=note)

        return run_jobs(
            jobs,
            plan,
            options.output / "recordings",
            options.workers,
            options.ray,
            options.fresh,
            count,
        )


def _report(
    done: Sequence[Done],
    choice: Choice,
    plan: Plan,
    options: argparse.Namespace,
    console: Console,
) -> int:
    from pi05_lab.evaluation.open_loop.report import render
    from pi05_lab.evaluation.open_loop.summary import summarize
    from pi05_lab.evaluation.open_loop.verdict import overview, verdicts

    results = [outcome.result for outcome in done if outcome.result is not None]
    failed = {outcome.job.name: outcome.error for outcome in done if outcome.result is None}
    for name, reason in failed.items():
        console.print(f"{name}: {reason}", style="bold red", markup=False, highlight=False)
    if not results:
        return 1
    joints = plan.robot().config.joints
    evaluated = {result["name"] for result in results}
    trained_on = {
        policy: [name for name in names if name in evaluated]
        for policy, names in choice.trained_on.items()
    }
    summary = summarize(results, failed, joints, _settings(plan, options), trained_on)
    (options.output / "metrics.json").write_text(
        json.dumps(summary, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    (options.output / "report.html").write_text(render(summary, results, joints), encoding="utf-8")
    say = {"markup": False, "highlight": False}
    console.print(overview(summary), **say)  # type: ignore[arg-type]
    colors = {"good": "green", "unsure": "yellow", "bad": "red"}
    for verdict in verdicts(summary):
        console.print(
            f"{verdict.policy}: {verdict.headline}",
            style=f"bold {colors[verdict.grade]}",
            **say,  # type: ignore[arg-type]
        )
        for detail in verdict.details:
            console.print(f"  {detail}", **say)  # type: ignore[arg-type]
    resumed = sum(outcome.resumed for outcome in done)
    if resumed:
        console.print(f"{resumed} of {len(done)} recordings taken from an earlier run", **say)  # type: ignore[arg-type]
    console.print(f"{options.output}: report.html, metrics.json", **say)  # type: ignore[arg-type]
    return 0


def _settings(plan: Plan, options: argparse.Namespace) -> dict[str, Any]:
    settings = plan.settings
    shown: dict[str, Any] = {
        "policies": [source for _, source in plan.policies],
        "params_file": plan.params_file,
        "episodes": options.episodes or "held-out where the checkpoint says so",
        "every_s": settings.every_s,
        "delay_s": settings.delay_s,
        "schedulers": list(settings.schedulers) or [plan.robot().config.scheduler.method],
        "control_every": settings.control_every,
        "other_instructions": list(settings.others),
        "instruction": plan.instruction,
        "namespace": plan.namespace,
        "num_steps": plan.num_steps,
        "seed": settings.seed,
        "worst": settings.worst,
    }
    if settings.timings:
        shown["date"] = time.strftime("%Y-%m-%d %H:%M:%S %z")
    return shown
