"""How long one chunk takes, stage by stage, in each way to run the network."""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray

from pi05_lab.bench.roofline import Peaks, peaks_of, stage_costs
from pi05_ros.policy.config import PolicyConfig
from pi05_ros.policy.inference import Mark, SampleInputs, prefix_inputs, suffix_inputs
from pi05_ros.policy.model import Pi0, parameter_dtype
from pi05_ros.policy.policy import DTYPES, Policy
from pi05_ros.policy.processing import ACTION, STATE, Normalizer, Processing
from pi05_ros.policy.prompt import Tokens
from pi05_ros.policy.robots import aloha
from pi05_ros.types import Observation

FULL = "full"
"""Instead of a checkpoint: π0.5 in full size with seeded weights, which cost what others do."""
WAYS = ("padded", "eager", "graphs", "compile", "fp8")
"""padded: as the reference implementations do it, with prompts padded to the network's length,
absent cameras computed, and the time features made for each chunk; the others are `execution`'s,
fp8 being compile with an 8-bit prefix."""
WARM_UPS = 3
PARITY_BOUNDS = {torch.float32: 1e-3, torch.bfloat16: 0.1}
"""Largest difference of a normalised action from float32's in the plain way."""
FP8_PARITY_BOUND = 0.3
PICTURE = (480, 640, 3)


@dataclass(frozen=True)
class Case:
    """What is asked of the policy."""

    cameras: int
    tokens: int
    num_steps: int


@dataclass(frozen=True)
class Row:
    """One way in one case."""

    way: str
    case: Case
    dtype: str
    seconds: NDArray[np.float64]
    """[runs] from decoded pictures to actions on the host."""
    stages_s: dict[str, NDArray[np.float64]]
    """Stage → [runs]."""
    floor_s: float
    tflop: float
    gigabytes: float
    memory_bytes: int
    difference: float | None
    """Largest of a normalised action from the reference; None if it was not asked for."""
    bound: float

    @property
    def holds(self) -> bool:
        return self.difference is None or self.difference <= self.bound

    def quantile_ms(self, q: float) -> float:
        return float(np.quantile(self.seconds, q) * 1e3)


@dataclass
class LatencyBench:
    """A network, a device, and how often to run it."""

    checkpoint: str
    device: torch.device
    dtype: str
    runs: int = 50
    reference: bool = True
    peaks: Peaks = field(init=False)
    _references: dict[Case, NDArray[np.float32]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.peaks = peaks_of(self.device, DTYPES[self.dtype])

    def measure(self, way: str, case: Case) -> Row:
        """Load the policy for this way, warm it up, and time it."""
        difference = None
        if self.reference and case not in self._references:
            plain = self._policy("eager", case, "float32")
            self._references[case] = _first(plain, case)
            del plain
        policy = self._policy(way, case, self.dtype)
        if self.reference:
            difference = float(np.abs(_first(policy, case) - self._references[case]).max())
        observation = observe(policy, case.cameras)
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
        width = 2 if self.dtype == "bfloat16" else 4
        costs = stage_costs(policy.model.config, case.cameras, case.tokens, case.num_steps, width)
        fp8 = way == "fp8"
        return Row(
            way,
            case,
            self.dtype,
            np.array(seconds),
            {stage: np.array([one[stage] for one in stages]) for stage in stages[0]},
            sum(self.peaks.floor_s(cost) for cost in costs.values()),
            sum(cost.flop for cost in costs.values()) * 1e-12,
            sum(cost.bytes for cost in costs.values()) * 1e-9,
            self._memory_bytes(),
            difference,
            FP8_PARITY_BOUND if fp8 else PARITY_BOUNDS[DTYPES[self.dtype]],
        )

    def _policy(self, way: str, case: Case, dtype: str) -> Policy:
        execution = {"padded": "eager", "fp8": "compile"}.get(way, way)
        make = full_size_policy if self.checkpoint == FULL else self._load
        policy = make(case, self.device, dtype, execution, way == "fp8")
        if way == "padded":
            policy.sampler = PaddedSampler(policy.model, case.num_steps)
        policy._tokenizer = FixedPrompt(policy.model.config, case.tokens)  # type: ignore[assignment]
        return policy

    def _load(
        self, case: Case, device: torch.device, dtype: str, execution: str, fp8: bool
    ) -> Policy:
        return Policy.from_pretrained(
            self.checkpoint,
            device=device,
            dtype=dtype,
            num_steps=case.num_steps,
            seed=0,
            execution=execution,
            fp8_prefix=fp8,
        )

    def _memory_bytes(self) -> int:
        if self.device.type == "cuda":
            return int(torch.cuda.max_memory_reserved(self.device))
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class FixedPrompt:
    """Any text as a prompt of so many tokens."""

    def __init__(self, config: PolicyConfig, tokens: int) -> None:
        length = config.token_length
        ids = np.zeros(length, np.int64)
        ids[:tokens] = np.random.default_rng(0).integers(3, config.sizes.vocab, tokens)
        self._tokens = Tokens(ids, np.arange(length) < tokens)

    def encode(self, _: str) -> Tokens:
        return self._tokens


class PaddedSampler:
    """The way of the reference implementations, see `WAYS`."""

    def __init__(self, model: Pi0, num_steps: int) -> None:
        self._model = model
        self.num_steps = num_steps

    def sample(self, inputs: SampleInputs, mark: Mark) -> torch.Tensor:
        device = self._model.device
        return self._model.sample_actions(
            *prefix_inputs(inputs, device),
            **suffix_inputs(inputs, device),
            num_steps=self.num_steps,
            pack=False,
            mark=mark,
        )


def full_size_policy(
    case: Case, device: torch.device, dtype: str, execution: str, fp8: bool = False
) -> Policy:
    """π0.5 for ALOHA in full size, its weights drawn on the device from a fixed seed."""
    config = PolicyConfig(state_dim=14, action_dim=14)
    with torch.device("meta"):
        model = Pi0(config)
    for name, parameter in model.named_parameters():
        kind = parameter_dtype(name, DTYPES[dtype])
        parameter.data = parameter.data.to(kind)
    model = model.to_empty(device=device).eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in model.named_parameters():
        # drawn alike for every dtype
        if parameter.ndim == 1:
            parameter.fill_(float("norm" in name and "vision" in name and "weight" in name))
        else:
            fan_in = math.prod(parameter.shape[1:])
            parameter.copy_(
                torch.randn(parameter.shape, generator=generator, device=device) / fan_in**0.5
            )
    wide = {"q01": [-1.0] * 14, "q99": [1.0] * 14}
    processing = Processing(
        "lerobot",
        Normalizer(STATE, "QUANTILES", wide, 14),
        Normalizer(ACTION, "QUANTILES", wide, 14),
    )
    robot = replace(aloha(adapt_to_pi=False, delta_actions=False))
    cameras = dict(zip(config.cameras, config.cameras, strict=True))
    prompt = FixedPrompt(config, case.tokens)
    return Policy(
        model, robot, processing, prompt, cameras, case.num_steps, 0,  # type: ignore[arg-type]
        "seeded", execution, fp8,
    )  # fmt: skip


def observe(policy: Policy, cameras: int) -> Observation:
    """Noise as pictures of the first cameras, 640×480."""
    rng = np.random.default_rng(0)
    images = {
        name: rng.integers(0, 256, PICTURE, dtype=np.uint8) for name in policy.cameras[:cameras]
    }
    return Observation(images, np.zeros(policy.state_dim), "bench", 0.0)


def _first(policy: Policy, case: Case) -> NDArray[np.float32]:
    """The seed's first chunk, normalised."""
    chunk = policy.infer(observe(policy, case.cameras))
    assert chunk.normalized is not None
    return chunk.normalized.copy()


def cases(
    config: PolicyConfig, cameras: Sequence[int], tokens: Sequence[int], steps: Sequence[int]
) -> list[Case]:
    """The largest case, and from it one thing changed at a time.

    Raises:
        ValueError: more than the network takes, or less than one.
    """
    for what, values, most in (
        ("cameras", cameras, len(config.cameras)),
        ("tokens", tokens, config.token_length),
        ("steps", steps, 1000),
    ):
        for value in values:
            if not 1 <= value <= most:
                raise ValueError(f"{what} must be 1 to {most} for this network, not {value}")
    largest = Case(max(cameras), max(tokens), max(steps))
    varied = [replace(largest, cameras=value) for value in cameras]
    varied += [replace(largest, tokens=value) for value in tokens]
    varied += [replace(largest, num_steps=value) for value in steps]
    return list(dict.fromkeys([largest, *varied]))


Progress = Callable[[str], None]


def run(
    bench: LatencyBench, ways: Sequence[str], wanted: Sequence[Case], progress: Progress
) -> list[Row]:
    """All ways in the first case, and the last way in all others."""
    rows = []
    for way, case in [(way, wanted[0]) for way in ways] + [(ways[-1], c) for c in wanted[1:]]:
        progress(f"{way}: {case.cameras} cameras, {case.tokens} tokens, {case.num_steps} steps")
        rows.append(bench.measure(way, case))
    return rows
