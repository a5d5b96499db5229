"""The network's parts against direct formulas, the vision encoder against LeRobot's numbers.

Faults: heads that attend to another's keys, a mask without effect, patches in another order,
another gelu or norm, gradients that differ from those of the fused kernel.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pi05_ros.policy.config import GemmaSize, Sizes
from pi05_ros.policy.model import (
    AdaRMSNorm,
    Expert,
    PaliGemmaWithExpert,
    RMSNorm,
    Rotary,
    VisionEncoder,
    apply_rotary,
    attention,
    block_mask,
    repeat_heads,
    rotary,
)

VLM = GemmaSize(width=24, depth=2, mlp_dim=40, heads=4, kv_heads=2, head_dim=8)
ACTION = GemmaSize(width=16, depth=2, mlp_dim=20, heads=4, kv_heads=2, head_dim=8)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("masked", [False, True])
def test_unfused_attention_equals_the_fused_kernel(kv_heads: int, masked: bool) -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(torch.bfloat16)

    query, key, value = draw(2, 4, 5, 8), draw(2, kv_heads, 7, 8), draw(2, kv_heads, 7, 8)
    mask = torch.ones(2, 1, 1, 7, dtype=torch.bool)
    mask[1, :, :, 4:] = False
    weight = draw(2, 5, 32)
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        q, k, v = (x.clone().to(dtype).requires_grad_() for x in (query, key, value))
        out = attention(q, k, v, mask if masked else None)
        assert out.dtype == dtype
        (out.float() * weight.float()).sum().backward()
        results.append([out, q.grad, k.grad, v.grad])
    for steps, fused in zip(*results, strict=True):
        assert steps is not None and fused is not None
        torch.testing.assert_close(steps.float(), fused, atol=0.06, rtol=0.02)
        error = (steps.float() - fused).square().mean() / fused.square().mean()
        assert error < 1e-4


@pytest.mark.parametrize(("length", "copied"), [(33, True), (1, True), (32, False), (34, False)])
def test_repeated_heads_are_copied_for_doubtful_lengths(length: int, copied: bool) -> None:
    """Fault: rows of stride 0 at lengths of 32 n + 1, which CUDA's kernel may read wrongly."""
    x = torch.randn(2, 1, length, 8)
    repeated = repeat_heads(x, 4)
    assert repeated.is_contiguous() is copied
    assert torch.equal(repeated, x.expand(2, 4, length, 8))


@torch.inference_mode()
def test_vision_features_match_lerobot(golden: SimpleNamespace) -> None:
    for camera in golden.model.config.cameras:
        features = golden.model.vision(golden.inputs[f"image.{camera}"])
        expected = golden.outputs[f"image_features.{camera}"]
        assert features.shape == (2, 256, 64)
        torch.testing.assert_close(features, expected, atol=1e-5, rtol=0)


@torch.inference_mode()
def test_other_image_and_patch_sizes(small_sizes: Sizes) -> None:
    encoder = VisionEncoder(small_sizes)
    images = torch.rand(2, 3, 112, 112) * 2 - 1
    features = encoder(images)
    assert features.shape == (2, 49, 48)
    # each image is encoded independently
    torch.testing.assert_close(encoder(images[1:]), features[1:], atol=1e-5, rtol=0)


@torch.inference_mode()
def test_patches_run_row_by_row(small_sizes: Sizes) -> None:
    """Without layers and positions a token is its patch alone."""
    encoder = VisionEncoder(small_sizes)
    encoder.layers = torch.nn.ModuleList()
    encoder.position.zero_()
    images = torch.zeros(1, 3, 112, 112)
    images[:, :, 16 * 2 : 16 * 3, 16 * 5 : 16 * 6] = 1.0
    features = encoder(images)[0]
    changed = (features - encoder(torch.zeros(1, 3, 112, 112))[0]).abs().amax(-1) > 1e-6
    assert changed.nonzero().flatten().tolist() == [2 * 7 + 5]


def test_rms_norm_adds_one_to_its_weight() -> None:
    norm = RMSNorm(4)
    x = torch.tensor([[1.0, -2.0, 3.0, 0.0]])
    norm.weight.data.fill_(0.5)
    y, gate = norm(x)
    torch.testing.assert_close(y, 1.5 * x / math.sqrt(14 / 4 + 1e-6))
    assert gate is None


def test_ada_rms_norm_has_scale_shift_gate_in_this_order() -> None:
    x = torch.tensor([[[3.0, 4.0]]])
    modulation = torch.tensor([[[0.5, 1.0], [10.0, 20.0], [7.0, 8.0]]])
    y, gate = AdaRMSNorm()(x, modulation)
    normed = x / math.sqrt(12.5 + 1e-6)
    torch.testing.assert_close(y, normed * torch.tensor([1.5, 2.0]) + torch.tensor([10.0, 20.0]))
    assert gate is not None
    assert gate.tolist() == [[[7.0, 8.0]]]


def test_norms_compute_in_float32() -> None:
    x = torch.full((1, 1, 4), 300.0, dtype=torch.bfloat16)
    y, _ = RMSNorm(4).to(torch.bfloat16)(x)
    assert y.dtype == torch.bfloat16
    assert y.tolist() == [[[1.0] * 4]]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.integers(0, 1000), st.integers(0, 500))
def test_rotary_attention_depends_on_the_distance_alone(a: int, b: int, shift: int) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 32, generator=generator, dtype=torch.float64).unbind(0)

    def score(i: int, j: int) -> float:
        rotated_q = apply_rotary(q, rotary(torch.tensor([[i]]), 32)).double()
        rotated_k = apply_rotary(k, rotary(torch.tensor([[j]]), 32)).double()
        return float((rotated_q * rotated_k).sum())

    assert score(a, b) == pytest.approx(score(a + shift, b + shift), abs=2e-3)


def test_rotary_turns_halves_and_not_neighbours() -> None:
    x = torch.zeros(1, 1, 1, 8)
    x[..., 1] = 1.0
    angle = 5 * 10_000 ** (-2 / 8)
    expected = torch.zeros(8)
    expected[1], expected[5] = math.cos(angle), math.sin(angle)
    torch.testing.assert_close(apply_rotary(x, rotary(torch.tensor([[5]]), 8)).flatten(), expected)


def test_rotary_angles_stay_float32_in_a_bfloat16_network() -> None:
    """Frequencies in a buffer would be rounded: 0.4 % is 1.3 rad at position 968."""
    positions = torch.tensor([[968]])
    expected = rotary(positions, 256)
    experts = PaliGemmaWithExpert(VLM, ACTION, adaptive=True).to(torch.bfloat16)
    assert list(experts.buffers()) == []
    assert expected.cos.dtype == expected.sin.dtype == torch.float32
    exact = 968 * 10_000.0 ** (-torch.arange(0, 256, 2, dtype=torch.float64) / 256)
    cos, sin = (angles.flatten().double() for angles in expected)
    torch.testing.assert_close(cos, exact.cos().repeat(2), atol=2e-4, rtol=0)
    signs = torch.tensor([-1.0] * 128 + [1.0] * 128)
    torch.testing.assert_close(sin, exact.sin().repeat(2) * signs, atol=2e-4, rtol=0)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=12))
def test_block_mask_is_the_definition(tokens: list[tuple[bool, bool]]) -> None:
    valid, starts = zip(*tokens, strict=True)
    mask = block_mask(torch.tensor([valid]), torch.tensor(starts))[0, 0]
    block = [sum(starts[: i + 1]) for i in range(len(starts))]
    for i in range(len(tokens)):
        for j in range(len(tokens)):
            assert bool(mask[i, j]) == (block[j] <= block[i] and valid[j])


def test_a_fresh_adaptive_expert_is_the_identity() -> None:
    """Gates begin at zero: the layers add nothing, and the norms are plain."""
    expert = Expert(ACTION, adaptive=True)
    modulations = expert.modulations(torch.randn(3, 16))
    assert modulations.shape == (3, 5, 3, 16)
    assert not modulations.any()
    experts = PaliGemmaWithExpert(VLM, ACTION, adaptive=True)
    cache = experts.prefix(torch.randn(3, 4, 24), rotary(torch.arange(4)[None], 8), None)
    x = torch.randn(3, 2, 16)
    out = experts.suffix(x, cache, rotary(torch.arange(4, 6)[None], 8), None, modulations)
    torch.testing.assert_close(out, x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt())


def test_modulations_of_a_plain_expert_are_an_error() -> None:
    with pytest.raises(ValueError, match="plain norms"):
        Expert(ACTION, adaptive=False).modulations(torch.zeros(1, 16))


def joint_attention(
    experts: PaliGemmaWithExpert,
    prefix: Tensor,
    suffix: Tensor,
    valid: Tensor,
    modulations: Tensor | None,
) -> Tensor:
    """Both experts in one pass, as in the paper: one softmax over [prefix | suffix]."""
    batch, n_prefix = valid.shape
    n_suffix = suffix.shape[1]
    starts = torch.zeros(n_prefix + n_suffix, dtype=torch.bool)
    starts[n_prefix] = True
    valid = torch.cat((valid, valid.new_ones(batch, n_suffix)), dim=1)
    mask = block_mask(valid, starts)
    cos, sin = rotary(valid.long().cumsum(1) - 1, 8)
    streams = [prefix, suffix]
    stacks = [experts.vlm.layers, experts.action.layers]
    angles = [
        Rotary(cos[:, :, part], sin[:, :, part])
        for part in (slice(n_prefix), slice(n_prefix, None))
    ]
    for n in range(VLM.depth):
        per_norm = (
            [None, None] if modulations is None else modulations[:, 2 * n : 2 * n + 2].unbind(1)
        )
        norms = [[None, None], per_norm]
        parts = [
            stack[n].before_attention(x, angle, norm[0])
            for stack, x, angle, norm in zip(stacks, streams, angles, norms, strict=True)
        ]
        q = torch.cat([part[0] for part in parts], dim=2)
        k = torch.cat([part[1].key for part in parts], dim=2).repeat_interleave(2, dim=1)
        v = torch.cat([part[1].value for part in parts], dim=2).repeat_interleave(2, dim=1)
        logits = (q @ k.transpose(-1, -2)) / math.sqrt(8)
        weights = logits.masked_fill(~mask, -2.4e38).softmax(-1)
        out = (weights @ v).transpose(1, 2).flatten(2)
        outs = out.split((n_prefix, n_suffix), dim=1)
        streams = [
            stack[n].after_attention(x, o, part[2], norm[1])
            for stack, x, o, part, norm in zip(stacks, streams, outs, parts, norms, strict=True)
        ]
    last = None if modulations is None else modulations[:, -1]
    return experts.action.final_norm(streams[1], last)[0]


@pytest.mark.parametrize("adaptive", [True, False])
def test_two_passes_equal_the_joint_pass_and_its_gradient(adaptive: bool) -> None:
    """The gradient must reach the prefix through the cached keys and values."""
    torch.manual_seed(0)
    experts = PaliGemmaWithExpert(VLM, ACTION, adaptive)
    prefix, suffix = torch.randn(2, 5, 24), torch.randn(2, 3, 16)
    valid = torch.tensor([[True] * 5, [True, True, False, True, False]])
    modulations = None
    if adaptive:
        modulations = 0.5 * torch.randn(2, 5, 3, 16)

    def two_passes() -> Tensor:
        positions = (valid.long().cumsum(1) - 1).clamp(min=0)
        mask = valid[:, None, None, :]
        cache = experts.prefix(prefix, rotary(positions, 8), mask)
        suffix_positions = valid.sum(1, keepdim=True) + torch.arange(3)
        suffix_mask = torch.cat((mask, mask.new_ones(2, 1, 1, 3)), dim=-1)
        return experts.suffix(suffix, cache, rotary(suffix_positions, 8), suffix_mask, modulations)

    results, gradients = [], []
    for compute in (
        two_passes,
        lambda: joint_attention(experts, prefix, suffix, valid, modulations),
    ):
        experts.zero_grad()
        out = compute()
        out.square().sum().backward()
        results.append(out.detach())
        gradients.append(
            {
                name: torch.zeros(()) if p.grad is None else p.grad.clone()
                for name, p in experts.named_parameters()
            }
        )
    torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=1e-5)
    for name, gradient in gradients[0].items():
        expected = gradients[1][name].expand_as(gradient)
        torch.testing.assert_close(gradient, expected, atol=2e-4, rtol=1e-3, msg=name)
    assert gradients[0]["vlm.layers.0.qkv.weight"].any()
