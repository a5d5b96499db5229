"""Lost frames between two processes: the shipped FastDDS profile and FastDDS's default.

    python benchmarks/image_transport.py [--seconds 10] [--rate 30]

Three cameras of 640x480 rgb8, best effort, one publisher process and one subscriber process, both
transports in the same run.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import time

import numpy as np
from rich.console import Console
from rich.table import Table

from pi05_lab.demo.ros_domain import use_own_domain
from pi05_ros.nodes.main import prepare, share_directory

CAMERAS = ("cam_high", "cam_left_wrist", "cam_right_wrist")
WIDTH, HEIGHT = 640, 480
GRACE_S = 1.0


def publish(rate_hz: float, seconds: float) -> None:
    """Child process: publish images and print their number."""
    import rclpy
    from sensor_msgs.msg import Image

    from pi05_ros.nodes.messages import IMAGE_QOS, image_message

    rclpy.init()
    node = rclpy.create_node("publisher")
    publishers = [node.create_publisher(Image, name, IMAGE_QOS) for name in CAMERAS]
    image = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    while any(publisher.get_subscription_count() == 0 for publisher in publishers):
        time.sleep(0.05)
    time.sleep(GRACE_S)
    sent = 0
    start_s = time.monotonic()
    while (next_s := start_s + sent / rate_hz) < start_s + seconds:
        time.sleep(max(0.0, next_s - time.monotonic()))
        for name, publisher in zip(CAMERAS, publishers, strict=True):
            publisher.publish(image_message(image, time.time(), name))
        sent += 1
    time.sleep(GRACE_S)
    print(json.dumps({"sent": sent * len(CAMERAS)}))


def subscribe(seconds: float) -> None:
    """Child process: store serialized messages as the policy node does; print number and delay."""
    import rclpy
    from sensor_msgs.msg import Image

    from pi05_ros.nodes.messages import IMAGE_QOS, serialized_stamp_s

    rclpy.init()
    node = rclpy.create_node("subscriber")
    newest: dict[str, bytes] = {}
    latencies_s: list[float] = []

    def store(name: str, data: bytes) -> None:
        newest[name] = data
        latencies_s.append(time.time() - serialized_stamp_s(data))

    for name in CAMERAS:
        node.create_subscription(Image, name, functools.partial(store, name), IMAGE_QOS, raw=True)
    cpu_s, last_s = time.process_time(), time.monotonic()
    received = 0
    while time.monotonic() - last_s < (3 * GRACE_S if latencies_s else seconds + 20):
        rclpy.spin_once(node, timeout_sec=0.1)
        if len(latencies_s) > received:
            received, last_s = len(latencies_s), time.monotonic()
    p50, p95 = np.percentile(latencies_s, (50, 95)) if latencies_s else (np.nan, np.nan)
    cpu = (time.process_time() - cpu_s) / seconds
    print(json.dumps({"received": received, "p50_ms": 1e3 * p50, "p95_ms": 1e3 * p95, "cpu": cpu}))


def measure(profile: str, rate_hz: float, seconds: float) -> dict[str, float]:
    """Run both processes with a FastDDS profile, '' for none."""
    env = {**os.environ}
    env.pop("FASTDDS_DEFAULT_PROFILES_FILE", None)
    if profile:
        env["FASTDDS_DEFAULT_PROFILES_FILE"] = profile
    command = [sys.executable, __file__, "--rate", str(rate_hz), "--seconds", str(seconds)]
    children = [
        subprocess.Popen([*command, "--role", role], env=env, stdout=subprocess.PIPE, text=True)
        for role in ("subscribe", "publish")
    ]
    result: dict[str, float] = {}
    for child in children:
        output, _ = child.communicate(timeout=seconds + 60)
        result.update(json.loads(output.strip().splitlines()[-1]))
    return result


def main() -> None:
    """Measure both transports and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--rate", type=float, default=30.0)
    parser.add_argument("--role", choices=("publish", "subscribe"))
    options = parser.parse_args()
    if options.role:
        os.environ.setdefault("AMENT_PREFIX_PATH", sys.prefix)
        if options.role == "publish":
            publish(options.rate, options.seconds)
        else:
            subscribe(options.seconds)
        return
    use_own_domain()
    prepare()
    table = Table(title=f"3 x {WIDTH}x{HEIGHT} rgb8 at {options.rate:g} Hz, best effort")
    for column in ("transport", "received / sent", "lost", "p50 ms", "p95 ms", "subscriber CPU"):
        table.add_column(column)
    profiles = {
        "FastDDS default": "",
        "shipped profile": str(share_directory() / "config" / "fastdds_shm.xml"),
    }
    for name, profile in profiles.items():
        result = measure(profile, options.rate, options.seconds)
        lost = 1 - result["received"] / result["sent"]
        table.add_row(
            name,
            f"{result['received']:.0f} / {result['sent']:.0f}",
            f"{lost:.1%}",
            f"{result['p50_ms']:.1f}",
            f"{result['p95_ms']:.1f}",
            f"{result['cpu']:.0%} of a core",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
