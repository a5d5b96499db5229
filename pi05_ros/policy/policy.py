"""The policy: an observation in the robot's units becomes a chunk in the robot's units."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pi05_ros.policy.action_tokens import ActionTokenError
from pi05_ros.policy.bundle import CheckpointBundle, Settings, open_checkpoint
from pi05_ros.policy.checkpoint import load_model
from pi05_ros.policy.guidance import Guidance, PrefixGuidance
from pi05_ros.policy.images import EMPTY, ImageError, ImageLoader
from pi05_ros.policy.inference import (
    Mark,
    SampleInputs,
    Sampler,
    StageClock,
    make_sampler,
    own_stream,
)
from pi05_ros.policy.model import Pi0
from pi05_ros.policy.next_token import (
    CONFIG_KEY,
    ActionLanguage,
    TokenSampler,
    open_action_language,
)
from pi05_ros.policy.processing import Processing
from pi05_ros.policy.prompt import (
    PromptTokenizer,
    PromptTooLongError,
    Tokens,
    pi0_prompt,
    pi05_prompt,
)
from pi05_ros.policy.robots import Robot, RobotSource
from pi05_ros.policy.weights import CheckpointError
from pi05_ros.types import HEADS, ActionChunk, ActionPrefix, FloatArray, Observation

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class PolicyOutputError(RuntimeError):
    """The network's output is not finite and must not reach a robot."""


class Policy:
    """π0.5, π0 or π0-FAST with its checkpoint's processing; implements `pi05_ros.types.Policy`."""

    def __init__(
        self,
        model: Pi0,
        robot: Robot,
        processing: Processing,
        tokenizer: PromptTokenizer,
        cameras: Mapping[str, str],
        *,
        num_steps: int | None = None,
        seed: int | None = None,
        label: str = "",
        execution: str = "auto",
        fp8_prefix: bool = False,
        guidance: Guidance | None = None,
        language: ActionLanguage | None = None,
    ) -> None:
        """Combine the parts; `from_pretrained` reads them from a folder.

        Args:
            model: the network, in evaluation mode on its device; its weights must not change.
            robot: the units of states and actions.
            processing: statistics and conventions.
            tokenizer: of the network's vocabulary.
            cameras: the robot's camera name → the network's.
            label: trained or not, for `description`.
            language: of action tokens, which the language model then predicts in place of the
                expert; None is the flow head.
            num_steps, seed, execution, fp8_prefix, guidance: see `from_pretrained`.

        Raises:
            ValueError: an execution that the device does not support, or guidance that the
                checkpoint does not.
        """
        self.model = model
        self.robot = robot
        self.processing = processing
        self._guidance = guidance or Guidance()
        self._guidance.check(model.config)
        self._on_stream = own_stream(model.device)
        steps = model.config.num_steps if num_steps is None else num_steps
        self._num_steps = steps
        self._language = language
        with self._on_stream():
            self.sampler: Sampler
            if language is None:
                self.sampler = make_sampler(model, steps, execution, len(cameras), fp8_prefix)
            else:
                self.sampler = TokenSampler(model, language, self.action_dim)
        self.truncated_tokens = 0
        """Tokens cut from the latest instruction, for prompts without a state."""
        self._tokenizer = tokenizer
        self._cameras = dict(cameras)
        self._pictures = ImageLoader(model.config.image_size, processing.convention, model.device)
        self._label = label
        self._warned = ""
        # On the CPU, so that a seed gives the same noise on every device.
        self._generator = torch.Generator()
        if seed is None:
            self._generator.seed()
        else:
            self.restart(seed)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        robot: RobotSource = "aloha",
        device: str | torch.device = "auto",
        dtype: str | torch.dtype | None = None,
        num_steps: int | None = None,
        seed: int | None = None,
        threads: int | None = None,
        execution: str = "auto",
        fp8_prefix: bool = False,
        guidance: Guidance | None = None,
        head: str | None = None,
    ) -> Policy:
        """Load a checkpoint folder for a robot.

        Args:
            path: a folder in LeRobot's or openpi's (PyTorch) layout, or a Hugging Face id,
                optionally with a revision: "owner/name@revision"; "small" is this package's own
                network.
            robot: "aloha", "droid", "libero", "ur5e", "generic", the path of a YAML description, or
                a mapping of the same keys, see `robots.Robot`.
            device: "auto" (CUDA if available), "cuda", "cpu", …
            dtype: "float32" or "bfloat16"; by default bfloat16 on CUDA, float32 elsewhere.
            num_steps: Euler steps; the checkpoint's number by default.
            seed: makes the noise of a series of calls repeatable.
            threads: CPU threads of torch, for the whole process; None leaves them unchanged.
            execution: "eager"; "graphs", CUDA graphs; "compile", fused kernels, in CUDA graphs on
                CUDA; "auto" is graphs on CUDA and eager elsewhere. CUDA graphs belong to the thread
                that loads: run the policy there.
            fp8_prefix: run the language model's prefix pass in 8-bit floats.
            guidance: how a chunk continues a prefix; `Guidance()` by default.
            head: "flow", the action expert; "fast", the language model's next tokens, without
                guidance and in eager execution. The checkpoint's by default.

        Raises:
            CheckpointError: not a usable checkpoint, or one that does not fit the robot.
            ValueError: unknown robot, device, dtype or execution, one that is not available here,
                or guidance that the checkpoint does not support.
        """
        target = choose_device(device)
        if threads is not None:
            torch.set_num_threads(threads)
        precision = choose_dtype(dtype, target)
        opened = open_checkpoint(path, robot)
        tokenizer = opened.tokenizer()
        return cls(
            load_model(opened.directory, target, precision),
            opened.robot,
            opened.processing,
            tokenizer,
            opened.cameras,
            num_steps=num_steps,
            seed=seed,
            label=_training_label(opened.settings),
            language=_language(head, opened, tokenizer),
            execution=execution,
            fp8_prefix=fp8_prefix,
            guidance=guidance,
        )

    @property
    def horizon(self) -> int:
        """Steps in a chunk."""
        return self.model.config.horizon

    @property
    def dt_s(self) -> float:
        """Time between two steps of a chunk."""
        return self.robot.dt_s

    @property
    def state_dim(self) -> int:
        return self.robot.state_dim

    @property
    def action_dim(self) -> int:
        return self.robot.action_dim

    @property
    def joint_names(self) -> tuple[str, ...]:
        """Names of the action's values in the robot's description; empty if it has none."""
        return self.robot.action_names

    @property
    def cameras(self) -> tuple[str, ...]:
        """The robot's names of the checkpoint's cameras."""
        return tuple(self._cameras)

    @property
    def continues_prefixes(self) -> bool:
        """Whether `infer` takes a prefix."""
        return self._language is None

    @functools.cached_property
    def description(self) -> str:
        """Which policy, how large, in which precision, trained or not."""
        name = self.model.config.name
        count = sum(parameter.numel() for parameter in self.model.parameters())
        size = f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"
        dtype = str(self.model.experts.vlm.dtype).removeprefix("torch.")
        return f"{name}, {size} parameters, {dtype}" + (f", {self._label}" if self._label else "")

    def restart(self, seed: int) -> None:
        """Begin a series of inferences; equal to loading the checkpoint with this seed."""
        self._generator.manual_seed(seed)

    @torch.inference_mode()
    def infer(self, observation: Observation, prefix: ActionPrefix | None = None) -> ActionChunk:
        """Predict a chunk.

        Args:
            observation: RGB images by the robot's camera names (missing ones are masked), state
                [state_dim] in robot units, instruction.
            prefix: what the robot executes from the observation on; `guidance` makes the chunk
                continue it. None samples freely.

        Returns:
            [horizon, action_dim] absolute actions in robot units, not clipped, with the times
            of upload, resize, prompt, vision, prefix, denoise, download and postprocess.

        Raises:
            ValueError: an unknown camera, an image that is not uint8 RGB, a state or `prefix` of
                the wrong shape or not finite, a prefix for head "fast".
            PromptTooLongError: (a ValueError) the prompt does not fit and has the state in it.
            PolicyOutputError: the network's output is not finite, or no chunk.
        """
        with self._on_stream():
            clock = StageClock(self.model.device)
            inputs, state = self._prepare(observation, prefix, clock)
            clock.mark_host("prompt")
            try:
                normalized = self.sampler.sample(inputs, clock.mark)[0].cpu().numpy()
            except ActionTokenError as error:
                raise PolicyOutputError(f"the network's tokens are no chunk: {error}") from None
            clock.mark("download")
            clock.skip_host()
            actions = self._postprocess(normalized, state)
            clock.mark_host("postprocess")
            return ActionChunk(
                actions=actions,
                stamp_s=observation.stamp_s,
                dt_s=self.dt_s,
                instruction=observation.instruction,
                timings_s=clock.timings_s(),
                normalized=normalized,
            )

    @torch.inference_mode()
    def infer_batch(self, observations: Sequence[Observation]) -> list[ActionChunk]:
        """Predict a chunk for each observation in one pass of the network, in eager execution.

        The results are those of `infer` one after the other, within rounding; each chunk has the
        times of the whole batch. Errors as `infer`.
        """
        if self._language is not None:
            return [self.infer(observation) for observation in observations]
        model = self.model
        with self._on_stream():
            clock = StageClock(model.device)
            prepared = [self._prepare(observation, None, clock) for observation in observations]
            clock.mark_host("prompt")
            batch = [inputs for inputs, _ in prepared]

            def on_device(rows: Sequence[NDArray[Any]]) -> Tensor:
                return torch.from_numpy(np.stack(rows)).to(model.device)

            states = [inputs.state for inputs in batch if inputs.state is not None]
            normalized = model.sample_actions(
                torch.cat([inputs.images for inputs in batch]),
                on_device([np.array(inputs.present) for inputs in batch]),
                on_device([inputs.tokens.ids for inputs in batch]),
                on_device([inputs.tokens.mask for inputs in batch]),
                state=torch.cat(states).to(model.device) if states else None,
                noise=torch.cat([inputs.noise for inputs in batch]).to(model.device),
                num_steps=self._num_steps,
            )
            chunks = normalized.cpu().numpy()
            clock.mark("denoise")
            return [
                ActionChunk(
                    actions=self._postprocess(chunk, state),
                    stamp_s=observation.stamp_s,
                    dt_s=self.dt_s,
                    instruction=observation.instruction,
                    timings_s=clock.timings_s(),
                    normalized=chunk,
                )
                for observation, chunk, (_, state) in zip(
                    observations, chunks, prepared, strict=True
                )
            ]

    def _prepare(
        self, observation: Observation, prefix: ActionPrefix | None, clock: StageClock
    ) -> tuple[SampleInputs, FloatArray]:
        """What the network takes, and the state [state_dim] in the checkpoint's units."""
        config = self.model.config
        state = self._decode_state(observation.state)
        images, present = self._prepare_images(observation, clock.mark)
        clock.skip_host()
        normalized_state = self.processing.state.normalize(state)
        noise_shape = (1, config.horizon, config.max_action_dim)
        inputs = SampleInputs(
            images=images,
            present=present,
            tokens=self._tokenize(observation.instruction, normalized_state),
            noise=torch.randn(noise_shape, generator=self._generator),
            state=self._state_input(normalized_state) if config.kind == "pi0" else None,
            guidance=None if prefix is None else self._guide(prefix, state),
        )
        return inputs, state

    def _decode_state(self, state: FloatArray) -> FloatArray:
        array = np.asarray(state, dtype=np.float64)
        if array.shape != (self.state_dim,):
            raise ValueError(
                f"state must have shape [{self.state_dim}] for robot {self.robot.name!r}, "
                f"got {list(array.shape)}"
            )
        for i in np.flatnonzero(~np.isfinite(array)):
            raise ValueError(f"state[{i}] is {array[i]}")
        return self.robot.decode_state(array)

    def _prepare_images(
        self, observation: Observation, mark: Mark
    ) -> tuple[Tensor, tuple[bool, ...]]:
        """[1, n_cameras, 3, side, side] in the network's order, and which are present."""
        config = self.model.config
        shape = (1, len(config.cameras), 3, config.image_size, config.image_size)
        images = torch.full(shape, EMPTY, device=self.model.device)
        given, names = {}, {}
        for camera, image in observation.images.items():
            if camera not in self._cameras:
                raise ValueError(
                    f"unknown camera {camera!r}; this policy's are {', '.join(self._cameras)}"
                )
            index = config.cameras.index(self._cameras[camera])
            rotated = camera in self.robot.rotated_cameras
            given[index] = image[::-1, ::-1] if rotated else image
            names[index] = camera
        try:
            self._pictures.load(given, images[0], mark)
        except ImageError as error:
            raise ValueError(f"camera {names[error.index]!r}: {error}") from None
        return images, tuple(index in given for index in range(len(config.cameras)))

    @property
    def _state_in_prompt(self) -> bool:
        return self.model.config.has_state_prompt and self.robot.state_in_prompt is not False

    def check_instruction(self, instruction: str) -> None:
        """Raise if an instruction's prompt leaves no room for every possible state.

        It only tokenizes, below a millisecond except for the first call: any thread may call it
        while another one infers.

        Raises:
            PromptTooLongError: (a ValueError) naming the tokens needed and available. A prompt
                without a state is cut instead, as openpi and LeRobot do, with a warning.
        """
        if self._state_in_prompt:
            widest = np.full(self.state_dim, self._tokenizer.widest_state)
            self._encode_with_state(instruction, widest)

    def _encode_with_state(self, instruction: str, normalized_state: FloatArray) -> Tokens:
        """Tokens of a prompt that ends with the state.

        openpi and LeRobot cut the end of a prompt that is too long, and the state with it. Cutting
        the instruction instead could reverse its meaning ("…, but do not touch the cup").
        """
        make = pi05_prompt if self._language is None else self._language.prompt
        tokens = self._tokenizer.encode(make(instruction, normalized_state))
        if tokens.dropped:
            available = len(tokens.ids)
            raise PromptTooLongError(instruction, available + tokens.dropped, available)
        return tokens

    def _tokenize(self, instruction: str, normalized_state: FloatArray) -> Tokens:
        if self._state_in_prompt:
            return self._encode_with_state(instruction, normalized_state)
        tokens = self._tokenizer.encode(pi0_prompt(instruction, self.processing.convention))
        self.truncated_tokens = tokens.dropped
        if tokens.dropped and self._warned != instruction:
            self._warned = instruction
            logger.warning(
                "the instruction %r was cut: its prompt is %d tokens longer than the network's %d; "
                "shorten it", instruction, tokens.dropped, len(tokens.ids),
            )  # fmt: skip
        return tokens

    def _guide(self, prefix: ActionPrefix, state: FloatArray) -> PrefixGuidance | None:
        if self._language is not None:
            raise ValueError('head "fast" cannot continue a prefix: use another scheduler than rtc')

        def to_network(actions: FloatArray) -> FloatArray:
            relative = self.robot.to_delta(self.robot.decode_action(actions), state)
            return np.asarray(self.processing.action.normalize(relative))

        return PrefixGuidance.from_prefix(
            self._guidance, prefix, to_network, self.model.config, self.action_dim
        )

    def _state_input(self, normalized_state: FloatArray) -> Tensor:
        state = torch.zeros((1, self.model.config.max_state_dim))
        state[0, : self.state_dim] = torch.tensor(normalized_state, dtype=torch.float32)
        return state

    def _postprocess(self, normalized: NDArray[np.float32], state: FloatArray) -> FloatArray:
        _check_finite("the network's output", normalized)
        actions = self.processing.action.unnormalize(normalized[:, : self.action_dim])
        actions = self.robot.to_absolute(actions.astype(np.float64), state)
        actions = self.robot.encode_action(actions)
        _check_finite("the un-normalised chunk", actions)
        return actions


def _check_finite(what: str, values: FloatArray | NDArray[np.float32]) -> None:
    bad = np.argwhere(~np.isfinite(values))
    if len(bad):
        step, dim = bad[0]
        raise PolicyOutputError(
            f"{what} has {len(bad)} values that are not finite, the first at step {step}, "
            f"dimension {dim}"
        )


def choose_device(device: str | torch.device) -> torch.device:
    """A device by name, "auto" is CUDA if available; ValueError if unknown or unavailable."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
    except RuntimeError:
        raise ValueError(f"unknown device {device!r}; use auto, cuda or cpu") from None
    if target.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {str(device)!r}: no CUDA device is available; use auto or cpu")
    return target


def choose_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """None is bfloat16 on CUDA and float32 elsewhere; ValueError for an unknown dtype."""
    if dtype is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, not {name}")
    return DTYPES[name]


def _language(
    head: str | None, opened: CheckpointBundle, tokenizer: PromptTokenizer
) -> ActionLanguage | None:
    config = opened.config
    chosen = head or opened.settings.head or ("flow" if config.has_expert else "fast")
    if chosen not in HEADS:
        raise ValueError(f"head must be one of {', '.join(HEADS)}, not {chosen!r}")
    if chosen == "flow":
        if not config.has_expert:
            raise CheckpointError(
                f'{opened.directory}: {config.name} has no action expert: use head "fast"'
            )
        return None
    language = open_action_language(opened.directory, config, tokenizer)
    if language is None:
        raise CheckpointError(
            f"{opened.directory} predicts no action tokens: its config.json has no {CONFIG_KEY!r}; "
            'use head "flow"'
        )
    return language


def _training_label(settings: Settings) -> str:
    if settings.trained is None:
        return settings.note
    label = "trained" if settings.trained else "untrained"
    return f"{label} ({settings.note})" if settings.note else label
