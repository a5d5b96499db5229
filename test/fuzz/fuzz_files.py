"""Fuzz targets: files of checkpoints and robots."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
from fuzz_checks import DATA, Target, check_error, folder


def safetensors() -> Target:
    """model.safetensors: one byte says whether the rest is the whole file or its header's JSON."""
    from pi05_ros.policy.weights import (
        FLOAT_DTYPES,
        CheckpointError,
        is_finite,
        read_tensor,
        tensor_index,
    )

    place = folder()
    file = place / "model.safetensors"

    def run(data: bytes) -> None:
        if not data:
            return
        body = data[1:]
        whole = body if data[0] & 1 else len(body).to_bytes(8, "little") + body + bytes(256)
        file.write_bytes(whole)
        try:
            index = tensor_index(place)
        except CheckpointError as error:
            check_error(error)
            return
        for info in index.values():
            assert all(isinstance(n, int) and n >= 0 for n in info.shape), info
            # Only tensors of the network's shapes are read.
            if info.dtype in FLOAT_DTYPES and len(info.shape) <= 8:
                tensor = read_tensor(info)
                assert tensor.shape == info.shape and isinstance(is_finite(tensor), bool)

    return run


def shards() -> Target:
    """model.safetensors.index.json beside two shards, a pickle and a file elsewhere."""
    from pi05_ros.policy.weights import CheckpointError, tensor_index

    place = folder()
    header = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    shard = len(header).to_bytes(8, "little") + header + bytes(8)
    inside = place / "in"
    inside.mkdir()
    for name in ("in/1.safetensors", "in/2.safetensors", "in/a.bin", "out.safetensors"):
        (place / name).write_bytes(shard)

    def run(data: bytes) -> None:
        (inside / "model.safetensors.index.json").write_bytes(data)
        try:
            index = tensor_index(inside)
        except CheckpointError as error:
            check_error(error)
        else:
            assert all(
                info.file.resolve().parent == (place / "in").resolve()
                and info.file.suffix != ".bin"
                for info in index.values()
            )

    return run


def config() -> Target:
    """config.json of a folder without weights."""
    from pi05_ros.policy.config import read_config
    from pi05_ros.policy.weights import CheckpointError

    place = folder()

    def run(data: bytes) -> None:
        (place / "config.json").write_bytes(data)
        try:
            read = read_config(place)
        except CheckpointError as error:
            check_error(error)
            return
        assert read.horizon > 0 and read.token_length > 0 and read.num_steps > 0
        assert all(isinstance(name, str) for name in read.cameras)
        json.dumps(read.to_json())

    return run


def processing() -> Target:
    """LeRobot's processor files or openpi's norm_stats.json; the first byte says which."""
    from pi05_ros.policy.config import PolicyConfig
    from pi05_ros.policy.processing import ACTION, STATE, read_processing, write_processing
    from pi05_ros.policy.weights import CheckpointError

    ours = PolicyConfig(state_dim=2, action_dim=2)
    statistics = {name: [0.0, 1.0] for name in ("mean", "std", "min", "max", "q01", "q99")}
    lerobot, openpi = folder(), folder()
    write_processing(lerobot, ours, {STATE: statistics, ACTION: statistics})
    names = ("policy_preprocessor.json", "policy_postprocessor.json")
    originals = {name: (lerobot / name).read_bytes() for name in names}

    def run(data: bytes) -> None:
        if not data:
            return
        if data[0] % 3 == 2:
            place = openpi
            (openpi / "norm_stats.json").write_bytes(data[1:])
        else:
            place = lerobot
            for i, name in enumerate(names):
                (lerobot / name).write_bytes(data[1:] if i == data[0] % 3 else originals[name])
        try:
            read = read_processing(place, ours, 2, 2)
        except CheckpointError as error:
            check_error(error)
            return
        for normalizer in (read.state, read.action):
            assert np.asarray(normalizer.normalize(np.zeros(2))).shape == (2,)
        assert read.delta_mask is None or len(read.delta_mask) == 2

    return run


def description() -> Target:
    """A robot's YAML description, and the robot that is built of it."""
    from pi05_ros.policy.robots import DescriptionError, read_robot

    file = folder() / "robot.yaml"

    def run(data: bytes) -> None:
        file.write_bytes(data)
        try:
            robot = read_robot(file)
        except DescriptionError as error:
            check_error(error)
            return
        assert robot.dt_s > 0 and math.isfinite(robot.dt_s)
        assert robot.decode_state(np.zeros(robot.state_dim)).shape == (robot.state_dim,)
        assert robot.encode_action(np.zeros((2, robot.action_dim))).shape == (2, robot.action_dim)

    return run


def params() -> Target:
    """The node's params file, as the evaluation reads it without ROS."""
    from pi05_ros.robot_config import RobotConfigError, read_robot_config

    file = folder() / "params.yaml"

    def run(data: bytes) -> None:
        file.write_bytes(data)
        try:
            read = read_robot_config(file)
        except RobotConfigError as error:
            check_error(error)
            return
        assert (read.joints.lower < read.joints.upper).all()
        assert read.dt_s > 0

    return run


def orbax() -> Target:
    """openpi's JAX folder: the bytes stand in place of one array's metadata."""
    import tensorstore

    from pi05_lab.data import openpi_jax as reader
    from pi05_ros.policy.weights import CheckpointError

    place = folder()
    shutil.copytree(DATA / "openpi_jax" / "params", place / "params")
    spec = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{place / 'params'}/"}}
    store = tensorstore.KvStore.open(spec).result()
    keys = sorted(key for key in store.list().result() if key.endswith(b"/.zarray"))
    reader.MAX_VALUES = 1 << 20  # no test has gigabytes
    originals = {key: store.read(key).result().value for key in keys}

    def run(data: bytes) -> None:
        if not data:
            return
        key = keys[data[0] % len(keys)]
        store.write(key, data[1:]).result()
        try:
            opened = reader.Params(place / "params")
            read = reader.config_from_shapes(opened, 4)
            name = key.decode().removesuffix("/.zarray")
            values = opened.read(name.removeprefix("params.").removesuffix(".value"))
        except CheckpointError as error:
            check_error(error)
        else:
            assert read.sizes.vocab > 0
            assert values.dtype == np.float32 and values.size <= reader.MAX_VALUES
        finally:
            store.write(key, originals[key]).result()

    return run
