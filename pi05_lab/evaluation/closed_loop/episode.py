"""One episode in the simulator: policy, scheduler, limits and controllers as on a robot.

The runner is the policy node's, made by the same factory from the same parameters; the clock is
the simulator's, and pictures are drawn only for the observations that an inference uses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from pi05_lab.evaluation.closed_loop.agents import Agent
from pi05_lab.evaluation.closed_loop.trials import Trial
from pi05_lab.evaluation.simulated_executor import TimedExecutor, evaluation_runner, sent_trajectory
from pi05_lab.sim.arms import HOME_POSITIONS, SimulatedAloha
from pi05_lab.sim.controller import JointTrajectoryController, Trajectory, TrajectoryRejected
from pi05_lab.sim.judge import HOME_TOLERANCE_RAD, Judge, arm_slice, touches
from pi05_lab.sim.rendering import CAMERAS
from pi05_lab.sim.scene import JOINT_NAMES, SIDES
from pi05_lab.sim.starts import random_start, reset_for
from pi05_lab.sim.tasks import CUBE_VERBS
from pi05_ros.control.trajectory import TrajectoryPoints
from pi05_ros.observation.instruction import InstructionError
from pi05_ros.robot_config import RobotConfig
from pi05_ros.runner import PolicyRunner, Tick
from pi05_ros.types import ImageArray

JOINT_RATE_HZ = 100.0
Watch = Callable[[PolicyRunner, Tick, float], bool]
_AWAY_RAD = 2 * HOME_TOLERANCE_RAD
"""How far a joint is from home at least when "home" begins."""
_TRACE_TICKS = 5
_TRIES = 100


class SetupError(ValueError):
    """Policy, robot and simulator do not fit together; one line says why."""


@dataclass(frozen=True)
class Settings:
    """How episodes are played."""

    delay_s: float = 0.0
    """Simulated time from an observation's stamp to its usable chunk; the next tick at least."""
    replan_ticks: int = 0
    """Control ticks between observations that are inferred on; 0: as the params file says."""
    limit_s: float = 10.0
    """Simulated time after which a task that is not done has failed."""

    def __post_init__(self) -> None:
        if self.replan_ticks < 0:
            raise ValueError(f"replan_ticks must be at least 0, got {self.replan_ticks}")
        if not self.limit_s >= 0.1:
            raise ValueError(f"limit_s must be at least 0.1 s, got {self.limit_s}")


@dataclass(frozen=True)
class Outcome:
    """How an episode ended. Times are simulated seconds since the instruction."""

    trial: Trial
    start: str
    """"home", or the kind that `random_start` drew."""
    done_at_s: float | None
    """When the task was done; None for a failure."""
    told_done_at_s: float | None
    """When the task of the instruction was done; differs if shuffled."""
    wrong_object: bool
    """The first touch of anything but what was asked for was of another cube."""
    wrong_arm: bool
    """That touch, or the wave, was with the other arm."""
    duration_s: float
    inferences: int
    failures: int
    """Inferences without a usable chunk."""
    rejected: int
    """Trajectories that a controller refused."""
    error: str
    """The last reason of either, or ""."""
    clamps: dict[str, int] = field(default_factory=dict)
    """Kind → joints × ticks in which the limiter gave less than was asked for."""
    scenes: tuple[tuple[float, ...], ...] = ()
    """The simulator's state [nq] at the start, in the middle and at the end."""

    @property
    def done(self) -> bool:
        return self.done_at_s is not None

    @property
    def told_done(self) -> bool:
        return self.told_done_at_s is not None


class ClosedLoop:
    """Plays episodes with one simulator and one agent, in the agent's thread.

    Raises:
        SetupError: the params file's joints are not the simulator's, or the policy has other
            dimensions or cameras.
        RobotConfigError: the limits are a URDF's, and none was given.
    """

    def __init__(self, agent: Agent, robot: RobotConfig, settings: Settings) -> None:
        robot.check_limits()
        self.sim = SimulatedAloha()
        self._agent = agent
        self._robot = robot
        self._settings = settings
        timestep_s = float(self.sim.model.opt.timestep)
        self._timestep_s = timestep_s
        self._steps_per_tick = round(robot.dt_s / timestep_s)
        if abs(self._steps_per_tick * timestep_s - robot.dt_s) > 1e-9:
            raise SetupError(
                f"a control tick of {robot.dt_s:g} s is no multiple of the simulator's "
                f"{timestep_s:g} s: choose another control_rate_hz"
            )
        if sorted(robot.joints.names) != sorted(JOINT_NAMES):
            raise SetupError(f"joints.names must be the simulator's {list(JOINT_NAMES)}")
        self._order = [JOINT_NAMES.index(name) for name in robot.joints.names]
        self._check_policy()

    def _check_policy(self) -> None:
        policy, joints = self._agent.policy, len(self._robot.joints)
        if (policy.state_dim, policy.action_dim) != (joints, joints):
            raise SetupError(
                f"the policy has {policy.state_dim} states and {policy.action_dim} actions, "
                f"the robot {joints} joints"
            )
        unknown = [camera for camera in policy.cameras if camera not in CAMERAS]
        if unknown or not policy.cameras:
            raise SetupError(f"the policy's cameras must be of {CAMERAS}, not {policy.cameras}")
        if not set(policy.cameras) & set(self._robot.cameras):
            raise SetupError(
                f"cameras.names must have one of the policy's cameras {list(policy.cameras)}, "
                f"not only {list(self._robot.cameras)}"
            )

    def play(
        self,
        trial: Trial,
        watch: Watch | None = None,
        draw_delay_s: Callable[[], float] | None = None,
    ) -> Outcome:
        """One episode, until its task or that of the instruction is done, or time is over.

        After a fault the arms come to rest and stay there, as with the node.

        Args:
            trial: what is asked for, and from where.
            watch: called after each control tick; it may change the instruction, or end the
                episode by returning False.
            draw_delay_s: each chunk's delay, instead of the settings' one.

        Raises:
            SetupError: the node would refuse the instruction.
        """
        sim, settings = self.sim, self._settings
        start = reset_to_start(sim, trial)
        self._agent.begin(trial.policy_seed)
        executor = TimedExecutor(self._agent.policy, draw_delay_s or settings.delay_s)
        runner = self._runner(executor, black=trial.condition == "black")
        arms = _Arms(sim, self._robot, self._order)
        judge, told, mistakes = Judge(trial.task, sim), Judge(trial.told, sim), _Mistakes(sim)
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
            told.update()
            mistakes.update(judge)
            if (step + 1) % (_TRACE_TICKS * self._steps_per_tick) == 0:
                trace.append(sim.qpos())
            if watch is not None and not watch(runner, tick, now_s):
                break
            if judge.done or told.done:
                break
        trace.append(sim.qpos())
        clamps = runner.stream.clamps
        return Outcome(
            trial=trial,
            start=start,
            done_at_s=_rounded(judge.done_at_s),
            told_done_at_s=_rounded(told.done_at_s),
            wrong_object=mistakes.wrong_object,
            wrong_arm=mistakes.wrong_arm,
            duration_s=round((step + 1) * self._timestep_s, 6),
            inferences=executor.completed + executor.failed,
            failures=executor.failed,
            rejected=arms.rejected,
            error=error or arms.last_rejection,
            clamps={
                kind: int(getattr(clamps, kind).sum())
                for kind in ("position", "velocity", "acceleration", "held")
            },
            scenes=tuple(
                tuple(np.round(trace[k], 5).tolist()) for k in (0, len(trace) // 2, len(trace) - 1)
            ),
        )

    def _runner(self, executor: TimedExecutor, black: bool) -> PolicyRunner:
        scheduling = self._robot.scheduler
        if self._settings.replan_ticks:
            interval_s = self._settings.replan_ticks * self._robot.dt_s
            scheduling = replace(scheduling, replan="free", replan_interval_s=interval_s)

        def decode(message: Any) -> ImageArray:
            picture = self._agent.draw(*message)
            return np.zeros_like(picture) if black else picture

        cameras = self._agent.policy.cameras
        # rendered images repeat to the byte at rest, and the ablation's are black on purpose
        faults = replace(self._robot.faults, frozen_image_s=0.0, refuse_one_colour=False)
        robot = replace(self._robot, faults=faults)
        return evaluation_runner(robot, scheduling, cameras, executor, decode)


class _Arms:
    """The simulator behind one trajectory controller per arm, as `aloha_sim` has it."""

    def __init__(self, sim: SimulatedAloha, robot: RobotConfig, order: list[int]) -> None:
        self.rejected = 0
        self.last_rejection = ""
        self._sim = sim
        self._targets = sim.positions()
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


class _Mistakes:
    """Tells what the judge's first "something else was done" was."""

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
        named = (judge.task.side, judge.task.color)
        touched = self._touching() - {named}
        for side, cube in touched - self._at_start or touched:
            self.wrong_object |= cube != judge.task.color
            self.wrong_arm |= side != judge.task.side

    def _touching(self) -> set[tuple[str | None, str | None]]:
        cubes = self._sim.cubes
        return {(side, c) for side in SIDES for c in cubes if touches(self._sim, side, c)}


def reset_to_start(sim: SimulatedAloha, trial: Trial) -> str:
    """Put the simulator to the trial's start; the kind of start."""
    rng = trial.rng()
    if trial.task.verb != "home":
        reset_for(sim, trial.task, rng)
        return "home"
    for _ in range(_TRIES):
        kind = random_start(sim, trial.task, rng)
        away = np.abs(sim.positions() - HOME_POSITIONS)
        if max(away[arm_slice(side)].max() for side in SIDES) > _AWAY_RAD:
            return kind
    raise RuntimeError(f"no start away from home in {_TRIES} tries")


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 6)
