"""The network of Planamente et al., section 4, on cached features: a stream of pictures, a stream of sound."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from echoshift.train.alignment.config import NetworkConfig
from echoshift.train.alignment.masked_batch_norm import MaskedBatchNorm
from echoshift.train.cached.batches import Domain, Dropouts, FeatureBatch, StepInputs
from echoshift.train.stage2.recogniser_losses import compute_class_loss


@dataclass(frozen=True, slots=True)
class StreamShapes:
    """What the streams are built for.

    Attributes:
        visual: by output, the shape of a clip: (C,) of `pooled`, (n_tokens, C) of tokens.
        n_audio: width of the audio feature.
        n_sources: how many domains the source has.
    """

    visual: Mapping[str, tuple[int, ...]]
    n_audio: int
    n_sources: int = 1
    multi_label: bool = False


class StreamFeatures(NamedTuple):
    """F^v and f^a of B segments, [B, D] each, as the classifiers see them, and who has sound, bool [B].

    A silent segment's audio feature is zero, and no loss may count it. A stream that the network hasn't is zero.
    """

    visual: Tensor
    audio: Tensor
    heard: Tensor


class TwoStreams(nn.Module):
    """Projects each modality's cached feature and classifies: summed logits (late), or joined features (mid).

    A silent segment has no audio logits, so that its prediction is the pictures' alone; joined, its audio half is zero;
    of sound alone, its prediction is even, and it doesn't count in the loss. BatchNorm's statistics of sound are those
    of sounding segments. Visual outputs are averaged over their tokens and joined.
    """

    def __init__(
        self, config: NetworkConfig, shapes: StreamShapes, n_classes: int, *, per_domain_statistics: bool = False
    ) -> None:
        super().__init__()
        self.config, self.multi_label, self.n_sources = config, shapes.multi_label, shapes.n_sources
        has_visual, has_audio = config.modalities != "audio", config.modalities != "visual"
        n_visual, width = sum(shape[-1] for shape in shapes.visual.values()), config.width
        self.project_visual = nn.Linear(n_visual, width) if has_visual else None
        self.project_audio = nn.Linear(shapes.n_audio, width) if has_audio else None
        self.norm_visual = self.norm_audio = None
        if config.batch_norm:
            self.norm_visual = MaskedBatchNorm(width, per_domain=per_domain_statistics) if has_visual else None
            self.norm_audio = MaskedBatchNorm(width, per_domain=per_domain_statistics) if has_audio else None
        is_late = config.fusion == "late"
        self.classify_visual = nn.Linear(width, n_classes) if is_late and has_visual else None
        self.classify_audio = nn.Linear(width, n_classes) if is_late and has_audio else None
        self.classify_both = None if is_late else nn.Linear(2 * width, n_classes)

    def encode(self, inputs: FeatureBatch, domain: Domain) -> StreamFeatures:
        """Compute the features of segments, all of one domain, source domains being one."""
        return self._normalise(*self._project(inputs), inputs.has_audio, domain)

    def encode_step(self, step: StepInputs) -> tuple[StreamFeatures, StreamFeatures | None]:
        """Compute the features of a step's source and, where there is one, of its target.

        Both go through one product a projection, whose weights and gradients are read and written once then.
        """
        source = step.source.inputs
        if step.target is None:
            return self.encode(source, "source"), None
        target = step.target.inputs
        n = len(source.has_audio)
        visual = {name: torch.cat([values, target.visual[name]]) for name, values in source.visual.items()}
        both = FeatureBatch(
            visual, torch.cat([source.audio, target.audio]), torch.cat([source.has_audio, target.has_audio])
        )
        seen, heard = self._project(both)
        return (
            self._normalise(seen[:n], heard[:n], source.has_audio, "source"),
            self._normalise(seen[n:], heard[n:], target.has_audio, "target"),
        )

    def _project(self, inputs: FeatureBatch) -> tuple[Tensor, Tensor]:
        nothing = inputs.audio.new_zeros(len(inputs.has_audio), self.config.width)
        visual, audio = nothing, nothing
        if self.project_visual is not None:
            clips = _summarise(inputs.visual)
            if self.config.clips == "mean":
                clips = clips.mean(dim=1, keepdim=True)
            visual = F.relu(self.project_visual(clips)).mean(dim=1)
        if self.project_audio is not None:
            audio = F.relu(self.project_audio(inputs.audio))
        return visual, audio

    def _normalise(self, visual: Tensor, audio: Tensor, heard: Tensor, domain: Domain) -> StreamFeatures:
        if self.norm_visual is not None:
            visual = self.norm_visual(visual, torch.ones_like(heard), domain)
        if self.norm_audio is not None:
            audio = self.norm_audio(audio, heard, domain)
        return StreamFeatures(visual, audio * heard[:, None], heard)

    def classify(self, features: StreamFeatures, dropouts: Dropouts) -> Tensor:
        """Compute the logits, float [B, K]."""
        p = self.config.dropout
        if self.classify_both is not None:
            joined: Tensor = self.classify_both(dropouts.drop(torch.cat([features.visual, features.audio], dim=-1), p))
            return joined
        logits = []
        if self.classify_visual is not None:
            logits.append(self.classify_visual(dropouts.drop(features.visual, p)))
        if self.classify_audio is not None:
            logits.append(self.classify_audio(dropouts.drop(features.audio, p)) * features.heard[:, None])
        return logits[0] if len(logits) == 1 else logits[0] + logits[1]

    def compute_class_loss(self, features: StreamFeatures, labels: Tensor, dropouts: Dropouts) -> Tensor:
        """Compute the (binary) cross-entropy of segments, float32 []; of sound alone, that of sounding ones."""
        counted = features.heard if self.project_visual is None else None
        return compute_class_loss(self.classify(features, dropouts), labels, counted)

    def predict(self, inputs: FeatureBatch, domain: Domain) -> Tensor:
        """Predict probabilities, float32 [B, K]: softmax, or sigmoid where the task is multi-label."""
        logits = self.classify(self.encode(inputs, domain), Dropouts()).float()
        return logits.sigmoid() if self.multi_label else logits.softmax(dim=-1)


def _summarise(visual: Mapping[str, Tensor]) -> Tensor:
    """Return one vector a clip, [B, n_clips, C]: the mean over tokens of each output, one after the other."""
    means = [values if values.dim() == 3 else values.mean(dim=2) for values in visual.values()]
    return means[0] if len(means) == 1 else torch.cat(means, dim=-1)
