"""Plug-ins of the trainer: auxiliary losses, and networks with fresh weights.

A plug-in is a Python module that has the members of `Plugin`; the YAML file names it by `plugin`.
`examples/small_policy/losses.py` is one.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from torch import Tensor, nn

from pi05_lab.data.lerobot_dataset import LeRobotDataset
from pi05_lab.training.config import LOSSES, ConfigError, TrainConfig, require_known
from pi05_ros.policy.model import Pi0

if TYPE_CHECKING:
    from pi05_lab.training.data import Batch, Frame
    from pi05_lab.training.losses import PrefixFeatures
    from pi05_lab.training.processing import DataProcessor


class AuxiliaryLosses(nn.Module):
    """Losses beside the flow loss, with their heads. Heads learn, and are not exported."""

    prefix_losses: frozenset[str] = frozenset()
    """Losses that read the hidden states of the prefix; the others get features alone."""

    def targets(
        self, images: Sequence[Frame], tokens: Tensor, token_masks: Tensor
    ) -> dict[str, Tensor]:
        """What the losses of one batch need of the data: `Batch.targets`.

        `images` are the frames of the P images; `tokens` and `token_masks` [P · J, L] the prompts.
        """
        raise NotImplementedError

    def forward(
        self, network: Pi0, batch: Batch, names: Collection[str], features: PrefixFeatures | None
    ) -> dict[str, Tensor]:
        """The losses `names` of a batch, by name.

        `features` are of the prefix, where the flow loss or one of `prefix_losses` encoded it.
        """
        raise NotImplementedError


class Plugin(Protocol):
    """The members of a plug-in module."""

    LOSSES: Sequence[str]
    """Names of its losses, for `losses` of a stage."""

    def make_losses(
        self,
        config: TrainConfig,
        processor: DataProcessor,
        datasets: Sequence[LeRobotDataset],
        losses: Collection[str],
    ) -> AuxiliaryLosses:
        """The losses of a training, of which `losses` have a weight above 0."""

    def make_network(self, config: TrainConfig, dataset: LeRobotDataset, folder: Path) -> Pi0:
        """The network of `start: scratch`; writes its tokenizer files into the folder."""


def load_plugin(config: TrainConfig) -> Plugin | None:
    """Import the plug-in that a configuration names, and check the losses against it.

    A file in a package is imported as a module of it, so that it can import its neighbours.

    Raises:
        ConfigError: it cannot be imported or lacks a member; a stage has an unknown loss.
    """
    if not config.plugin:
        return None
    name = config.plugin
    if name.endswith(".py"):
        path = Path(name).expanduser().resolve()
        if not path.is_file():
            raise ConfigError(
                f"plugin: there is no file {path}; give a path from the YAML's folder"
            )
        folder, name = path.parent, path.stem
        while (folder / "__init__.py").is_file():
            folder, name = folder.parent, f"{folder.name}.{name}"
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))
    try:
        plugin = importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"plugin: {config.plugin} cannot be imported ({error}); give a Python file or an "
            "installed module"
        ) from None
    members = ("LOSSES", "make_losses", "make_network")
    missing = [member for member in members if not hasattr(plugin, member)]
    if missing:
        raise ConfigError(f"plugin: {config.plugin} has no {', '.join(missing)}")
    for stage in config.stages:
        for loss in stage.losses:
            require_known(f"stage {stage.name!r}: losses", loss, (*LOSSES, *plugin.LOSSES))
    return cast("Plugin", plugin)
