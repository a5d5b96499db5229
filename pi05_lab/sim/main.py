"""Entry point of the simulated robot's node.

`python -m pi05_lab.sim.main --ros-args …` starts the node without its script.
"""

from __future__ import annotations

from collections.abc import Sequence

from pi05_ros.nodes.main import Main, run_node


def aloha_sim_node(args: Sequence[str] | None = None) -> int:
    """Run the node `aloha_sim` until it is interrupted; the process's exit code."""

    def load() -> Main:
        try:
            from pi05_lab.sim.node import main
        except ImportError as error:
            if error.name != "mujoco" and "mujoco" not in str(error):
                raise
            raise SystemExit(f"aloha_sim: {error}") from error
        return main

    return run_node("aloha_sim", load, args)


if __name__ == "__main__":
    raise SystemExit(aloha_sim_node())
