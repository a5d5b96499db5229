"""The time of one chunk, stage by stage, in each mode of running the network."""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pi05_lab.bench.roofline import Peaks, peaks_of, stage_costs
from pi05_ros.policy.config import PolicyConfig
from pi05_ros.policy.inference import Mark, SampleInputs
from pi05_ros.policy.model import Pi0, integrate
from pi05_ros.policy.policy import DTYPES, Policy
from pi05_ros.policy.processing import ACTION, STATE, Normalizer, Processing
from pi05_ros.policy.prompt import Tokens
from pi05_ros.policy.robots import NAMED
from pi05_ros.types import Observation

FULL = "full"
"""Instead of a checkpoint: π0.5 in full size with seeded weights."""
MODES = ("padded", "eager", "graphs", "compile", "fp8")
"""padded: as the reference implementations run it, with prompts padded to the network's length,
absent cameras computed, and time features computed per chunk; fp8: compile with an 8-bit prefix;
the others are values of `execution`."""
WARM_UPS = 3
PARITY_BOUNDS = {torch.float32: 1e-3, torch.bfloat16: 0.1}
"""Largest difference of a normalised action from eager float32."""
FP8_PARITY_BOUND = 0.3
IMAGE_SHAPE = (480, 640, 3)


@dataclass(frozen=True)
class Scenario:
    """The size of one inference."""

    cameras: int
    tokens: int
    num_steps: int

    def __str__(self) -> str:
        return f"{self.cameras}c {self.tokens}t {self.num_steps}s"


@dataclass(frozen=True)
class Row:
    """One mode in one scenario."""

    mode: str
    scenario: Scenario
    dtype: str
    seconds: NDArray[np.float64]
    """[runs] from decoded images to actions on the host."""
    stages_s: dict[str, NDArray[np.float64]]
    """Stage → [runs], in order."""
    floor_s: float
    tflop: float
    gigabytes: float
    memory_bytes: int
    difference: float | None
    """Largest of a normalised action from the reference; None without a reference."""
    bound: float

    @property
    def holds(self) -> bool:
        return self.difference is None or self.difference <= self.bound

    def quantile_ms(self, percent: int) -> float:
        return float(np.percentile(self.seconds, percent) * 1e3)

    def stages_ms(self) -> dict[str, float]:
        """Stage → median."""
        return {stage: float(np.median(values) * 1e3) for stage, values in self.stages_s.items()}

    def to_json(self) -> dict[str, Any]:
        return {
            "way": self.mode,
            "dtype": self.dtype,
            **asdict(self.scenario),
            **{f"p{percent}_ms": self.quantile_ms(percent) for percent in (50, 95, 99)},
            "stages_p50_ms": self.stages_ms(),
            "floor_ms": self.floor_s * 1e3,
            "tflop": self.tflop,
            "gigabytes": self.gigabytes,
            "memory_bytes": self.memory_bytes,
            "max_action_difference": self.difference,
            "runs": len(self.seconds),
        }


@dataclass
class LatencyBench:
    """A network, a device, and the number of runs per row."""

    checkpoint: str
    device: torch.device
    dtype: str
    runs: int = 50
    reference: bool = True
    peaks: Peaks = field(init=False)
    _references: dict[Scenario, NDArray[np.float32]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.peaks = peaks_of(self.device, DTYPES[self.dtype])

    def measure(self, mode: str, scenario: Scenario) -> Row:
        """Load the policy in this mode, warm it up, and time it."""
        if self.reference and scenario not in self._references:
            plain = self._policy("eager", scenario, "float32")
            self._references[scenario] = _first_chunk(plain, scenario)
            del plain
        policy = self._policy(mode, scenario, self.dtype)
        difference = None
        if self.reference:
            first = _first_chunk(policy, scenario)
            difference = float(np.abs(first - self._references[scenario]).max())
        observation = observe(policy, scenario.cameras)
        for _ in range(WARM_UPS):
            policy.infer(observation)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        seconds, stages = [], []
        for _ in range(self.runs):
            begin_s = time.perf_counter()
            chunk = policy.infer(observation)
            seconds.append(time.perf_counter() - begin_s)
            stages.append(chunk.timings_s)
        dtype = DTYPES[self.dtype]
        costs = stage_costs(
            policy.model.config,
            scenario.cameras, scenario.tokens, scenario.num_steps,
            dtype.itemsize,
        ).values()  # fmt: skip
        return Row(
            mode=mode,
            scenario=scenario,
            dtype=self.dtype,
            seconds=np.array(seconds),
            stages_s={stage: np.array([run[stage] for run in stages]) for stage in stages[0]},
            floor_s=sum(self.peaks.floor_s(cost) for cost in costs),
            tflop=sum(cost.flop for cost in costs) * 1e-12,
            gigabytes=sum(cost.bytes for cost in costs) * 1e-9,
            memory_bytes=self._memory_bytes(),
            difference=difference,
            bound=FP8_PARITY_BOUND if mode == "fp8" else PARITY_BOUNDS[dtype],
        )

    def _policy(self, mode: str, scenario: Scenario, dtype: str) -> Policy:
        execution = {"padded": "eager", "fp8": "compile"}.get(mode, mode)
        settings: dict[str, Any] = {
            "num_steps": scenario.num_steps,
            "seed": 0,
            "execution": execution,
            "fp8_prefix": mode == "fp8",
        }
        if self.checkpoint == FULL:
            policy = full_size_policy(self.device, dtype, **settings)
        else:
            policy = Policy.from_pretrained(
                self.checkpoint, device=self.device, dtype=dtype, **settings
            )
        if mode == "padded":
            policy.sampler = PaddedSampler(policy.model, scenario.num_steps)
        policy._tokenizer = FixedPrompt(policy.model.config, scenario.tokens)  # type: ignore[assignment]
        return policy

    def _memory_bytes(self) -> int:
        if self.device.type == "cuda":
            return int(torch.cuda.max_memory_reserved(self.device))
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class FixedPrompt:
    """Tokenizer stub: every prompt has `tokens` tokens."""

    def __init__(self, config: PolicyConfig, tokens: int) -> None:
        length = config.token_length
        ids = np.zeros(length, np.int64)
        ids[:tokens] = np.random.default_rng(0).integers(3, config.sizes.vocab, tokens)
        self._tokens = Tokens(ids, np.arange(length) < tokens)

    def encode(self, _: str) -> Tokens:
        return self._tokens


class PaddedSampler:
    """Samples as the reference implementations do, see `MODES`."""

    def __init__(self, model: Pi0, num_steps: int) -> None:
        self._model = model
        self._num_steps = num_steps

    @torch.inference_mode()
    def sample(self, inputs: SampleInputs, mark: Mark) -> torch.Tensor:
        model, tokens = self._model, inputs.tokens
        features = model.embed_images(inputs.images)
        mark("vision")
        prefix = model.prefill(
            features,
            torch.tensor([inputs.present], device=model.device),
            torch.from_numpy(tokens.ids)[None].to(model.device),
            torch.from_numpy(tokens.mask)[None].to(model.device),
            masked=not (all(inputs.present) and tokens.mask.all()),
        )
        mark("prefix")
        state = None if inputs.state is None else inputs.state.to(model.device)
        velocity = partial(model.denoise_step, prefix, state=state)
        noise = inputs.noise.to(model.device)
        actions = integrate(velocity, noise, model.schedule(self._num_steps))
        mark("denoise")
        return actions


def full_size_policy(device: torch.device, dtype: str, **settings: Any) -> Policy:
    """π0.5 for ALOHA in full size, its weights drawn on the device from a fixed seed.

    Args:
        device, dtype: of the network; every dtype has the same draws.
        settings: of `Policy`.
    """
    config = PolicyConfig(state_dim=14, action_dim=14)
    with torch.device("meta"):
        model = Pi0(config)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(model.parameter_dtype(name, DTYPES[dtype]))
    model = model.to_empty(device=device).eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.fill_(float("norm" in name and "vision" in name and "weight" in name))
        else:
            values = torch.randn(parameter.shape, generator=generator, device=device)
            parameter.copy_(values / math.prod(parameter.shape[1:]) ** 0.5)
    wide = {"q01": [-1.0] * 14, "q99": [1.0] * 14}
    state, action = (Normalizer(key, "QUANTILES", wide, 14) for key in (STATE, ACTION))
    cameras = dict(zip(config.cameras, config.cameras, strict=True))
    return Policy(
        model,
        NAMED["aloha"].with_conventions(adapt_units=False, delta_actions=False),
        Processing("lerobot", state, action),
        FixedPrompt(config, config.token_length),  # type: ignore[arg-type]
        cameras,
        label="seeded",
        **settings,
    )


def observe(policy: Policy, cameras: int) -> Observation:
    """Noise as images of the first cameras, 640×480."""
    rng = np.random.default_rng(0)
    images = {
        name: rng.integers(0, 256, IMAGE_SHAPE, dtype=np.uint8) for name in policy.cameras[:cameras]
    }
    return Observation(images, np.zeros(policy.state_dim), "bench", 0.0)


def _first_chunk(policy: Policy, scenario: Scenario) -> NDArray[np.float32]:
    """The seed's first chunk, normalised."""
    chunk = policy.infer(observe(policy, scenario.cameras))
    assert chunk.normalized is not None
    return chunk.normalized.copy()


def scenarios(
    config: PolicyConfig, cameras: Sequence[int], tokens: Sequence[int], steps: Sequence[int]
) -> list[Scenario]:
    """The largest scenario, and variations of one size at a time.

    Raises:
        ValueError: a size below 1 or above what the network takes.
    """
    for what, values, most in (
        ("cameras", cameras, len(config.cameras)),
        ("tokens", tokens, config.token_length),
        ("steps", steps, 1000),
    ):
        for value in values:
            if not 1 <= value <= most:
                raise ValueError(f"{what} must be 1 to {most} for this network, not {value}")
    largest = Scenario(max(cameras), max(tokens), max(steps))
    varied = [replace(largest, cameras=value) for value in cameras]
    varied += [replace(largest, tokens=value) for value in tokens]
    varied += [replace(largest, num_steps=value) for value in steps]
    return list(dict.fromkeys([largest, *varied]))
