"""The demo's two child processes, each with its own log."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from pi05_ros.nodes.main import share_directory

STOP_TIMEOUT_S = 8.0
NODES = {"aloha_sim_node": "pi05_lab.sim.main", "policy_node": "pi05_ros.nodes.main"}


class DemoProcesses:
    """`aloha_sim_node` and `policy_node` with the same params file.

    Args:
        output: folder of the logs.
        checkpoint: "" takes the params file's.
        params_file: "" takes config/aloha.yaml.
        overrides: the policy node's parameters, "name:=value".
    """

    def __init__(
        self,
        output: Path,
        checkpoint: str = "",
        params_file: str = "",
        overrides: Sequence[str] = (),
    ) -> None:
        self._output = output
        params = params_file or str(share_directory() / "config" / "aloha.yaml")
        common = ["--ros-args", "--params-file", params]
        given = ["status_rate_hz:=5.0", *overrides]
        if checkpoint:
            given.append(f"checkpoint:={checkpoint}")
        policy = [*common, *(word for value in given for word in ("-p", value))]
        self._arguments = {"aloha_sim_node": common, "policy_node": policy}
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def log(self, name: str) -> Path:
        return self._output / f"{name}.log"

    def start(self) -> None:
        for name, module in NODES.items():
            with self.log(name).open("wb") as log:
                self._running[name] = subprocess.Popen(
                    [sys.executable, "-m", module, *self._arguments[name]],
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # `stop` passes Ctrl-C on
                )

    def pids(self) -> dict[str, int]:
        """Name → process id of the started processes."""
        return {name: process.pid for name, process in self._running.items()}

    def problem(self) -> str:
        """The first process that has ended, with its last log line; empty while all run."""
        for name, process in self._running.items():
            code = process.poll()
            if code is not None:
                return f"{name} ended with code {code}: {self.last_log_line(name)}"
        return ""

    def stop(self) -> list[str]:
        """Interrupt both and wait; one line for each that did not end cleanly."""
        found = []
        for process in self._running.values():
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
        deadline_s = time.monotonic() + STOP_TIMEOUT_S
        for name, process in self._running.items():
            try:
                code = process.wait(max(0.1, deadline_s - time.monotonic()))
                if code != 0:
                    found.append(f"{name} ended with code {code}: {self.last_log_line(name)}")
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                found.append(f"{name} did not stop within {STOP_TIMEOUT_S:g} s")
        self._running.clear()
        return found

    def last_log_line(self, name: str) -> str:
        """The last line of a process's log, and the path of the log."""
        lines = self.log(name).read_text(errors="replace").strip().splitlines()
        return f"{lines[-1] if lines else 'no output'} (whole log: {self.log(name)})"
