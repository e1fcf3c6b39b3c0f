"""Reads the cached features of segments into memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from echoshift.pipeline.errors import RunError
from echoshift.pipeline.store.interface import FeatureStore
from echoshift.pipeline.store.reading import RowFinder
from echoshift.train.epoch_plan import shuffle


@dataclass(frozen=True, slots=True, eq=False)
class FeatureRows:
    """The cached features of n segments.

    Attributes:
        visual: by output, [n, n_views, n_clips, ...] in the store's dtype; views are augmented views times crops. A
            clip that a segment hasn't repeats those that it has, in turn.
        audio: one feature a segment, float32 [n, C_a]; zeros where there is no sound.
        has_audio: bool [n].
        clip_audio: the sound around each clip, where the store of sound has as many clips as that of pictures, float32
            [n, n_clips, C_a]; `audio` is its mean, and what single clips are looked up with is this.
    """

    segment_ids: tuple[str, ...]
    visual: Mapping[str, Tensor]
    audio: Tensor
    has_audio: Tensor
    clip_audio: Tensor | None = None

    def __len__(self) -> int:
        return len(self.segment_ids)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """By output what a view of a segment is, (n_clips, ...)."""
        return {name: tuple(values.shape[2:]) for name, values in self.visual.items()}

    @property
    def n_views(self) -> int:
        """How many views of each segment there are."""
        return next(iter(self.visual.values())).shape[1]

    @property
    def n_clips(self) -> int:
        """How many clips of each segment there are."""
        return next(iter(self.visual.values())).shape[2]

    def find(self, segment_ids: Sequence[str]) -> np.ndarray:
        """Find the rows of segments, int64 [n]; raises RunError naming the first that isn't there."""
        return find_rows(self.segment_ids, segment_ids)

    def without_sound(self) -> FeatureRows:
        """Return the same rows as if none had sound."""
        nothing = torch.zeros_like(self.has_audio)
        return replace(self, audio=torch.zeros_like(self.audio), has_audio=nothing, clip_audio=None)

    def shuffle(self, rows: np.ndarray, seed: int, number: int, what: int) -> np.ndarray:
        """Shuffle the rows of an epoch, int64 [n], positions in `rows`; the three numbers decide it."""
        return shuffle(len(rows), seed, number, what)


def read_visual(store: FeatureStore, segment_ids: Sequence[str]) -> dict[str, Tensor]:
    """Read all outputs of segments, [n, n_views, n_clips, ...] in the store's dtype.

    Raises StoreError naming the first segment that the store hasn't, or that isn't done.
    """
    n_views = store.spec.n_entries_per_clip
    finder = RowFinder(list(store.segment_ids))
    n_valid = store.read_array("n_valid")[finder.find(str(store.path), segment_ids)] // n_views
    return {
        output.name: arrange_entries(store.read(segment_ids, output.name), n_views, n_valid)
        for output in store.spec.outputs
    }


def find_rows(known: Sequence[str], segment_ids: Sequence[str]) -> np.ndarray:
    """Find where ids are among those known, int64 [n]; raises RunError naming the first that isn't there."""
    row_of = {segment_id: row for row, segment_id in enumerate(known)}
    try:
        return np.array([row_of[segment_id] for segment_id in segment_ids], dtype=np.int64)
    except KeyError as error:
        raise RunError(f"no features of segment {error.args[0]} were read; extract it") from error


def arrange_entries(values: np.ndarray, n_views: int, n_valid: np.ndarray) -> Tensor:
    """Arrange a store's entries, [n, n_entries, ...], clip by clip, as [n, n_views, n_clips, ...].

    A row has the first `n_valid` (int [n]) of its clips; those that it hasn't repeat those that it has, in turn.
    """
    values = values.reshape(len(values), -1, n_views, *values.shape[2:])
    _repeat_clips(values, n_valid)
    return torch.from_numpy(values).movedim(2, 1).contiguous()


class Sound(NamedTuple):
    """The sound of n segments, fields as in FeatureRows."""

    audio: Tensor
    has_audio: Tensor
    clip_audio: Tensor | None = None


def read_sound(store: FeatureStore, segment_ids: Sequence[str], n_clips: int = 1) -> Sound:
    """Read pooled features of sound, one a segment: where a store holds several clips of it, their mean.

    With as many clips as there are of pictures, `n_clips` > 1, it also gives those. Of a store with views of sound, the
    clean one of each clip. Raises StoreError as `read_visual`.
    """
    n_views = store.spec.n_sound_views
    values = store.read(segment_ids, "pooled")[:, ::n_views].astype(np.float32)
    rows = RowFinder(list(store.segment_ids)).find(str(store.path), segment_ids)
    has_audio = store.read_array("has_audio")[rows] == 1
    values[~has_audio] = 0
    _repeat_clips(values, store.read_array("n_valid")[rows] // n_views)
    of_clips = torch.from_numpy(values) if values.shape[1] == n_clips > 1 else None
    return Sound(torch.from_numpy(values.mean(axis=1)), torch.from_numpy(has_audio), of_clips)


def _repeat_clips(values: np.ndarray, n_valid: np.ndarray) -> None:
    """Have clips that don't exist repeat those that do, in place; values [n, n_clips, ...], n_valid [n]."""
    n_clips = values.shape[1]
    for row in np.flatnonzero((n_valid < n_clips) & (n_valid > 0)).tolist():
        existing = int(n_valid[row])
        values[row, existing:] = values[row, np.arange(existing, n_clips) % existing]
