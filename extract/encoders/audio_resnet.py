"""ResNets on log spectrograms, from timm's ResNet: ResNet-18 with VGGSound's classes, and a small one for the demo."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from echoshift.extract.encoders.registry import EncoderEntry, Shapes
from echoshift.extract.recipes import ZHANG2022, plan_spectrogram_shape
from echoshift.extract.torchvision_import import ensure_torchvision
from echoshift.pipeline.specs import AudioSpec, ClipSpec, FrameSpec

if TYPE_CHECKING:
    from torch import nn

    from echoshift.extract.encoders.network import EncoderNetwork


def build_resnet18_audio() -> EncoderNetwork:
    """Build ResNet-18 with one input channel and VGGSound's 309 classes."""
    ensure_torchvision()
    import timm

    return _cut(timm.create_model("resnet18", in_chans=1, num_classes=309, zero_init_last=False))


def build_resnet_demo() -> EncoderNetwork:
    """Build a ResNet of one block a stage and an eighth to a quarter of ResNet-18's width, for two CPU cores."""
    ensure_torchvision()
    from timm.models.resnet import BasicBlock, ResNet

    block: Any = BasicBlock
    net = ResNet(
        block,
        (1, 1, 1, 1),
        num_classes=6,
        in_chans=1,
        stem_type="deep",
        stem_width=8,
        channels=(16, 32, 64, 128),
        zero_init_last=False,
    )
    return _cut(net)


def _cut(net: Any) -> EncoderNetwork:
    import torch
    from timm.models.resnet import BasicBlock
    from torch import Tensor, nn

    from echoshift.extract.encoders.inference_form import FusedConv, FusedResidualBlock, replace_modules
    from echoshift.extract.encoders.network import EncoderNetwork, check_spectrogram_shape

    class AudioResNet(EncoderNetwork):
        """A ResNet on one-channel spectrograms, split after layer3, the features of the attention (METHODS 4, 5.5).

        x: [B, 1, F, N], any F and N. Outputs of ResNet-18 for 257 x 1004: map [256, 17, 63] (layer3), pooled [512]
        (mean of layer4), logits [309].
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
        trunk_channels: ClassVar = {"map": net.feature_info[3]["num_chs"]}

        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def trunk(self, x: Tensor) -> dict[str, Tensor]:
            check_spectrogram_shape(x)
            for name in ("conv1", "bn1", "act1", "maxpool", "layer1", "layer2", "layer3"):
                x = self.net.get_submodule(name)(x)
            return {"map": x}

        def features(self, trunk_outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
            top = self.net.layer4(trunk_outputs["map"]).float()  # means are float32 in any precision
            return {"pooled": torch.mean(top, dim=(2, 3))}

        def classify(self, features: Tensor) -> Tensor:
            return self.net.fc(features)

        def fuse(self, dtype: torch.dtype) -> bool:

            def fuse_block(block: Any) -> nn.Module:
                pairs = ((block.conv1, block.bn1), (block.conv2, block.bn2))
                return FusedResidualBlock(pairs, None if block.downsample is None else tuple(block.downsample), dtype)

            replace_modules(self.net, BasicBlock, fuse_block)
            # The deep stem: convolution, norm, ReLU twice, then one convolution.
            layers: list[Any] = list(self.net.conv1) if isinstance(self.net.conv1, nn.Sequential) else [self.net.conv1]
            pairs = zip(layers[::3], [*layers[1::3], self.net.bn1], strict=True)
            self.net.conv1 = nn.Sequential(*(FusedConv(conv, norm, has_relu=True, dtype=dtype) for conv, norm in pairs))
            self.net.bn1 = self.net.act1 = nn.Identity()
            return True

    return AudioResNet()


def plan_outputs(n_map: int, n_classes: int, clip: ClipSpec, audio: FrameSpec | AudioSpec) -> Shapes:
    """Compute the shape of every output for one window of audio; the clip has no say in them."""
    assert isinstance(audio, AudioSpec), "this encoder hears"
    n_bands, n_windows = plan_spectrogram_shape(audio)
    return {"map": (n_map, -(-n_bands // 16), -(-n_windows // 16)), "pooled": (2 * n_map,), "logits": (n_classes,)}


ENTRIES = (
    EncoderEntry(
        name="resnet18_audio",
        modality="audio",
        revision=2,
        clip=ClipSpec(n_frames=32, stride=2, rate_hz=60, n_clips=1),
        audio=ZHANG2022,
        default_outputs=("map", "pooled"),
        build=build_resnet18_audio,
        output_shapes=partial(plan_outputs, 256, 309),
    ),
    EncoderEntry(
        name="resnet_demo",
        modality="audio",
        revision=2,
        clip=ClipSpec(n_frames=8, stride=2, rate_hz=15, n_clips=1),
        audio=ZHANG2022.model_copy(update={"duration_s": 2.0}),
        default_outputs=("map", "pooled"),
        build=build_resnet_demo,
        output_shapes=partial(plan_outputs, 64, 6),
        default_weights="random:0",
    ),
)
