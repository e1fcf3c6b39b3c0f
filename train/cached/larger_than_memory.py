"""Reads features that don't fit into memory shard by shard, in an order in which few shards are wanted at a time."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from echoshift.pipeline.errors import RunError
from echoshift.pipeline.store.interface import FeatureStore
from echoshift.pipeline.store.layout import plan_shards
from echoshift.pipeline.store.reading import RowFinder, require_done
from echoshift.train.cached.batches import FeatureBatch
from echoshift.train.cached.feature_rows import FeatureRows, arrange_entries, find_rows
from echoshift.train.epoch_plan import shuffle

_N_ORDERS = 3  # of the source, the target and its labelled part, each with shards of its own in memory
_N_IN_READING = 3  # shards' worth of memory that reading one takes beside its place (benchmarks/larger_than_memory)
_GROUPS, _WITHIN = 100, 101  # what is shuffled, beside the parts of a shift


@dataclass(frozen=True, slots=True, eq=False)
class StoredRows:
    """The features of n segments that stay in their store; attributes and methods as of FeatureRows.

    Attributes:
        rows: in the store, int64 [n].
        n_valid: clips that each segment has, int64 [n].
        shards: what is held of the store, by all who look rows up; ids and sound, in memory, come on top of it.
    """

    segment_ids: tuple[str, ...]
    store: FeatureStore
    rows: np.ndarray
    n_valid: np.ndarray
    audio: Tensor
    has_audio: Tensor
    shards: SharedShards
    clip_audio: Tensor | None = None

    def __len__(self) -> int:
        return len(self.segment_ids)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """By output what a view of a segment is, (n_clips, ...)."""
        return {output.name: (self.n_clips, *output.shape) for output in self.store.spec.outputs}

    @property
    def n_views(self) -> int:
        """How many views of each segment there are."""
        return self.store.spec.n_entries_per_clip

    @property
    def n_clips(self) -> int:
        """How many clips of each segment there are."""
        return self.store.layout.n_clips // self.n_views

    def find(self, segment_ids: Sequence[str]) -> np.ndarray:
        """Find the rows of segments, int64 [n]; raises RunError naming the first that isn't there."""
        return find_rows(self.segment_ids, segment_ids)

    def without_sound(self) -> StoredRows:
        """Return the same rows as if none had sound."""
        nothing = torch.zeros_like(self.has_audio)
        return replace(self, audio=torch.zeros_like(self.audio), has_audio=nothing, clip_audio=None)

    def shuffle(self, rows: np.ndarray, seed: int, number: int, what: int) -> np.ndarray:
        """Return the order in which an epoch takes rows, int64 [n], positions in `rows`; the three numbers decide it.

        Shards come in groups, drawn anew each time, of as many as fit into this part's share of the memory; the rows of
        a group are shuffled. So every row comes once, and neighbours are of shards that are held together.
        """
        shards = self.rows[rows] // self.store.layout.n_rows_per_shard
        n_together = self.shards.n_slots // _N_ORDERS
        there = np.unique(shards)
        there = there[shuffle(len(there), seed, number, what + _GROUPS)]
        group_of = np.empty(there.max() + 1, dtype=np.int64)
        group_of[there] = np.arange(len(there)) // n_together
        mixed = shuffle(len(rows), seed, number, what + _WITHIN + _N_ORDERS)
        return mixed[np.argsort(group_of[shards[mixed]], kind="stable")]


def count_row_bytes(store: FeatureStore) -> int:
    """Count the bytes that a segment's outputs take in memory."""
    n_values = sum(int(np.prod(output.shape)) for output in store.spec.outputs)
    return store.layout.n_clips * n_values * np.dtype(store.spec.dtype).itemsize


def open_rows(
    store: FeatureStore,
    segment_ids: Sequence[str],
    audio: Tensor,
    has_audio: Tensor,
    max_bytes: int,
    clip_audio: Tensor | None = None,
) -> StoredRows:
    """Open segments' features for reading shard by shard, of which at most `max_bytes` are held.

    Raises StoreError as `store.read`, and RunError where so few bytes can't hold a shard of each part of a shift.
    """
    ids = list(segment_ids)
    rows = RowFinder(list(store.segment_ids)).find(str(store.path), ids)
    require_done(str(store.path), ids, store.read_array("state")[rows])
    n_valid = store.read_array("n_valid")[rows] // store.spec.n_entries_per_clip
    n_valid_of_row = np.zeros(store.layout.n_rows, dtype=np.int64)
    n_valid_of_row[rows] = n_valid
    shards = SharedShards(store, n_valid_of_row, plan_slots(store, max_bytes))
    return StoredRows(tuple(ids), store, rows, n_valid, audio, has_audio, shards, clip_audio)


def plan_slots(store: FeatureStore, max_bytes: int) -> int:
    """Count the shards that are kept in `max_bytes`, beside what reading one takes; raises RunError if too few."""
    n_shard_bytes = store.layout.n_rows_per_shard * count_row_bytes(store)
    n_slots = max_bytes // n_shard_bytes - _N_IN_READING
    if n_slots < _N_ORDERS:
        wanted_mb = -(-(_N_ORDERS + _N_IN_READING) * n_shard_bytes // 2**20)
        raise RunError(
            f"{store.path}: {max_bytes} bytes are too few to read its shards of {n_shard_bytes} bytes in turn; raise "
            f"data.max_memory_mb to {wanted_mb} or more"
        )
    return min(n_slots, store.layout.n_shards)


class HeldShards:
    """Some shards of a store in places that are allocated once; the one not used for longest makes room.

    Freed and allocated one by one, shards of some MB leave holes that the system never gets back. `n_bytes` says how
    much memory the places are, `n_reads` how often a shard was read.
    """

    def __init__(self, store: FeatureStore, n_valid: np.ndarray, n_slots: int) -> None:
        self._store, self._n_valid, self.n_slots, self.n_reads = store, n_valid, n_slots, 0
        self._n_views, self._shards = store.spec.n_entries_per_clip, plan_shards(store.layout)
        n_rows, n_clips = store.layout.n_rows_per_shard, store.layout.n_clips // self._n_views
        dtype = torch.from_numpy(np.empty(0, store.spec.dtype)).dtype
        self.values = {
            output.name: torch.empty(n_slots, n_rows, self._n_views, n_clips, *output.shape, dtype=dtype)
            for output in store.spec.outputs
        }
        self._slot_of: OrderedDict[int, int] = OrderedDict()

    @property
    def n_bytes(self) -> int:
        """The bytes of all places."""
        return sum(values.nbytes for values in self.values.values())

    def hold(self, numbers: Sequence[int]) -> list[int]:
        """See to it that these shards, at most n_slots, are held; return the place of each."""
        for number in numbers:  # none of them may make room for another
            if number in self._slot_of:
                self._slot_of.move_to_end(number)
        for number in numbers:
            if number not in self._slot_of:
                self._read(number)
        return [self._slot_of[number] for number in numbers]

    def _read(self, number: int) -> None:
        is_full = len(self._slot_of) == self.n_slots
        slot = self._slot_of.popitem(last=False)[1] if is_full else len(self._slot_of)
        shard = self._shards[number]
        n_valid = self._n_valid[shard.start_row : shard.stop_row]
        for name, places in self.values.items():
            values = self._store.read_array(f"outputs/{name}", shard.start_row, shard.stop_row)
            places[slot, : shard.n_rows] = arrange_entries(values, self._n_views, n_valid)
        self._slot_of[number] = slot
        self.n_reads += 1


class SharedShards:
    """All who look up rows of one store the same HeldShards, which go when the last of them does."""

    def __init__(self, store: FeatureStore, n_valid: np.ndarray, n_slots: int) -> None:
        self._store, self._n_valid, self.n_slots = store, n_valid, n_slots
        self._held: weakref.ref[HeldShards] | None = None

    def open(self) -> HeldShards:
        """Return what is held, or begin to hold."""
        held = None if self._held is None else self._held()
        if held is None:
            held = HeldShards(self._store, self._n_valid, self.n_slots)
            self._held = weakref.ref(held)
        return held


class StoredBank:
    """Looks rows up as FeatureBank does, out of the shards that are held; banks of the same rows hold them together."""

    def __init__(self, rows: StoredRows, device: torch.device, *, one_clip: bool = False) -> None:
        self._rows, self._device, self.one_clip = rows, device, one_clip
        self.n_views, self.held = rows.n_views, rows.shards.open()

    def offset_of(self, part: FeatureRows | StoredRows) -> int:
        """Return what is added to the row numbers of the one part."""
        return 0

    def gather(self, rows: Tensor, views: Tensor | None = None, clips: Tensor | None = None) -> FeatureBatch:
        """Look features up as `FeatureBank.gather`, reading the shards that aren't held."""
        flat = rows.reshape(-1).cpu()
        of_view = torch.zeros_like(flat) if views is None else views.reshape(-1).cpu()
        of_clip = None if clips is None else clips.reshape(-1).cpu()
        found = {
            name: torch.empty(len(flat), n_clips if of_clip is None else 1, *shape)
            for name, (n_clips, *shape) in self._rows.shapes.items()
        }
        stored = torch.from_numpy(self._rows.rows)[flat]
        n_rows_per_shard = self._rows.store.layout.n_rows_per_shard
        numbers, which = torch.unique(stored // n_rows_per_shard, return_inverse=True)
        for start in range(0, len(numbers), self.held.n_slots):  # a batch may be of more shards than are held
            part = numbers[start : start + self.held.n_slots]
            slots = torch.tensor(self.held.hold(part.tolist()))
            at = torch.nonzero((which >= start) & (which < start + len(part)))[:, 0]
            index = (slots[which[at] - start], stored[at] % n_rows_per_shard, of_view[at])
            for name, values in self.held.values.items():
                taken = values[index] if of_clip is None else values[(*index, of_clip[at])][:, None]
                found[name][at] = taken.float()
        visual = {name: values.view(*rows.shape, *values.shape[1:]).to(self._device) for name, values in found.items()}
        of_clips, audio = self._rows.clip_audio, self._rows.audio[flat]
        if of_clip is not None and of_clips is not None:
            audio = of_clips[flat, of_clip]
        audio = audio.view(*rows.shape, self._rows.audio.shape[1]).to(self._device)
        return FeatureBatch(visual, audio, self._rows.has_audio[flat].view(rows.shape).to(self._device))
