"""Turns a segment's sound into one gate a channel of each visual path: the audio-based attention psi (METHODS 5.5)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from echoshift.train.stage1.config import AttentionConfig


class AudioAttention(nn.Module):
    """The transformer psi from the audio network's map to gates between 0 and 1 (Zhang et al., section 3.1).

    The map's positions are projected to the transformer's width and follow a class token, from which the head reads the
    gates. Positions have no embedding, so their order doesn't matter. Where a segment has no sound, a learned embedding
    stands at each of its positions: silent segments share one gate.
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
        NaN too. In training, sound is withheld from a segment with probability `p_missing`, drawn from torch's
        generator of the map's device.
        """
        if self.training and self.p_missing > 0:
            has_audio = has_audio & (torch.rand(len(has_audio), device=has_audio.device) >= self.p_missing)
        heard = has_audio[:, None, None]
        positions = audio_map.flatten(2).transpose(1, 2).to(self.projection.weight.dtype)
        # NaN times a gradient of 0 is NaN, so it must be gone before the projection, not only after it.
        projected = self.projection(torch.where(heard, positions, 0.0))
        # The embedding is part of the graph even when every segment has sound; DDP waits for its gradient.
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
