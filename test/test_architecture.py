"""The rules of who may import whom.

Faults pinned: torch or MuJoCo pulled into the control loop's process by an import, ROS in a room
that evaluation and bags use without it, rooms that know each other in a circle. Imports inside
functions count, because they are the ones that a review overlooks.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = "pi05_ros"
ROOT = Path(__file__).parents[1] / PACKAGE


class Room(NamedTuple):
    """What a room may import: other rooms, and packages from elsewhere."""

    rooms: frozenset[str]
    packages: frozenset[str]


def room(rooms: str = "", packages: str = "") -> Room:
    return Room(frozenset(rooms.split()), frozenset(packages.split()))


# "ros" stands for rclpy and all message packages, pi05_ros.msg among them.
LIBRARY = "types config control observation policy executor runner"
ROOMS = {
    "types": room(packages="numpy"),
    "topic_checks": room(),
    "control": room("types", "numpy"),
    "config": room("types control topic_checks"),
    "observation": room("types", "numpy cv2 rosbags"),
    "policy": room(
        "types",
        "numpy torch safetensors transformers tokenizers huggingface_hub PIL rich yaml tensorstore",
    ),
    "executor": room("types", "numpy"),
    "runner": room("types config control observation executor", "numpy"),
    "sim": room("types", "numpy mujoco rich"),
    "recording": room("types observation sim", "numpy cv2 rosbags pyarrow av rich"),
    "evaluation": room(
        f"{LIBRARY} sim recording",
        "numpy scipy mujoco cv2 av matplotlib rosbags rich yaml ray rerun",
    ),
    "training": room("types policy recording", "numpy torch safetensors accelerate yaml rich"),
    "nodes": room(
        f"{LIBRARY} topic_checks sim recording evaluation",
        "numpy ros launch launch_ros ament_index_python cv2 rich yaml",
    ),
    "cli": room(f"{LIBRARY} sim recording evaluation training nodes", "rich"),
}
CV_BRIDGE_HOME = ("observation.decode", "_converter")

ROS_ENDINGS = ("_msgs", "_srvs", "_interfaces")

# Packages that take long to load or are not installed everywhere.
HEAVY = {"torch", "transformers", "mujoco", "rclpy", "cv2", "rosbags", "matplotlib", "av", "scipy"}
# What importing all of a room may load. A room that imports its heavy packages in functions has
# none; a robot's computer has neither the simulator nor the evaluation's plots.
LOADS = {
    "types": set(),
    "topic_checks": set(),
    "control": set(),
    "config": set(),
    "observation": set(),
    "executor": set(),
    "runner": set(),
    "policy": {"torch", "transformers", "scipy"},
    "sim": {"mujoco"},
    "recording": {"cv2", "rosbags", "av"},
    "evaluation": HEAVY - {"rclpy"},
    "training": HEAVY - {"rclpy"},
    "cli": set(),
    "nodes": HEAVY,
    "nodes.policy_node": {"rclpy"},
}


@dataclass(frozen=True)
class Import:
    """One import statement's target, as written in a module."""

    importer: str
    """Module inside the package, without its name: `control.limits`; the package itself is ''."""
    target: str
    line: int
    function: str | None
    """The innermost function around it."""
    typing_only: bool

    def __str__(self) -> str:
        return f"{PACKAGE}.{self.importer} line {self.line} imports {self.target}"

    @property
    def inner(self) -> str | None:
        """The target's name inside the package, if that is where it is."""
        if self.target == PACKAGE:
            return ""
        return self.target.removeprefix(f"{PACKAGE}.") if is_ours(self.target) else None


def is_ours(target: str) -> bool:
    return target == PACKAGE or target.startswith(f"{PACKAGE}.")


def kind_of(target: str) -> str:
    """The package that a target belongs to, with ROS as one."""
    if target == f"{PACKAGE}.msg" or target.startswith(f"{PACKAGE}.msg."):
        return "ros"
    top = target.split(".")[0]
    return "ros" if top == "rclpy" or top.endswith(ROS_ENDINGS) else top


class Collector(ast.NodeVisitor):
    """Finds the imports of one module, also by importlib, with the function they stand in."""

    def __init__(self, module: str, is_package: bool) -> None:
        self.imports: list[Import] = []
        self._module = module
        parts = f"{PACKAGE}.{module}".rstrip(".").split(".")
        self._package = parts if is_package else parts[:-1]
        self._functions: list[str] = []
        self._typing_only = False

    def _add(self, target: str, node: ast.AST) -> None:
        function = self._functions[-1] if self._functions else None
        line = getattr(node, "lineno", 0)
        self.imports.append(Import(self._module, target, line, function, self._typing_only))

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self._add(alias.name, node)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        base = node.module or ""
        if node.level:
            package = self._package[: len(self._package) - node.level + 1]
            base = ".".join([*package, *([base] if base else [])])
        for alias in node.names:
            name = f"{base}.{alias.name}"
            self._add(name if is_module(name) else base, node)

    def visit_Call(self, node: ast.Call) -> None:
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        first = node.args[0] if node.args else None
        if (
            name in ("import_module", "__import__")
            and isinstance(first, ast.Constant)
            and isinstance(first.value, str)
        ):
            self._add(first.value, node)
        self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        self._functions.append(node.name)
        self.generic_visit(node)
        self._functions.pop()

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_If(self, node: ast.If) -> None:
        typing_only = getattr(node.test, "attr", getattr(node.test, "id", "")) == "TYPE_CHECKING"
        self._typing_only, before = self._typing_only or typing_only, self._typing_only
        for child in node.body:
            self.visit(child)
        self._typing_only = before
        for child in node.orelse:
            self.visit(child)


def is_module(name: str) -> bool:
    """Whether a name is a module of the package (any name in its generated messages counts)."""
    if not name.startswith(f"{PACKAGE}."):
        return False
    if kind_of(name) == "ros":
        return True
    path = ROOT.joinpath(*name.split(".")[1:])
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def module_files() -> Iterator[tuple[str, Path]]:
    """(module name inside the package, file) of all that is written by hand."""
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[0] != "msg":
            yield ".".join(part for part in parts if part != "__init__"), path


def imports_of(source: str, module: str, *, is_package: bool = False) -> list[Import]:
    collector = Collector(module, is_package)
    collector.visit(ast.parse(source))
    return collector.imports


def room_of(module: str) -> str:
    return module.split(".")[0]


def violations(imports: list[Import]) -> list[str]:
    """Imports that the table does not allow, one line each."""
    found = []
    for item in imports:
        rules = ROOMS.get(room_of(item.importer), room())
        kind = kind_of(item.target)
        if item.inner is not None and kind != "ros":
            allowed = {room_of(item.importer), "", *rules.rooms}
            if room_of(item.inner) not in allowed:
                found.append(f"{item}: the room may import {sorted(rules.rooms)}")
        elif kind == "cv_bridge":
            if (item.importer, item.function) != CV_BRIDGE_HOME:
                found.append(f"{item}: only {'.'.join(CV_BRIDGE_HOME)} may")
        elif kind not in sys.stdlib_module_names and kind not in rules.packages:
            found.append(f"{item}: the room may import {sorted(rules.packages)}")
        if room_of(item.importer) == "cli" and item.function is None and not item.typing_only:
            own = item.inner is not None and room_of(item.inner) in ("", "cli")
            if not own and kind not in sys.stdlib_module_names:
                found.append(f"{item}: only inside the command that needs it, `--help` is quick")
    return found


@pytest.fixture(scope="module")
def imports() -> list[Import]:
    return [
        item
        for module, path in module_files()
        for item in imports_of(
            path.read_text(encoding="utf-8"), module, is_package=path.name == "__init__.py"
        )
    ]


def test_every_file_is_in_a_room_of_the_table() -> None:
    strangers = {room_of(module) for module, _ in module_files()} - {"", *ROOMS}
    assert not strangers, f"say in ROOMS what {sorted(strangers)} may import"


def test_nobody_imports_what_its_room_may_not(imports: list[Import]) -> None:
    assert len(imports) > 50
    assert violations(imports) == []


def test_the_package_itself_imports_nothing(imports: list[Import]) -> None:
    """Else every room would load it."""
    assert [str(item) for item in imports if item.importer == ""] == []


def test_modules_know_each_other_in_no_circle(imports: list[Import]) -> None:
    graph: dict[str, set[str]] = {}
    for item in imports:
        inner = item.inner
        if inner and kind_of(item.target) != "ros" and not item.typing_only:
            graph.setdefault(item.importer, set()).add(inner)
    try:
        order = list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail("imports in a circle: " + " → ".join(error.args[1]))
    assert "types" in order


def test_the_table_has_no_circle_and_nobody_but_the_command_line_imports_nodes() -> None:
    order = list(
        TopologicalSorter({name: rules.rooms for name, rules in ROOMS.items()}).static_order()
    )
    assert order[0] == "types" and order[-1] == "cli"
    assert [name for name, rules in ROOMS.items() if "nodes" in rules.rooms] == ["cli"]
    for name, package in (("torch", {"policy", "training"}), ("mujoco", {"sim", "evaluation"}),
                          ("ros", {"nodes"})):  # fmt: skip
        assert {other for other, rules in ROOMS.items() if name in rules.packages} == package


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("control.limits", "import torch"),
        ("control.limits", "def f():\n    import scipy.optimize"),
        ("control.limits", "from pi05_ros.policy import Policy"),
        ("control.limits", "from ..observation.buffer import Gates"),
        ("control.limits", "from pi05_ros import executor"),
        ("policy.model", "async def f():\n    from sensor_msgs.msg import Image"),
        ("policy.model", "import importlib\nx = importlib.import_module('rclpy')"),
        ("observation.buffer", "from pi05_ros.msg import ActionChunk"),
        ("observation.buffer", "def _converter():\n    import cv_bridge"),
        ("observation.decode", "import cv_bridge"),
        ("executor", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch"),
        ("sim.scene", "from std_msgs.msg import String"),
        ("evaluation.report", "from pi05_ros.nodes.policy_node import PolicyNode"),
        ("nodes.policy_node", "def load():\n    import torch"),
        ("cli", "from pi05_ros.policy import Policy"),
        ("cli.main", "import rich"),
    ],
)
def test_a_forbidden_import_is_found(module: str, source: str) -> None:
    assert len(violations(imports_of(source, module))) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (
            "control.limits",
            "import math\nimport numpy.typing\nfrom pi05_ros.types import JointGroup",
        ),
        ("control.trajectory", "from .limits import MotionLimiter"),
        ("observation.decode", "def _converter():\n    from cv_bridge import CvBridge"),
        ("nodes.policy_node", "from pi05_ros.msg import ActionChunk\nimport rclpy.qos"),
        ("cli", "import argparse\ndef demo():\n    from pi05_ros.nodes.demo import run_demo"),
        ("cli.main", "from pi05_ros import __version__\nfrom pi05_ros.cli import bench"),
    ],
)
def test_an_allowed_import_passes(module: str, source: str) -> None:
    assert violations(imports_of(source, module)) == []


def existing_rooms() -> list[str]:
    modules = {module for module, _ in module_files()}
    rooms = {room_of(module) for module in modules} - {""}
    return sorted(rooms | {name for name in LOADS if name in modules})


@pytest.mark.parametrize("name", existing_rooms())
def test_importing_a_room_loads_no_other_rooms_heavy_package(name: str) -> None:
    """All modules of the room are imported, in an interpreter of their own."""
    modules = [
        f"{PACKAGE}.{module}"
        for module, path in module_files()
        if (module == name or module.startswith(f"{name}.")) and path.name != "__main__.py"
    ]
    program = (
        "import importlib, sys\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        "print(*sorted({name.split('.')[0] for name in sys.modules}))"
    )
    finished = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        cwd=ROOT.parent,
        timeout=120,
    )
    assert finished.returncode == 0, finished.stderr
    loaded = set(finished.stdout.split()) & HEAVY
    assert loaded <= LOADS[name], f"importing {name} loads {sorted(loaded - LOADS[name])}"
