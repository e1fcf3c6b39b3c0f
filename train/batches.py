"""The batches that trainers see; one of the target has no field for labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class EncoderInputs:
    """What an audio-adaptive encoder sees of B segments.

    Attributes:
        visual: by name, one clip a segment: `clip` float32 [B, C, T, H, W], normalised, or the trunk's outputs.
        audio_map: the audio network's layer3 output, float [B, C_a, F, N]; zeros where there is no sound.
        has_audio: bool [B].
    """

    visual: Mapping[str, Tensor]
    audio_map: Tensor
    has_audio: Tensor

    def __len__(self) -> int:
        return len(self.has_audio)


@dataclass(frozen=True, slots=True)
class SourceBatch:
    """A labelled batch.

    Attributes:
        inputs: of B segments.
        labels: class indices int64 [B], or, multi-label, float32 [B, K] of 0 and 1.
        weights: of each sample, float32 [B] (Eq. 2 and 3); multi-label: of each sample and class, [B, K].
    """

    inputs: EncoderInputs
    labels: Tensor
    weights: Tensor


@dataclass(frozen=True, slots=True)
class TargetBatch:
    """An unlabelled batch; `absent` says which activities can't be heard, bool [B, K] (Eq. 1)."""

    inputs: EncoderInputs
    absent: Tensor


@dataclass(frozen=True, slots=True)
class LabelledTargetBatch:
    """A batch of the target's labelled part (semi-supervised CharadesEgo); fields as in SourceBatch."""

    inputs: EncoderInputs
    labels: Tensor
    weights: Tensor
