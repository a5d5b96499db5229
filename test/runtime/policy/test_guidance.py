"""Faults pinned: weights or correction other than LeRobot's or the paper's, a prefix that is
filled up with zeros, an old chunk merged relative to a state that is over, padding that pulls."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from pi05_ros.policy.config import parse_config
from pi05_ros.policy.guidance import (
    GUIDANCE_METHODS,
    GUIDANCE_SCHEDULES,
    Guidance,
    PrefixGuidance,
    guidance_gain,
    prefix_weights,
)
from pi05_ros.policy.inference import EagerSampler, SampleInputs, no_mark
from pi05_ros.policy.model import Pi0, integrate
from pi05_ros.policy.prompt import Tokens
from pi05_ros.types import ActionPrefix

HORIZON, DIMS = 6, 8


@pytest.fixture(scope="module")
def rtc() -> dict[str, Tensor]:
    return load_file(Path(__file__).parents[2] / "data" / "pi05_tiny_f32" / "rtc.safetensors")


@pytest.mark.parametrize("schedule", GUIDANCE_SCHEDULES)
def test_weights_are_lerobots(rtc: dict[str, Tensor], schedule: str) -> None:
    expected = rtc[f"rtc.weights.{schedule.upper()}.d4_e10"].numpy()
    np.testing.assert_allclose(prefix_weights(schedule, 4, 10, 16), expected, atol=1e-6)


@settings(max_examples=60)
@given(st.sampled_from(GUIDANCE_SCHEDULES), *[st.integers(0, 40)] * 2, st.integers(1, 40))
def test_weights_fall_from_1_to_0(schedule: str, frozen: int, end: int, horizon: int) -> None:
    weights = prefix_weights(schedule, frozen, end, horizon)
    assert weights.shape == (horizon,)
    assert (weights[: min(frozen, end)] == 1).all() and (weights[end:] == 0).all()
    assert ((weights >= 0) & (weights <= 1)).all() and (np.diff(weights) <= 0).all()


def test_by_default_all_that_is_left_pulls() -> None:
    """Pins: with LeRobot's horizon of 10 steps, a delay of 10 leaves no say to what comes then."""
    weights = Guidance().weights(committed=10, given=40, horizon=50)
    assert (weights[:40] > 0).all() and (weights[40:] == 0).all()
    limited = Guidance(execution_horizon=10).weights(committed=10, given=40, horizon=50)
    assert (limited[10:] == 0).all()


def test_gain_is_the_papers_below_its_cap() -> None:
    """(1-τ)/τ · ((1-τ)² + τ²)/(1-τ)², as the paper writes it."""
    for tau in (0.2, 0.5, 0.9):
        variance = (1 - tau) ** 2 / (tau**2 + (1 - tau) ** 2)
        assert guidance_gain(1 - tau, 100.0) == pytest.approx((1 - tau) / (tau * variance))
    assert guidance_gain(1.0, 5.0) == guidance_gain(0.0, 5.0) == guidance_gain(0.01, 5.0) == 5.0


@pytest.mark.parametrize("golden", ["pi05"], indirect=True)
@pytest.mark.parametrize("schedule", GUIDANCE_SCHEDULES)
def test_identity_guidance_is_lerobots(
    golden: SimpleNamespace, rtc: dict[str, Tensor], schedule: str
) -> None:
    """LeRobot pads the dimensions with zeros and lets the padding pull, as this test does."""
    target = torch.nn.functional.pad(rtc["rtc.prev_chunk_left_over"], (0, 18))
    guidance = PrefixGuidance.make(Guidance("identity", schedule, 10, 10.0), target, 4, 16, 32)
    model = golden.model
    with torch.no_grad():
        velocity = partial(model.denoise_step, model.encode_prefix(**golden.prefix))
        actions = integrate(velocity, golden.inputs["noise"], model.schedule(10), guidance.step)
    torch.testing.assert_close(actions, rtc[f"rtc.guided.{schedule.upper()}"], atol=2e-4, rtol=0)


def draw(model: Pi0) -> dict[str, Any]:
    torch.manual_seed(1)
    config = model.config
    return {
        "images": torch.rand(1, 1, 3, config.image_size, config.image_size) * 2 - 1,
        "image_masks": torch.ones(1, 1, dtype=torch.bool),
        "tokens": torch.randint(0, config.sizes.vocab, (1, 8)),
        "token_masks": torch.ones(1, 8, dtype=torch.bool),
        "state": None if model.adaptive else torch.randn(1, config.max_state_dim),
        "noise": torch.randn(1, HORIZON, DIMS),
    }


@torch.inference_mode()
def sample(model: Pi0, guidance: PrefixGuidance | None = None) -> Tensor:
    """As the policy does it, in inference mode."""
    given = draw(model)
    tokens = Tokens(given["tokens"][0].numpy(), given["token_masks"][0].numpy())
    inputs = SampleInputs(
        given["images"], (True,), tokens, given["noise"], given["state"], guidance
    )
    return EagerSampler(model, 5).sample(inputs, no_mark)


def open_gates(model: Pi0) -> None:
    """They begin at zero and would make the network's Jacobian trivial."""
    if model.experts.action.modulation is not None:
        torch.nn.init.normal_(model.experts.action.modulation.weight, std=0.3)


def test_vjp_correction_is_the_jacobian_by_finite_differences(small: Pi0) -> None:
    """Pins: a graph that begins behind the network, so that its Jacobian is the identity."""
    model = small.double()
    open_gates(model)
    inputs: dict[str, Any] = {name: None if value is None else
              value.double() if value.is_floating_point() else value
              for name, value in draw(model).items()}  # fmt: skip
    x_t = inputs.pop("noise")
    state = inputs.pop("state")
    assert x_t is not None
    time = 0.6
    with torch.no_grad():
        prefix = model.encode_prefix(**inputs)
        now = model.time_features(torch.tensor([time]))

    def velocity(x: Tensor, features: Tensor) -> Tensor:
        return model.denoise_step(prefix, x, features, state)

    target = torch.randn(1, 4, DIMS, dtype=torch.float64)
    guidance = Guidance("vjp", "linear", 4, 10.0)
    guide = PrefixGuidance.make(guidance, target, 2, HORIZON, DIMS)
    v, pulled = guide._vjp(velocity, x_t, time, now)
    identity = (guide.target - (x_t - time * v)) * guide.weights
    generator = torch.Generator().manual_seed(3)
    worst = 0.0
    for _ in range(5):
        direction = torch.randn(x_t.shape, generator=generator, dtype=torch.float64)
        step = 1e-2
        with torch.no_grad():
            ends = [x - time * velocity(x, now)
                    for x in (x_t + step * direction, x_t - step * direction)]  # fmt: skip
        along = ((ends[0] - ends[1]) / (2 * step) * identity).sum()
        torch.testing.assert_close((pulled * direction).sum(), along, rtol=2e-2, atol=2e-2)
        worst = max(worst, float(((identity - pulled) * direction).sum().abs()))
    assert worst > 0.05, "the Jacobian must differ from the identity for this to say anything"


@pytest.mark.parametrize(
    ("small", "method"),
    [*[("pi05", method) for method in GUIDANCE_METHODS], ("pi0", "identity"), ("pi0", "vjp")],
    indirect=["small"],
)
def test_frozen_steps_are_met(small: Pi0, method: str) -> None:
    open_gates(small)
    target = torch.full((1, 4, DIMS), 0.5)
    guide = PrefixGuidance.make(Guidance(method, "ones", 4, 10.0), target, 4, HORIZON, DIMS)
    free, guided = sample(small), sample(small, guide)
    assert not guided.requires_grad
    error = [(x[:, :4] - target).abs().mean() for x in (free, guided)]
    assert error[1] < error[0] * (1e-9 if method == "trained" else 0.2)


@pytest.mark.parametrize("small", ["pi05"], indirect=True)
def test_time_per_token_is_the_time_of_the_whole_where_it_is_one(small: Pi0) -> None:
    open_gates(small)
    inputs = draw(small)
    x_t = inputs.pop("noise")
    assert x_t is not None
    inputs.pop("state")
    with torch.inference_mode():
        prefix = small.encode_prefix(**inputs)
        features = small.time_features(torch.tensor([0.3]))
        per_token = features[:, :, :, None].expand(-1, -1, -1, HORIZON, -1)
        torch.testing.assert_close(
            small.denoise_step(prefix, x_t, features), small.denoise_step(prefix, x_t, per_token)
        )


@pytest.mark.parametrize("method", ["identity", "vjp"])
def test_steps_beyond_the_prefix_are_free(small: Pi0, method: str) -> None:
    """Pins: a short prefix filled up with zeros pulls the rest to the data's mean."""
    target = torch.full((1, 3, DIMS), 5.0)
    long_horizon = PrefixGuidance.make(
        Guidance(method, "ones", HORIZON, 10.0), target, 0, HORIZON, DIMS
    )
    assert (long_horizon.weights[0, :3] == 1).all() and (long_horizon.weights[0, 3:] == 0).all()
    own_horizon = PrefixGuidance.make(Guidance(method, "ones", 3, 10.0), target, 0, HORIZON, DIMS)
    torch.testing.assert_close(sample(small, long_horizon), sample(small, own_horizon))


def config(kind: str = "pi05", **extra: object):  # type: ignore[no-untyped-def]
    return parse_config({"chunk_size": HORIZON, "max_action_dim": DIMS, **extra}, kind)


def guide_for(prefix: ActionPrefix, **settings_: object) -> PrefixGuidance | None:
    return PrefixGuidance.from_prefix(Guidance(**settings_), prefix, lambda a: a * 2, config(), 3)  # type: ignore


def test_a_prefix_in_robot_units_becomes_a_target() -> None:
    """The network's padding dimensions do not pull: nobody asked anything of them."""
    guide = guide_for(ActionPrefix(np.ones((4, 3)), 2))
    assert guide is not None and guide.committed == 2
    assert (guide.target[0, :4, :3] == 2).all() and (guide.target[0, 4:] == 0).all()
    assert (guide.weights[0, :2, :3] == 1).all() and (guide.weights[0, :, 3:] == 0).all()
    longer = guide_for(ActionPrefix(np.ones((50, 3)), 40))
    assert longer is not None and longer.target.shape[1] == longer.committed == HORIZON
    assert guide_for(ActionPrefix(np.ones((0, 3)), 0)) is None


@pytest.mark.parametrize(
    ("actions", "frozen", "message"),
    [
        (np.ones((4, 2)), 0, r"\[n, 3\]"),
        (np.full((4, 3), math.nan), 0, "finite"),
        (np.ones((4, 3)), 5, "committed_steps is 5 of 4"),
    ],
)
def test_a_bad_prefix_is_named(actions: np.ndarray, frozen: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        guide_for(ActionPrefix(actions, frozen))


def test_trained_guidance_needs_a_checkpoint_that_was_trained_for_it() -> None:
    guidance = Guidance("trained")
    with pytest.raises(ValueError, match="rtc_training_max_delay"):
        guidance.check(config())
    with pytest.raises(ValueError, match="time per token"):
        guidance.check(config("pi0"))
    trained = config(rtc_training_max_delay=3)
    guidance.check(trained)
    Guidance("vjp").check(config())
    prefix = ActionPrefix(np.ones((6, 3)), 5)
    guide = PrefixGuidance.from_prefix(guidance, prefix, lambda a: a, trained, 3)
    assert guide is not None and guide.committed == 3


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"method": "magic"}, "identity, vjp, trained"),
        ({"schedule": "cosine"}, "zeros, ones, linear, exp"),
        ({"execution_horizon": -1}, "execution_horizon"),
        ({"max_weight": math.inf}, "max_weight"),
    ],
)
def test_bad_settings_are_named(bad: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Guidance(**bad)  # type: ignore[arg-type]
