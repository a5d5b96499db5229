"""A flow policy in closed form, without a network: two modes around an obstacle.

The chunk is a mixture of two Gaussians, so the velocity field that flow matching would learn is
known exactly, and so is its Jacobian. The policy has no learning error: all roughness of the motion
is due to the scheduler, the delay or the modes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pi05_ros.policy.guidance import Guidance, guidance_gain
from pi05_ros.types import ActionChunk, ActionPrefix, FloatArray, Observation

DT_S = 0.02
HORIZON = 50
SPEED_M_S = 0.5
GOAL = np.array([1.4, 0.0])
OTHER_GOAL = np.array([0.4, 0.7])
OBSTACLE = np.array([0.7, 0.0])
OBSTACLE_RADIUS_M = 0.12
DETOUR_M = 0.25
"""Distance of both modes from the obstacle's centre."""
SPREAD_M = 0.01
"""Standard deviation within a mode, late in the chunk; smooth over `CORRELATION_S`."""
DETOUR_WIDTH_M = 0.25
CORRELATION_S = 0.25
SCALE_M = 0.25
"""One unit of the policy's normalised space."""


def _basis() -> tuple[FloatArray, FloatArray]:
    """Eigenvectors [H, H] and standard deviations [H] of a chunk's variation, normalised."""
    times_s = DT_S * np.arange(HORIZON)
    kernel = np.exp(-0.5 * ((times_s[:, None] - times_s) / CORRELATION_S) ** 2)
    # A plan begins at the robot's position.
    growth = SPREAD_M / SCALE_M * (1.0 - np.exp(-times_s / 0.2))
    covariance = growth[:, None] * kernel * growth + 1e-6 * np.eye(HORIZON)
    variances, vectors = np.linalg.eigh(covariance)
    return vectors, np.sqrt(variances)


VECTORS, DEVIATIONS = _basis()


def _line(start: FloatArray, goal: FloatArray) -> FloatArray:
    """Straight to the goal, slower at the end: positions [H, 2]."""
    offset = goal - start
    left_m = float(np.linalg.norm(offset))
    slow_m = min(0.1, left_m)
    times_s = DT_S * np.arange(HORIZON)
    cruise_s = (left_m - slow_m) / SPEED_M_S
    slowing = slow_m * np.exp(-SPEED_M_S / 0.1 * np.maximum(times_s - cruise_s, 0.0))
    rest_m = np.where(times_s < cruise_s, left_m - SPEED_M_S * times_s, slowing)
    return np.asarray(goal - offset * (rest_m / max(left_m, 1e-9))[:, None])


def plans(position: FloatArray, instruction: str) -> tuple[FloatArray, FloatArray]:
    """Mean trajectories [modes, H, 2] in m, and the modes' shares [modes].

    Around the obstacle each mode is a bump over x; the robot's side is the likelier one. The
    instruction "other" has one mode.
    """
    if instruction == "other":
        return _line(position, OTHER_GOAL)[None], np.ones(1)
    x = _line(np.array([position[0], 0.0]), GOAL)[:, 0]
    bump = np.exp(-0.5 * ((x - OBSTACLE[0]) / DETOUR_WIDTH_M) ** 2)
    here = np.exp(-0.5 * ((position[0] - OBSTACLE[0]) / DETOUR_WIDTH_M) ** 2)
    fade = np.exp(-np.arange(HORIZON) * DT_S / 0.3)
    trajectories = []
    for side in (1.0, -1.0):
        y = side * DETOUR_M * bump
        trajectories.append(
            np.stack((x, y + (position[1] - side * DETOUR_M * here) * fade), axis=1)
        )
    left = 1.0 / (1.0 + np.exp(-np.clip(position[1] / 0.015, -30, 30)))
    return np.stack(trajectories), np.array([left, 1.0 - left])


@dataclass
class TwoModePolicy:
    """Samples chunks of the mixture by the flow, ten Euler steps, as π0.5 does."""

    guidance: Guidance
    rng: np.random.Generator
    num_steps: int = 10

    def infer(self, observation: Observation, prefix: ActionPrefix | None = None) -> ActionChunk:
        """A chunk [H, 2] in m from an observed position [2], continuing `prefix` if given."""
        means, shares = plans(observation.state, observation.instruction)
        flow = _Flow((VECTORS.T @ means) / SCALE_M, np.log(np.maximum(shares, 1e-300)))
        x = self.rng.normal(size=(HORIZON, 2))
        dt = -1.0 / self.num_steps
        for step in range(self.num_steps):
            time = 1.0 + step * dt
            estimate, pull_back = flow.estimate(x, time)
            velocity = (x - estimate) / time
            if prefix is not None:
                correction = self._correction(prefix, estimate)
                if self.guidance.method == "vjp":
                    correction = pull_back(correction)
                velocity = velocity - guidance_gain(time, self.guidance.max_weight) * correction
            x = x + dt * velocity
        actions = VECTORS @ x * SCALE_M
        return ActionChunk(actions, observation.stamp_s, DT_S, observation.instruction)

    def _correction(self, prefix: ActionPrefix, estimate: FloatArray) -> FloatArray:
        given = min(len(prefix.actions), HORIZON)
        weights = self.guidance.weights(prefix.committed_steps, given, HORIZON)
        error = np.zeros((HORIZON, 2))
        error[:given] = prefix.actions[:given] / SCALE_M - (VECTORS @ estimate)[:given]
        return VECTORS.T @ (error * weights[:, None])


Product = Callable[[FloatArray], FloatArray]


class _Flow:
    """Posterior mean of the mixture at every flow time, in the eigenbasis of its covariance."""

    def __init__(self, means: FloatArray, log_shares: FloatArray) -> None:
        self._means = means
        self._log_shares = log_shares

    def estimate(self, x: FloatArray, time: float) -> tuple[FloatArray, Product]:
        """E[action | x_t = x] [H, 2], and the product of its (symmetric) Jacobian with a vector."""
        clean = 1.0 - time
        variances = ((clean * DEVIATIONS) ** 2 + time**2)[:, None]
        gain = (DEVIATIONS**2)[:, None] * clean / variances
        off = x - clean * self._means
        logits = self._log_shares - 0.5 * (off**2 / variances).sum(axis=(1, 2))
        shares = np.exp(logits - logits.max())
        shares /= shares.sum()
        centre = np.tensordot(shares, self._means, 1)
        estimate = centre + gain * (x - clean * centre)

        def product(vector: FloatArray) -> FloatArray:
            spread = self._means - centre
            moved = (1.0 - gain * clean) * spread
            along = shares * (moved * vector).sum(axis=(1, 2))
            return np.asarray(gain * vector + np.tensordot(along, spread * clean / variances, 1))

        return estimate, product
