"""`pi05 bench latency`: p50, p95, p99 of a chunk by stage, beside the device's roofline."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

from pi05_lab.console import make_console, say
from pi05_ros.cli import CommandError

if TYPE_CHECKING:
    import torch

    from pi05_lab.bench.latency import Row


def latency(
    checkpoint: Annotated[
        str, Option(help="folder or hub id; 'small'; 'full': seeded weights of π0.5's size")
    ] = "small",
    device: Annotated[str, Option(help="auto, cuda or cpu")] = "auto",
    dtype: Annotated[str, Option(help="auto, float32 or bfloat16")] = "auto",
    threads: Annotated[int, Option(help="CPU threads")] = 1,
    ways: Annotated[str, Option(help="of padded,eager,graphs,compile,fp8")] = "auto",
    cameras: Annotated[str, Option(help="numbers of cameras; auto is 1 to all")] = "auto",
    tokens: Annotated[str, Option(help="prompt lengths")] = "auto",
    steps: Annotated[str, Option(help="Euler steps")] = "10,5",
    runs: Annotated[int, Option(help="chunks per row")] = 50,
    no_reference: Annotated[
        bool,
        Option("--no-reference", help="skip the comparison with float32, which needs its memory"),
    ] = False,
    output: Annotated[Path, Option(help="folder of the results")] = Path("bench_out"),
) -> int:
    """Measure, print and write; 1 if a mode's actions are too far from the reference."""
    import torch

    from pi05_lab.bench.latency import FULL, LatencyBench, scenarios
    from pi05_ros.policy.bundle import open_checkpoint
    from pi05_ros.policy.config import PolicyConfig
    from pi05_ros.policy.policy import choose_device, choose_dtype

    console = make_console()
    try:
        torch.set_num_threads(threads)
        target = choose_device(device)
        precision = choose_dtype(None if dtype == "auto" else dtype, target)
        config = PolicyConfig(state_dim=14, action_dim=14)
        if checkpoint != FULL:
            config = open_checkpoint(checkpoint, "aloha").config
        modes = _modes(ways, target)
        longest = config.token_length
        largest, *others = scenarios(
            config,
            _numbers(cameras, range(len(config.cameras), 0, -1)),
            _numbers(tokens, [longest, *(n for n in (128, 64, 32) if n < longest)]),
            _numbers(steps, []),
        )
        name = str(precision).removeprefix("torch.")
        bench = LatencyBench(checkpoint, target, name, runs, not no_reference)
        rows = []
        # all modes in the largest scenario, the last mode in all others
        for mode, scenario in [(m, largest) for m in modes] + [(modes[-1], s) for s in others]:
            say(console, f"{mode}: {scenario}")
            rows.append(bench.measure(mode, scenario))
    except (ValueError, RuntimeError, OSError) as error:
        raise CommandError(str(error)) from error
    say(console, str(bench.peaks))
    times, stages = _markdown(_times(rows)), _markdown(_stages(rows))
    say(console, f"images to actions; c: cameras, t: tokens, s: steps\n{times}")
    say(console, f"stages, median ms\n{stages}")
    output.mkdir(parents=True, exist_ok=True)
    (output / "latency.md").write_text(f"{times}\n{stages}", encoding="utf-8")
    document = {
        "machine": machine(target),
        "peaks": asdict(bench.peaks),
        "rows": [row.to_json() for row in rows],
    }
    (output / "latency.json").write_text(json.dumps(document, indent=2), encoding="utf-8")
    far = [row for row in rows if not row.holds]
    for row in far:
        excess = f"an action differs by {row.difference:.3g} from float32's, more than"
        say(console, f"{row.mode}: {excess} {row.bound:g}", style="red")
    return 1 if far else 0


def _modes(text: str, device: torch.device) -> list[str]:
    from pi05_lab.bench.latency import MODES

    if text == "auto":
        on_cuda = device.type == "cuda"
        return [mode for mode in MODES if on_cuda or mode not in ("graphs", "fp8")]
    modes = text.split(",")
    unknown = [mode for mode in modes if mode not in MODES]
    if unknown:
        raise ValueError(f"unknown ways {unknown}: choose from {', '.join(MODES)}")
    return modes


def _numbers(text: str, default: Iterable[int]) -> list[int]:
    if text == "auto":
        return list(default)
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{text!r} is not a list of numbers such as 1,2,3") from None


def _times(rows: list[Row]) -> list[list[str]]:
    """Heads, then a line per row: the whole chunk."""
    lines = [
        ["mode", "scenario", "p50 ms", "p95", "p99", "roof", "TFLOP/s", "GB/s", "GB", "max diff"]
    ]
    for row in rows:
        p50_s = row.quantile_ms(50) * 1e-3
        lines.append([
            f"{row.mode}, {row.dtype}",
            str(row.scenario),
            *(f"{row.quantile_ms(percent):.1f}" for percent in (50, 95, 99)),
            f"{row.floor_s / p50_s:.0%}",
            f"{row.tflop / p50_s:.3g}",
            f"{row.gigabytes / p50_s:.3g}",
            f"{row.memory_bytes * 1e-9:.2f}",
            "" if row.difference is None else f"{row.difference:.1g}",
        ])  # fmt: skip
    return lines


def _stages(rows: list[Row]) -> list[list[str]]:
    """Heads, then a line per row: each stage's median in ms."""
    lines = [["mode", "scenario", *rows[0].stages_s]]
    for row in rows:
        medians = [f"{median:.2f}" for median in row.stages_ms().values()]
        lines.append([f"{row.mode}, {row.dtype}", str(row.scenario), *medians])
    return lines


def _markdown(lines: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    ruled = [lines[0], ["-" * width for width in widths], *lines[1:]]
    padded = [map(str.ljust, line, widths) for line in ruled]
    return "".join("| " + " | ".join(line) + " |\n" for line in padded)


def machine(device: torch.device) -> dict[str, str]:
    """Versions, and a GPU's clocks from its driver."""
    import torch

    found = {"torch": torch.__version__, "python": platform.python_version()}
    if device.type != "cuda":
        return found | {"threads": str(torch.get_num_threads()), "cpu": platform.machine()}
    fields = "name,driver_version,clocks.sm,clocks.mem,power.limit,temperature.gpu"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError) as error:
        return found | {"nvidia-smi": str(error)}
    values = result.stdout.splitlines()[device.index or 0].split(", ")
    return found | dict(zip(fields.split(","), values, strict=True))
