"""Checkpoints by id; faults: a cached one needs a connection, a typo becomes a download."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from small_policy.tokenizer import write_tokenizer

from pi05_ros.policy import checkpoint as hub
from pi05_ros.policy.checkpoint import cached_tokenizer, checkpoint_folder
from pi05_ros.policy.policy import Policy
from pi05_ros.policy.weights import CheckpointError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OTHER = "f" * 40


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache without a connection."""
    path = tmp_path / "hub"
    path.mkdir()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return path


def store(cache: Path, repo: str, commit: str, revision: str = "main") -> Path:
    """A snapshot's folder in Hugging Face's layout, to be filled."""
    root = cache / ("models--" + repo.replace("/", "--"))
    (root / "refs").mkdir(parents=True, exist_ok=True)
    (root / "refs" / revision).write_text(commit)
    folder = root / "snapshots" / commit
    folder.mkdir(parents=True)
    return folder


def test_a_cached_checkpoint_runs_offline(cache: Path, small_folder: Path) -> None:
    """Fault: a robot without a connection does not start with what it has on its disk."""
    folder = store(cache, "someone/pi05_cups", COMMIT)
    shutil.copytree(small_folder, folder, dirs_exist_ok=True)
    for name in ("someone/pi05_cups", f"someone/pi05_cups@{COMMIT}", "someone/pi05_cups@main"):
        assert checkpoint_folder(name) == folder
    assert Policy.from_pretrained("someone/pi05_cups@main", device="cpu").horizon == 50


def test_the_revision_is_pinned(cache: Path) -> None:
    """Fault: a pinned checkpoint replaced by a newer one of the same name."""
    old, new = store(cache, "a/b", COMMIT, "v1"), store(cache, "a/b", OTHER)
    for folder in (old, new):
        (folder / "config.json").write_text("{}")
    assert checkpoint_folder("a/b@v1") == checkpoint_folder(f"a/b@{COMMIT}") == old
    assert checkpoint_folder("a/b") == new


def test_a_cached_commit_needs_no_request(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault: a start that waits for the hub although the commit is cached and cannot change."""
    folder = store(cache, "a/b", COMMIT)
    (folder / "config.json").write_text("{}")
    requests: list[bool] = []
    snapshot = hub._snapshot

    def watched(
        repo: str, revision: str | None, patterns: tuple[str, ...], local: bool
    ) -> Path | str:
        requests.append(local)
        return snapshot(repo, revision, patterns, local)

    monkeypatch.setattr(hub, "_snapshot", watched)
    assert checkpoint_folder(f"a/b@{COMMIT}") == folder
    assert requests == [True]


def test_only_safe_files_are_fetched() -> None:
    """Fault: a pickle brought onto the robot."""
    assert all(not pattern.endswith((".bin", ".pt", ".pkl")) for pattern in hub.PATTERNS)
    assert {"*.json", "*.safetensors"} <= set(hub.PATTERNS)


def test_a_folder_comes_before_an_id(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault: someone else's checkpoint instead of the folder of that name."""
    store(cache, "a/b", COMMIT)
    mine = cache / "a" / "b"
    mine.mkdir(parents=True)
    monkeypatch.chdir(cache)
    assert checkpoint_folder("a/b") == Path("a/b")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a/b", r"a/b is not a folder here, .* neither cached nor can it be fetched \(.+\)"),
        (f"a/b@{COMMIT}", "neither cached"),
        ("/nowhere/at/all", "is not a folder here, nor a Hugging Face id"),
        ("smal", "is not a folder here, nor a Hugging Face id"),
        ("a/b c", "is not a folder here, nor a Hugging Face id"),
    ],
)
def test_unknown_checkpoints_are_named(cache: Path, name: str, message: str) -> None:
    """Fault: the hub's traceback for a typing error."""
    with pytest.raises(CheckpointError, match=message):
        checkpoint_folder(name)


def test_a_checkpoint_without_tokenizer_takes_the_cached_one(
    cache: Path, small_folder: Path
) -> None:
    """Fault: LeRobot's own folders, which name the tokenizer and do not hold it, are refused."""
    folder = Path(shutil.copytree(small_folder, cache.parent / "checkpoint"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    text = (folder / "policy_preprocessor.json").read_text()
    changed = text.replace('"tokenizer_name": "."', '"tokenizer_name": "google/tiny"')
    assert changed != text
    (folder / "policy_preprocessor.json").write_text(changed)
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        Policy.from_pretrained(folder, device="cpu")
    assert cached_tokenizer("google/tiny") is None
    write_tokenizer(store(cache, "google/tiny", COMMIT))
    assert Policy.from_pretrained(folder, device="cpu").horizon == 50
