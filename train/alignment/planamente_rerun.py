"""Planamente et al. as Zhang et al. re-ran it (Table 4): visual features aligned, RNA, predictions summed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from echoshift.train.alignment.config import AlignmentConfig
from echoshift.train.alignment.grl import adversarial_loss, build_discriminator, compute_reversal
from echoshift.train.alignment.rna import relative_norm_loss, relative_norm_loss_by_source
from echoshift.train.alignment.two_streams import StreamShapes, TwoStreams
from echoshift.train.cached.batches import Domain, Dropouts, FeatureBatch, StepInputs


class PlanamenteRerun(nn.Module):
    """The two streams, summed, with a discriminator of visual features, and RNA on both domains.

    Unlike RNA + GRL it leaves sound alone: "an adversarial loss to first align the visual features between domains and
    fuse visual and audio features or predictions afterwards". First is upstream; all terms are trained together [?].
    """

    loss_names = ("class", "domain visual", "RNA source", "RNA target")

    def __init__(self, config: AlignmentConfig, shapes: StreamShapes, n_classes: int) -> None:
        super().__init__()
        self.config = config
        self.streams = TwoStreams(config.network, shapes, n_classes)
        self.tell_visual = build_discriminator(config.network.width, config.grl.n_hidden)

    def losses(self, step: StepInputs, dropouts: Dropouts) -> Tensor:
        """Compute the weighted terms, float32 [4]."""
        source, target = self.streams.encode_step(step)
        of_class = self.streams.compute_class_loss(source, step.source.labels, dropouts)
        in_source = relative_norm_loss_by_source(source, step.source.domains, self.streams.n_sources)
        of_visual = in_target = torch.zeros_like(of_class)
        if target is not None:
            factor = compute_reversal(step.progress, self.config.grl.peak)
            everything = torch.ones_like(source.heard), torch.ones_like(target.heard)
            of_visual = adversarial_loss(self.tell_visual, source.visual, target.visual, *everything, factor)
            in_target = relative_norm_loss(*target)
        relative = self.config.rna.weight
        return torch.stack(
            [
                self.config.class_weight * of_class,
                self.config.grl.weight * of_visual,
                relative * in_source,
                relative * in_target,
            ]
        )

    def predict(self, inputs: FeatureBatch, domain: Domain) -> Tensor:
        """Predict probabilities, float32 [B, K]."""
        return self.streams.predict(inputs, domain)
