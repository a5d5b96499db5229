"""Any LeRobot policy as a `Policy`: ACT, Diffusion Policy, SmolVLA and others.

LeRobot's own classes and processors run; the history, the schedulers and the ensembling are this
package's. Sources: LeRobot 0.6.1 `policies/factory.py`, `policies/pretrained.py`,
`policies/utils.py` (prepare_observation_for_inference), `processor/`.

config.json says nothing about rate, joint names and units: the robot's description does.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import logging
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pi05_ros.policy.bundle import Settings, make_robot, match_cameras
from pi05_ros.policy.checkpoint import summarize_names
from pi05_ros.policy.config import CONFIG_FILE, IMAGE_PREFIX
from pi05_ros.policy.policy import choose_device
from pi05_ros.policy.processing import ACTION, POSTPROCESSOR, PREPROCESSOR, STATE
from pi05_ros.policy.robots import Robot, RobotSource
from pi05_ros.policy.weights import CheckpointError, read_json, read_tensor, tensor_index
from pi05_ros.types import ActionChunk, ActionPrefix, FloatArray, ImageArray, Observation

QUEUED = ("vqbet", "tdmpc")
"""Types that predict from queues that only their own `select_action` fills."""
ASPECT_TOLERANCE = 0.01
"""Relative difference of two aspect ratios that counts as equal."""
MIN_PYTHON = (3, 12)


@dataclass(frozen=True)
class Features:
    """What config.json says about inputs and outputs; the fields that `make_robot` reads."""

    type: str
    state_dim: int | None
    action_dim: int
    cameras: tuple[str, ...]
    image_sizes: Mapping[str, tuple[int, int]]
    """The checkpoint's camera → width and height in pixels of its images."""
    history_steps: int
    uses_text: bool

    @property
    def max_state_dim(self) -> int:
        return self.state_dim or sys.maxsize

    @property
    def max_action_dim(self) -> int:
        return self.action_dim


def read_features(directory: Path) -> Features:
    """Read config.json and the processors' step lists, without LeRobot.

    Raises:
        CheckpointError: a file is missing or damaged, the policy needs what no robot measures, or
            it cannot predict chunks.
    """
    document = read_json(directory / CONFIG_FILE)
    kind = document.get("type")
    if kind in QUEUED:
        raise CheckpointError(
            f"{directory}: a {kind} policy predicts from queues of its own, one action at a time; "
            "it gives no chunks to schedule"
        )
    if document.get("use_peft"):
        raise CheckpointError(
            f"{directory} has adapters (use_peft): merge them into the policy and save it whole"
        )
    for name in (PREPROCESSOR, POSTPROCESSOR):
        if not (directory / f"{name}.json").is_file():
            raise CheckpointError(
                f"{directory} has no {name}.json, so its normalisation is unknown: convert it with "
                "python -m lerobot.processor.migrate_policy_normalization"
            )
    try:
        inputs, outputs = dict(document["input_features"]), dict(document["output_features"])
        sizes, unknown, state_dim = {}, [], None
        for name, feature in inputs.items():
            shape = [int(n) for n in feature["shape"]]
            if feature["type"] == "VISUAL" and name.startswith(IMAGE_PREFIX):
                _, height, width = shape
                sizes[name.removeprefix(IMAGE_PREFIX)] = (width, height)
            elif feature["type"] == "STATE" and name == STATE:
                (state_dim,) = shape
            else:
                unknown.append(name)
        (action_dim,) = (int(n) for n in outputs[ACTION]["shape"])
        history_steps = int(document.get("n_obs_steps") or 1) - 1
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{directory / CONFIG_FILE}: no usable features ({error})") from None
    if unknown:
        raise CheckpointError(
            f"{directory} needs {', '.join(unknown)}, which is neither an image "
            f"({IMAGE_PREFIX}<camera>) nor the joint state ({STATE})"
        )
    steps = json.dumps(read_json(directory / f"{PREPROCESSOR}.json").get("steps"))
    return Features(
        type=str(kind),
        state_dim=state_dim,
        action_dim=action_dim,
        cameras=tuple(sizes),
        image_sizes=sizes,
        history_steps=history_steps,
        uses_text="tokenizer" in steps,
    )


class LeRobotPolicy:
    """A LeRobot policy; implements `pi05_ros.types.Policy`.

    Not thread safe: loads and infers on one thread.
    """

    def __init__(
        self,
        network: Any,
        preprocessor: Any,
        postprocessor: Any,
        features: Features,
        robot: Robot,
        cameras: Mapping[str, str],
        device: torch.device,
        seed: int | None = None,
    ) -> None:
        """Combine the parts; `from_pretrained` loads them.

        Args:
            network: a lerobot PreTrainedPolicy in evaluation mode.
            preprocessor, postprocessor: its processor pipelines.
            features: of its config.json.
            robot: dimensions, units and rate.
            cameras: the robot's camera name → the checkpoint's; all of the checkpoint's.
            device: of the network.
            seed: see `from_pretrained`.

        Raises:
            CheckpointError: it predicts no chunk, or keeps a history of its own.
        """
        self._network, self._features, self._robot = network, features, robot
        self._preprocessor, self._postprocessor = preprocessor, postprocessor
        self._cameras, self._device = dict(cameras), device
        self._generator = torch.Generator()
        self.restart(torch.seed() % (1 << 63) if seed is None else seed)
        self.horizon = self._probe()

    @classmethod
    def from_pretrained(
        cls,
        directory: Path,
        robot: RobotSource = "aloha",
        device: str | torch.device = "auto",
        seed: int | None = None,
    ) -> LeRobotPolicy:
        """Load a folder that LeRobot saved, with its processors.

        Args:
            directory: config.json, weights, policy_preprocessor.json, policy_postprocessor.json.
            robot: as in `Policy.from_pretrained`; its `dt_s` is the rate of the training data.
            device: "auto" (CUDA if available), "cuda", "cpu".
            seed: makes the noise of a series of calls repeatable.

        Raises:
            CheckpointError: LeRobot is not installed, the folder is no usable policy, or it does
                not fit the robot.
            ValueError: unknown robot or device.
        """
        features = read_features(directory)
        made, cameras = fit(directory, features, robot)
        factory = _lerobot(directory, features.type)
        target = choose_device(device)
        try:
            config = factory.PreTrainedConfig.from_pretrained(str(directory))
            config.device = str(target)
            network = factory.get_policy_class(features.type).from_pretrained(
                str(directory), config=config, strict=True
            )
            before, after = factory.make_pre_post_processors(
                config,
                pretrained_path=str(directory),
                preprocessor_overrides=_on_device(directory, PREPROCESSOR, target),
                postprocessor_overrides=_on_device(directory, POSTPROCESSOR, "cpu"),
            )
        except Exception as error:  # LeRobot, draccus, safetensors and the hub raise all kinds
            raise CheckpointError(
                f"{directory}: LeRobot cannot load it: {_first(error)}"
            ) from error
        check_loaded(network, directory)
        return cls(network.eval(), before, after, features, made, cameras, target, seed)

    @property
    def dt_s(self) -> float:
        return self._robot.dt_s

    @property
    def state_dim(self) -> int:
        return self._robot.state_dim

    @property
    def action_dim(self) -> int:
        return self._robot.action_dim

    @property
    def joint_names(self) -> tuple[str, ...]:
        """Names of the action's values in the robot's description; empty if it has none."""
        return self._robot.action_names

    @property
    def cameras(self) -> tuple[str, ...]:
        """The robot's names of the checkpoint's cameras."""
        return tuple(self._cameras)

    @property
    def history_steps(self) -> int:
        """Earlier observations that each inference needs, `dt_s` apart."""
        return self._features.history_steps

    @property
    def image_size_px(self) -> tuple[int, int] | None:
        """Width and height of the training data's images, of the first camera."""
        return next(iter(self._features.image_sizes.values()), None)

    @functools.cached_property
    def description(self) -> str:
        """Type, size, steps, and whether the instruction has an effect."""
        count = sum(parameter.numel() for parameter in self._network.parameters())
        size = f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"
        text = "" if self._features.uses_text else ", without language: it ignores the instruction"
        return f"LeRobot {self._features.type}, {size} parameters, {self.horizon} steps{text}"

    def restart(self, seed: int) -> None:
        """Begin a series of inferences; equal to loading the checkpoint with this seed."""
        self._generator.manual_seed(seed)

    @torch.inference_mode()
    def infer(self, observation: Observation, prefix: ActionPrefix | None = None) -> ActionChunk:
        """Predict a chunk.

        Args:
            observation: RGB images of all cameras, state [state_dim] in robot units, instruction,
                and `history_steps` earlier observations in `past`.
            prefix: not supported.

        Returns:
            [horizon, action_dim] absolute actions in robot units, not clipped, with the times of
            preprocess, network and postprocess.

        Raises:
            ValueError: a camera is missing or has another aspect ratio than in training, a wrong
                number of earlier observations, a state of the wrong shape or not finite, a prefix.
        """
        if prefix is not None:
            raise ValueError(
                f"LeRobot's {self._features.type} cannot continue a prefix: use another scheduler "
                "than rtc"
            )
        if len(observation.past) != self.history_steps:
            raise ValueError(
                f"this policy needs {self.history_steps} earlier observations, got "
                f"{len(observation.past)}"
            )
        started_s = time.perf_counter()
        batch = self._batch(observation)
        prepared_s = time.perf_counter()
        seed = int(torch.randint(1 << 62, (), generator=self._generator))
        with torch.random.fork_rng(devices=[self._device] if self._device.type == "cuda" else []):
            # LeRobot's policies draw from torch's global generators
            torch.manual_seed(seed)
            normalized = self._network.predict_action_chunk(batch)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        predicted_s = time.perf_counter()
        actions = self._postprocessor(normalized)[0].float().cpu().numpy().astype(np.float64)
        actions = self._robot.encode_action(actions[:, : self.action_dim])
        ended_s = time.perf_counter()
        return ActionChunk(
            actions=actions,
            stamp_s=observation.stamp_s,
            dt_s=self.dt_s,
            instruction=observation.instruction,
            timings_s={
                "preprocess": prepared_s - started_s,
                "network": predicted_s - prepared_s,
                "postprocess": ended_s - predicted_s,
            },
        )

    def _batch(self, observation: Observation) -> dict[str, Any]:
        """What `predict_action_chunk` takes, with a time axis if the policy has a history.

        Each observation is preprocessed by itself, as LeRobot does in a rollout; the present one
        last, because the step for relative actions keeps the state of the last one.
        """
        frames = [*observation.past, observation]
        batches = [self._preprocess(frame, observation.instruction) for frame in frames]
        batch = dict(batches[-1])
        if self.history_steps:
            for name, value in batch.items():
                if isinstance(value, Tensor) and name.startswith("observation."):
                    batch[name] = torch.stack([each[name] for each in batches], dim=1)
        return batch

    def _preprocess(self, frame: Observation, instruction: str) -> dict[str, Any]:
        raw: dict[str, Any] = {"task": instruction, "robot_type": ""}
        for ours, theirs in self._cameras.items():
            image = frame.images.get(ours)
            if image is None:
                raise ValueError(
                    f"camera {ours!r} has no image: a LeRobot {self._features.type} policy needs "
                    "all of its cameras"
                )
            if ours in self._robot.rotated_cameras:
                image = image[::-1, ::-1]
            image = _resized(ours, image, self._features.image_sizes[theirs])
            tensor = torch.from_numpy(np.ascontiguousarray(image)).to(self._device)
            raw[IMAGE_PREFIX + theirs] = (tensor.float() / 255).permute(2, 0, 1)[None].contiguous()
        if self._features.state_dim is not None:
            state = self._decode_state(frame.state).astype(np.float32)
            raw[STATE] = torch.from_numpy(state)[None].to(self._device)
        processed: dict[str, Any] = self._preprocessor(raw)
        return processed

    def _decode_state(self, state: FloatArray) -> FloatArray:
        array = np.asarray(state, dtype=np.float64)
        if array.shape != (self.state_dim,):
            raise ValueError(
                f"state must have shape [{self.state_dim}] for robot {self._robot.name!r}, got "
                f"{list(array.shape)}"
            )
        for i in np.flatnonzero(~np.isfinite(array)):
            raise ValueError(f"state[{i}] is {array[i]}")
        return self._robot.decode_state(array)

    def _probe(self) -> int:
        """Steps of a chunk, by one inference on black images."""
        images = {
            name: np.zeros((*self._features.image_sizes[theirs][::-1], 3), np.uint8)
            for name, theirs in self._cameras.items()
        }
        frame = Observation(images, np.zeros(self.state_dim), "probe", 0.0)
        with torch.inference_mode():
            batch = self._batch(
                Observation(images, frame.state, "probe", 0.0, (frame,) * self.history_steps)
            )
            chunk = self._network.predict_action_chunk(batch)
        if chunk.ndim != 3 or chunk.shape[1] < 2 or chunk.shape[2] < self.action_dim:
            raise CheckpointError(
                f"the {self._features.type} policy predicts {list(chunk.shape)}, which is no chunk "
                f"[1, steps, {self.action_dim}]"
            )
        queues = getattr(self._network, "_queues", None) or {}
        for name, queue in queues.items():
            if name != ACTION and (queue.maxlen or 0) > 1 and len(queue):
                raise CheckpointError(
                    f"the {self._features.type} policy keeps {name} in a queue of its own, which a "
                    "scheduler that infers at any time would fill with frames of other times"
                )
        self._network.reset()
        return int(chunk.shape[1])


def fit(directory: Path, features: Features, robot: RobotSource) -> tuple[Robot, dict[str, str]]:
    """The robot with the checkpoint's conventions, and its camera names → the checkpoint's.

    Raises:
        CheckpointError: dimensions or cameras do not fit, or a bad pi05_ros.json.
        ValueError: an unknown robot.
    """
    settings = Settings.read(directory)
    try:
        made = make_robot(robot, features, "lerobot", settings)
        cameras = match_cameras(made.cameras, features.cameras, settings.cameras)
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{directory}: {error}") from None
    missing = [name for name in features.cameras if name not in cameras.values()]
    if missing:
        raise CheckpointError(
            f"{directory}: robot {made.name!r} has no camera for {', '.join(missing)}, and a "
            f"LeRobot {features.type} policy needs all of its cameras"
        )
    return made, cameras


def check_loaded(network: nn.Module, directory: Path) -> None:
    """Check that every parameter has the file's values: LeRobot may return a random network.

    Raises:
        CheckpointError: the names of those that have not.
    """
    index = tensor_index(directory)
    own = network.state_dict()
    shared = {own[name].data_ptr() for name in index if name in own and own[name].numel()}
    problems = {
        "missing": [n for n in own if n not in index and own[n].data_ptr() not in shared],
        "unexpected": [name for name in index if name not in own],
        "not loaded": [
            name
            for name, info in index.items()
            if name in own
            and not (
                info.shape == tuple(own[name].shape)
                and torch.equal(read_tensor(info).to(own[name]), own[name])
            )
        ],
    }
    found = [summarize_names(what, names) for what, names in problems.items() if names]
    if found:
        raise CheckpointError(f"{directory}: the weights do not fit: {'; '.join(found)}")


def is_installed() -> bool:
    """Whether LeRobot can be imported."""
    return "lerobot" in sys.modules or importlib.util.find_spec("lerobot") is not None


def missing_message(directory: Path, kind: str) -> str:
    """What to install for a policy of another type than π0.5, π0 and π0-FAST."""
    return (
        f"{directory} is a LeRobot {kind} policy: pip install 'pi05_ros[lerobot]' "
        f"(Python {'.'.join(map(str, MIN_PYTHON))} or later), or serve it from an environment that "
        "has it (pi05 serve) and set checkpoint to ws://host:port"
    )


@dataclass(frozen=True)
class _Factory:
    PreTrainedConfig: Any
    get_policy_class: Any
    make_pre_post_processors: Any


def _lerobot(directory: Path, kind: str) -> _Factory:
    """LeRobot's loaders. The import takes seconds."""
    try:
        from lerobot.configs.policies import PreTrainedConfig
        from lerobot.policies.factory import get_policy_class, make_pre_post_processors
    except ImportError as error:
        reason = "" if error.name == "lerobot" else f" ({error})"
        raise CheckpointError(missing_message(directory, kind) + reason) from None
    # the processors print every step at level INFO
    logging.getLogger("lerobot").setLevel(logging.WARNING)
    return _Factory(PreTrainedConfig, get_policy_class, make_pre_post_processors)


def _on_device(directory: Path, name: str, device: torch.device | str) -> dict[str, Any]:
    """The device of a pipeline, which is saved as that of the training."""
    has_step = "device_processor" in json.dumps(read_json(directory / f"{name}.json"))
    return {"device_processor": {"device": str(device)}} if has_step else {}


def _resized(camera: str, image: ImageArray, size: tuple[int, int]) -> ImageArray:
    """The image [H, W, 3] at the training data's size (width, height).

    Raises:
        ValueError: no RGB image, or another aspect ratio.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(
            f"camera {camera!r}: images must be uint8 [height, width, 3], got {image.dtype} "
            f"{list(image.shape)}"
        )
    height, width = image.shape[:2]
    if (width, height) == size:
        return image
    if abs(width * size[1] / (height * size[0]) - 1) > ASPECT_TOLERANCE:
        raise ValueError(
            f"camera {camera!r}: the image is {width} × {height}, the training data's were "
            f"{size[0]} × {size[1]}: crop it to the same aspect ratio"
        )
    import cv2  # a tenth of a second

    smaller = width > size[0]
    resized = cv2.resize(image, size, interpolation=cv2.INTER_AREA if smaller else cv2.INTER_LINEAR)
    return np.asarray(resized, dtype=np.uint8)


def _first(error: BaseException) -> str:
    lines: Iterable[str] = str(error).strip().splitlines()
    return f"{type(error).__name__}: {next(iter(lines), '')}"
