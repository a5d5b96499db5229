"""The one thread that owns the device, and who watches it."""

from pi05_ros.executor.device_errors import ErrorKind
from pi05_ros.executor.inference import (
    LATENCY_HISTORY,
    MAX_RESULTS,
    InferenceExecutor,
    black_observation,
)
from pi05_ros.executor.results import (
    ExecutorError,
    ExecutorState,
    ExecutorStatistics,
    InferenceResult,
    check_chunk,
)
from pi05_ros.executor.watchdog import Fault, Watchdog

__all__ = [
    "LATENCY_HISTORY",
    "MAX_RESULTS",
    "ErrorKind",
    "ExecutorError",
    "ExecutorState",
    "ExecutorStatistics",
    "Fault",
    "InferenceExecutor",
    "InferenceResult",
    "Watchdog",
    "black_observation",
    "check_chunk",
]
