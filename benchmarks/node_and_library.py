"""The same episodes through the ROS graph and through the library: success, time, delay.

    python benchmarks/node_and_library.py [--per-task 10] [--tasks touch pick ...] [--checkpoint …]

Each episode starts from the same state of the simulated robot, with the same instruction. In the
graph, `aloha_sim_node` and `policy_node` run as processes in real time; the library then runs the
episode in simulated time with the delay measured in the graph. The policy's noise differs.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from pi05_lab.demo.client import DemoClient, connect
from pi05_lab.demo.processes import DemoProcesses
from pi05_lab.demo.report import DemoRecord
from pi05_lab.demo.ros_domain import use_own_domain
from pi05_lab.evaluation.closed_loop.agents import make_agent
from pi05_lab.evaluation.closed_loop.episode import ClosedLoop, Settings, Trial, reset_to_start
from pi05_lab.evaluation.closed_loop.summary import Rate
from pi05_lab.evaluation.closed_loop.trials import chosen_tasks, plan_trials, spread
from pi05_lab.sim.arms import SimulatedAloha
from pi05_lab.sim.judge import Judge
from pi05_lab.sim.tasks import VERBS
from pi05_ros.nodes.main import prepare
from pi05_ros.robot_config import read_robot_config

STARTUP_S = 90.0


def play_in_graph(
    client: DemoClient, trial: Trial, sim: SimulatedAloha, limit_s: float
) -> float | None:
    """When the task was done, in seconds since activation; None if it was not."""
    record = client.record
    reset_to_start(sim, trial)
    client.place(sim.qpos().tolist())
    client.send_instruction(trial.instruction)
    judge = Judge(trial.task, sim)
    first = len(record.qpos)
    client.change_state("activate", 10.0)
    since_s = record.qpos_s[-1]
    done_at_s = None
    while done_at_s is None and record.qpos_s[-1] - since_s < limit_s:
        client.check()
        for stamp_s, qpos in zip(record.qpos_s[first:], record.qpos[first:], strict=False):
            sim.set_qpos(qpos)
            sim.data.time = max(0.0, stamp_s - since_s)
            judge.update()
            first += 1
        done_at_s = judge.done_at_s
        time.sleep(0.05)
    client.change_state("deactivate", 10.0)
    time.sleep(0.5)
    return done_at_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--per-task", type=int, default=10)
    parser.add_argument("--tasks", nargs="+", default=["touch", "pick", "home"], choices=VERBS)
    parser.add_argument("--checkpoint", default="small")
    parser.add_argument("--limit-s", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=4)
    options = parser.parse_args()
    use_own_domain()
    prepare()
    console = Console()
    trials = plan_trials(spread(chosen_tasks(options.tasks), options.per_task), options.seed)
    sim = SimulatedAloha()
    with tempfile.TemporaryDirectory() as folder:
        processes = DemoProcesses(Path(folder), options.checkpoint)
        with connect(processes, DemoRecord(joint_names=[])) as client:
            client.wait_for_robot(STARTUP_S)
            client.change_state("configure", STARTUP_S)
            in_graph = [
                play_in_graph(client, trial, sim, options.limit_s)
                for trial in track(trials, "through the graph", console=console)
            ]
            latency_s = client.fresh_status().latency_p50_s
    agent = make_agent(options.checkpoint)
    robot = read_robot_config()
    loop = ClosedLoop(agent, robot, Settings(delay_s=latency_s, limit_s=options.limit_s))
    in_library = [
        loop.play(trial).done_at_s for trial in track(trials, "the library", console=console)
    ]
    agent.close()
    table = Table(title=f"delay {1e3 * latency_s:.0f} ms, {options.limit_s:g} s per episode")
    for heading in ("task", "graph", "library", "same outcome", "graph, s", "library, s"):
        table.add_column(heading, justify="left" if heading == "task" else "right")
    for verb in options.tasks:
        rows = [i for i, trial in enumerate(trials) if trial.task.verb == verb]
        table.add_row(verb, *_compare([in_graph[i] for i in rows], [in_library[i] for i in rows]))
    table.add_row("all", *_compare(in_graph, in_library))
    console.print(table)


def _compare(graph: list[float | None], library: list[float | None]) -> list[str]:
    same = sum((a is None) == (b is None) for a, b in zip(graph, library, strict=True))
    return [_rate(graph), _rate(library), f"{same}/{len(graph)}", _median(graph), _median(library)]


def _rate(times: list[float | None]) -> str:
    rate = Rate(sum(t is not None for t in times), len(times))
    low, high = rate.interval or (0.0, 1.0)
    return f"{rate.count}/{rate.of} ({100 * low:.0f}-{100 * high:.0f} %)"


def _median(times: list[float | None]) -> str:
    done = sorted(t for t in times if t is not None)
    return f"{done[len(done) // 2]:.1f}" if done else "-"


if __name__ == "__main__":
    main()
