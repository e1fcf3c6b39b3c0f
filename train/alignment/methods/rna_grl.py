"""RNA-Net + GRL: relative norm alignment and gradient reversal together (Planamente et al., Table 2)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from echoshift.train.alignment.methods.grl import GradientReversal
from echoshift.train.alignment.methods.rna import RelativeNormAlignment

if TYPE_CHECKING:
    from torch import Tensor

    from echoshift.train.alignment.two_streams import StreamFeatures
    from echoshift.train.loop import StepInputs


class RelativeNormAlignmentWithReversal(GradientReversal):
    """The two streams with RNA on both domains and a discriminator a modality."""

    reads = ("rna", "grl")
    modalities = ("both",)
    loss_names: ClassVar[tuple[str, ...]] = ("class", "RNA source", "RNA target", "domain visual", "domain audio")

    def compute_terms(
        self, step: StepInputs, source: StreamFeatures, target: StreamFeatures | None
    ) -> dict[str, Tensor]:
        """Compute RNA's terms and the adversarial ones."""
        of_norms = RelativeNormAlignment.compute_terms(self, step, source, target)
        return of_norms | super().compute_terms(step, source, target)
