"""The cached features of segments: rows in memory, or read from their store a batch at a time where they don't fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from echoshift.pipeline.errors import RunError
from echoshift.pipeline.store.interface import FeatureStore, RowFinder, require_done
from echoshift.pipeline.store.open import open_store
from echoshift.train.predictions import read_prediction_table


class FeatureBatch(NamedTuple):
    """The cached features of B segments.

    Attributes:
        visual: by output name: `pooled` float32 [B, n_clips, C]; tokens [B, n_clips, n_tokens, C].
        audio: one feature a segment, float32 [B, C_a]; zeros where a segment is silent.
        has_audio: bool [B].
    """

    visual: Mapping[str, Tensor]
    audio: Tensor
    has_audio: Tensor

    def cut(self, start: int, stop: int) -> FeatureBatch:
        """Return the segments from `start` to `stop`."""
        visual = {name: values[start:stop] for name, values in self.visual.items()}
        return FeatureBatch(visual, self.audio[start:stop], self.has_audio[start:stop])


def join_batches(parts: Sequence[FeatureBatch]) -> FeatureBatch:
    """Join batches to one."""
    if len(parts) == 1:
        return parts[0]
    return FeatureBatch(
        {name: torch.cat([part.visual[name] for part in parts]) for name in parts[0].visual},
        torch.cat([part.audio for part in parts]),
        torch.cat([part.has_audio for part in parts]),
    )


def summarise_clips(visual: Mapping[str, Tensor]) -> Tensor:
    """Average each output of a batch over its tokens and put them side by side, [B, n_clips, C]."""
    means = [values if values.dim() == 3 else values.mean(dim=2) for values in visual.values()]
    return means[0] if len(means) == 1 else torch.cat(means, dim=-1)


@dataclass(frozen=True, slots=True)
class FeatureShapes:
    """What a network on cached features is built for.

    Attributes:
        visual: by output, the shape of a clip: (C,) of `pooled`, (n_tokens, C) of tokens.
        n_audio: width of the audio feature.
        n_sources: how many domains the source has.
    """

    visual: Mapping[str, tuple[int, ...]]
    n_audio: int
    n_sources: int = 1
    multi_label: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class StoredOutputs:
    """The visual features of segments that stay in their store.

    Attributes:
        n_valid: clips that each segment has, int64 [n].
    """

    store: FeatureStore
    segment_ids: tuple[str, ...]
    n_valid: np.ndarray

    def read(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """Read the outputs of some of the segments, as FeatureRows.visual; each is read once."""
        chosen, places = np.unique(np.asarray(rows, dtype=np.int64), return_inverse=True)
        ids, n_views = [self.segment_ids[row] for row in chosen.tolist()], self.store.spec.n_entries_per_clip
        return {
            output.name: _arrange_entries(self.store.read(ids, output.name), n_views, self.n_valid[chosen])[places]
            for output in self.store.spec.outputs
        }


@dataclass(frozen=True, slots=True, eq=False)
class FeatureRows:
    """The cached features of n segments.

    Attributes:
        visual: by output, [n, n_views, n_clips, ...] in the store's dtype; views are augmented views times crops. A
            clip that a segment hasn't repeats those that it has, in turn. Empty where they are `stored`.
        audio: one feature a segment, float32 [n, C_a]; zeros where a segment is silent.
        has_audio: bool [n].
        clip_audio: the sound around each clip, where the store of audio has as many clips as that of frames, float32
            [n, n_clips, C_a]; `audio` is its mean, and what single clips are looked up with is this.
        stored: the visual features, where they are too many for memory.
    """

    segment_ids: tuple[str, ...]
    visual: Mapping[str, Tensor]
    audio: Tensor
    has_audio: Tensor
    clip_audio: Tensor | None = None
    stored: StoredOutputs | None = None

    def __len__(self) -> int:
        return len(self.segment_ids)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """By output the shape of one view of a segment, (n_clips, ...)."""
        if self.stored is not None:
            spec, layout = self.stored.store.spec, self.stored.store.layout
            n_clips = layout.n_clips // spec.n_entries_per_clip
            return {output.name: (n_clips, *output.shape) for output in spec.outputs}
        return {name: tuple(values.shape[2:]) for name, values in self.visual.items()}

    @property
    def n_views(self) -> int:
        """How many views of each segment there are."""
        if self.stored is not None:
            return self.stored.store.spec.n_entries_per_clip
        return next(iter(self.visual.values())).shape[1]

    @property
    def n_clips(self) -> int:
        """How many clips of each segment there are."""
        return next(iter(self.shapes.values()))[0]

    def describe_shapes(self, n_sources: int = 1, *, multi_label: bool = False) -> FeatureShapes:
        """Return what a network on these features is built for."""
        visual = {name: shape[1:] for name, shape in self.shapes.items()}
        return FeatureShapes(visual, self.audio.shape[1], n_sources, multi_label)

    def find(self, segment_ids: Sequence[str]) -> np.ndarray:
        """Find the rows of segments, int64 [n]; raises RunError naming the first that isn't there."""
        row_of = {segment_id: row for row, segment_id in enumerate(self.segment_ids)}
        try:
            return np.array([row_of[segment_id] for segment_id in segment_ids], dtype=np.int64)
        except KeyError as error:
            raise RunError(f"no features of segment {error.args[0]} were read; extract it") from error

    def without_sound(self) -> FeatureRows:
        """Return the same rows as if none had sound."""
        nothing = torch.zeros_like(self.has_audio)
        return replace(self, audio=torch.zeros_like(self.audio), has_audio=nothing, clip_audio=None)

    def to(self, device: torch.device) -> FeatureRows:
        """Return the rows on a device; what is stored goes there when it is read."""
        clip_audio = None if self.clip_audio is None else self.clip_audio.to(device)
        visual = {name: values.to(device) for name, values in self.visual.items()}
        audio, has_audio = self.audio.to(device), self.has_audio.to(device)
        return replace(self, audio=audio, has_audio=has_audio, visual=visual, clip_audio=clip_audio)

    def take(self, rows: Tensor) -> FeatureRows:
        """Return some of the rows in memory, in the order of `rows`, int64 [B]."""
        if self.stored is not None:
            read = self.stored.read(rows.tolist())
            visual = {name: values.to(self.audio.device) for name, values in read.items()}
        else:
            visual = {name: values[rows] for name, values in self.visual.items()}
        ids = tuple(self.segment_ids[row] for row in rows.tolist())
        clip_audio = None if self.clip_audio is None else self.clip_audio[rows]
        return FeatureRows(ids, visual, self.audio[rows], self.has_audio[rows], clip_audio)

    def gather(self, rows: Tensor, views: Tensor | None = None, clips: Tensor | None = None) -> FeatureBatch:
        """Look features up; rows, views and clips are int64 [B] on the rows' device.

        No `views`: the first. With `clips` each segment is that one of its clips, n_clips = 1, with the sound around it
        where that is known.
        """
        if self.stored is not None:
            return self.take(rows).gather(torch.arange(len(rows), device=rows.device), views, clips)
        views = torch.zeros_like(rows) if views is None else views
        visual = {}
        for name, values in self.visual.items():
            if clips is not None:
                visual[name] = values[rows, views, clips][:, None].float()
            elif values.shape[1] == 1:
                visual[name] = values[:, 0].index_select(0, rows).float()
            else:
                visual[name] = values[rows, views].float()
        if clips is None or self.clip_audio is None:
            audio = self.audio.index_select(0, rows)
        else:
            audio = self.clip_audio[rows, clips]
        return FeatureBatch(visual, audio, self.has_audio.index_select(0, rows))


class Sound(NamedTuple):
    """The sound of n segments, fields as in FeatureRows."""

    audio: Tensor
    has_audio: Tensor
    clip_audio: Tensor | None = None


def read_rows(store: FeatureStore, segment_ids: Sequence[str], sound: Sound, max_bytes: int) -> FeatureRows:
    """Read segments' visual features into memory, or leave them in the store where they take more than `max_bytes`.

    Raises StoreError naming the first segment that the store hasn't, or that isn't done.
    """
    ids = tuple(segment_ids)
    if len(ids) * _count_row_bytes(store) <= max_bytes:
        return FeatureRows(ids, read_visual(store, ids), *sound)
    rows = RowFinder(list(store.segment_ids)).find(str(store.path), ids)
    require_done(str(store.path), ids, store.read_array("state")[rows])
    n_valid = store.read_array("n_valid")[rows] // store.spec.n_entries_per_clip
    stored = StoredOutputs(store, ids, n_valid)
    return FeatureRows(ids, {}, *sound, stored)


def read_visual(store: FeatureStore, segment_ids: Sequence[str]) -> dict[str, Tensor]:
    """Read all outputs of segments, [n, n_views, n_clips, ...] in the store's dtype.

    Raises StoreError naming the first segment that the store hasn't, or that isn't done.
    """
    n_views = store.spec.n_entries_per_clip
    finder = RowFinder(list(store.segment_ids))
    n_valid = store.read_array("n_valid")[finder.find(str(store.path), segment_ids)] // n_views
    return {
        output.name: _arrange_entries(store.read(segment_ids, output.name), n_views, n_valid)
        for output in store.spec.outputs
    }


def read_sound(store: FeatureStore, segment_ids: Sequence[str], n_clips: int = 1) -> Sound:
    """Read pooled features of sound, one a segment: where a store holds several clips of it, their mean.

    With as many clips as there are of frames, `n_clips` > 1, it also returns those. Of a store with views of sound, the
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


@dataclass(frozen=True, slots=True)
class StreamInputs:
    """The files that one stream reads.

    Attributes:
        key: names what is in those that are trained on.
        without_sound_key: names what is in `features_without_sound`.
        features: a store of all segments.
        table: Stage 1's table; None where the features come from elsewhere and have none.
        sound: a store of audio, where nothing made a table.
        train_features: a store of augmented views of the train splits; None: training takes those of `features`.
        features_without_sound: a store of the target's test split, made as if there were no sound.
    """

    key: str
    features: Path
    table: Path | None = None
    sound: Path | None = None
    train_features: Path | None = None
    features_without_sound: Path | None = None
    without_sound_key: str = ""


def hears_clips(inputs: StreamInputs) -> bool:
    """Return whether the store of audio holds the sound around each clip of frames (recipe B), not a segment's."""
    if inputs.table is not None or inputs.sound is None:
        return False
    seen, heard = open_store(inputs.features), open_store(inputs.sound)
    return heard.layout.n_clips // heard.spec.n_sound_views == seen.layout.n_clips // seen.spec.n_entries_per_clip > 1


def open_stream(
    inputs: StreamInputs, segment_ids: Sequence[str], max_bytes: int, *, of_training: bool = False
) -> FeatureRows:
    """Read a stream's features of segments, `of_training` those of the augmented views where it has any.

    What would take more than `max_bytes` (half of it where there are augmented views) stays in its store. Raises
    StoreError or RunError naming the first segment that isn't there.
    """
    if inputs.train_features is not None:
        max_bytes //= 2
    store = open_store(inputs.train_features if of_training and inputs.train_features else inputs.features)
    if inputs.table is not None:
        table = read_prediction_table(inputs.table)
        rows = table.find(segment_ids)
        has_audio = table.has_audio[rows]
        audio = np.where(has_audio[:, None], table.audio_features[rows], np.float32(0))
        sound = Sound(torch.from_numpy(audio), torch.from_numpy(has_audio))
    else:
        assert inputs.sound is not None, "name_files looked"
        n_clips = store.layout.n_clips // store.spec.n_entries_per_clip
        sound = read_sound(open_store(inputs.sound), segment_ids, n_clips)
    return read_rows(store, segment_ids, sound, max_bytes)


def _count_row_bytes(store: FeatureStore) -> int:
    n_values = sum(int(np.prod(output.shape)) for output in store.spec.outputs)
    return store.layout.n_clips * n_values * np.dtype(store.spec.dtype).itemsize


def _arrange_entries(values: np.ndarray, n_views: int, n_valid: np.ndarray) -> Tensor:
    """Arrange a store's entries, [n, n_entries, ...], clip by clip, as [n, n_views, n_clips, ...]."""
    values = values.reshape(len(values), -1, n_views, *values.shape[2:])
    _repeat_clips(values, n_valid)
    return torch.from_numpy(values).movedim(2, 1).contiguous()


def _repeat_clips(values: np.ndarray, n_valid: np.ndarray) -> None:
    """Have clips that don't exist repeat those that do, in place; values [n, n_clips, ...], n_valid int [n]."""
    n_clips = values.shape[1]
    for row in np.flatnonzero((n_valid < n_clips) & (n_valid > 0)).tolist():
        existing = int(n_valid[row])
        values[row, existing:] = values[row, np.arange(existing, n_clips) % existing]
