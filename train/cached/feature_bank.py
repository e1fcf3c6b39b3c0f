"""Keeps the features of all runs once on the device, where batches are looked up by row number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from echoshift.pipeline.errors import RunError
from echoshift.train.cached.batches import FeatureBatch
from echoshift.train.cached.feature_rows import FeatureRows
from echoshift.train.cached.larger_than_memory import StoredBank, StoredRows

Rows = FeatureRows | StoredRows


class Bank(Protocol):
    """Where batches are looked up."""

    n_views: int
    one_clip: bool

    def offset_of(self, part: Rows) -> int:
        """Return what is added to the row numbers of a part."""
        ...

    def gather(self, rows: Tensor, views: Tensor | None = None, clips: Tensor | None = None) -> FeatureBatch:
        """Look features up; rows, views and clips are int64 [..., B] on the device, the batch has the same axes first.

        No `views`: the first. With `clips` each segment is that one of its clips, n_clips = 1, with the sound around it
        where that is known.
        """
        ...


def make_bank(parts: Sequence[Rows], device: torch.device, *, one_clip: bool = False) -> Bank:
    """Hold rows on the device, or, where they stay in their store, what is wanted of them at a time.

    Raises RunError where rows that stay in their store are to be held together with others.
    """
    held = [part for part in parts if isinstance(part, FeatureRows)]
    if len(held) == len(parts):
        return FeatureBank(held, device, one_clip=one_clip)
    first = parts[0]
    if any(part is not first for part in parts) or isinstance(first, FeatureRows):
        raise RunError("features larger than data.max_memory_mb can't be trained on in stacks; use --stack 1")
    return StoredBank(first, device, one_clip=one_clip)


class FeatureBank:
    """Rows of features one after the other, one tensor an output; the same FeatureRows are held once.

    `one_clip` says that those who train look up single clips.
    """

    def __init__(self, parts: Sequence[FeatureRows], device: torch.device, *, one_clip: bool = False) -> None:
        held: list[FeatureRows] = []
        self._offsets: dict[int, int] = {}
        n = 0
        for part in parts:
            if id(part) not in self._offsets:
                self._offsets[id(part)] = n
                held.append(part)
                n += len(part)
        self.one_clip = one_clip
        self._held = held  # an id is good as long as its object lives
        first = held[0]
        for part in held:
            if part.shapes != first.shapes:
                raise RunError("features of different shapes can't be held together; train these runs one by one")
        self.n_views = max(part.n_views for part in held)
        self._visual = {name: _join([part.visual[name] for part in held], device) for name in first.visual}
        self._audio = _join([part.audio for part in held], device)
        self._has_audio = _join([part.has_audio for part in held], device)
        of_clips = [part.clip_audio for part in held if part.clip_audio is not None]
        if of_clips and len(of_clips) < len(held):
            raise RunError(
                "sound around clips and sound of segments can't be held together; train these runs one by one"
            )
        self._clip_audio = torch.cat(of_clips).to(device) if of_clips else None

    def offset_of(self, part: Rows) -> int:
        """Return what is added to the row numbers of a part."""
        return self._offsets[id(part)]

    def gather(self, rows: Tensor, views: Tensor | None = None, clips: Tensor | None = None) -> FeatureBatch:
        """Look features up as `Bank` says; it never waits for the device."""
        flat = rows.reshape(-1)
        visual = {}
        for name, values in self._visual.items():
            if values.shape[1] == 1 and clips is None:
                taken = values[:, 0].index_select(0, flat)
            elif clips is None:
                taken = values[flat, torch.zeros_like(flat) if views is None else views.reshape(-1)]
            else:
                view = torch.zeros_like(flat) if views is None else views.reshape(-1)
                taken = values[flat, view, clips.reshape(-1)][:, None]
            visual[name] = taken.float().view(*rows.shape, *taken.shape[1:])
        if clips is None or self._clip_audio is None:
            audio = self._audio.index_select(0, flat).view(*rows.shape, -1)
        else:
            audio = self._clip_audio[flat, clips.reshape(-1)].view(*rows.shape, -1)
        return FeatureBatch(visual, audio, self._has_audio.index_select(0, flat).view(rows.shape))


def _join(parts: Sequence[Tensor], device: torch.device) -> Tensor:
    n_views = max(part.shape[1] for part in parts) if parts[0].dim() > 2 else 0
    if n_views and any(part.shape[1] != n_views for part in parts):
        raise RunError("features of different numbers of views can't be held together; train these runs one by one")
    return (parts[0] if len(parts) == 1 else torch.cat(list(parts))).to(device)
