"""Opens any policy that the executor runs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pi05_ros.adapters.remote import API_KEY, RemotePolicy, is_address
from pi05_ros.policy.robots import RobotSource
from pi05_ros.types import Policy as AnyPolicy

NATIVE_OPTIONS = ("dtype", "execution", "fp8_prefix", "head")
"""Options of π0.5, π0 and π0-FAST that have no meaning for other policies."""


def open_policy(
    checkpoint: str | Path,
    robot: RobotSource = "aloha",
    *,
    device: Any = "auto",
    seed: int | None = None,
    threads: int | None = None,
    **options: Any,
) -> AnyPolicy:
    """π0.5, π0 and π0-FAST in this package's network, other types through LeRobot, or a server.

    torch is loaded for a policy in this process alone.

    Args:
        checkpoint: as `Policy.from_pretrained` takes it, a LeRobot policy of another type, or the
            address of a policy server, `ws://host:port`.
        robot, device, seed, threads: see `Policy.from_pretrained`.
        options: the other arguments of `Policy.from_pretrained`; `guidance` may be a mapping. Those
            in `NATIVE_OPTIONS` are an error for LeRobot's types, unless they have their defaults;
            `num_steps` and `guidance` are ignored there, and all of them for a server.

    Raises:
        CheckpointError: not a usable checkpoint, or one that does not fit the robot.
        ValueError: see `Policy.from_pretrained`; an option that the type does not have.
    """
    if is_address(checkpoint):
        return RemotePolicy(str(checkpoint), robot, os.environ.get(API_KEY, ""))
    import torch

    from pi05_ros.adapters.lerobot import LeRobotPolicy
    from pi05_ros.policy.checkpoint import checkpoint_folder
    from pi05_ros.policy.config import foreign_type
    from pi05_ros.policy.policy import Policy

    if "guidance" in options and isinstance(options["guidance"], Mapping):
        from pi05_ros.policy.guidance import Guidance

        options["guidance"] = Guidance(**options["guidance"])
    folder = checkpoint_folder(checkpoint)
    kind = foreign_type(folder)
    if kind is None:
        return Policy.from_pretrained(
            folder, robot, device=device, seed=seed, threads=threads, **options
        )
    for name in NATIVE_OPTIONS:
        if options.get(name) not in (None, False, "auto", "eager"):
            raise ValueError(
                f"{name} {options[name]!r} is for π0.5 and π0, not for a LeRobot {kind} policy"
            )
    if threads is not None:
        torch.set_num_threads(threads)
    return LeRobotPolicy.from_pretrained(folder, robot, device=device, seed=seed)
