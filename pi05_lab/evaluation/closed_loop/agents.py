"""Agents of closed-loop episodes: a policy plus the renderer of its cameras."""

from __future__ import annotations

import os
from typing import Protocol

import numpy as np

from pi05_lab.sim.arms import SimulatedAloha
from pi05_lab.sim.experts import HORIZON, Expert, grippers_to_unit
from pi05_lab.sim.motion import DT_S
from pi05_lab.sim.rendering import CAMERAS, CameraRenderer
from pi05_lab.sim.scene import JOINT_NAMES
from pi05_lab.sim.tasks import parse
from pi05_ros import types
from pi05_ros.types import ActionChunk, ActionPrefix, FloatArray, ImageArray, Observation

EXPERT = "expert"
DEFAULT_SIZE_PX = 112


class SetupError(ValueError):
    """Checkpoint, policy, robot and simulator do not fit together."""


class Agent(Protocol):
    """A policy and its images of the simulator. Belongs to the thread that made it."""

    @property
    def policy(self) -> types.Policy: ...

    def begin(self, seed: int) -> None:
        """Prepare for an episode; `seed` determines the policy's noise."""

    def draw(self, camera: str, qpos: FloatArray) -> ImageArray:
        """Image of a camera in the simulator's state [nq], for an observation."""

    def close(self) -> None: ...


class PolicyAgent:
    """A policy that observes rendered images.

    Args:
        policy: if it has `restart(seed)`, every episode begins with it.
        size_px: width and height of the images; None: those of the policy's training data where
            it knows them, else 4:3 as the simulated robot publishes, as wide as
            `policy.model.config.image_size` (π0.5), else 112 pixels.
    """

    def __init__(self, policy: types.Policy, size_px: tuple[int, int] | None = None) -> None:
        self.policy = policy
        size_px = size_px or getattr(policy, "image_size_px", None)
        if size_px is None:
            config = getattr(getattr(policy, "model", None), "config", None)
            side = int(getattr(config, "image_size", DEFAULT_SIZE_PX))
            size_px = (side, side * 3 // 4)
        self._size_px = size_px
        self._renderer: CameraRenderer | None = None

    def begin(self, seed: int) -> None:
        """Prepare for an episode; RenderingUnavailable if the machine has no OpenGL."""
        getattr(self.policy, "restart", lambda _: None)(seed)
        if self._renderer is None:
            # Mesa's threads would compete with the policy and other workers for cores.
            os.environ.setdefault("LP_NUM_THREADS", "1")
            self._renderer = CameraRenderer(SimulatedAloha().model, *self._size_px)

    def draw(self, camera: str, qpos: FloatArray) -> ImageArray:
        assert self._renderer is not None
        return self._renderer.render(qpos, camera)

    def close(self) -> None:
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None


class ExpertAgent:
    """The scripted expert as a policy: the upper bound of what tasks, limits and scheduler allow.

    It parses the instruction and sees the simulator's state: `draw` stores that state instead of
    rendering it, so planning starts at the observation's stamp.
    """

    horizon, dt_s = HORIZON, DT_S
    state_dim = action_dim = len(JOINT_NAMES)
    cameras: tuple[str, ...] = CAMERAS[:1]
    description = "the scripted expert, which sees the simulator's state"

    def __init__(self) -> None:
        self._sim = SimulatedAloha()
        self._expert = Expert(self._sim)

    @property
    def policy(self) -> types.Policy:
        return self

    def begin(self, seed: int) -> None:
        pass

    def draw(self, camera: str, qpos: FloatArray) -> ImageArray:
        self._sim.set_qpos(qpos)
        return np.zeros((1, 1, 3), dtype=np.uint8)

    def infer(self, observation: Observation, prefix: ActionPrefix | None = None) -> ActionChunk:
        """Plan from the state of the last `draw`; ValueError if no task has this wording."""
        task = parse(observation.instruction)
        if task is None:
            raise ValueError(f"no task has the wording {observation.instruction!r}")
        actions = grippers_to_unit(self._expert.plan(task))
        return ActionChunk(actions, observation.stamp_s, DT_S, observation.instruction)

    def close(self) -> None:
        pass


def make_agent(
    checkpoint: str,
    size_px: tuple[int, int] | None = None,
    num_steps: int | None = None,
    device: str = "cpu",
    threads: int | None = 1,
    head: str | None = None,
) -> Agent:
    """The agent of a checkpoint.

    Args:
        checkpoint: folder, "small", or "expert".
        size_px: width and height of the images; None: the policy's own.
        num_steps: Euler steps of the flow; None: the checkpoint's number.
        device: of the network.
        threads: CPU threads of torch, for the whole process; results may differ in rounding with
            the number. None keeps the process's number.
        head: "flow" or "fast"; None: the checkpoint's.

    Raises:
        SetupError: not a usable checkpoint.
    """
    if checkpoint == EXPERT:
        return ExpertAgent()
    from pi05_ros.adapters.factory import open_policy
    from pi05_ros.policy.weights import CheckpointError

    try:
        policy = open_policy(
            checkpoint, device=device, num_steps=num_steps, seed=0, threads=threads, head=head
        )
    except CheckpointError as error:
        raise SetupError(str(error)) from error
    return PolicyAgent(policy, size_px)
