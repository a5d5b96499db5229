"""`pi05 dagger`: rolls out a policy and labels the visited states with the scripted expert.

Demonstrations show what to do where an expert goes; a policy's errors lead elsewhere (DAgger, Ross
et al. 2011). The data have the format of `pi05 record --states` and are trained on beside it. They
depend on the checkpoint, the options and the seed, not on the number of workers.
"""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

import typer

from pi05_lab.data.command import (
    ALL_TASKS,
    Episodes,
    Output,
    Seed,
    Size,
    Tasks,
    Workers,
    make_config,
    one_line_errors,
    record_dataset,
)
from pi05_lab.seeded_policy import EpisodePolicy
from pi05_ros.cli import CommandError
from pi05_ros.policy import CheckpointError

Option = typer.Option


def dagger(
    checkpoint: Annotated[str, typer.Argument(help="Folder, or 'small' (the shipped policy).")],
    output: Output,
    episodes: Episodes = 300,
    tasks: Tasks = ALL_TASKS,
    seed: Seed = 0,
    size: Size = (112, 84),
    instructions: Annotated[int, Option(
        help="Instructions that each image is labelled for.")] = 4,
    workers: Workers = 2,
) -> int:  # fmt: skip
    """Record the policy's states; the exit code."""
    try:
        EpisodePolicy.from_pretrained(checkpoint)
    except CheckpointError as error:
        raise CommandError(str(error)) from None
    with one_line_errors():
        config = make_config(tasks, seed=seed, size_px=size, states=True, instructions=instructions)
        make_policy: Any = partial(EpisodePolicy.from_pretrained, checkpoint, seed=seed, threads=1)
        record_dataset(config, output, episodes, workers, make_policy=make_policy)
    return 0
