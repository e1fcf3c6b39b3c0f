"""SlowOnly R50 on optical flow, the slow path of SlowFast alone, from PyTorchVideo's blocks (METHODS 4)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from echoshift.extract.encoders.registry import EncoderEntry, Shapes
from echoshift.extract.torchvision_import import ensure_torchvision
from echoshift.pipeline.specs import AudioSpec, ClipSpec, FrameSpec

if TYPE_CHECKING:
    from echoshift.extract.encoders.network import EncoderNetwork

_N_TRUNK_BLOCKS = 4  # stem, res2, res3, res4
_RES5, _CLASSIFIER = 4, 5
_N_TRUNK = 1024


def build_slowonly() -> EncoderNetwork:
    """Build the network."""
    ensure_torchvision()
    import torch
    from pytorchvideo.models.resnet import create_resnet
    from torch import Tensor

    from echoshift.extract.encoders.inference_form import fuse_pytorchvideo
    from echoshift.extract.encoders.network import EncoderNetwork, check_clip_shape

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
        trunk_channels: ClassVar = {"trunk": _N_TRUNK}

        def __init__(self) -> None:
            super().__init__()
            self.blocks = create_resnet(
                input_channel=2,
                model_depth=50,
                model_num_class=400,
                stem_conv_kernel_size=(1, 7, 7),
                stage_conv_a_kernel_size=((1, 1, 1), (1, 1, 1), (3, 1, 1), (3, 1, 1)),
            ).blocks

        def trunk(self, x: Tensor) -> dict[str, Tensor]:
            check_clip_shape(x, n_channels=2)
            for block in self.blocks[:_N_TRUNK_BLOCKS]:
                x = block(x)
            return {"trunk": x}

        def features(self, trunk_outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
            top = self.blocks[_RES5](trunk_outputs["trunk"]).float()  # means are float32 in any precision
            return {"pooled": top.amax(dim=(2, 3, 4)), "pooled_avg": top.mean(dim=(2, 3, 4))}

        def classify(self, features: Tensor) -> Tensor:
            classifier: Any = self.blocks[_CLASSIFIER]
            return classifier.proj(classifier.dropout(features))

        def fuse(self, dtype: torch.dtype) -> bool:
            fuse_pytorchvideo(self, dtype)
            return True

    return SlowOnly()


def plan_outputs(clip: ClipSpec, frame: FrameSpec | AudioSpec) -> Shapes:
    """Compute the shape of every output for one clip."""
    assert isinstance(frame, FrameSpec), "this encoder sees flow"
    side = -(-frame.crop // 16)
    return {
        "trunk": (_N_TRUNK, clip.n_frames, side, side),
        "pooled": (2 * _N_TRUNK,),
        "pooled_avg": (2 * _N_TRUNK,),
        "logits": (400,),
    }


ENTRY = EncoderEntry(
    name="slowonly_r50_flow",
    modality="flow",
    revision=2,
    clip=ClipSpec(n_frames=8, stride=4, rate_hz=30, n_clips=5),
    frame=FrameSpec(input="flow", short_side=256, crop=256, mean=(128.0,) * 2, std=(128.0,) * 2),
    build=build_slowonly,
    output_shapes=plan_outputs,
)
