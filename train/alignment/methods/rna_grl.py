"""RNA-Net + GRL: relative norm alignment and gradient reversal together (Planamente et al., Table 2)."""

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


class RelativeNormAlignmentWithReversal(AlignmentMethod):
    """The two streams with RNA on both domains and a discriminator a modality."""

    reads = ("rna", "grl")
    adapts = True
    loss_names = ("class", "RNA source", "RNA target", "domain visual", "domain audio")

    def add_heads(self) -> None:
        """Add the discriminators."""
        add_discriminators(self)

    def compute_terms(
        self, step: StepInputs, source: StreamFeatures, target: StreamFeatures | None
    ) -> Mapping[str, Tensor]:
        """Compute RNA's terms and the adversarial ones."""
        return compute_rna_terms(self, step, source, target) | compute_adversarial_terms(self, step, source, target)
