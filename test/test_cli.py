"""The command line says what is wrong in one line, before anything starts."""

from __future__ import annotations

import configparser
import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated

import pytest
import typer

from pi05_ros import __version__, cli
from pi05_ros.cli import Command, ValueIfBare, main

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert __version__ in capsys.readouterr().out


def test_help_lists_every_command_in_80_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    for command in cli.all_commands().values():
        name = command.name.split()[0]
        assert any(line.lstrip("│ ").startswith(name) for line in lines), name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dance"], "dance"),
        (["bench", "dance"], "dance"),
        (["demo", "--instruction", "  "], "must not be empty"),
        (["demo", "--seconds", "nan"], "'nan' is not a time"),
        (["demo", "--seconds", "0"], "'0' is not a time"),
        (["demo", "--speed", "3"], "--speed"),
    ],
)
def test_wrong_arguments_are_named(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_a_missing_params_file_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--params-file", "/no/such.yaml"]) == 1
    assert "/no/such.yaml" in capsys.readouterr().err


def test_a_command_started_by_the_module_fails_in_one_line() -> None:
    """Pins: a traceback, because `__main__.CommandError` was another class than the commands'."""
    command = [sys.executable, "-m", "pi05_ros.cli", "demo", "--params-file", "/no/such.yaml"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert found.returncode == 1
    assert len(found.stderr.splitlines()) == 1 and "/no/such.yaml" in found.stderr


def several(
    files: Annotated[list[str], typer.Argument()],
    tasks: Annotated[list[str], typer.Option("--tasks")] = [],  # noqa: B006
    quiet: Annotated[bool, typer.Option("--quiet")] = False,
) -> int:
    print(files, tasks, quiet)
    return 3


def bare(
    files: Annotated[list[str], typer.Argument()],
    ray: Annotated[str | None, ValueIfBare("auto"), typer.Option()] = None,
    quiet: Annotated[bool, typer.Option("--quiet")] = False,
) -> int:
    print(files, ray, quiet)
    return 0


def absent() -> int:
    raise ModuleNotFoundError("No module named 'mujoco'", name="mujoco")


def test_an_option_of_list_type_takes_several_values(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = Command("several", "", "", f"{__name__}:several")
    monkeypatch.setattr(cli, "all_commands", lambda: {"several": command})
    assert main(["several", "a", "--tasks", "touch", "pick", "--quiet", "--tasks=wave"]) == 3
    assert capsys.readouterr().out == "['a'] ['touch', 'pick', 'wave'] True\n"


@pytest.mark.parametrize(
    ("arguments", "value"),
    [([], None), (["--ray"], "auto"), (["--ray", "--quiet"], "auto"), (["--ray", "local"], "local"),
     (["--ray=local"], "local")],
)  # fmt: skip
def test_an_option_may_have_a_value_for_where_none_follows(
    arguments: list[str],
    value: str | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = Command("bare", "", "", f"{__name__}:bare")
    monkeypatch.setattr(cli, "all_commands", lambda: {"bare": command})
    assert main(["bare", "a", *arguments]) == 0
    assert capsys.readouterr().out == f"['a'] {value} {'--quiet' in arguments}\n"


def test_a_missing_extra_names_the_pip_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = Command("absent", "", "", f"{__name__}:absent", "sim")
    monkeypatch.setattr(cli, "all_commands", lambda: {"absent": command})
    assert main(["absent"]) == 1
    assert capsys.readouterr().err == "pi05 absent needs mujoco: pip install 'pi05_ros[sim]'\n"


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


def test_colcon_and_pip_install_the_same_entry_points() -> None:
    colcon = configparser.ConfigParser()
    colcon.read(ROOT / "cmake" / "lab_entry_points.cfg")
    pip = [entry for entry in entry_points(group=cli.ENTRY_POINTS) if entry.name == "lab"]
    lines = colcon["options.entry_points"][cli.ENTRY_POINTS].split()
    assert lines == ["lab", "=", pip[0].value]
