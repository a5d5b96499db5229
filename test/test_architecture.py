"""Who may import whom.

Faults pinned: torch or MuJoCo loaded into the control loop's process by an import, the lab needed
on a robot, ROS in a package that evaluation uses without it, packages that import each other in a
circle. Imports inside functions count, because a review overlooks them.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

RUNTIME, LAB = "pi05_ros", "pi05_lab"
HOUSE = Path(__file__).parents[1]


class Package(NamedTuple):
    """What a package or top-level module may import: ours, and from elsewhere."""

    ours: frozenset[str]
    others: frozenset[str]


def package(ours: str = "", others: str = "") -> Package:
    return Package(frozenset(ours.split()), frozenset(others.split()))


# Runtime names stand without "pi05_ros."; "ros" is rclpy and all message packages, pi05_ros.msg
# among them. "cli" may import nothing of the house: it finds commands by name.
RUNTIME_PACKAGES = {
    "types": package(others="numpy"),
    "device_errors": package(),
    "control": package("types", "numpy defusedxml"),
    "config": package("types control"),
    "observation": package("types", "numpy cv2 rosbags PIL"),
    "policy": package(
        "types",
        "numpy torch safetensors transformers tokenizers scipy huggingface_hub PIL yaml",
    ),
    "protocol": package(others="numpy msgpack"),
    "adapters": package("types policy protocol", "numpy torch cv2 lerobot websockets"),
    "server": package(
        "types device_errors executor protocol adapters cli", "numpy websockets ray rich typer"
    ),
    "executor": package("types device_errors", "numpy"),
    "requests": package("types control observation executor device_errors"),
    "runner": package("types control observation executor requests", "numpy"),
    "robot_config": package("types config control observation", "yaml"),
    "runner_factory": package("types robot_config control observation executor requests runner"),
    "check": package("types policy adapters cli", "numpy torch rich typer"),
    "nodes": package(
        "types device_errors control config observation policy adapters executor requests "
        "runner robot_config runner_factory",
        "numpy ros launch launch_ros ament_index_python cv2 yaml",
    ),
    "cli": package(others="rich typer"),
}
ALL_RUNTIME = " ".join(f"pi05_ros.{name}" for name in RUNTIME_PACKAGES if name not in ("nodes",))
LAB_PACKAGES = {
    "console": package(others="rich"),
    "files": package(),
    "parallel": package(),
    "commands": package("pi05_ros.cli"),
    "seeded_policy": package("pi05_ros.types"),
    "sim": package(
        "pi05_ros.types pi05_ros.config pi05_ros.control pi05_ros.nodes pi05_lab.files",
        "numpy mujoco ros rich gymnasium lerobot",
    ),
    "data": package(
        f"{ALL_RUNTIME} pi05_lab.sim pi05_lab.console pi05_lab.files pi05_lab.parallel "
        "pi05_lab.seeded_policy",
        "numpy cv2 rosbags mcap pyarrow av rich typer torch safetensors tensorstore "
        "huggingface_hub",
    ),
    "training": package(
        f"{ALL_RUNTIME} pi05_lab.data pi05_lab.console pi05_lab.files",
        "numpy torch cv2 accelerate peft huggingface_hub yaml rich typer tokenizers",
    ),
    "evaluation": package(
        f"{ALL_RUNTIME} pi05_lab.sim pi05_lab.data pi05_lab.console pi05_lab.files "
        "pi05_lab.parallel pi05_lab.seeded_policy pi05_ros.nodes",
        "numpy scipy mujoco cv2 av matplotlib rosbags mcap rich yaml ray rerun jinja2 pandas typer",
    ),
    "bench": package(
        f"{ALL_RUNTIME} pi05_lab.sim pi05_lab.evaluation pi05_lab.console pi05_lab.files "
        "pi05_lab.parallel",
        "numpy torch matplotlib rich typer pandas",
    ),
    "demo": package(
        f"{ALL_RUNTIME} pi05_ros.nodes pi05_lab.sim pi05_lab.data pi05_lab.evaluation "
        "pi05_lab.console pi05_lab.files",
        "numpy ros cv2 av matplotlib rich typer yaml rosbags launch launch_ros",
    ),
}


def with_prefix(name: str) -> str:
    return name if name.startswith((RUNTIME, LAB)) else f"{RUNTIME}.{name}"


PACKAGES = {
    f"{RUNTIME}.{name}": Package(frozenset(map(with_prefix, rules.ours)), rules.others)
    for name, rules in RUNTIME_PACKAGES.items()
} | {f"{LAB}.{name}": rules for name, rules in LAB_PACKAGES.items()}
ROS_HOMES = {"pi05_ros.nodes", "pi05_lab.sim.node", "pi05_lab.demo"}
"""Where rclpy and message packages may be imported."""
CV_BRIDGE_HOME = ("pi05_ros.observation.decode", "_converter")

ROS_ENDINGS = ("_msgs", "_srvs", "_interfaces")

# Packages that take long to load or are not installed everywhere.
HEAVY = {"torch", "transformers", "mujoco", "rclpy", "cv2", "rosbags", "matplotlib", "av", "scipy",
         "pyarrow", "pandas", "typer"}  # fmt: skip
# What importing all of a package may load. A package that imports its heavy packages in functions
# has none.
LOADS: dict[str, set[str]] = {
    "pi05_ros.policy": {"torch", "transformers", "scipy", "typer"},
    "pi05_ros.adapters": {"torch", "transformers", "scipy", "typer"},
    "pi05_ros.server": {"typer"},
    "pi05_ros.check": {"torch", "transformers", "scipy", "typer"},
    "pi05_ros.cli": {"typer"},
    "pi05_ros.nodes": {"rclpy", "torch", "transformers", "scipy", "typer"},
    "pi05_ros.nodes.policy_node": {"rclpy"},
    "pi05_lab.commands": {"typer"},
    "pi05_lab.sim": {"mujoco", "rclpy"},
    "pi05_lab.data": HEAVY - {"rclpy", "matplotlib"},
    "pi05_lab.training": HEAVY - {"rclpy", "matplotlib"},
    "pi05_lab.evaluation": HEAVY - {"rclpy"},
    "pi05_lab.bench": HEAVY - {"rclpy"},
    "pi05_lab.demo": HEAVY,
}


@dataclass(frozen=True)
class Import:
    """One import statement's target, as written in a module."""

    importer: str
    target: str
    line: int
    function: str | None
    """The innermost function around it."""
    typing_only: bool

    def __str__(self) -> str:
        return f"{self.importer} line {self.line} imports {self.target}"


def is_ours(target: str) -> bool:
    return target.split(".")[0] in (RUNTIME, LAB)


def kind_of(target: str) -> str:
    """The package that a target belongs to, with ROS as one."""
    if target == f"{RUNTIME}.msg" or target.startswith(f"{RUNTIME}.msg."):
        return "ros"
    top = target.split(".")[0]
    return "ros" if top == "rclpy" or top.endswith(ROS_ENDINGS) else top


class Collector(ast.NodeVisitor):
    """Finds the imports of one module, also by importlib, with the function they stand in."""

    def __init__(self, module: str, is_package: bool) -> None:
        self.imports: list[Import] = []
        self._module = module
        parts = module.split(".")
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
    """Whether a name is a module of the house (any name in its generated messages counts)."""
    if not is_ours(name):
        return False
    if kind_of(name) == "ros":
        return True
    path = HOUSE.joinpath(*name.split("."))
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def module_files() -> Iterator[tuple[str, Path]]:
    """(module name, file) of all that is written by hand."""
    for path in sorted([*(HOUSE / RUNTIME).rglob("*.py"), *(HOUSE / LAB).rglob("*.py")]):
        parts = path.relative_to(HOUSE).with_suffix("").parts
        if parts[:2] != (RUNTIME, "msg"):
            yield ".".join(part for part in parts if part != "__init__"), path


def imports_of(source: str, module: str, *, is_package: bool = False) -> list[Import]:
    collector = Collector(module, is_package)
    collector.visit(ast.parse(source))
    return collector.imports


def package_of(module: str) -> str:
    """`pi05_ros.control` of `pi05_ros.control.limits`."""
    return ".".join(module.split(".")[:2])


def violations(imports: list[Import]) -> list[str]:
    """Imports that the table does not allow, one line each."""
    found = []
    for item in imports:
        home = package_of(item.importer)
        rules = PACKAGES.get(home, package())
        kind = kind_of(item.target)
        if kind == "ros":
            homes = (item.importer, home)
            if "ros" not in rules.others or not ROS_HOMES.intersection(homes):
                found.append(f"{item}: ROS is for {sorted(ROS_HOMES)}")
        elif is_ours(item.target):
            allowed = {home, RUNTIME, *rules.ours}
            if package_of(item.target) not in allowed:
                found.append(f"{item}: it may import {sorted(rules.ours)}")
        elif kind == "cv_bridge":
            if (item.importer, item.function) != CV_BRIDGE_HOME:
                found.append(f"{item}: only {'.'.join(CV_BRIDGE_HOME)} may")
        elif kind not in sys.stdlib_module_names and kind not in rules.others:
            found.append(f"{item}: it may import {sorted(rules.others)}")
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


def test_every_file_is_in_the_table() -> None:
    unknown = {package_of(module) for module, _ in module_files()} - {RUNTIME, LAB, *PACKAGES}
    assert not unknown, f"say in the table what {sorted(unknown)} may import"
    assert set(PACKAGES) <= {package_of(module) for module, _ in module_files()}


def test_no_import_is_forbidden(imports: list[Import]) -> None:
    assert len(imports) > 50
    assert violations(imports) == []


def test_the_packages_themselves_import_nothing(imports: list[Import]) -> None:
    """Else every module would load it."""
    assert [str(item) for item in imports if item.importer in (RUNTIME, LAB)] == []


def test_the_runtime_imports_nothing_of_the_lab(imports: list[Import]) -> None:
    """A robot's computer needs none of the lab's dependencies."""
    runtime = [item for item in imports if item.importer.startswith(RUNTIME)]
    assert [str(item) for item in runtime if item.target.startswith(LAB)] == []


def test_no_imports_form_a_circle(imports: list[Import]) -> None:
    graph: dict[str, set[str]] = {}
    for item in imports:
        # A module that runs as __main__ may import itself under its name.
        itself = item.target == item.importer
        ros = kind_of(item.target) == "ros"
        if is_ours(item.target) and not (ros or itself or item.typing_only):
            graph.setdefault(item.importer, set()).add(item.target)
    try:
        order = list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail("imports in a circle: " + " → ".join(error.args[1]))
    assert "pi05_ros.types" in order


def test_the_table_has_no_circle() -> None:
    graph = {name: rules.ours for name, rules in PACKAGES.items()}
    assert "pi05_ros.types" in TopologicalSorter(graph).static_order()
    users = {name for name, rules in PACKAGES.items() if "pi05_ros.nodes" in rules.ours}
    assert users == {"pi05_lab.sim", "pi05_lab.demo", "pi05_lab.evaluation"}
    runtime = {name: rules for name, rules in PACKAGES.items() if name.startswith(RUNTIME)}
    for library, homes in (
        ("torch", {"policy", "adapters", "check"}),
        ("ros", {"nodes"}),
        ("mujoco", set()),
    ):
        found = {name for name, rules in runtime.items() if library in rules.others}
        assert found == {f"{RUNTIME}.{home}" for home in homes}


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
        ("pi05_lab.sim.scene", "from std_msgs.msg import String"),
        ("pi05_lab.training.config", "from pi05_ros.nodes.policy_node import PolicyNode"),
        ("nodes.policy_node", "def load():\n    import torch"),
        ("cli", "from pi05_ros.policy import Policy"),
        ("runner", "from pi05_lab.sim import arms"),
    ],
)
def test_a_forbidden_import_is_found(module: str, source: str) -> None:
    assert len(violations(imports_of(source, with_prefix(module)))) == 1


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
        ("cli", "import typer"),
        ("pi05_lab.sim.node", "import rclpy"),
    ],
)
def test_an_allowed_import_passes(module: str, source: str) -> None:
    assert violations(imports_of(source, with_prefix(module))) == []


def test_importing_a_package_loads_no_other_heavy_package() -> None:
    """All modules of each package are imported in an interpreter of their own.

    The packages that may load no heavy package share one.
    """
    groups = [(LOADS[name], [name]) for name in sorted(LOADS)]
    groups.append((set(), sorted({*PACKAGES} - {*LOADS})))
    with ThreadPoolExecutor(2) as pool:
        loaded = pool.map(lambda group: heavy_packages_of(group[1]), groups)
        for (allowed, names), found in zip(groups, loaded, strict=True):
            assert found <= allowed, f"importing {names} loads {sorted(found - allowed)}"


NOT_INSTALLED = ("pi05_lab.sim.lerobot_plugin", "pi05_ros.server.ray_serve")
"""Modules of LeRobot and Ray Serve, which `make test` does not install; test/external runs them."""


def heavy_packages_of(names: list[str]) -> set[str]:
    modules = [
        module
        for module, path in module_files()
        if any(module == name or module.startswith(f"{name}.") for name in names)
        and path.name != "__main__.py"
        and module not in NOT_INSTALLED
    ]
    program = (
        "import importlib, sys\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        "print(*sorted({name.split('.')[0] for name in sys.modules}))"
    )
    finished = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=HOUSE, timeout=120
    )
    assert finished.returncode == 0, finished.stderr
    return set(finished.stdout.split()) & HEAVY
