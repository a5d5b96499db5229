"""Log of a training: JSON lines, TensorBoard, a live table."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from pi05_lab.files import atomic_file
from pi05_lab.training.config import ConfigError

LOG_FILE = "training_log.jsonl"


class MetricsLogger:
    """The log of one training, used in a `with` statement.

    Args:
        directory: of training_log.jsonl and the trackers' files; None writes nothing.
        console: for the table; None shows nothing. A file gets plain lines.
        trackers: names of accelerate's trackers that also receive the figures.
        kept_steps: later entries are dropped: a resumed training writes them again.

    Raises:
        ConfigError: a tracker is not installed or cannot start.
    """

    def __init__(
        self,
        directory: Path | None,
        console: Console | None = None,
        trackers: Sequence[str] = (),
        kept_steps: int = 0,
    ) -> None:
        self._console = console
        self._exit = contextlib.ExitStack()
        self._file: TextIO | None = None
        self._trackers: list[Any] = []
        self._shown: dict[str, Any] = {}
        self._part = 0.0
        if directory is not None:
            keep_until(directory / LOG_FILE, kept_steps)
            file = (directory / LOG_FILE).open("a", encoding="utf-8")
            self._file = self._exit.enter_context(file)
            for name in trackers:
                tracker = start_tracker(name, directory, kept_steps)
                self._exit.callback(tracker.finish)
                self._trackers.append(tracker)
        if console is not None and console.is_terminal:
            live = Live(console=console, get_renderable=self._table, refresh_per_second=2)
            self._exit.enter_context(live)

    def write(self, kind: str, step: int, figures: Mapping[str, Any]) -> None:
        """Log figures: `kind` is train, validation, evaluation or stage."""
        if self._file is not None:
            entry = {"kind": kind, "step": step, "time_s": round(time.time(), 1), **figures}
            self._file.write(json.dumps(entry) + "\n")
            self._file.flush()
        numbers = {f"{kind}/{k}": v for k, v in figures.items() if isinstance(v, (int, float))}
        for tracker in self._trackers:
            tracker.log(numbers, step=step)
        prefix = "" if kind == "train" else f"{kind} "
        self._shown |= {prefix + name: value for name, value in figures.items()}
        if self._console is not None and not self._console.is_terminal:
            text = "  ".join(f"{name} {format_figure(value)}" for name, value in figures.items())
            self._console.print(f"{kind} {step}: {text}", highlight=False, markup=False)

    def show_progress(self, stage: str, part: float) -> None:
        """Show the stage and its completed part, 0 to 1."""
        if stage != self._shown.get("stage"):
            self._shown = {"stage": stage}
        self._part = part

    def _table(self) -> Group:
        table = Table(box=None, show_header=False)
        for name, value in self._shown.items():
            table.add_row(name, format_figure(value))
        return Group(table, ProgressBar(total=1.0, completed=self._part, width=60))

    def __enter__(self) -> MetricsLogger:
        return self

    def __exit__(self, *_: object) -> None:
        self._exit.close()


def keep_until(path: Path, step: int) -> None:
    """Drop a log's entries after a step, and an incomplete last line."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError):
            if step and json.loads(line)["step"] <= step:
                kept.append(line + "\n")
    with atomic_file(path) as partial:
        partial.write_text("".join(kept), encoding="utf-8")


def read_log(path: Path) -> list[dict[str, Any]]:
    """The entries of a training_log.jsonl."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def format_figure(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def start_tracker(name: str, directory: Path, kept_steps: int) -> Any:
    """One of accelerate's trackers, started; entries after `kept_steps` are written again.

    Raises:
        ConfigError: accelerate or the tracker's package is not installed, or it cannot start.
    """
    try:
        from accelerate import PartialState  # type: ignore[import-untyped]
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS  # type: ignore[import-untyped]

        PartialState()
        kind = LOGGER_TYPE_TO_CLASS[name]
        if name == "tensorboard":
            tracker = kind(name, directory, purge_step=kept_steps + 1 if kept_steps else None)
        else:
            tracker = kind("pi05_ros", dir=directory, resume="allow", id=directory.resolve().name)
        tracker.start()
    except ImportError as error:
        package = "wandb" if name == error.name == "wandb" else "'pi05_ros[train]'"
        raise ConfigError(
            f"trackers: {name} is not installed: pip install {package}, or leave it out"
        ) from None
    except Exception as error:  # whatever a tracker raises without an account or a connection
        raise ConfigError(f"trackers: {name} cannot start: {error}") from None
    return tracker
