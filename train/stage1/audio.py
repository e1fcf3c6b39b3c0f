"""Audio of segments: features of the frozen network from its store, and the audio classifier that trains on them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from echoshift.extract.clips import draw_integer
from echoshift.extract.encoders.network import EncoderNetwork
from echoshift.pipeline.errors import RunError
from echoshift.pipeline.store.interface import FeatureStore, RowFinder
from echoshift.train.predictions import AudioPredictions
from echoshift.train.stage1.clips import derive_epoch_seed
from echoshift.train.stage1.config import AudioClassifierConfig

MAP, POOLED = "map", "pooled"
_N_PREDICTED_AT_ONCE = 64


class AudioFeatures:
    """Layer3 maps and pooled features of segments, from the store of an audio encoder; rows without audio are zeros.

    Of a store with views it is the first, the clean one, unless views are asked for. Only what is asked for is read.
    """

    def __init__(self, store: FeatureStore) -> None:
        self._shapes = {output.name: output.shape for output in store.spec.outputs}
        if not {MAP, POOLED} <= self._shapes.keys():
            raise RunError(f"{store.path} holds {', '.join(sorted(self._shapes))}; Stage 1 needs {MAP} and {POOLED}")
        self._store = store
        self._finder = RowFinder(list(store.segment_ids))
        self._has_audio = store.read_array("has_audio").astype(bool)

    @property
    def map_shape(self) -> tuple[int, ...]:
        """The shape of one map: channels, frequencies, times."""
        return self._shapes[MAP]

    @property
    def n_features(self) -> int:
        """The width of the pooled feature."""
        return self._shapes[POOLED][0]

    def has_audio(self, segment_ids: Sequence[str]) -> np.ndarray:
        """Tell which segments have a usable track, bool [n]."""
        return self._has_audio[self._finder.find(str(self._store.path), segment_ids)]

    def read_maps(self, segment_ids: Sequence[str], views: np.ndarray | None = None) -> Tensor:
        """Read layer3 maps, float32 [n, C, F, N], of the clean view or of `views`, int64 [n].

        Raises StoreError for a row that isn't done.
        """
        return torch.from_numpy(self._read(segment_ids, MAP, views))

    def draw_maps(self, segment_ids: Sequence[str], seed: int, epoch: int) -> Tensor:
        """Read one view's map of each segment, float32 [n, C, F, N], drawn evenly by seed, epoch and segment.

        For training alone; of a store with one view, that one.
        """
        n_views = self._store.spec.n_sound_views
        if n_views == 1:
            return self.read_maps(segment_ids)
        drawn_by = derive_epoch_seed(seed, epoch)
        views = [draw_integer(0, n_views - 1, drawn_by, name, 0, 0, "view of sound") for name in segment_ids]
        return self.read_maps(segment_ids, np.array(views, np.int64))

    def read_pooled(self, segment_ids: Sequence[str]) -> np.ndarray:
        """Read pooled features of the clean view, float32 [n, D]."""
        return self._read(segment_ids, POOLED)

    def _read(self, segment_ids: Sequence[str], output: str, views: np.ndarray | None = None) -> np.ndarray:
        views = np.zeros(len(segment_ids), np.int64) if views is None else views
        values = self._store.read_clips(segment_ids, output, views).astype(np.float32)
        values[~self.has_audio(segment_ids)] = 0  # the store's NaN
        return values


class AudioClassifier(nn.Module):
    """The audio network above its layer3, with a classifier of K classes (METHODS 5.1)."""

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


def train_audio_classifier(
    network: EncoderNetwork,
    audio: AudioFeatures,
    segment_ids: Sequence[str],
    labels: np.ndarray,
    n_classes: int,
    config: AudioClassifierConfig,
    *,
    seed: int,
    device: torch.device,
    advance: Callable[[int], None] = lambda n: None,
) -> tuple[AudioClassifier, list[float]]:
    """Train on the segments that have audio; return the classifier and each epoch's mean loss.

    Of a store with views, one is drawn of each segment in each epoch. `network` is the audio encoder with its
    pretrained weights, which isn't changed. `labels` are int64 [n] (cross-entropy), or float32 [n, K] where the task is
    multi-label (binary cross-entropy). Adam; the last batch of an epoch may be smaller, but one of a single segment
    joins the batch before. Raises RunError when fewer than two segments have audio.
    """
    audible = np.flatnonzero(audio.has_audio(segment_ids))
    if len(audible) < 2:
        raise RunError(
            f"the audio classifier needs audio, but {len(audible)} of {len(segment_ids)} source segments have any; "
            f"train without it: attention.enabled=false absent.weight=0 balance.kind=class"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AudioClassifier(network, audio.n_features, n_classes)
    model.to(device).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=config.lr, weight_decay=config.weight_decay)
    targets = torch.from_numpy(labels)
    compute_loss = F.binary_cross_entropy_with_logits if labels.ndim == 2 else F.cross_entropy
    losses = []
    for epoch in range(config.n_epochs):
        order = audible[np.random.default_rng([seed, epoch]).permutation(len(audible))]
        n_batches = max(1, len(order) // config.batch)
        total = 0.0
        for rows in np.array_split(order, n_batches):
            logits, _ = model(audio.draw_maps([segment_ids[i] for i in rows], seed, epoch).to(device))
            loss = compute_loss(logits, targets[rows].to(device))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            total += float(loss.detach()) * len(rows)
            advance(len(rows))
        losses.append(total / len(order))
    return model.eval(), losses


@torch.inference_mode()
def predict_audio(
    model: AudioClassifier,
    audio: AudioFeatures,
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
        logits, pooled = model(audio.read_maps(ids).to(device))
        p = logits.sigmoid() if multi_label else logits.softmax(dim=1)
        probabilities.append(p.cpu().numpy())
        features.append(pooled.cpu().numpy())
        advance(len(ids))
    return AudioPredictions(
        tuple(segment_ids), np.concatenate(probabilities), np.concatenate(features), audio.has_audio(segment_ids)
    )
