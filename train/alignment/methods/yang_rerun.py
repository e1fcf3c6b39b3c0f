"""Yang et al. as Zhang et al. re-ran it (Table 4): visual features aligned, then fused with those of audio."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from echoshift.train.alignment.method import AlignmentMethod
from echoshift.train.alignment.methods.grl import add_discriminators, compute_adversarial_terms

if TYPE_CHECKING:
    from torch import Tensor

    from echoshift.train.alignment.two_streams import StreamFeatures
    from echoshift.train.loop import StepInputs


class YangRerun(AlignmentMethod):
    """The two streams, joined before one classifier (fusion `mid`), with a discriminator of visual features.

    "Directly fuse the features from visual and audio modalities before classification" (Zhang et al., section 2).
    """

    reads = ("grl",)
    adapts = True
    fusion = ("mid",)
    loss_names = ("class", "domain visual")

    def add_heads(self) -> None:
        """Add the discriminator of visual features."""
        add_discriminators(self, audio=False)

    def compute_terms(
        self, step: StepInputs, source: StreamFeatures, target: StreamFeatures | None
    ) -> Mapping[str, Tensor]:
        """Compute the adversarial term."""
        return compute_adversarial_terms(self, step, source, target)
