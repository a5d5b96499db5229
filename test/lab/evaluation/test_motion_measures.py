"""Faults pinned: measures that depend on the sampling, or rank a rough motion as smooth."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pi05_lab.evaluation import statistics as measures
from pi05_ros.types import FloatArray


def minimum_jerk(dt_s: float, duration_s: float = 2.0) -> FloatArray:
    s = np.arange(0, duration_s + dt_s / 2, dt_s) / duration_s
    x = 10 * s**3 - 15 * s**4 + 6 * s**5
    return np.stack((x, 0.5 * x), axis=1)


def test_known_values_of_a_minimum_jerk_motion() -> None:
    """Its LDLJ is -ln(204.8): 720/D⁵ of squared jerk, times D³, over the peak of 1.875/D."""
    motion = minimum_jerk(0.001)
    assert measures.log_dimensionless_jerk(motion, 0.001) == pytest.approx(
        -math.log(204.8), abs=0.02
    )
    assert measures.spectral_arc_length(motion, 0.001) == pytest.approx(-1.41, abs=0.1)
    peak = 5.7735 / 4.0 * math.hypot(1, 0.5)
    assert measures.largest_acceleration(motion, 0.001) == pytest.approx(peak, rel=0.01)


def test_rougher_is_worse_in_every_measure() -> None:
    smooth = minimum_jerk(0.02)
    rough = smooth + 0.01 * np.random.default_rng(0).normal(size=smooth.shape)
    for measure in (measures.largest_acceleration, measures.rms_jerk):
        assert measure(rough, 0.02) > 2 * measure(smooth, 0.02)
    for measure in (measures.log_dimensionless_jerk, measures.spectral_arc_length):
        assert measure(rough, 0.02) < measure(smooth, 0.02)
    assert measures.largest_step(rough) > measures.largest_step(smooth)


def test_a_robot_that_stands_has_no_smoothness() -> None:
    still = np.zeros((50, 2))
    assert math.isnan(measures.log_dimensionless_jerk(still, 0.02))
    assert math.isnan(measures.spectral_arc_length(still, 0.02))
    assert measures.rms_jerk(still, 0.02) == measures.largest_step(still) == 0.0
