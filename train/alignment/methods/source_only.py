"""Source only, DeepAll (several sources), BatchNorm (if the network has it): training on the labelled source alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from echoshift.train.alignment.method import AlignmentMethod

if TYPE_CHECKING:
    from echoshift.train.alignment.two_streams import StreamFeatures
    from echoshift.train.loop import StepInputs


class SourceOnly(AlignmentMethod):
    """The two streams with the source's cross-entropy (Planamente et al., section 5)."""

    modalities = ("both", "visual", "audio")
    loss_names = ("class",)

    def encode(self, step: StepInputs) -> tuple[StreamFeatures, None]:
        """Compute the features of a step's source; a target isn't looked at."""
        return self.streams.encode(step.source.inputs, "source"), None
