"""The audio-infused recogniser R of Zhang et al., section 3.2, with its ablations z^m and z', as a `loop.Method`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from echoshift.train.features import FeatureBatch, FeatureShapes, join_batches, summarise_clips
from echoshift.train.loop import Domain, Dropouts, StepInputs, compute_class_loss
from echoshift.train.stage2.config import RecogniserConfig, Stage2Config

_SOURCE, _TARGET = 0, 1
_INIT_STD = 0.02


class SoundSelector(nn.Module):
    """A fully connected layer from features to logits of K activity sounds; with a hidden layer, or without."""

    def __init__(self, n_features: int, n_classes: int, config: RecogniserConfig) -> None:
        super().__init__()
        self.hidden = self.norm = None
        if config.fc == "hidden":
            self.hidden = nn.Linear(n_features, config.fc_width)
            self.norm = nn.BatchNorm1d(config.fc_width)
            n_features = config.fc_width
        self.out = nn.Linear(n_features, n_classes)

    def forward(self, features: Tensor) -> Tensor:
        """Return logits [..., K] of features [..., C]; BatchNorm counts all leading axes as samples."""
        if self.hidden is not None and self.norm is not None:
            hidden = self.hidden(features)
            features = F.relu(self.norm(hidden.flatten(0, -2)).view(hidden.shape))
        logits: Tensor = self.out(features)
        return logits


class AudioAdaptiveClassToken(nn.Module):
    """The bank of activity-sound vectors g_k with the selections h, from sound, and h', from sound and frames."""

    def __init__(self, n_audio: int, n_visual: int, n_classes: int, config: RecogniserConfig) -> None:
        super().__init__()
        width = config.bank_width or config.width
        self.sees = config.class_token == "h_prime"
        self.bank = nn.Parameter(torch.randn(n_classes, width))
        self.heard = SoundSelector(n_audio, n_classes, config)
        if self.sees:
            self.narrow = nn.Linear(n_visual, config.visual_width)
            self.narrow_norm = nn.LayerNorm(config.visual_width)
            self.chosen = SoundSelector(width + config.visual_width, n_classes, config)
        self.to_token = nn.Identity() if width == config.width else nn.Linear(width, config.width)

    def forward(self, audio: Tensor, visual: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return class tokens [B, n_clips, D], the logits of h [B, K] and those of h' [B, n_clips, K].

        `audio` is [B, C_a], `visual` [B, n_clips, C_v]. Without h' there is one token, and None.
        """
        h = self.heard(audio)
        g = h.softmax(dim=-1) @ self.bank
        if not self.sees:
            return self.to_token(g)[:, None], h, None
        narrow = F.relu(self.narrow_norm(self.narrow(visual)))
        h_prime = self.chosen(torch.cat([g[:, None].expand(-1, visual.shape[1], -1), narrow], dim=-1))
        return self.to_token(h_prime.softmax(dim=-1) @ self.bank), h, h_prime


class TransformerLayer(nn.Module):
    """A layer with LayerNorm before attention and before the MLP; no bias in the qkv projection (METHODS 5.5)."""

    def __init__(self, config: RecogniserConfig) -> None:
        super().__init__()
        self.n_heads, self.dropout = config.n_heads, config.dropout
        inner = config.n_heads * config.head_width
        self.attention_norm = nn.LayerNorm(config.width)
        self.qkv = nn.Linear(config.width, 3 * inner, bias=False)
        self.attention_out = nn.Linear(inner, config.width)
        self.mlp_norm = nn.LayerNorm(config.width)
        self.mlp_in = nn.Linear(config.width, config.mlp_width)
        self.mlp_out = nn.Linear(config.mlp_width, config.width)

    def forward(self, tokens: Tensor, dropouts: Dropouts, n_kept: int | None = None) -> Tensor:
        """Return the first `n_kept` tokens of the layer's output [B, n_kept, D]; those alone ask, all answer."""
        normed = self.attention_norm(tokens)
        if n_kept is None:
            query, key, value = self.qkv(normed).chunk(3, dim=-1)
        else:
            tokens = tokens[:, :n_kept]
            asking, answering = self.qkv.weight.tensor_split([self.qkv.weight.shape[0] // 3])
            query = F.linear(normed[:, :n_kept], asking)
            key, value = F.linear(normed, answering).chunk(2, dim=-1)
        query, key, value = (self._split_heads(x) for x in (query, key, value))
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        tokens = tokens + dropouts.drop(self.attention_out(attended), self.dropout)
        hidden = dropouts.drop(F.gelu(self.mlp_in(self.mlp_norm(tokens))), self.dropout)
        return tokens + dropouts.drop(self.mlp_out(hidden), self.dropout)

    def _split_heads(self, x: Tensor) -> Tensor:
        """View [B, P, inner] as [B, heads, P, head width]."""
        return x.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)


class Transformer(nn.Module):
    """The layers one after the other; the last one computes the class tokens alone."""

    def __init__(self, config: RecogniserConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(TransformerLayer(config) for _ in range(config.n_layers))

    def forward(self, tokens: Tensor, n_kept: int, dropouts: Dropouts) -> Tensor:
        """Return the output states [B, n_kept, D] of the first `n_kept` of the tokens [B, P, D]."""
        for layer in self.layers[:-1]:
            tokens = layer(tokens, dropouts)
        kept: Tensor = self.layers[-1](tokens, dropouts, n_kept)
        return kept


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
    sound alone; h' from silent ones too, whose activity it finds in the frames.
    """

    loss_names = ("source", "target", "labelled target", "h", "h'")

    def __init__(self, config: Stage2Config, shapes: FeatureShapes, n_classes: int, mean_audio: Tensor) -> None:
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
            self.sound_token = AudioAdaptiveClassToken(shapes.n_audio, n_visual, n_classes, chosen)
        learned = config.missing_sound.embedding == "learned"
        self.missing_sound = nn.Parameter(mean_audio.clone(), requires_grad=learned)
        self.transformer = Transformer(chosen)
        self.head_norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, n_classes)

    def losses(self, step: StepInputs, dropouts: Dropouts) -> Tensor:
        """Compute the weighted terms of Eq. 8, float32 [5], in the order of `loss_names`.

        Multi-label, h and h' still mix activity-sound vectors by their softmax; what is computed of them is the binary
        cross-entropy of the sigmoid of the same logits, since several activities may sound at once [?].
        """
        parts: list[tuple[str, FeatureBatch, Tensor]] = [("source", step.source.inputs, step.source.labels)]
        if step.target is not None:
            parts.append(("target", step.target.inputs, step.target.pseudo_labels))
        if step.labelled is not None:
            parts.append(("labelled target", step.labelled.inputs, step.labelled.labels))
        n_source = len(step.source.labels)
        found = self._recognise(join_batches([inputs for _, inputs, _ in parts]), n_source, dropouts)
        weights = self.config.loss
        terms = dict.fromkeys(self.loss_names, found.logits.new_zeros(()))
        start = 0
        for name, inputs, labels in parts:
            rows = slice(start, start + len(inputs.has_audio))
            start = rows.stop
            weight = weights.source if name == "source" else weights.target
            terms[name] = weight * compute_class_loss(found.logits[rows], labels)
            if name != "source" and weights.sound_terms_on == "source":
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
            class_tokens, h, h_prime = self.sound_token(audio, summarise_clips(inputs.visual))
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
    config: Stage2Config, shapes: FeatureShapes, n_classes: int, mean_audio: Tensor, seed: int
) -> AudioInfusedRecogniser:
    """Build a recogniser with weights that the seed decides; `mean_audio` float32 [C_a] is the source's.

    The missing-sound embedding begins at the mean, and stays there unless it is learned.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AudioInfusedRecogniser(config, shapes, n_classes, mean_audio)
