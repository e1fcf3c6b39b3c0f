"""AdaBN: the target is normalised by its own statistics (Li et al., Pattern Recognition 2018)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from echoshift.train.alignment.method import AlignmentMethod

if TYPE_CHECKING:
    from echoshift.train.alignment.two_streams import StreamFeatures
    from echoshift.train.loop import StepInputs


class AdaptiveBatchNorm(AlignmentMethod):
    """The two streams with BatchNorm whose running statistics are kept a domain.

    The source alone trains the weights. Each step also sends the target's batch through the projections, in training
    mode and without a gradient, so that the target's statistics follow the weights as they are; a target segment is
    predicted with those. With fixed weights they come to the mean and variance of the target's features.
    """

    adapts = True
    modalities = ("both", "visual", "audio")
    batch_norm = (True,)
    domain_statistics = True
    loss_names = ("class",)

    def encode(self, step: StepInputs) -> tuple[StreamFeatures, None]:
        """Compute the features of a step's source, and move both domains' statistics."""
        import torch

        features = self.streams.encode(step.source.inputs, "source")
        if step.target is not None:
            with torch.no_grad():
                self.streams.encode(step.target.inputs, "target")
        return features, None
