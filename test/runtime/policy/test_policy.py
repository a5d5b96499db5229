"""Observation → chunk; faults: a stage left out or out of order, bad input that reaches a robot."""

from __future__ import annotations

import json
import logging
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_policy.tokenizer import small_config
from untrained import create_small_checkpoint, small_statistics  # type: ignore[import-not-found]

from pi05_ros import types
from pi05_ros.policy.checkpoint import CAMERAS, save_model
from pi05_ros.policy.inference import EagerSampler, Mark, SampleInputs, no_mark
from pi05_ros.policy.model import Pi0
from pi05_ros.policy.policy import Policy, PolicyOutputError
from pi05_ros.policy.processing import ACTION, STATE, Normalizer, write_processing
from pi05_ros.policy.prompt import discretize
from pi05_ros.policy.robots import NAMED
from pi05_ros.policy.weights import CheckpointError
from pi05_ros.types import ActionPrefix, Observation

STATE_0 = np.linspace(-0.3, 0.6, 14)
STATS = {"q01": [-1.5] * 14, "q99": [2.0] * 14, "mean": [0.2] * 14, "std": [0.7] * 14}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("policy") / "checkpoint"
    create_small_checkpoint(path)
    return path


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> Policy:
    return Policy.from_pretrained(checkpoint, device="cpu", num_steps=4)


@pytest.fixture
def copied(checkpoint: Path, tmp_path: Path) -> Path:
    """The checkpoint, to be changed."""
    return Path(shutil.copytree(checkpoint, tmp_path / "copied"))


def load(path: Path, **settings: Any) -> Policy:
    return Policy.from_pretrained(path, device="cpu", num_steps=2, **settings)


def observe(**changes: Any) -> Observation:
    rng = np.random.default_rng(0)
    images = {name: rng.integers(0, 256, (48, 64, 3), dtype=np.uint8) for name in CAMERAS}
    return replace(Observation(images, STATE_0, "wave", stamp_s=12.5), **changes)


def test_a_chunk_of_the_small_network(loaded: Policy) -> None:
    """Fault: fields of the chunk left empty or of the wrong shape."""
    policy: types.Policy = loaded  # mypy holds the protocol
    chunk = policy.infer(observe())
    assert chunk.actions.shape == (policy.horizon, policy.action_dim) == (50, 14)
    assert chunk.actions.dtype == np.float64
    assert chunk.normalized is not None and chunk.normalized.shape == (50, 32)
    assert (chunk.stamp_s, chunk.dt_s, chunk.instruction) == (12.5, 0.02, "wave")
    assert list(chunk.timings_s) == [
        "upload", "resize", "prompt", "vision", "prefix", "denoise", "download", "postprocess"
    ]  # fmt: skip
    assert all(seconds > 0 for seconds in chunk.timings_s.values())
    assert policy.state_dim == 14 and tuple(policy.cameras) == CAMERAS


def test_actions_are_the_networks_output_unnormalised(loaded: Policy) -> None:
    """Fault: clipping, or dimensions out of order, behind the network."""
    chunk = loaded.infer(observe())
    stats = small_statistics()[ACTION]
    assert chunk.normalized is not None
    expected = (chunk.normalized[:, :14] + 1) / 2 * (stats["q99"] - stats["q01"]) + stats["q01"]
    np.testing.assert_allclose(chunk.actions, expected, atol=1e-5)


def test_what_the_network_is_given(loaded: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault: cameras in the order of the observation, not of the network; noise not drawn."""
    seen: list[SampleInputs] = []

    def sample(inputs: SampleInputs, mark: Mark) -> torch.Tensor:
        seen.append(inputs)
        return torch.zeros(1, 50, 32)

    monkeypatch.setattr(loaded.sampler, "sample", sample)
    grey = {
        "cam_right_wrist": np.full((112, 112, 3), 255, np.uint8),
        "cam_high": np.full((112, 112, 3), 51, np.uint8),
    }
    loaded.infer(observe(images=grey))
    inputs = seen[0]
    assert inputs.present == (True, False, True)
    values = inputs.images[0, :, 0, 0, 0].tolist()
    assert values == pytest.approx([-0.6, -1.0, 1.0], abs=1e-6)
    assert inputs.images.shape == (1, 3, 3, 112, 112)
    assert inputs.tokens.ids.shape == inputs.tokens.mask.shape == (96,)
    assert isinstance(loaded.sampler, EagerSampler)
    assert inputs.state is None and len(loaded.sampler.schedule.times) == 4
    assert inputs.noise.shape == (1, 50, 32)
    assert 0.8 < inputs.noise.std() < 1.2


def test_the_seed_repeats_a_series(checkpoint: Path) -> None:
    """Fault: evaluation runs that cannot be repeated; or the same noise in every chunk."""
    series = []
    for seed in (7, 7, 8):
        policy = load(checkpoint, seed=seed)
        series.append([policy.infer(observe()).actions for _ in range(2)])
    np.testing.assert_array_equal(series[0], series[1])
    assert not np.array_equal(series[0], series[2])
    assert not np.array_equal(series[0][0], series[0][1])


def make_pi0(folder: Path) -> None:
    """Turn the checkpoint into a π0."""
    mapping = {"VISUAL": "IDENTITY", "STATE": "MEAN_STD", "ACTION": "MEAN_STD"}
    config = replace(small_config(), kind="pi0", normalization_mapping=mapping)
    torch.manual_seed(0)
    save_model(Pi0(config), folder)
    write_processing(folder, config, {STATE: STATS, ACTION: STATS})


@pytest.mark.parametrize("kind", ["pi05", "pi0"])
def test_a_batch_gives_what_each_observation_gives_alone(copied: Path, kind: str) -> None:
    """Also with a camera missing in one of them, and prompts of other lengths."""
    if kind == "pi0":
        make_pi0(copied)
    one = observe()
    images = {name: image for name, image in one.images.items() if name != "cam_high"}
    many = [one, observe(instruction="touch the red cube", stamp_s=2.0, images=images), one]
    alone = load(copied, seed=3)
    expected = [alone.infer(observation) for observation in many]
    found = load(copied, seed=3).infer_batch(many)
    for batched, single in zip(found, expected, strict=True):
        np.testing.assert_allclose(batched.actions, single.actions, atol=2e-5)
        assert (batched.stamp_s, batched.instruction) == (single.stamp_s, single.instruction)
    bad = observe(state=np.full(14, np.nan))
    with pytest.raises(ValueError, match="is nan"):
        alone.infer_batch([one, bad])


def test_pi0_reads_the_continuous_state(copied: Path) -> None:
    """Fault: π0 without its state, or with one that is not normalised."""
    make_pi0(copied)
    policy = load(copied, seed=0)
    assert policy.description.startswith("π0, ")
    seen: list[torch.Tensor] = []
    policy.model.state_proj.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    chunk = policy.infer(observe())
    np.testing.assert_allclose(seen[0][0, :14], (STATE_0 - 0.2) / 0.7, rtol=1e-5, atol=1e-6)
    assert (seen[0][0, 14:] == 0).all()
    assert chunk.normalized is not None
    np.testing.assert_allclose(chunk.actions, chunk.normalized[:, :14] * 0.7 + 0.2, atol=1e-5)


def test_openpi_checkpoint_in_openpis_order(copied: Path) -> None:
    """Fault: un-normalise, make absolute, flip: in another order each gives another pose."""
    for path in copied.glob("policy_p*"):
        path.unlink()
    (copied / "pi05_ros.json").unlink()
    (copied / "assets" / "trossen").mkdir(parents=True)
    (copied / "assets" / "trossen" / "norm_stats.json").write_text(
        json.dumps({"norm_stats": {"state": STATS, "actions": STATS}})
    )
    policy = load(copied)
    chunk = policy.infer(observe())
    assert chunk.normalized is not None
    robot = NAMED["aloha"]
    actions = (chunk.normalized[:, :14].astype(np.float64) + 1) / 2 * (3.5 + 1e-6) - 1.5
    joints = [i for i in range(14) if i not in (6, 13)]
    actions[:, joints] += robot.decode_state(STATE_0)[joints]
    np.testing.assert_allclose(chunk.actions, robot.encode_action(actions), atol=1e-9)


def test_lerobots_relative_actions(copied: Path) -> None:
    """Fault: actions relative to the state sent as absolute ones: a jump towards zero."""
    (copied / "pi05_ros.json").unlink()
    path = copied / "policy_preprocessor.json"
    document = json.loads(path.read_text())
    step = next(s for s in document["steps"] if s["registry_name"] == "relative_actions_processor")
    step["config"]["enabled"] = True
    path.write_text(json.dumps(document))
    policy = load(copied)
    chunk = policy.infer(observe())
    assert chunk.normalized is not None
    relative = policy.processing.action.unnormalize(chunk.normalized[:, :14])
    np.testing.assert_allclose(chunk.actions, relative + STATE_0, atol=1e-6)


def test_pictures_are_turned_for_robots_that_need_it(copied: Path) -> None:
    """Fault: LIBERO's pictures upside down, or turned by one axis alone."""
    cameras = {name: name for name in CAMERAS}
    (copied / "pi05_ros.json").unlink()
    robot = {"base": "aloha", "signs": [], "gripper_map": "linear", "delta_mask": []}
    turned = load(copied, robot={**robot, "cameras": cameras, "rotated_cameras": ["cam_high"]})
    plain = load(copied, robot={**robot, "cameras": cameras})
    images = dict(observe().images)
    given, _ = turned._prepare_images(observe(), no_mark)
    images["cam_high"] = np.ascontiguousarray(images["cam_high"][::-1, ::-1])
    expected, _ = plain._prepare_images(observe(images=images), no_mark)
    assert torch.equal(given, expected)
    assert not torch.equal(given, plain._prepare_images(observe(), no_mark)[0])


@pytest.mark.parametrize("how", ["settings", "pipeline"])
def test_a_prompt_without_state(copied: Path, how: str) -> None:
    """Fault: openpi's pi05_libero given numbers in the prompt that it was never trained with."""
    if how == "settings":
        _edit("pi05_ros.json", lambda s: s.update(state_in_prompt=False))(copied)
    else:
        name = "pi05_prepare_state_tokenizer_processor_step"
        _edit(
            "policy_preprocessor.json",
            lambda d: d.update(steps=[s for s in d["steps"] if s["registry_name"] != name]),
        )(copied)
    policy = load(copied)
    tokens = policy._tokenize("wave", np.zeros(14))
    assert policy._tokenizer.decode(tokens) == "wave\n"


def test_an_instruction_without_room_for_the_state_is_refused(loaded: Policy) -> None:
    """Fault: the state cut from the prompt's end, so that three states gave equal actions."""
    loaded.check_instruction("wave")
    for refused in (loaded.check_instruction, lambda text: loaded.infer(observe(instruction=text))):
        with pytest.raises(
            ValueError, match="needs 143 tokens with the state, the network takes 9"
        ):
            refused("é" * 60)
        with pytest.raises(ValueError, match="shorten the instruction '🙂"):
            refused("🙂" * 24)
    assert loaded.truncated_tokens == 0


@given(st.text(max_size=60), st.lists(st.floats(-2, 2), min_size=14, max_size=14))
def test_what_the_check_accepts_keeps_its_state(
    loaded: Policy, instruction: str, state: list[float]
) -> None:
    """Fault: a check that promises room, and a state that still loses its end."""
    try:
        loaded.check_instruction(instruction)
    except ValueError:
        return
    tokens = loaded._tokenize(instruction, np.array(state))
    bins = " ".join(str(value) for value in discretize(state))
    assert loaded._tokenizer.decode(tokens).endswith(f", State: {bins};\nAction: ")


def test_an_instruction_is_checked_while_another_thread_infers(loaded: Policy) -> None:
    """Fault: one tokenizer in two threads, "Already borrowed"."""
    done = threading.Event()
    checks: list[BaseException | None] = []

    def check() -> None:
        while not done.is_set():
            try:
                loaded.check_instruction("lift the cube")
                checks.append(None)
            except BaseException as error:
                checks.append(error)

    thread = threading.Thread(target=check)
    thread.start()
    for _ in range(3):
        loaded.infer(observe())
    done.set()
    thread.join()
    assert checks and set(checks) == {None}


def test_a_prompt_without_state_is_cut_with_a_warning(
    copied: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """openpi's rule, where no state is lost; faults: no word of it, or one in every cycle."""
    _edit("pi05_ros.json", lambda s: s.update(state_in_prompt=False))(copied)
    policy = load(copied)
    policy.check_instruction("é" * 60)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            policy.infer(observe(instruction="é" * 60))
    assert policy.truncated_tokens == 120 + 2 - 96
    assert len(caplog.records) == 1 and "was cut" in caplog.text
    policy.infer(observe())
    assert policy.truncated_tokens == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"images": {"cam_low": np.zeros((4, 4, 3), np.uint8)}},
            "unknown camera 'cam_low'.*cam_hi",
        ),
        ({"images": {"cam_high": np.zeros((4, 4, 3))}}, "camera 'cam_high': needs uint8"),
        ({"images": {"cam_high": np.zeros((4, 4), np.uint8)}}, "camera 'cam_high': needs shape"),
        ({"state": np.zeros(7)}, r"shape \[14\] for robot 'aloha', got \[7\]"),
        ({"state": np.zeros((1, 14))}, r"shape \[14\]"),
        ({"state": np.where(np.arange(14) == 3, np.nan, 0.0)}, r"state\[3\] is nan"),
        ({"state": np.where(np.arange(14) == 5, np.inf, 0.0)}, r"state\[5\] is inf"),
    ],
)
def test_bad_observations_are_named(loaded: Policy, changes: dict[str, Any], message: str) -> None:
    """Fault: a chunk predicted from nonsense."""
    with pytest.raises(ValueError, match=message):
        loaded.infer(observe(**changes))


@pytest.mark.parametrize("delta_actions", [False, True])
def test_a_prefix_is_anchored_to_the_present_state(loaded: Policy, delta_actions: bool) -> None:
    """Fault: an old chunk's relative actions merged relative to a state that is over."""
    robot = NAMED["aloha"].with_conventions(delta_actions=delta_actions)
    processing = replace(
        loaded.processing, action=Normalizer("action", "QUANTILES", STATS, robot.action_dim)
    )
    policy = Policy(loaded.model, robot, processing, loaded._tokenizer, loaded._cameras)
    actions = np.linspace(0.1, 0.8, 4)[:, None] * np.ones(14)
    for state in (STATE_0, STATE_0 + 0.4):
        decoded = robot.decode_state(state)
        guide = policy._guide(ActionPrefix(actions, 2), decoded)
        assert guide is not None
        np.testing.assert_allclose(
            policy._postprocess(guide.target[0, :4].numpy(), decoded), actions, atol=1e-5
        )


def test_a_chunk_continues_its_prefix(loaded: Policy) -> None:
    """Fault: a scheduler that relies on guidance gets an unguided chunk."""
    before = loaded.infer(observe())
    prefix = ActionPrefix(before.actions[5:] + 0.3, 5)
    error = {}
    for name, wanted in (("free", None), ("guided", prefix)):
        chunk = loaded.infer(observe(), wanted)
        error[name] = np.abs(chunk.actions[:5] - prefix.actions[:5]).mean()
    assert error["guided"] < 0.5 * error["free"]
    with pytest.raises(ValueError, match=r"\[n, 14\]"):
        loaded.infer(observe(), ActionPrefix(np.zeros((4, 7)), 0))


def test_output_that_is_not_finite_is_no_chunk(
    loaded: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault: NaN in a joint command; also where un-normalising overflows."""
    broken = torch.zeros(1, 50, 32)
    broken[0, 3, 20] = float("nan")
    monkeypatch.setattr(loaded.sampler, "sample", lambda *_: broken)
    with pytest.raises(PolicyOutputError, match=r"1 values that are not finite.*step 3, .* 20"):
        loaded.infer(observe())
    huge = torch.full((1, 50, 32), 3e38)
    monkeypatch.setattr(loaded.sampler, "sample", lambda *_: huge)
    wide = Normalizer(ACTION, "QUANTILES", {"q01": [0] * 14, "q99": [9] * 14}, 14)
    monkeypatch.setattr(loaded, "processing", replace(loaded.processing, action=wide))
    with np.errstate(over="ignore"), pytest.raises(PolicyOutputError, match="un-normalised chunk"):
        loaded.infer(observe())


def _edit(name: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        document = json.loads((directory / name).read_text())
        change(document)
        (directory / name).write_text(json.dumps(document))

    return edit


def _short_statistics(directory: Path) -> None:
    stats = {key: value[:7] for key, value in small_statistics()[STATE].items()}
    write_processing(directory, small_config(), {STATE: stats, ACTION: stats})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda d: (d / "config.json").unlink(), r"no config\.json"),
        (lambda d: (d / "model.safetensors").unlink(), "has no weights"),
        (lambda d: (d / "tokenizer.json").unlink(), "has no tokenizer"),
        (lambda d: (d / "policy_preprocessor.json").unlink(), "no normalisation statistics"),
        (_short_statistics, r"observation\.state\.q01 has shape \[7\], the robot needs 14"),
        (
            _edit("config.json", lambda c: c["output_features"]["action"].update(shape=[8])),
            "action_dim 14, the checkpoint 8",
        ),
        (
            _edit(
                "config.json",
                lambda c: c["input_features"].update(
                    {
                        "observation.images.top": c["input_features"].pop(
                            "observation.images.cam_high"
                        )
                    }
                ),
            ),
            "no match for camera cam_high among the checkpoint's top",
        ),
        (_edit("pi05_ros.json", lambda s: s.update(robot="generic")), "is for robot 'generic'"),
    ],
)
def test_checkpoints_that_do_not_fit_are_named(
    copied: Path, edit: Callable[[Path], None], message: str
) -> None:
    """Fault: found out while the robot moves."""
    edit(copied)
    with pytest.raises(CheckpointError, match=message):
        load(copied)


def test_wrong_arguments_are_named(checkpoint: Path, tmp_path: Path) -> None:
    """Fault: a hub name taken for a folder, a device that is not there, a typo in the robot."""
    with pytest.raises(
        CheckpointError, match=r"no_such_folder is not a folder here, nor a Hugging"
    ):
        Policy.from_pretrained("no_such_folder")
    with pytest.raises(CheckpointError, match="is a file"):
        Policy.from_pretrained(checkpoint / "config.json", device="cpu")
    with pytest.raises(ValueError, match="unknown robot 'alhoa'"):
        load(checkpoint, robot="alhoa")
    with pytest.raises(ValueError, match="unknown device 'gpu'"):
        Policy.from_pretrained(checkpoint, device="gpu")
    with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16, not float16"):
        load(checkpoint, dtype="float16")
    with pytest.raises(ValueError, match="num_steps must be at least 1"):
        Policy.from_pretrained(checkpoint, device="cpu", num_steps=0)


def test_bfloat16_is_close(checkpoint: Path) -> None:
    """Fault: a dtype that is accepted and ignored, or a stage that overflows in it."""
    exact = Policy.from_pretrained(checkpoint, device="cpu", num_steps=5, seed=0)
    rounded = Policy.from_pretrained(
        checkpoint, device="cpu", num_steps=5, seed=0, dtype="bfloat16"
    )
    assert "bfloat16" in rounded.description
    difference = rounded.infer(observe()).actions - exact.infer(observe()).actions
    assert 0 < np.abs(difference).max() < 0.2


def test_small_is_a_name() -> None:
    """Fault: the demo's checkpoint not found."""
    assert ", trained (" in Policy.from_pretrained("small", device="cpu").description
