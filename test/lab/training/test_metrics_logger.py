"""The log; faults: lines twice after a resume, a cut-off line that makes the log unreadable."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from pi05_lab.training.config import ConfigError
from pi05_lab.training.metrics import LOG_FILE, MetricsLogger, keep_until, read_log


def test_lines_are_figures(tmp_path: Path) -> None:
    with MetricsLogger(tmp_path) as journal:
        journal.write("train", 5, {"flow": 0.5, "stage": "a"})
        journal.write("validation", 5, {"flow": 0.75})
    entries = [(e["kind"], e["step"], e["flow"]) for e in read_log(tmp_path / LOG_FILE)]
    assert entries == [("train", 5, 0.5), ("validation", 5, 0.75)]


def test_a_resumed_log_has_each_step_once(tmp_path: Path) -> None:
    with MetricsLogger(tmp_path) as journal:
        for step in range(1, 6):
            journal.write("train", step, {"flow": step})
    path = tmp_path / LOG_FILE
    path.write_text(path.read_text() + '{"kind": "train", "st')
    keep_until(path, 3)
    with MetricsLogger(tmp_path, kept_steps=3) as journal:
        journal.write("train", 4, {"flow": 40})
    assert [(e["step"], e["flow"]) for e in read_log(path)] == [(1, 1), (2, 2), (3, 3), (4, 40)]


def test_a_new_training_begins_a_new_log(tmp_path: Path) -> None:
    (tmp_path / LOG_FILE).write_text('{"kind": "train", "step": 1}\n')
    with MetricsLogger(tmp_path) as journal:
        journal.write("train", 2, {})
    assert [e["step"] for e in read_log(tmp_path / LOG_FILE)] == [2]


def test_what_a_person_sees(tmp_path: Path) -> None:
    """A live table on a terminal, plain lines in a file."""
    for terminal in (True, False):
        text = io.StringIO()
        console = Console(file=text, force_terminal=terminal, width=100)
        with MetricsLogger(None, console) as journal:
            journal.show_progress("expert", 0.5)
            journal.write("train", 7, {"flow": 0.123456})
        assert "flow" in text.getvalue() and "0.1235" in text.getvalue()
        assert ("train 7:" in text.getvalue()) == (not terminal)


def test_tensorboard_has_the_figures(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing import event_accumulator  # type: ignore

    with MetricsLogger(tmp_path, trackers=["tensorboard"]) as journal:
        journal.write("train", 3, {"flow": 0.5, "stage": "a"})
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (event,) = events.Scalars("train/flow")
    assert (event.step, event.value) == (3, 0.5)


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb"])
def test_a_missing_tracker_is_named(
    tmp_path: Path, tracker: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(torch.utils, "tensorboard", raising=False)
    for module in ("torch.utils.tensorboard", "tensorboardX", "wandb"):
        monkeypatch.setitem(sys.modules, module, None)
    package = {"tensorboard": r"'pi05_ros\[train\]'", "wandb": "wandb"}[tracker]
    with pytest.raises(ConfigError, match=f"{tracker} is not installed: pip install {package}"):
        MetricsLogger(tmp_path, trackers=[tracker])


def test_wandb_receives_the_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through accelerate's tracker; a stand-in for the service's package."""
    calls: list[Any] = []
    run = SimpleNamespace(
        log=lambda values, step: calls.append((values, step)), finish=lambda: calls.append("end")
    )
    module = ModuleType("wandb")

    def init(**settings: Any) -> Any:
        calls.append(settings)
        return run

    module.init = init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    with MetricsLogger(tmp_path, trackers=["wandb"], kept_steps=2) as logger:
        logger.write("validation", 3, {"flow": 0.5, "stage": "a"})
    assert calls[0]["project"] == "pi05_ros" and calls[0]["id"] == tmp_path.name
    assert calls[1:] == [({"validation/flow": 0.5}, 3), "end"]
