"""openpi's JAX checkpoints (orbax, a folder params/) → a folder that loads here.

    python -m pi05_lab.data.openpi_jax CHECKPOINT OUTPUT [--horizon 50] [--dtype float32]

Sources: openpi `gemma.py`, `siglip.py` and `pi0.py` for the parameter tree, and
`convert_jax_model_to_pytorch.py` for the tensors it becomes. orbax keeps each array as zarr in an
OCDBT store, which tensorstore reads without JAX (extra `openpi`). One stacked array is in memory at
a time, at most 4.8 GB of π0.5 in float32.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pi05_ros.policy.checkpoint import (
    EMBEDDING,
    EXPERT,
    LANGUAGE,
    PALIGEMMA,
    VISION,
    check_depth,
    key_map,
)
from pi05_ros.policy.config import (
    CONFIG_FILE,
    GemmaSize,
    PolicyConfig,
    Sizes,
    VisionSize,
    parse_config,
)
from pi05_ros.policy.model import Pi0
from pi05_ros.policy.weights import SINGLE_FILE, CheckpointError

Array = NDArray[Any]
IMG, LLM = "PaliGemma.img.", "PaliGemma.llm."
BLOCK = IMG + "Transformer.encoderblock."
DTYPES = {"float32": ("F32", torch.float32), "bfloat16": ("BF16", torch.bfloat16)}
STORED_DTYPES = ("bfloat16", "float16", "float32", "float64")
MAX_LAYERS = 1000
MAX_VALUES = 2**31
"""Of an array; π0.5's largest has 1.2e9. Chunks that a store lacks would be made up of zeros."""


class Params:
    """The arrays of a params/ folder by their path, joined with dots."""

    def __init__(self, folder: Path) -> None:
        """Open the store.

        Raises:
            CheckpointError: tensorstore is not installed, or the folder is no orbax checkpoint.
        """
        try:
            import tensorstore
        except ImportError:
            raise CheckpointError(
                f"{folder} needs tensorstore to be read: pip install 'pi05_ros[openpi]'"
            ) from None
        self.folder = folder
        self._tensorstore = tensorstore
        self._store = {
            "driver": "ocdbt",
            "base": {"driver": "file", "path": f"{folder.resolve()}/"},
        }
        try:
            keys = [
                key.decode()
                for key in tensorstore.KvStore.open(self._store).result().list().result()
            ]
        except ValueError as error:
            raise CheckpointError(f"{folder} is not an orbax checkpoint: {error}") from None
        paths = [key.removesuffix("/.zarray") for key in keys if key.endswith("/.zarray")]
        self._paths = {path.removeprefix("params.").removesuffix(".value"): path for path in paths}
        if not self._paths:
            raise CheckpointError(f"{folder} is not an orbax checkpoint: it holds no arrays")
        self._open: dict[str, Any] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._paths

    def shape(self, name: str) -> tuple[int, ...]:
        """The array's shape, without reading it.

        Raises:
            CheckpointError: it is not there, or empty.
        """
        shape = tuple(int(n) for n in self._array(name).shape)
        if 0 in shape:
            raise CheckpointError(f"{self.folder}: {name} is empty, {list(shape)}")
        return shape

    def read(self, name: str) -> Array:
        """The whole array, as float32.

        Raises:
            CheckpointError: it is not there, is no array of floats, is too large or damaged.
        """
        array = self._array(name)
        if array.dtype.name not in STORED_DTYPES or math.prod(array.shape) > MAX_VALUES:
            raise CheckpointError(
                f"{self.folder}: {name} is {array.dtype.name} {list(array.shape)}, must be floats, "
                f"{MAX_VALUES} at most"
            )
        try:
            return np.asarray(array.read().result()).astype(np.float32, copy=False)
        except ValueError as error:
            raise CheckpointError(f"{self.folder}: {name} cannot be read: {error}") from None

    def _array(self, name: str) -> Any:
        if name not in self._paths:
            raise CheckpointError(f"{self.folder} has no {name}: it is not π0's or π0.5's")
        if name not in self._open:
            spec = {"driver": "zarr", "kvstore": {**self._store, "path": self._paths[name]}}
            try:
                self._open[name] = self._tensorstore.open(spec).result()
            except ValueError as error:
                raise CheckpointError(f"{self.folder}: {name} cannot be read: {error}") from None
        return self._open[name]


def config_from_shapes(params: Params, horizon: int) -> PolicyConfig:
    """Kind and sizes, which the tree has no other record of; the horizon is in no array.

    Raises:
        CheckpointError: an array that gives sizes is missing or has none that a network can have.
    """
    try:
        return _config(params, horizon)
    except CheckpointError:
        raise
    except (ValueError, TypeError, IndexError, ZeroDivisionError) as error:
        raise CheckpointError(f"{params.folder}: no network has such shapes: {error}") from None


def _config(params: Params, horizon: int) -> PolicyConfig:
    kind = "pi05" if "time_mlp_in.kernel" in params else "pi0"
    side, _, _, width = params.shape(IMG + "embedding.kernel")
    depth, mlp = (params.shape(BLOCK + "MlpBlock_0.Dense_0.kernel")[i] for i in (0, 2))
    heads = params.shape(BLOCK + "MultiHeadDotProductAttention_0.query.kernel")[2]
    patches = params.shape(IMG + "pos_embedding")[1]
    sizes = Sizes(
        vlm=_gemma(params, ""),
        exp=_gemma(params, "_1"),
        vis=VisionSize(width, depth, heads, mlp),
        vocab=params.shape(LLM + "embedder.input_embedding")[0],
        image=math.isqrt(patches) * side,
        patch=side,
    )
    dim = params.shape("action_in_proj.kernel")[0]
    document = {"chunk_size": horizon, "max_action_dim": dim, "max_state_dim": dim}
    return PolicyConfig(**(vars(parse_config(document, kind)) | {"sizes": sizes}))


def _gemma(params: Params, suffix: str) -> GemmaSize:
    depth, heads, width, head_dim = params.shape(f"{LLM}layers.attn.q_einsum{suffix}.w")
    kv_heads = params.shape(f"{LLM}layers.attn.kv_einsum{suffix}.w")[2]
    mlp = params.shape(f"{LLM}layers.mlp{suffix}.linear")[1]
    return GemmaSize(width, depth, mlp, heads, kv_heads, head_dim)


def tensors(params: Params, config: PolicyConfig) -> Iterator[tuple[str, Array]]:
    """LeRobot's names without `model.` and their tensors, one after the other."""
    yield from _image_tower(params)
    yield EMBEDDING, params.read(LLM + "embedder.input_embedding")
    yield from _gemma_tensors(params, "", LANGUAGE, adaptive=False)
    yield from _gemma_tensors(params, "_1", EXPERT + "model.", adaptive=config.kind == "pi05")
    names = ["action_in_proj", "action_out_proj"]
    if config.kind == "pi05":
        names += ["time_mlp_in", "time_mlp_out"]
    else:
        names += ["state_proj", "action_time_mlp_in", "action_time_mlp_out"]
    for name in names:
        yield from _linear(params, name, name)


def _own_errors(named: Iterator[tuple[str, Array]], folder: Path) -> Iterator[tuple[str, Array]]:
    """The same, with what NumPy says of arrays that have other dimensions as a CheckpointError."""
    try:
        yield from named
    except CheckpointError:
        raise
    except (ValueError, IndexError) as error:
        raise CheckpointError(f"{folder}: the arrays' dimensions are not π0's: {error}") from None


def _linear(params: Params, theirs: str, ours: str) -> Iterator[tuple[str, Array]]:
    yield ours + ".weight", params.read(theirs + ".kernel").T
    yield ours + ".bias", params.read(theirs + ".bias")


def _image_tower(params: Params) -> Iterator[tuple[str, Array]]:
    patch = VISION + "embeddings.patch_embedding"
    yield patch + ".weight", params.read(IMG + "embedding.kernel").transpose(3, 2, 0, 1)
    yield patch + ".bias", params.read(IMG + "embedding.bias")
    position = VISION + "embeddings.position_embedding.weight"
    yield position, params.read(IMG + "pos_embedding")[0]
    yield VISION + "post_layernorm.weight", params.read(IMG + "Transformer.encoder_norm.scale")
    yield VISION + "post_layernorm.bias", params.read(IMG + "Transformer.encoder_norm.bias")
    yield from _linear(params, IMG + "head", PALIGEMMA + "model.multi_modal_projector.linear")

    def layers(theirs: str, ours: str, change: Callable[[Array], Array]) -> Iterator[Any]:
        for n, array in enumerate(params.read(BLOCK + theirs)):
            yield f"{VISION}encoder.layers.{n}.{ours}", change(array)

    for theirs, ours in (("LayerNorm_0", "layer_norm1"), ("LayerNorm_1", "layer_norm2")):
        yield from layers(theirs + ".scale", ours + ".weight", np.asarray)
        yield from layers(theirs + ".bias", ours + ".bias", np.asarray)
    for theirs, ours in (("MlpBlock_0.Dense_0", "mlp.fc1"), ("MlpBlock_0.Dense_1", "mlp.fc2")):
        yield from layers(theirs + ".kernel", ours + ".weight", np.transpose)
        yield from layers(theirs + ".bias", ours + ".bias", np.asarray)
    for theirs, ours in (("query", "q"), ("key", "k"), ("value", "v")):
        part = "MultiHeadDotProductAttention_0." + theirs
        # [width, heads, head_dim] and [heads, head_dim]
        yield from layers(
            part + ".kernel", f"self_attn.{ours}_proj.weight", lambda a: a.reshape(len(a), -1).T
        )
        yield from layers(part + ".bias", f"self_attn.{ours}_proj.bias", np.ravel)
    part = "MultiHeadDotProductAttention_0.out"
    yield from layers(
        part + ".kernel", "self_attn.out_proj.weight", lambda a: a.reshape(-1, a.shape[-1]).T
    )
    yield from layers(part + ".bias", "self_attn.out_proj.bias", np.asarray)


def _gemma_tensors(
    params: Params, suffix: str, ours: str, adaptive: bool
) -> Iterator[tuple[str, Array]]:
    def rows(array: Array) -> Array:
        """[heads, width, head_dim] → [heads · head_dim, width]."""
        return array.transpose(0, 2, 1).reshape(-1, array.shape[1])

    for n, array in enumerate(params.read(f"{LLM}layers.attn.q_einsum{suffix}.w")):
        yield f"{ours}layers.{n}.self_attn.q_proj.weight", rows(array)
    for n, array in enumerate(params.read(f"{LLM}layers.attn.kv_einsum{suffix}.w")):
        yield f"{ours}layers.{n}.self_attn.k_proj.weight", rows(array[0])
        yield f"{ours}layers.{n}.self_attn.v_proj.weight", rows(array[1])
    for n, array in enumerate(params.read(f"{LLM}layers.attn.attn_vec_einsum{suffix}.w")):
        yield f"{ours}layers.{n}.self_attn.o_proj.weight", array.reshape(-1, array.shape[-1]).T
    for n, array in enumerate(params.read(f"{LLM}layers.mlp{suffix}.gating_einsum")):
        yield f"{ours}layers.{n}.mlp.gate_proj.weight", array[0].T
        yield f"{ours}layers.{n}.mlp.up_proj.weight", array[1].T
    for n, array in enumerate(params.read(f"{LLM}layers.mlp{suffix}.linear")):
        yield f"{ours}layers.{n}.mlp.down_proj.weight", array.T
    norms = (
        ("pre_attention_norm", "input_layernorm"),
        ("pre_ffw_norm", "post_attention_layernorm"),
    )
    for theirs, name in norms:
        parts = _norm(params, f"{LLM}layers.{theirs}{suffix}", adaptive)
        for leaf, stacked in parts:
            for n, array in enumerate(stacked):
                yield f"{ours}layers.{n}.{name}.{leaf}", array.T
    for leaf, array in _norm(params, f"{LLM}final_norm{suffix}", adaptive):
        yield f"{ours}norm.{leaf}", array.T


def _norm(params: Params, path: str, adaptive: bool) -> Iterator[tuple[str, Array]]:
    if not adaptive:
        yield "weight", params.read(path + ".scale")
        return
    yield "dense.weight", params.read(path + ".Dense_0.kernel")
    yield "dense.bias", params.read(path + ".Dense_0.bias")


def convert(
    directory: Path, output: Path, horizon: int = 50, dtype: str = "float32"
) -> PolicyConfig:
    """Write config.json, model.safetensors and openpi's assets to `output`.

    Raises:
        CheckpointError: not an orbax checkpoint of π0 or π0.5, or tensorstore is missing.
    """
    folder = directory / "params" if (directory / "params").is_dir() else directory
    params = Params(folder)
    config = config_from_shapes(params, horizon)
    check_depth(config, MAX_LAYERS, folder)
    with torch.device("meta"):
        sources = key_map(Pi0(config)).values()
    shapes = {n: s for source in sources for n, s in zip(source.names, source.shapes, strict=True)}
    code, torch_dtype = DTYPES[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * torch_dtype.itemsize
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    output.mkdir(parents=True, exist_ok=True)
    partial = output / (SINGLE_FILE + ".partial")
    missing = set(shapes)
    with partial.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, array in _own_errors(tensors(params, config), folder):
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
    partial.replace(output / SINGLE_FILE)
    document = json.dumps(config.to_json(), indent=2) + "\n"
    (output / CONFIG_FILE).write_text(document, encoding="utf-8")
    assets = folder.parent / "assets"
    if assets.is_dir():
        shutil.copytree(assets, output / "assets", dirs_exist_ok=True)
    return config


def main() -> int:
    """0, or 1 with the reason on one line."""
    parser = argparse.ArgumentParser(description="openpi's JAX checkpoint to one that loads here")
    parser.add_argument("checkpoint", type=Path, help="the folder with params/ and assets/")
    parser.add_argument("output", type=Path, help="folder to write")
    parser.add_argument("--horizon", type=int, default=50, help="steps of a chunk (default: 50)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="default: float32")
    options = parser.parse_args()
    try:
        config = convert(options.checkpoint, options.output, options.horizon, options.dtype)
    except CheckpointError as error:
        print(error)
        return 1
    print(f"{options.output}: {config.kind}, {config.horizon} steps")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
