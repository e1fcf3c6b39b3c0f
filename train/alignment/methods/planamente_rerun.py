"""Planamente et al. as Zhang et al. re-ran it (Table 4): visual features aligned, RNA, predictions summed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from echoshift.train.alignment.method import AlignmentMethod
from echoshift.train.alignment.methods.grl import add_discriminators, compute_adversarial_terms
from echoshift.train.alignment.methods.rna import compute_rna_terms

if TYPE_CHECKING:
    from torch import Tensor

    from echoshift.train.alignment.two_streams import StreamFeatures
    from echoshift.train.loop import StepInputs


class PlanamenteRerun(AlignmentMethod):
    """The two streams, summed, with a discriminator of visual features, and RNA on both domains.

    Unlike RNA + GRL it leaves sound alone: "an adversarial loss to first align the visual features between domains and
    fuse visual and audio features or predictions afterwards". First is upstream; all terms are trained together [?].
    """

    reads = ("rna", "grl")
    adapts = True
    fusion = ("late",)
    loss_names = ("class", "domain visual", "RNA source", "RNA target")

    def add_heads(self) -> None:
        """Add the discriminator of visual features."""
        add_discriminators(self, audio=False)

    def compute_terms(
        self, step: StepInputs, source: StreamFeatures, target: StreamFeatures | None
    ) -> Mapping[str, Tensor]:
        """Compute RNA's terms and the adversarial one."""
        return compute_rna_terms(self, step, source, target) | compute_adversarial_terms(self, step, source, target)
