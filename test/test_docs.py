"""The docs name tests and files that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_named_tests_and_files_exist(path: Path) -> None:
    """Pins: promises in docs/reliability.md whose test was renamed."""
    text = path.read_text(encoding="utf-8")
    tests = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "test").rglob("*.py"))
    names = set(re.findall(r"`(test_\w+)`", text))
    assert not {name for name in names if f"def {name}(" not in tests}
    files = set(re.findall(r"`((?:test|benchmarks|config|examples|docs)/[\w/.]+\.\w+)`", text))
    links = {link for link in re.findall(r"\]\(([^)#:]+)[)#]", text)}
    assert not {name for name in files if not (ROOT / name).exists()}
    assert not {link for link in links if not (path.parent / link).exists()}
