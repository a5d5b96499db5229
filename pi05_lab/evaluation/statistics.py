"""Confidence intervals of repeated trials, and measures of how smooth a motion is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

from pi05_ros.types import FloatArray

MIN_EPISODES = 5
"""With fewer, the bootstrap's interval is much too narrow."""
_Z_95 = NormalDist().inv_cdf(0.975)


def wilson_interval(successes: int, trials: int) -> tuple[float, float] | None:
    """The 95 % score interval of a proportion (Wilson, JASA 22, 1927), without correction.

    Returns:
        Low and high end, 0 … 1; None without trials.

    Raises:
        ValueError: more successes than trials, or less than none.
    """
    if not 0 <= successes <= trials:
        raise ValueError(f"{successes} successes of {trials} trials cannot be")
    if trials == 0:
        return None
    share = successes / trials
    weight = 1 + _Z_95 * _Z_95 / trials
    centre = (share + _Z_95 * _Z_95 / (2 * trials)) / weight
    half = _Z_95 / weight * math.sqrt(share * (1 - share) / trials + (_Z_95 / (2 * trials)) ** 2)
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == trials else min(1.0, centre + half)
    return low, high


def t_quantile(freedom: int) -> float:
    """Student's t of a two-sided 95 % interval for `freedom` + 1 values.

    Abramowitz and Stegun 26.7.5, within 0.003 from three degrees of freedom on; exact below.

    Raises:
        ValueError: no degree of freedom.
    """
    if freedom < 1:
        raise ValueError(f"an interval needs at least 2 values, got {freedom + 1}")
    if freedom == 1:
        return math.tan(math.pi * 0.95 / 2)
    if freedom == 2:
        return 0.95 * math.sqrt(2 / (1 - 0.95**2))
    z = _Z_95
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return sum(term / freedom**k for k, term in enumerate(terms))


def bootstrap_interval(
    numerators: Sequence[float],
    denominators: Sequence[float],
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float] | None:
    """The percentile bootstrap interval (Efron 1979) of a ratio of sums over episodes.

    Whole episodes are drawn with replacement, because values within one are not independent.

    Args:
        numerators: one per episode.
        denominators: one per episode, the weight of a mean or the other side of a comparison.
        confidence: two-sided, between 0 and 1.
        resamples: number of draws of as many episodes.
        seed: of the draws.

    Returns:
        Low and high end; None for fewer than `MIN_EPISODES` episodes.

    Raises:
        ValueError: different numbers of values, or the confidence is out of range.
    """
    if len(numerators) != len(denominators):
        raise ValueError(f"{len(numerators)} numerators and {len(denominators)} denominators")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}")
    count = len(numerators)
    if count < MIN_EPISODES:
        return None
    above, below = np.asarray(numerators, dtype=float), np.asarray(denominators, dtype=float)
    drawn = np.random.default_rng(seed).integers(count, size=(resamples, count))
    sums = below[drawn].sum(axis=1)
    ratios = above[drawn].sum(axis=1)[sums != 0] / sums[sums != 0]
    if not len(ratios):
        return None
    tail = 50 * (1 - confidence)
    low, high = np.percentile(ratios, (tail, 100 - tail))
    return float(low), float(high)


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
