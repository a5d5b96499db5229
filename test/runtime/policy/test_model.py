"""The whole network against LeRobot's numbers, and what must not change them."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from pi05_ros.policy.checkpoint import load_model
from pi05_ros.policy.model import Pi0, Prefix, attention, integrate, rotary, sinusoidal_embedding

BOUND = 1e-4
SAMPLE_BOUND = 2e-4


def assert_near(actual: Tensor, expected: Tensor, bound: float = BOUND) -> None:
    torch.testing.assert_close(actual, expected, atol=bound, rtol=0)


def draw(model: Pi0, batch: int, cameras: int = 2, tokens: int = 8) -> dict[str, Any]:
    """Random inputs of a small network, nothing masked."""
    config = model.config
    return {
        "images": torch.rand(batch, cameras, 3, config.image_size, config.image_size) * 2 - 1,
        "image_masks": torch.ones(batch, cameras, dtype=torch.bool),
        "tokens": torch.randint(0, config.sizes.vocab, (batch, tokens)),
        "token_masks": torch.ones(batch, tokens, dtype=torch.bool),
        "state": None if model.adaptive else torch.randn(batch, config.max_state_dim),
    }


def chunk_noise(model: Pi0, batch: int) -> Tensor:
    return torch.randn(batch, model.config.horizon, model.config.max_action_dim)


def open_gates(model: Pi0) -> Pi0:
    """Gates begin at zero, which would hide everything behind them."""
    if model.experts.action.modulation is not None:
        torch.nn.init.normal_(model.experts.action.modulation.weight, std=0.3)
    return model


def encode(model: Pi0, inputs: dict[str, Tensor], pack: bool) -> Prefix:
    """With `pack`, masked cameras and tokens are left out."""
    if pack:
        return model.encode_prefix(**inputs)
    images, image_masks, tokens, token_masks = inputs.values()
    return model.prefill(model.embed_images(images), image_masks, tokens, token_masks)


@torch.inference_mode()
def sample(
    model: Pi0, prefix: Prefix, noise: Tensor, state: Tensor | None, num_steps: int
) -> Tensor:
    velocity = partial(model.denoise_step, prefix, state=state)
    return integrate(velocity, noise, model.schedule(num_steps))


@torch.inference_mode()
def test_prefix_matches(golden: SimpleNamespace) -> None:
    model = golden.model
    images, *rest = golden.prefix.values()
    embeddings, valid = model.embed_prefix(model.embed_images(images), *rest)
    assert torch.equal(valid, golden.outputs["prefix.pad_masks"])
    assert_near(embeddings[valid], golden.outputs["prefix.embs"][valid])
    last, inputs = model.experts.vlm.layers[-1], []
    hook = last.attention_norm.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    prefix = encode(model, golden.prefix, pack=False)
    hook.remove()
    # what the policy leaves out of the last layer, and the final norm
    angles = rotary((valid.long().cumsum(1) - 1).clamp(min=0), last.head_dim)
    query, kv, _ = last.before_attention(inputs[0], angles)
    attended = attention(query, kv.key, kv.value, valid[:, None, None, :])
    hidden, _ = model.experts.vlm.final_norm(last.after_attention(inputs[0], attended, None))
    assert_near(hidden[valid], golden.outputs["prefix.last_hidden"][valid])
    for layer in (0, 2):
        for part in ("key", "value"):
            ours = getattr(prefix.cache[layer], part)[:, 0]
            theirs = golden.outputs[f"prefix.kv.{layer}.{part}"][:, 0]
            assert_near(ours[valid], theirs[valid])


@torch.inference_mode()
@pytest.mark.parametrize("pack", [True, False])
def test_velocity_matches(golden: SimpleNamespace, pack: bool) -> None:
    model, outputs = golden.model, golden.outputs
    prefix = encode(model, golden.prefix, pack)
    for index, time in enumerate(golden.inputs["t_fix"]):
        times = time.expand(2)
        features = model.time_features(times)
        suffix = model.embed_suffix(golden.inputs["x_fix"], features, golden.state)
        assert_near(suffix, outputs[f"suffix.{index}.embs"])
        name = "adarms_cond" if golden.kind == "pi05" else "time_emb"
        assert_near(model.embed_time(times), outputs[f"suffix.{index}.{name}"].float())
        velocity = model.denoise_step(prefix, golden.inputs["x_fix"], features, golden.state)
        assert velocity.dtype == torch.float32
        assert_near(velocity, outputs[f"v_t.{index}"])


@pytest.mark.parametrize("num_steps", [10, 5])
@pytest.mark.parametrize("pack", [True, False])
def test_actions_match(golden: SimpleNamespace, num_steps: int, pack: bool) -> None:
    model, noise = golden.model, golden.inputs["noise"]
    if pack:
        actions = model.sample_actions(
            **golden.prefix, state=golden.state, noise=noise, num_steps=num_steps
        )
    else:
        prefix = encode(model, golden.prefix, pack=False)
        actions = sample(model, prefix, noise, golden.state, num_steps)
    assert_near(actions, golden.outputs[f"sample_actions.n{num_steps}"], SAMPLE_BOUND)


def test_one_observation_alone_gives_the_same(golden: SimpleNamespace) -> None:
    """The second row has a masked camera and more padding, which batch 1 leaves out."""
    for row in (slice(0, 1), slice(1, 2)):
        actions = golden.model.sample_actions(
            **{name: part[row] for name, part in golden.prefix.items()},
            state=None if golden.state is None else golden.state[row],
            noise=golden.inputs["noise"][row],
        )
        assert_near(actions, golden.outputs["sample_actions.n10"][row], SAMPLE_BOUND)


def test_loss_matches(golden: SimpleNamespace) -> None:
    arguments = {
        "state": golden.state,
        "noise": golden.inputs["noise"],
        "time": golden.inputs["t_loss"],
    }
    loss = golden.model.loss(**golden.prefix, actions=golden.inputs["actions"], **arguments)
    assert_near(loss.detach(), golden.outputs["loss.per_element"])
    mean = golden.model.loss(
        **golden.prefix, actions=golden.inputs["actions"], **arguments, reduction="mean"
    )
    assert_near(mean.detach(), golden.outputs["loss.mean_all_dims"])


@pytest.mark.parametrize("how", ["load", "to"])
def test_bfloat16_stays_near_float32(golden: SimpleNamespace, how: str) -> None:
    """By the precision rule, and by a plain `.to`; the chunk itself is float32 in both."""
    if how == "load":
        model = load_model(golden.directory, dtype=torch.bfloat16)
    else:
        model = load_model(golden.directory).to(torch.bfloat16)
    actions = model.sample_actions(
        **golden.prefix, state=golden.state, noise=golden.inputs["noise"]
    )
    assert actions.dtype == torch.float32
    assert_near(actions, golden.outputs["sample_actions.n10"], 3e-2)


def test_tensors_and_not_the_type_make_the_network(golden: SimpleNamespace, tmp_path: Path) -> None:
    """The file's tensors decide, whatever `type` says."""
    shutil.copytree(golden.directory, tmp_path, dirs_exist_ok=True)
    document = json.loads((tmp_path / "config.json").read_text())
    document["type"] = "pi0" if golden.kind == "pi05" else "pi05"
    (tmp_path / "config.json").write_text(json.dumps(document))
    model = load_model(tmp_path)
    actions = model.sample_actions(
        **golden.prefix, state=golden.state, noise=golden.inputs["noise"]
    )
    assert_near(actions, golden.outputs["sample_actions.n10"], SAMPLE_BOUND)


def test_sinusoid_runs_from_the_shortest_to_the_longest_period() -> None:
    embedding = sinusoidal_embedding(torch.tensor([0.3]), 8, 0.004, 4.0)[0]
    periods = torch.tensor([0.004 * 1000 ** (i / 3) for i in range(4)], dtype=torch.float64)
    angles = 2 * torch.pi * torch.tensor(0.3).double() / periods
    assert_near(embedding, torch.cat((angles.sin(), angles.cos())).float(), 1e-5)


@settings(
    max_examples=15,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_masked_input_has_no_effect(small: Pi0, data: st.DataObject) -> None:
    """For any masks: packed equals unpacked, and masked values change nothing."""
    batch = data.draw(st.integers(1, 3))
    inputs = draw(open_gates(small), batch, cameras=3, tokens=5)
    flags = st.lists(st.booleans(), min_size=batch * 3, max_size=batch * 3)
    inputs["image_masks"] = torch.tensor(data.draw(flags)).view(batch, 3)
    flags = st.lists(st.booleans(), min_size=batch * 4, max_size=batch * 4)
    # a prompt has at least its first token
    inputs["token_masks"][:, 1:] = torch.tensor(data.draw(flags)).view(batch, 4)
    noise = chunk_noise(small, batch)
    packed = small.sample_actions(**inputs, noise=noise, num_steps=2)
    assert packed.isfinite().all()
    state = inputs.pop("state")
    unpacked = sample(small, encode(small, inputs, pack=False), noise, state, 2)
    assert_near(unpacked, packed, 2e-5)
    inputs["state"] = state
    masked = ~inputs["image_masks"]
    inputs["images"] = inputs["images"].masked_fill(masked[:, :, None, None, None], 0.7)
    inputs["tokens"] = inputs["tokens"].masked_fill(~inputs["token_masks"], 7)
    assert_near(small.sample_actions(**inputs, noise=noise, num_steps=2), packed, 2e-5)


def test_every_input_has_an_effect(small: Pi0) -> None:
    """Each camera, the prompt, π0's state and the noise have an effect on the actions."""
    inputs, noise = draw(open_gates(small), 1), chunk_noise(small, 1)
    base = small.sample_actions(**inputs, noise=noise)
    changes = {"tokens": (inputs["tokens"] + 1) % small.config.sizes.vocab}
    for camera in range(2):
        images = inputs["images"].clone()
        images[:, camera] *= -1
        changes[f"images {camera}"] = images
    if not small.adaptive:
        changes["state"] = -inputs["state"]
    for name, value in changes.items():
        other = small.sample_actions(**(inputs | {name.split()[0]: value}), noise=noise)
        assert not torch.allclose(other, base, atol=1e-5), name
    assert not torch.allclose(small.sample_actions(**inputs, noise=-noise), base, atol=1e-3)


def test_actions_are_one_bidirectional_block(small: Pi0) -> None:
    """A change of the last noisy action reaches the first velocity: nothing is causal."""
    inputs, x_t = draw(open_gates(small), 1), chunk_noise(small, 1)
    state = inputs.pop("state")
    with torch.no_grad():
        prefix = small.encode_prefix(**inputs)
        features = small.time_features(torch.tensor([0.5]))
        before = small.denoise_step(prefix, x_t, features, state)
        x_t[:, -1] += 1.0
        after = small.denoise_step(prefix, x_t, features, state)
    assert not torch.allclose(before[:, 0], after[:, 0], atol=1e-6)


def test_noise_is_drawn_anew(small: Pi0) -> None:
    inputs, chunks = draw(small, 2), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        chunks.append(small.sample_actions(**inputs))
    assert torch.equal(chunks[0], chunks[1])
    assert not torch.equal(chunks[0], chunks[2])


def test_gradient_reaches_every_parameter_in_use(small: Pi0) -> None:
    """All but the rest of the prefix's last layer, whose outputs are unused."""
    inputs = draw(open_gates(small), 2)
    small.loss(**inputs, actions=chunk_noise(small, 2), reduction="mean").backward()
    idle = {name for name, p in small.named_parameters() if p.grad is None or not p.grad.any()}
    last = f"experts.vlm.layers.{small.config.sizes.vlm.depth - 1}."
    ends = ("out.weight", "mlp_norm.weight", "gate_up.weight", "down.weight")
    assert idle == {last + end for end in ends} | {"experts.vlm.final_norm.weight"}


def test_a_small_network_learns_from_scratch(small: Pi0) -> None:
    """From its own initialisation, zero gates included."""
    torch.manual_seed(1)
    inputs, actions = draw(small, 4), chunk_noise(small, 4)
    noise, time = chunk_noise(small, 4), torch.tensor([0.2, 0.4, 0.6, 0.8])
    optimizer = torch.optim.Adam(small.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = small.loss(**inputs, actions=actions, noise=noise, time=time, reduction="mean")
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_drawn_times_follow_the_beta_distribution(small: Pi0) -> None:
    torch.manual_seed(0)
    times = small._draw_time(20_000)
    assert 0.001 <= float(times.min()) < float(times.max()) <= 1.0
    assert float(times.mean()) == pytest.approx(0.6 * 0.999 + 0.001, abs=0.01)


def test_the_network_has_no_buffers(small: Pi0) -> None:
    """`.to(bfloat16)` rounds buffers too."""
    assert list(small.buffers()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(1, 2, 3, 64, 64)}, "images must have shape"),
        ({"images": torch.zeros(1, 3, 112, 112)}, "images"),
        ({"image_masks": torch.ones(1, 3, dtype=torch.bool)}, "image_masks"),
        ({"image_masks": torch.ones(1, 2)}, "image_masks must be bool"),
        ({"tokens": torch.zeros(8, dtype=torch.long)}, "tokens must be"),
        ({"token_masks": torch.ones(1, 9, dtype=torch.bool)}, "token_masks"),
        ({"noise": torch.zeros(1, 5, 8)}, "noise"),
        ({"num_steps": 0}, "num_steps"),
        (
            {
                "image_masks": torch.zeros(1, 2, dtype=torch.bool),
                "token_masks": torch.zeros(1, 8, dtype=torch.bool),
            },
            "masked",
        ),
    ],
)
def test_bad_input_is_named(small: Pi0, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small.sample_actions(**(draw(small, 1) | change))


def test_bad_training_input_is_named(small: Pi0) -> None:
    inputs = draw(small, 1)
    with pytest.raises(ValueError, match="actions must have shape"):
        small.loss(**inputs, actions=torch.zeros(1, 6, 7))
    with pytest.raises(ValueError, match="reduction"):
        small.loss(**inputs, actions=chunk_noise(small, 1), reduction="sum")
    with pytest.raises(ValueError, match="time"):
        small.loss(**inputs, actions=chunk_noise(small, 1), time=torch.ones(2))
    if not small.adaptive:
        inputs["state"] = None
        with pytest.raises(ValueError, match="needs the state"):
            small.sample_actions(**inputs)
