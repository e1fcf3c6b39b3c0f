"""Builds SlowOnly R50 for optical flow from PyTorchVideo's blocks; runs them for any clip length and picture size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from echoshift.extract.encoders.encoder_network import EncoderNetwork, check_clip_shape
from echoshift.extract.torchvision_import import ensure_torchvision

_N_TRUNK_BLOCKS = 4  # stem, res2, res3, res4
_RES5, _CLASSIFIER = 4, 5
_N_TRUNK = 1024


class SlowOnly(EncoderNetwork):
    """The slow path of SlowFast alone on two flow channels (METHODS 4), split after res4.

    x: flow [B, 2, T, H, W], any T, H and W. Outputs of one clip at T = 8, 224 x 224: trunk [1024, 8, 14, 14];
    pooled [2048]: global maximum; pooled_avg [2048]: global mean, what the classifier sees; logits [400].
    """

    trunk_names = ("trunk",)
    head_names = ("pooled", "pooled_avg", "logits")
    stages: ClassVar = {
        "stem": ("blocks.0",),
        "res2": ("blocks.1",),
        "res3": ("blocks.2",),
        "res4": ("blocks.3",),
        "res5": (f"blocks.{_RES5}",),
        "classifier": (f"blocks.{_CLASSIFIER}",),
    }
    split_stage = "res5"
    classified_output = "pooled_avg"

    def __init__(self) -> None:
        super().__init__()
        self.blocks = _build_blocks()

    @property
    def trunk_channels(self) -> dict[str, int]:
        """The channels after res4."""
        return {"trunk": _N_TRUNK}

    def trunk(self, x: Tensor) -> dict[str, Tensor]:
        """Compute everything up to and including res4."""
        check_clip_shape(x, n_channels=2)
        for block in self.blocks[:_N_TRUNK_BLOCKS]:
            x = block(x)
        return {"trunk": x}

    def head(self, trunk_outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Compute res5, the pooled features and the logits."""
        features = self.features(trunk_outputs)
        classifier: Any = self.blocks[_CLASSIFIER]
        return {**features, "logits": classifier.proj(classifier.dropout(features["pooled_avg"]))}

    def features(self, trunk_outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Compute res5 and the pooled features."""
        top = self.blocks[_RES5](trunk_outputs["trunk"]).float()  # means are float32 in any precision
        return {"pooled": top.amax(dim=(2, 3, 4)), "pooled_avg": top.mean(dim=(2, 3, 4))}


def _build_blocks() -> nn.ModuleList:
    ensure_torchvision()
    from pytorchvideo.models.resnet import create_resnet

    blocks: nn.ModuleList = create_resnet(
        input_channel=2,
        model_depth=50,
        model_num_class=400,
        stem_conv_kernel_size=(1, 7, 7),
        stage_conv_a_kernel_size=((1, 1, 1), (1, 1, 1), (3, 1, 1), (3, 1, 1)),
    ).blocks
    return blocks
