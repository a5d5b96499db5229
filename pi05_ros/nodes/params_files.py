"""A params file is looked at before ROS reads it: one line with its path, not a traceback."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

MAX_BYTES = 4 * 2**20
_OPTION = "--params-file"
_RCL_ERROR = re.compile(r"failed to initialize rcl: (?P<why>.*?)(?:, at [^ ]+:\d+.*)?$")


def params_file_fault(path: str | Path) -> str:
    """What keeps a file from being a params file of ROS nodes, with its path; "" if nothing."""
    file = Path(path).expanduser()
    if not file.exists():
        return f"params file {str(path)!r} does not exist; config/aloha.yaml is an example"
    if not file.is_file():
        return f"params file {str(path)!r} is not a file; config/aloha.yaml is an example"
    try:
        if file.stat().st_size > MAX_BYTES:
            return f"params file {str(path)!r} is larger than {MAX_BYTES >> 20} MiB"
        document = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        return f"params file {str(path)!r} cannot be read: {error.strerror}"
    except Exception as error:
        # beside YAMLError what int(), dates and UTF-8 raise for bad values, and RecursionError
        return f"params file {str(path)!r} is not valid YAML: {' '.join(str(error).split())[:300]}"
    entries = document.values() if isinstance(document, Mapping) else ()
    if not any(isinstance(entry, Mapping) and "ros__parameters" in entry for entry in entries):
        return (
            f"params file {str(path)!r} has no node with ros__parameters; "
            "config/aloha.yaml is an example"
        )
    return ""


def command_line_fault(args: Sequence[str]) -> str:
    """The fault of the first bad `--params-file` in a process's arguments; "" if there is none."""
    for option, value in zip(args, [*args[1:], ""], strict=True):
        if option == _OPTION:
            fault = params_file_fault(value) if value else f"{_OPTION} needs a file behind it"
            if fault:
                return fault
    return ""


def rcl_fault(error: Exception) -> str:
    """What rcl refuses in the arguments or a params file, in one line; "" for another error.

    rcl reads fewer forms than YAML has: no aliases, no lists of mixed types.
    """
    found = _RCL_ERROR.search(" ".join(str(error).split()))
    if found is not None:
        return found["why"]
    if type(error).__name__ == "UnknownROSArgsError":
        return f"unknown ROS arguments {error}"
    return ""
