"""Between recordings, policies and the robot: what fits, and what each is given."""

from __future__ import annotations

import random
from collections.abc import Mapping

from pi05_lab.evaluation.open_loop.bag import BagError
from pi05_lab.evaluation.open_loop.settings import OfflineSettings
from pi05_lab.evaluation.open_loop.topics import EvaluatedRobot
from pi05_ros.types import Observation, Policy


def other_instruction(instruction: str, settings: OfflineSettings) -> str:
    """Another instruction than this one: one of `settings.others`, else its words in disorder."""
    rng = random.Random(f"{settings.seed} {instruction}")
    others = sorted({text for text in settings.others if text and text != instruction})
    if others:
        return rng.choice(others)
    words = instruction.split()
    for _ in range(10):
        rng.shuffle(words)
        if " ".join(words) != instruction:
            return " ".join(words)
    return f"do not {instruction}"


def common_cameras(policies: Mapping[str, Policy], robot: EvaluatedRobot) -> set[str]:
    """The robot's cameras that some policy looks through."""
    known = {name for policy in policies.values() for name in policy.cameras}
    return {camera.name for camera in robot.cameras if camera.name in known}


def for_policy(observation: Observation, policy: Policy) -> Observation:
    """The observation with those pictures alone that the policy looks at."""
    images = {k: v for k, v in observation.images.items() if k in policy.cameras}
    return Observation(images, observation.state, observation.instruction, observation.stamp_s)


def check_fit(name: str, policy: Policy, robot: EvaluatedRobot) -> None:
    """Raise BagError where policy and params file do not fit together."""
    count = len(robot.config.joints)
    for what, dim in (("states", policy.state_dim), ("actions", policy.action_dim)):
        if dim != count:
            raise BagError(f"{name} has {dim} {what}, the params file {count} joints")
    if not set(policy.cameras) & {camera.name for camera in robot.cameras}:
        raise BagError(
            f"{name} looks through {list(policy.cameras)}, the params file's cameras are "
            f"{[camera.name for camera in robot.cameras]}"
        )
