"""What the executables say about their arguments: one line with the path, exit code 2.

Pins: tracebacks and exit code 0 or 1 for a params file that is missing or malformed.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from harness import MODULES

from pi05_ros.nodes import main


def start(node: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", MODULES[node], "--ros-args", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("node", ["policy_node", "aloha_sim_node"])
@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "does not exist"),
        ("policy: [", "not valid YAML"),
        ('/**:\n  ros__parameters:\n    a: [1, "x"]\n', "Sequence should be of same type"),
    ],
)
def test_a_params_file_that_cannot_be_used_is_named(
    tmp_path: Path, node: str, text: str | None, words: str
) -> None:
    file = tmp_path / "robot.yaml"
    if text is not None:
        file.write_text(text)
    done = start(node, "--params-file", str(file))
    assert done.returncode == 2
    assert str(file) in done.stderr and words in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("-p", "width:=[1,a"), "width:=[1,a"),
        (("--foo",), "--foo"),
        (("--params-file",), "--params-file needs a file"),
    ],
)
def test_wrong_ros_arguments_are_one_line(arguments: tuple[str, ...], words: str) -> None:
    done = start("aloha_sim_node", *arguments)
    assert done.returncode == 2
    assert words in done.stderr and "Traceback" not in done.stderr


def test_a_node_starts_without_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["aloha_sim_node"])
    monkeypatch.setattr(sys, "setswitchinterval", lambda seconds: None)
    monkeypatch.setattr(main, "prepare", lambda: None)
    assert main.run_node("aloha_sim", lambda: lambda args: 7, None) == 7
