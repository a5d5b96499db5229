"""The simulated ALOHA as a gymnasium environment, in LeRobot's observation format.

    import gymnasium, pi05_lab.sim.env
    env = gymnasium.make("pi05_lab/AlohaCubes-v0", tasks=("touch",))

Each episode is one task on random cube places, with its instruction in `task_description`. An
action sets the joint targets for one step of 20 ms, as in gym-aloha: joints in rad, grippers from 0
(closed) to 1 (open). No limits, no scheduler and no delay: `pi05 sim-eval` has those.
`lerobot-eval` finds it through `pi05_lab.sim.lerobot_plugin`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from pi05_lab.sim.arms import SimulatedAloha
from pi05_lab.sim.experts import grippers_to_metres, grippers_to_unit
from pi05_lab.sim.judge import Judge
from pi05_lab.sim.rendering import CAMERAS, CameraRenderer
from pi05_lab.sim.starts import random_start, reset_for
from pi05_lab.sim.tasks import VERBS, all_tasks, instruction

ENV_ID = "pi05_lab/AlohaCubes-v0"
FPS = 50
SHOWN_PX = (320, 240)
"""Width and height of `render`."""


class AlohaCubes(gymnasium.Env[dict[str, Any], NDArray[np.float32]]):
    """One task per episode: touch, pick up or place a cube, wave, or go home.

    Observations: `pixels`, camera name → RGB uint8 [height, width, 3]; `agent_pos`, [14] measured
    joints in the action's units. Reward 1 when the task is done, which ends the episode;
    `info["is_success"]` says whether it was.
    """

    metadata: ClassVar[dict[str, Any]] = {  # type: ignore[misc]
        "render_modes": ["rgb_array"],
        "render_fps": FPS,
    }

    def __init__(
        self,
        tasks: Sequence[str] = VERBS,
        held_out: bool = True,
        size_px: tuple[int, int] = (112, 84),
        cameras: Sequence[str] = CAMERAS,
        max_episode_steps: int = 500,
        render_mode: str | None = "rgb_array",
    ) -> None:
        """Make the simulator; the images' context belongs to the thread of the first `reset`.

        Args:
            tasks: verbs of the episodes.
            held_out: instructions that no training uses, else those of trainings.
            size_px: width and height of the images.
            cameras: of `CAMERAS`.
            max_episode_steps: after which an episode is truncated.
            render_mode: "rgb_array" or None.

        Raises:
            ValueError: an unknown task or camera.
        """
        for what, names, known in (("tasks", tasks, VERBS), ("cameras", cameras, CAMERAS)):
            for name in names:
                if name not in known:
                    raise ValueError(f"{what}: {name!r} is none of {', '.join(known)}")
        self.render_mode = render_mode
        self._max_episode_steps = max_episode_steps
        self._tasks = all_tasks(verbs=tuple(tasks))
        self._held_out, self._size_px, self._cameras = held_out, size_px, tuple(cameras)
        self._sim = SimulatedAloha()
        self._steps_per_action = round(1 / (FPS * float(self._sim.model.opt.timestep)))
        self._renderer: CameraRenderer | None = None
        self._shown: CameraRenderer | None = None
        self._task, self._text = self._tasks[0], ""
        self._judge = Judge(self._task, self._sim)
        self._step = 0
        image = spaces.Box(0, 255, (size_px[1], size_px[0], 3), np.uint8)
        joints = spaces.Box(-np.inf, np.inf, (14,), np.float64)
        self.observation_space = spaces.Dict(
            {"pixels": spaces.Dict(dict.fromkeys(self._cameras, image)), "agent_pos": joints}
        )
        low, high = (
            grippers_to_unit(bound).astype(np.float32)
            for bound in (self._sim.lower, self._sim.upper)
        )
        self.action_space = spaces.Box(low, high, (14,), np.float32)

    @property
    def task(self) -> str:
        """Verb, arm and cube: "touch left red"."""
        parts = (self._task.verb, self._task.side, self._task.color)
        return " ".join(part for part in parts if part)

    @property
    def task_description(self) -> str:
        """The instruction."""
        return self._text

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Begin an episode; the same seed gives the same task, places and instruction."""
        super().reset(seed=seed)
        self._task = self._tasks[int(self.np_random.integers(len(self._tasks)))]
        self._text = instruction(self._task, self.np_random, self._held_out)
        if self._task.verb == "home":
            random_start(self._sim, self._task, self.np_random)
        else:
            reset_for(self._sim, self._task, self.np_random)
        self._judge = Judge(self._task, self._sim)
        self._step = 0
        return self._observe(), self._info()

    def step(
        self, action: NDArray[np.float32]
    ) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Set the joint targets [14] and advance 20 ms.

        Raises:
            ValueError: another shape, or a value that is not finite.
        """
        self._sim.set_targets(grippers_to_metres(action))
        self._sim.step(self._steps_per_action)
        self._judge.update()
        self._step += 1
        done = self._judge.done
        truncated = self._step >= self._max_episode_steps and not done
        return self._observe(), float(done), done, truncated, self._info()

    def render(self) -> NDArray[np.uint8]:  # type: ignore[override]
        """RGB of the scene, for people."""
        if self._shown is None:
            self._shown = CameraRenderer(self._sim.model, *SHOWN_PX, quality="pretty")
        return self._shown.render(self._sim.qpos(), "scene")

    def close(self) -> None:
        for renderer in (self._renderer, self._shown):
            if renderer is not None:
                renderer.close()
        self._renderer = self._shown = None

    def _observe(self) -> dict[str, Any]:
        if self._renderer is None:
            self._renderer = CameraRenderer(self._sim.model, *self._size_px)
        qpos = self._sim.qpos()
        pixels = {name: self._renderer.render(qpos, name) for name in self._cameras}
        return {"pixels": pixels, "agent_pos": grippers_to_unit(self._sim.positions())}

    def _info(self) -> dict[str, Any]:
        return {"is_success": self._judge.done, "task": self.task}


gymnasium.register(ENV_ID, entry_point="pi05_lab.sim.env:AlohaCubes")
