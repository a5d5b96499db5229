"""Sampling in prepared shapes gives the actions of the plain way; a fake device holds recordings.

Faults: a number that a recording froze, padding that is looked at, memory that a replay misses, an
operation that a CUDA graph cannot hold.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tape import Tape, TapeRecorder  # type: ignore[import-not-found]
from tiny_network import (  # type: ignore[import-not-found]
    assert_same,
    inputs,
    sampled,
    tiny,
    tiny_network,
)

from pi05_ros.policy.guidance import Guidance, Guide
from pi05_ros.policy.inference import BucketSampler, DirectRecorder, EagerSampler, SampleInputs
from pi05_ros.policy.model import Pi0

STEPS = 2
BUCKETS = (8, 16)


@pytest.fixture(params=["pi05", "pi0"])
def model(request: pytest.FixtureRequest) -> Pi0:
    return tiny_network(request.param)


def guided(given: SampleInputs, model: Pi0, method: str) -> SampleInputs:
    target = torch.randn(1, 6, model.config.max_action_dim, generator=torch.manual_seed(9))
    guidance = Guidance(method=method, max_weight=5.0)
    return replace(given, guide=Guide(guidance, target, 2, model.config.horizon, 4))


@pytest.mark.parametrize("recorder", [TapeRecorder, DirectRecorder])
def test_any_order_of_inputs_gives_the_plain_ways_actions(model: Pi0, recorder: type) -> None:
    """Fault: a replay that holds the pictures, prompt, state, noise or guide of another call."""
    plain = EagerSampler(model, STEPS)
    sampler = BucketSampler(model, STEPS, recorder(), BUCKETS)
    cases = [
        inputs(model, 0, (True, True, True), 5),
        inputs(model, 1, (True, True, True), 5),
        guided(inputs(model, 2, (True, True, True), 7), model, "identity"),
        inputs(model, 3, (True, True, True), 8),
        inputs(model, 4, (True, False, True), 8),
        inputs(model, 5, (False, True, True), 9),
        inputs(model, 6, (False, False, True), 24),
        inputs(model, 7, (True, True, True), 5),
        guided(inputs(model, 8, (True, False, False), 20), model, "identity"),
        inputs(model, 8, (True, False, False), 20),
    ]
    results = [sampled(sampler, given) for given in cases]
    for given, result in zip(cases, results, strict=True):
        assert_same(result, sampled(plain, given))
    assert (results[-1] - results[-2]).abs().max() > 0.01, "the guide did nothing"
    assert (results[0] - results[1]).abs().max() > 0.1


@pytest.mark.parametrize("method", ["vjp", "trained"])
def test_guides_that_no_recording_holds(method: str) -> None:
    """Fault: a guide that differentiates meets tensors of inference mode, or is left out."""
    model = tiny_network("pi05")
    plain = EagerSampler(model, STEPS)
    sampler = BucketSampler(model, STEPS, TapeRecorder(), BUCKETS)
    given = guided(inputs(model, 0, (True, True, False), 6), model, method)
    assert_same(sampled(sampler, given), sampled(plain, given))
    free = replace(given, guide=None)
    assert_same(sampled(sampler, free), sampled(plain, free))


def test_all_is_recorded_beforehand(model: Pi0) -> None:
    """Fault: a graph recorded while the robot waits for a chunk."""
    recorder = TapeRecorder()
    sampler = BucketSampler(model, STEPS, recorder, BUCKETS)
    sampler.prepare([2, 3])
    assert sampler.buckets == (8, 16, 24)
    # a tower per number of pictures, a prefix and a chunk per bucket
    assert recorder.recorded == 2 * (1 + 2 * 3)
    for length in (1, 8, 9, 24):
        sampled(sampler, inputs(model, 0, (True, True, True), length))
        sampled(sampler, inputs(model, 0, (True, False, True), length))
    assert recorder.recorded == 14


def test_without_a_picture(model: Pi0) -> None:
    plain = EagerSampler(model, STEPS)
    sampler = BucketSampler(model, STEPS, TapeRecorder(), BUCKETS)
    given = inputs(model, 0, (False, False, False), 6)
    assert_same(sampled(sampler, given), sampled(plain, given))


@pytest.mark.parametrize("kind", ["pi05", "pi0"])
def test_all_that_is_recorded_stays_on_the_device(kind: str) -> None:
    """Fault: a constant from the CPU, or a size that depends on data: no CUDA graph holds them.

    The meta device has shapes and no data.
    """
    with torch.device("meta"), torch.no_grad():
        model = Pi0(tiny(kind)).eval()
        config = model.config
        images = torch.zeros(1, 2, 3, 28, 28)
        seen, masks = torch.ones(1, 2, dtype=torch.bool), torch.ones(1, 8, dtype=torch.bool)
        tokens = torch.zeros(1, 8, dtype=torch.int64)
        noise = torch.zeros(1, config.horizon, config.max_action_dim)
        state = None if model.adaptive else torch.zeros(1, config.max_state_dim)
        features = model.schedule(STEPS).features[:1]
    with torch.no_grad(), Tape(device="meta") as tape:
        prefix = model.encode_tokens(model.encode_images(images), seen, tokens, masks)
        velocity = model.denoise(prefix, noise, features, state)
    assert velocity.shape == noise.shape
    assert len(tape.operations) > 50


def test_a_tape_refuses_what_a_graph_cannot_hold(model: Pi0) -> None:
    """The fake device notices: the plain way asks the masks what they hold."""
    given = inputs(model, 0, (True, False, True), 6)
    with pytest.raises(AssertionError, match="wait"), Tape():
        sampled(EagerSampler(model, STEPS), given)
