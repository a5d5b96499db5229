"""Locks the versions that `make test` and `make demo` install: `make lock PYTHON=python3.12`.

pip chooses the newest versions that pyproject.toml allows on this Python, without installing
them; requirements/constraints-<Python>.txt gets them as `name==version`. What only torch needs
(CUDA packages, sympy, …) is left out, torch included: its builds and their versions differ by
index, and the Makefile's TORCH names the release.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
EXTRAS = ("sim", "eval", "train", "dev")
"""The optional dependencies that `make test` installs."""
TOOLS = ("pip",)
UNLOCKED = "torch"


def requirements(project: dict[str, Any]) -> list[str]:
    """What `make test` installs, and what building the package needs."""
    optional = project["project"]["optional-dependencies"]
    return [
        *project["project"]["dependencies"],
        *(line for extra in EXTRAS for line in optional[extra]),
        *project["build-system"]["requires"],
        *TOOLS,
    ]


def resolve(wanted: list[str]) -> list[dict[str, Any]]:
    """The metadata of every distribution that pip would install for `wanted`."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        options = ["--dry-run", "--ignore-installed", "--quiet", "--report", str(report)]
        subprocess.run([sys.executable, "-m", "pip", "install", *options, *wanted], check=True)
        return [item["metadata"] for item in json.loads(report.read_text("utf-8"))["install"]]


def reached(wanted: list[str], metadata: list[dict[str, Any]]) -> dict[str, str]:
    """Name → version of the distributions that `wanted` leads to other than through torch."""
    found = {canonicalize_name(item["name"]): item for item in metadata}
    open_: list[tuple[Requirement, frozenset[str]]] = [
        (Requirement(line), frozenset()) for line in wanted
    ]
    seen: set[tuple[str, str]] = set()
    versions: dict[str, str] = {}
    while open_:
        requirement, extras = open_.pop()
        name = canonicalize_name(requirement.name)
        marker = requirement.marker
        if marker and not any(marker.evaluate({"extra": extra}) for extra in extras or {""}):
            continue
        if name == UNLOCKED:
            continue
        item = found[name]
        versions[name] = item["version"]
        for extra in requirement.extras or {""}:
            if (name, extra) not in seen:
                seen.add((name, extra))
                below = frozenset({extra, ""})
                open_ += [(Requirement(line), below) for line in item.get("requires_dist", [])]
    return versions


def main(torch: str) -> None:
    """Write the constraints file of the Python that runs this; `torch` is the Makefile's."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        wanted = requirements(tomllib.load(file))
    versions = reached(wanted, resolve([*wanted, torch]))
    python = ".".join(map(str, sys.version_info[:2]))
    path = ROOT / "requirements" / f"constraints-{python}.txt"
    lines = [f"{name}=={version}\n" for name, version in sorted(versions.items())]
    header = f"# Python {python}, with {torch}: written by `make lock`, not by hand\n"
    path.write_text(header + "".join(lines), "utf-8")
    print(f"{path.relative_to(ROOT)}: {len(lines)} versions")


if __name__ == "__main__":
    main(sys.argv[1])
