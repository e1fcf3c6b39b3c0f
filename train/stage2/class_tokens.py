"""Makes the audio-adaptive class token of vectors that sound and pictures select (Zhang et al., section 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from echoshift.train.stage2.config import RecogniserConfig


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
    """The bank of activity-sound vectors g_k with the selections h, from sound, and h', from sound and pictures."""

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
