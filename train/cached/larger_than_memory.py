"""Reads features that don't fit into memory shard by shard, in an order in which few shards are wanted at a time."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from pipeline.store.interface import FeatureStore
from pipeline.store.layout import plan_shards
from pipeline.store.reading import RowFinder, require_done
from train.cached.batches import FeatureBatch
from train.cached.feature_rows import FeatureRows, arrange_entries, find_rows
from train.epoch_plan import shuffle

_N_ORDERS = 3  # of the source, the target and its labelled part, each with shards of its own in memory
_GROUPS, _WITHIN = 100, 101  # what is shuffled, beside the parts of a shift


@dataclass(frozen=True, slots=True, eq=False)
class StoredRows:
    """Is the features of n segments that stay in their store; attributes and methods as of FeatureRows.

    Attributes:
        rows: in the store, int64 [n].
        n_valid: clips that each segment has, int64 [n].
        max_bytes: how much of the store is held at a time.
    """

    segment_ids: tuple[str, ...]
    store: FeatureStore
    rows: np.ndarray
    n_valid: np.ndarray
    audio: Tensor
    has_audio: Tensor
    max_bytes: int

    def __len__(self) -> int:
        return len(self.segment_ids)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Gives by output what a view of a segment is, (n_clips, ...)."""
        return {output.name: (self.n_clips, *output.shape) for output in self.store.spec.outputs}

    @property
    def n_views(self) -> int:
        """Gives how many views of each segment there are."""
        return self.store.spec.n_entries_per_clip

    @property
    def n_clips(self) -> int:
        """Gives how many clips of each segment there are."""
        return self.store.layout.n_clips // self.n_views

    @property
    def n_row_bytes(self) -> int:
        """Gives how many bytes a segment takes."""
        return count_row_bytes(self.store)

    def find(self, segment_ids: Sequence[str]) -> np.ndarray:
        """Finds the rows of segments, int64 [n]; raises RunError naming the first that isn't there."""
        return find_rows(self.segment_ids, segment_ids)

    def without_sound(self) -> StoredRows:
        """Gives the same rows as if none had sound."""
        return replace(self, audio=torch.zeros_like(self.audio), has_audio=torch.zeros_like(self.has_audio))

    def shuffle(self, rows: np.ndarray, seed: int, number: int, what: int) -> np.ndarray:
        """Gives the order in which an epoch takes rows, int64 [n], positions in `rows`; the three numbers decide it.

        Shards come in groups, drawn anew each time, of as many as fit into this part's share of the memory; the rows of
        a group are shuffled. So every row comes once, and neighbours are of shards that are held together.
        """
        shards = self.rows[rows] // self.store.layout.n_rows_per_shard
        n_shard_bytes = self.store.layout.n_rows_per_shard * self.n_row_bytes
        n_together = max(1, self.max_bytes // _N_ORDERS // n_shard_bytes)
        there = np.unique(shards)
        there = there[shuffle(len(there), seed, number, what + _GROUPS)]
        group_of = np.empty(there.max() + 1, dtype=np.int64)
        group_of[there] = np.arange(len(there)) // n_together
        mixed = shuffle(len(rows), seed, number, what + _WITHIN + _N_ORDERS)
        return mixed[np.argsort(group_of[shards[mixed]], kind="stable")]


def count_row_bytes(store: FeatureStore) -> int:
    """Counts the bytes that a segment's outputs take in memory."""
    n_values = sum(int(np.prod(output.shape)) for output in store.spec.outputs)
    return store.layout.n_clips * n_values * np.dtype(store.spec.dtype).itemsize


def open_rows(
    store: FeatureStore, segment_ids: Sequence[str], audio: Tensor, has_audio: Tensor, max_bytes: int
) -> StoredRows:
    """Opens segments' features for reading shard by shard; raises StoreError as `store.read`."""
    ids = list(segment_ids)
    rows = RowFinder(list(store.segment_ids)).find(str(store.path), ids)
    require_done(str(store.path), ids, store.read_array("state")[rows])
    n_valid = store.read_array("n_valid")[rows] // store.spec.n_entries_per_clip
    return StoredRows(tuple(ids), store, rows, n_valid, audio, has_audio, max_bytes)


class StoredBank:
    """Looks rows up as FeatureBank does, out of the shards that it holds; it holds at most `max_bytes` of them.

    `n_held_bytes` says how much that is, `n_reads` how often a shard was read.
    """

    def __init__(self, rows: StoredRows, device: torch.device, *, one_clip: bool = False) -> None:
        self._rows, self._device, self.one_clip = rows, device, one_clip
        self.n_views, self.n_held_bytes, self.n_reads = rows.n_views, 0, 0
        self._shards = plan_shards(rows.store.layout)
        self._held: OrderedDict[int, dict[str, Tensor]] = OrderedDict()
        self._n_valid = np.zeros(rows.store.layout.n_rows, dtype=np.int64)
        self._n_valid[rows.rows] = rows.n_valid

    def offset_of(self, part: FeatureRows | StoredRows) -> int:
        """Gives what is added to the row numbers of the one part."""
        return 0

    def gather(self, rows: Tensor, views: Tensor | None = None, clips: Tensor | None = None) -> FeatureBatch:
        """Looks features up as `FeatureBank.gather`, reading the shards that aren't held."""
        flat = rows.reshape(-1).cpu()
        of_view = torch.zeros_like(flat) if views is None else views.reshape(-1).cpu()
        of_clip = None if clips is None else clips.reshape(-1).cpu()
        stored = self._rows.rows[flat.numpy()]
        numbers = stored // self._rows.store.layout.n_rows_per_shard
        found: dict[str, Tensor] = {}
        for number in np.unique(numbers).tolist():
            shard = self._hold(number)
            at = torch.from_numpy(np.flatnonzero(numbers == number))
            within = torch.from_numpy(stored[at.numpy()] - self._shards[number].start_row)
            for name, values in shard.items():
                taken = values[within, of_view[at]]
                if of_clip is not None:
                    taken = taken[torch.arange(len(at)), of_clip[at]][:, None]
                if name not in found:
                    found[name] = torch.empty(len(flat), *taken.shape[1:])
                found[name][at] = taken.float()
        visual = {name: values.view(*rows.shape, *values.shape[1:]).to(self._device) for name, values in found.items()}
        audio = self._rows.audio[flat].view(*rows.shape, -1).to(self._device)
        return FeatureBatch(visual, audio, self._rows.has_audio[flat].view(rows.shape).to(self._device))

    def _hold(self, number: int) -> Mapping[str, Tensor]:
        if number in self._held:
            self._held.move_to_end(number)
            return self._held[number]
        shard, store = self._shards[number], self._rows.store
        n_bytes = shard.n_rows * self._rows.n_row_bytes
        while self._held and self.n_held_bytes + n_bytes > self._rows.max_bytes:
            _, dropped = self._held.popitem(last=False)
            self.n_held_bytes -= sum(values.nbytes for values in dropped.values())
        n_valid = self._n_valid[shard.start_row : shard.stop_row]
        self._held[number] = {
            output.name: arrange_entries(
                store.read_array(f"outputs/{output.name}", shard.start_row, shard.stop_row), self.n_views, n_valid
            )
            for output in store.spec.outputs
        }
        self.n_held_bytes += n_bytes
        self.n_reads += 1
        return self._held[number]
