"""`pi05 train`; faults: a traceback instead of a line, exit code 0 after an error."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import yaml
from huggingface_hub import HfApi
from squares_world import make_config, stage  # type: ignore[import-not-found]

from pi05_lab.training.state import has_state
from pi05_ros.cli import main


def call(*arguments: str) -> int:
    return main(["train", *arguments])


@pytest.fixture
def file(dataset: Path, tmp_path: Path) -> Path:
    config = make_config(tmp_path / "out", dataset, stages=[stage(steps=2)])
    path = tmp_path / "train.yaml"
    path.write_text(yaml.safe_dump(config.to_dict()))
    return path


def test_it_trains(
    file: Path, tmp_path: Path, dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = str(tmp_path / "elsewhere")
    assert call(str(file), "--output", other, "--data", str(dataset), "--set", "seed=2") == 0
    assert (tmp_path / "elsewhere" / "checkpoint" / "model.safetensors").is_file()
    shown = capsys.readouterr().err
    assert "train 2:" in shown and "done" in shown


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colour": 1}, "unknown key colour"),
        ({"evaluation": {"function": "pi05_ros.nothing:f"}}, "evaluation.function"),
        ({"evaluation": {"function": "pi05_ros.types"}}, "module:function"),
        ({"data": {"datasets": [{"root": "/nowhere"}]}}, "/nowhere is not a LeRobot data set"),
        ({"network": {"start": "/nowhere"}}, "/nowhere"),
        ({"device": "tpu9"}, "device: 'tpu9' is unknown"),
        ({"robot": "aloha"}, "state_dim 14"),
    ],
)
def test_errors_are_one_line(
    file: Path, change: dict[str, object], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | change))
    assert call(str(file)) == 1
    shown = capsys.readouterr().err
    assert message in " ".join(shown.split()) and "Traceback" not in shown


def test_a_signal_stops_and_says_how_to_go_on(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault: Ctrl-C loses the time since the last state."""
    from pi05_lab.training.train import Trainer

    step = Trainer._step

    def interrupted(self: Trainer, *arguments: object) -> None:
        step(self, *arguments)  # type: ignore[arg-type]
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_step", interrupted)
        assert call(str(file), "--quiet", "--set", "log_steps=2") == 130
    assert has_state(tmp_path / "out")
    shown = " ".join(capsys.readouterr().err.split())
    assert f"pi05 train {file} --set log_steps=2 --resume" in shown
    assert call(str(file), "--quiet", "--set", "log_steps=2", "--resume") == 0
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_checkpoint_is_uploaded(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checked before the training; a failed upload keeps the checkpoint."""
    assert call(str(file), "--push-to-hub", "no name") == 1
    assert "is not OWNER/NAME" in " ".join(capsys.readouterr().err.split())
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert call(str(file), "--push-to-hub", "me/policy") == 1
    assert "log in first" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()

    monkeypatch.setattr("huggingface_hub.get_token", lambda: "token")
    monkeypatch.setattr(HfApi, "whoami", lambda self: {"name": "me"})
    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo, **_: f"https://hub/{repo}")
    sent: list[str] = []

    def fail(self: HfApi, folder_path: Path, **_: object) -> None:
        sent.extend(sorted(path.name for path in folder_path.iterdir()))
        raise OSError("no space left")

    monkeypatch.setattr(HfApi, "upload_folder", fail)
    assert call(str(file), "--quiet", "--push-to-hub", "me/policy") == 1
    assert {"README.md", "config.json", "model.safetensors"} <= set(sent)
    shown = " ".join(capsys.readouterr().err.split())
    assert "no space left" in shown and "hf upload me/policy" in shown
    assert (tmp_path / "out" / "checkpoint" / "model.safetensors").is_file()
    monkeypatch.setattr(HfApi, "upload_folder", lambda self, **_: None)
    assert call(str(file), "--quiet", "--resume", "--push-to-hub", "me/policy") == 0
    assert "https://hub/me/policy: uploaded" in capsys.readouterr().err
