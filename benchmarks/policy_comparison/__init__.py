"""A ResNet-18 of half the width for LeRobot's policies, whose smallest one has 11 M parameters.

LeRobot finds it by `--policy.discover_packages_path=policy_comparison`, and its configs name it
`resnet18_narrow`; whoever loads such a checkpoint imports this package first.
"""

from __future__ import annotations

from typing import Any

import torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet

NAME = "resnet18_narrow"


class NarrowResNet(ResNet):
    """ResNet-18 with 32, 64, 128 and 256 channels: 2.8 M parameters."""

    def __init__(self, norm_layer: Any = None) -> None:
        super().__init__(BasicBlock, [2, 2, 2, 2], norm_layer=norm_layer)
        self.fc = nn.Linear(256, 1)

    def _make_layer(self, block: Any, planes: int, *arguments: Any, **options: Any) -> Any:
        return super()._make_layer(block, planes // 2, *arguments, **options)


def resnet18_narrow(
    weights: None = None,
    replace_stride_with_dilation: None = None,
    norm_layer: Any = None,
) -> NarrowResNet:
    """As torchvision's constructors; without weights, because the networks learn from scratch."""
    return NarrowResNet(norm_layer)


setattr(torchvision.models, NAME, resnet18_narrow)
