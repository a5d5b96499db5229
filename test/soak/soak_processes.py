"""The soak's nodes as processes, with their logs and their memory."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

from soak_memory import Sample
from soak_watcher import INSTRUCTION

from pi05_ros.nodes.main import share_directory

HERE = Path(__file__).parent


class Processes:
    """The nodes, their logs and their memory."""

    def __init__(self, output: Path, checkpoint: str) -> None:
        params = ["--params-file", str(share_directory() / "config" / "aloha.yaml")]
        sim = [sys.executable, "-m", "pi05_lab.sim.main", "--ros-args"]
        node = [sys.executable, str(HERE / "faulty_policy_node.py"), "--ros-args"]
        self._commands = {
            "sim": [*sim, *params, "-r", "joint_states:=sim/joint_states",
                    *(part for arm in ("left", "right") for part in
                      ("-r", f"{arm}_arm_controller/joint_trajectory:="
                             f"sim/{arm}_arm_controller/joint_trajectory"))],
            "node": [*node, *params, "-p", f"checkpoint:={checkpoint}", "-p", "autostart:=true",
                     "-p", f"instruction:={INSTRUCTION}", "-p", "status_rate_hz:=10.0"],
            "driver": [sys.executable, str(HERE / "soak_driver.py")],
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
        process = self._running.pop(name)
        process.kill()
        process.wait()

    def signal(self, name: str, number: signal.Signals) -> None:
        self._running[name].send_signal(number)

    def wait(self, name: str, timeout_s: float = 10.0) -> int:
        """The exit code; a process that does not end in time is killed."""
        try:
            return self._running[name].wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill(name)
            return -signal.SIGKILL

    def ended(self) -> list[str]:
        return [name for name, process in self._running.items() if process.poll() is not None]

    def sample(self, name: str) -> Sample:
        """Raises OSError if the process has ended."""
        process = self._running.get(name)
        if process is None:
            raise ProcessLookupError(f"{name} is not running")
        return Sample.of(process.pid)

    def stop(self) -> list[int]:
        for process in self._running.values():
            process.send_signal(signal.SIGINT)
        return [process.wait(20.0) for process in self._running.values()]

    def tracebacks(self) -> int:
        return sum(
            self.log(name).read_text(errors="replace").count("Traceback")
            for name in self._commands
            if self.log(name).exists()
        )
