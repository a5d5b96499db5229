"""Agents of episodes: a policy plus the renderer of its cameras."""

from __future__ import annotations

import os
from collections.abc import Callable
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


class Agent(Protocol):
    """A policy with its eyes. Belongs to the thread that made it."""

    @property
    def policy(self) -> types.Policy: ...

    def begin(self, seed: int) -> None:
        """Before each episode: what is random in it follows from `seed`."""

    def draw(self, camera: str, qpos: FloatArray) -> ImageArray:
        """A camera's picture of the simulator's state [nq]; called for what an inference uses."""

    def close(self) -> None:
        """Give back what it holds."""


class PolicyAgent:
    """A policy that looks through rendered cameras.

    Args:
        load: the policy; called once. If it has `restart(seed)`, every episode begins with it.
        size_px: width and height of the pictures; None takes 4:3, as the simulated robot publishes,
            as wide as `policy.model.config.image_size`, which π0.5 has, else 112.

    Raises:
        RenderingUnavailable: no OpenGL on this machine (when it first draws).
    """

    def __init__(
        self, load: Callable[[], types.Policy], size_px: tuple[int, int] | None = None
    ) -> None:
        self._load = load
        self._size_px = size_px
        self._policy: types.Policy | None = None
        self._renderer: CameraRenderer | None = None

    @property
    def policy(self) -> types.Policy:
        if self._policy is None:
            self._policy = self._load()
        return self._policy

    def begin(self, seed: int) -> None:
        restart = getattr(self.policy, "restart", None)
        if restart is not None:
            restart(seed)

    def draw(self, camera: str, qpos: FloatArray) -> ImageArray:
        if self._renderer is None:
            # Mesa's threads would fight for the cores that the policy and other workers use
            os.environ.setdefault("LP_NUM_THREADS", "1")
            self._renderer = CameraRenderer(SimulatedAloha().model, *self._picture_size())
        return self._renderer.render(qpos, camera)

    def _picture_size(self) -> tuple[int, int]:
        if self._size_px is not None:
            return self._size_px
        config = getattr(getattr(self.policy, "model", None), "config", None)
        side = int(getattr(config, "image_size", DEFAULT_SIZE_PX))
        return side, side * 3 // 4

    def close(self) -> None:
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None


class ExpertAgent:
    """The scripted expert as a policy: understands the instruction, sees the simulator's state.

    The ceiling of what the tasks, the limits and the scheduler allow. Its eye notes the state that
    a picture would show, so that it plans from the observation's moment like any other policy.
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
        """Nothing of it is random."""

    def draw(self, camera: str, qpos: FloatArray) -> ImageArray:
        self._sim.set_qpos(qpos)
        return np.zeros((1, 1, 3), dtype=np.uint8)

    def infer(self, observation: Observation, prefix: ActionPrefix | None = None) -> ActionChunk:
        """Plan from the state that was drawn last.

        Raises:
            ValueError: the instruction is none of the tasks' wordings.
        """
        task = parse(observation.instruction)
        if task is None:
            raise ValueError(f"no task has the wording {observation.instruction!r}")
        actions = grippers_to_unit(self._expert.plan(task))
        return ActionChunk(actions, observation.stamp_s, DT_S, observation.instruction)

    def close(self) -> None:
        """Nothing to give back."""


def make_agent(
    checkpoint: str,
    size_px: tuple[int, int] | None = None,
    num_steps: int | None = None,
    device: str = "cpu",
    threads: int | None = 1,
) -> Agent:
    """An agent by the name of its checkpoint.

    Args:
        checkpoint: folder, "small", or "expert".
        size_px: width and height of the pictures; None is the policy's own.
        num_steps: Euler steps of the flow; None is the checkpoint's number.
        device: of the network.
        threads: CPU threads of torch, for the whole process; another number may round differently.
            None leaves them as they are.

    Raises:
        CheckpointError: not a usable checkpoint.
    """
    if checkpoint == EXPERT:
        return ExpertAgent()
    from pi05_lab.seeded_policy import EpisodePolicy

    policy = EpisodePolicy.from_pretrained(
        checkpoint, device=device, num_steps=num_steps, seed=0, threads=threads
    )
    return PolicyAgent(lambda: policy, size_px)
