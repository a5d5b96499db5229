"""The command line says what is wrong in one line, before anything starts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pi05_ros import __version__
from pi05_ros.cli import main

BIN = Path(sys.executable).parent


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert __version__ in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dance"], "dance"),
        ([], "command"),
        (["demo", "--instruction", "  "], "must not be empty"),
        (["demo", "--seconds", "nan"], "'nan' is not a time"),
        (["demo", "--seconds", "0"], "'0' is not a time"),
        (["demo", "--speed", "3"], "--speed"),
    ],
)
def test_wrong_arguments_are_named(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_a_missing_params_file_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--params-file", "/no/such.yaml"]) == 1
    assert "/no/such.yaml" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["pi05", "lib/pi05_ros/pi05"])
def test_the_installed_executables_run(name: str) -> None:
    """Pins: scripts in lib/pi05_ros, which `ros2 run` starts, without an interpreter."""
    path = BIN / name if "/" not in name else BIN.parent / name
    found = subprocess.run([path, "--version"], capture_output=True, text=True, check=True)
    assert __version__ in found.stdout


def test_nodes_without_an_installation_say_so(tmp_path: Path) -> None:
    """Pins: a traceback from deep inside rclpy for a package that was never installed."""
    env = {**os.environ, "AMENT_PREFIX_PATH": str(tmp_path)}
    code = (
        "import sys; sys.prefix = '/nowhere';"
        "from pi05_ros.nodes.main import share_directory; share_directory()"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert found.returncode == 1
    assert "Install the package" in found.stderr
    assert "Traceback" not in found.stderr
