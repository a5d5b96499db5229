"""One episode in the simulator: policy, scheduler, limits and controllers as on a robot.

The runner is the policy node's, made by the same factory from the same parameters. The clock is
the simulator's, and images are rendered only for the observations that an inference uses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from pi05_lab.evaluation.closed_loop.agents import Agent, SetupError
from pi05_lab.evaluation.simulated_executor import (
    SimulatedExecutor,
    checked_infer,
    evaluation_runner,
    sent_trajectory,
)
from pi05_lab.sim.arms import HOME_POSITIONS, SimulatedAloha
from pi05_lab.sim.controller import JointTrajectoryController, Trajectory, TrajectoryRejected
from pi05_lab.sim.judge import HOME_TOLERANCE_RAD, Judge, arm_slice, touches
from pi05_lab.sim.rendering import CAMERAS
from pi05_lab.sim.scene import CUBE_COLORS, JOINT_NAMES, SIDES
from pi05_lab.sim.starts import random_start, reset_for
from pi05_lab.sim.tasks import CUBE_VERBS, Task, all_tasks
from pi05_ros.control.trajectory import TrajectoryPoints
from pi05_ros.observation.buffer import History
from pi05_ros.observation.instruction import InstructionError
from pi05_ros.robot_config import RobotConfig
from pi05_ros.runner import PolicyRunner, Tick
from pi05_ros.types import ImageArray

JOINT_RATE_HZ = 100.0
OnTick = Callable[[PolicyRunner, Tick, float], bool]
Condition = Literal["plain", "shuffled", "black"]
CLAMPS = ("position", "velocity", "acceleration", "held")
_SEED_DOMAIN = 0x5E7E_7A1E
"""First word of every seed here: recordings use other random streams."""
_ALL_TASKS = all_tasks(tuple(CUBE_COLORS))
_TRACE_TICKS = 5


@dataclass(frozen=True)
class Trial:
    """One episode to run. The same trial has the same places and the same policy noise."""

    task: Task
    """Decides about success."""
    number: int
    """Of the episode among those of its task."""
    seed: int
    """Of the whole evaluation."""
    instructed: Task
    """The instruction's task; differs from `task` if shuffled."""
    instruction: str
    condition: Condition = "plain"
    """"plain"; "shuffled": the instruction is another task's; "black": all images are black."""

    def rng(self, stream: int = 0) -> np.random.Generator:
        """Independent of condition and settings, so that these are compared in pairs."""
        return trial_rng(self.seed, self.task, self.number, stream)

    @property
    def policy_seed(self) -> int:
        return int(self.rng(stream=2).integers(1 << 31))


def trial_rng(seed: int, task: Task, number: int, stream: int) -> np.random.Generator:
    return np.random.default_rng([_SEED_DOMAIN, seed, _ALL_TASKS.index(task), number, stream])


@dataclass(frozen=True)
class Settings:
    """How episodes run."""

    delay_s: float = 0.0
    """Simulated time from an observation's stamp to its usable chunk; the next tick at least."""
    replan_ticks: int = 0
    """Control ticks between inferences; 0: as the params file says."""
    limit_s: float = 10.0
    """Simulated time after which the task counts as failed."""


@dataclass(frozen=True)
class Outcome:
    """How an episode ended. Times are simulated seconds since the instruction."""

    trial: Trial
    start: str
    """"home", or the kind that `random_start` drew."""
    done_at_s: float | None
    """When the task was done; None for a failure."""
    instructed_done_at_s: float | None
    """When the instruction's task was done; differs if shuffled."""
    wrong_object: bool
    """The first wrong touch was of another cube than the task's."""
    wrong_arm: bool
    """The first wrong touch, or the wave, was with the other arm."""
    duration_s: float
    inferences: int
    failures: int
    """Inferences without a usable chunk."""
    rejected: int
    """Trajectories that a controller rejected."""
    error: str
    """The last reason of a failure or rejection, or ""."""
    clamps: dict[str, int] = field(default_factory=dict)
    """Kind → joints × ticks in which the limiter reduced the command."""
    scenes: tuple[tuple[float, ...], ...] = ()
    """The simulator's state [nq] at the start, in the middle and at the end."""

    @property
    def done(self) -> bool:
        return self.done_at_s is not None

    @property
    def instructed_done(self) -> bool:
        return self.instructed_done_at_s is not None


class ClosedLoop:
    """Runs episodes with one simulator and one agent, in the agent's thread.

    Raises:
        SetupError: the params file's joints are not the simulator's, or the policy has other
            dimensions or cameras.
        RobotConfigError: the limits are a URDF's, and none was given.
    """

    def __init__(self, agent: Agent, robot: RobotConfig, settings: Settings) -> None:
        robot.check_limits()
        self.sim = SimulatedAloha()
        self._agent, self._robot, self._settings = agent, robot, settings
        self._timestep_s = timestep_s = float(self.sim.model.opt.timestep)
        self._steps_per_tick = round(robot.dt_s / timestep_s)
        if abs(self._steps_per_tick * timestep_s - robot.dt_s) > 1e-9:
            raise SetupError(
                f"a control tick of {robot.dt_s:g} s is not a multiple of the simulator's "
                f"{timestep_s:g} s: choose another control_rate_hz"
            )
        if sorted(robot.joints.names) != sorted(JOINT_NAMES):
            raise SetupError(f"joints.names must be the simulator's {list(JOINT_NAMES)}")
        self._order = [JOINT_NAMES.index(name) for name in robot.joints.names]
        policy, joints = agent.policy, len(robot.joints)
        if (policy.state_dim, policy.action_dim) != (joints, joints):
            raise SetupError(
                f"the policy has {policy.state_dim} states and {policy.action_dim} actions, "
                f"the robot {joints} joints"
            )
        unknown = [camera for camera in policy.cameras if camera not in CAMERAS]
        if unknown or not policy.cameras:
            raise SetupError(f"the policy's cameras must be of {CAMERAS}, not {policy.cameras}")
        if not set(policy.cameras) & set(robot.cameras):
            raise SetupError(
                f"cameras.names must have one of the policy's cameras {list(policy.cameras)}, "
                f"not only {list(robot.cameras)}"
            )

    def play(
        self,
        trial: Trial,
        on_tick: OnTick | None = None,
        draw_delay_s: Callable[[], float] | None = None,
    ) -> Outcome:
        """Run one episode until the trial's or the instruction's task is done, or to the limit.

        After a fault the arms brake and stay at rest, as with the node.

        Args:
            trial: task, instruction and start.
            on_tick: called after each control tick; it may change the runner's instruction, and
                ends the episode by returning False.
            draw_delay_s: each chunk's delay, instead of the settings' one.

        Raises:
            SetupError: the node would refuse the instruction.
        """
        sim, settings = self.sim, self._settings
        start = reset_to_start(sim, trial)
        self._agent.begin(trial.policy_seed)
        infer = checked_infer(self._agent.policy)
        executor = SimulatedExecutor(infer, draw_delay_s or settings.delay_s)
        runner = self._runner(executor, black=trial.condition == "black")
        arms = _Arms(sim, self._robot, self._order)
        judge, instructed = Judge(trial.task, sim), Judge(trial.instructed, sim)
        mistake = _FirstMistake(sim)
        try:
            runner.set_instruction(trial.instruction)
        except InstructionError as refusal:
            raise SetupError(f"{trial.instruction!r}: {refusal}") from None
        runner.activate()
        trace = [sim.qpos()]
        next_frame_s = 0.0
        joint_steps = max(1, round(1.0 / (JOINT_RATE_HZ * self._timestep_s)))
        error = ""
        for step in range(round(settings.limit_s / self._timestep_s)):
            now_s = step * self._timestep_s
            if step % joint_steps == 0:
                runner.buffer.put_joints(now_s, sim.positions()[self._order])
            if now_s >= next_frame_s - 1e-9:
                next_frame_s += 1.0 / self._robot.camera_rate_hz
                qpos = sim.qpos()
                for camera in runner.buffer.camera_names:
                    runner.buffer.put_image(camera, now_s, (camera, qpos))
            if step % self._steps_per_tick == 0:
                executor.now_s = now_s
                tick = runner.tick(now_s)
                error = tick.failures[-1] if tick.failures else error
                if tick.fault is not None:
                    error = tick.fault.message
                points = sent_trajectory(runner, tick, now_s)
                if points is not None:
                    arms.follow(points, now_s)
            arms.step(now_s)
            if (step + 1) % self._steps_per_tick:
                continue
            judge.update()
            instructed.update()
            mistake.update(judge)
            if (step + 1) % (_TRACE_TICKS * self._steps_per_tick) == 0:
                trace.append(sim.qpos())
            if on_tick is not None and not on_tick(runner, tick, now_s):
                break
            if judge.done or instructed.done:
                break
        trace.append(sim.qpos())
        clamps = runner.stream.clamps
        return Outcome(
            trial=trial,
            start=start,
            done_at_s=judge.done_at_s and round(judge.done_at_s, 6),
            instructed_done_at_s=instructed.done_at_s and round(instructed.done_at_s, 6),
            wrong_object=mistake.wrong_object,
            wrong_arm=mistake.wrong_arm,
            duration_s=round((step + 1) * self._timestep_s, 6),
            inferences=executor.completed + executor.failed,
            failures=executor.failed,
            rejected=arms.rejected,
            error=error or arms.last_rejection,
            clamps={kind: int(getattr(clamps, kind).sum()) for kind in CLAMPS},
            scenes=tuple(
                tuple(np.round(qpos, 5).tolist())
                for qpos in (trace[0], trace[len(trace) // 2], trace[-1])
            ),
        )

    def _runner(self, executor: SimulatedExecutor, black: bool) -> PolicyRunner:
        scheduling = self._robot.scheduler
        if self._settings.replan_ticks:
            interval_s = self._settings.replan_ticks * self._robot.dt_s
            scheduling = replace(scheduling, replan="free", replan_interval_s=interval_s)

        def decode(message: Any) -> ImageArray:
            image = self._agent.draw(*message)
            return np.zeros_like(image) if black else image

        # Rendered images repeat exactly at rest, and the ablation's images are black on purpose.
        faults = replace(self._robot.faults, frozen_image_s=0.0, refuse_one_colour=False)
        robot = replace(self._robot, faults=faults)
        policy = self._agent.policy
        history = History.of(policy)
        return evaluation_runner(
            robot, scheduling, policy.cameras, executor, decode, history=history
        )


class _Arms:
    """The simulator behind one trajectory controller per arm, as in `aloha_sim`."""

    def __init__(self, sim: SimulatedAloha, robot: RobotConfig, order: list[int]) -> None:
        self.rejected, self.last_rejection = 0, ""
        self._sim, self._targets = sim, sim.positions()
        self._controllers = []
        for columns in robot.columns.values():
            names = [robot.joints.names[column] for column in columns]
            places = [order[column] for column in columns]
            controller = JointTrajectoryController(names)
            controller.hold(self._targets[places])
            self._controllers.append((controller, columns, places))

    def follow(self, points: TrajectoryPoints, now_s: float) -> None:
        for controller, columns, _ in self._controllers:
            trajectory = Trajectory(
                controller.joint_names,
                points.stamp_s,
                points.times_from_start_s,
                points.positions[:, columns],
                points.velocities[:, columns],
            )
            try:
                controller.accept(trajectory, now_s)
            except TrajectoryRejected as reason:
                self.rejected += 1
                self.last_rejection = str(reason)

    def step(self, now_s: float) -> None:
        measured = self._sim.positions()
        for controller, _, places in self._controllers:
            self._targets[places] = controller.update(now_s, measured[places])[0]
        self._sim.set_targets(self._targets)
        self._sim.step()


class _FirstMistake:
    """Whether the judge's first wrong action was of another cube or with the other arm."""

    def __init__(self, sim: SimulatedAloha) -> None:
        self.wrong_object = self.wrong_arm = False
        self._sim = sim
        self._seen = False
        self._at_start = self._touching()

    def update(self, judge: Judge) -> None:
        if self._seen or not judge.wrong:
            return
        self._seen = True
        if judge.task.verb not in CUBE_VERBS:
            self.wrong_arm = True
            return
        touched = self._touching() - {(judge.task.side, judge.task.color)}
        for side, cube in touched - self._at_start or touched:
            self.wrong_object |= cube != judge.task.color
            self.wrong_arm |= side != judge.task.side

    def _touching(self) -> set[tuple[str | None, str | None]]:
        cubes = self._sim.cubes
        return {(side, c) for side in SIDES for c in cubes if touches(self._sim, side, c)}


def reset_to_start(sim: SimulatedAloha, trial: Trial) -> str:
    """Set the simulator to the trial's start; returns the kind of start."""
    rng = trial.rng()
    if trial.task.verb != "home":
        reset_for(sim, trial.task, rng)
        return "home"
    for _ in range(100):
        kind = random_start(sim, trial.task, rng)
        away = np.abs(sim.positions() - HOME_POSITIONS)
        if max(away[arm_slice(side)].max() for side in SIDES) > 2 * HOME_TOLERANCE_RAD:
            return kind
    raise RuntimeError("no start found away from home in 100 tries")
