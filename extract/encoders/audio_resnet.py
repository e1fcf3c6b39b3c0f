"""Builds the ResNets that encode log spectrograms, from timm's ResNet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from echoshift.extract.encoders.encoder_network import EncoderNetwork
from echoshift.extract.torchvision_import import ensure_torchvision
from echoshift.pipeline.errors import SpecError


class AudioResNet(EncoderNetwork):
    """A ResNet on one-channel spectrograms, split after layer3, the features of the attention (METHODS 4, 5.5).

    x: [B, 1, F, N], any F and N. Outputs of ResNet-18 for 257 x 1004: map [256, 17, 63] (layer3), pooled [512] (mean of
    layer4), logits [309].
    """

    trunk_names = ("map",)
    head_names = ("pooled", "logits")
    stages: ClassVar = {
        "stem": ("net.conv1", "net.bn1"),
        "layer1": ("net.layer1",),
        "layer2": ("net.layer2",),
        "layer3": ("net.layer3",),
        "layer4": ("net.layer4",),
        "classifier": ("net.fc",),
    }
    split_stage = "layer4"
    classified_output = "pooled"

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    @property
    def trunk_channels(self) -> dict[str, int]:
        """The channels after layer3."""
        stages: Any = self.net.feature_info
        return {"map": next(stage["num_chs"] for stage in stages if stage["module"] == "layer3")}

    def trunk(self, x: Tensor) -> dict[str, Tensor]:
        """Compute everything up to and including layer3."""
        if x.ndim != 4 or x.shape[1] != 1:
            raise SpecError(f"the network takes [B, 1, F, N], not {list(x.shape)}")
        for name in ("conv1", "bn1", "act1", "maxpool", "layer1", "layer2", "layer3"):
            x = self.net.get_submodule(name)(x)
        return {"map": x}

    def head(self, trunk_outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Compute layer4, its mean over frequency and time, and the logits."""
        features = self.features(trunk_outputs)
        return {**features, "logits": self.net.get_submodule("fc")(features["pooled"])}

    def features(self, trunk_outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Compute layer4 and its mean over frequency and time."""
        top = self.net.get_submodule("layer4")(trunk_outputs["map"]).float()  # means are float32 in any precision
        return {"pooled": torch.mean(top, dim=(2, 3))}


def build_resnet18_audio(n_classes: int = 309) -> AudioResNet:
    """Build ResNet-18 with one input channel and VGGSound's 309 classes."""
    ensure_torchvision()
    import timm

    return AudioResNet(timm.create_model("resnet18", in_chans=1, num_classes=n_classes, zero_init_last=False))


def build_resnet_demo(n_classes: int = 6) -> AudioResNet:
    """Build a ResNet of one block a stage and an eighth to a quarter of ResNet-18's width, for two CPU cores."""
    ensure_torchvision()
    from timm.models.resnet import BasicBlock, ResNet

    block: Any = BasicBlock
    net = ResNet(
        block,
        (1, 1, 1, 1),
        num_classes=n_classes,
        in_chans=1,
        stem_type="deep",
        stem_width=8,
        channels=(16, 32, 64, 128),
        zero_init_last=False,
    )
    return AudioResNet(net)
