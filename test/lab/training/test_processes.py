"""One and several processes; faults: replicas that drift apart, files written by each of them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from squares_world import make_config, stage  # type: ignore[import-not-found]

from pi05_lab.training.config import ConfigError, TrainConfig, parse_config
from pi05_lab.training.metrics import LOG_FILE, read_log
from pi05_lab.training.processes import open_processes
from pi05_lab.training.train import train

RUN = """
import os, signal, sys, torch
from pi05_lab.training.config import read_config
from pi05_lab.training import train as trainer
torch.set_num_threads(1)
killed_at = int(os.environ.get("KILLED_AT", "0"))
step = trainer.Trainer._step
def counted(self, *arguments):
    step(self, *arguments)
    if self.position.total_steps == killed_at:
        os.kill(os.getpid(), signal.SIGKILL)
trainer.Trainer._step = counted
trainer.train(read_config(sys.argv[1]), resume="--resume" in sys.argv)
"""
SHARDED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


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


def two_stages(output: Path, dataset: Path, **changes: Any) -> TrainConfig:
    """20 steps; a plug-in's loss, then flow matching with several noises and clean prefixes."""
    learning = ["vision", "projector", "prefix"]
    stages = [
        stage(name="a", losses={"chunk": 1.0}, steps=8, train=learning),
        stage(name="b", steps=12, train=["expert", "bridge"], samples_per_prefix=2)
        | {"rtc_max_delay": 2},
    ]
    # the second state is in the middle of the second stage
    return make_config(output, dataset, stages=stages, checkpoint_steps=12, **changes)


def run(
    config: TrainConfig, folder: Path, environment: Mapping[str, str], *options: str
) -> list[int]:
    """Train in two processes; their exit codes."""
    (folder / "train.yaml").write_text(yaml.safe_dump(config.to_dict()))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    children = [
        subprocess.Popen(
            [sys.executable, "-c", RUN, str(folder / "train.yaml"), *options],
            env={**os.environ, **common, **environment, "RANK": str(r), "LOCAL_RANK": str(r)},
        )
        for r in range(2)
    ]
    try:
        return [child.wait(timeout=180) for child in children]
    finally:
        for child in children:
            child.kill()


def figures(output: Path) -> list[list[float]]:
    """Loss and gradient's norm of each step; the loss is a running mean."""
    return [
        [entry["step"], entry["flow"] if "flow" in entry else entry["chunk"], entry["norm"]]
        for entry in read_log(output / LOG_FILE)
        if entry["kind"] == "train"
    ]


def tensors(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "checkpoint" / "model.safetensors")


@pytest.fixture(scope="module")
def alone(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of one process."""
    output = tmp_path_factory.mktemp("alone")
    train(two_stages(output, dataset))
    return output


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True], ids=["replicas", "sharded"])
def test_two_processes_learn_what_one_does(
    tmp_path: Path, dataset: Path, alone: Path, sharded: bool
) -> None:
    """Losses and weights; one log, one checkpoint. Fault: another number of processes, other data.

    Killed in the second stage and resumed: a sharded one by two processes and again by one.
    """
    environment = SHARDED if sharded else {}
    config = two_stages(tmp_path / "two", dataset, accelerate=True)
    assert run(config, tmp_path, environment) == [0, 0]
    expected = np.array(figures(alone))
    # AdamW turns rounding into whole updates where a gradient is near 0: a third of a learning rate
    np.testing.assert_allclose(figures(tmp_path / "two"), expected, rtol=1e-5)
    for name, weight in tensors(alone).items():
        torch.testing.assert_close(tensors(tmp_path / "two")[name], weight, rtol=0, atol=3e-4)
    mine, theirs = (
        [entry for entry in read_log(folder / LOG_FILE) if entry["kind"] == "validation"][-1]
        for folder in (tmp_path / "two", alone)
    )
    assert mine["flow"] == pytest.approx(theirs["flow"], rel=1e-4)

    config = two_stages(tmp_path / "killed", dataset, accelerate=True)
    assert 0 not in run(config, tmp_path, {**environment, "KILLED_AT": "15"})
    if sharded:
        assert 0 not in run(config, tmp_path, {**environment, "KILLED_AT": "18"}, "--resume")
    config = two_stages(tmp_path / "killed", dataset)
    assert train(config, resume=True) is not None
    # running means restart at a resumption
    np.testing.assert_allclose(
        np.array(figures(tmp_path / "killed"))[:, [0, 2]], expected[:, [0, 2]], rtol=1e-5
    )
    for name, weight in tensors(alone).items():
        torch.testing.assert_close(tensors(tmp_path / "killed")[name], weight, rtol=0, atol=3e-4)


def test_passes_share_a_step(tmp_path: Path, dataset: Path, alone: Path) -> None:
    """Gradient accumulation; fault: other frames, or the sum of the passes for their mean."""
    config = two_stages(tmp_path, dataset).to_dict()
    for each in config["stages"]:
        each["accumulate"] = 2
    train(parse_config(config))
    np.testing.assert_allclose(figures(tmp_path), figures(alone), rtol=1e-5)


@pytest.mark.parametrize(
    ("environment", "changes", "message"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, {}, "configured for DeepSpeed"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, {}, "configured for Megatron-LM"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, {}, "set accumulate in the stages"),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, {}, "mixed_precision fp16; set it to no"),
        ({"ACCELERATE_USE_FSDP": "true"}, {}, "FSDP version 1: set fsdp_version: 2"),
        (SHARDED | {"FSDP_OFFLOAD_PARAMS": "true"}, {}, "fsdp_offload_params"),
        (SHARDED, {"ema_device": "cpu"}, "ema_device: cpu is not for a sharded network"),
        (SHARDED, {"stages": [stage(optimizer="muon")]}, "muon needs whole matrices"),
        (SHARDED, {}, "FSDP needs at least 2 processes"),
    ],
)
def test_what_accelerate_cannot_be_configured_for(
    tmp_path: Path,
    environment: dict[str, str],
    changes: dict[str, Any],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Fault: the setting was ignored, or the wrapped module trained and nothing saved of it."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        open_processes(make_config(tmp_path, tmp_path, accelerate=True, **changes))
