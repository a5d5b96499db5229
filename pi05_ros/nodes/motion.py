"""What the control thread does: ticks of the runner become commands of the controllers."""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable, Sequence

from rclpy.node import Node

from pi05_ros.control.trajectory import TrajectoryPoints
from pi05_ros.executor import ExecutorState, Fault
from pi05_ros.msg import ActionChunk
from pi05_ros.nodes.control_loop import ControlLoop
from pi05_ros.nodes.messages import chunk_message
from pi05_ros.nodes.outputs import Output
from pi05_ros.nodes.tick_times import TickTimes
from pi05_ros.runner import PolicyRunner, Tick


class Motion:
    """Runs a `PolicyRunner` on a control thread.

    Whoever else changes the runner holds `lock` meanwhile; `start` and `end` must be called
    without it.
    """

    def __init__(self, node: Node, on_fault: Callable[[], None]) -> None:
        """`on_fault` is called on the node's own thread when `fault` has come to be."""
        self.lock = threading.RLock()
        self.runner: PolicyRunner | None = None
        self.outputs: dict[str, Output] = {}
        self.tick_times = TickTimes()
        self.trajectories = 0
        """Messages that went out to all controllers together."""
        self.last_failure = ""
        self.fault: Fault | None = None
        """Why the motion must end; nothing is commanded from then on."""
        self._node = node
        self._dry_run = False
        self._names: Sequence[str] = ()
        self._loop: ControlLoop | None = None
        self._faulted = node.create_guard_condition(on_fault)

    def set_up(
        self,
        runner: PolicyRunner,
        names: Sequence[str],
        *,
        dry_run: bool,
        realtime_priority: int,
    ) -> None:
        """Get ready to move the joints `names` by `outputs`."""
        self.runner, self._names, self._dry_run = runner, names, dry_run
        self._chunks = self._node.create_publisher(ActionChunk, "~/action_chunk", 10)
        self._loop = ControlLoop(
            self._node, runner.stream.dt_s, self._tick, self._attend, realtime_priority
        )

    def tear_down(self) -> None:
        """Undo `set_up`, but for `runner`, which others still ask; the motion must have ended."""
        if self._loop is not None:
            self._loop.destroy()
            self._node.destroy_publisher(self._chunks)
        self._loop = None

    def start(self) -> None:
        """Tick from now on."""
        assert self.runner is not None and self._loop is not None
        self.fault, self.last_failure = None, ""
        with self.lock:
            self.runner.activate()
        self.tick_times.pause()
        self._loop.start()

    def end(self) -> None:
        """No tick is under way or follows; the arms brake."""
        assert self.runner is not None and self._loop is not None
        self._loop.stop()
        with self.lock:
            self.brake(self.runner.deactivate(self.now_s()))

    def brake(self, hold: TrajectoryPoints | None) -> None:
        """Send a last trajectory; blocks until it is out."""
        if hold is None or self.runner is None or self._dry_run:
            return
        now_s = self.now_s()
        for output in self.outputs.values():
            self.trajectories += output.brake(hold, self.runner.stream, now_s)

    def frame_arrived(self) -> None:
        """A picture is there: if nothing is being inferred, it may be what was waited for."""
        runner = self.runner
        if runner is not None and runner.executor.state is ExecutorState.READY:
            self.something_arrived()

    def something_arrived(self) -> None:
        """There is something that need not wait for the next tick; from any thread."""
        loop = self._loop
        if loop is not None:
            loop.notify()

    def deaf_controllers(self) -> list[str]:
        """Topics of controllers that nobody runs."""
        if self._dry_run:
            return []
        return [output.topic for output in self.outputs.values() if output.deaf]

    def now_s(self) -> float:
        return float(self._node.get_clock().now().nanoseconds * 1e-9)

    def _tick(self) -> None:
        assert self.runner is not None
        self.tick_times.mark(self.runner.stream.dt_s)
        self._advance(in_between=False)

    def _attend(self) -> None:
        self._advance(in_between=True)

    def _advance(self, in_between: bool) -> None:
        with self.lock:
            if self.fault is not None or self.runner is None:
                return
            try:
                self._move(self.runner, in_between)
            except Exception as error:
                if not self._node.context.ok():
                    return  # Ctrl-C: the last trajectory's tail brakes
                # a thread that died would leave the arms to their last trajectory, unnoticed
                self._node.get_logger().error(traceback.format_exc())
                self._give_up(Fault(f"the control thread failed: {error}", device=False))

    def _move(self, runner: PolicyRunner, in_between: bool) -> None:
        if self.deaf_controllers():
            runner.halt()
            return
        if in_between and runner.executor.has_results:
            time.sleep(runner.stream.settled_in_s(self.now_s()))
        now_s = self.now_s()
        tick = runner.attend(now_s) if in_between else runner.tick(now_s, ask=False)
        self._report(tick)
        if tick.fault is not None:
            self._give_up(tick.fault)
            return
        if not self._dry_run and not runner.stopped:
            for output in self.outputs.values():
                if output.in_between or not in_between:
                    self.trajectories += output.send(tick.trajectory, runner.stream, now_s)
            runner.published(tick)
        runner.ask(now_s)
        for chunk, latency_s in tick.chunks:
            self._chunks.publish(chunk_message(chunk, self._names, latency_s))

    def _report(self, tick: Tick) -> None:
        logger = self._node.get_logger()
        if tick.chunks:
            self.last_failure = ""
        for failure in tick.failures:
            self.last_failure = failure
            logger.warning(f"inference: {failure}", throttle_duration_sec=1.0)
        for notice in tick.notices:
            logger.warning(notice)

    def _give_up(self, fault: Fault) -> None:
        """Command nothing more, and leave the transition to the node's thread."""
        self.fault = fault
        self._faulted.trigger()
