"""MM-SADA: synchronisation and gradient reversal together (Munro and Damen, CVPR 2020)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from echoshift.train.alignment.method import AlignmentMethod
from echoshift.train.alignment.methods.grl import add_discriminators, compute_adversarial_terms
from echoshift.train.alignment.methods.synchronisation import (
    build_synchronisation_head,
    compute_synchronisation_terms,
)

if TYPE_CHECKING:
    from torch import Tensor

    from echoshift.train.alignment.two_streams import StreamFeatures
    from echoshift.train.loop import StepInputs


class MultiModalSelfSupervisedAdversarial(AlignmentMethod):
    """The two streams with SS on both domains and a discriminator a modality."""

    reads = ("synchronisation", "grl")
    adapts = True
    loss_names = ("class", "SS source", "SS target", "domain visual", "domain audio")

    def add_heads(self) -> None:
        """Add what judges pairs, and the discriminators."""
        n_hidden = self.config.synchronisation.n_hidden
        self.synchronised = build_synchronisation_head(self.config.network.width, n_hidden)
        add_discriminators(self)

    def compute_terms(
        self, step: StepInputs, source: StreamFeatures, target: StreamFeatures | None
    ) -> Mapping[str, Tensor]:
        """Compute the terms of SS and the adversarial ones."""
        together = compute_synchronisation_terms(self, step, source, target)
        return together | compute_adversarial_terms(self, step, source, target)
