"""How smooth a motion is."""

from __future__ import annotations

import math

import numpy as np

from pi05_ros.types import FloatArray


def largest_step(positions: FloatArray) -> float:
    """The largest distance between two samples [n, dims]."""
    return float(np.linalg.norm(np.diff(positions, axis=0), axis=1).max(initial=0.0))


def largest_acceleration(positions: FloatArray, dt_s: float) -> float:
    """The largest second difference of [n, dims], per second squared."""
    return float(np.linalg.norm(np.diff(positions, 2, axis=0), axis=1).max(initial=0.0)) / dt_s**2


def rms_jerk(positions: FloatArray, dt_s: float) -> float:
    """Root mean square of the third difference of [n, dims], per second cubed."""
    jerk = np.diff(positions, 3, axis=0) / dt_s**3
    return float(np.sqrt((jerk**2).sum(axis=1).mean())) if len(jerk) else 0.0


def log_dimensionless_jerk(positions: FloatArray, dt_s: float) -> float:
    """LDLJ of a motion [n, dims] (Balasubramanian et al., JNER 2015): nearer to 0 is smoother.

    -ln of the integrated squared jerk times duration³ / peak speed²; nan for no motion.
    """
    speed = np.linalg.norm(np.diff(positions, axis=0), axis=1) / dt_s
    jerk = np.diff(positions, 3, axis=0) / dt_s**3
    peak = float(speed.max(initial=0.0))
    duration_s = len(speed) * dt_s
    energy = float((jerk**2).sum()) * dt_s
    if peak <= 0 or energy <= 0:
        return math.nan
    return -math.log(energy * duration_s**3 / peak**2)


def spectral_arc_length(
    positions: FloatArray, dt_s: float, cutoff_hz: float = 10.0, threshold: float = 0.05
) -> float:
    """SPARC of a motion [n, dims] (Balasubramanian et al., JNER 2015): nearer to 0 is smoother.

    Minus the length of the speed's normalised amplitude spectrum up to the last frequency, below
    `cutoff_hz`, whose amplitude reaches the threshold; nan for no motion.
    """
    speed = np.linalg.norm(np.diff(positions, axis=0), axis=1) / dt_s
    if not speed.any():
        return math.nan
    count = 2 ** (math.ceil(math.log2(len(speed))) + 4)
    spectrum = np.abs(np.fft.rfft(speed, count))
    spectrum /= spectrum[0]
    frequencies_hz = np.fft.rfftfreq(count, dt_s)
    kept = (frequencies_hz <= cutoff_hz) & (spectrum >= threshold)
    last = int(np.flatnonzero(kept)[-1])
    if last == 0:
        return 0.0
    steps = np.diff(frequencies_hz[: last + 1]) / frequencies_hz[last]
    return -float(np.hypot(steps, np.diff(spectrum[: last + 1])).sum())
