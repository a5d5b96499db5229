"""Waiting times of control, cameras and inference in one process.

    python benchmarks/beside_ros.py [--seconds 30] [--param executor_nice:=0 ...]

The simulator (three cameras at 30 Hz, 640×480) and the policy node run as processes; the shipped
policy infers continuously. The node measures the figures by time.monotonic and publishes them on
`~/status` and `/diagnostics`.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from pi05_lab.demo.client import connect
from pi05_lab.demo.processes import DemoProcesses
from pi05_lab.demo.report import DemoRecord
from pi05_lab.demo.ros_domain import use_own_domain
from pi05_ros.nodes.main import prepare

STARTUP_S = 90.0
INSTRUCTIONS = ("touch the red cube with the left arm", "touch the blue cube with the right arm")
FIGURES = {
    "tick": "control tick, |interval - 20 ms|",
    "start": "last image's arrival → inference begins",
    "publish": "actions available → trajectory published",
}
LIMITS_MS = {"tick": 2.0, "start": 5.0, "publish": 2.0}


def cpu_s(pid: int) -> float:
    """User and system time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / 100.0


def main() -> int:
    """Exit code 1 if a figure exceeds its limit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--param", action="append", default=[], help="name:=value of the policy")
    options = parser.parse_args()
    use_own_domain()
    prepare()
    with tempfile.TemporaryDirectory() as folder:
        processes = DemoProcesses(Path(folder), "small", overrides=options.param)
        with connect(processes, DemoRecord(joint_names=[])) as client:
            client.wait_for_robot(STARTUP_S)
            client.change_state("configure", STARTUP_S)
            client.change_state("activate", 10.0)
            used = {name: cpu_s(pid) for name, pid in processes.pids().items()}
            begin_s = time.monotonic()
            turn = 0
            while time.monotonic() - begin_s < options.seconds:
                client.send_instruction(INSTRUCTIONS[turn % 2])
                turn += 1
                time.sleep(min(5.0, options.seconds))
                client.check()
            elapsed_s = time.monotonic() - begin_s
            used = {
                name: (cpu_s(pid) - used[name]) / elapsed_s
                for name, pid in processes.pids().items()
            }
            status = client.fresh_status()
            executor = client.policy_part("executor")
    print(
        f"{elapsed_s:.0f} s, {status.inferences} chunks, {status.tick_rate_hz:.1f} Hz, image to "
        f"usable chunk p50 {1e3 * status.latency_p50_s:.0f} ms, p95 "
        f"{1e3 * status.latency_p95_s:.0f} ms, network p50 {1e3 * status.network_p50_s:.0f} ms"
    )
    for name, share in used.items():
        print(f"{name}: {share:.2f} cores")
    print("| | p50 ms | p99 ms | limit |\n|---|---|---|---|")
    failed = False
    for key, what in FIGURES.items():
        if key == "tick":
            p50, p99 = 1e3 * status.tick_jitter_p50_s, 1e3 * status.tick_jitter_p99_s
        else:
            p50, p99 = (1e3 * float(executor[f"{key} wait {q} s"]) for q in ("p50", "p99"))
        failed = failed or p99 > LIMITS_MS[key]
        print(f"| {what} | {p50:.2f} | {p99:.2f} | {LIMITS_MS[key]:g} |")
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
