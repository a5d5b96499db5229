"""The losses; faults: another objective than π0.5's, a capture that changes the result."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_policy.initial import answer
from small_policy.losses import LOSSES, AuxLossConfig, PixelHead, SmallPolicyLosses
from squares_world import HORIZON, make_config, stage  # type: ignore[import-not-found]

from pi05_lab.training.config import ConfigError
from pi05_lab.training.data import Batch
from pi05_lab.training.losses import (
    TrainModule,
    answer_loss,
    capture_prefix,
    checkpoint_layers,
    choose_parameters,
    detach_prefix,
    encode_with_answers,
    flow_errors,
    part_of,
)
from pi05_ros.policy.config import GemmaSize, PolicyConfig, Sizes, VisionSize
from pi05_ros.policy.model import Pi0

IMAGES, TASKS, CAMERAS, LENGTH, JOINTS = 2, 2, 2, 9, 3
NAMES = (3, 4)
"""Tokens that name the two objects."""
OPTIONS = AuxLossConfig(
    names=("red", "blue"), position_layers=(1, 2), chunk_layers=(2,), scene_camera="b"
)


def tiny_network(kind: str = "pi05") -> Pi0:
    torch.manual_seed(0)
    network = Pi0(
        PolicyConfig(
            kind=kind,
            sizes=Sizes(
                vlm=GemmaSize(24, 3, 32, 2, 1, 8),
                exp=GemmaSize(16, 3, 24, 2, 1, 8),
                vis=VisionSize(16, 1, 2, 24),
                vocab=50,
                image=16,
                patch=8,
            ),
            horizon=HORIZON,
            max_action_dim=5,
            max_state_dim=5,
            cameras=("a", "b"),
            state_dim=JOINTS,
            action_dim=JOINTS,
        )
    )
    if network.experts.action.modulation is not None:
        torch.nn.init.normal_(network.experts.action.modulation.weight, std=0.2)
    return network


def make_batch(repeats: int = 1, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    rows = IMAGES * TASKS
    lengths = torch.tensor([9, 7, 8, 8])
    noise = torch.randn(rows * repeats, HORIZON, 5, generator=generator)
    actions = torch.randn(rows, HORIZON, 5, generator=generator)
    actions[:, :, JOINTS:] = 0
    return Batch(
        images=torch.rand(IMAGES, CAMERAS, 3, 16, 16, generator=generator) * 2 - 1,
        image_masks=torch.ones(IMAGES, CAMERAS, dtype=torch.bool),
        tokens=torch.randint(0, 50, (rows, LENGTH + 3), generator=generator),
        token_masks=torch.arange(LENGTH + 3) < lengths[:, None],
        actions=actions,
        states=torch.randn(rows, 5, generator=generator),
        noise=noise,
        times=torch.rand(rows * repeats, generator=generator),
        delays=torch.zeros(rows * repeats, dtype=torch.int64),
        targets={
            "positions": torch.randn(IMAGES, 2, 3, generator=generator),
            "pixels": torch.rand(IMAGES, CAMERAS, 2, 2, generator=generator),
            "named": torch.tensor([0, 1, -1, 1]),
            "name_tokens": torch.tensor([3, 2, 0, 4]),
            "state_tokens": lengths[:, None] - 4 + torch.arange(JOINTS),
        },
    )


def rows_of(batch: Batch) -> Any:
    """The images once per instruction, as `Pi0.loss` wants them."""
    return {
        "images": batch.images.repeat_interleave(TASKS, 0),
        "image_masks": batch.image_masks.repeat_interleave(TASKS, 0),
        "tokens": batch.tokens,
        "token_masks": batch.token_masks,
    }


@pytest.fixture
def module() -> TrainModule:
    network = tiny_network()
    return TrainModule(network, SmallPolicyLosses(network.config, OPTIONS, LOSSES, NAMES))


@pytest.mark.parametrize("kind", ["pi05", "pi0"])
@pytest.mark.parametrize("missing_camera", [False, True])
def test_the_flow_loss_is_the_networks_own(kind: str, missing_camera: bool) -> None:
    """Fault: another time, target or mean than `Pi0.loss`, which the goldens hold."""
    network, batch = tiny_network(kind), make_batch()
    if missing_camera:
        batch.image_masks[:, 0] = False
    state = batch.states if kind == "pi0" else None
    expected = network.loss(
        **rows_of(batch), actions=batch.actions, state=state, noise=batch.noise, time=batch.times
    )
    total, parts = TrainModule(network)(batch, {"flow": 1.0})
    robot = expected[:, :, :JOINTS]
    torch.testing.assert_close(parts["flow"], robot.mean(), atol=1e-6, rtol=1e-5)
    # padded dimensions learn with the same weight
    whole = expected.sum() / robot.numel()
    torch.testing.assert_close(total, whole, atol=1e-6, rtol=1e-5)


def test_several_noises_per_prefix_are_their_mean(module: TrainModule) -> None:
    """Fault: rows of K and V that meet another row's noise."""
    several = make_batch(repeats=3)
    single = [
        replace(
            several,
            noise=several.noise[k::3],
            times=several.times[k::3],
            delays=several.delays[k::3],
        )
        for k in range(3)
    ]
    losses = [module(batch, {"flow": 1.0})[0] for batch in single]
    total = module(several, {"flow": 1.0})[0]
    torch.testing.assert_close(total, torch.stack(losses).mean())


def test_capturing_the_prefix_changes_nothing(module: TrainModule) -> None:
    """Fault: images that reach another instruction's row when it runs once for all."""
    network, batch = module.network, make_batch()
    plain = network.encode_prefix(**rows_of(batch))
    with capture_prefix(network, len(batch.tokens), TASKS) as seen:
        watched = network.encode_prefix(**rows_of(batch))
    for mine, other in zip(plain.cache, watched.cache, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-6, rtol=1e-5)
    assert seen.vision is not None and len(seen.vision) == IMAGES * CAMERAS
    assert len(seen.hidden) == 3
    again = network.encode_prefix(**rows_of(batch))
    torch.testing.assert_close(again.cache[2].key, plain.cache[2].key, atol=0, rtol=0)


def test_losses_are_weighted_and_each_reported(module: TrainModule) -> None:
    batch = make_batch()
    total, parts = module(batch, {"flow": 2.0, "chunk": 0.5, "scene": 0.0, "named_position": 1.0})
    assert set(parts) == {"flow", "chunk", "named_position"}
    flow = module(batch, {"flow": 1.0})[0].detach()
    expected = 2 * flow + 0.5 * parts["chunk"] + parts["named_position"]
    torch.testing.assert_close(total.detach(), expected)


def test_chunk_loss_reads_the_state_tokens(module: TrainModule) -> None:
    """Fault: off by one between the prompt's tokens and the packed prefix."""
    batch = make_batch()
    network = module.network
    with capture_prefix(network, len(batch.tokens), TASKS) as seen:
        network.encode_prefix(**rows_of(batch))
    seen.hidden[2].retain_grad()
    assert isinstance(module.auxiliary, SmallPolicyLosses)
    module.auxiliary.chunk_loss(batch, seen).backward()
    gradient, first = seen.hidden[2].grad, CAMERAS * 4
    assert gradient is not None
    read = [(row.abs().sum(1) > 0).nonzero().flatten().tolist() for row in gradient]
    assert read == (first + batch.targets["state_tokens"]).tolist()


def test_unknown_positions_give_no_gradient(module: TrainModule) -> None:
    """Fault: NaN, or a pull towards 0, from data without positions or a task without an object."""
    batch = make_batch()
    batch.targets["positions"][1] = torch.nan
    full = module(batch, {"named_position": 1.0})[0]
    batch.targets["positions"][1] = 5.0
    batch.targets["named"][2:] = -1
    torch.testing.assert_close(module(batch, {"named_position": 1.0})[0], full)
    batch.targets["positions"][:] = torch.nan
    batch.targets["pixels"][:] = torch.nan
    for loss in ("named_position", "scene", "pixels"):
        total = module(batch, {loss: 1.0})[0]
        assert total.item() == 0
        total.backward()
    assert all(p.grad is None or bool(torch.isfinite(p.grad).all()) for p in module.parameters())


def test_pixels_are_columns_and_rows_of_patches() -> None:
    """Fault: column and row exchanged, patches in another order than the vision encoder's."""
    head, side, width = PixelHead(12), 3, 12
    head.scale.data.fill_(5.0)
    names = torch.eye(2, width) * 3
    tokens = torch.eye(width)[-1].repeat(1, side * side, 1)
    tokens[0, 1 * side + 2] = answer(names[0])  # row 1, column 2
    pixels = torch.tensor([[[2.5 / 3, 1.5 / 3], [-1.0, -1.0]]])
    head.within.weight.data.zero_()
    head.within.bias.data.zero_()
    head.absent.data.fill_(5.0)
    assert head.loss(tokens, names, pixels) < 0.1
    assert head.loss(tokens, names, pixels.flip(-1)) > 5
    assert head.loss(tokens, names, pixels.flip(1)) > 1
    edge = torch.tensor([[[1.0, 1.0], [0.0, 0.0]]])
    assert torch.isfinite(head.loss(tokens, names, edge))


def test_the_vision_encoder_runs_once_for_all_losses(module: TrainModule) -> None:
    """Fault: losses beside the flow loss that read other features than the prefix's."""
    batch = make_batch()
    alone = [module(batch, {loss: 1.0})[0] for loss in ("pixels", "scene")]
    together = module(batch, {"flow": 1.0, "pixels": 1.0, "scene": 1.0})[1]
    torch.testing.assert_close(together["pixels"], alone[0].detach())
    torch.testing.assert_close(together["scene"], alone[1].detach())


def gradients(
    module: TrainModule, batch: Batch, losses: dict[str, float], insulate: bool
) -> set[str]:
    """The parts that a loss reaches."""
    module.zero_grad()
    module(batch, losses, insulate)[0].backward()
    return {
        str(part_of(name, 3))
        for name, p in module.named_parameters()
        if p.grad is not None and p.grad.abs().sum() > 0
    }


def test_insulation_keeps_the_flow_loss_out_of_the_prefix(module: TrainModule) -> None:
    batch = make_batch(repeats=2)
    everything = {"vision", "projector", "embedder", "prefix", "bridge", "expert"}
    assert gradients(module, batch, {"flow": 1.0}, False) == everything
    assert gradients(module, batch, {"flow": 1.0}, True) == {"bridge", "expert"}
    helped = gradients(module, batch, {"flow": 1.0, "chunk": 1.0}, True)
    assert helped == everything | {"auxiliary"}
    torch.testing.assert_close(
        module(batch, {"flow": 1.0}, True)[0], module(batch, {"flow": 1.0}, False)[0]
    )


def test_every_parameter_has_a_part(module: TrainModule) -> None:
    """Fault: a parameter that belongs to no part and never learns, but the prefix's dead end."""
    idle = {name for name, _ in module.named_parameters() if part_of(name, 3) is None}
    end = "network.experts.vlm.layers.2."
    ends = {f"{end}{layer}.weight" for layer in ("out", "mlp_norm", "gate_up", "down")}
    assert idle == ends | {"network.experts.vlm.final_norm.weight"}


@pytest.mark.parametrize(
    ("switch", "train", "learning"),
    [
        ("", "expert bridge", "expert bridge"),
        ("freeze_vision_encoder", "vision projector prefix expert", "projector prefix expert"),
        ("train_expert_only", "vision prefix expert", "expert"),
    ],
)
def test_switches_as_lerobot_means_them(
    module: TrainModule, tmp_path: Path, switch: str, train: str, learning: str
) -> None:
    """LeRobot 0.6.1: freeze_vision_encoder leaves the projector, train_expert_only PaliGemma."""
    switches = {switch: True} if switch else {}
    config = make_config(tmp_path, tmp_path, stages=[stage(train=train.split())], **switches)
    chosen = choose_parameters(module, config.stages[0], config)
    assert {part_of(name, 3) for name in chosen} == {"auxiliary", *learning.split()}
    assert {n for n, p in module.named_parameters() if p.requires_grad} == set(chosen)


def test_gradient_checkpointing_gives_the_same_gradients_for_less_memory() -> None:
    batch = make_batch(repeats=2)
    results = []
    for checkpointed in (False, True):
        module = TrainModule(tiny_network())
        if checkpointed:
            checkpoint_layers(module.network)
        kept = 0

        def count(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal kept
            kept += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            total = module(batch, {"flow": 1.0})[0]
        saved = kept
        total.backward()
        results.append((saved, {n: p.grad for n, p in module.named_parameters()}))
    (much, plain), (little, checked) = results
    assert little < 0.6 * much
    for name, gradient in plain.items():
        torch.testing.assert_close(checked[name], gradient, msg=name)


@pytest.mark.parametrize(
    ("options", "losses", "message"),
    [
        ({"scene_camera": "front"}, {"scene"}, "scene_camera 'front'.*a, b"),
        ({"chunk_layers": (3,)}, {"chunk"}, "chunk_layers: 3 is not from 1 to 2"),
        ({"position_layers": (0,)}, {"named_position"}, "position_layers: 0"),
    ],
)
def test_options_that_do_not_fit_are_named(
    options: dict[str, object], losses: set[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        SmallPolicyLosses(tiny_network().config, replace(OPTIONS, **options), losses, NAMES)  # type: ignore[arg-type]


def test_clean_prefixes_have_time_zero_and_no_loss() -> None:
    """Training-time real-time chunking; fault: a prefix with noise, or one that is learnt."""
    network = tiny_network()
    batch = make_batch()
    batch.delays = torch.tensor([0, 1, 2, HORIZON - 1])
    batch.has_delays = True
    prefix = network.encode_prefix(**rows_of(batch))
    errors = flow_errors(network, prefix, batch)
    steps = torch.arange(HORIZON)
    for row, delay in enumerate(batch.delays.tolist()):
        t = torch.where(steps < delay, 0.0, batch.times[row])
        x_t = t[:, None] * batch.noise[row] + (1 - t[:, None]) * batch.actions[row]
        assert torch.equal(x_t[:delay], batch.actions[row, :delay])
        features = network.time_features(t).permute(1, 2, 0, 3)[None]
        one = network.encode_prefix(**{k: v[row : row + 1] for k, v in rows_of(batch).items()})
        velocity = network.denoise_step(one, x_t[None], features)[0]
        expected = (velocity - batch.noise[row] + batch.actions[row]).square()[delay:].mean(0)
        torch.testing.assert_close(errors[row], expected, atol=1e-5, rtol=1e-5)
    batch.has_delays, batch.delays = False, torch.zeros(4, dtype=torch.int64)
    plain = flow_errors(network, prefix, batch)
    torch.testing.assert_close(errors[0], plain[0])
    assert not torch.allclose(errors[1], plain[1])


def test_padded_dimensions_without_weights_stay_so() -> None:
    """Fault: columns that learnt t · noise, and met constant noise in inference."""
    network = tiny_network()
    with torch.no_grad():
        network.action_in_proj.weight[:, JOINTS:] = 0.0
        network.action_out_proj.weight[JOINTS:] = 0.0
        network.action_out_proj.bias[JOINTS:] = 0.0
    module, batch = TrainModule(network), make_batch()
    total, parts = module(batch, {"flow": 1.0})
    torch.testing.assert_close(total.detach(), parts["flow"])
    total.backward()
    for parameter, rows in ((network.action_in_proj.weight, False), (
        network.action_out_proj.weight, True)):  # fmt: skip
        assert parameter.grad is not None
        padded = parameter.grad[JOINTS:] if rows else parameter.grad[:, JOINTS:]
        assert not padded.any() and parameter.grad.any()


def with_answers(batch: Batch) -> Batch:
    """Answers of 5, 3, 4 and 5 tokens."""
    lengths = torch.tensor([5, 3, 4, 5])
    masks = torch.arange(5) < lengths[:, None]
    ids = torch.randint(20, 50, (4, 5), generator=torch.Generator().manual_seed(1)) * masks
    return replace(batch, answers=ids, answer_masks=masks)


def test_answers_see_the_prefix_and_their_own_past() -> None:
    """The prefix and the expert's view of it are those without answers, in value and position."""
    network, batch = tiny_network(), with_answers(make_batch())
    plain = network.encode_prefix(**rows_of(batch))
    joint, hidden = encode_with_answers(network, batch=batch, **rows_of(batch))
    valid = torch.cat((torch.ones(4, 8, dtype=torch.bool), batch.token_masks), dim=1)
    for mine, theirs in zip(joint.cache, plain.cache, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            # padding of the whole batch is left out of the plain one
            a = a[:, :, : b.shape[2]]
            there = valid[:, None, : b.shape[2], None]
            torch.testing.assert_close(a * there, b * there, atol=1e-5, rtol=1e-4)
    for angles, expected in zip(joint.suffix_angles, plain.suffix_angles, strict=True):
        torch.testing.assert_close(angles, expected)
    assert hidden.shape == (4, 5, 24)
    # a later token changes no earlier prediction, nor another row's
    changed = replace(batch, answers=batch.answers.clone())  # type: ignore[union-attr]
    changed.answers[0, 2] = 7  # type: ignore[index]
    other = encode_with_answers(network, batch=changed, **rows_of(batch))[1]
    moved = (other - hidden).abs().amax(-1) > 1e-6
    assert moved[0].tolist() == [False, False, False, True, True] and not moved[1:].any()


def test_the_loss_of_answers_is_their_cross_entropy(monkeypatch: pytest.MonkeyPatch) -> None:
    """In pieces; each answer weighs the same."""
    network, batch = tiny_network(), with_answers(make_batch())
    _, hidden = encode_with_answers(network, batch=batch, **rows_of(batch))
    expected = []
    for row, (ids, mask) in enumerate(zip(batch.answers, batch.answer_masks, strict=True)):  # type: ignore[arg-type]
        logits = hidden[row] @ network.embedder.weight.T
        losses = torch.nn.functional.cross_entropy(logits, ids, reduction="none")
        expected.append(losses[mask].mean())
    for piece in (512, 3):
        monkeypatch.setattr("pi05_lab.training.losses.PIECE", piece)
        loss = answer_loss(network, hidden, batch)
        torch.testing.assert_close(loss, torch.stack(expected).mean())


def test_an_insulated_language_model_has_no_gradient_of_the_flow() -> None:
    """Exactly none, and the flow loss is the same to the bit."""
    module, batch = TrainModule(tiny_network()), with_answers(make_batch())
    network = module.network
    errors = []
    for insulate in (True, False):
        module.zero_grad()
        prefix, _ = encode_with_answers(network, batch=batch, **rows_of(batch))
        if insulate:
            prefix = detach_prefix(prefix, keep_last=False)
        errors.append(flow_errors(network, prefix, batch))
        errors[-1].mean().backward()
        backbone = {
            name: p.grad
            for name, p in module.named_parameters()
            if part_of(name, 3, fast=True) != "expert"
        }
        reached = {name for name, grad in backbone.items() if grad is not None and grad.any()}
        assert bool(reached) == (not insulate)
        assert all(grad is None for grad in backbone.values()) == insulate
    assert torch.equal(*errors)
    total = module(batch, {"flow": 1.0, "fast": 0.5}, insulate=True)
    assert total[1]["flow"] == module(batch, {"flow": 1.0, "fast": 0.5})[1]["flow"]
    module.zero_grad()
    _, hidden = encode_with_answers(network, batch=batch, **rows_of(batch))
    answer_loss(network, hidden, batch).backward()
    unreached = [n for n, p in module.named_parameters() if p.grad is None or not p.grad.any()]
    assert unreached and all(part_of(name, 3, fast=True) == "expert" for name in unreached)


def test_stages_learn_what_they_say() -> None:
    """Pre-training: the whole language model. After it, the expert alone."""
    module = TrainModule(tiny_network())
    every = {"vision", "projector", "embedder", "prefix", "bridge", "expert"}
    for losses, parts in (({"fast": 1.0}, every - {"expert"}), ({"flow": 1.0}, {"expert"})):
        train = sorted(parts)
        config = make_config(Path(), Path(), stages=[stage(losses=losses, train=train)])
        names = set(choose_parameters(module, config.stages[0], config))
        last = {n for n in names if n.startswith("network.experts.vlm.layers.2.")}
        assert bool(last) == ("prefix" in parts)
        assert ("network.experts.vlm.final_norm.weight" in names) == ("fast" in losses)
