"""A node's life in a process of its own: spinning, signals, exit codes."""

from __future__ import annotations

import os
import queue
import signal
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any, Protocol

import rclpy
from rclpy.exceptions import InvalidHandle
from rclpy.executors import (
    ExternalShutdownException,
    SingleThreadedExecutor,
    TimeoutException,
)
from rclpy.executors import ShutdownException as ExecutorShutdown
from rclpy.signals import SignalHandlerOptions

from pi05_ros.config import ParameterError

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
OURS = "pi05_"
"""The names of threads that work for the policy node begin so."""
IDLE = "transitions"
GRACE_S = 3.0
"""How long the main thread may take to end the process once the arms are at rest."""


class Closable(Protocol):
    """An rclpy node that ends what it has started.

    It may also have `brake()`, called on the signal's thread before anything is shut down,
    `is_transition(entity)` (see `TransitionExecutor`), and `exit_code`, an int once the process
    must end.
    """

    def close(self) -> None: ...

    def destroy_node(self) -> None: ...


class TransitionExecutor(SingleThreadedExecutor):
    """rclpy's single-threaded executor, with long callbacks on one thread beside it.

    Loading a policy takes seconds to minutes; stop, status and parameters are served meanwhile.
    """

    def __init__(self, is_transition: Callable[[Any], bool]) -> None:
        """`is_transition`: whether an entity's callback runs on the other thread."""
        super().__init__()
        self._is_transition = is_transition
        self._handlers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._failure: BaseException | None = None
        self._unfinished = 0
        self._counted = threading.Lock()
        self._thread = threading.Thread(target=self._run, name=IDLE, daemon=True)
        self._thread.start()

    @property
    def in_transition(self) -> bool:
        """Whether a transition runs or waits; read on the spinning thread."""
        return self._unfinished > 0

    def spin_once(self, timeout_sec: float | None = None) -> None:
        """Run one callback. An exception of a callback is raised, of a transition at the next call.

        Raises:
            ExternalShutdownException: rclpy was shut down.
        """
        try:
            handler, entity, _ = self.wait_for_ready_callbacks(timeout_sec=timeout_sec)
        except (ExecutorShutdown, TimeoutException):
            return
        except InvalidHandle:
            # a transition destroys an entity while its events are collected: rclpy skips such an
            # event in its first pass and uses it in the second (Executor._wait_for_ready_callbacks)
            return
        if self._is_transition(entity):
            with self._counted:
                self._unfinished += 1
            self._handlers.put(handler)
        else:
            handler()
            handler.result()
        if self._failure is not None:
            raise self._failure

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
            with self._counted:
                self._unfinished -= 1
            self.wake()


class Signals:
    """Calls a function on a thread of its own at SIGINT, SIGTERM or SIGHUP.

    rclpy's own handler shuts the middleware down before the arms can brake, and Python's run only
    when the main thread returns from C code. A byte through a socket wakes this thread at once.
    """

    def __init__(self, on_signal: Callable[[int], None]) -> None:
        """Install the handlers; only the main thread may."""
        self._on_signal = on_signal
        self._ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        self._theirs = theirs
        self._wakeup_fd = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
        self._before = {number: signal.signal(number, _ignore) for number in SIGNALS}
        self._thread = threading.Thread(target=self._run, name="signals", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Restore the handlers from before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_fd)
        self._theirs.close()
        self._thread.join()
        self._ours.close()

    def _run(self) -> None:
        while data := self._ours.recv(1):
            if data[0] in SIGNALS:
                self._on_signal(data[0])


def _ignore(number: int, frame: FrameType | None) -> None:
    """Do nothing in the main thread: `Signals` has the byte."""


class _Ending:
    """What a signal sets going: braking, the end of spinning, and an end by force."""

    def __init__(self) -> None:
        self.requested = False
        self.node: Closable | None = None
        self.executor: TransitionExecutor | None = None
        self._force: threading.Timer | None = None

    def on_signal(self, number: int) -> None:
        if self.requested:
            return
        brake = getattr(self.node, "brake", None)
        try:
            if brake is not None:
                brake()
        finally:
            self._force = threading.Timer(GRACE_S, leave, (128 + number,))
            self._force.daemon = True
            self._force.start()
            self.requested = True
            if self.executor is not None:
                self.executor.wake()

    def ended(self) -> None:
        """The main thread got there."""
        if self._force is not None:
            self._force.cancel()


def spin_until_interrupted(
    make: Callable[[], Any], name: str, args: Sequence[str] | None = None
) -> int:
    """Make the node and spin it until a signal or its `exit_code`; the process's exit code.

    Args:
        make: the node, a `Closable`.
        name: what errors are headed with.
        args: of rclpy; those of the process by default.
    """
    ending = _Ending()
    rclpy.init(args=args, signal_handler_options=SignalHandlerOptions.NO)
    signals = Signals(ending.on_signal)
    node: Any = None
    executor: TransitionExecutor | None = None
    try:
        node = ending.node = make()
        is_transition = getattr(node, "is_transition", lambda entity: False)
        executor = ending.executor = TransitionExecutor(is_transition)
        executor.add_node(node)
        while rclpy.ok() and not ending.requested and getattr(node, "exit_code", None) is None:
            executor.spin_once()
    except ExternalShutdownException:
        pass
    except ParameterError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except Exception:
        # rclpy was shut down under a callback
        if rclpy.ok():
            raise
    finally:
        # a transition that loads a policy is left to the end of the process
        if node is not None and not (executor is not None and executor.in_transition):
            node.close()
            node.destroy_node()
        rclpy.try_shutdown()
        ending.ended()
        signals.close()
    return int(getattr(node, "exit_code", None) or 0)


def leave(code: int) -> None:
    """End the process at once, without the interpreter's own end."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def leave_if_busy(code: int) -> int:
    """`code`; ends the process with it if an inference or a transition has not come back.

    The interpreter's own end would take the libraries away from under their threads, and the
    process would abort: "terminate called without an active exception".
    """
    if any(thread.name.startswith(OURS) for thread in threading.enumerate()):
        leave(code)
    return code
