"""Gives the trunk's outputs from level-2 stores: one of the stored views a segment in training, all clips in a test."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from echoshift.extract.clips import draw_integer
from echoshift.pipeline.errors import StoreError
from echoshift.pipeline.specs import FeatureSpec
from echoshift.pipeline.store.interface import FeatureStore, RowFinder
from echoshift.train.stage1.visual_inputs import ClipFacts, derive_epoch_seed

N_AHEAD = 2
_Given = TypeVar("_Given")


@dataclass(frozen=True, slots=True)
class _StoreFacts:
    """What a store's index says, read once: [row], [row, entry, 2] and [row, 16]."""

    finder: RowFinder
    n_valid: np.ndarray
    times_s: np.ndarray
    frames: np.ndarray
    digests: np.ndarray


class TrunkInputs:
    """What stores of the trunk's outputs hold as VisualInputs says, under the outputs' names.

    `train_store` holds k augmented views of one clip a segment (preset zhang-stage1-train, clip.n_views=k, outputs
    trunk); the view is drawn by seed, epoch and segment. `test_stores` are those that `iterate_clips` is asked for.
    A thread reads N_AHEAD batches or segments ahead, of each segment only the view that is drawn.
    Raises StoreError for a store of something else.
    """

    def __init__(self, train_store: FeatureStore, test_stores: Sequence[FeatureStore], *, seed: int) -> None:
        clip = train_store.spec.clip
        if clip.sampling == "windows" or clip.n_clips != 1 or train_store.spec.n_entries_per_clip != clip.n_views:
            raise StoreError(
                f"{train_store.path} doesn't hold views of one clip; extract with --preset zhang-stage1-train "
                "--set clip.n_views=K --outputs trunk"
            )
        self._train_store, self._test_stores, self._seed = train_store, tuple(test_stores), seed
        self._names = _list_trunk(train_store)
        for store in test_stores:
            if _list_trunk(store) != self._names or _name_network(store) != _name_network(train_store):
                raise StoreError(f"{store.path} and {train_store.path} are not of the same network; extract them alike")
        self._facts: dict[str, _StoreFacts] = {}

    def iterate_batches(self, batches: Sequence[Sequence[str]], epoch: int) -> Iterator[dict[str, Tensor]]:
        """Return each batch by output, float32 [B, ...]; raises StoreError naming the segment that isn't done."""
        seed = derive_epoch_seed(self._seed, epoch)
        n_views = self._train_store.spec.clip.n_views

        def read(batch: Sequence[str]) -> dict[str, Tensor]:
            views = np.array([draw_integer(0, n_views - 1, seed, name, 0, 0, "view") for name in batch], np.int64)
            return {name: _widen(self._train_store.read_clips(batch, name, views)) for name in self._names}

        return _read_ahead(batches, read)

    def iterate_clips(
        self, segment_ids: Sequence[str], spec: FeatureSpec
    ) -> Iterator[tuple[str, dict[str, Tensor], ClipFacts]]:
        """Return all entries of each segment by output, float32 [n_entries, ...], with what they are made from."""
        store = self._find_store(spec)
        facts = self._read_facts(store)

        def read(segment_id: str) -> tuple[str, dict[str, Tensor], ClipFacts]:
            row = int(facts.finder.find(store.path, [segment_id])[0])
            n = int(facts.n_valid[row])
            clips = {name: _widen(store.read([segment_id], name)[0, :n]) for name in self._names}
            return segment_id, clips, ClipFacts(facts.times_s[row, :n], facts.frames[row, :n], facts.digests[row])

        return _read_ahead(segment_ids, read)

    def close(self) -> None:
        """Have nothing to end: an iteration's thread ends with it."""

    def __enter__(self) -> TrunkInputs:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _find_store(self, spec: FeatureSpec) -> FeatureStore:
        for store in (*self._test_stores, self._train_store):
            own = store.spec
            if (own.clip, own.frame, own.decoder) == (spec.clip, spec.frame, spec.decoder):
                return store
        raise StoreError(
            f"no level-2 store of {spec.encoder} holds the clips asked for ({spec.clip.n_clips} {spec.clip.sampling}); "
            "extract them with --outputs trunk"
        )

    def _read_facts(self, store: FeatureStore) -> _StoreFacts:
        if store.path not in self._facts:
            index = [store.read_array(name) for name in ("n_valid", "times", "frames", "digest")]
            self._facts[store.path] = _StoreFacts(RowFinder(store.segment_ids), *index)
        return self._facts[store.path]


def _list_trunk(store: FeatureStore) -> list[str]:
    names = [output.name for output in store.spec.outputs if output.name.startswith("trunk") or output.name == "map"]
    if not names:
        raise StoreError(f"{store.path} holds nothing of the trunk; extract with --outputs trunk")
    return names


def _name_network(store: FeatureStore) -> tuple[str, ...]:
    spec = store.spec
    return spec.encoder, str(spec.revision), spec.weights, spec.precision


def _widen(values: np.ndarray) -> Tensor:
    """Copy values into float32, pinned where there is CUDA."""
    widened = torch.empty(values.shape, dtype=torch.float32, pin_memory=torch.cuda.is_available())
    return widened.copy_(torch.from_numpy(values))


def _read_ahead(
    items: Sequence[Sequence[str]] | Sequence[str], read: Callable[..., _Given], n_ahead: int = N_AHEAD
) -> Iterator[_Given]:
    """Return read(item) of each, in order, read by a thread; an error comes at its item, and what waits is dropped."""
    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="trunk-reader")
    waiting: deque[Future[_Given]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(read, item))
            if len(waiting) > n_ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
