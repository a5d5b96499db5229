"""A checkpoint from elsewhere neither blocks, nor runs code, nor writes to the terminal.

Pins: a config.json that is a FIFO or a device (the check never ended), a tokenizer with 600,000
added tokens (half a minute), a tensor name with escape sequences printed raw, and the question on
the terminal whether to run the checkpoint's code.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pi05_ros.check import check
from pi05_ros.policy import Policy
from pi05_ros.policy.checkpoint import SHIPPED
from pi05_ros.policy.weights import CheckpointError, printable

PROCESSOR_STATE = "policy_postprocessor_step_0_unnormalizer_processor.safetensors"


@pytest.fixture()
def folder(tmp_path: Path) -> Path:
    """A copy of the shipped checkpoint."""
    return Path(shutil.copytree(SHIPPED, tmp_path / "checkpoint"))


def pi05_check(folder: Path, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pi05_ros.cli", "check", str(folder)]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    "name",
    ["config.json", "policy_preprocessor.json", "tokenizer_config.json", "special_tokens_map.json",
     PROCESSOR_STATE],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["fifo", "device"])
def test_what_is_no_regular_file_is_named_at_once(folder: Path, name: str, kind: str) -> None:
    path = folder / name
    path.unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    done = pi05_check(folder)
    assert done.returncode == 1
    assert name in done.stdout.replace("\n", "")
    assert (
        "not a regular file" in done.stdout.replace("\n", "")
        and "Traceback" not in done.stdout + done.stderr
    )


def test_a_large_config_is_not_read(folder: Path) -> None:
    with (folder / "config.json").open("r+b") as file:
        file.truncate(5 * 2**30)
    (problem,) = check(folder).problems
    assert "config.json has 5120 MiB" in problem


def test_a_tokenizer_with_too_many_added_tokens_is_refused(folder: Path) -> None:
    path = folder / "tokenizer.json"
    document = json.loads(path.read_text("utf-8"))
    first = document["added_tokens"][0]
    document["added_tokens"] += [
        {**first, "id": 2000 + number, "content": f"<t{number}>"} for number in range(600_000)
    ]
    path.write_text(json.dumps(document), "utf-8")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json has (600,004 added tokens|.* MiB)"):
        Policy.from_pretrained(folder, "aloha", "cpu")


def test_a_tensor_name_cannot_write_to_the_terminal(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    name = next(key for key in header if key != "__metadata__")
    header["evil\x1b]0;title\x07\x1b[2J\u202e"] = header.pop(name)
    encoded = json.dumps(header).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data[8 + size :])
    done = pi05_check(folder)
    assert done.returncode == 1
    assert "evil\\x1b]0;title" in done.stdout
    assert not set("\x1b\x07\u202e") & set(done.stdout + done.stderr)
    with pytest.raises(CheckpointError) as error:
        Policy.from_pretrained(folder, "aloha", "cpu")
    assert str(error.value).isprintable()


def test_a_camera_name_cannot_write_to_the_terminal(folder: Path) -> None:
    path = folder / "config.json"
    document = json.loads(path.read_text("utf-8"))
    features = document["input_features"]
    features["observation.images.\x1b[2Jcam"] = features.pop("observation.images.cam_high")
    path.write_text(json.dumps(document), "utf-8")
    assert "\x1b" not in pi05_check(folder).stdout


def test_the_terminal_is_not_asked_about_the_checkpoints_code(folder: Path) -> None:
    """And "y" in its input does not run it."""
    mark = folder / "ran"
    (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nclass Evil: pass\n")
    for name in ("tokenizer_config.json", "config.json"):
        document = json.loads((folder / name).read_text("utf-8"))
        document["auto_map"] = {
            "AutoTokenizer": ["evil.Evil", "evil.Evil"],
            "AutoConfig": "evil.Evil",
        }
        document.pop("tokenizer_class", None)
        (folder / name).write_text(json.dumps(document), "utf-8")
    done = pi05_check(folder, stdin="y\n" * 20)
    assert not mark.exists()
    assert "Do you wish to run" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("text", "shown"),
    [("π0.5 näher", "π0.5 näher"), ("a\nb", "a\\nb"), ("\u202ex", "\\u202ex"), ("", "")],
)
def test_printable(text: str, shown: str) -> None:
    assert printable(text) == shown
