"""`pi05 check CHECKPOINT`: what a checkpoint is, and whether it runs with a robot.

The facts about a checkpoint and a robot, and all that keeps the two from running together.

Loading stops at the first fault; here every part is looked at on its own, so that one look shows
them all.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pi05_ros.policy.checkpoint import (
    Opened,
    RobotSource,
    check_depth,
    check_tensors,
    checkpoint_folder,
    heed_files,
    key_map,
    listed,
    network_tensors,
    open_tokenizer,
)
from pi05_ros.policy.config import PolicyConfig, read_config
from pi05_ros.policy.model import Pi0, parameter_dtype
from pi05_ros.policy.processing import (
    PALIGEMMA,
    Normalizer,
    Processing,
    convention_of,
    read_processing,
)
from pi05_ros.policy.prompt import pi0_prompt, pi05_prompt
from pi05_ros.policy.robots import Robot, Settings, make_robot, match_cameras
from pi05_ros.policy.weights import CheckpointError, MappedFile, TensorInfo, printable

T = TypeVar("T")

MOST_LAYERS = 1000
"""Of a network without weights; with them, it has no more layers than tensors."""
TINY = 0.01
"""A range below this share of its feature's median range is suspicious."""
ROOM = 20
"""Tokens that an instruction should find free."""
TORCH_BYTES = 450 * 2**20
"""What a process has with torch and transformers loaded, before any weights."""
CUDA_BYTES = 500 * 2**20
"""CUDA's context and the workspaces of its libraries."""


@dataclass(frozen=True)
class Dimension:
    """One value of the state or the action, and the statistics in use."""

    feature: str
    name: str
    statistics: dict[str, float]
    warning: str = ""


@dataclass
class Report:
    """What is known; parts that a fault hides are None or empty."""

    checkpoint: str
    robot: str
    folder: str | None = None
    kind: str | None = None
    parameters: int | None = None
    sizes: dict[str, Any] | None = None
    horizon: int | None = None
    num_steps: int | None = None
    token_length: int | None = None
    state_dim: int | None = None
    action_dim: int | None = None
    max_state_dim: int | None = None
    max_action_dim: int | None = None
    dtypes: dict[str, int] = field(default_factory=dict)
    """dtype in the file → tensors."""
    file_bytes: int | None = None
    memory_bytes: dict[str, int] = field(default_factory=dict)
    """Where and in which precision → bytes, estimated for one observation."""
    convention: str | None = None
    normalization: dict[str, str] = field(default_factory=dict)
    dimensions: list[Dimension] = field(default_factory=list)
    tokenizer: dict[str, Any] | None = None
    state_in_prompt: bool | None = None
    cameras: dict[str, str | None] = field(default_factory=dict)
    """The checkpoint's camera → the robot's, None where it will be masked."""
    unused_cameras: list[str] = field(default_factory=list)
    """The robot's cameras that the checkpoint doesn't look at."""
    dt_s: float | None = None
    conventions: list[str] = field(default_factory=list)
    """What the robot adds: turned signs, gripper maps, relative joints, velocities."""
    warnings: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def runs(self) -> bool:
        """Whether the policy would start."""
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        """All facts in JSON's types."""
        return asdict(self) | {"runs": self.runs}


def check(checkpoint: str | Path, robot: RobotSource = "aloha", values: bool = True) -> Report:
    """Look at a checkpoint and a robot; nothing is raised for a fault, it is in the report.

    Args:
        checkpoint: as `Policy.from_pretrained` takes it.
        robot: likewise.
        values: also read every weight, to find those that are not finite.
    """
    name = robot.get("name", "described") if isinstance(robot, Mapping) else str(robot)
    report = Report(str(checkpoint), str(name))
    folder = _try(report, lambda: checkpoint_folder(checkpoint))
    config = None if folder is None else _try(report, lambda: read_config(folder))
    if folder is None or config is None:
        return report
    report.folder = str(folder)
    _describe(report, config)
    _check_weights(report, folder, config, values)
    tokenizer_name = _check_robot(report, folder, config, robot)
    _check_tokenizer(report, folder, config, tokenizer_name)
    return report


def _try(report: Report, action: Callable[[], T]) -> T | None:
    try:
        return action()
    except (ValueError, OSError) as error:  # a CheckpointError is a ValueError
        if str(error) not in report.problems:
            report.problems.append(str(error))
        return None


def _describe(report: Report, config: PolicyConfig) -> None:
    report.kind = config.kind
    report.sizes = asdict(config.sizes)
    report.horizon, report.num_steps = config.horizon, config.num_steps
    report.token_length = config.token_length
    report.state_dim, report.action_dim = config.state_dim, config.action_dim
    report.max_state_dim, report.max_action_dim = config.max_state_dim, config.max_action_dim
    report.cameras = dict.fromkeys(config.cameras)


def _check_weights(report: Report, folder: Path, config: PolicyConfig, values: bool) -> None:
    index = _try(report, lambda: network_tensors(folder))
    most = MOST_LAYERS if index is None else len(index)
    found = len(report.problems)
    _try(report, lambda: check_depth(config, most, folder))
    if len(report.problems) > found:
        return
    with torch.device("meta"):
        model = Pi0(config)
    report.parameters = sum(parameter.numel() for parameter in model.parameters())
    report.memory_bytes = _memory(model)
    if index is None:
        return
    report.file_bytes = sum(file.stat().st_size for file in {info.file for info in index.values()})
    for info in index.values():
        report.dtypes[info.dtype] = report.dtypes.get(info.dtype, 0) + 1
    sources = key_map(model)
    found = len(report.problems)
    _try(report, lambda: check_tensors(folder, sources, index))
    if values and len(report.problems) == found:
        _try(report, lambda: _check_values(folder, index))


def _check_values(folder: Path, index: Mapping[str, TensorInfo]) -> None:
    with ExitStack() as stack:
        files = {
            file: stack.enter_context(MappedFile(file))
            for file in {info.file for info in index.values()}
        }
        broken = [name for name, info in index.items() if not files[info.file].is_finite(info)]
    if broken:
        raise CheckpointError(
            f"{folder}: {listed('not finite', broken)}. The training diverged or the file is "
            "damaged: take an earlier checkpoint"
        )


def _memory(model: Pi0) -> dict[str, int]:
    """Weights, the prefix's keys and values, and the widest activations, for one observation."""
    config = model.config
    sizes = config.sizes
    prefix = len(config.cameras) * sizes.image_tokens + config.token_length
    width = 3 * sizes.vlm.mlp_dim + 4 * sizes.vlm.width
    cached = 2 * sizes.vlm.depth * sizes.vlm.kv_heads * sizes.vlm.head_dim
    memory = {}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        weights = sum(
            parameter.numel() * parameter_dtype(key, dtype).itemsize
            for key, parameter in model.named_parameters()
        )
        running = weights + prefix * (width + cached) * dtype.itemsize
        memory[f"cpu {name}"] = running + TORCH_BYTES
        memory[f"gpu {name}"] = running + CUDA_BYTES
    return memory


def _check_robot(report: Report, folder: Path, config: PolicyConfig, source: RobotSource) -> str:
    """Everything that the robot and the processing files say; the tokenizer's name."""
    settings = _try(report, lambda: Settings.read(folder)) or Settings()
    convention = _try(report, lambda: convention_of(folder))
    report.convention = convention
    robot = _try(report, lambda: make_robot(source, config, convention or "lerobot", settings))
    state_dim = config.state_dim if robot is None else robot.state_dim
    action_dim = config.action_dim if robot is None else robot.action_dim
    processing = None
    if convention is not None and state_dim and action_dim:
        processing = _try(report, lambda: read_processing(folder, config, state_dim, action_dim))
    if processing is not None:
        _check_statistics(report, processing, robot)
    if robot is not None:
        rename = {**(processing.rename if processing else {}), **settings.cameras}
        matched = _try(report, lambda: match_cameras(robot.cameras, config.cameras, rename))
        for mine, theirs in (matched or {}).items():
            report.cameras[theirs] = mine
        report.unused_cameras = [name for name in robot.cameras if name not in (matched or {})]
        if matched is not None and processing is not None and convention is not None:
            body = heed_files(robot, processing, settings)
            opened = Opened(folder, config, settings, convention, body, processing, matched)
            _describe_robot(report, opened)
    return processing.tokenizer if processing else PALIGEMMA


def _describe_robot(report: Report, opened: Opened) -> None:
    robot = opened.robot
    report.robot, report.dt_s = robot.name, robot.dt_s
    report.state_dim, report.action_dim = robot.state_dim, robot.action_dim
    report.state_in_prompt = opened.config.kind == "pi05" and robot.state_in_prompt is not False
    probe = np.full(robot.state_dim, 0.3)
    if not np.array_equal(robot.decode_state(probe), probe):
        report.conventions.append("joint signs or gripper units are turned into the checkpoint's")
    if robot.delta_mask and any(robot.delta_mask):
        dims = [str(i) for i, relative in enumerate(robot.delta_mask) if relative]
        report.conventions.append(f"actions {', '.join(dims)} are relative to the state")
    if robot.velocity_mask is not None:
        report.conventions.append(
            f"velocities become positions, {robot.velocity_step:g} a step at velocity 1"
        )
    for camera in sorted(robot.rotated_cameras):
        report.conventions.append(f"pictures of {camera} are turned by 180°")
    masked = [name for name, mine in report.cameras.items() if mine is None]
    if masked:
        report.warnings.append(f"the robot has no picture for {', '.join(masked)}: masked")


def _check_statistics(report: Report, processing: Processing, robot: Robot | None) -> None:
    for feature, normalizer, names in (
        ("state", processing.state, robot.state_names if robot else ()),
        ("action", processing.action, robot.action_names if robot else ()),
    ):
        report.normalization[feature] = normalizer.mode.value
        rows = _dimensions(feature, normalizer, names)
        report.dimensions += rows
        report.warnings += [
            f"{row.feature} {row.name}: {row.warning}" for row in rows if row.warning
        ]


def _dimensions(feature: str, normalizer: Normalizer, names: tuple[str, ...]) -> list[Dimension]:
    widths = normalizer.widths
    middle = float(np.median(widths)) if len(widths) else 0.0
    rows = []
    for i, width in enumerate(widths):
        warning = ""
        if width < TINY * middle or width == 0:
            # A small move, against which every value looks far outside.
            warning = (
                f"its range is {width:.2g}, the median is {middle:.2g}: a small "
                "deviation becomes a huge number"
            )
        values = {key: float(array[i]) for key, array in normalizer.statistics.items()}
        name = names[i] if i < len(names) else str(i)
        rows.append(Dimension(feature, name, values, warning))
    return rows


def _check_tokenizer(report: Report, folder: Path, config: PolicyConfig, name: str) -> None:
    tokenizer = _try(report, lambda: open_tokenizer(folder, config, name))
    if tokenizer is None:
        return
    dims = report.state_dim or 0
    text = pi0_prompt("", "openpi")
    if config.kind == "pi05" and report.state_in_prompt is not False:
        text = pi05_prompt("", np.full(dims, 0.999))  # bin 255: the longest number
    tokens = _try(report, lambda: tokenizer.encode(text))
    if tokens is None:
        return
    used = int(tokens.mask.sum()) + tokens.dropped
    own = (folder / "tokenizer.json").is_file()
    report.tokenizer = {
        "source": "the checkpoint's folder" if own else f"hub cache, {name}",
        "network_entries": config.sizes.vocab,
        "prompt_tokens_without_instruction": used,
        "room_for_instruction": config.token_length - used,
    }
    if config.token_length - used < ROOM:
        report.warnings.append(
            f"the prompt leaves {config.token_length - used} of {config.token_length} tokens to "
            "the instruction; a longer one is refused"
        )


def human_bytes(count: float) -> str:
    """With a unit: 6.47 GiB."""
    power = min(3, int(math.log(count, 1024))) if count >= 1 else 0
    digits = 0 if power == 0 else 2
    return f"{count / 1024**power:.{digits}f} {('B', 'KiB', 'MiB', 'GiB')[power]}"


KIND_NAMES = {"pi05": "π0.5", "pi0": "π0"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument(
        "checkpoint", help="a folder, a Hugging Face id such as owner/name@revision, or small"
    )
    parser.add_argument(
        "--robot",
        default="aloha",
        help="aloha, droid, libero, ur5e, generic, or a YAML description (default: aloha)",
    )
    parser.add_argument("--json", action="store_true", help="print the facts as JSON")
    parser.add_argument(
        "--no-values", action="store_true", help="don't read the weights to find NaN and infinity"
    )


def run(options: argparse.Namespace) -> int:
    """0 when it would run, 1 when not."""
    report = check(options.checkpoint, options.robot, values=not options.no_values)
    if options.json:
        print(json.dumps(report.to_json(), indent=2, ensure_ascii=False))
    else:
        show(report, Console())
    return 0 if report.runs else 1


def show(report: Report, console: Console) -> None:
    """Print tables, warnings and problems."""
    table = Table(title=printable(report.checkpoint), show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in _facts(report):
        table.add_row(name, Text(value))
    console.print(table)
    if report.dimensions:
        console.print(_statistics(report))
    for warning in map(printable, report.warnings):
        console.print(Text(f"warning: {warning}", style="yellow"), soft_wrap=True)
    for problem in map(printable, report.problems):
        console.print(Text(f"problem: {problem}", style="bold red"), soft_wrap=True)
    count = len(report.problems)
    verdict = (
        f"runs with robot {report.robot}"
        if report.runs
        else f"does not run with robot {report.robot}: {count} problem{'s' * (count > 1)}"
    )
    console.print(Text(verdict, style="green" if report.runs else "bold red"))


def _facts(report: Report) -> list[tuple[str, str]]:

    facts: list[tuple[str, str]] = []

    def add(name: str, value: object) -> None:
        if value not in (None, "", [], {}):
            facts.append((name, printable(str(value))))

    add("folder", report.folder)
    add("kind", KIND_NAMES.get(report.kind or "", report.kind))
    if report.parameters:
        add("parameters", f"{report.parameters:,}")
    if report.sizes:
        vlm, expert, vision = (report.sizes[key] for key in ("vlm", "exp", "vis"))
        add("language model", f"{vlm['depth']} layers × {vlm['width']}, MLP {vlm['mlp_dim']}")
        add(
            "action expert",
            f"{expert['depth']} layers × {expert['width']}, MLP {expert['mlp_dim']}",
        )
        side, patch = report.sizes["image"], report.sizes["patch"]
        add(
            "image tower", f"{vision['depth']} layers × {vision['width']}, {side} px, patch {patch}"
        )
    stored = ", ".join(f"{name} ({count} tensors)" for name, count in sorted(report.dtypes.items()))
    if report.file_bytes:
        add("stored", f"{stored}, {human_bytes(report.file_bytes)}")
    add(
        "memory, about",
        ", ".join(f"{key} {human_bytes(count)}" for key, count in report.memory_bytes.items()),
    )
    add("horizon", f"{report.horizon} steps" if report.horizon else None)
    if report.dt_s:
        add("step", f"{report.dt_s * 1000:.1f} ms")
    add("Euler steps", report.num_steps)
    for name, dim, limit in (
        ("state", report.state_dim, report.max_state_dim),
        ("action", report.action_dim, report.max_action_dim),
    ):
        if limit:
            add(name, f"{'?' if dim is None else dim} of at most {limit} values")
    add("processing", {"lerobot": "LeRobot's", "openpi": "openpi's"}.get(report.convention or ""))
    add(
        "normalisation",
        ", ".join(f"{feature} {mode}" for feature, mode in report.normalization.items()),
    )
    matched = any(report.cameras.values())
    add(
        "cameras",
        ", ".join(
            f"{theirs} ← {mine or 'none'}" if matched else theirs
            for theirs, mine in report.cameras.items()
        ),
    )
    add("cameras not used", ", ".join(report.unused_cameras))
    if report.tokenizer:
        room = report.tokenizer["room_for_instruction"]
        add("tokenizer", f"{report.tokenizer['source']}; {room} tokens for the instruction")
    if report.state_in_prompt is not None and report.kind == "pi05":
        add("state", "in the prompt" if report.state_in_prompt else "not used: not in the prompt")
    add("the robot adds", "; ".join(report.conventions))
    return facts


def _statistics(report: Report) -> Table:
    table = Table(title="statistics", title_justify="left")
    table.add_column("value")
    names = list(dict.fromkeys(key for row in report.dimensions for key in row.statistics))
    for name in names:
        table.add_column(name, justify="right")
    table.add_column("")
    for row in report.dimensions:
        cells = [f"{row.statistics[n]:.4g}" if n in row.statistics else "" for n in names]
        mark = Text("narrow", style="yellow") if row.warning else ""
        table.add_row(printable(f"{row.feature} {row.name}"), *cells, mark)
    return table
