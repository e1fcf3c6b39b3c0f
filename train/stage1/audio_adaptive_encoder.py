"""Puts the audio-adaptive encoder together: a gated visual network, and the attention that makes its gates of sound."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from echoshift.extract.encoders.network import EncoderNetwork
from echoshift.pipeline.errors import WeightsError
from echoshift.pipeline.tensor_files import check_tensors, read_header, read_tensors, tensor_sha256, write_tensors
from echoshift.train.batches import EncoderInputs
from echoshift.train.stage1.audio_attention import AudioAttention
from echoshift.train.stage1.config import Stage1Config
from echoshift.train.stage1.gated_encoder import GatedEncoder
from echoshift.train.stage1.objective import EncoderObjective, build_objective
from echoshift.train.stage1.sound_features import SoundFeatures
from echoshift.train.stage1.visual_inputs import ClipFacts

_GATED, _ATTENTION, _OBJECTIVE = "visual.", "attention.", "objective."


class AudioAdaptiveEncoder(nn.Module):
    """E of Zhang et al., section 3.1: a visual encoder whose channels the sound gates.

    With an `objective`, a method stands on it in place of its own classifier, which isn't used then.
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

    def forward(self, inputs: EncoderInputs) -> Tensor:
        """Return logits [B, K] of one clip of each of B segments."""
        return self.gated(inputs.visual, self.compute_gates(inputs.audio_map, inputs.has_audio))

    def compute_pooled(self, inputs: EncoderInputs) -> Tensor:
        """Return what the classifier, or the objective, sees of one clip of each of B segments, [B, C]."""
        return self.gated.compute_pooled(inputs.visual, self.compute_gates(inputs.audio_map, inputs.has_audio))

    def compute_gates(self, audio_map: Tensor, has_audio: Tensor) -> dict[str, Tensor] | None:
        """Return a gate for each channel of each path, [B, channels], or None without attention."""
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
        check_tensors(tensors, self.get_trained_tensors(), place)
        self.gated.load_trainable_state({n.removeprefix(_GATED): t for n, t in tensors.items() if n.startswith(_GATED)})
        if self.attention is not None:
            own = {n.removeprefix(_ATTENTION): t for n, t in tensors.items() if n.startswith(_ATTENTION)}
            self.attention.load_state_dict(own, strict=True)
        if self.objective is not None:
            with torch.no_grad():
                for name, tensor in self.objective.list_trained().items():
                    tensor.copy_(tensors[f"{_OBJECTIVE}{name}"])


def build_encoder(
    network: EncoderNetwork,
    n_map_channels: int,
    n_classes: int,
    config: Stage1Config,
    *,
    seed: int,
    sound_network: EncoderNetwork | None = None,
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
    if not config.objective.enabled:
        return AudioAdaptiveEncoder(gated, attention)
    assert sound_network is not None, "an objective hears"
    objective = build_objective(
        config.objective,
        sound_network,
        network.n_classified,
        n_classes,
        source_domains,
        multi_label=multi_label,
        seed=seed,
    )
    return AudioAdaptiveEncoder(gated, attention, objective)


@dataclass(frozen=True, slots=True)
class CheckpointFacts:
    """What a checkpoint says of itself besides its tensors.

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
        """Compute the sha256 that stands for the whole adapted encoder, frozen parts included."""
        parts = [self.encoder, self.weights, self.sound_weights, self.sound, tensor_sha256(tensors)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def write_checkpoint(path: Path, model: AudioAdaptiveEncoder, facts: CheckpointFacts) -> str:
    """Write the trained tensors as safetensors, the facts in its header; return the encoder's identity (sha256).

    The same tensors and facts give the same bytes.
    """
    tensors = {name: t.detach().cpu().contiguous() for name, t in model.get_trained_tensors().items()}
    identity = facts.identify(tensors)
    header = {
        "echoshift": "audio-adaptive encoder",
        "identity": identity,
        "encoder": facts.encoder,
        "weights": facts.weights,
        "sound_weights": facts.sound_weights,
        "sound": facts.sound,
        "classes": json.dumps(facts.classes),
        "config": facts.config,
    }
    write_tensors(path, tensors, header)
    return identity


def read_checkpoint(path: Path, model: AudioAdaptiveEncoder) -> str:
    """Load a checkpoint into an encoder built for it; return its identity.

    Raises WeightsError where the file isn't one, its tensors don't fit, or have changed.
    """
    header = read_header(path)
    try:
        facts = CheckpointFacts(
            header["encoder"],
            header["weights"],
            header["sound_weights"],
            header["sound"],
            tuple(json.loads(header["classes"])),
            header["config"],
        )
        expected = header["identity"]
    except KeyError as error:
        raise WeightsError(f"{path} is no checkpoint of an audio-adaptive encoder; run Stage 1 again") from error
    tensors = read_tensors(path)
    if facts.identify(tensors) != expected:
        raise WeightsError(f"{path} has changed since it was written; run Stage 1 again")
    model.load_trained_tensors(tensors, str(path))
    return expected


@dataclass(frozen=True, slots=True)
class SegmentPrediction:
    """What the encoder says of one segment.

    Attributes:
        probabilities: float32 [K]: the mean over clips of the softmax, or, multi-label, the maximum of the sigmoid.
        outputs: outputs of the visual encoder by name, float32 [n_clips, ...].
        facts: which times and frames the clips cover.
    """

    segment_id: str
    probabilities: np.ndarray
    outputs: Mapping[str, np.ndarray]
    facts: ClipFacts


@torch.inference_mode()
def predict_segments(
    model: AudioAdaptiveEncoder,
    clips: Iterable[tuple[str, Mapping[str, Tensor], ClipFacts]],
    sound: SoundFeatures,
    *,
    multi_label: bool,
    device: torch.device,
    outputs: Sequence[str] = (),
    without_sound: bool = False,
) -> Iterator[SegmentPrediction]:
    """Predict segments from all their clips; one window of sound gates all clips of a segment (METHODS 5.5).

    `without_sound` treats every segment as one without a track (the sound is missing at test).
    """
    model.eval()
    for segment_id, visual, facts in clips:
        on_device = {name: value.to(device) for name, value in visual.items()}
        n_clips = len(next(iter(on_device.values())))
        gates, inputs = None, None
        if model.attention is not None or model.objective is not None:
            has_audio = torch.from_numpy(sound.has_audio([segment_id]) & (not without_sound)).to(device)
            inputs = EncoderInputs({}, sound.read_maps([segment_id]).to(device), has_audio)
            gates = model.compute_gates(inputs.audio_map, has_audio)
            if gates is not None:
                gates = {name: gate.expand(n_clips, -1) for name, gate in gates.items()}
        if model.objective is None:
            computed = model.gated.encode(on_device, gates, (*outputs, "logits"))
            logits = computed["logits"].float()
            of_clips = logits.sigmoid() if multi_label else logits.softmax(dim=1)
        else:
            assert inputs is not None, "an objective hears"
            classified = model.gated.network.classified_output
            computed = model.gated.encode(on_device, gates, tuple(dict.fromkeys((*outputs, classified))))
            of_clips = model.objective.predict_clips(computed[classified], inputs)
        p = of_clips.amax(dim=0) if multi_label else of_clips.mean(dim=0)
        named = {name: computed[name].float().cpu().numpy() for name in outputs}
        yield SegmentPrediction(segment_id, p.cpu().numpy(), named, facts)
