"""The constraints files: `make test` fails for the project's faults alone.

Pins: a new release at the registry (numpy's type stubs) that turned `make test` red on three of
four Pythons.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


@pytest.fixture(scope="module")
def lock() -> ModuleType:
    spec = importlib.util.spec_from_file_location("lock", ROOT / "scripts" / "lock.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def locked(python: str) -> dict[str, str]:
    """Name → version of a Python's constraints file."""
    text = (ROOT / "requirements" / f"constraints-{python}.txt").read_text("utf-8")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.+!]*", line) for line in lines), lines
    return dict(line.split("==") for line in lines)  # type: ignore[misc]


def test_every_supported_python_has_a_file() -> None:
    series = PROJECT["project"]["requires-python"]
    assert series == ">=3.10,<3.14"
    found = sorted(path.stem for path in (ROOT / "requirements").glob("constraints-*.txt"))
    assert found == [f"constraints-{python}" for python in PYTHONS]


@pytest.mark.parametrize("python", PYTHONS)
def test_what_tests_lint_and_demo_install_is_locked_within_its_range(
    python: str, lock: ModuleType
) -> None:
    """A dependency that is added or moved without `make lock` is noticed here."""
    versions = locked(python)
    for line in lock.requirements(PROJECT):
        requirement = Requirement(line)
        name = canonicalize_name(requirement.name)
        if name == "torch":
            continue
        assert name in versions, f"{line} is not locked for Python {python}: make lock"
        assert requirement.specifier.contains(versions[name]), (
            f"{line}, and {versions[name]} is locked for Python {python}: make lock"
        )


@pytest.mark.parametrize("python", PYTHONS)
def test_torch_and_what_its_builds_bring_are_not_locked(python: str) -> None:
    """An index of CPU builds has other versions of them, and no CUDA packages."""
    names = locked(python)
    assert not [name for name in names if re.match(r"torch$|triton|nvidia-|cuda-|sympy", name)]


def test_lock_follows_markers_and_extras_and_stops_at_torch(lock: ModuleType) -> None:
    metadata = [
        {
            "name": "Numeric_Tool",
            "version": "1.2",
            "requires_dist": [
                "Base>=1",
                'fast; extra == "fast"',
                'slow; extra == "slow"',
                'old; python_version < "3"',
                "torch",
            ],
        },
        {"name": "base", "version": "1.0"},
        {"name": "fast", "version": "3.0", "requires_dist": ["base"]},
        {"name": "torch", "version": "2.13.0+cpu", "requires_dist": ["sympy"]},
        {"name": "sympy", "version": "1.14"},
    ]
    found = lock.reached(["numeric-tool[fast]>=1", "torch==2.13.0"], metadata)
    assert found == {"numeric-tool": "1.2", "base": "1.0", "fast": "3.0"}


def test_types_are_checked_for_the_python_that_runs() -> None:
    """A fixed version cannot read the stubs that a newer Python's numpy has."""
    assert "python_version" not in PROJECT["tool"]["mypy"]
