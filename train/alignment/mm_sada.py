"""Joins synchronisation and gradient reversal: MM-SADA (Munro and Damen, CVPR 2020)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from echoshift.train.alignment.config import AlignmentConfig
from echoshift.train.alignment.grl import adversarial_loss, build_discriminator, compute_reversal
from echoshift.train.alignment.synchronisation import build_synchronisation_head, find_strangers, synchronisation_loss
from echoshift.train.alignment.two_streams import StreamFeatures, StreamShapes, TwoStreams
from echoshift.train.cached.batches import Domain, Dropouts, FeatureBatch, StepInputs


class MultiModalSelfSupervisedAdversarial(nn.Module):
    """The two streams with SS on both domains and a discriminator a modality."""

    loss_names = ("class", "SS source", "SS target", "domain visual", "domain audio")

    def __init__(self, config: AlignmentConfig, shapes: StreamShapes, n_classes: int) -> None:
        super().__init__()
        self.config = config
        width = config.network.width
        self.streams = TwoStreams(config.network, shapes, n_classes)
        self.synchronised = build_synchronisation_head(width, config.synchronisation.n_hidden)
        self.tell_visual = build_discriminator(width, config.grl.n_hidden)
        self.tell_audio = build_discriminator(width, config.grl.n_hidden)

    def losses(self, step: StepInputs, dropouts: Dropouts) -> Tensor:
        """Compute the weighted terms, float32 [5]."""
        source, target = self.streams.encode_step(step)
        of_class = self.streams.compute_class_loss(source, step.source.labels, dropouts)
        in_source = self._judge(source, step.source.inputs)
        in_target = of_visual = of_audio = torch.zeros_like(of_class)
        if step.target is not None and target is not None:
            in_target = self._judge(target, step.target.inputs)
            factor = compute_reversal(step.progress, self.config.grl.peak)
            everything = torch.ones_like(source.heard), torch.ones_like(target.heard)
            of_visual = adversarial_loss(self.tell_visual, source.visual, target.visual, *everything, factor)
            of_audio = adversarial_loss(self.tell_audio, source.audio, target.audio, source.heard, target.heard, factor)
        together, adversarial = self.config.synchronisation.weight, self.config.grl.weight
        return torch.stack(
            [
                self.config.class_weight * of_class,
                together * in_source,
                together * in_target,
                adversarial * of_visual,
                adversarial * of_audio,
            ]
        )

    def predict(self, inputs: FeatureBatch, domain: Domain) -> Tensor:
        """Predict probabilities, float32 [B, K]."""
        return self.streams.predict(inputs, domain)

    def _judge(self, features: StreamFeatures, inputs: FeatureBatch) -> Tensor:
        return synchronisation_loss(self.synchronised, *features, find_strangers(inputs.audio, inputs.has_audio))
