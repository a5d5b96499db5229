"""Log of a training: JSON lines, TensorBoard, a live table."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from pi05_lab.files import atomic_file
from pi05_lab.training.config import ConfigError

LOG_FILE = "training_log.jsonl"


class MetricsLogger:
    """The log of one training.

    Args:
        directory: of training_log.jsonl and TensorBoard's files; None writes nothing.
        console: for the table; None shows nothing.
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
        self._file = None
        self._board: Any = None
        if directory is not None:
            path = directory / LOG_FILE
            keep_until(path, kept_steps)
            self._file = path.open("a", encoding="utf-8")
            if tensorboard:
                self._board = _board(directory / "tensorboard", kept_steps)
        self._shown: dict[str, Any] = {}
        self._progress = 0.0
        self._console = console
        self._live: Live | None = None
        if console is not None:
            self._live = Live(console=console, get_renderable=self._table, refresh_per_second=2)
            self._live.start()

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
            figures_text = "  ".join(f"{name} {_text(value)}" for name, value in figures.items())
            self._console.print(f"{kind} {step}: {figures_text}", highlight=False, markup=False)

    def progress(self, stage: str, part: float) -> None:
        """Show the progress of the stage, 0 to 1."""
        self._shown["stage"] = stage
        self._progress = part

    def clear(self) -> None:
        """Clear the figures shown, at the start of a stage."""
        self._shown = {}

    def _table(self) -> Group | str:
        if self._console is not None and not self._console.is_terminal:
            return ""
        table = Table(box=None, show_header=False)
        for name, value in self._shown.items():
            table.add_row(name, _text(value))
        return Group(table, ProgressBar(total=1.0, completed=self._progress, width=60))

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()

    def __enter__(self) -> MetricsLogger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def keep_until(path: Path, step: int) -> None:
    """Drop a log's entries after a step, and an incomplete last line."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step and step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    with atomic_file(path) as partial:
        partial.write_text("".join(kept), encoding="utf-8")


def read_log(path: Path) -> list[dict[str, Any]]:
    """The entries of a training_log.jsonl."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def _board(directory: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ConfigError(
            "tensorboard: true needs the package tensorboard: pip install 'pi05_ros[train]', or "
            "set it to false"
        ) from None
    return SummaryWriter(str(directory), purge_step=step + 1 if step else None)  # type: ignore[no-untyped-call]


def _text(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
