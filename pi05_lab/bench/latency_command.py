"""`pi05 bench latency`: p50, p95, p99 of a chunk by stage, beside the device's roofline."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from pi05_lab.bench.latency import Row

STAGES = ("upload", "resize", "prompt", "vision", "prefix", "denoise", "download", "postprocess")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument(
        "--checkpoint",
        default="small",
        help="folder or hub id; 'small' (default); 'full': seeded weights of π0.5's size",
    )
    parser.add_argument("--device", default="auto", help="auto (default), cuda or cpu")
    parser.add_argument("--dtype", default="auto", help="auto (default), float32 or bfloat16")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--ways", default="auto", help="of padded,eager,graphs,compile,fp8")
    parser.add_argument("--cameras", default="auto", help="numbers of cameras (default: 1 to all)")
    parser.add_argument("--tokens", default="auto", help="prompt lengths")
    parser.add_argument("--steps", default="10,5", help="Euler steps (default: 10,5)")
    parser.add_argument("--runs", type=int, default=50, help="chunks per row (default: 50)")
    parser.add_argument(
        "--no-reference",
        action="store_true",
        help="leave out the comparison with float32, which needs the memory for it",
    )
    parser.add_argument("--output", type=Path, default=Path("bench_out"), help="results' folder")


def run(options: argparse.Namespace) -> int:
    """Measure, print and write; 1 if a way's actions are too far from the reference."""
    import torch

    from pi05_lab.bench import latency as latency_bench
    from pi05_ros.policy.checkpoint import open_checkpoint
    from pi05_ros.policy.config import PolicyConfig
    from pi05_ros.policy.policy import choose_device, choose_dtype

    console = Console()
    try:
        torch.set_num_threads(options.threads)
        device = choose_device(options.device)
        wanted = None if options.dtype == "auto" else options.dtype
        dtype = str(choose_dtype(wanted, device)).removeprefix("torch.")
        if options.checkpoint == latency_bench.FULL:
            config = PolicyConfig(state_dim=14, action_dim=14)
        else:
            config = open_checkpoint(options.checkpoint, "aloha").config
        ways = _ways(options.ways, device)
        longest = config.token_length
        cameras = _numbers(options.cameras, range(len(config.cameras), 0, -1))
        tokens = _numbers(options.tokens, [longest, *(n for n in (128, 64, 32) if n < longest)])
        wanted_cases = latency_bench.cases(config, cameras, tokens, _numbers(options.steps, []))
        bench = latency_bench.LatencyBench(
            options.checkpoint, device, dtype, options.runs, not options.no_reference
        )
        rows = latency_bench.run(bench, ways, wanted_cases, lambda text: console.print(text))
    except (ValueError, RuntimeError, OSError) as error:
        console.print(f"[red]{error}")
        return 1
    peaks = bench.peaks
    console.print(
        f"{peaks.name}: {peaks.flop_per_s * 1e-12:.3g} TFLOP/s, "
        f"{peaks.bytes_per_s * 1e-9:.4g} GB/s ({peaks.source})"
    )
    console.print(_rich(_times(rows), "pictures to actions; case: cameras, tokens, steps"))
    console.print(_rich(_stages(rows), "stages, median ms"))
    options.output.mkdir(parents=True, exist_ok=True)
    document = {
        "machine": machine(device),
        "peaks": asdict(peaks),
        "rows": [_plain(r) for r in rows],
    }
    (options.output / "latency.json").write_text(json.dumps(document, indent=2), encoding="utf-8")
    (options.output / "latency.md").write_text(markdown(rows), encoding="utf-8")
    far = [row for row in rows if not row.holds]
    for row in far:
        console.print(
            f"[red]{row.way}: an action is {row.difference:.3g} from float32's, more than "
            f"{row.bound:g}"
        )
    return 1 if far else 0


def _ways(text: str, device: Any) -> list[str]:
    from pi05_lab.bench.latency import WAYS

    on_cuda = device.type == "cuda"
    if text == "auto":
        return [way for way in WAYS if on_cuda or way not in ("graphs", "fp8")]
    ways = text.split(",")
    unknown = [way for way in ways if way not in WAYS]
    if unknown:
        raise ValueError(f"unknown ways {unknown}; there are {', '.join(WAYS)}")
    return ways


def _numbers(text: str, default: Any) -> list[int]:
    if text == "auto":
        return list(default)
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{text!r} is no list of numbers such as 1,2,3") from None


def _times(rows: list[Row]) -> list[list[str]]:
    """Heads, then a line per row: the whole chunk."""
    heads = [
        "way", "case", "p50 ms", "p95", "p99",
        "roof", "TFLOP/s", "GB/s", "GB", "max |Δ|",
    ]  # fmt: skip
    lines = [heads]
    for row in rows:
        p50_s = row.quantile_ms(0.5) * 1e-3
        lines.append(
            [
                *_what(row),
                *(f"{row.quantile_ms(q):.1f}" for q in (0.5, 0.95, 0.99)),
                f"{row.floor_s / p50_s:.0%}",
                f"{row.tflop / p50_s:.3g}",
                f"{row.gigabytes / p50_s:.3g}",
                f"{row.memory_bytes * 1e-9:.2f}",
                "" if row.difference is None else f"{row.difference:.1g}",
            ]
        )
    return lines


def _stages(rows: list[Row]) -> list[list[str]]:
    """Heads, then a line per row: each stage's median in ms."""
    stages = [stage for stage in STAGES if stage in rows[0].stages_s]
    lines = [["way", "case", *stages]]
    for row in rows:
        medians = [float(statistics.median(row.stages_s[stage])) for stage in stages]
        lines.append([*_what(row), *(f"{seconds * 1e3:.2f}" for seconds in medians)])
    return lines


def _what(row: Row) -> list[str]:
    case = row.case
    return [f"{row.way}, {row.dtype}", f"{case.cameras}c {case.tokens}t {case.num_steps}s"]


def _rich(lines: list[list[str]], title: str) -> Table:
    table = Table(title=title, box=None, pad_edge=False)
    for head in lines[0]:
        table.add_column(head, justify="right", no_wrap=True)
    for line in lines[1:]:
        table.add_row(*line)
    return table


def markdown(rows: list[Row]) -> str:
    """Both tables as they stand in docs/benchmarks.md."""
    tables = []
    for lines in (_times(rows), _stages(rows)):
        ruled = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
        tables.append("".join("| " + " | ".join(line) + " |\n" for line in ruled))
    return "\n".join(tables)


def _plain(row: Row) -> dict[str, Any]:
    import numpy as np

    quantiles = {f"p{q:.0f}_ms": float(np.percentile(row.seconds, q) * 1e3) for q in (50, 95, 99)}
    stages = {stage: float(np.median(values) * 1e3) for stage, values in row.stages_s.items()}
    return {
        "way": row.way,
        "dtype": row.dtype,
        **asdict(row.case),
        **quantiles,
        "stages_p50_ms": stages,
        "floor_ms": row.floor_s * 1e3,
        "tflop": row.tflop,
        "gigabytes": row.gigabytes,
        "memory_bytes": row.memory_bytes,
        "max_action_difference": row.difference,
        "runs": len(row.seconds),
    }


def machine(device: Any) -> dict[str, str]:
    """Versions, and a GPU's clocks as its driver tells them."""
    import torch

    found = {"torch": torch.__version__, "python": platform.python_version()}
    if device.type != "cuda":
        return found | {"threads": str(torch.get_num_threads()), "cpu": platform.machine()}
    fields = "name,driver_version,clocks.sm,clocks.mem,power.limit,temperature.gpu"
    try:
        asked = subprocess.run(
            ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError) as error:
        return found | {"nvidia-smi": str(error)}
    answers = asked.stdout.splitlines()[device.index or 0].split(", ")
    return found | dict(zip(fields.split(","), answers, strict=True))
