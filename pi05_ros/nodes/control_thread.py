"""The control thread: the only place that commands the robot.

Control ticks, the messages between them and all braking run on this one thread. Other threads queue
an order (stop, end) and wait for its effect. Images, services and status messages run on rclpy's
thread and do not delay a tick. Three things are shared with it: the runner under `lock`, the orders
and wake-up flags under `_changed`, and plain attributes that one thread writes and others read.
"""

from __future__ import annotations

import os
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from rclpy.callback_groups import ReentrantCallbackGroup
from rclpy.node import Node
from rclpy.timer import Timer

from pi05_ros.control.latency import LatencyTracker
from pi05_ros.control.trajectory import Braking, TrajectoryPoints
from pi05_ros.executor import ExecutorState
from pi05_ros.msg import ActionChunk
from pi05_ros.nodes.messages import chunk_message
from pi05_ros.nodes.outputs import Output
from pi05_ros.requests import Fault
from pi05_ros.runner import PolicyRunner, Tick
from pi05_ros.types import Level, Problem

RATE_TICKS = 251
"""Window of the measured control rate."""
BEFORE_TICK_S = 0.002
"""No work between two ticks begins closer than this to the next tick."""
REPEAT_BEFORE_REST_S = 0.05
"""A braking trajectory sent later could arrive after its end, which the controller reports."""
STOP_ANSWER_S = 0.5
"""How long `stop` waits for the first braking command."""


class TickTimes:
    """Rate and jitter of the control ticks, by time.monotonic."""

    def __init__(self) -> None:
        self.ticks = 0
        self.jitter = LatencyTracker()
        """|interval - period|."""
        self.times_s: deque[float] = deque(maxlen=RATE_TICKS)
        """Of the last ticks without a pause between them."""

    def mark(self, period_s: float) -> None:
        """A tick; the one before should have been `period_s` ago."""
        now_s = time.monotonic()
        if self.times_s:
            self.jitter.add(abs(now_s - self.times_s[-1] - period_s))
        self.times_s.append(now_s)
        self.ticks += 1

    @property
    def rate_hz(self) -> float:
        """Over the last ticks; 0 before the second one."""
        times_s = self.times_s
        span_s = times_s[-1] - times_s[0] if len(times_s) > 1 else 0.0
        return (len(times_s) - 1) / span_s if span_s > 0 else 0.0


End = Callable[[PolicyRunner, float], Braking | None]


@dataclass(frozen=True)
class _Order:
    """Another thread's order to end the motion."""

    end: End
    """`PolicyRunner.stop` or `PolicyRunner.deactivate`."""
    last: bool = False
    """The control thread ends with it."""
    begun: threading.Event = field(default_factory=threading.Event)
    """The first braking commands are sent, or nothing moves."""
    rested: threading.Event = field(default_factory=threading.Event)
    """All commands are sent and end at rest."""


class ControlThread:
    """Runs a `PolicyRunner` and sends its commands to all outputs.

    Any other thread that uses the runner holds `lock`. `start`, `end` and `stop` are called without
    it, since they wait for the thread.
    """

    def __init__(self, node: Node, on_fault: Callable[[], None]) -> None:
        """`on_fault` runs on the node's transition thread after `fault` is set."""
        self.lock = threading.RLock()
        self.runner: PolicyRunner | None = None
        self.outputs: dict[str, Output] = {}
        self.tick_times = TickTimes()
        self.trajectories = 0
        """Messages published, all controllers together."""
        self.late = 0
        """Trajectories that were not sent because they could not arrive in time."""
        self.last_failure = ""
        self.fault: Fault | None = None
        """Why the motion has ended; no command is sent after its braking."""
        self.conflicts: Sequence[Problem] = ()
        """Second publishers and unsafe controllers; while there are any, the arms rest."""
        self._node = node
        self._dry_run = False
        self._names: Sequence[str] = ()
        self._priority = 0
        self._period_s = 0.02
        # in the node's default group it would hold back stop and status during the transition
        self.fault_condition = node.create_guard_condition(on_fault, ReentrantCallbackGroup())
        self._changed = threading.Condition()
        self._orders: deque[_Order] = deque()
        self._news = self._sim_tick = self._running = False
        self._thread: threading.Thread | None = None
        self._timer: Timer | None = None

    def set_up(
        self, runner: PolicyRunner, names: Sequence[str], *, dry_run: bool, realtime_priority: int
    ) -> None:
        """Prepare to move the joints `names` through `outputs`.

        With a `realtime_priority` the thread requests SCHED_FIFO, as ros2_control's does; where the
        system refuses it, the thread runs without.
        """
        self.runner, self._names, self._dry_run = runner, names, dry_run
        self._priority, self._period_s = realtime_priority, runner.stream.dt_s
        self._chunks = self._node.create_publisher(ActionChunk, "~/action_chunk", 10)
        if self._node.get_parameter("use_sim_time").value:
            # a simulated clock can pause or jump: its timer wakes the thread
            self._timer = self._node.create_timer(self._period_s, self._on_sim_tick)
            self._timer.cancel()

    def tear_down(self) -> None:
        """Undo `set_up` except for `runner`; the thread must have ended."""
        if self._timer is not None:
            self._node.destroy_timer(self._timer)
            self._timer = None
        self._node.destroy_publisher(self._chunks)

    def start(self) -> None:
        """Activate the runner and start the thread; the first tick comes at once."""
        assert self.runner is not None and self._thread is None
        self.fault, self.last_failure = None, ""
        with self.lock:
            self.runner.activate()
        self.tick_times.times_s.clear()
        with self._changed:
            self._news, self._sim_tick, self._running = False, True, True
        if self._timer is not None:
            self._timer.reset()
        self._thread = threading.Thread(target=self._run, name="pi05_control", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Deactivate the runner, brake all outputs to rest, end the thread."""
        self._order(_Order(_deactivate, last=True))
        if self._timer is not None:
            self._timer.cancel()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def stop(self, until_rest_s: float = 0.0) -> bool:
        """Stop the runner (latched) and brake all outputs together.

        Returns whether the braking has begun; with `until_rest_s`, whether the arms are at rest
        within that time.
        """
        order = _Order(lambda runner, now_s: runner.stop(now_s))
        self._order(order)
        if until_rest_s > 0:
            return order.rested.wait(until_rest_s)
        return order.begun.wait(STOP_ANSWER_S)

    def frame_arrived(self) -> None:
        """An image has arrived; with a free executor, it starts an inference before the tick."""
        runner = self.runner
        if runner is not None and runner.executor.state is ExecutorState.READY:
            self.notify()

    def notify(self) -> None:
        """Work has arrived that does not wait for the next tick; from any thread."""
        with self._changed:
            self._news = True
            self._changed.notify()

    def problems(self) -> list[Problem]:
        """Why no command is sent: conflicts, and outputs without a controller."""
        texts = [
            f"controllers: no controller subscribes to {output.topic} (subscribers: "
            f"{', '.join(output.subscriber_names) or 'none'}); start it"
            for output in self._without_controller()
        ]
        return [*self.conflicts, *(Problem("controllers", text, Level.ERROR) for text in texts)]

    def _without_controller(self) -> list[Output]:
        """None in a dry run."""
        if self._dry_run:
            return []
        return [output for output in self.outputs.values() if not output.has_controller()]

    def now_s(self) -> float:
        return float(self._node.get_clock().now().nanoseconds * 1e-9)

    def _on_sim_tick(self) -> None:
        with self._changed:
            self._sim_tick = True
            self._changed.notify()

    def _order(self, order: _Order) -> None:
        with self._changed:
            # The control thread clears `_running` under the same lock and then executes the orders
            # that are left: no order is lost between its last wait and its end.
            if self._running:
                self._orders.append(order)
                self._changed.notify()
                return
        self._execute(order)

    def _run(self) -> None:
        self._request_priority()
        due_s = time.monotonic()
        while True:
            order, tick, news = self._wait(due_s)
            if order is not None:
                if order.last:
                    break
                self._execute(order)
            elif tick:
                self.tick_times.mark(self._period_s)
                self._advance(in_between=False)
                due_s += self._period_s
                # skip missed ticks instead of sending a burst
                due_s += max(0, int((time.monotonic() - due_s) / self._period_s)) * self._period_s
            elif news and due_s - time.monotonic() > BEFORE_TICK_S:
                self._advance(in_between=True)
        self._execute(order)
        with self._changed:
            self._running = False
            left, self._orders = self._orders, deque()
        for order in left:
            self._execute(order)

    def _wait(self, due_s: float) -> tuple[_Order | None, bool, bool]:
        """Wait for an order, a tick, or news between ticks."""
        simulated = self._timer is not None
        with self._changed:
            while not (self._orders or self._sim_tick or (self._news and not simulated)):
                left_s = None if simulated else due_s - time.monotonic()
                if left_s is not None and left_s <= 0:
                    break
                self._changed.wait(left_s)
            if self._orders:
                return self._orders.popleft(), False, False
            tick = self._sim_tick if simulated else time.monotonic() >= due_s
            news, self._news, self._sim_tick = self._news, False, False
            return None, tick, news

    def _request_priority(self) -> None:
        if self._priority == 0 or not hasattr(os, "sched_setscheduler"):
            return
        thread, priority = threading.get_native_id(), os.sched_param(self._priority)
        try:
            os.sched_setscheduler(thread, os.SCHED_FIFO, priority)
        except OSError as error:
            self._node.get_logger().info(
                f"the control thread has no real-time priority ({error.strerror}): ticks may be "
                "some ms late on a busy machine; docs/benchmarks.md says how to grant it",
                once=True,
            )

    def _execute(self, order: _Order) -> None:
        with self.lock:
            runner = self.runner
            braking = None if runner is None else self._guarded(runner, order.end)
        if runner is not None and braking is not None:
            self._brake(runner, braking, order.begun)
        order.begun.set()
        order.rested.set()

    def _guarded(self, runner: PolicyRunner, end: End) -> Braking | None:
        """Call `end`; if it raises, send velocity 0, since no arm may keep its last velocity."""
        try:
            return end(runner, self.now_s())
        except Exception:
            self._node.get_logger().error(traceback.format_exc())
            for output in () if self._dry_run else self.outputs.values():
                output.send_rest()
            return None

    def _advance(self, in_between: bool) -> None:
        """One tick, or the work that has arrived between two."""
        with self.lock:
            runner = self.runner
            if self.fault is not None or runner is None:
                return
            try:
                braking = self._step(runner, in_between)
            except Exception as error:
                if not self._node.context.ok():
                    return  # another thread has shut rclpy down: all publishers are invalid
                # if this thread died, the arms would keep their last command without a fault
                self._node.get_logger().error(traceback.format_exc())
                fault = Fault(f"the control thread failed: {error}", device=False)
                braking = self._give_up(runner, fault)
        if braking is not None:
            self._brake(runner, braking)

    def _step(self, runner: PolicyRunner, in_between: bool) -> Braking | None:
        now_s = self.now_s()
        lost = self._without_controller()
        if lost:
            # a controller that comes back starts at the measured positions, not at the commands
            runner.stream.reset()
        if lost or (self.conflicts and not self._dry_run):
            return runner.come_to_rest(now_s)
        tick = runner.process_results(now_s) if in_between else runner.tick(now_s, request=False)
        if tick.chunks:
            self.last_failure = ""
        for failure in tick.failures:
            self.last_failure = failure
            self._node.get_logger().warning(f"inference: {failure}", throttle_duration_sec=1.0)
        for notice in tick.notices:
            self._node.get_logger().warning(notice)
        if tick.fault is not None:
            return self._give_up(runner, tick.fault)
        braking = tick.braking
        if braking is None:
            if not self._dry_run and not runner.stopped:
                self._send(runner, tick, in_between)
            runner.request_inference(now_s)
        for chunk, latency_s in tick.chunks:
            self._chunks.publish(chunk_message(chunk, self._names, latency_s))
        return braking

    def _send(self, runner: PolicyRunner, tick: Tick, in_between: bool) -> None:
        stream = runner.stream
        # read the clock again: planning took time, and the system may have suspended this thread
        now_s = self.now_s()
        if tick.trajectory is not None and not stream.in_time(now_s):
            runner.not_published()
            self.late += 1
            tick = replace(tick, trajectory=None)
            self._node.get_logger().warning(
                "a trajectory was ready too late and is not sent: is the machine overloaded?",
                throttle_duration_sec=1.0,
            )
        for output in self.outputs.values():
            if tick.trajectory is not None:
                self.trajectories += output.send_trajectory(tick.trajectory)
            if not in_between:
                self.trajectories += (
                    output.send_command(stream, now_s) if stream.active else output.send_rest()
                )
        runner.published(tick)

    def _brake(
        self, runner: PolicyRunner, braking: Braking, begun: threading.Event | None = None
    ) -> None:
        """Send the braking motion to all outputs together; returns when the commands are at rest.

        The steady clock paces it, since the ROS clock may pause. The rest of the trajectory is
        repeated every period, so that each controller brakes although a message is lost.
        """
        if self._dry_run:
            return
        try:
            trajectory = braking.trajectory
            if trajectory is not None and not self._send_trajectory(runner, trajectory):
                with self.lock:
                    late = runner.braking_not_published(self.now_s())
                if late is None:
                    return
                braking = late
            if begun is not None:
                begun.set()
            self._follow_to_rest(runner, braking)
        except Exception:
            if self._node.context.ok():
                self._node.get_logger().error(traceback.format_exc())

    def _send_trajectory(self, runner: PolicyRunner, trajectory: TrajectoryPoints) -> bool:
        """Send a braking trajectory unless it is late."""
        if not runner.stream.in_time(self.now_s()):
            self.late += 1
            return False
        for output in self.outputs.values():
            self.trajectories += output.send_trajectory(trajectory)
        return True

    def _follow_to_rest(self, runner: PolicyRunner, braking: Braking) -> None:
        stream, outputs = runner.stream, list(self.outputs.values())
        began_s = time.monotonic()
        duration_s = max(0.0, braking.rest_s - braking.start_s)
        step = 0
        while (elapsed_s := time.monotonic() - began_s) < duration_s:
            at_s = braking.start_s + elapsed_s
            for output in outputs:
                self.trajectories += output.send_command(stream, at_s)
            repeated = step and duration_s - elapsed_s > REPEAT_BEFORE_REST_S
            if repeated and braking.trajectory is not None:
                self._send_trajectory(runner, stream.brake(at_s))
            with self._changed:
                for order in self._orders:
                    order.begun.set()  # a thread in `stop` waits; the arms brake already
            step += 1
            left_s = began_s + step * self._period_s - time.monotonic()
            time.sleep(max(0.0, min(left_s, duration_s - elapsed_s)))
        for output in outputs:
            # velocities end at 0, not at what rounding leaves
            self.trajectories += output.send_rest() or output.send_command(stream, braking.rest_s)

    def _give_up(self, runner: PolicyRunner, fault: Fault) -> Braking | None:
        """End the motion for a fault; the transition thread makes the lifecycle transition."""
        self.fault = fault
        self.fault_condition.trigger()
        return self._guarded(runner, _deactivate)


def _deactivate(runner: PolicyRunner, now_s: float) -> Braking | None:
    return runner.deactivate(now_s)
