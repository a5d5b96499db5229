"""Find, load and save checkpoints.

A checkpoint is a folder, the small one of this package, or a Hugging Face id, if need be with a
revision: `owner/name@revision`. Only a commit hash is a revision that cannot change. Cached files
are used without a connection; pickles are never downloaded.

Tensors have LeRobot's names (LeRobot 0.6.1 `modeling_pi05.py`, with the prefix `model.`; openpi's
`convert_jax_model_to_pytorch.py` has the same names without it). LeRobot loads the tensors that fit
and leaves the rest random; here every tensor must exist, fit, and be finite.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from pi05_ros.policy.adapters import Adapters, merge, read_adapters
from pi05_ros.policy.config import CONFIG_FILE, PolicyConfig, read_config
from pi05_ros.policy.model import Pi0
from pi05_ros.policy.weights import (
    FLOAT_DTYPES,
    SINGLE_FILE,
    CheckpointError,
    TensorInfo,
    is_finite,
    read_tensor,
    tensor_index,
)

SMALL = "small"
"""`Policy.from_pretrained`'s name of the small checkpoint: π0.5 with 4 million parameters."""
SHIPPED = Path(__file__).resolve().parents[1] / "checkpoints" / "small_aloha"
CAMERAS = ("cam_high", "cam_left_wrist", "cam_right_wrist")
"""Cameras of the small checkpoint."""

PATTERNS = ("*.json", "*.safetensors", "README.md")
TOKENIZER_PATTERNS = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
COMMIT = re.compile(r"[0-9a-f]{40}")

PALIGEMMA = "paligemma_with_expert.paligemma."
VISION = PALIGEMMA + "model.vision_tower.vision_model."
LANGUAGE = PALIGEMMA + "model.language_model."
EXPERT = "paligemma_with_expert.gemma_expert."
EMBEDDING = LANGUAGE + "embed_tokens.weight"
# Unused by the network: PaliGemma's head is a copy of the embedding, the expert's is untrained.
LM_HEAD = PALIGEMMA + "lm_head.weight"
EXPERT_LM_HEAD = EXPERT + "lm_head.weight"
MAX_NAMES = 10
"""Names of tensors in one error message."""


def checkpoint_folder(path: str | Path) -> Path:
    """The local folder of a checkpoint; a Hugging Face id that is not cached is downloaded.

    Raises:
        CheckpointError: there is no such folder, and it is no id or cannot be downloaded.
    """
    if str(path) == SMALL:
        if not (SHIPPED / CONFIG_FILE).is_file():
            raise CheckpointError(f"{SHIPPED} is missing: the installation is not whole; repeat it")
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
        # A commit cannot change: a cached one needs no request to the hub.
        cached = _snapshot(repo, revision, PATTERNS, local=True)
        if isinstance(cached, Path) and (cached / CONFIG_FILE).is_file():
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
    if isinstance(found, Path) and (found / TOKENIZER_PATTERNS[0]).is_file():
        return found
    return None


def _snapshot(
    repo: str, revision: str | None, patterns: tuple[str, ...], local: bool
) -> Path | str:
    """The snapshot's folder, or the reason why there is none."""
    # The import takes a second, and a local folder does not need it.
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                repo, revision=revision, allow_patterns=list(patterns), local_files_only=local
            )
        )
    except Exception as error:  # the hub's own, those of its HTTP client, OSError
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"


@dataclass(frozen=True)
class Source:
    """The tensors of a file that make up one parameter, stacked along their rows."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]


def key_map(model: Pi0) -> dict[str, Source]:
    """Parameter names of `model` → LeRobot's, without the prefix `model.`."""
    size = model.config.sizes
    names = _vision_names(size.vis.depth) | {"embedder.weight": [EMBEDDING]}
    names |= _expert_names("experts.vlm.", LANGUAGE, size.vlm.depth, adaptive=False)
    if model.config.has_expert:
        names |= _expert_names("experts.action.", EXPERT + "model.", size.exp.depth, model.adaptive)
        for name in projection_names(model.adaptive):
            names |= _affine(name, name)
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


def projection_names(adaptive: bool) -> list[str]:
    """The projections around the action expert of π0.5 (`adaptive`) or π0, on both sides."""
    if adaptive:
        return ["action_in_proj", "action_out_proj", "time_mlp_in", "time_mlp_out"]
    time = ["action_time_mlp_in", "action_time_mlp_out"]
    return ["action_in_proj", "action_out_proj", "state_proj", *time]


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
        # One matrix holds the modulations of all norms, in this order.
        return names | _affine(ours + "modulation", *(f"{norm}.dense" for norm in norms.values()))
    return names | {f"{norm}.weight": [f"{their}.weight"] for norm, their in norms.items()}


def load_model(
    directory: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Pi0:
    """Load π0.5, π0 or π0-FAST from a folder with config.json and safetensors weights.

    A folder of adapters is merged with the checkpoint that it names.

    Args:
        directory: LeRobot's or openpi's (PyTorch) layout, one file or shards.
        device: device of the parameters, which are allocated there once.
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
    adapters = read_adapters(Path(directory))
    start = _start_folder(Path(directory), adapters)
    index = network_tensors(start)
    check_depth(config, len(index), start)
    with torch.device("meta"):
        model = Pi0(config)
    sources = key_map(model)
    check_tensors(start, sources, index)
    if not config.has_expert:
        _check_tied(start)
    parameters: dict[str, Tensor] = {}
    broken: list[str] = []
    for ours, source in sources.items():
        # One allocation on the device: fused parts and other dtypes are copied into it.
        shape = model.get_parameter(ours).shape
        whole = torch.empty(shape, dtype=model.parameter_dtype(ours, dtype), device=device)
        rows = [part_shape[0] for part_shape in source.shapes]
        for name, part in zip(source.names, whole.split(rows), strict=True):
            part.copy_(read_tensor(index[name]))
            if not is_finite(part):
                broken.append(name)
        parameters[ours] = whole
    if adapters is not None:
        parameters = merge(parameters, adapters.tensors, adapters.scale)
        broken += [name for name, tensor in parameters.items() if not is_finite(tensor)]
    if broken:
        raise CheckpointError(f"{directory}: {summarize_names('not finite', broken)}")
    model.load_state_dict(parameters, assign=True)
    return model.eval()


def weights_folder(directory: str | Path) -> Path:
    """The folder of the network's tensors: of a folder of adapters, its start checkpoint's."""
    path = Path(directory)
    return _start_folder(path, read_adapters(path))


def _start_folder(path: Path, adapters: Adapters | None) -> Path:
    if adapters is None:
        return path
    start = checkpoint_folder(adapters.base)
    if read_adapters(start) is not None:
        raise CheckpointError(f"{path} has adapters of {start}, which has adapters itself")
    return start


def save_model(model: Pi0, directory: str | Path) -> None:
    """Write a network's weights and config.json; see `save_weights`."""
    save_weights(model.config, model.state_dict(), directory, model.experts.vlm.dtype)


def save_weights(
    config: PolicyConfig, state: Mapping[str, Tensor], directory: str | Path, dtype: torch.dtype
) -> None:
    """Write config.json and model.safetensors as LeRobot names them, both language heads included.

    Each file appears whole or not at all.

    Args:
        config: of the network.
        state: the network's state dict.
        directory: is made if need be.
        dtype: of the tensors, except that the module `model` keeps some in float32, and that the
            vision encoder and the projector are float32, as in LeRobot.
    """
    path = Path(directory)
    path.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    with torch.device("meta"):
        model = Pi0(config)
    for ours, source in key_map(model).items():
        kept = ours.startswith("vision.")
        wanted = torch.float32 if kept else model.parameter_dtype(ours, dtype)
        tensor = state[ours].detach().cpu().to(wanted)
        parts = tensor.split([shape[0] for shape in source.shapes])
        for name, part in zip(source.names, parts, strict=True):
            tensors[f"model.{name}"] = part.contiguous()
    # LeRobot rejects a file without these two as incomplete.
    embedding = tensors["model." + EMBEDDING]
    tensors["model." + LM_HEAD] = embedding.clone()
    if config.has_expert:
        head = embedding.new_zeros(len(embedding), config.sizes.exp.width)
        tensors["model." + EXPERT_LM_HEAD] = head
    _replace(path / SINGLE_FILE, lambda file: save_file(tensors, file, metadata={"format": "pt"}))
    write_config(config, path, dtype)


def write_config(config: PolicyConfig, directory: Path, dtype: torch.dtype) -> None:
    """Write config.json with the name of the weights' dtype."""
    name = "bfloat16" if dtype == torch.bfloat16 else "float32"
    text = json.dumps(config.to_json() | {"dtype": name}, indent=2) + "\n"
    _replace(directory / CONFIG_FILE, lambda file: file.write_text(text, "utf-8"))


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    partial = path.with_name(path.name + ".partial")
    write(partial)
    partial.replace(path)


def network_tensors(directory: str | Path) -> dict[str, TensorInfo]:
    """The tensors that a network uses, by LeRobot's names without `model.`.

    Raises:
        CheckpointError: see `tensor_index`; also a name with and without the prefix.
    """
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


def _check_tied(directory: Path) -> None:
    """Raise CheckpointError if a language head differs from the embedding, which stands for it."""
    index = {name.removeprefix("model."): info for name, info in tensor_index(directory).items()}
    if LM_HEAD in index and EMBEDDING in index:
        head, embedding = read_tensor(index[LM_HEAD]), read_tensor(index[EMBEDDING])
        if not torch.equal(head, embedding):
            raise CheckpointError(
                f"{directory}: {LM_HEAD} differs from {EMBEDDING}; this network has one tensor for "
                "both"
            )


def check_depth(config: PolicyConfig, limit: int, directory: str | Path) -> None:
    """Raise CheckpointError for more than `limit` layers, before millions of layers are built."""
    size = config.sizes
    depth = max(size.vlm.depth, size.exp.depth, size.vis.depth)
    if depth > limit:
        raise CheckpointError(f"{directory} asks for {depth} layers, and has tensors for {limit}")


def check_tensors(
    directory: str | Path, sources: Mapping[str, Source], index: Mapping[str, TensorInfo]
) -> None:
    """Raise CheckpointError where names, shapes or dtypes in a file differ from `sources`."""
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
            f"{name} {index[name].dtype}" for name in both if index[name].dtype not in FLOAT_DTYPES
        ],
    }
    found = [summarize_names(what, names) for what, names in problems.items() if names]
    if found:
        raise CheckpointError(f"{directory} does not fit its config.json: " + "; ".join(found))


def summarize_names(what: str, names: Sequence[str]) -> str:
    """Their number and the first of them: `2 missing: a, b`."""
    more = f", and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return f"{len(names)} {what}: {', '.join(names[:MAX_NAMES])}{more}"
