"""An untrusted checkpoint neither blocks, nor runs code, nor controls the terminal.

Pins: a config.json that is a FIFO or a device (the check never ended), a tokenizer with 600,000
added tokens (half a minute), a tensor name with escape sequences printed raw, and a prompt on the
terminal whether to run the checkpoint's code.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from pi05_ros import cli
from pi05_ros.check import check
from pi05_ros.policy import Policy
from pi05_ros.policy.checkpoint import SHIPPED
from pi05_ros.policy.weights import CheckpointError, printable

PROCESSOR_STATE = "policy_postprocessor_step_0_unnormalizer_processor.safetensors"


@pytest.fixture()
def folder(tmp_path: Path) -> Path:
    """A copy of the shipped checkpoint."""
    return Path(shutil.copytree(SHIPPED, tmp_path / "checkpoint"))


def pi05_check(folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """The command's exit code and its output without line breaks; fails if it blocks."""
    codes: list[int] = []
    command = threading.Thread(
        target=lambda: codes.append(cli.main(["check", str(folder)])), daemon=True
    )
    command.start()
    command.join(60)
    assert codes, "the command blocks"
    printed = capsys.readouterr()
    return codes[0], (printed.out + printed.err).replace("\n", "")


@pytest.mark.parametrize(
    "name",
    ["config.json", "policy_preprocessor.json", "tokenizer_config.json", "special_tokens_map.json",
     PROCESSOR_STATE],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["fifo", "device"])
def test_special_files_are_refused_at_once(
    folder: Path, name: str, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder / name
    path.unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    code, text = pi05_check(folder, capsys)
    assert code == 1
    assert name in text
    assert "not a regular file" in text and "Traceback" not in text


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


def test_a_tensor_name_cannot_write_to_the_terminal(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    name = next(key for key in header if key != "__metadata__")
    header["evil\x1b]0;title\x07\x1b[2J\u202e"] = header.pop(name)
    encoded = json.dumps(header).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data[8 + size :])
    code, text = pi05_check(folder, capsys)
    assert code == 1
    assert "evil\\x1b]0;title" in text
    assert not set("\x1b\x07\u202e") & set(text)
    with pytest.raises(CheckpointError) as error:
        Policy.from_pretrained(folder, "aloha", "cpu")
    assert str(error.value).isprintable()


def test_a_camera_name_cannot_write_to_the_terminal(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder / "config.json"
    document = json.loads(path.read_text("utf-8"))
    features = document["input_features"]
    features["observation.images.\x1b[2Jcam"] = features.pop("observation.images.cam_high")
    path.write_text(json.dumps(document), "utf-8")
    assert "\x1b" not in pi05_check(folder, capsys)[1]


@pytest.mark.slow
def test_the_checkpoints_code_is_not_run_by_yes_on_the_terminal(folder: Path) -> None:
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
    command = [sys.executable, "-m", "pi05_ros.cli", "check", str(folder)]
    done = subprocess.run(command, input="y\n" * 20, capture_output=True, text=True, timeout=60)
    assert not mark.exists()
    assert "Do you wish to run" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("text", "shown"),
    [("π0.5 näher", "π0.5 näher"), ("a\nb", "a\\nb"), ("\u202ex", "\\u202ex"), ("", "")],
)
def test_printable(text: str, shown: str) -> None:
    assert printable(text) == shown
