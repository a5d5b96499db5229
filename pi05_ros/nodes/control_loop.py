"""The control thread: punctual ticks beside everything else that the node's executor does.

Pictures, services, status messages and the middleware's bookkeeping share rclpy's thread; a tick
that had to wait for them would be late by as much as the longest of them takes.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

from rclpy.node import Node

ATTEND_LEFT_S = 0.002
"""Nothing is attended to so shortly before a tick."""


class ControlLoop:
    """Calls `tick` once per period, and `attend` in between when there is something to attend to.

    On a clock that can stand or jump (use_sim_time) a timer of the node calls `tick`, and nothing
    is attended to in between.
    """

    def __init__(
        self,
        node: Node,
        period_s: float,
        tick: Callable[[], None],
        attend: Callable[[], None],
        realtime_priority: int = 0,
    ) -> None:
        """Nothing is called before `start`. `tick` and `attend` must not raise.

        With a `realtime_priority` the thread asks for SCHED_FIFO, as ros2_control's does, and does
        without where it is not granted.
        """
        self._priority = realtime_priority
        self._node = node
        self._period_s = period_s
        self._tick, self._attend = tick, attend
        self._changed = threading.Condition()
        self._running = self._notified = False
        self._thread: threading.Thread | None = None
        self._timer = None
        if node.get_parameter("use_sim_time").value:
            self._timer = node.create_timer(period_s, tick)
            self._timer.cancel()

    def start(self) -> None:
        """Call from now on; the first tick comes at once."""
        self.stop()
        if self._timer is not None:
            self._timer.reset()
            return
        self._running, self._notified = True, False
        self._thread = threading.Thread(target=self._run, name="pi05_control", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """No call is under way or follows. Called by `tick` or `attend`, the rest of it follows.

        The caller must hold no lock that these two wait for.
        """
        if self._timer is not None:
            self._timer.cancel()
        with self._changed:
            self._running = False
            self._changed.notify()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()
            self._thread = None

    def notify(self) -> None:
        """There is something to attend to; from any thread."""
        with self._changed:
            self._notified = True
            self._changed.notify()

    def destroy(self) -> None:
        self.stop()
        if self._timer is not None:
            self._node.destroy_timer(self._timer)

    def _run(self) -> None:
        self._ask_for_priority()
        due_s = time.monotonic()
        while self._wait_until(due_s):
            left_s = due_s - time.monotonic()
            if left_s > 0:
                # the tick that is about to come does it all and should not be late
                if left_s > ATTEND_LEFT_S:
                    self._attend()
                continue
            self._tick()
            due_s += self._period_s
            behind = int((time.monotonic() - due_s) / self._period_s)
            # what was missed is not made up for: a burst of ticks would help nobody
            due_s += max(0, behind) * self._period_s

    def _ask_for_priority(self) -> None:
        if self._priority == 0 or not hasattr(os, "sched_setscheduler"):
            return
        try:
            os.sched_setscheduler(
                threading.get_native_id(), os.SCHED_FIFO, os.sched_param(self._priority)
            )
        except OSError as error:
            self._node.get_logger().info(
                f"the control thread has no real-time priority ({error.strerror}): ticks may be "
                "some ms late on a busy machine; docs/benchmarks.md says how to grant it",
                once=True,
            )

    def _wait_until(self, due_s: float) -> bool:
        """Until then or a notification; False when it is time to end."""
        with self._changed:
            while self._running and not self._notified:
                left_s = due_s - time.monotonic()
                if left_s <= 0:
                    break
                self._changed.wait(left_s)
            self._notified = False
            return self._running
