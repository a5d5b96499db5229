"""Each checkpoint in the policy node, with the simulated robot, through the ROS graph.

    python node_runs.py CHECKPOINT...

The node must configure, infer without failures, and command the arms; what they do is no matter,
because the policies are untrained. Chunks that end before they arrive must be refused by name.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from pi05_lab.demo.client import connect
from pi05_lab.demo.processes import DemoProcesses
from pi05_lab.demo.report import DemoRecord
from pi05_lab.demo.ros_domain import use_own_domain
from pi05_ros.nodes.main import prepare

STARTUP_S = 120.0
MOTION_S = 6.0


def run(checkpoint: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        processes = DemoProcesses(Path(folder), checkpoint)
        record = DemoRecord(joint_names=[])
        with connect(processes, record) as client:
            client.wait_for_robot(STARTUP_S)
            client.change_state("configure", STARTUP_S)
            client.send_instruction("touch the red cube with the left arm")
            client.change_state("activate", 10.0)
            end_s = time.monotonic() + MOTION_S
            while time.monotonic() < end_s:
                client.check()
                time.sleep(0.1)
            status = client.fresh_status()
            commands = sum(map(len, record.commanded.values()))
            client.change_state("deactivate", 10.0)
    problems = [text for text in status.problems if "a chunk lasts" in text]
    print(f"{checkpoint}: {len(record.chunks)} chunks, {commands} trajectories, {problems}")
    assert len(record.chunks) > 3, "the node made no chunks"
    assert commands or problems, "it neither moves nor says why"


def main() -> int:
    use_own_domain()
    prepare()
    for checkpoint in sys.argv[1:]:
        run(checkpoint)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
