"""Reads what the frozen audio network computed, layer3 maps and pooled features, from its store."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from echoshift.extract.clips import draw_integer
from echoshift.pipeline.errors import RunError
from echoshift.pipeline.store.interface import FeatureStore, RowFinder
from echoshift.pipeline.store.layout import DONE
from echoshift.train.stage1.visual_inputs import derive_epoch_seed

MAP, POOLED = "map", "pooled"


class SoundFeatures:
    """The sound of segments from a store of an audio encoder; rows without sound come as zeros.

    Of a store with views it is the first, the clean one, unless views are asked for. Only what is asked for is read.
    """

    def __init__(self, store: FeatureStore) -> None:
        names = {output.name for output in store.spec.outputs}
        if not {MAP, POOLED} <= names:
            raise RunError(f"{store.path} holds {', '.join(sorted(names))}; Stage 1 needs {MAP} and {POOLED}")
        self._store = store
        self._finder = RowFinder(list(store.segment_ids))
        self._has_audio = store.read_array("has_audio").astype(bool)
        self._is_done = store.read_array("state") == DONE

    @property
    def map_shape(self) -> tuple[int, ...]:
        """The shape of one map: channels, frequencies, times."""
        return next(output.shape for output in self._store.spec.outputs if output.name == MAP)

    @property
    def n_features(self) -> int:
        """The width of the pooled feature."""
        return next(output.shape for output in self._store.spec.outputs if output.name == POOLED)[0]

    def is_done(self, segment_ids: Sequence[str]) -> np.ndarray:
        """Describe which segments have a row that is done, bool [n]; raises StoreError for one that has none."""
        return self._is_done[self._finder.find(str(self._store.path), segment_ids)]

    def has_audio(self, segment_ids: Sequence[str]) -> np.ndarray:
        """Describe which segments have a usable track, bool [n]."""
        return self._has_audio[self._finder.find(str(self._store.path), segment_ids)]

    def read_maps(self, segment_ids: Sequence[str], views: np.ndarray | None = None) -> Tensor:
        """Read layer3 maps, float32 [n, C, F, N], of the clean view or of `views`, int64 [n].

        Raises StoreError for a row that isn't done.
        """
        return torch.from_numpy(self._read(segment_ids, MAP, views))

    def draw_maps(self, segment_ids: Sequence[str], seed: int, epoch: int) -> Tensor:
        """Read one view's map of each segment, float32 [n, C, F, N], drawn evenly by seed, epoch and segment.

        For training alone; where the store has one view, it is that one.
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


def select_audible(segment_ids: Iterable[str], has_audio: np.ndarray) -> list[str]:
    """Return the segments that have sound, in order."""
    return [segment_id for segment_id, audible in zip(segment_ids, has_audio, strict=True) if audible]
