"""Decides whether a task was done in the simulator, or another one instead."""

from __future__ import annotations

import numpy as np

from pi05_lab.sim.arms import HOME_POSITIONS, SimulatedAloha
from pi05_lab.sim.scene import ARM_JOINTS, CUBE_HALF_SIZE_M, JOINT_NAMES, SIDES
from pi05_lab.sim.tasks import CUBE_VERBS, MIDDLE_M, Task
from pi05_ros.types import FloatArray

TOUCH_RADIUS_M = 0.02
TOUCH_HEIGHT_M = 0.045
LIFT_HEIGHT_M = 0.08
HELD_RADIUS_M = 0.05
PLACE_RADIUS_M = 0.04
RESTING_HEIGHT_M = CUBE_HALF_SIZE_M + 0.01
HOME_TOLERANCE_RAD = 0.1
SWING_RAD = 0.3
SWINGS = 5
"""Half swings: the first may be shorter than the other four, which are two whole periods."""
SWING_HEIGHT_M = 0.2
STILL_RAD = 0.15
SETTLED_S = 0.2
"""Duration for which "place" and "home" must hold."""

_LONGEST_SWING_S = 2.0
_SWINGING = [ARM_JOINTS.index("waist"), ARM_JOINTS.index("wrist_rotate")]


def arm_slice(side: str) -> slice:
    """The six joints of one arm in the order of `scene.JOINT_NAMES`, without its gripper."""
    start = JOINT_NAMES.index(f"{side}_{ARM_JOINTS[0]}")
    return slice(start, start + len(ARM_JOINTS))


def other_side(side: str) -> str:
    """The arm that is not `side`."""
    return SIDES[1 - SIDES.index(side)]


def touches(sim: SimulatedAloha, side: str, cube: str) -> bool:
    """The tool is within 2 cm sideways of the cube's centre and at most 4.5 cm above it."""
    offset = sim.tool_position(side) - sim.cube_position(cube)
    return bool(np.hypot(offset[0], offset[1]) < TOUCH_RADIUS_M and offset[2] < TOUCH_HEIGHT_M)


class Judge:
    """Evaluates a task from the judge's construction on.

    A task is done when, with the named arm and cube,

    - touch: the tool came within 2 cm sideways of the cube's centre and 4.5 cm above it;
    - pick: the cube's centre was higher than 8 cm, at most 5 cm from the tool;
    - place: the cube lay within 4 cm of the table's middle for 0.2 s, with the tool 5 cm away;
    - wave: waist or wrist_rotate swung to and fro twice (each swing 0.3 rad or more and at most
      2 s long) with the tool 20 cm above the table, while the other arm's joints stayed within
      0.15 rad;
    - home: all joints of both arms but the grippers were within 0.1 rad of home for 0.2 s.

    It is wrong when, before that, another arm or cube fulfilled "touch" during a task with a cube
    (unless it did so from the start), or the other arm swung twice during "wave".

    Once set, `done` and `wrong` stay. A task that is fulfilled at the start is done. The task's
    cube must be on the table.
    """

    def __init__(self, task: Task, sim: SimulatedAloha) -> None:
        if task.color is not None and task.color not in sim.cubes:
            raise ValueError(f"there is no {task.color} cube; the cubes are {sim.cubes}")
        self.task = task
        self.done = False
        self.wrong = False
        self.done_at_s: float | None = None
        """Simulated time from the judge's construction to success."""
        self._sim = sim
        self._start_s = sim.time_s
        self._since_s: float | None = None
        self._swings = {side: _Swings() for side in SIDES}
        self._exempt = self._other_touches()

    def update(self) -> None:
        """Evaluate the simulator's state; call it at every control tick."""
        if self.done:
            return
        others = self._other_touches()
        self._exempt &= others
        self.wrong |= bool(others - self._exempt)
        now_s = self._sim.time_s
        if not self._holds():
            self._since_s = None
            return
        if self._since_s is None:
            self._since_s = now_s
        wait_s = SETTLED_S if self.task.verb in ("place", "home") else 0.0
        if now_s - self._since_s >= wait_s - 1e-9:
            self.done = True
            self.done_at_s = now_s - self._start_s

    def _holds(self) -> bool:
        if self.task.verb == "wave":
            return self._waved()
        if self.task.verb == "home":
            error = np.abs(self._sim.positions() - HOME_POSITIONS)
            return all(error[arm_slice(side)].max() < HOME_TOLERANCE_RAD for side in SIDES)
        side, cube = self._named()
        if self.task.verb == "touch":
            return touches(self._sim, side, cube)
        position = self._sim.cube_position(cube)
        distance_m = np.linalg.norm(self._sim.tool_position(side) - position)
        if self.task.verb == "pick":
            return bool(position[2] > LIFT_HEIGHT_M and distance_m < HELD_RADIUS_M)
        off_m = np.hypot(*(position[:2] - MIDDLE_M))
        lies = off_m < PLACE_RADIUS_M and abs(position[2]) < RESTING_HEIGHT_M
        return bool(lies and distance_m > HELD_RADIUS_M)

    def _named(self) -> tuple[str, str]:
        assert self.task.side is not None and self.task.color is not None
        return self.task.side, self.task.color

    def _other_touches(self) -> set[tuple[str, str]]:
        if self.task.verb not in CUBE_VERBS:
            return set()
        pairs = {(side, cube) for side in SIDES for cube in self._sim.cubes} - {self._named()}
        return {pair for pair in pairs if touches(self._sim, *pair)}

    def _waved(self) -> bool:
        positions, time_s = self._sim.positions(), self._sim.time_s
        for side, swings in self._swings.items():
            swings.update(positions[arm_slice(side)], time_s)
            if self._sim.tool_position(side)[2] < SWING_HEIGHT_M:
                swings.reset()
        assert self.task.side is not None
        named, other = self._swings[self.task.side], self._swings[other_side(self.task.side)]
        self.wrong |= other.started_s < np.inf
        return named.started_s < np.inf and other.travel_since(named.started_s) < STILL_RAD


class _Swings:
    """Counts the half swings of an arm's waist and wrist_rotate."""

    def __init__(self) -> None:
        self._history: list[tuple[float, FloatArray]] = []
        self.reset()

    def reset(self) -> None:
        self._times_s: list[list[float]] = [[] for _ in _SWINGING]
        self._direction = [0] * len(_SWINGING)
        self._low = [np.inf] * len(_SWINGING)
        self._high = [-np.inf] * len(_SWINGING)

    @property
    def started_s(self) -> float:
        """Start of the last `SWINGS` swings; inf if there are fewer."""
        starts = [times[-SWINGS] for times in self._times_s if len(times) >= SWINGS]
        return min(starts, default=np.inf)

    def travel_since(self, time_s: float) -> float:
        """The largest range of any of the arm's joints since then, rad."""
        joints = [joints for stamp_s, joints in self._history if stamp_s >= time_s]
        return float(np.ptp(joints, axis=0).max()) if joints else 0.0

    def update(self, joints: FloatArray, time_s: float) -> None:
        """Add the arm's joints [6]."""
        self._history.append((time_s, joints))
        for i, angle in enumerate(joints[_SWINGING]):
            times = self._times_s[i]
            if times and time_s - times[-1] > _LONGEST_SWING_S:
                times.clear()
            self._low[i] = min(self._low[i], angle)
            self._high[i] = max(self._high[i], angle)
            for direction, extent in ((1, angle - self._low[i]), (-1, self._high[i] - angle)):
                if extent >= SWING_RAD and direction != self._direction[i]:
                    times.append(time_s)
                    self._direction[i] = direction
                    self._low[i] = self._high[i] = angle
