"""Trains the recogniser the way peers do, with DataLoaders: what benchmarks.stage2_speed compares the loop with.

The network has the layers and the widths of the preset `released` and is written out here with nn.Linear, nn.LayerNorm
and nn.Dropout; all tokens go through its last layer. Source and target are two forward passes, as in a loop that
computes one loss after the other. `train_plainly` takes batches from two DataLoaders (default collate, no workers: two
cores have none to spare) by torch.optim.Adam as it comes; `train_by_index` looks rows up and has Adam fused.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

N_BATCH, LR, WEIGHT_DECAY = 8, 7e-4, 1e-4
_WIDTH, _BANK, _N_LAYERS, _N_HEADS, _INNER, _HIDDEN, _DROPOUT, _P_MISSING = 256, 512, 3, 8, 512, 512, 0.15, 0.1


@dataclass(frozen=True, slots=True)
class PlainFeatures:
    """What the loops read: float16 [n, n_clips, C], float32 [n, C_a], int64 [n] of one domain."""

    visual: Tensor
    audio: Tensor
    labels: Tensor


class PlainLayer(nn.Module):
    """A pre-norm transformer layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(_WIDTH), nn.LayerNorm(_WIDTH)
        self.qkv = nn.Linear(_WIDTH, 3 * _INNER, bias=False)
        self.out = nn.Sequential(nn.Linear(_INNER, _WIDTH), nn.Dropout(_DROPOUT))
        self.mlp = nn.Sequential(
            nn.Linear(_WIDTH, _HIDDEN),
            nn.GELU(),
            nn.Dropout(_DROPOUT),
            nn.Linear(_HIDDEN, _WIDTH),
            nn.Dropout(_DROPOUT),
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """Return tokens [B, P, D]."""
        heads = self.qkv(self.norm1(tokens)).unflatten(-1, (3, _N_HEADS, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(heads[0], heads[1], heads[2]).transpose(1, 2).flatten(2)
        tokens = tokens + self.out(attended)
        moved: Tensor = tokens + self.mlp(self.norm2(tokens))
        return moved


class PlainRecogniser(nn.Module):
    """R with the audio-adaptive class token, 3.81 M weights for features of 2304 + 512 and 8 classes."""

    def __init__(self, n_visual: int, n_audio: int, n_classes: int) -> None:
        super().__init__()
        self.embed = nn.Linear(n_visual, _WIDTH)
        self.domain = nn.Parameter(torch.randn(2, _WIDTH) * 0.02)
        self.missing = nn.Parameter(torch.zeros(n_audio))
        self.bank = nn.Parameter(torch.randn(n_classes, _BANK))
        self.heard_in, self.heard_norm = nn.Linear(n_audio, 512), nn.BatchNorm1d(512)
        self.heard_out = nn.Linear(512, n_classes)
        self.narrow = nn.Sequential(nn.Linear(n_visual, 64), nn.LayerNorm(64), nn.ReLU())
        self.chosen_in, self.chosen_norm = nn.Linear(_BANK + 64, 512), nn.BatchNorm1d(512)
        self.chosen_out = nn.Linear(512, n_classes)
        self.to_token = nn.Linear(_BANK, _WIDTH)
        self.layers = nn.Sequential(*(PlainLayer() for _ in range(_N_LAYERS)))
        self.head = nn.Sequential(nn.LayerNorm(_WIDTH), nn.Linear(_WIDTH, n_classes))

    def forward(self, visual: Tensor, audio: Tensor, domain: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the logits of p*, h [B, K] and h' [B, n_clips, K]."""
        missing = torch.rand(len(audio), 1) < _P_MISSING
        audio = torch.where(missing.to(audio.device), self.missing, audio)
        h = self.heard_out(F.relu(self.heard_norm(self.heard_in(audio))))
        g = h.softmax(-1) @ self.bank
        both = torch.cat([g[:, None].expand(-1, visual.shape[1], -1), self.narrow(visual)], -1)
        hidden = F.relu(self.chosen_norm(self.chosen_in(both).flatten(0, 1))).view(*both.shape[:2], -1)
        h_prime = self.chosen_out(hidden)
        token = self.to_token(h_prime.softmax(-1) @ self.bank).mean(1, keepdim=True)
        tokens = self.layers(torch.cat([token, self.embed(visual) + self.domain[domain]], 1))
        return self.head(tokens[:, 0]), h, h_prime


class _Samples(Dataset[tuple[Tensor, Tensor, Tensor]]):
    def __init__(self, features: PlainFeatures) -> None:
        self.features = features

    def __len__(self) -> int:
        return len(self.features.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor, Tensor]:
        return self.features.visual[i].float(), self.features.audio[i], self.features.labels[i]


def train_plainly(
    model: PlainRecogniser, source: PlainFeatures, target: PlainFeatures, device: torch.device
) -> Iterator[float]:
    """Take a step each time it is asked for one; return its loss."""
    optimiser = torch.optim.Adam(model.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
    batches = zip(_load(source), _load(target), strict=False)
    for batch in batches:
        of_source, of_target = ([part.to(device) for part in parts] for parts in batch)
        yield _step(model, optimiser, of_source, of_target)


def train_by_index(
    model: PlainRecogniser, source: PlainFeatures, target: PlainFeatures, device: torch.device
) -> Iterator[float]:
    """Take steps likewise, of rows looked up on the device."""
    optimiser = torch.optim.Adam(model.parameters(), lr=LR, weight_decay=WEIGHT_DECAY, fused=True)
    kept = [
        PlainFeatures(part.visual.to(device), part.audio.to(device), part.labels.to(device))
        for part in (source, target)
    ]
    rng = np.random.default_rng(0)
    while True:
        batch = []
        for part in kept:
            rows = torch.from_numpy(rng.choice(len(part.labels), N_BATCH, replace=False)).to(device)
            batch.append([part.visual[rows].float(), part.audio[rows], part.labels[rows]])
        yield _step(model, optimiser, *batch)


def _load(features: PlainFeatures) -> Iterator[list[Tensor]]:
    loader = DataLoader(_Samples(features), batch_size=N_BATCH, shuffle=True, drop_last=True)
    while True:
        yield from loader


def _step(
    model: PlainRecogniser, optimiser: torch.optim.Optimizer, source: list[Tensor], target: list[Tensor]
) -> float:
    logits, h, h_prime = model(source[0], source[1], 0)
    of_target, _, _ = model(target[0], target[1], 1)
    labels = source[2]
    loss = 0.5 * F.cross_entropy(logits, labels) + 0.5 * F.cross_entropy(of_target, target[2])
    loss = loss + 0.1 * F.cross_entropy(h, labels)
    loss = loss + 0.02 * F.cross_entropy(h_prime.flatten(0, 1), labels.repeat_interleave(h_prime.shape[1]))
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    return loss.item()
