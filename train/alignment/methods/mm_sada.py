"""MM-SADA: synchronisation and gradient reversal together (Munro and Damen, CVPR 2020)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from echoshift.train.alignment.methods.grl import GradientReversal
from echoshift.train.alignment.methods.synchronisation import Synchronisation

if TYPE_CHECKING:
    from torch import Tensor

    from echoshift.train.alignment.two_streams import StreamFeatures
    from echoshift.train.loop import StepInputs


class MultiModalSelfSupervisedAdversarial(GradientReversal):
    """The two streams with SS on both domains and a discriminator a modality."""

    reads = ("synchronisation", "grl")
    modalities = ("both",)
    loss_names = ("class", "SS source", "SS target", "domain visual", "domain audio")

    def add_heads(self) -> None:
        """Add what judges pairs, and the discriminators."""
        Synchronisation.add_heads(self)
        super().add_heads()

    def compute_terms(
        self, step: StepInputs, source: StreamFeatures, target: StreamFeatures | None
    ) -> dict[str, Tensor]:
        """Compute the terms of SS and the adversarial ones."""
        of_pairs = Synchronisation.compute_terms(self, step, source, target)
        return of_pairs | super().compute_terms(step, source, target)
