"""`pi05 check CHECKPOINT`: facts about a checkpoint and a robot, and every problem between them.

Loading a policy stops at the first problem; here each part is checked on its own.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, ParamSpec, TypeVar

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pi05_ros.adapters.lerobot import fit, is_installed, missing_message, read_features
from pi05_ros.adapters.remote import API_KEY, RemotePolicy, is_address
from pi05_ros.policy.bundle import (
    Settings,
    apply_processor_settings,
    make_robot,
    match_cameras,
    open_tokenizer,
)
from pi05_ros.policy.checkpoint import (
    check_depth,
    check_tensors,
    checkpoint_folder,
    key_map,
    network_tensors,
    summarize_names,
    weights_folder,
)
from pi05_ros.policy.config import NAMES, PolicyConfig, foreign_type, read_config
from pi05_ros.policy.model import Pi0
from pi05_ros.policy.next_token import open_action_language
from pi05_ros.policy.processing import PALIGEMMA, Normalizer, convention_of, read_processing
from pi05_ros.policy.prompt import TOKENIZER_FILE, pi0_prompt, pi05_prompt
from pi05_ros.policy.robots import Robot, RobotSource
from pi05_ros.policy.weights import TensorInfo, is_finite, printable, read_tensor, tensor_index

P = ParamSpec("P")
T = TypeVar("T")

MAX_LAYERS = 1000
"""Limit for a network without weights; with weights it is the number of tensors."""
KINDS = {"server": "policy server"}
NARROW = 0.01
"""A range below this share of its feature's median range gets a warning."""
INSTRUCTION_TOKENS = 20
"""Fewer tokens than this for the instruction get a warning."""
TORCH_BYTES = 450 * 2**20
"""A process with torch and transformers loaded, without weights."""
CUDA_BYTES = 500 * 2**20
"""CUDA's context and the workspaces of its libraries."""


@dataclass(frozen=True)
class Dimension:
    """One value of the state or the action, and its statistics."""

    feature: str
    name: str
    statistics: dict[str, float]
    warning: str = ""


@dataclass
class Report:
    """The facts; parts that a problem hides are None or empty. The field names are JSON's keys."""

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
    """dtype in the file → number of tensors."""
    file_bytes: int | None = None
    memory_bytes: dict[str, int] = field(default_factory=dict)
    """Device and precision → estimated bytes for one observation."""
    convention: str | None = None
    normalization: dict[str, str] = field(default_factory=dict)
    dimensions: list[Dimension] = field(default_factory=list)
    tokenizer: dict[str, Any] | None = None
    state_in_prompt: bool | None = None
    cameras: dict[str, str | None] = field(default_factory=dict)
    """The checkpoint's camera → the robot's, None where it is masked."""
    unused_cameras: list[str] = field(default_factory=list)
    """The robot's cameras without a camera of the checkpoint."""
    history_steps: int = 0
    """Earlier observations that each inference needs."""
    dt_s: float | None = None
    conventions: list[str] = field(default_factory=list)
    """Conversions by the robot: signs, gripper maps, relative joints, velocities."""
    warnings: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def runs(self) -> bool:
        """Whether the policy would start."""
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        """All facts in JSON's types."""
        return asdict(self) | {"runs": self.runs}

    def attempt(self, function: Callable[P, T], *args: P.args, **named: P.kwargs) -> T | None:
        """The function's result; None after its error has become a problem."""
        try:
            return function(*args, **named)
        except (ValueError, OSError) as error:  # a CheckpointError is a ValueError
            if str(error) not in self.problems:
                self.problems.append(str(error))
            return None


def check(checkpoint: str | Path, robot: RobotSource = "aloha", values: bool = True) -> Report:
    """Check a checkpoint with a robot. Problems are in the report; none is raised.

    Args:
        checkpoint: as `Policy.from_pretrained` takes it.
        robot: likewise.
        values: also scan every weight for NaN and infinity.
    """
    name = robot.get("name", "described") if isinstance(robot, Mapping) else str(robot)
    report = Report(str(checkpoint), str(name))
    if is_address(checkpoint):
        _check_server(report, str(checkpoint), robot)
        return report
    folder = report.attempt(checkpoint_folder, checkpoint)
    kind: str | None = None if folder is None else report.attempt(foreign_type, folder)
    if folder is not None and kind is not None:
        _check_lerobot(report, folder, robot, values)
        return report
    config = None if folder is None else report.attempt(read_config, folder)
    if folder is None or config is None:
        return report
    report.folder, report.kind, report.sizes = str(folder), config.kind, asdict(config.sizes)
    report.horizon, report.num_steps = config.horizon, config.num_steps
    report.token_length = config.token_length
    report.state_dim, report.action_dim = config.state_dim, config.action_dim
    report.max_state_dim, report.max_action_dim = config.max_state_dim, config.max_action_dim
    report.cameras = dict.fromkeys(config.cameras)
    _check_weights(report, folder, config, values)
    tokenizer_name = _check_robot(report, folder, config, robot)
    _check_tokenizer(report, folder, config, tokenizer_name)
    return report


def _check_server(report: Report, address: str, source: RobotSource) -> None:
    """Connect to a policy server and infer once on black images."""
    policy = report.attempt(RemotePolicy, address, source, os.environ.get(API_KEY, ""))
    if policy is None:
        return
    report.kind, report.folder = "server", policy.description
    report.horizon, report.dt_s = policy.horizon, policy.dt_s
    report.state_dim, report.action_dim = policy.state_dim, policy.action_dim
    report.cameras = {name: name for name in policy.cameras}
    report.robot = policy.robot_name
    policy.close()


def _check_lerobot(report: Report, folder: Path, source: RobotSource, values: bool) -> None:
    """Check a policy that LeRobot runs, by its files alone."""
    report.folder = str(folder)
    features = report.attempt(read_features, folder)
    if features is None:
        return
    report.kind, report.convention = features.type, "lerobot"
    report.state_dim, report.action_dim = features.state_dim, features.action_dim
    report.history_steps = features.history_steps
    report.cameras = dict.fromkeys(features.cameras)
    fitted = report.attempt(fit, folder, features, source)
    if fitted:
        robot, cameras = fitted
        report.cameras |= {theirs: mine for mine, theirs in cameras.items()}
        report.unused_cameras = [name for name in robot.cameras if name not in cameras]
        _describe_robot(report, robot)
    if not features.uses_text:
        report.warnings.append("the policy has no language: it ignores the instruction")
    if not is_installed():
        report.problems.append(missing_message(folder, features.type))
    index = report.attempt(tensor_index, folder)
    if index is not None:
        report.parameters = sum(math.prod(info.shape) for info in index.values())
        _check_files(report, folder, index, values)


def _check_weights(report: Report, folder: Path, config: PolicyConfig, values: bool) -> None:
    start = report.attempt(weights_folder, folder)
    index = None if start is None else report.attempt(network_tensors, start)
    found = len(report.problems)
    report.attempt(check_depth, config, MAX_LAYERS if index is None else len(index), folder)
    if len(report.problems) > found:
        return
    with torch.device("meta"):
        model = Pi0(config)
    report.parameters = sum(parameter.numel() for parameter in model.parameters())
    report.memory_bytes = _estimate_memory(model)
    if index is None:
        return
    report.attempt(check_tensors, folder, key_map(model), index)
    _check_files(report, folder, index, values and len(report.problems) == found)


def _check_files(
    report: Report, folder: Path, index: Mapping[str, TensorInfo], values: bool
) -> None:
    """Size and dtypes of the tensors, and with `values` whether they are finite."""
    report.file_bytes = sum(file.stat().st_size for file in {info.file for info in index.values()})
    for info in index.values():
        report.dtypes[info.dtype] = report.dtypes.get(info.dtype, 0) + 1
    if values:
        broken = [name for name, info in index.items() if not is_finite(read_tensor(info))]
        if broken:
            report.problems.append(
                f"{folder}: {summarize_names('not finite', broken)}. The training diverged or the "
                "file is damaged: take an earlier checkpoint"
            )


def _estimate_memory(model: Pi0) -> dict[str, int]:
    """Weights, the prefix's keys and values, and the widest activations, for one observation."""
    sizes = model.config.sizes
    prefix = len(model.config.cameras) * sizes.image_tokens + model.config.token_length
    width = 3 * sizes.vlm.mlp_dim + 4 * sizes.vlm.width
    cached = 2 * sizes.vlm.depth * sizes.vlm.kv_heads * sizes.vlm.head_dim
    memory = {}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        weights = sum(
            parameter.numel() * model.parameter_dtype(key, dtype).itemsize
            for key, parameter in model.named_parameters()
        )
        running = weights + prefix * (width + cached) * dtype.itemsize
        memory[f"cpu {name}"] = running + TORCH_BYTES
        memory[f"gpu {name}"] = running + CUDA_BYTES
    return memory


def _check_robot(report: Report, folder: Path, config: PolicyConfig, source: RobotSource) -> str:
    """Check the robot and the processing files; returns the tokenizer's name."""
    settings = report.attempt(Settings.read, folder) or Settings()
    convention = report.convention = report.attempt(convention_of, folder)
    robot = report.attempt(make_robot, source, config, convention or "lerobot", settings)
    state_dim = robot.state_dim if robot else config.state_dim
    action_dim = robot.action_dim if robot else config.action_dim
    processing = None
    if convention and state_dim and action_dim:
        processing = report.attempt(read_processing, folder, config, state_dim, action_dim)
    if processing:
        _check_statistics(report, "state", processing.state, robot.state if robot else ())
        _check_statistics(report, "action", processing.action, robot.action if robot else ())
    if robot:
        rename = {**(processing.rename if processing else {}), **settings.cameras}
        matched = report.attempt(match_cameras, robot.cameras, config.cameras, rename)
        for mine, theirs in (matched or {}).items():
            report.cameras[theirs] = mine
        report.unused_cameras = [name for name in robot.cameras if name not in (matched or {})]
        if matched and processing:
            robot = report.attempt(apply_processor_settings, robot, processing, settings)
            if robot:
                _describe_robot(report, robot)
    return processing.tokenizer if processing else PALIGEMMA


def _describe_robot(report: Report, robot: Robot) -> None:
    report.robot, report.dt_s = robot.name, robot.dt_s
    report.state_dim, report.action_dim = robot.state_dim, robot.action_dim
    if report.kind in NAMES:
        report.state_in_prompt = report.kind != "pi0" and robot.state_in_prompt is not False
    probe = np.full(robot.state_dim, 0.3)
    if not np.array_equal(robot.decode_state(probe), probe):
        report.conventions.append("joint signs or gripper units are turned into the checkpoint's")
    if any(robot.delta_mask):
        dims = ", ".join(map(str, np.flatnonzero(robot.delta_mask)))
        report.conventions.append(f"actions {dims} are relative to the state")
    if robot.velocity_step:
        report.conventions.append(
            f"velocities become positions, {robot.velocity_step:g} a step at velocity 1"
        )
    for camera in sorted(robot.rotated_cameras):
        report.conventions.append(f"images of {camera} are rotated by 180°")
    masked = [name for name, mine in report.cameras.items() if mine is None]
    if masked:
        report.warnings.append(f"the robot has no image for {', '.join(masked)}: masked")


def _check_statistics(
    report: Report, feature: str, normalizer: Normalizer, names: tuple[str, ...]
) -> None:
    report.normalization[feature] = normalizer.mode.value
    widths = normalizer.widths
    median = float(np.median(widths)) if len(widths) else 0.0
    for i, width in enumerate(widths):
        name = names[i] if names else str(i)
        warning = ""
        if width < NARROW * median or width == 0:
            warning = (
                f"its range is {width:.2g}, the median is {median:.2g}: a small "
                "deviation becomes a huge number"
            )
            report.warnings.append(f"{feature} {name}: {warning}")
        values = {key: float(array[i]) for key, array in normalizer.statistics.items()}
        report.dimensions.append(Dimension(feature, name, values, warning))


def _check_tokenizer(report: Report, folder: Path, config: PolicyConfig, name: str) -> None:
    tokenizer = report.attempt(open_tokenizer, folder, config, name)
    if tokenizer is None:
        return
    text = pi0_prompt("", "openpi")
    if config.has_state_prompt and report.state_in_prompt is not False:
        text = pi05_prompt("", np.full(report.state_dim or 0, 0.999))  # bin 255, the longest
    tokens = report.attempt(tokenizer.encode, text)
    if tokens is None:
        return
    used = int(tokens.mask.sum()) + tokens.dropped
    left = config.token_length - used
    report.attempt(open_action_language, folder, config, tokenizer)
    own = (folder / TOKENIZER_FILE).is_file()
    report.tokenizer = {
        "source": "the checkpoint's folder" if own else f"hub cache, {name}",
        "network_entries": config.sizes.vocab,
        "prompt_tokens_without_instruction": used,
        "room_for_instruction": left,
    }
    if left < INSTRUCTION_TOKENS:
        report.warnings.append(
            f"the prompt leaves {left} of {config.token_length} tokens to the instruction; a "
            "longer one is refused"
        )


def human_bytes(count: float) -> str:
    """With a unit: 6.47 GiB."""
    power = min(3, int(math.log(count, 1024))) if count >= 1 else 0
    digits = 0 if power == 0 else 2
    return f"{count / 1024**power:.{digits}f} {('B', 'KiB', 'MiB', 'GiB')[power]}"


def check_command(
    checkpoint: Annotated[
        str,
        typer.Argument(help="A folder, a Hugging Face id such as owner/name@revision, or small."),
    ],
    robot: Annotated[
        str, typer.Option(help="aloha, droid, libero, ur5e, generic, or a YAML description.")
    ] = "aloha",
    as_json: Annotated[bool, typer.Option("--json", help="Print the facts as JSON.")] = False,
    no_values: Annotated[
        bool, typer.Option("--no-values", help="Do not scan the weights for NaN and infinity.")
    ] = False,
) -> int:
    """Exit code 0 if the policy would run, else 1."""
    report = check(checkpoint, robot, values=not no_values)
    if as_json:
        print(json.dumps(report.to_json(), indent=2, ensure_ascii=False))
    else:
        _print_report(report, Console())
    return 0 if report.runs else 1


def _print_report(report: Report, console: Console) -> None:
    table = Table(title=printable(report.checkpoint), show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in _facts(report):
        if value:
            table.add_row(name, Text(printable(value)))
    console.print(table)
    if report.dimensions:
        console.print(_statistics_table(report.dimensions))
    for warning in map(printable, report.warnings):
        console.print(Text(f"warning: {warning}", style="yellow"), soft_wrap=True)
    for problem in map(printable, report.problems):
        console.print(Text(f"problem: {problem}", style="bold red"), soft_wrap=True)
    if report.runs:
        console.print(Text(f"runs with robot {report.robot}", style="green"))
    else:
        count = f"{len(report.problems)} problem{'s' * (len(report.problems) > 1)}"
        console.print(Text(f"does not run with robot {report.robot}: {count}", style="bold red"))


def _facts(report: Report) -> list[tuple[str, str]]:
    if report.kind is None:
        return []
    stored = ", ".join(f"{name} ({count} tensors)" for name, count in sorted(report.dtypes.items()))
    memory = ", ".join(f"{key} {human_bytes(n)}" for key, n in report.memory_bytes.items())
    normalization = ", ".join(" ".join(item) for item in report.normalization.items())
    matched = any(report.cameras.values())
    cameras = [f"{a} ← {b or 'none'}" if matched else a for a, b in report.cameras.items()]
    tokenizer, prompt, flow = "", "", report.kind in ("pi05", "pi0")
    if report.tokenizer:
        left = report.tokenizer["room_for_instruction"]
        tokenizer = f"{report.tokenizer['source']}; {left} tokens for the instruction"
    if report.kind != "pi0" and report.state_in_prompt is not None:
        prompt = "in the prompt" if report.state_in_prompt else "not used: not in the prompt"
    return [
        ("folder", report.folder or ""),
        ("kind", NAMES.get(report.kind, KINDS.get(report.kind, f"LeRobot {report.kind}"))),
        ("parameters", f"{report.parameters:,}" if report.parameters else ""),
        *_size_facts(report.sizes, flow),
        ("stored", f"{stored}, {human_bytes(report.file_bytes)}" if report.file_bytes else ""),
        ("memory, about", memory),
        ("horizon", f"{report.horizon} steps" if report.horizon else ""),
        ("history", f"{report.history_steps} earlier observations" if report.history_steps else ""),
        ("step", f"{report.dt_s * 1000:.1f} ms" if report.dt_s else ""),
        ("Euler steps", str(report.num_steps) if flow else ""),
        ("state", _values(report.state_dim, report.max_state_dim)),
        ("action", _values(report.action_dim, report.max_action_dim)),
        ("processing", {"lerobot": "LeRobot's", "openpi": "openpi's", None: ""}[report.convention]),
        ("normalisation", normalization),
        ("cameras", ", ".join(cameras)),
        ("cameras not used", ", ".join(report.unused_cameras)),
        ("tokenizer", tokenizer),
        ("state", prompt),
        ("the robot adds", "; ".join(report.conventions)),
    ]  # fmt: skip


def _size_facts(sizes: Mapping[str, Any] | None, flow: bool) -> list[tuple[str, str]]:
    if sizes is None:
        return []
    vlm, expert, vision = (
        f"{sizes[key]['depth']} layers × {sizes[key]['width']}" for key in ("vlm", "exp", "vis")
    )
    return [
        ("language model", f"{vlm}, MLP {sizes['vlm']['mlp_dim']}"),
        ("action expert", f"{expert}, MLP {sizes['exp']['mlp_dim']}" if flow else ""),
        ("vision encoder", f"{vision}, {sizes['image']} px, patch {sizes['patch']}"),
    ]


def _values(count: int | None, limit: int | None) -> str:
    return f"{count or '?'}{'' if limit is None else f' of at most {limit}'} values"


def _statistics_table(rows: list[Dimension]) -> Table:
    table = Table(title="statistics", title_justify="left")
    table.add_column("value")
    names = list(dict.fromkeys(key for row in rows for key in row.statistics))
    for name in names:
        table.add_column(name, justify="right")
    table.add_column("")
    for row in rows:
        cells = [f"{row.statistics[n]:.4g}" if n in row.statistics else "" for n in names]
        mark = Text("narrow", style="yellow") if row.warning else ""
        table.add_row(printable(f"{row.feature} {row.name}"), *cells, mark)
    return table
