"""One and several processes; faults: replicas that drift apart, files written by each of them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from squares_world import make_config, stage  # type: ignore[import-not-found]

from pi05_lab.training.checkpoints import load_state
from pi05_lab.training.config import ConfigError
from pi05_lab.training.metrics import LOG_FILE, read_log
from pi05_lab.training.processes import open_processes
from pi05_lab.training.train import train

RUN = """
import sys, torch
from pathlib import Path
from pi05_lab.training.config import read_config
from pi05_lab.training import train as trainer
torch.set_num_threads(1)
end = trainer.Trainer._end_stage
def noted(self, *arguments):
    end(self, *arguments)
    torch.save(self.module.state_dict(), sys.argv[2])
trainer.Trainer._end_stage = noted
trainer.train(read_config(sys.argv[1]))
"""


def test_devices_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'gpu' is unknown"):
        open_processes(make_config(tmp_path, tmp_path, device="gpu"))
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="needs CUDA, which is not available"):
            open_processes(make_config(tmp_path, tmp_path, device="cuda"))


def test_a_missing_accelerate_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ConfigError, match=r"pi05_ros\[train\]"):
        open_processes(make_config(tmp_path, tmp_path, accelerate=True))


def test_one_process_needs_no_accelerate(
    tmp_path: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    assert train(make_config(tmp_path, dataset, stages=[stage(steps=1)])) is not None


@pytest.mark.slow
def test_two_processes_learn_one_network(tmp_path: Path, dataset: Path) -> None:
    """Equal weights on both, from different data; one log, one checkpoint."""
    stages = [
        stage(name="a", losses={"chunk": 1.0}, steps=2, train=["vision", "projector", "prefix"]),
        stage(name="b", steps=2, train=["expert", "bridge"]),
    ]
    config = make_config(tmp_path / "out", dataset, stages=stages, accelerate=True)
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(config.to_dict()))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    children = [
        subprocess.Popen(
            [sys.executable, "-c", RUN, str(tmp_path / "train.yaml"), str(tmp_path / f"{rank}.pt")],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    try:
        assert [child.wait(timeout=120) for child in children] == [0, 0]
    finally:
        for child in children:
            child.kill()
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first and all(torch.equal(first[name], second[name]) for name in first)
    steps = [e["step"] for e in read_log(tmp_path / "out" / LOG_FILE) if e["kind"] == "train"]
    assert steps == [1, 2, 3, 4]
    alone = make_config(tmp_path / "alone", dataset, stages=stages)
    train(alone)
    parts = load_state(tmp_path / "alone", alone)[1]["module"]
    assert any(not torch.equal(first[name], parts[name]) for name in first)
