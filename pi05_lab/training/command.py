"""`pi05 train config.yaml`: recordings become a checkpoint."""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

if TYPE_CHECKING:
    from pi05_lab.training.trainer import Evaluate


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("config", type=Path, help="the training's YAML file")
    parser.add_argument("--output", help="folder for state, log and checkpoint, instead of its own")
    parser.add_argument(
        "--data",
        action="append",
        default=[],
        help="dataset folder instead of those of the file; may be given several times",
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on from the state in the output folder"
    )
    parser.add_argument("--quiet", action="store_true", help="no table")


def run(options: argparse.Namespace) -> int:
    """Train; 0 when it is done, 130 when it was stopped and can be resumed, 1 for an error."""
    # Spinning threads stall each other when there are more of them than cores; PyTorch reads it
    # when it is imported, and so it is imported afterwards.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from dataclasses import replace

    from pi05_lab.data.lerobot_format import DatasetError
    from pi05_lab.training.config import ConfigError, DatasetConfig, read_config
    from pi05_lab.training.trainer import train
    from pi05_ros.policy.weights import CheckpointError

    console = Console(stderr=True)
    try:
        config = read_config(options.config)
        if options.output:
            config = replace(config, output=options.output)
        if options.data:
            chosen = tuple(DatasetConfig(root) for root in options.data)
            config = replace(config, data=replace(config.data, datasets=chosen))
        evaluate = _function(config.evaluation.function)
        with _stop_on_signal() as stop:
            checkpoint = train(
                config, evaluate, None if options.quiet else console, options.resume, stop
            )
    except (ConfigError, DatasetError, CheckpointError, OSError) as error:
        console.print(str(error), style="bold red", markup=False, highlight=False)
        return 1
    if checkpoint is None:
        again = f"pi05 train {options.config} --resume"
        console.print(f"stopped; go on with: {again}", markup=False, highlight=False)
        return 130
    console.print(f"{checkpoint}: done", markup=False, highlight=False)
    return 0


@contextmanager
def _stop_on_signal() -> Iterator[Callable[[], bool]]:
    """The first Ctrl-C or SIGTERM ends the training after the running step, a second at once."""
    asked = threading.Event()

    def ask(number: int, frame: Any) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    old = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked.is_set
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _function(path: str) -> Evaluate | None:
    """`module:function` → the function.

    Raises:
        ConfigError: it cannot be imported.
    """
    from pi05_lab.training.config import ConfigError

    if not path:
        return None
    module, _, name = path.partition(":")
    try:
        function: Evaluate = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f'evaluation.function {path!r} must be "module:function" of an installed module: '
            f"{error}"
        ) from None
    return function
