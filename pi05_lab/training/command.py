"""`pi05 train`: trains or fine-tunes on LeRobot data sets."""

from __future__ import annotations

import os
import pkgutil
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from pi05_lab.console import make_console, say
from pi05_lab.training.config import ConfigError, DatasetConfig, read_config
from pi05_ros.cli import CommandError

Option = typer.Option


def train(
    config: Annotated[Path, typer.Argument(help="YAML file of the training.")],
    output: Annotated[str | None, Option(
        help="Folder for state, log and checkpoint, instead of the file's.")] = None,
    data: Annotated[list[str] | None, Option(
        help="Dataset folders instead of the file's.")] = None,
    set_: Annotated[list[str] | None, Option(
        "--set", metavar="KEY=VALUE", help="Replace a value: stages.0.lr=1e-4.")] = None,
    resume: Annotated[bool, Option(
        "--resume", help="Resume from the state in the output folder.")] = False,
    quiet: Annotated[bool, Option("--quiet", help="No table.")] = False,
) -> int:  # fmt: skip
    """Train; 0 when complete, 130 when stopped with a state to resume from."""
    # Spinning OpenMP threads stall each other when there are more of them than cores. PyTorch
    # reads the variable when it is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from pi05_lab.data.lerobot_format import DatasetError
    from pi05_lab.training import train as trainer
    from pi05_ros.policy.weights import CheckpointError

    console = make_console(stderr=True)
    try:
        settings = read_config(config, set_ or ())
        settings = replace(settings, output=output or settings.output)
        if data:
            chosen = tuple(map(DatasetConfig, data))
            settings = replace(settings, data=replace(settings.data, datasets=chosen))
        evaluate = _import_function(settings.evaluation.function)
        with _stop_on_signal() as stop:
            checkpoint = trainer.train(settings, evaluate, None if quiet else console, resume, stop)
    except (ConfigError, DatasetError, CheckpointError, OSError) as error:
        raise CommandError(str(error)) from None
    if checkpoint is None:
        say(console, f"Stopped. Resume with: pi05 train {config} --resume")
        return 130
    say(console, f"{checkpoint}: done")
    return 0


@contextmanager
def _stop_on_signal() -> Iterator[Callable[[], bool]]:
    """The first SIGINT or SIGTERM ends the training after the current step, a second at once."""
    requested = threading.Event()

    def request(number: int, frame: Any) -> None:
        if requested.is_set():
            raise KeyboardInterrupt
        requested.set()

    old = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield requested.is_set
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _import_function(path: str) -> Callable[[Path], Mapping[str, float]] | None:
    if not path:
        return None
    try:
        function: Any = pkgutil.resolve_name(path)
        if not callable(function):
            raise ValueError(f"{path} is not a function")
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f'evaluation.function {path!r} must be "module:function" of an installed module: '
            f"{error}"
        ) from None
    return function  # type: ignore[no-any-return]
