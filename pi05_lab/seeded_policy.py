"""π0.5 with noise that depends only on the observation's stamp, or on the episode's seed."""

from __future__ import annotations

import hashlib

from pi05_ros.policy import Policy
from pi05_ros.types import ActionChunk, ActionPrefix, Observation


class SeededPolicy(Policy):
    """π0.5 or π0 whose noise follows from `noise_seed` and the observation's stamp.

    The same observation gives the same chunk in every order: runs repeat, and ablations of an
    observation are compared at equal noise.
    """

    noise_seed = 0

    def infer(self, observation: Observation, prefix: ActionPrefix | None = None) -> ActionChunk:
        self._generator.manual_seed(_seed(self.noise_seed, observation.stamp_s))
        return super().infer(observation, prefix)


class EpisodePolicy(Policy):
    """π0.5 or π0 whose noise follows from the episode's seed."""

    def restart(self, seed: int) -> None:
        """Begin an episode; equal to loading the checkpoint with this seed."""
        self._generator.manual_seed(seed)


def _seed(noise_seed: int, stamp_s: float) -> int:
    text = f"{noise_seed} {round(stamp_s * 1e9)}".encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:7], "big")
