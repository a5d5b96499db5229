"""What an inference can come to, and what the executor says of itself."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import numpy as np

from pi05_ros.executor.device_errors import ErrorKind
from pi05_ros.types import ActionChunk, Observation, Policy


class ExecutorError(RuntimeError):
    """The policy cannot be run; one line says why."""


class ExecutorState(Enum):
    """What the thread does."""

    STARTING = "starting"
    """Loading and warming up."""
    READY = "ready"
    BUSY = "busy"
    FAILED = "failed"
    """Loading, warming up or the thread itself raised; there is no thread any more."""
    STOPPED = "stopped"
    """Not started, or ended by `stop`."""


@dataclass(frozen=True)
class InferenceResult:
    """What became of one request: a checked chunk, or an error."""

    chunk: ActionChunk | None
    error: str | None
    """One line, if there is no chunk."""
    stamp_s: float | None
    """Of the observation, on its clock; None if there was none."""
    started_s: float
    """By time.monotonic, as `finished_s`."""
    finished_s: float
    decode_s: float
    """Time for the observation."""
    infer_s: float
    """Time for the chunk, its check included."""
    kind: ErrorKind = ErrorKind.POLICY
    """Of the error."""


@dataclass(frozen=True)
class ExecutorStatistics:
    """Counts of requests since the start, the warm-up left out."""

    completed: int
    failed: int
    replaced: int
    """Gave way to a newer request before they began."""
    discarded: int
    """Thrown away by `discard`, or not collected in time."""
    latencies_s: tuple[float, ...]
    """Decoding and inference of the last completed requests, oldest first."""
    out_of_memory: int = 0
    """Inferences that ran out of memory; each was repeated once."""


def check_chunk(chunk: ActionChunk, policy: Policy, observation: Observation) -> None:
    """Refuse a chunk that must not reach a robot.

    Raises:
        ValueError: If the actions are not finite float64 [horizon, action_dim], `dt_s` is not a
            time, or the stamp is not the observation's, which would shift all steps in time.
    """
    actions = chunk.actions
    expected = (policy.horizon, policy.action_dim)
    if not isinstance(actions, np.ndarray) or actions.dtype != np.float64:
        kind = getattr(actions, "dtype", type(actions).__name__)
        raise ValueError(f"actions are {kind}, must be a NumPy array of float64")
    if actions.shape != expected:
        raise ValueError(
            f"actions are {list(actions.shape)}, the policy's horizon and action_dim promise "
            f"{list(expected)}"
        )
    finite = np.isfinite(actions)
    if not finite.all():
        step, dimension = (int(i) for i in np.argwhere(~finite)[0])
        raise ValueError(
            f"{int((~finite).sum())} of {actions.size} actions are not finite, first "
            f"{actions[step, dimension]} at step {step}, dimension {dimension}"
        )
    if not (np.isfinite(chunk.dt_s) and chunk.dt_s > 0):
        raise ValueError(f"dt_s is {chunk.dt_s}, must be above 0")
    if chunk.stamp_s != observation.stamp_s:
        raise ValueError(
            f"the chunk's stamp {chunk.stamp_s} is not the observation's {observation.stamp_s}"
        )


def one_line(error: BaseException) -> str:
    """Type and text of an error, for a log."""
    return " ".join(f"{type(error).__name__}: {error}".split())
