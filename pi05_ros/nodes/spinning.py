"""The life of a node's process: spinning, signals, exit codes."""

from __future__ import annotations

import os
import queue
import signal
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

import rclpy
from rclpy.exceptions import InvalidHandle
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor, TimeoutException
from rclpy.executors import ShutdownException as ExecutorShutdown
from rclpy.signals import SignalHandlerOptions

from pi05_ros.config import ParameterError

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
OURS = "pi05_"
"""Beginning of the names of threads that work for the policy node."""
IDLE = "transitions"
GRACE_S = 3.0
"""How long the main thread may take to end the process once the arms are at rest."""


class TransitionExecutor(SingleThreadedExecutor):
    """rclpy's single-threaded executor with a second thread for long callbacks.

    Loading a policy takes seconds to minutes; stop, status and parameters are served meanwhile.
    """

    def __init__(self, is_transition: Callable[[Any], bool]) -> None:
        """`is_transition`: whether an entity's callback runs on the second thread."""
        super().__init__()
        self._is_transition = is_transition
        self._handlers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.transitions: set[Any] = set()
        """Handlers that run or wait on the second thread."""
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=IDLE, daemon=True)
        self._thread.start()

    def spin_once(self, timeout_sec: float | None = None) -> None:
        """Run one callback. Raises what it raises, and at the next call what a transition raised.

        Raises:
            ExternalShutdownException: rclpy was shut down.
        """
        try:
            handler, entity, _ = self.wait_for_ready_callbacks(timeout_sec=timeout_sec)
        except (ExecutorShutdown, TimeoutException):
            return
        except InvalidHandle:
            # a transition destroys an entity while its events are collected: rclpy skips the event
            # in its first pass and uses it in the second (Executor._wait_for_ready_callbacks)
            return
        if self._is_transition(entity):
            # rclpy returns a handler that waits at every call
            if handler not in self.transitions:
                self.transitions.add(handler)
                self._handlers.put(handler)
        else:
            handler()
            handler.result()
        if self._failure is not None:
            raise self._failure

    def _take_waitable(self, waitable: Any) -> Any:
        try:
            return super()._take_waitable(waitable)
        except InvalidHandle:
            # A transition has destroyed it. If this raised, rclpy would leave the callback group
            # of the waitable blocked for ever.
            return None

    def _run(self) -> None:
        while True:
            handler = self._handlers.get()
            self._thread.name = f"{OURS}transition"
            try:
                handler()
                handler.result()
            except BaseException as error:
                self._failure = error
            self._thread.name = IDLE
            self.transitions.discard(handler)
            self.wake()


class SignalThread:
    """Calls a function on its own thread at SIGINT, SIGTERM or SIGHUP.

    rclpy's handler shuts the middleware down before the arms can brake, and Python's run only when
    the main thread returns from C code. A byte through a socket wakes this thread at once.
    """

    def __init__(self, on_signal: Callable[[int], None]) -> None:
        """Install the handlers; only the main thread may."""
        self._on_signal = on_signal
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._wakeup_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        # the handlers do nothing: the byte in the socket is enough
        self._before = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
        self._thread = threading.Thread(target=self._run, name="signals", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Restore the handlers from before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_fd)
        self._writer.close()
        self._thread.join()
        self._reader.close()

    def _run(self) -> None:
        while data := self._reader.recv(1):
            if data[0] in SIGNALS:
                self._on_signal(data[0])


class _Process:
    """What a signal ends: it brakes the node, stops spinning, and leaves if that takes too long."""

    def __init__(self) -> None:
        self.interrupted = False
        self.node: Any = None
        self.executor: TransitionExecutor | None = None
        self.force: threading.Timer | None = None

    def on_signal(self, number: int) -> None:
        """Called on the signal thread; the main thread may be inside a callback."""
        if self.interrupted:
            return
        try:
            if hasattr(self.node, "brake"):
                self.node.brake()
        finally:
            self.force = threading.Timer(GRACE_S, leave, (128 + number,))
            self.force.daemon = True
            self.force.start()
            self.interrupted = True
            if self.executor is not None:
                self.executor.wake()

    def spin(self) -> None:
        is_transition = getattr(self.node, "is_transition", lambda entity: False)
        self.executor = TransitionExecutor(is_transition)
        self.executor.add_node(self.node)
        while rclpy.ok() and not self.interrupted:
            self.executor.spin_once()
            if getattr(self.node, "exit_code", None) is not None:
                break

    def end(self) -> None:
        # a transition that loads a policy is left to the end of the process
        in_transition = self.executor is not None and self.executor.transitions
        if self.node is not None and not in_transition:
            self.node.close()
            self.node.destroy_node()
        rclpy.try_shutdown()
        if self.force is not None:
            self.force.cancel()


def spin_until_interrupted(
    make: Callable[[], Any], name: str, args: Sequence[str] | None = None
) -> int:
    """Make the node and spin it until a signal or its `exit_code`; the process's exit code.

    Args:
        make: makes an rclpy node with `close()`, which ends what the node has started. It may have
            `brake()`, called on the signal thread before anything is shut down,
            `is_transition(entity)` (see `TransitionExecutor`), and `exit_code`, an int once the
            process must end.
        name: prefix of error messages.
        args: of rclpy; those of the process by default.
    """
    process = _Process()
    rclpy.init(args=args, signal_handler_options=SignalHandlerOptions.NO)
    signals = SignalThread(process.on_signal)
    try:
        process.node = make()
        process.spin()
    except ExternalShutdownException:
        pass
    except ParameterError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except Exception:
        # rclpy was shut down while a callback ran
        if rclpy.ok():
            raise
    finally:
        process.end()
        signals.close()
    return getattr(process.node, "exit_code", None) or 0


def leave(code: int) -> None:
    """End the process at once, without the interpreter's finalization."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def leave_if_busy(code: int) -> int:
    """`code`; ends the process with it if an inference or a transition still runs.

    The interpreter's finalization would unload libraries that their threads use, and the process
    would abort: "terminate called without an active exception".
    """
    if any(thread.name.startswith(OURS) for thread in threading.enumerate()):
        leave(code)
    return code
