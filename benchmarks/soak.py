"""Simulator and policy node under load, with faults at random.

    python benchmarks/soak.py [--minutes 30] [--seed 0] [--checkpoint small] [--output soak_out]

Three cameras at 30 Hz. Every few seconds a fault fires: a camera stops, joints arrive permuted or
with a name twice, the policy raises, gives NaN, sleeps or hangs, instructions come by the hundred,
somebody calls ~/stop, the simulator is killed and started again. A watcher in the place of the
controllers checks every trajectory against the limits. Prints a Markdown report; the exit code is
1 where a process ended or raised, a limit was broken, a fault was not recovered from, or memory
grew by 2 % and more.

The policy node is `faulty_policy_node.py`. Joint states go through this process, which spoils them
at times: the simulator's are remapped to `sim/joint_states`.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pi05_ros.nodes.environment import prepare, share_directory

HERE = Path(__file__).parent
CAMERAS = ("cam_high", "cam_left_wrist", "cam_right_wrist")
WARM_UP_SHARE = 0.1
"""Of the time, before memory is looked at: allocators and history buffers fill up first."""
RECOVERY_LIMIT_S = 30.0
SAMPLE_S = 5.0
GROWTH_LIMIT = 0.02
INSTRUCTION = "wave with the left arm"


class Processes:
    """The two nodes, their logs and their memory."""

    def __init__(self, output: Path, checkpoint: str) -> None:
        params = ["--params-file", str(share_directory() / "config" / "aloha.yaml")]
        sim = [sys.executable, "-m", "pi05_ros.nodes.start", "aloha_sim_node", "--ros-args"]
        node = [sys.executable, str(HERE / "faulty_policy_node.py"), "--ros-args"]
        self._commands = {
            "sim": [*sim, *params, "-r", "joint_states:=sim/joint_states"],
            "node": [*node, *params, "-p", f"checkpoint:={checkpoint}", "-p", "autostart:=true",
                     "-p", f"instruction:={INSTRUCTION}", "-p", "status_rate_hz:=10.0"],
        }  # fmt: skip
        self._output = output
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        for name in self._commands:
            self.log(name).unlink(missing_ok=True)

    def log(self, name: str) -> Path:
        return self._output / f"soak_{name}.log"

    def start(self, name: str) -> None:
        with self.log(name).open("ab") as log:
            self._running[name] = subprocess.Popen(
                self._commands[name], stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def kill(self, name: str) -> None:
        self._running[name].kill()
        self._running[name].wait()

    def ended(self) -> list[str]:
        return [name for name, process in self._running.items() if process.poll() is not None]

    def rss_mb(self, name: str) -> float:
        text = Path(f"/proc/{self._running[name].pid}/status").read_text()
        kilobytes = next(line for line in text.splitlines() if line.startswith("VmRSS"))
        return int(kilobytes.split()[1]) / 1e3

    def stop(self) -> list[int]:
        for process in self._running.values():
            process.send_signal(signal.SIGINT)
        return [process.wait(20.0) for process in self._running.values()]

    def tracebacks(self) -> int:
        return sum(
            self.log(name).read_text(errors="replace").count("Traceback") for name in self._commands
        )


class Watcher:
    """Stands between the nodes: passes joint states on, checks trajectories, gives orders."""

    def __init__(self) -> None:
        import rclpy
        from lifecycle_msgs.srv import ChangeState
        from rcl_interfaces.srv import SetParameters
        from rclpy.executors import SingleThreadedExecutor
        from sensor_msgs.msg import JointState
        from std_msgs.msg import String
        from std_srvs.srv import Trigger
        from trajectory_msgs.msg import JointTrajectory

        from pi05_ros.evaluation.robot_config import read_robot_config
        from pi05_ros.msg import ActionChunk, PolicyStatus
        from pi05_ros.nodes.messages import INSTRUCTION_QOS, TRAJECTORY_QOS

        robot = read_robot_config(share_directory() / "config" / "aloha.yaml")
        self._joints, self._dt_s = robot.joints, robot.control.dt_s
        self.spoil: Callable[[Any], Any] = lambda message: message
        self.trajectories = self.violations = 0
        self.state = 0
        self.chunk_s = self.trajectory_s = 0.0
        rclpy.init()
        self.node = node = rclpy.create_node("soak")
        self._states = node.create_publisher(JointState, "joint_states", 10)
        self._instructions = node.create_publisher(String, "instruction", INSTRUCTION_QOS)
        node.create_subscription(JointState, "sim/joint_states", self._on_joints, 10)
        node.create_subscription(PolicyStatus, "policy/status", self._on_status, 10)
        node.create_subscription(ActionChunk, "policy/action_chunk", self._on_chunk, 10)
        for name in robot.controllers:
            node.create_subscription(
                JointTrajectory, f"{name}/joint_trajectory", self._on_trajectory, TRAJECTORY_QOS
            )
        self._services = {
            "policy/change_state": node.create_client(ChangeState, "policy/change_state"),
            "policy/stop": node.create_client(Trigger, "policy/stop"),
            "policy/resume": node.create_client(Trigger, "policy/resume"),
            "aloha_sim/set_parameters": node.create_client(
                SetParameters, "aloha_sim/set_parameters"
            ),
        }
        executor = SingleThreadedExecutor()
        executor.add_node(node)
        threading.Thread(target=executor.spin, daemon=True).start()

    def call(self, service: str, request: Any, timeout_s: float = 30.0) -> bool:
        """Whether the service answered in time."""
        client = self._services[service]
        deadline_s = time.monotonic() + timeout_s
        if not client.wait_for_service(timeout_s):
            return False
        future = client.call_async(request)
        while not future.done() and time.monotonic() < deadline_s:
            time.sleep(0.02)
        return bool(future.done())

    def trigger(self, service: str) -> None:
        from std_srvs.srv import Trigger

        self.call(service, Trigger.Request())

    def transition(self, name: str) -> None:
        from lifecycle_msgs.msg import Transition
        from lifecycle_msgs.srv import ChangeState

        number = getattr(Transition, f"TRANSITION_{name.upper()}")
        self.call("policy/change_state", ChangeState.Request(transition=Transition(id=number)))

    def set_cameras(self, names: Sequence[str]) -> None:
        from rcl_interfaces.srv import SetParameters
        from rclpy.parameter import Parameter

        change = Parameter("active_cameras", value=list(names)).to_parameter_msg()
        self.call("aloha_sim/set_parameters", SetParameters.Request(parameters=[change]))

    def instruct(self, text: str) -> None:
        from std_msgs.msg import String

        self._instructions.publish(String(data=text))

    def recovered(self, since_s: float) -> bool:
        """Whether a chunk for the robot's own instruction came, and then a command."""
        return since_s < self.chunk_s <= self.trajectory_s

    def _on_joints(self, message: Any) -> None:
        self._states.publish(self.spoil(message))

    def _on_status(self, message: Any) -> None:
        self.state = message.state

    def _on_chunk(self, message: Any) -> None:
        if message.instruction == INSTRUCTION:
            self.chunk_s = time.monotonic()

    def _on_trajectory(self, message: Any) -> None:
        self.trajectory_s = time.monotonic()
        self.trajectories += 1
        columns = [self._joints.names.index(name) for name in message.joint_names]
        positions = np.array([point.positions for point in message.points])
        velocities = np.array([point.velocities for point in message.points])
        changes = np.abs(np.diff(velocities, axis=0))
        joints = self._joints
        sound = (
            np.isfinite(positions).all()
            and (positions >= joints.lower[columns] - 1e-6).all()
            and (positions <= joints.upper[columns] + 1e-6).all()
            and (np.abs(velocities) <= joints.max_velocity[columns] + 1e-6).all()
            and (changes <= joints.max_acceleration[columns] * self._dt_s + 1e-6).all()
            and not velocities[-1].any()
        )
        self.violations += not sound


def permuted(message: Any) -> Any:
    message.name, message.position = message.name[::-1], message.position[::-1]
    message.velocity = message.velocity[::-1]
    return message


def doubled(message: Any) -> Any:
    message.name = [*message.name[:-1], message.name[0]]
    return message


class Soak:
    """Fires faults and measures how long each takes to be over."""

    def __init__(self, processes: Processes, watcher: Watcher, rng: random.Random) -> None:
        self._watcher, self.rng = watcher, rng
        self.recovery_s: dict[str, list[float]] = defaultdict(list)
        self.lost: list[str] = []
        policy = ("nan 2", "nan", "raise", "shape", "sleep 0.5", "hang 4", "oom", "wild")
        self.faults: dict[str, tuple[Callable[[], None], Callable[[], None], float]] = {
            "a camera stops": (self._stop_camera, self._all_cameras, 2.0),
            "joints permuted": (lambda: self._spoil(permuted), self._pass_on, 2.0),
            "a joint twice": (lambda: self._spoil(doubled), self._pass_on, 2.0),
            "~/stop": (lambda: watcher.trigger("policy/stop"),
                       lambda: watcher.trigger("policy/resume"), 2.0),
            "200 instructions": (self._flood, self._instruct, 0.5),
            "simulator killed": (lambda: processes.kill("sim"),
                                 lambda: processes.start("sim"), 2.0),
            **{f"policy: {fault}": (self._order(fault), self._instruct, 3.0) for fault in policy},
        }  # fmt: skip

    def fire(self) -> None:
        """One fault, until it is recovered from."""
        name = self.rng.choice(list(self.faults))
        begin, end, lasts_s = self.faults[name]
        begin()
        time.sleep(lasts_s)
        end()
        ended_s = time.monotonic()
        if self.wait_for_motion(ended_s):
            self.recovery_s[name].append(time.monotonic() - ended_s)
        else:
            self.lost.append(name)

    def wait_for_motion(self, since_s: float) -> bool:
        """Help as an operator would: configure and activate what has given up."""
        from pi05_ros.msg import PolicyStatus

        while time.monotonic() - since_s < RECOVERY_LIMIT_S:
            if self._watcher.recovered(since_s):
                return True
            if self._watcher.state in (PolicyStatus.ERROR, PolicyStatus.UNCONFIGURED):
                self._watcher.transition("configure")
                self._instruct()
            if self._watcher.state in (
                PolicyStatus.ERROR, PolicyStatus.UNCONFIGURED, PolicyStatus.INACTIVE
            ):  # fmt: skip
                self._watcher.transition("activate")
            time.sleep(0.1)
        return False

    def _stop_camera(self) -> None:
        gone = self.rng.choice(CAMERAS)
        self._watcher.set_cameras([name for name in CAMERAS if name != gone])

    def _all_cameras(self) -> None:
        self._watcher.set_cameras(CAMERAS)

    def _spoil(self, how: Callable[[Any], Any]) -> None:
        self._watcher.spoil = how

    def _pass_on(self) -> None:
        self._watcher.spoil = lambda message: message

    def _order(self, fault: str) -> Callable[[], None]:
        return lambda: self._watcher.instruct(f"fault {fault}")

    def _instruct(self) -> None:
        self._watcher.instruct(INSTRUCTION)

    def _flood(self) -> None:
        for i in range(200):
            self._watcher.instruct("x" * self.rng.randint(0, 400) if i % 2 else f"do this {i}")


def report(
    soak: Soak, watcher: Watcher, rss_mb: list[float], minutes: float, tracebacks: int,
    ended: list[str],
) -> tuple[str, bool]:  # fmt: skip
    """The Markdown report, and whether all is well."""
    few = max(1, min(5, len(rss_mb) // 2))
    before_mb, after_mb = float(np.median(rss_mb[:few])), float(np.median(rss_mb[-few:]))
    growth = after_mb / before_mb - 1.0
    faults = sum(len(times) for times in soak.recovery_s.values()) + len(soak.lost)
    lines = [
        f"{minutes:g} minutes, {faults} faults, {watcher.trajectories} trajectories",
        "",
        "| | |",
        "|---|---|",
        f"| uncaught exceptions | {tracebacks} |",
        f"| processes that ended by themselves | {len(ended)} {' '.join(ended)} |",
        f"| trajectories beyond a limit | {watcher.violations} |",
        f"| faults without recovery in {RECOVERY_LIMIT_S:g} s | {len(soak.lost)} "
        f"{', '.join(soak.lost)} |",
        f"| memory of the node | {before_mb:.0f} → {after_mb:.0f} MB, {100 * growth:+.1f} % |",
        "",
        "| fault | times | recovery, median s | longest s |",
        "|---|---|---|---|",
    ]
    for name, times in sorted(soak.recovery_s.items()):
        lines.append(f"| {name} | {len(times)} | {np.median(times):.2f} | {max(times):.2f} |")
    well = not (tracebacks or ended or watcher.violations or soak.lost) and growth < GROWTH_LIMIT
    return "\n".join(lines), well


def main(args: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Simulator and node under load, with faults.")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint", default="small")
    parser.add_argument("--output", type=Path, default=Path("soak_out"))
    options = parser.parse_args(args)
    options.output.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("ROS_DOMAIN_ID", str(1 + os.getpid() % 100))
    os.environ.setdefault("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
    prepare()
    processes = Processes(options.output, options.checkpoint)
    rss_mb: list[float] = []
    ended: set[str] = set()
    done = threading.Event()

    def sample() -> None:
        time.sleep(60.0 * options.minutes * WARM_UP_SHARE)
        while not done.wait(SAMPLE_S):
            with contextlib.suppress(OSError, StopIteration):
                rss_mb.append(processes.rss_mb("node"))

    began_s = time.monotonic()
    for name in ("sim", "node"):
        processes.start(name)
    watcher = Watcher()
    soak = Soak(processes, watcher, random.Random(options.seed))
    try:
        if not soak.wait_for_motion(began_s):
            print(f"nothing moves, see {options.output}")
            return 1
        threading.Thread(target=sample, daemon=True).start()
        while time.monotonic() - began_s < 60.0 * options.minutes:
            soak.fire()
            ended.update(processes.ended())
            time.sleep(soak.rng.uniform(1.0, 3.0))
    finally:
        done.set()
        processes.stop()
    text, well = report(
        soak, watcher, rss_mb or [1.0], options.minutes, processes.tracebacks(), sorted(ended)
    )
    print(text)
    (options.output / "soak.md").write_text(text + "\n")
    return int(not well)


if __name__ == "__main__":
    raise SystemExit(main())
