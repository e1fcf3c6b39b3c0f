"""Holds what both backends do alike when they read: find rows, refuse those that are not done, compare digests."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from pipeline.errors import StoreError
from pipeline.store.interface import FeatureStore
from pipeline.store.layout import DONE, PENDING, STATE_NAMES


def index_segments(store: FeatureStore) -> dict[str, int]:
    """Maps a segment's id to its row."""
    return {segment_id: row for row, segment_id in enumerate(store.segment_ids)}


def find_done_rows(store: FeatureStore, segment_ids: Iterable[str]) -> np.ndarray:
    """Finds the rows of done segments, int64 [n]; raises StoreError naming the first that is absent or not done."""
    row_of = index_segments(store)
    state = store.read_array("state")
    rows = []
    for segment_id in segment_ids:
        row = row_of.get(segment_id)
        if row is None:
            raise StoreError(f"segment {segment_id} is not in {store.path}; extract the manifest that holds it")
        if state[row] != DONE:
            raise StoreError(
                f"segment {segment_id} is {STATE_NAMES[int(state[row])]} in {store.path}; "
                f"`echoshift store explain` says why"
            )
        rows.append(row)
    return np.asarray(rows, dtype=np.int64)


def find_missing(store: FeatureStore, digests: np.ndarray) -> np.ndarray:
    """Says for each row whether it is pending, or was made from something else than `digests` says, bool [row]."""
    return np.asarray(
        (store.read_array("state") == PENDING) | (store.read_array("digest") != digests).any(axis=1), dtype=bool
    )
