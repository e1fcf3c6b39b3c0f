"""The audio-infused recogniser R of Zhang et al., section 3.2, with its ablations z^m and z', as a `Method`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from echoshift.train.cached.batches import Domain, Dropouts, FeatureBatch, StepInputs
from echoshift.train.stage2.class_tokens import AudioAdaptiveClassToken
from echoshift.train.stage2.config import Stage2Config
from echoshift.train.stage2.recogniser_losses import compute_class_loss
from echoshift.train.stage2.transformer import Transformer

_SOURCE, _TARGET = 0, 1
_INIT_STD = 0.02


@dataclass(frozen=True, slots=True)
class FeatureShapes:
    """What a recogniser is built for.

    Attributes:
        visual: by output, the shape of a clip: (C,) of `pooled`, (n_tokens, C) of tokens.
        n_audio: width of the audio feature.
    """

    visual: Mapping[str, tuple[int, ...]]
    n_audio: int
    n_classes: int
    multi_label: bool


@dataclass(frozen=True, slots=True)
class Recognition:
    """What the recogniser makes of B segments: logits of p* and h [B, K], of h' [B, n_clips, K], where there are."""

    logits: Tensor
    h: Tensor | None
    h_prime: Tensor | None
    heard: Tensor


class AudioInfusedRecogniser(nn.Module):
    """R: visual tokens with a domain embedding, and a class token that sound selects, through a transformer.

    Source and target go through it together; BatchNorm, where there is any, sees both. h is learned from segments with
    sound alone; h' from silent ones too, whose activity it finds in the pictures.
    """

    loss_names = ("source", "target", "labelled target", "h", "h'")

    def __init__(self, config: Stage2Config, shapes: FeatureShapes, mean_audio: Tensor) -> None:
        super().__init__()
        chosen = config.recogniser
        self.config, self.multi_label = config, shapes.multi_label
        width = chosen.width
        self.embed_visual = nn.ModuleDict({name: nn.Linear(s[-1], width) for name, s in shapes.visual.items()})
        self.embed_audio = nn.Linear(shapes.n_audio, width) if chosen.audio_tokens else None
        n_domains = {"none": 0, "shared": 1, "per_domain": 2}[chosen.domain_embedding]
        self.domain = nn.Parameter(torch.randn(n_domains, width) * _INIT_STD) if n_domains else None
        self.class_token = self.sound_token = None
        if chosen.class_token == "learnable":
            self.class_token = nn.Parameter(torch.randn(width) * _INIT_STD)
        else:
            n_visual = sum(shape[-1] for shape in shapes.visual.values())
            self.sound_token = AudioAdaptiveClassToken(shapes.n_audio, n_visual, shapes.n_classes, chosen)
        learned = config.missing_sound.embedding == "learned"
        self.missing_sound = nn.Parameter(mean_audio.clone(), requires_grad=learned)
        self.transformer = Transformer(chosen)
        self.head_norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, shapes.n_classes)

    def losses(self, step: StepInputs, dropouts: Dropouts) -> Tensor:
        """Compute the weighted terms of Eq. 8, float32 [5], in the order of `loss_names`."""
        parts: list[tuple[FeatureBatch, Tensor, int]] = [(step.source.inputs, step.source.labels, _SOURCE)]
        if step.target is not None:
            parts.append((step.target.inputs, step.target.pseudo_labels, _TARGET))
        if step.labelled is not None:
            parts.append((step.labelled.inputs, step.labelled.labels, _TARGET))
        sizes = [len(inputs.has_audio) for inputs, _, _ in parts]
        found = self._recognise(_join([inputs for inputs, _, _ in parts]), sizes[0], dropouts)
        weights = self.config.loss
        zero = found.logits.new_zeros(())
        terms = {"source": zero, "target": zero, "labelled target": zero, "h": zero, "h'": zero}
        labelled_name = iter(self._name_parts(step))
        for (_, labels, domain), rows in zip(parts, _list_slices(sizes), strict=True):
            weight = weights.source if domain == _SOURCE else weights.target
            terms[next(labelled_name)] = weight * compute_class_loss(found.logits[rows], labels)
            if domain == _TARGET and weights.sound_terms_on == "source":
                continue
            if found.h is not None:
                terms["h"] = terms["h"] + weights.h * compute_class_loss(found.h[rows], labels, found.heard[rows])
            if found.h_prime is not None:
                of_clips = found.h_prime[rows]
                repeated = labels.repeat_interleave(of_clips.shape[1], dim=0)
                terms["h'"] = terms["h'"] + weights.h_prime * compute_class_loss(of_clips.flatten(0, 1), repeated)
        return torch.stack(list(terms.values()))

    def predict(self, inputs: FeatureBatch, domain: Domain) -> Tensor:
        """Predict probabilities p*, float32 [B, K]: softmax, or sigmoid where the task is multi-label."""
        n_source = len(inputs.has_audio) if domain == "source" else 0
        logits = self._recognise(inputs, n_source, Dropouts()).logits.float()
        return logits.sigmoid() if self.multi_label else logits.softmax(dim=-1)

    @staticmethod
    def _name_parts(step: StepInputs) -> list[str]:
        return [
            "source",
            *(["target"] if step.target is not None else []),
            *(["labelled target"] if step.labelled is not None else []),
        ]

    def _recognise(self, inputs: FeatureBatch, n_source: int, dropouts: Dropouts) -> Recognition:
        """Recognise segments, the first `n_source` of which are of the source, the rest of the target."""
        chosen = self.config.recogniser
        heard = inputs.has_audio
        if self.training:
            kept = dropouts.draw_keep(tuple(heard.shape), self.config.missing_sound.p_missing)
            heard = heard if kept is None else heard & (kept > 0)
        audio = torch.where(heard[:, None], inputs.audio, self.missing_sound)
        n_clips = next(iter(inputs.visual.values())).shape[1]
        # Tokens of all outputs and clips one after the other, [B, n_tokens, D].
        embedded = [embed(inputs.visual[name]) for name, embed in self.embed_visual.items()]
        flat = [values.flatten(1, -2) for values in embedded]
        tokens = torch.cat(flat, dim=1) if len(flat) > 1 else flat[0]
        if self.domain is not None:
            tokens = tokens + self._pick_domains(n_source, len(heard))
        h = h_prime = None
        if self.sound_token is None:
            assert self.class_token is not None
            class_tokens = self.class_token.expand(len(heard), 1, -1)
        else:
            class_tokens, h, h_prime = self.sound_token(audio, _summarise(inputs.visual))
            if chosen.class_tokens == "mean":
                class_tokens = class_tokens.mean(dim=1, keepdim=True)
        sequence = [class_tokens, tokens]
        if self.embed_audio is not None:
            # Stage 1 gives one audio feature a segment, so the n clips of Eq. 5 have the same.
            sequence.append(self.embed_audio(audio)[:, None].expand(-1, n_clips, -1))
        states = self.transformer(torch.cat(sequence, dim=1), class_tokens.shape[1], dropouts)
        logits = self.head(self.head_norm(states)).mean(dim=1)
        return Recognition(logits, h, h_prime, heard)

    def _pick_domains(self, n_source: int, n: int) -> Tensor:
        """Return each sample's domain embedding, [n, 1, D], or one for all."""
        assert self.domain is not None
        if len(self.domain) == 1:
            return self.domain[:, None]
        of_source, of_target = self.domain[_SOURCE], self.domain[_TARGET]
        return torch.cat([of_source.expand(n_source, 1, -1), of_target.expand(n - n_source, 1, -1)])


def build_recogniser(
    config: Stage2Config, shapes: FeatureShapes, mean_audio: Tensor, seed: int
) -> AudioInfusedRecogniser:
    """Build a recogniser with weights that the seed decides; `mean_audio` float32 [C_a] is the source's.

    The missing-sound embedding begins at the mean, and stays there unless it is learned.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AudioInfusedRecogniser(config, shapes, mean_audio)


def _summarise(visual: Mapping[str, Tensor]) -> Tensor:
    """Return one vector a clip, [B, n_clips, C_v]: the mean over tokens of each output, one after the other."""
    means = [values if values.dim() == 3 else values.mean(dim=2) for values in visual.values()]
    return means[0] if len(means) == 1 else torch.cat(means, dim=-1)


def _join(parts: list[FeatureBatch]) -> FeatureBatch:
    if len(parts) == 1:
        return parts[0]
    return FeatureBatch(
        {name: torch.cat([part.visual[name] for part in parts]) for name in parts[0].visual},
        torch.cat([part.audio for part in parts]),
        torch.cat([part.has_audio for part in parts]),
    )


def _list_slices(sizes: list[int]) -> list[slice]:
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [slice(start, start + size) for start, size in zip(starts, sizes, strict=True)]
