"""Entry points of the executables: the environment first, then the node.

`python -m pi05_ros.nodes.start policy_node --ros-args …` starts a node without its script.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from pi05_ros.nodes.environment import prepare

SWITCH_INTERVAL_S = 5e-4
"""Python lets a thread keep the interpreter for 5 ms otherwise, and a control tick wait for it."""


def policy_node(args: Sequence[str] | None = None) -> int:
    """Run the node `policy` until it is interrupted; the process's exit code."""
    prepare()
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    from pi05_ros.nodes.policy_node import main

    return main(args)


def aloha_sim_node(args: Sequence[str] | None = None) -> int:
    """Run the node `aloha_sim` until it is interrupted; the process's exit code."""
    prepare()
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    try:
        from pi05_ros.nodes.aloha_sim_node import main
    except ImportError as error:
        if error.name != "mujoco" and "mujoco" not in str(error):
            raise
        raise SystemExit(f"aloha_sim: {error}") from error
    return main(args)


if __name__ == "__main__":
    nodes = {"policy_node": policy_node, "aloha_sim_node": aloha_sim_node}
    if len(sys.argv) < 2 or sys.argv[1] not in nodes:
        raise SystemExit(f"usage: python -m pi05_ros.nodes.start {{{','.join(nodes)}}} [ROS args]")
    raise SystemExit(nodes[sys.argv[1]](sys.argv[1:]))
