"""The audio-adaptive encoder: attention that turns audio into gates, the gated visual network, and its checkpoint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from echoshift.extract.encoders.inference_form import Precision, prepare_for_inference
from echoshift.extract.encoders.network import EncoderNetwork
from echoshift.pipeline.errors import SpecError, WeightsError, suggest
from echoshift.pipeline.tensor_files import check_tensors, read_header, read_tensors, tensor_sha256, write_tensors
from echoshift.train.stage1.config import AttentionConfig, Stage1Config
from echoshift.train.stage1.objective import EncoderObjective, build_objective

CHECKPOINT = "encoder.safetensors"
BatchNormMode = Literal["eval", "train"]

CLIP = "clip"
LOGITS = "logits"
SPLIT = "split"
CLASSIFIER = "classifier"
_PRECISIONS: Mapping[torch.dtype, Precision] = {torch.bfloat16: "bf16", torch.float16: "fp16"}
_GATED, _ATTENTION, _OBJECTIVE = "visual.", "attention.", "objective."


class AudioAttention(nn.Module):
    """The transformer psi from the audio network's map to gates between 0 and 1 (Zhang et al., section 3.1).

    The map's positions are projected to the transformer's width and follow a class token, from which the head reads the
    gates. Positions have no embedding, so their order doesn't matter. Of a segment without audio each position
    holds a learned embedding: silent segments share one gate.
    """

    def __init__(self, n_map_channels: int, gate_channels: Mapping[str, int], config: AttentionConfig) -> None:
        """Make psi for a map of `n_map_channels`, with `gate_channels` gates by path (1280 and 128 for SlowFast)."""
        super().__init__()
        width = config.width
        self.p_missing = config.p_missing
        self.projection = nn.Linear(n_map_channels, width)  # a 1x1 convolution
        self.class_token = nn.Parameter(torch.empty(width))
        self.missing_audio = nn.Parameter(torch.empty(width))
        for embedding in (self.class_token, self.missing_audio):
            nn.init.normal_(embedding, std=0.02)
        self.embedding_dropout = nn.Dropout(config.embedding_dropout)
        self.layers = nn.ModuleList(AttentionLayer(config) for _ in range(config.n_layers))
        self.head_norm = nn.LayerNorm(width)
        self.heads = nn.ModuleDict({path: nn.Linear(width, n) for path, n in gate_channels.items()})

    def forward(self, audio_map: Tensor, has_audio: Tensor) -> dict[str, Tensor]:
        """Return the gates of each path, float32 [B, channels].

        `audio_map` is [B, C, F, N], of any float type; rows where `has_audio` (bool [B]) is false may hold anything,
        NaN too. In training, audio is withheld from a segment with probability `p_missing`, drawn from torch's
        generator of the map's device.
        """
        if self.training and self.p_missing > 0:
            has_audio = has_audio & (torch.rand(len(has_audio), device=has_audio.device) >= self.p_missing)
        heard = has_audio[:, None, None]
        positions = audio_map.flatten(2).transpose(1, 2).to(self.projection.weight.dtype)
        # NaN times a gradient of 0 is NaN, so it must be gone before the projection, not only after it.
        projected = self.projection(torch.where(heard, positions, 0.0))
        # The embedding is part of the graph even when every segment has audio; DDP waits for its gradient.
        positions = torch.where(heard, projected, self.missing_audio.to(projected.dtype))
        class_token = self.class_token.to(projected.dtype).expand(len(positions), 1, -1)
        tokens = self.embedding_dropout(torch.cat([class_token, positions], dim=1))
        for layer in self.layers[:-1]:
            tokens = layer(tokens, tokens.shape[1])
        tokens = self.layers[-1](tokens, 1)
        summary = self.head_norm(tokens[:, 0])
        return {path: head(summary).float().sigmoid() for path, head in self.heads.items()}


class AttentionLayer(nn.Module):
    """A transformer layer with LayerNorm before attention and before the MLP; no bias in the qkv projection."""

    def __init__(self, config: AttentionConfig) -> None:
        super().__init__()
        self.n_heads, self.inner = config.n_heads, config.n_heads * config.head_width
        self.attention_norm = nn.LayerNorm(config.width)
        self.qkv = nn.Linear(config.width, 3 * self.inner, bias=False)
        self.attention_out = nn.Sequential(nn.Linear(self.inner, config.width), nn.Dropout(config.dropout))
        self.mlp_norm = nn.LayerNorm(config.width)
        self.mlp = nn.Sequential(
            nn.Linear(config.width, config.mlp_width),
            nn.GELU(),
            nn.Dropout(config.dropout),
            nn.Linear(config.mlp_width, config.width),
            nn.Dropout(config.dropout),
        )

    def forward(self, tokens: Tensor, n_kept: int) -> Tensor:
        """Return the first `n_kept` tokens of the layer's output [B, n_kept, width]; those alone ask, all P answer."""
        normed = self.attention_norm(tokens)
        # Three products with slices of one weight, since fewer tokens may ask than answer.
        asking, seen, given = self.qkv.weight.chunk(3)
        query, key, value = F.linear(normed[:, :n_kept], asking), F.linear(normed, seen), F.linear(normed, given)
        query, key, value = (self._split_heads(x) for x in (query, key, value))
        attended = F.scaled_dot_product_attention(query, key, value)
        tokens = tokens[:, :n_kept] + self.attention_out(attended.transpose(1, 2).flatten(2))
        return tokens + self.mlp(self.mlp_norm(tokens))

    def _split_heads(self, x: Tensor) -> Tensor:
        """View [B, P, inner] as [B, heads, P, head width]."""
        return x.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)


class GatedEncoder(nn.Module):
    """An encoder network whose trunk's channels are multiplied by gates, and which classifies by itself.

    Logits: the network's `classified_output` (an average over all positions), dropout, one Linear to `n_classes`, as
    PyTorch initialises it (seed torch before), in float32 under any autocast. The network's own classifier isn't used.

    `trainable_from` names the first stage whose weights train (`split`: the one after the split); the stages before it
    are frozen. `batch_norm` is the mode of the frozen stages' BatchNorm in training: `eval` uses its running statistics
    as they are, `train` those of the batch, and updates them. The trained stages' BatchNorm trains. Outside training
    (`.eval()`) every norm uses its running statistics. Raises SpecError for an unknown stage.

    A trunk that is frozen whole runs without gradients and, where its norms are fixed, in the inference form, which
    gives the same activations up to rounding (extract/encoders/inference_form.py), in autocast's precision.
    The network given belongs to this module from then on.
    """

    def __init__(
        self,
        network: EncoderNetwork,
        n_classes: int,
        trainable_from: str = SPLIT,
        batch_norm: BatchNormMode = "eval",
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        self.network = network
        self.batch_norm = batch_norm
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(network.n_classified, n_classes))
        self._stages = tuple(network.stages)
        first = self._find_first(trainable_from)
        self.trained_stages = self._stages[first:-1]
        self.trainable_from = self._stages[first]
        self.has_frozen_trunk = first >= self._stages.index(network.split_stage)
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(network.find_stage(name) in self.trained_stages)
        self._form: tuple[torch.device, Precision, EncoderNetwork] | None = None
        self.register_load_state_dict_post_hook(_forget_form)
        self.train(self.training)

    @property
    def gate_channels(self) -> dict[str, int]:
        """The gates that the network takes: the number of channels of each of the trunk's outputs."""
        return self.network.trunk_channels

    def train(self, mode: bool = True) -> GatedEncoder:
        """Switch training on or off; frozen stages are as `batch_norm` says."""
        super().train(mode)
        for stage in self._stages:
            if stage in self.trained_stages:
                continue
            has_batch_statistics = mode and self.batch_norm == "train" and stage != CLASSIFIER
            for module in self.network.iterate_stage_modules(stage):
                module.training = has_batch_statistics and isinstance(module, _BatchNorm)
        return self

    def forward(self, visual: Mapping[str, Tensor], gates: Mapping[str, Tensor] | None = None) -> Tensor:
        """Compute logits, float32 [B, n_classes].

        `visual` is either {"clip": [B, C, T, H, W]} or the trunk's outputs by name, as the level-2 cache holds them.
        `gates` are one for each of the trunk's outputs, [B, channels] or [1, channels], None where nothing is gated.
        Raises SpecError for the trunk's outputs where the trunk, or its statistics, are to train.
        """
        return self._classify(self._compute_features(visual, gates))

    def compute_pooled(self, visual: Mapping[str, Tensor], gates: Mapping[str, Tensor] | None = None) -> Tensor:
        """Compute what `forward` classifies, [B, n_classified]; inputs as there."""
        return self._compute_features(visual, gates)[self.network.classified_output]

    def check_cached_trunk(self) -> None:
        """Raise SpecError where the trunk, or its statistics, are to train, so that it can't come from the cache."""
        split = self.network.split_stage
        if not self.has_frozen_trunk:
            raise SpecError(
                f"the trunk comes from the cache, but weights train from {self.trainable_from} on, before the split at "
                f"{split}; use visual.mode = 'frames', or training.trainable_from = {SPLIT!r}"
            )
        if self.batch_norm == "train":
            raise SpecError(
                "the trunk comes from the cache, where its BatchNorm can't train; use visual.mode = 'frames', or "
                "training.batch_norm = 'eval'"
            )

    @torch.no_grad()
    def encode(
        self, visual: Mapping[str, Tensor], gates: Mapping[str, Tensor] | None, outputs: Sequence[str]
    ) -> dict[str, Tensor]:
        """Compute the named outputs of the network's head, and `logits`, which are those of this module.

        Without gradients; of use after `.eval()`. Inputs as for `forward`; raises SpecError for an unknown output.
        """
        for name in outputs:
            if name not in self.network.head_names:
                kind = type(self.network).__name__
                hint = suggest(name, self.network.head_names, there="it has")
                raise SpecError(f"the head of {kind} has no output {name!r}; {hint}")
        features = self._compute_features(visual, gates)
        if LOGITS in outputs:
            features[LOGITS] = self._classify(features)
        return {name: features[name] for name in outputs}

    def compute_trunk(self, visual: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Compute the trunk's outputs, before any gate, or take them as they come; inputs as for `forward`."""
        names = self.network.trunk_names
        if set(visual) == set(names):
            self.check_cached_trunk()
            return {name: visual[name] for name in names}
        if set(visual) != {CLIP}:
            raise SpecError(f"inputs {', '.join(visual) or 'none'}; the encoder takes {CLIP}, or {', '.join(names)}")
        clip = visual[CLIP]
        if not self.has_frozen_trunk:
            return self.network.trunk(clip)
        with torch.no_grad():
            if self.batch_norm == "train":
                return self.network.trunk(clip)
            return self._get_form(clip.device).trunk(clip)

    def trainable_state(self) -> dict[str, Tensor]:
        """Return what training changes, by its name in `state_dict`: what a checkpoint holds, on the module's device.

        Parameters and buffers of the trained stages and the classifier, and, with batch_norm = `train`, the buffers of
        the frozen stages. They are the tensors themselves, not copies.
        """
        buffers = {name for name, _ in self.named_buffers()}
        return {
            name: value.detach() for name, value in self.state_dict().items() if self._is_changed(name, name in buffers)
        }

    def _find_first(self, trainable_from: str) -> int:
        name = self.network.split_stage if trainable_from == SPLIT else trainable_from
        if name not in self._stages:
            kind = type(self.network).__name__
            raise SpecError(
                f"trainable_from: {kind} has no stage {name!r}; it has {SPLIT} (= {self.network.split_stage}), "
                + ", ".join(self._stages)
            )
        return self._stages.index(name)

    def _is_changed(self, name: str, is_buffer: bool) -> bool:
        inner = name.removeprefix("network.")
        if inner == name:
            return True
        stage = self.network.find_stage(inner)
        return stage in self.trained_stages or (is_buffer and self.batch_norm == "train" and stage != CLASSIFIER)

    def _classify(self, features: Mapping[str, Tensor]) -> Tensor:
        pooled = features[self.network.classified_output]
        with torch.autocast(pooled.device.type, enabled=False):
            logits: Tensor = self.classifier(pooled)
        return logits

    def _compute_features(self, visual: Mapping[str, Tensor], gates: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        trunk = self.compute_trunk(visual)
        if gates is None:
            return self.network.features(trunk)
        if set(gates) != set(trunk):
            raise SpecError(f"gates for {', '.join(gates) or 'nothing'}; the network takes some for {', '.join(trunk)}")
        return self.network.features({name: gate_channels(x, gates[name]) for name, x in trunk.items()})

    def _get_form(self, device: torch.device) -> EncoderNetwork:
        precision: Precision = "fp32"
        if torch.is_autocast_enabled(device.type):
            precision = _PRECISIONS.get(torch.get_autocast_dtype(device.type), "fp32")
        if self._form is None or self._form[:2] != (device, precision):
            form = prepare_for_inference(self.network, device, precision)
            for stage in self._stages[self._stages.index(form.split_stage) :]:
                for prefix in form.stages[stage]:  # the form runs the trunk alone
                    parent, _, leaf = prefix.rpartition(".")
                    setattr(form.get_submodule(parent), leaf, nn.Identity())
            self._form = (device, precision, form)
        return self._form[2]


def gate_channels(x: Tensor, gate: Tensor) -> Tensor:
    """Multiply the channels of x, [B, C, ...], by a gate, [B, C] or [1, C]; raises SpecError for other shapes."""
    if gate.ndim != 2 or gate.shape[0] not in (1, x.shape[0]) or gate.shape[1] != x.shape[1]:
        raise SpecError(f"a gate of {list(gate.shape)} doesn't fit activations of {list(x.shape)}")
    return x * gate[(..., *[None] * (x.ndim - 2))]


def _forget_form(module: Any, _incompatible_keys: Any) -> None:
    module._form = None


class AudioAdaptiveEncoder(nn.Module):
    """E of Zhang et al., section 3.1: a visual encoder whose channels the audio gates.

    With an `objective`, a method takes the place of the encoder's own classifier, which isn't used then.
    """

    def __init__(
        self, gated: GatedEncoder, attention: AudioAttention | None, objective: EncoderObjective | None = None
    ) -> None:
        super().__init__()
        self.gated = gated
        self.attention = attention
        self.objective = objective
        if objective is not None:
            gated.classifier.requires_grad_(False)

    @property
    def needs_audio(self) -> bool:
        """Whether audio decides anything."""
        return self.attention is not None or self.objective is not None

    def forward(self, visual: Mapping[str, Tensor], audio_map: Tensor, has_audio: Tensor) -> Tensor:
        """Compute logits [B, K] of one clip of each of B segments.

        `visual` as for GatedEncoder; `audio_map` float [B, C_a, F, N], zeros without audio; `has_audio` bool [B].
        """
        return self.gated(visual, self.compute_gates(audio_map, has_audio))

    def compute_pooled(self, visual: Mapping[str, Tensor], audio_map: Tensor, has_audio: Tensor) -> Tensor:
        """Compute what the classifier, or the objective, sees of one clip of each of B segments, [B, C]."""
        return self.gated.compute_pooled(visual, self.compute_gates(audio_map, has_audio))

    def compute_gates(self, audio_map: Tensor, has_audio: Tensor) -> dict[str, Tensor] | None:
        """Compute a gate for each channel of each path, [B, channels]; None without attention."""
        return None if self.attention is None else self.attention(audio_map, has_audio)

    def get_trained_tensors(self) -> dict[str, Tensor]:
        """Return what training changes, parameters and statistics, by name: what a checkpoint holds."""
        tensors = {f"{_GATED}{name}": tensor for name, tensor in self.gated.trainable_state().items()}
        if self.attention is not None:
            tensors |= {f"{_ATTENTION}{name}": tensor for name, tensor in self.attention.state_dict().items()}
        if self.objective is not None:
            tensors |= {f"{_OBJECTIVE}{name}": tensor for name, tensor in self.objective.list_trained().items()}
        return tensors

    def load_trained_tensors(self, tensors: Mapping[str, Tensor], place: str) -> None:
        """Load what `get_trained_tensors` gave; raises WeightsError unless names, shapes and types are the same."""
        own = self.get_trained_tensors()
        check_tensors(tensors, own, place)
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(tensors[name])


def build_encoder(
    network: EncoderNetwork,
    n_map_channels: int,
    n_classes: int,
    config: Stage1Config,
    *,
    seed: int,
    audio_network: EncoderNetwork | None = None,
    source_domains: Sequence[str] = (),
    multi_label: bool = False,
) -> AudioAdaptiveEncoder:
    """Build the encoder on a loaded network; what is new is drawn from the seed, the same whatever ran before.

    The classifier is drawn before the attention, so that encoders with and without attention begin alike. An objective
    needs the audio network, and the source's domains.
    """
    training = config.training
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        gated = GatedEncoder(network, n_classes, training.trainable_from, training.batch_norm, training.dropout)
        attention = None
        if config.attention.enabled:
            attention = AudioAttention(n_map_channels, gated.gate_channels, config.attention)
    objective = None
    if config.objective.enabled:
        assert audio_network is not None, "an objective needs the audio network"
        objective = build_objective(
            config.objective,
            audio_network,
            network.n_classified,
            n_classes,
            source_domains,
            multi_label=multi_label,
            seed=seed,
        )
    return AudioAdaptiveEncoder(gated, attention, objective)


@dataclass(frozen=True, slots=True)
class CheckpointFacts:
    """The header of a checkpoint.

    Attributes:
        encoder: the visual network's name; weights, sound_weights: sha256 of the frozen networks' tensors.
        sound: fingerprint of the store whose maps the gates are made of.
        classes: in index order.
        config: Stage1Config as JSON.
    """

    encoder: str
    weights: str
    sound_weights: str
    sound: str
    classes: tuple[str, ...]
    config: str

    def identify(self, tensors: Mapping[str, Tensor]) -> str:
        """Compute the sha256 of the whole adapted encoder, frozen parts included."""
        parts = [self.encoder, self.weights, self.sound_weights, self.sound, tensor_sha256(tensors)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def write_checkpoint(path: Path, model: AudioAdaptiveEncoder, facts: CheckpointFacts) -> str:
    """Write the trained tensors as safetensors, the facts in its header; return the encoder's identity (sha256).

    The same tensors and facts give the same bytes.
    """
    tensors = {name: t.detach().cpu().contiguous() for name, t in model.get_trained_tensors().items()}
    identity = facts.identify(tensors)
    header = {"echoshift": "audio-adaptive encoder", "identity": identity, **asdict(facts)}
    write_tensors(path, tensors, header | {"classes": json.dumps(facts.classes)})
    return identity


def read_facts(path: Path) -> CheckpointFacts:
    """Read the header of a checkpoint; raises WeightsError where it is none."""
    header = read_header(path)
    try:
        given: dict[str, Any] = {field.name: header[field.name] for field in fields(CheckpointFacts)}
    except KeyError as error:
        raise WeightsError(f"{path} is no checkpoint of an audio-adaptive encoder; run Stage 1 again") from error
    return CheckpointFacts(**given | {"classes": tuple(json.loads(header["classes"]))})


def read_checkpoint(path: Path, model: AudioAdaptiveEncoder) -> str:
    """Load a checkpoint into an encoder built for it; return its identity.

    Raises WeightsError where the file isn't one, its tensors don't fit, or have changed.
    """
    facts, tensors = read_facts(path), read_tensors(path)
    identity = facts.identify(tensors)
    if identity != read_header(path).get("identity"):
        raise WeightsError(f"{path} has changed since it was written; run Stage 1 again")
    model.load_trained_tensors(tensors, str(path))
    return identity
