"""Ray Serve for real: two replicas on CPU, robots on both, and one replica that is killed.

    python ray_runs.py

Runs in an environment with this package and its extra `ray`. A killed replica costs a robot its
connection and one retry; no robot gets a wrong chunk.
"""

from __future__ import annotations

import os
import signal
import time

import numpy as np
import ray
from ray import serve

from pi05_ros.adapters.remote import RemoteError, RemotePolicy
from pi05_ros.server.ray_serve import app
from pi05_ros.types import Observation

PORT = 8231
ROBOTS = 6
WAIT_S = 180.0


def observe(policy: RemotePolicy, seed: int) -> Observation:
    random = np.random.default_rng(seed)
    images = {
        name: random.integers(0, 256, (84, 112, 3), dtype=np.uint8) for name in policy.cameras
    }
    return Observation(images, random.uniform(-0.5, 0.5, 14), "wave with the left arm", float(seed))


def connect() -> RemotePolicy:
    """A robot's client, as soon as the server answers."""
    end_s = time.monotonic() + WAIT_S
    while True:
        try:
            return RemotePolicy(f"ws://127.0.0.1:{PORT}", answer_timeout_s=20.0)
        except ValueError:
            if time.monotonic() > end_s:
                raise
            time.sleep(0.5)


def running() -> int:
    """Replicas that serve."""
    states = serve.status().applications["pi05"].deployments["PolicyReplica"].replica_states
    return sum(count for state, count in states.items() if str(state).endswith("RUNNING"))


def main() -> int:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": PORT})
    serve.run(app({"replicas": 2, "threads": 1}), name="pi05")
    robots = [connect() for _ in range(ROBOTS)]
    replicas = {robot.metadata["process"] for robot in robots}
    assert len(replicas) == 2, f"all robots are on one replica: {replicas}"
    for seed, robot in enumerate(robots):
        chunk = robot.infer(observe(robot, seed))
        assert chunk.stamp_s == float(seed) and chunk.actions.shape == (50, 14)
    print(f"{ROBOTS} robots on {len(replicas)} replicas")

    killed = robots[0].metadata["process"]
    os.kill(killed, signal.SIGKILL)
    failed = 0
    for seed, robot in enumerate(robots):
        try:
            robot.infer(observe(robot, seed))
        except RemoteError as error:
            failed += 1
            assert "\n" not in str(error)
            end_s = time.monotonic() + WAIT_S
            while True:
                try:
                    chunk = robot.infer(observe(robot, seed))
                    break
                except RemoteError:
                    assert time.monotonic() < end_s, "the robot is not served again"
            assert chunk.stamp_s == float(seed)
    on_it = sum(robot.metadata["process"] == killed for robot in robots)
    assert failed == on_it, f"{failed} robots failed, {on_it} were on the killed replica"
    end_s = time.monotonic() + WAIT_S
    while running() < 2:
        assert time.monotonic() < end_s, "Ray did not replace the replica"
        time.sleep(1.0)
    print(f"{failed} robots lost their connection with the killed replica and are served again")
    serve.shutdown()
    ray.shutdown()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
