"""Trains the audio classifier on the source: layer4 and a classifier on frozen layer3 maps (METHODS 5.1)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from echoshift.extract.encoders.network import EncoderNetwork
from echoshift.pipeline.errors import RunError
from echoshift.train.stage1.config import AudioClassifierConfig
from echoshift.train.stage1.sound_features import SoundFeatures

_N_PREDICTED_AT_ONCE = 64


class AudioClassifier(nn.Module):
    """The audio network above its layer3, with a classifier of K classes."""

    def __init__(self, network: EncoderNetwork, n_features: int, n_classes: int) -> None:
        super().__init__()
        self.network: EncoderNetwork = copy.deepcopy(network).requires_grad_(False)
        for name, parameter in self.network.named_parameters():
            parameter.requires_grad = name.startswith("net.layer4.")
        self.classifier = nn.Linear(n_features, n_classes)

    def forward(self, audio_map: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits [B, K] and the pooled features [B, D] of layer3 maps [B, C, F, N]."""
        pooled = self.network.features({"map": audio_map})["pooled"]
        return self.classifier(pooled), pooled

    def train(self, mode: bool = True) -> AudioClassifier:
        """Set the mode of layer4 and the classifier; what is frozen stays in eval."""
        super().train(mode)
        self.network.eval()
        self.network.get_submodule("net.layer4").train(mode)
        return self


@dataclass(frozen=True, slots=True)
class AudioPredictions:
    """What the audio classifier says of segments.

    Attributes:
        segment_ids: of n segments.
        probabilities: p_a, float32 [n, K]: softmax, or sigmoid where the task is multi-label.
        features: the 512-d audio feature of Stage 2, float32 [n, D].
        has_audio: bool [n]; where False, the two are of no sound and count for nothing.
    """

    segment_ids: tuple[str, ...]
    probabilities: np.ndarray
    features: np.ndarray
    has_audio: np.ndarray

    def select(self, segment_ids: Sequence[str]) -> AudioPredictions:
        """Return those of some segments, in their order; raises RunError for one that isn't among them."""
        row_of = {segment_id: i for i, segment_id in enumerate(self.segment_ids)}
        missing = [s for s in segment_ids if s not in row_of]
        if missing:
            raise RunError(f"the audio classifier has no prediction of segment {missing[0]}; extract its sound")
        rows = [row_of[s] for s in segment_ids]
        return AudioPredictions(tuple(segment_ids), self.probabilities[rows], self.features[rows], self.has_audio[rows])

    def write(self, path: Path) -> None:
        """Write them as .npz in one step."""
        fresh = path.with_name(f"{path.name}.partial.npz")
        np.savez(
            fresh,
            segment_ids=np.array(self.segment_ids),
            probabilities=self.probabilities,
            features=self.features,
            has_audio=self.has_audio,
        )
        fresh.replace(path)

    @classmethod
    def read(cls, path: Path) -> AudioPredictions:
        """Read what `write` wrote; nothing in the file is run."""
        with np.load(path, allow_pickle=False) as arrays:
            return cls(
                tuple(arrays["segment_ids"].tolist()),
                arrays["probabilities"],
                arrays["features"],
                arrays["has_audio"],
            )


def train_audio_classifier(
    network: EncoderNetwork,
    sound: SoundFeatures,
    segment_ids: Sequence[str],
    labels: np.ndarray,
    n_classes: int,
    config: AudioClassifierConfig,
    *,
    seed: int,
    device: torch.device,
    advance: Callable[[int], None] = lambda n: None,
) -> tuple[AudioClassifier, list[float]]:
    """Train on the segments that have sound; return the classifier and each epoch's mean loss.

    Where the store has views of sound, one is drawn of each segment in each epoch.
    `network` is the audio encoder with its pretrained weights, which isn't changed. labels: int64 [n], or float32
    [n, K] where the task is multi-label (binary cross-entropy). Adam; the last batch of an epoch may be smaller, but
    one of a single segment joins the batch before. Raises RunError when fewer than two segments have sound.
    """
    audible = np.flatnonzero(sound.has_audio(segment_ids))
    if len(audible) < 2:
        raise RunError(
            f"the audio classifier needs sound, but {len(audible)} of {len(segment_ids)} source segments have any; "
            f"train without it: attention.enabled=false absent.weight=0 balance.kind=class"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AudioClassifier(network, sound.n_features, n_classes)
    model.to(device).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=config.lr, weight_decay=config.weight_decay)
    targets = torch.from_numpy(labels)
    losses = []
    for epoch in range(config.n_epochs):
        order = audible[np.random.default_rng([seed, epoch]).permutation(len(audible))]
        n_batches = max(1, len(order) // config.batch)
        total = 0.0
        for rows in np.array_split(order, n_batches):
            logits, _ = model(sound.draw_maps([segment_ids[i] for i in rows], seed, epoch).to(device))
            loss = compute_class_loss(logits, targets[rows].to(device))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            total += float(loss.detach()) * len(rows)
            advance(len(rows))
        losses.append(total / len(order))
    return model.eval(), losses


def compute_class_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute cross-entropy of indices [B], or the mean binary cross-entropy of 0 and 1 [B, K]."""
    if labels.ndim == 2:
        return F.binary_cross_entropy_with_logits(logits, labels)
    return F.cross_entropy(logits, labels)


@torch.inference_mode()
def predict_audio(
    model: AudioClassifier,
    sound: SoundFeatures,
    segment_ids: Sequence[str],
    *,
    multi_label: bool,
    device: torch.device,
    advance: Callable[[int], None] = lambda n: None,
) -> AudioPredictions:
    """Predict segments, labels unseen; `model` is in eval mode."""
    probabilities, features = [], []
    for start in range(0, len(segment_ids), _N_PREDICTED_AT_ONCE):
        ids = segment_ids[start : start + _N_PREDICTED_AT_ONCE]
        logits, pooled = model(sound.read_maps(ids).to(device))
        p = logits.sigmoid() if multi_label else logits.softmax(dim=1)
        probabilities.append(p.cpu().numpy())
        features.append(pooled.cpu().numpy())
        advance(len(ids))
    return AudioPredictions(
        tuple(segment_ids), np.concatenate(probabilities), np.concatenate(features), sound.has_audio(segment_ids)
    )
