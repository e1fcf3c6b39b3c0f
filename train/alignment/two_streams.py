"""The network of Planamente et al., section 4, on cached features: a stream of frames, a stream of audio."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from echoshift.train.alignment.config import AlignmentConfig, NetworkConfig
from echoshift.train.alignment.method import AlignmentMethod
from echoshift.train.features import FeatureBatch, FeatureShapes, join_batches, summarise_clips
from echoshift.train.loop import Domain, Dropouts, StepInputs, compute_class_loss

_EPS, _MOMENTUM = 1e-5, 0.1  # of BatchNorm, torch's


class StreamFeatures(NamedTuple):
    """F^v and f^a of B segments, [B, D] each, as the classifiers see them, and who has sound, bool [B].

    A silent segment's audio feature is zero, and no loss may count it. A stream that the network hasn't is zero.
    """

    visual: Tensor
    audio: Tensor
    heard: Tensor


class TwoStreams(nn.Module):
    """Projects each modality's cached feature and classifies: summed logits (late), or joined features (mid).

    A silent segment has no audio logits, so that its prediction is the frames' alone; joined, its audio half is zero;
    of sound alone, its prediction is even, and it doesn't count in the loss. BatchNorm's statistics of sound are those
    of sounding segments. Visual outputs are averaged over their tokens and joined.
    """

    def __init__(
        self, config: NetworkConfig, shapes: FeatureShapes, n_classes: int, *, per_domain_statistics: bool = False
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
        seen, heard = self._project(join_batches([source, target]))
        return (
            self._normalise(seen[:n], heard[:n], source.has_audio, "source"),
            self._normalise(seen[n:], heard[n:], target.has_audio, "target"),
        )

    def _project(self, inputs: FeatureBatch) -> tuple[Tensor, Tensor]:
        nothing = inputs.audio.new_zeros(len(inputs.has_audio), self.config.width)
        visual, audio = nothing, nothing
        if self.project_visual is not None:
            clips = summarise_clips(inputs.visual)
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


class TwoStreamNetwork(AlignmentMethod, nn.Module):
    """What `build_method` makes of an AlignmentMethod: the two streams, the method's heads, loss and predictions."""

    def __init__(self, config: AlignmentConfig, shapes: FeatureShapes, n_classes: int) -> None:
        super().__init__()
        self.config = config
        parts = [getattr(config, name) for name in self.reads]
        own = next((part for part in parts if type(part) is self.Settings), None)
        self.settings = self.Settings.model_validate(config.own) if own is None else own
        self.streams = TwoStreams(config.network, shapes, n_classes, per_domain_statistics=self.domain_statistics)
        self.add_heads()

    def losses(self, step: StepInputs, dropouts: Dropouts) -> Tensor:
        """Compute the weighted terms, float32 [n_terms], in the order of `loss_names`."""
        source, target = self.encode(step)
        of_class = self.streams.compute_class_loss(source, step.source.labels, dropouts)
        terms = {name: torch.zeros_like(of_class) for name in self.loss_names}
        found = {"class": self.config.class_weight * of_class, **self.compute_terms(step, source, target)}
        return torch.stack(list((terms | found).values()))

    def predict(self, inputs: FeatureBatch, domain: Domain) -> Tensor:
        """Predict probabilities, float32 [B, K]."""
        return self.streams.predict(inputs, domain)


class MaskedBatchNorm(nn.Module):
    """BatchNorm of [B, D] by the mean and variance of the rows that count; eps and momentum are torch's.

    nn.BatchNorm1d would count silent segments' rows. In training a batch is normalised by its own statistics, and the
    running ones of its domain move towards them; a batch in which nothing counts moves nothing. In eval mode the
    running ones of the domain normalise.

    Attributes:
        running_mean, running_var: float32 [n_domains, D]: of all batches, or, `per_domain`, of source and target.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, width: int, *, per_domain: bool) -> None:
        super().__init__()
        n_domains = 2 if per_domain else 1
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.register_buffer("running_mean", torch.zeros(n_domains, width))
        self.register_buffer("running_var", torch.ones(n_domains, width))

    def forward(self, values: Tensor, counted: Tensor, domain: Domain) -> Tensor:
        """Normalise float [B, D] of a domain; `counted` bool [B]. Rows that don't count are normalised as well."""
        values = values.float()
        kept = 1 if domain == "target" and len(self.running_mean) > 1 else 0
        if self.training:
            mean, var = self._measure(values, counted, kept)
        else:
            mean, var = self.running_mean[kept], self.running_var[kept]
        return (values - mean) * torch.rsqrt(var + _EPS) * self.weight + self.bias

    def _measure(self, values: Tensor, counted: Tensor, kept: int) -> tuple[Tensor, Tensor]:
        """Measure a batch, and move the running statistics; as torch's, those are of the unbiased variance."""
        weights = counted.float()[:, None]
        n = weights.sum()
        mean = (values * weights).sum(dim=0) / n.clamp(min=1)
        var = ((values - mean).square() * weights).sum(dim=0) / n.clamp(min=1)
        share = _MOMENTUM * (n > 0).float()
        unbiased = var.detach() * (n / (n - 1).clamp(min=1))
        running_mean, running_var = self.running_mean[kept], self.running_var[kept]
        running_mean.copy_(running_mean + share * (mean.detach() - running_mean))
        running_var.copy_(running_var + share * (unbiased - running_var))
        return mean, var
