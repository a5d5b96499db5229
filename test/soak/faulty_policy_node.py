"""The policy node around a policy that fails when it is told to.

The tests and `soak.py` run it in place of `policy_node`. An instruction that begins with "fault"
is an order to the policy, not to the robot:

    fault nan       every chunk has a NaN            fault nan 2      the next two have one
    fault shape     every chunk lacks a step         fault sleep 0.8  every inference takes 0.8 s
    fault raise     every inference raises           fault hang 4     the next one takes 4 s
    fault oom       as a GPU that is full            fault oom 1      the next time
    fault lost      as a CUDA context that is dead   fault exit       the thread ends
    fault wild      targets anywhere, every step     fault far        the waists at 1 rad
    fault fast      the waists at up to 1.6 rad/s

The parameter `checkpoint` names the policy behind: `wave` sweeps both waists as a function of
time, `load hang` never loads, `load until FILE` fails once the file exists, everything else is
loaded as the node does.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pi05_ros.nodes.main import prepare
from pi05_ros.types import ActionChunk, ActionPrefix, Observation, Policy

ONCE = ("hang",)
COUNTED = ("nan", "oom")
WAVE_RAD = 0.2
WAVE_HZ = 0.25


class OutOfMemoryError(RuntimeError):
    """Named as torch's."""


class WavePolicy:
    """Sweeps the first joint of both arms; the course depends on time alone, so chunks agree."""

    horizon, dt_s, state_dim, action_dim = 50, 0.02, 14, 14
    cameras: Sequence[str] = ("cam_high", "cam_left_wrist", "cam_right_wrist")
    description = "π0.5's stand-in, sweeps the waists"

    def infer(self, observation: Observation, prefix: ActionPrefix | None = None) -> ActionChunk:
        actions = np.tile(observation.state, (self.horizon, 1))
        times_s = observation.stamp_s + self.dt_s * np.arange(self.horizon)
        actions[:, [0, 7]] = WAVE_RAD * np.sin(2 * np.pi * WAVE_HZ * times_s)[:, None]
        return ActionChunk(actions, observation.stamp_s, self.dt_s, observation.instruction)


class FaultyPolicy:
    """Passes on what another policy says, but for the faults that the instruction orders."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self._ordered = ""
        self._left = 0.0
        self._rng = np.random.default_rng(0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.policy, name)

    def infer(self, observation: Observation, prefix: ActionPrefix | None = None) -> ActionChunk:
        fault, amount = self._fault(observation.instruction)
        if fault in ("sleep", "hang"):
            time.sleep(amount)
        elif fault == "raise":
            raise RuntimeError("the policy was told to raise")
        elif fault == "oom":
            raise OutOfMemoryError("CUDA out of memory. Tried to allocate 7.00 GiB")
        elif fault == "lost":
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        elif fault == "exit":
            raise SystemExit("the policy was told to exit")
        chunk = self.policy.infer(observation, prefix)
        actions = chunk.actions.copy()
        if fault == "nan":
            actions[len(actions) // 2, 3] = np.nan
        elif fault == "shape":
            actions = actions[:-1]
        elif fault == "wild":
            actions = self._rng.uniform(-100.0, 100.0, actions.shape)
        elif fault == "fast":
            times_s = chunk.stamp_s + chunk.dt_s * np.arange(len(actions))
            actions[:, [0, 7]] = 0.5 * np.sin(np.pi * times_s)[:, None]
        elif fault == "far":
            actions[:, [0, 7]] = 1.0
        return dataclasses.replace(chunk, actions=actions)

    def _fault(self, instruction: str) -> tuple[str, float]:
        """The fault that this inference has, and its number."""
        if not instruction.startswith("fault "):
            self._ordered = ""
            return "", 0.0
        _, fault, *rest = instruction.split()
        amount = float(rest[0]) if rest else 0.0
        if instruction != self._ordered:
            self._ordered = instruction
            counted = fault in COUNTED and amount > 0
            self._left = 1 if fault in ONCE else amount if counted else np.inf
        if self._left <= 0:
            return "", 0.0
        self._left -= 1
        return fault, amount


def main() -> int:
    prepare()
    from pi05_ros.nodes import policy_node

    load = policy_node.load_policy

    def load_faulty(parameters: Any, guidance: Any) -> Any:
        if parameters.checkpoint == "load hang":
            time.sleep(3600.0)
        if parameters.checkpoint.startswith("load until "):
            while not Path(parameters.checkpoint.removeprefix("load until ")).exists():
                time.sleep(0.05)
            raise ValueError("the policy was told not to load")
        if parameters.checkpoint == "wave":
            return FaultyPolicy(WavePolicy())
        return FaultyPolicy(load(parameters, guidance))

    policy_node.load_policy = load_faulty
    return policy_node.main(sys.argv)


if __name__ == "__main__":
    raise SystemExit(main())
