"""Joins relative norm alignment and gradient reversal: RNA-Net + GRL (Planamente et al., Table 2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from echoshift.train.alignment.config import AlignmentConfig
from echoshift.train.alignment.grl import adversarial_loss, build_discriminator, compute_reversal
from echoshift.train.alignment.rna import relative_norm_loss, relative_norm_loss_by_source
from echoshift.train.alignment.two_streams import StreamShapes, TwoStreams
from echoshift.train.cached.batches import Domain, Dropouts, FeatureBatch, StepInputs


class RelativeNormAlignmentWithReversal(nn.Module):
    """The two streams with RNA on both domains and a discriminator a modality."""

    loss_names = ("class", "RNA source", "RNA target", "domain visual", "domain audio")

    def __init__(self, config: AlignmentConfig, shapes: StreamShapes, n_classes: int) -> None:
        super().__init__()
        self.config = config
        self.streams = TwoStreams(config.network, shapes, n_classes)
        self.tell_visual = build_discriminator(config.network.width, config.grl.n_hidden)
        self.tell_audio = build_discriminator(config.network.width, config.grl.n_hidden)

    def losses(self, step: StepInputs, dropouts: Dropouts) -> Tensor:
        """Compute the weighted terms, float32 [5]."""
        source, target = self.streams.encode_step(step)
        of_class = self.streams.compute_class_loss(source, step.source.labels, dropouts)
        in_source = relative_norm_loss_by_source(source, step.source.domains, self.streams.n_sources)
        in_target = of_visual = of_audio = torch.zeros_like(of_class)
        if target is not None:
            in_target = relative_norm_loss(*target)
            factor = compute_reversal(step.progress, self.config.grl.peak)
            everything = torch.ones_like(source.heard), torch.ones_like(target.heard)
            of_visual = adversarial_loss(self.tell_visual, source.visual, target.visual, *everything, factor)
            of_audio = adversarial_loss(self.tell_audio, source.audio, target.audio, source.heard, target.heard, factor)
        relative, adversarial = self.config.rna.weight, self.config.grl.weight
        return torch.stack(
            [
                self.config.class_weight * of_class,
                relative * in_source,
                relative * in_target,
                adversarial * of_visual,
                adversarial * of_audio,
            ]
        )

    def predict(self, inputs: FeatureBatch, domain: Domain) -> Tensor:
        """Predict probabilities, float32 [B, K]."""
        return self.streams.predict(inputs, domain)
