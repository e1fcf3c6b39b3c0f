"""Holds what both backends do alike when they read: find rows, refuse those that are not done, compare digests."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from pipeline.errors import StoreError
from pipeline.store.interface import FeatureStore
from pipeline.store.layout import DONE, PENDING, STATE_NAMES


def index_segments(store: FeatureStore) -> dict[str, int]:
    """Maps a segment's id to its row."""
    return {segment_id: row for row, segment_id in enumerate(store.segment_ids)}


def find_rows(path: str, row_of: Mapping[str, int], segment_ids: Iterable[str]) -> np.ndarray:
    """Finds the rows of segments, int64 [n]; raises StoreError naming the first that is absent."""
    try:
        return np.fromiter(map(row_of.__getitem__, segment_ids), dtype=np.int64)
    except KeyError as error:
        raise StoreError(f"segment {error.args[0]} is not in {path}; extract the manifest that holds it") from error


def require_done(path: str, segment_ids: Iterable[str], states: np.ndarray) -> None:
    """Raises StoreError naming the first segment that is not done; `states` are those of its row, uint8 [n]."""
    refused = states != DONE
    if refused.any():
        first = int(np.argmax(refused))
        segment_id = next(s for i, s in enumerate(segment_ids) if i == first)
        raise StoreError(
            f"segment {segment_id} is {STATE_NAMES[int(states[first])]} in {path}; `echoshift store explain` says why"
        )


def find_missing(store: FeatureStore, digests: np.ndarray) -> np.ndarray:
    """Says for each row whether it is pending, or was made from something else than `digests` says, bool [row]."""
    return np.asarray(
        (store.read_array("state") == PENDING) | (store.read_array("digest") != digests).any(axis=1), dtype=bool
    )
