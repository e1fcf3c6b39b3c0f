"""Builds SlowFast from PyTorchVideo's blocks and runs them for any clip length and picture size.

Only the blocks are PyTorchVideo's (their names are its checkpoints' names). Its own forward isn't used: it changes the
list it is given, and its pooling kernel fits 8x8 frames at 224 only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from echoshift.extract.encoders.encoder_network import EncoderNetwork, check_clip_shape
from echoshift.extract.encoders.slowfast_variants import N_FRAMES_PER_SLOW_FRAME, SlowFastVariant, plan_slow_indices
from echoshift.extract.torchvision_import import ensure_torchvision

_N_TRUNK_BLOCKS = 4  # stem, res2, res3, res4
_RES5, _CLASSIFIER = 4, 6


class SlowFast(EncoderNetwork):
    """SlowFast 8x8 (Feichtenhofer et al., ICCV 2019), split after res4 with the lateral joined (METHODS 4).

    Wherever both paths share a vector, the slow channels come first. x: RGB [B, 3, T, H, W], T a multiple of 4, any
    H and W. Outputs of one clip at T = 32, 224 x 224:
        trunk_slow [1280, 8, 14, 14], trunk_fast [128, 32, 14, 14];
        pooled [2304]: global maximum (METHODS 5.7); pooled_avg [2304]: global mean, what the classifier sees;
        tokens_slow [8, 2048], tokens_fast [32, 256]: maximum over space alone (CharadesEgo);
        logits [400]: of pooled_avg. PyTorchVideo and PySlowFast instead average over 7 x 7 windows at pictures
        larger than 224; at 224 both are the same.
    """

    trunk_names = ("trunk_slow", "trunk_fast")
    head_names = ("pooled", "pooled_avg", "tokens_slow", "tokens_fast", "logits")
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

    def __init__(self, variant: SlowFastVariant) -> None:
        super().__init__()
        self.variant = variant
        self.blocks = _build_blocks(variant)

    @property
    def trunk_channels(self) -> dict[str, int]:
        """The channels of both paths, those of the lateral among the slow ones."""
        return {"trunk_slow": self.variant.n_trunk_slow, "trunk_fast": self.variant.n_trunk_fast}

    def trunk(self, x: Tensor) -> dict[str, Tensor]:
        """Compute both paths up to and including the lateral after res4."""
        check_clip_shape(x, n_channels=3, multiple_of=N_FRAMES_PER_SLOW_FRAME)
        indices = plan_slow_indices(x.shape[2], self.variant.slow_sampling)
        slow, fast = x[:, :, torch.tensor(indices, device=x.device)], x
        block: Any
        for block in self.blocks[:_N_TRUNK_BLOCKS]:
            slow, fast = block.multipathway_blocks[0](slow), block.multipathway_blocks[1](fast)
            slow, fast = block.multipathway_fusion([slow, fast])
        return {"trunk_slow": slow, "trunk_fast": fast}

    def head(self, trunk_outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Compute res5 of both paths, the pooled features and the logits."""
        features = self.features(trunk_outputs)
        classifier: Any = self.blocks[_CLASSIFIER]
        return {**features, "logits": classifier.proj(classifier.dropout(features["pooled_avg"]))}

    def features(self, trunk_outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Compute res5 of both paths and the pooled features."""
        res5: Any = self.blocks[_RES5]
        paths = res5.multipathway_blocks
        slow, fast = paths[0](trunk_outputs["trunk_slow"]), paths[1](trunk_outputs["trunk_fast"])
        slow, fast = slow.float(), fast.float()  # whatever the precision of the convolutions, means are float32
        tokens_slow, tokens_fast = slow.amax(dim=(3, 4)), fast.amax(dim=(3, 4))
        pooled_avg = torch.cat([slow.mean(dim=(2, 3, 4)), fast.mean(dim=(2, 3, 4))], dim=1)
        return {
            "pooled": torch.cat([tokens_slow.amax(dim=2), tokens_fast.amax(dim=2)], dim=1),
            "pooled_avg": pooled_avg,
            "tokens_slow": tokens_slow.transpose(1, 2),
            "tokens_fast": tokens_fast.transpose(1, 2),
        }


def _build_blocks(variant: SlowFastVariant) -> nn.ModuleList:
    ensure_torchvision()
    from pytorchvideo.models.slowfast import FastToSlowFusionBuilder, create_slowfast

    fusion = FastToSlowFusionBuilder(
        slowfast_channel_reduction_ratio=8,
        conv_fusion_channel_ratio=2,
        conv_kernel_size=(variant.fusion_kernel, 1, 1),
        conv_stride=(N_FRAMES_PER_SLOW_FRAME, 1, 1),
        norm=nn.BatchNorm3d if variant.has_lateral_norm else None,
        activation=nn.ReLU if variant.has_lateral_norm else None,
    )
    network = create_slowfast(
        model_depth=variant.depth,
        model_num_class=variant.n_classes,
        stem_dim_outs=(variant.stem_width, variant.stem_width // 8),
        fusion_builder=fusion.create_module,
    )
    if not variant.zero_init_residual:
        for module in network.modules():
            if isinstance(module, nn.BatchNorm3d):
                nn.init.ones_(module.weight)
    blocks: nn.ModuleList = network.blocks
    return blocks
