"""Log of a training: JSON lines, TensorBoard, a live table."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping
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
        directory: of training_log.jsonl and TensorBoard's files; None writes nothing.
        console: for the table; None shows nothing. A file gets plain lines.
        tensorboard: also write its events.
        kept_steps: later entries are dropped: a resumed training writes them again.

    Raises:
        ConfigError: TensorBoard is requested and not installed.
    """

    def __init__(
        self,
        directory: Path | None,
        console: Console | None = None,
        tensorboard: bool = False,
        kept_steps: int = 0,
    ) -> None:
        self._console = console
        self._exit = contextlib.ExitStack()
        self._file: TextIO | None = None
        self._board: Any = None
        self._shown: dict[str, Any] = {}
        self._part = 0.0
        if directory is not None:
            keep_until(directory / LOG_FILE, kept_steps)
            file = (directory / LOG_FILE).open("a", encoding="utf-8")
            self._file = self._exit.enter_context(file)
            if tensorboard:
                self._board = self._exit.enter_context(_board(directory, kept_steps))
        if console is not None and console.is_terminal:
            live = Live(console=console, get_renderable=self._table, refresh_per_second=2)
            self._exit.enter_context(live)

    def write(self, kind: str, step: int, figures: Mapping[str, Any]) -> None:
        """Log figures: `kind` is train, validation, evaluation or stage."""
        if self._file is not None:
            entry = {"kind": kind, "step": step, "time_s": round(time.time(), 1), **figures}
            self._file.write(json.dumps(entry) + "\n")
            self._file.flush()
        if self._board is not None:
            for name, value in figures.items():
                if isinstance(value, (int, float)):
                    self._board.add_scalar(f"{kind}/{name}", value, step)
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


def _board(directory: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ConfigError(
            "tensorboard: true needs the package tensorboard: pip install 'pi05_ros[train]', or "
            "set it to false"
        ) from None
    return SummaryWriter(str(directory / "tensorboard"), purge_step=step + 1 if step else None)  # type: ignore[no-untyped-call]
