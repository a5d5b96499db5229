"""Convert openpi's JAX checkpoints (orbax, a folder params/) to safetensors.

    python -m pi05_lab.data.openpi_jax CHECKPOINT OUTPUT [--horizon 50] [--dtype float32]
        [--cameras base_0_rgb base_1_rgb wrist_0_rgb]

Sources: openpi `gemma.py`, `gemma_fast.py`, `siglip.py`, `pi0.py` and `pi0_fast.py` for the
parameter tree, and `convert_jax_model_to_pytorch.py` for the tensor names. orbax stores each array
as zarr in an OCDBT store, which tensorstore reads without JAX (extra `openpi`). One stacked array
is in memory at a time, at most 4.8 GB for π0.5 in float32.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pi05_lab.files import atomic_file
from pi05_ros.policy import checkpoint as lerobot
from pi05_ros.policy import config as policy_config
from pi05_ros.policy.config import IMAGE_PREFIX, GemmaSize, PolicyConfig
from pi05_ros.policy.model import Pi0
from pi05_ros.policy.next_token import CONFIG_KEY, FastConfig
from pi05_ros.policy.weights import SINGLE_FILE, CheckpointError, require_regular_file

Array = NDArray[Any]
IMG, LLM = "PaliGemma.img.", "PaliGemma.llm."
BLOCK = IMG + "Transformer.encoderblock."
ATTENTION = "MultiHeadDotProductAttention_0."
DTYPES = {"float32": ("F32", torch.float32), "bfloat16": ("BF16", torch.bfloat16)}
STORED_DTYPES = ("bfloat16", "float16", "float32", "float64")
CAMERAS = {
    "pi05": policy_config.DEFAULT_CAMERAS,
    "pi0": policy_config.DEFAULT_CAMERAS,
    "pi0_fast": ("base_0_rgb", "base_1_rgb", "wrist_0_rgb"),
}
"""Kind → openpi's names, in the network's order."""
MAX_LAYERS = 1000
MAX_VALUES = 2**31
"""Limit for an array; π0.5's largest has 1.2e9. tensorstore fills missing chunks with zeros."""


@contextmanager
def _named_errors(text: str) -> Iterator[None]:
    """Turn errors of tensorstore and NumPy into a CheckpointError that begins with `text`."""
    try:
        yield
    except CheckpointError:
        raise
    except (ValueError, TypeError, IndexError, ZeroDivisionError) as error:
        raise CheckpointError(f"{text}: {error}") from None


class Params:
    """The arrays of a params/ folder by their paths, joined with dots.

    All methods raise CheckpointError: tensorstore is not installed, no orbax checkpoint, an array
    that is missing, empty, not floating-point, too large or damaged.
    """

    def __init__(self, folder: Path) -> None:
        try:
            import tensorstore
        except ImportError:
            raise CheckpointError(
                f"{folder} needs tensorstore to be read: pip install 'pi05_ros[openpi]'"
            ) from None
        self.folder = folder
        self._tensorstore = tensorstore
        base = {"driver": "file", "path": f"{folder.resolve()}/"}
        self._store = {"driver": "ocdbt", "base": base}
        with _named_errors(f"{folder} is not an orbax checkpoint"):
            keys = tensorstore.KvStore.open(self._store).result().list().result()
        paths = [key.decode().removesuffix("/.zarray") for key in keys if key.endswith(b"/.zarray")]
        self._paths = {path.removeprefix("params.").removesuffix(".value"): path for path in paths}
        if not self._paths:
            raise CheckpointError(f"{folder} is not an orbax checkpoint: it holds no arrays")
        self._open: dict[str, Any] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._paths

    def shape(self, name: str) -> tuple[int, ...]:
        """The array's shape, without reading it."""
        shape = tuple(int(n) for n in self._array(name).shape)
        if 0 in shape:
            raise CheckpointError(f"{self.folder}: {name} is empty, {list(shape)}")
        return shape

    def read(self, name: str) -> Array:
        """The whole array, as float32."""
        array = self._array(name)
        if array.dtype.name not in STORED_DTYPES or math.prod(array.shape) > MAX_VALUES:
            raise CheckpointError(
                f"{self.folder}: {name} is {array.dtype.name} {list(array.shape)}, must be floats, "
                f"{MAX_VALUES} at most"
            )
        with _named_errors(f"{self.folder}: {name} cannot be read"):
            return np.asarray(array.read().result()).astype(np.float32, copy=False)

    def _array(self, name: str) -> Any:
        if name not in self._paths:
            raise CheckpointError(
                f"{self.folder} has no {name}: it is not π0's, π0.5's or π0-FAST's"
            )
        if name not in self._open:
            spec = {"driver": "zarr", "kvstore": {**self._store, "path": self._paths[name]}}
            with _named_errors(f"{self.folder}: {name} cannot be read"):
                self._open[name] = self._tensorstore.open(spec).result()
        return self._open[name]


def config_from_shapes(
    params: Params, horizon: int, cameras: Sequence[str] | None = None
) -> PolicyConfig:
    """Kind and sizes, which only the shapes record; horizon and cameras are in no array."""
    kind = "pi05" if "time_mlp_in.kernel" in params else "pi0"
    if f"{LLM}layers.attn.q_einsum_1.w" not in params and "action_in_proj.kernel" not in params:
        kind = "pi0_fast"
    with _named_errors(f"{params.folder}: no network has such shapes"):
        side, _, _, width = params.shape(IMG + "embedding.kernel")
        depth, _, mlp = params.shape(BLOCK + "MlpBlock_0.Dense_0.kernel")
        heads = params.shape(BLOCK + ATTENTION + "query.kernel")[2]
        patches = params.shape(IMG + "pos_embedding")[1]
        vlm = _gemma_size(params, "")
        # what an expert beside it would be; π0-FAST has none
        unused = policy_config.Sizes().exp
        absent = replace(vlm, width=unused.width, mlp_dim=unused.mlp_dim)
        sizes = policy_config.Sizes(
            vlm=vlm,
            exp=absent if kind == "pi0_fast" else _gemma_size(params, "_1"),
            vis=policy_config.VisionSize(width, depth, heads, mlp),
            vocab=params.shape(LLM + "embedder.input_embedding")[0],
            image=math.isqrt(patches) * side,
            patch=side,
        )
        names = cameras or CAMERAS[kind]
        features = {IMAGE_PREFIX + name: {"type": "VISUAL"} for name in names}
        document: dict[str, Any] = {"chunk_size": horizon, "input_features": features}
        if kind == "pi0_fast":
            document[CONFIG_KEY] = vars(FastConfig("openpi"))
        else:
            dim = params.shape("action_in_proj.kernel")[0]
            document |= {"max_action_dim": dim, "max_state_dim": dim}
        return replace(policy_config.parse_config(document, kind), sizes=sizes)


def _gemma_size(params: Params, suffix: str) -> GemmaSize:
    depth, heads, width, head_dim = params.shape(f"{LLM}layers.attn.q_einsum{suffix}.w")
    kv_heads = params.shape(f"{LLM}layers.attn.kv_einsum{suffix}.w")[2]
    mlp = params.shape(f"{LLM}layers.mlp{suffix}.linear")[1]
    return GemmaSize(width, depth, mlp, heads, kv_heads, head_dim)


def tensors(params: Params, config: PolicyConfig) -> Iterator[tuple[str, Array]]:
    """LeRobot's names without `model.` and their tensors, one after the other."""
    adaptive = config.kind == "pi05"
    yield from _vision_tensors(params)
    yield lerobot.EMBEDDING, params.read(LLM + "embedder.input_embedding")
    yield from _gemma_tensors(params, "", lerobot.LANGUAGE, adaptive=False)
    if not config.has_expert:
        return
    yield from _gemma_tensors(params, "_1", lerobot.EXPERT + "model.", adaptive)
    for name in lerobot.projection_names(adaptive):
        yield from _linear(params, name, name)


def _linear(params: Params, theirs: str, ours: str) -> Iterator[tuple[str, Array]]:
    yield ours + ".weight", params.read(theirs + ".kernel").T
    yield ours + ".bias", params.read(theirs + ".bias")


def _split_heads(array: Array) -> Array:
    """[width, heads, head_dim] → [heads · head_dim, width]."""
    return array.reshape(len(array), -1).T


def _head_rows(array: Array) -> Array:
    """[heads, width, head_dim] → [heads · head_dim, width]."""
    return array.transpose(0, 2, 1).reshape(-1, array.shape[1])


def _join_heads(array: Array) -> Array:
    """[heads, head_dim, width] → [width, heads · head_dim]."""
    return array.reshape(-1, array.shape[-1]).T


VISION_LAYER: tuple[tuple[str, str, Callable[[Array], Array]], ...] = (
    ("LayerNorm_0.scale", "layer_norm1", np.asarray),
    ("LayerNorm_1.scale", "layer_norm2", np.asarray),
    ("MlpBlock_0.Dense_0.kernel", "mlp.fc1", np.transpose),
    ("MlpBlock_0.Dense_1.kernel", "mlp.fc2", np.transpose),
    (ATTENTION + "query.kernel", "self_attn.q_proj", _split_heads),
    (ATTENTION + "key.kernel", "self_attn.k_proj", _split_heads),
    (ATTENTION + "value.kernel", "self_attn.v_proj", _split_heads),
    (ATTENTION + "out.kernel", "self_attn.out_proj", _join_heads),
)
"""openpi's array of all layers beside its bias, LeRobot's module, and a layer's conversion."""


def _vision_tensors(params: Params) -> Iterator[tuple[str, Array]]:
    ours = lerobot.VISION
    patch = params.read(IMG + "embedding.kernel").transpose(3, 2, 0, 1)
    yield ours + "embeddings.patch_embedding.weight", patch
    yield ours + "embeddings.patch_embedding.bias", params.read(IMG + "embedding.bias")
    position = params.read(IMG + "pos_embedding")[0]
    yield ours + "embeddings.position_embedding.weight", position
    yield ours + "post_layernorm.weight", params.read(IMG + "Transformer.encoder_norm.scale")
    yield ours + "post_layernorm.bias", params.read(IMG + "Transformer.encoder_norm.bias")
    projector = lerobot.PALIGEMMA + "model.multi_modal_projector.linear"
    yield from _linear(params, IMG + "head", projector)
    for theirs, module, change in VISION_LAYER:
        for n, array in enumerate(params.read(BLOCK + theirs)):
            yield f"{ours}encoder.layers.{n}.{module}.weight", change(array)
        for n, array in enumerate(params.read(BLOCK + theirs.rpartition(".")[0] + ".bias")):
            yield f"{ours}encoder.layers.{n}.{module}.bias", array.ravel()


def _gemma_tensors(
    params: Params, suffix: str, ours: str, adaptive: bool
) -> Iterator[tuple[str, Array]]:
    def stacked(array: str) -> Iterator[tuple[str, Array]]:
        for n, part in enumerate(params.read(f"{LLM}layers.{array}")):
            yield f"{ours}layers.{n}.", part

    for layer, array in stacked(f"attn.q_einsum{suffix}.w"):
        yield layer + "self_attn.q_proj.weight", _head_rows(array)
    for layer, array in stacked(f"attn.kv_einsum{suffix}.w"):
        yield layer + "self_attn.k_proj.weight", _head_rows(array[0])
        yield layer + "self_attn.v_proj.weight", _head_rows(array[1])
    for layer, array in stacked(f"attn.attn_vec_einsum{suffix}.w"):
        yield layer + "self_attn.o_proj.weight", _join_heads(array)
    for layer, array in stacked(f"mlp{suffix}.gating_einsum"):
        yield layer + "mlp.gate_proj.weight", array[0].T
        yield layer + "mlp.up_proj.weight", array[1].T
    for layer, array in stacked(f"mlp{suffix}.linear"):
        yield layer + "mlp.down_proj.weight", array.T
    leaves = {"weight": "scale"}
    if adaptive:
        leaves = {"dense.weight": "Dense_0.kernel", "dense.bias": "Dense_0.bias"}
    for leaf, stored in leaves.items():
        for layer, array in stacked(f"pre_attention_norm{suffix}.{stored}"):
            yield f"{layer}input_layernorm.{leaf}", array.T
        for layer, array in stacked(f"pre_ffw_norm{suffix}.{stored}"):
            yield f"{layer}post_attention_layernorm.{leaf}", array.T
        yield f"{ours}norm.{leaf}", params.read(f"{LLM}final_norm{suffix}.{stored}").T


def convert(
    directory: Path,
    output: Path,
    horizon: int = 50,
    dtype: str = "float32",
    cameras: Sequence[str] | None = None,
) -> PolicyConfig:
    """Write config.json, model.safetensors and openpi's assets to `output`.

    CheckpointError if this is no orbax checkpoint of openpi's, or tensorstore is missing.
    """
    folder = directory / "params" if (directory / "params").is_dir() else directory
    assets = folder.parent / "assets"
    for path in (*folder.rglob("*"), *assets.rglob("*")):
        if not path.is_dir():
            require_regular_file(path)
    params = Params(folder)
    config = config_from_shapes(params, horizon, cameras)
    lerobot.check_depth(config, MAX_LAYERS, folder)
    with atomic_file(output / SINGLE_FILE) as partial:
        _write_tensors(partial, params, config, dtype)
    document = json.dumps(config.to_json(), indent=2) + "\n"
    (output / policy_config.CONFIG_FILE).write_text(document, encoding="utf-8")
    if assets.is_dir():
        shutil.copytree(assets, output / "assets", dirs_exist_ok=True)
    return config


def _write_tensors(path: Path, params: Params, config: PolicyConfig, dtype: str) -> None:
    """Write a safetensors file one tensor at a time, in any order."""
    code, torch_dtype = DTYPES[dtype]
    with torch.device("meta"):
        sources = lerobot.key_map(Pi0(config)).values()
    shapes = {n: s for source in sources for n, s in zip(source.names, source.shapes, strict=True)}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * torch_dtype.itemsize
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    missing, folder = set(shapes), params.folder
    with path.open("wb") as file, _named_errors(f"{folder}: the arrays' dimensions are not π0's"):
        file.write(len(text).to_bytes(8, "little") + text)
        for name, array in tensors(params, config):
            if shapes.get(name) != array.shape:
                raise CheckpointError(
                    f"{folder}: {name} would be {list(array.shape)} instead of {shapes.get(name)}"
                )
            missing.remove(name)
            file.seek(8 + len(text) + header[name]["data_offsets"][0])
            values = torch.from_numpy(np.ascontiguousarray(array)).to(torch_dtype)
            file.write(values.reshape(-1).view(torch.uint8).numpy().data)
    if missing:
        raise CheckpointError(f"{folder} lacks {sorted(missing)[0]} and {len(missing) - 1} more")


def main() -> int:
    """Exit code 0, or 1 with the reason on one line."""
    parser = argparse.ArgumentParser(description="openpi's JAX checkpoint to one that loads here")
    parser.add_argument("directory", metavar="checkpoint", type=Path, help="has params/, assets/")
    parser.add_argument("output", type=Path, help="folder to write")
    parser.add_argument("--horizon", type=int, default=50, help="steps of a chunk (default: 50)")
    parser.add_argument("--cameras", nargs="+", help="in the network's order (default: openpi's)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="default: float32")
    options = parser.parse_args()
    try:
        config = convert(**vars(options))
    except CheckpointError as error:
        print(error)
        return 1
    print(f"{options.output}: {config.kind}, {config.horizon} steps")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
