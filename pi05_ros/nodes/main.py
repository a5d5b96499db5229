"""Entry point of the policy node: the environment first (ament index, image transport), then rclpy.

`python -m pi05_ros.nodes.main --ros-args …` starts the node without its script.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from pi05_ros.nodes.params_files import command_line_fault, rcl_fault

PACKAGE = "pi05_ros"


def share_directory() -> Path:
    """Where `config/` and `launch/` are: `share/pi05_ros` of the prefix that the package is in.

    Raises:
        SystemExit: the package was put on the path without being installed.
    """
    prefixes = [Path(p) for p in os.environ.get("AMENT_PREFIX_PATH", "").split(os.pathsep) if p]
    for prefix in [*prefixes, Path(sys.prefix)]:
        if (prefix / "share" / PACKAGE / "config").is_dir():
            return prefix / "share" / PACKAGE
    raise SystemExit(
        f"{PACKAGE}: its share directory is in none of {[*map(str, prefixes), sys.prefix]}. "
        "Install the package (pip install . or colcon build) and source the install space."
    )


def prepare() -> None:
    """Set what the user has not set; call before the first rclpy import of a process.

    FastDDS's default shared-memory segment (0.5 MB) is smaller than one 640x480 picture, and most
    of them get lost; the profile shipped in `config/` holds them. Its lease of 8 s instead of 20 s
    takes a killed process out of the graph earlier.
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


SWITCH_INTERVAL_S = 5e-4
"""Python lets a thread keep the interpreter for 5 ms otherwise, and a control tick wait for it."""
BAD_ARGUMENTS = 2
"""Exit code: an argument or a parameter is wrong, the same command would fail again."""

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
    if fault:
        print(f"{name}: {fault}", file=sys.stderr)
        return BAD_ARGUMENTS
    prepare()
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    try:
        return load()(args)
    except Exception as error:
        fault = rcl_fault(error)
        if not fault:
            raise
        print(f"{name}: {fault}", file=sys.stderr)
        return BAD_ARGUMENTS


if __name__ == "__main__":
    raise SystemExit(policy_node())
