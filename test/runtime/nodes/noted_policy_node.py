"""The policy node with noise that follows from the stamp, noting what each inference was given.

One JSON line an inference goes to the file that NOTES names: stamp and a hash of the observation.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from pi05_lab.seeded_policy import SeededPolicy
from pi05_ros.adapters import factory
from pi05_ros.nodes.main import policy_node
from pi05_ros.types import ActionChunk, ActionPrefix, Observation


def digest(observation: Observation) -> str:
    """Changes with every bit of what a policy is given."""
    found = hashlib.sha256(observation.instruction.encode())
    found.update(observation.state.tobytes())
    for name in sorted(observation.images):
        found.update(name.encode() + observation.images[name].tobytes())
    return found.hexdigest()


class NotedPolicy(SeededPolicy):
    """Writes a line for each inference."""

    def infer(self, observation: Observation, prefix: ActionPrefix | None = None) -> ActionChunk:
        with Path(os.environ["NOTES"]).open("a") as file:
            file.write(json.dumps([observation.stamp_s, digest(observation)]) + "\n")
        return super().infer(observation, prefix)


def open_noted(*arguments: Any, **options: Any) -> NotedPolicy:
    return NotedPolicy(open_policy(*arguments, **options))


open_policy = factory.open_policy
if __name__ == "__main__":
    factory.open_policy = open_noted  # type: ignore[assignment]
    raise SystemExit(policy_node())
