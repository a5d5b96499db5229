"""Entry point of the policy node: check the command line, set the environment, then import rclpy.

`python -m pi05_ros.nodes.main --ros-args …` starts the node without its script.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import yaml

from pi05_ros.nodes import EXIT_BAD_START

PACKAGE = "pi05_ros"
MAX_PARAMS_BYTES = 4 * 2**20
SWITCH_INTERVAL_S = 5e-4
"""By default Python lets a thread keep the interpreter for 5 ms while a control tick waits."""
_RCL_ERROR = re.compile(r"failed to initialize rcl: (?P<why>.*?)(?:, at [^ ]+:\d+.*)?$")

Main = Callable[[Sequence[str] | None], int]


def policy_node(args: Sequence[str] | None = None) -> int:
    """Run the node `policy` until it is interrupted; the process's exit code."""

    def load() -> Main:
        from pi05_ros.nodes.policy_node import main

        return main

    return run_node("policy", load, args)


def run_node(name: str, load: Callable[[], Main], args: Sequence[str] | None) -> int:
    """Check the command line, prepare the process, then load and run a node; its exit code."""
    fault = command_line_fault(sys.argv[1:] if args is None else args)
    if not fault:
        prepare()
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        try:
            return load()(args)
        except Exception as error:
            fault = rcl_fault(error)
            if not fault:
                raise
    print(f"{name}: {fault}", file=sys.stderr)
    return EXIT_BAD_START


def prepare() -> None:
    """Set the environment where the user has not; call before the process first imports rclpy.

    FastDDS's default shared-memory segment (0.5 MB) is smaller than one 640x480 image, and most
    images are lost; the profile in `config/` holds them. Its lease of 8 s instead of 20 s removes
    a killed process from the graph earlier.
    """
    os.environ.setdefault("AMENT_PREFIX_PATH", sys.prefix)
    if not any(os.environ.get(v) for v in ("FASTDDS_DEFAULT_PROFILES_FILE", "RMW_FASTRTPS_XML")):
        profile = share_directory() / "config" / "fastdds_shm.xml"
        os.environ["FASTDDS_DEFAULT_PROFILES_FILE"] = str(profile)
    try:
        import rclpy  # noqa: F401
    except ImportError as error:
        raise SystemExit(
            f"{PACKAGE}: no ROS 2 for this Python ({sys.executable}): {error}. Source a ROS "
            "installation (source /opt/ros/<distro>/setup.bash), or install the package with pip "
            "on x86-64 Linux with Python 3.10-3.13, which brings ROS 2 wheels."
        ) from error


def share_directory() -> Path:
    """`share/pi05_ros` of the prefix that the package is installed in: `config/` and `launch/`.

    Raises:
        SystemExit: the package is on the path without being installed.
    """
    prefixes = [Path(p) for p in os.environ.get("AMENT_PREFIX_PATH", "").split(os.pathsep) if p]
    for prefix in [*prefixes, Path(sys.prefix)]:
        if (prefix / "share" / PACKAGE / "config").is_dir():
            return prefix / "share" / PACKAGE
    raise SystemExit(
        f"{PACKAGE}: its share directory is in none of {[*map(str, prefixes), sys.prefix]}. "
        "Install the package (pip install . or colcon build) and source the install space."
    )


def params_file_fault(path: str | Path) -> str:
    """Why a file is no params file of ROS nodes, in one line with its path; "" if it is one."""
    name, file = f"params file {str(path)!r}", Path(path).expanduser()
    example = "config/aloha.yaml is an example"
    if not file.exists():
        return f"{name} does not exist; {example}"
    if not file.is_file():
        return f"{name} is not a file; {example}"
    try:
        if file.stat().st_size > MAX_PARAMS_BYTES:
            return f"{name} is larger than {MAX_PARAMS_BYTES >> 20} MiB"
        document = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        return f"{name} cannot be read: {error.strerror}"
    except Exception as error:
        # YAMLError, and what int(), dates, UTF-8 and deep nesting raise for bad values
        return f"{name} is not valid YAML: {' '.join(str(error).split())[:300]}"
    entries = document.values() if isinstance(document, Mapping) else ()
    if not any(isinstance(entry, Mapping) and "ros__parameters" in entry for entry in entries):
        return f"{name} has no node with ros__parameters; {example}"
    return ""


def command_line_fault(args: Sequence[str]) -> str:
    """The fault of the first bad `--params-file` in a process's arguments; "" if there is none."""
    for option, value in pairwise([*args, ""]):
        if option == "--params-file":
            fault = params_file_fault(value) if value else f"{option} needs a file behind it"
            if fault:
                return fault
    return ""


def rcl_fault(error: Exception) -> str:
    """Why rcl refuses the arguments or a params file, in one line; "" for another error.

    rcl reads less than YAML: no aliases, no lists of mixed types.
    """
    if found := _RCL_ERROR.search(" ".join(str(error).split())):
        return found["why"]
    unknown = type(error).__name__ == "UnknownROSArgsError"
    return f"unknown ROS arguments {error}" if unknown else ""


if __name__ == "__main__":
    raise SystemExit(policy_node())
