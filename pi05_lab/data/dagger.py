"""`pi05 dagger`: rolls out a policy and labels the visited states with the scripted expert.

Demonstrations show what to do where an expert goes; a policy's errors lead elsewhere (DAgger, Ross
et al. 2011). The data have the format of `pi05 record --states` and are trained on beside it. They
follow from the checkpoint, the recipe and the seed alone, not from the number of workers.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
from rich.console import Console

from pi05_ros.types import FloatArray, ImageArray, Observation


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("checkpoint", help="folder, or 'small' (the embedded policy)")
    parser.add_argument("--output", type=Path, required=True, help="folder to make")
    parser.add_argument("--episodes", type=int, default=300, help="how many (default: 300)")
    parser.add_argument(
        "--tasks",
        default="touch,pick,place,wave,home",
        help="what is tried, VERB or VERB=WEIGHT, with commas between (default: all alike)",
    )
    parser.add_argument("--seed", type=int, default=0, help="same seed, same data (default: 0)")
    parser.add_argument("--size", nargs=2, type=int, default=(112, 84), metavar=("WIDTH", "HEIGHT"))
    parser.add_argument(
        "--instructions",
        type=int,
        default=4,
        help="that each picture is labelled for (default: 4)",
    )
    parser.add_argument("--workers", type=int, default=2, help="processes (default: 2)")
    parser.set_defaults(fps=50, format="lerobot", video=False, labels="executed", states=True)


def run(options: argparse.Namespace) -> int:
    """Record; 0 if the whole dataset is there, 1 if nothing is."""
    try:
        from pi05_lab.data.command import run as record
        from pi05_ros.policy import CheckpointError, Policy
    except ModuleNotFoundError as error:
        Console().print(f"[red]{error.name} is missing: pip install 'pi05_ros[sim,train]'")
        return 1
    try:
        Policy.from_pretrained(options.checkpoint)
    except CheckpointError as error:
        Console().print(str(error), style="bold red", markup=False, highlight=False)
        return 1
    return record(options, partial(PolicyActor, options.checkpoint, options.seed))


class PolicyActor:
    """A policy as `recording.simulated.Actor`. Belongs to the process that made it."""

    def __init__(self, checkpoint: str, seed: int) -> None:
        from pi05_lab.seeded_policy import EpisodePolicy

        self._seed = seed
        policy = EpisodePolicy.from_pretrained(checkpoint, seed=seed, threads=1)
        assert isinstance(policy, EpisodePolicy)
        self._policy = policy

    def begin(self, episode: int) -> None:
        """The episode's noise follows from the seed and its number."""
        (seed,) = np.random.SeedSequence([self._seed, episode]).generate_state(1)
        self._policy.restart(int(seed))

    def __call__(
        self, images: Mapping[str, ImageArray], state: FloatArray, instruction: str
    ) -> FloatArray:
        observation = Observation(dict(images), np.asarray(state), instruction, 0.0)
        return self._policy.infer(observation).actions
