"""All of a checkpoint but its weights, brought together with a robot.

Where a checkpoint lies: a folder, the small one of this package, or a Hugging Face id.

An id may pin a revision: `owner/name@revision`, where a commit hash is the one that cannot change.
What is in the cache is used without a connection. Pickles are never fetched.


The tokenizer's files are looked at before the library that loads them.

It follows any path that opens, and takes a token added to the vocabulary 20 times as long as one
that is part of it: 600,000 of them take half a minute.


The small network that comes with the package: π0.5 with 4 million parameters.

Every part and file is that of a full checkpoint; only the sizes are small. It was trained by
`pi05 train config/train_small.yaml` on demonstrations in the simulator; its model card is beside
its weights.


Loading and saving checkpoints under LeRobot's tensor names, strictly.

Sources: LeRobot 0.6.1 `modeling_pi05.py` (names with `model.` before them); openpi's
`convert_jax_model_to_pytorch.py` (the same names without it). LeRobot loads what fits and goes on
with random weights for the rest; here every tensor must be there, fit, and be finite.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from pi05_ros.policy.config import (
    CONFIG_FILE,
    PolicyConfig,
    read_config,
)
from pi05_ros.policy.model import Pi0, parameter_dtype
from pi05_ros.policy.processing import Convention, Processing, convention_of, read_processing
from pi05_ros.policy.prompt import PromptTokenizer
from pi05_ros.policy.robots import Robot, Settings, make_robot, match_cameras
from pi05_ros.policy.weights import (
    BYTES_EACH,
    SINGLE_FILE,
    CheckpointError,
    MappedFile,
    TensorInfo,
    tensor_index,
)

PATTERNS = ("*.json", "*.safetensors")
HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
COMMIT = re.compile(r"[0-9a-f]{40}")
TOKENIZER_PATTERNS = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def checkpoint_folder(path: str | Path) -> Path:
    """The local folder of a checkpoint, fetched where it is a hub id that is not cached.

    Raises:
        CheckpointError: there is no such folder, and it is no id or cannot be had.
    """
    if str(path) == SMALL:
        if not (SHIPPED / "config.json").is_file():
            raise CheckpointError(
                f"{SHIPPED} is not there: the installation is not whole; repeat it"
            )
        return SHIPPED
    folder = Path(path).expanduser()
    if folder.exists():
        return folder
    match = HUB_ID.fullmatch(str(path))
    if match is None:
        raise CheckpointError(
            f"{path} is not a folder here, nor a Hugging Face id such as owner/name or "
            f'owner/name@revision; "{SMALL}" is the small network of this package'
        )
    repo, revision = match["repo"], match["revision"]
    if revision and COMMIT.fullmatch(revision):
        # A commit cannot change, so the cached one needs no question to the hub.
        cached = _snapshot(repo, revision, PATTERNS, local=True)
        if isinstance(cached, Path) and (cached / "config.json").is_file():
            return cached
    found = _snapshot(repo, revision, PATTERNS, local=False)
    if isinstance(found, Path):
        return found
    raise CheckpointError(
        f"{path} is not a folder here, and as a Hugging Face id it is neither cached nor can it be "
        f"fetched ({found}). Check its spelling and the connection, log in where it is gated, or "
        f"fetch it on another machine and give its folder"
    )


def cached_tokenizer(name: str) -> Path | None:
    """The cached snapshot of a hub repository with its tokenizer.json; nothing is downloaded."""
    if HUB_ID.fullmatch(name) is None:
        return None
    found = _snapshot(name, None, TOKENIZER_PATTERNS, local=True)
    if isinstance(found, Path) and (found / "tokenizer.json").is_file():
        return found
    return None


def _snapshot(
    repo: str, revision: str | None, patterns: tuple[str, ...], local: bool
) -> Path | str:
    """The snapshot's folder, or why there is none."""
    # a second of import, of use to nobody who has a folder
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                repo, revision=revision, allow_patterns=list(patterns), local_files_only=local
            )
        )
    except Exception as error:  # the hub's own, those of its HTTP client, OSError
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"


SMALL = "small"
"""The name that `Policy.from_pretrained` takes for this checkpoint."""
SHIPPED = Path(__file__).resolve().parents[1] / "checkpoints" / "small_aloha"

CAMERAS = ("cam_high", "cam_left_wrist", "cam_right_wrist")


__all__ = ["CheckpointError", "Source", "key_map", "load_model", "save_model"]

PALIGEMMA = "paligemma_with_expert.paligemma."
VISION = PALIGEMMA + "model.vision_tower.vision_model."
LANGUAGE = PALIGEMMA + "model.language_model."
EXPERT = "paligemma_with_expert.gemma_expert."
EMBEDDING = LANGUAGE + "embed_tokens.weight"
# PaliGemma's is a copy of the embedding, the expert's was never trained; neither is used.
LM_HEAD = PALIGEMMA + "lm_head.weight"
EXPERT_LM_HEAD = EXPERT + "lm_head.weight"
LISTED = 10


@dataclass(frozen=True)
class Source:
    """Where one parameter of ours lies in the file: tensors that follow one another in rows."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]


def key_map(model: Pi0) -> dict[str, Source]:
    """Our parameter names → LeRobot's, without the leading `model.`."""
    config = model.config
    size = config.sizes
    names = _vision_names(size.vis.depth) | {"embedder.weight": [EMBEDDING]}
    names |= _expert_names("experts.vlm.", LANGUAGE, size.vlm.depth, adaptive=False)
    names |= _expert_names("experts.action.", EXPERT + "model.", size.exp.depth, model.adaptive)
    names |= _projection_names(model.adaptive)
    qkv_rows = [count * size.vlm.head_dim for count in (size.vlm.heads, *[size.vlm.kv_heads] * 2)]
    sources = {}
    for ours, parameter in model.named_parameters():
        theirs = names.pop(ours)
        rows = [parameter.shape[0] // len(theirs)] * len(theirs)
        if ours.startswith("experts.") and ours.endswith("qkv.weight"):
            rows = qkv_rows
        shapes = tuple((count, *parameter.shape[1:]) for count in rows)
        sources[ours] = Source(tuple(theirs), shapes)
    if names:
        raise RuntimeError(f"mapped, but not in the network: {sorted(names)}")
    return sources


def _affine(ours: str, *theirs: str) -> dict[str, list[str]]:
    return {f"{ours}.{leaf}": [f"{name}.{leaf}" for name in theirs] for leaf in ("weight", "bias")}


def _vision_names(depth: int) -> dict[str, list[str]]:
    names = {
        "vision.position": [VISION + "embeddings.position_embedding.weight"],
        **_affine("vision.patch", VISION + "embeddings.patch_embedding"),
        **_affine("vision.post_norm", VISION + "post_layernorm"),
        **_affine("vision.projector", PALIGEMMA + "model.multi_modal_projector.linear"),
    }
    for n in range(depth):
        ours, theirs = f"vision.layers.{n}.", f"{VISION}encoder.layers.{n}."
        names |= _affine(ours + "attention_norm", theirs + "layer_norm1")
        names |= _affine(ours + "qkv", *(f"{theirs}self_attn.{part}_proj" for part in "qkv"))
        names |= _affine(ours + "out", theirs + "self_attn.out_proj")
        names |= _affine(ours + "mlp_norm", theirs + "layer_norm2")
        names |= _affine(ours + "up", theirs + "mlp.fc1")
        names |= _affine(ours + "down", theirs + "mlp.fc2")
    return names


def _expert_names(ours: str, theirs: str, depth: int, adaptive: bool) -> dict[str, list[str]]:
    names = {}
    norms = {}
    for n in range(depth):
        layer, their_layer = f"{ours}layers.{n}.", f"{theirs}layers.{n}."
        attention, mlp = their_layer + "self_attn.", their_layer + "mlp."
        names[layer + "qkv.weight"] = [f"{attention}{part}_proj.weight" for part in "qkv"]
        names[layer + "out.weight"] = [attention + "o_proj.weight"]
        names[layer + "gate_up.weight"] = [mlp + "gate_proj.weight", mlp + "up_proj.weight"]
        names[layer + "down.weight"] = [mlp + "down_proj.weight"]
        norms[layer + "attention_norm"] = their_layer + "input_layernorm"
        norms[layer + "mlp_norm"] = their_layer + "post_attention_layernorm"
    norms[ours + "final_norm"] = theirs + "norm"
    if adaptive:
        # One matrix holds all, in the order in which Expert.modulations gives them out.
        return names | _affine(ours + "modulation", *(f"{norm}.dense" for norm in norms.values()))
    return names | {f"{norm}.weight": [f"{their}.weight"] for norm, their in norms.items()}


def _projection_names(adaptive: bool) -> dict[str, list[str]]:
    """The projections around the action expert, which both sides call the same."""
    time = (
        ("time_mlp_in", "time_mlp_out")
        if adaptive
        else ("state_proj", "action_time_mlp_in", "action_time_mlp_out")
    )
    names: dict[str, list[str]] = {}
    for name in ("action_in_proj", "action_out_proj", *time):
        names |= _affine(name, name)
    return names


def load_model(
    directory: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Pi0:
    """Load π0.5 or π0 from a folder with config.json and safetensors weights.

    Args:
        directory: LeRobot's or openpi's (PyTorch) layout, one file or shards.
        device: where the parameters go; they are allocated there once.
        dtype: float32 or bfloat16; the module `model` says which parts stay in float32.

    Returns:
        The network in evaluation mode; its `config` is what `read_config` gives.

    Raises:
        CheckpointError: not a checkpoint, or its tensors are missing, unexpected, of another
            shape, or not finite; the message lists them.
        ValueError: another dtype.
    """
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"dtype must be torch.float32 or torch.bfloat16, not {dtype}")
    config = read_config(directory)
    index = network_tensors(directory)
    check_depth(config, len(index), directory)
    with torch.device("meta"):
        model = Pi0(config)
    sources = key_map(model)
    check_tensors(directory, sources, index)
    model.load_state_dict(
        _read_parameters(directory, model, sources, index, device, dtype), assign=True
    )
    return model.eval()


def _read_parameters(
    directory: str | Path,
    model: Pi0,
    sources: dict[str, Source],
    index: dict[str, TensorInfo],
    device: str | torch.device,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    parameters: dict[str, Tensor] = {}
    broken: list[str] = []
    with ExitStack() as stack:
        files = {
            file: stack.enter_context(MappedFile(file))
            for file in sorted({info.file for info in index.values()})
        }
        for ours, source in sources.items():
            # One allocation in the final place: fused parts and other dtypes are copied into it.
            shape = model.get_parameter(ours).shape
            whole = torch.empty(shape, dtype=parameter_dtype(ours, dtype), device=device)
            rows = [part_shape[0] for part_shape in source.shapes]
            for name, part in zip(source.names, whole.split(rows), strict=True):
                if not files[index[name].file].copy_to(part, index[name]):
                    broken.append(name)
            parameters[ours] = whole
    if broken:
        raise CheckpointError(f"{directory}: {listed('not finite', broken)}")
    return parameters


def save_model(model: Pi0, directory: str | Path) -> None:
    """Write config.json and model.safetensors as LeRobot names them, both language heads included.

    Each file appears whole or not at all. Tensors keep the dtype that they have in the model, but
    for the image tower and the projector, which LeRobot has in float32 in any case.
    """
    path = Path(directory)
    path.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    state = model.state_dict()
    for ours, source in key_map(model).items():
        tensor = state[ours].detach().cpu()
        if ours.startswith("vision."):
            tensor = tensor.float()
        parts = tensor.split([shape[0] for shape in source.shapes])
        tensors |= {
            f"model.{name}": part.contiguous()
            for name, part in zip(source.names, parts, strict=True)
        }
    # LeRobot takes a file without these two for incomplete.
    embedding = tensors["model." + EMBEDDING]
    tensors["model." + LM_HEAD] = embedding.clone()
    tensors["model." + EXPERT_LM_HEAD] = embedding.new_zeros(
        len(embedding), model.config.sizes.exp.width
    )
    partial = path / (SINGLE_FILE + ".partial")
    save_file(tensors, partial, metadata={"format": "pt"})
    partial.replace(path / SINGLE_FILE)
    partial = path / (CONFIG_FILE + ".partial")
    dtype = "bfloat16" if model.experts.vlm.dtype == torch.bfloat16 else "float32"
    document = model.config.to_json() | {"dtype": dtype}
    partial.write_text(json.dumps(document, indent=2) + "\n", "utf-8")
    partial.replace(path / CONFIG_FILE)


def network_tensors(directory: str | Path) -> dict[str, TensorInfo]:
    """The file's tensors by LeRobot's names without `model.`, less what no network uses."""
    index: dict[str, TensorInfo] = {}
    for name, info in tensor_index(directory).items():
        bare = name.removeprefix("model.")
        if bare in index:
            raise CheckpointError(f"{directory} holds {bare!r} twice, with and without 'model.'")
        index[bare] = info
    head = index.pop(LM_HEAD, None)
    index.pop(EXPERT_LM_HEAD, None)
    if EMBEDDING not in index and head is not None:
        # Converted files hold the tied pair under the language head's name alone.
        index[EMBEDDING] = head
    return index


def check_depth(config: PolicyConfig, most: int, directory: str | Path) -> None:
    """Raise CheckpointError before somebody builds millions of layers."""
    size = config.sizes
    depth = max(size.vlm.depth, size.exp.depth, size.vis.depth)
    if depth > most:
        raise CheckpointError(f"{directory} asks for {depth} layers, and has tensors for {most}")


def check_tensors(
    directory: str | Path, sources: dict[str, Source], index: dict[str, TensorInfo]
) -> None:
    """Raise CheckpointError where names, shapes or types are not those that `sources` need."""
    expected = {
        name: shape
        for source in sources.values()
        for name, shape in zip(source.names, source.shapes, strict=True)
    }
    both = [name for name in expected if name in index]
    problems = {
        "missing": [name for name in expected if name not in index],
        "unexpected": [name for name in index if name not in expected],
        "of another shape": [
            f"{name} {list(index[name].shape)} instead of {list(expected[name])}"
            for name in both
            if index[name].shape != expected[name]
        ],
        "not floating-point": [
            f"{name} {index[name].dtype}" for name in both if index[name].dtype not in BYTES_EACH
        ],
    }
    found = [listed(what, names) for what, names in problems.items() if names]
    if found:
        raise CheckpointError(f"{directory} does not fit its config.json: " + "; ".join(found))


def listed(what: str, names: Sequence[str]) -> str:
    """How many, and the first of them."""
    more = f", and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return f"{len(names)} {what}: {', '.join(names[:LISTED])}{more}"


RobotSource = str | Path | Mapping[str, Any]
"""A robot's name, the path of its YAML description, or a mapping of the same keys."""


@dataclass(frozen=True)
class Opened:
    """A checkpoint that fits a robot, as far as its small files tell."""

    directory: Path
    config: PolicyConfig
    settings: Settings
    convention: Convention
    robot: Robot
    processing: Processing
    cameras: Mapping[str, str]
    """The robot's camera name → the network's."""

    def tokenizer(self) -> PromptTokenizer:
        """The folder's tokenizer, or PaliGemma's from the hub cache.

        Raises:
            CheckpointError: neither is there, or it is damaged.
        """
        return open_tokenizer(self.directory, self.config, self.processing.tokenizer)


def open_tokenizer(directory: Path, config: PolicyConfig, name: str) -> PromptTokenizer:
    """See `Opened.tokenizer`; `name` is the hub's name of the tokenizer."""
    folder = directory
    if not (directory / "tokenizer.json").is_file():
        folder = cached_tokenizer(name) or directory
    return PromptTokenizer.from_directory(folder, config.token_length, config.sizes.vocab)


def open_checkpoint(path: str | Path, robot: RobotSource) -> Opened:
    """Read everything but the weights.

    Raises:
        CheckpointError: not a usable checkpoint, or one that does not fit the robot.
    """
    directory = checkpoint_folder(path)
    config = read_config(directory)
    settings = Settings.read(directory)
    convention = convention_of(directory)
    try:
        body = make_robot(robot, config, convention, settings)
        processing = read_processing(directory, config, body.state_dim, body.action_dim)
        rename = {**processing.rename, **settings.cameras}
        cameras = match_cameras(body.cameras, config.cameras, rename)
        body = heed_files(body, processing, settings)
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{directory}: {error}") from None
    return Opened(directory, config, settings, convention, body, processing, cameras)


def heed_files(robot: Robot, processing: Processing, settings: Settings) -> Robot:
    """What LeRobot's files say of deltas and prompt comes before what the robot usually has."""
    if processing.delta_mask is not None and settings.delta_actions is None:
        robot = replace(robot, delta_mask=processing.delta_mask)
    candidates = (settings.state_in_prompt, processing.state_in_prompt, robot.state_in_prompt)
    said = [value for value in candidates if value is not None]
    return replace(robot, state_in_prompt=said[0] if said else True)
