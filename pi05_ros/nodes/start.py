"""Entry points of the executables: the environment first, then the node.

`python -m pi05_ros.nodes.start policy_node --ros-args …` starts a node without its script.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from pi05_ros.nodes.environment import prepare
from pi05_ros.nodes.params_files import command_line_fault, rcl_fault

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

    return _run("policy", load, args)


def aloha_sim_node(args: Sequence[str] | None = None) -> int:
    """Run the node `aloha_sim` until it is interrupted; the process's exit code."""

    def load() -> Main:
        try:
            from pi05_ros.nodes.aloha_sim_node import main
        except ImportError as error:
            if error.name != "mujoco" and "mujoco" not in str(error):
                raise
            raise SystemExit(f"aloha_sim: {error}") from error
        return main

    return _run("aloha_sim", load, args)


def _run(name: str, load: Callable[[], Main], args: Sequence[str] | None) -> int:
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
    nodes = {"policy_node": policy_node, "aloha_sim_node": aloha_sim_node}
    if len(sys.argv) < 2 or sys.argv[1] not in nodes:
        raise SystemExit(f"usage: python -m pi05_ros.nodes.start {{{','.join(nodes)}}} [ROS args]")
    raise SystemExit(nodes[sys.argv[1]](sys.argv[1:]))
