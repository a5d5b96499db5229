"""A node's life in a process of its own."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import rclpy
from rclpy.executors import ExternalShutdownException

from pi05_ros.config import ParameterError


class Closable(Protocol):
    """An rclpy node that ends what it has started."""

    def close(self) -> None: ...

    def destroy_node(self) -> None: ...


def spin_until_interrupted(
    make: Callable[[], Any], name: str, args: Sequence[str] | None = None
) -> int:
    """Make the node and spin it; the process's exit code.

    Args:
        make: the node, a `Closable`.
        name: what errors are headed with.
        args: of rclpy; those of the process by default.
    """
    rclpy.init(args=args)
    node: Closable | None = None
    try:
        node = make()
        rclpy.spin(node)
    except (KeyboardInterrupt, ExternalShutdownException):
        pass
    except ParameterError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except Exception:
        # Ctrl-C takes the middleware away from under a callback
        if rclpy.ok():
            raise
    finally:
        if node is not None:
            node.close()
            node.destroy_node()
        rclpy.try_shutdown()
    return 0
