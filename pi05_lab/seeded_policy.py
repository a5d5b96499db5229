"""A policy whose noise depends on the observation's stamp alone."""

from __future__ import annotations

import hashlib
from typing import Any

from pi05_ros.types import ActionChunk, ActionPrefix, Observation, Policy


class SeededPolicy:
    """A policy whose noise follows from `noise_seed` and the observation's stamp.

    The same observation gives the same chunk in every order: runs repeat, and ablations of an
    observation are compared at equal noise. Everything else is the policy's.
    """

    def __init__(self, policy: Policy, noise_seed: int = 0) -> None:
        self._policy, self._noise_seed = policy, noise_seed

    def __getattr__(self, name: str) -> Any:
        return getattr(self._policy, name)

    def infer(self, observation: Observation, prefix: ActionPrefix | None = None) -> ActionChunk:
        restart = getattr(self._policy, "restart", None)
        if restart is not None:
            restart(_seed(self._noise_seed, observation.stamp_s))
        return self._policy.infer(observation, prefix)


def _seed(noise_seed: int, stamp_s: float) -> int:
    text = f"{noise_seed} {round(stamp_s * 1e9)}".encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:7], "big")
