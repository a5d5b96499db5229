"""Policies to evaluate, by name."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from pi05_ros import types


def names_function(source: str) -> bool:
    """Whether a source is "module:function", which runs code of that module."""
    return ":" in source and not source.startswith(("/", "."))


def load_policy(
    source: str,
    robot: str,
    *,
    device: str = "auto",
    dtype: str | None = None,
    num_steps: int | None = None,
    guidance: Mapping[str, Any] | None = None,
    seed: int = 0,
    threads: int | None = None,
) -> types.Policy:
    """A policy by name.

    Args:
        source: folder, Hugging Face id, "small", or "module:function" for what the function
            returns, any `types.Policy`.
        robot, device, dtype, num_steps, threads: of `Policy.from_pretrained`.
        guidance: of the sampler, parameters `guidance.*` of the node.
        seed: of the noise.

    Raises:
        CheckpointError: not a usable checkpoint.
        ValueError: no such function, or an unknown robot or device.
    """
    if names_function(source):
        module, _, name = source.partition(":")
        try:
            made: types.Policy = getattr(importlib.import_module(module), name)()
        except (ImportError, AttributeError) as error:
            raise ValueError(
                f'{source!r} must be "module:function" of an installed module: {error}'
            ) from None
        return made
    from pi05_lab.seeded_policy import SeededPolicy
    from pi05_ros.policy.guidance import Guidance

    policy = SeededPolicy.from_pretrained(source, robot, device, dtype, num_steps, seed, threads)
    assert isinstance(policy, SeededPolicy)
    if guidance:
        policy.guidance = Guidance(**guidance)
        policy.guidance.check(policy.model.config)
    policy.noise_seed = seed
    return policy
