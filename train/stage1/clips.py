"""Clips of segments as Stage 1's loops take them, and their source where the trunk's outputs are cached."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import blake2b
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from echoshift.extract.clips import draw_integer
from echoshift.pipeline.errors import StoreError
from echoshift.pipeline.specs import FeatureSpec
from echoshift.pipeline.store.interface import FeatureStore, RowFinder

N_AHEAD = 2
_Read = TypeVar("_Read")


@dataclass(frozen=True, slots=True)
class ClipFacts:
    """Origin of one segment's entries, as a feature store keeps it (FORMAT.md).

    Attributes:
        times_s: seconds that each covers, float64 [n_entries, 2].
        frames: first and last frame, index in the file, int64 [n_entries, 2].
        digest: of the media and the segment's times, uint8 [16].
    """

    times_s: np.ndarray
    frames: np.ndarray
    digest: np.ndarray


class ClipSource(Protocol):
    """A GatedEncoder's visual inputs by name: `clip`, or the trunk's outputs; float32, on the CPU.

    Several iterations may run at a time, each with a read-ahead of its own. An iterator that is dropped or closed early
    ends what it started. Use as a context manager, or call `close`.
    """

    def iterate_batches(self, batches: Sequence[Sequence[str]], epoch: int) -> Iterator[dict[str, Tensor]]:
        """Yield each batch of segment ids, in order: by name [B, ...], one augmented view a segment.

        Draws depend on seed, epoch and segment alone. Tensors are pinned where CUDA is available. Raises MediaError or
        StoreError naming the segment that can't be read.
        """
        ...

    def iterate_clips(
        self, segment_ids: Sequence[str], spec: FeatureSpec
    ) -> Iterator[tuple[str, dict[str, Tensor], ClipFacts]]:
        """Yield id, inputs [n_entries, ...] by name and origin of each segment, in order; raises as iterate_batches.

        Of `spec` only `clip`, `frame` and `decoder` are used.
        """
        ...

    def close(self) -> None:
        """End the processes and threads that read ahead."""
        ...

    def __enter__(self) -> ClipSource: ...

    def __exit__(self, *exc: object) -> None: ...


class TrunkClips:
    """A ClipSource of the trunk's outputs, from level-2 stores.

    `train_store` holds k augmented views of one clip a segment (preset zhang-stage1-train, clip.n_views=k, outputs
    trunk); seed, epoch and segment draw the view. `test_stores` serve `iterate_clips`. A thread reads N_AHEAD batches
    or segments ahead, of each segment only the view that is drawn. Raises StoreError for a store of something else.
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
            if _list_trunk(store) != self._names or _describe_network(store) != _describe_network(train_store):
                raise StoreError(f"{store.path} and {train_store.path} are not of the same network; extract them alike")

    def iterate_batches(self, batches: Sequence[Sequence[str]], epoch: int) -> Iterator[dict[str, Tensor]]:
        """Yield each batch by output, float32 [B, ...]; raises StoreError naming the segment that isn't done."""
        seed = derive_epoch_seed(self._seed, epoch)
        n_views = self._train_store.spec.clip.n_views

        def read(batch: Sequence[str]) -> dict[str, Tensor]:
            views = np.array([draw_integer(0, n_views - 1, seed, name, 0, 0, "view") for name in batch], np.int64)
            return {name: _widen(self._train_store.read_clips(batch, name, views)) for name in self._names}

        return _read_ahead(batches, read)

    def iterate_clips(
        self, segment_ids: Sequence[str], spec: FeatureSpec
    ) -> Iterator[tuple[str, dict[str, Tensor], ClipFacts]]:
        """Yield all entries of each segment by output, float32 [n_entries, ...], with their origin."""
        store = self._find_store(spec)
        rows = dict(zip(segment_ids, RowFinder(store.segment_ids).find(str(store.path), segment_ids), strict=True))
        n_valid, times_s, frames, digests = map(store.read_array, ("n_valid", "times", "frames", "digest"))

        def read(segment_id: str) -> tuple[str, dict[str, Tensor], ClipFacts]:
            row = rows[segment_id]
            n = int(n_valid[row])
            clips = {name: _widen(store.read([segment_id], name)[0, :n]) for name in self._names}
            return segment_id, clips, ClipFacts(times_s[row, :n], frames[row, :n], digests[row])

        return _read_ahead(segment_ids, read)

    def close(self) -> None:
        """Do nothing: an iteration's thread ends with it."""

    def __enter__(self) -> TrunkClips:
        return self

    def __exit__(self, *exc: object) -> None:
        return None

    def _find_store(self, spec: FeatureSpec) -> FeatureStore:
        for store in (*self._test_stores, self._train_store):
            own = store.spec
            if (own.clip, own.frame, own.decoder) == (spec.clip, spec.frame, spec.decoder):
                return store
        raise StoreError(
            f"no level-2 store of {spec.encoder} holds the clips asked for ({spec.clip.n_clips} {spec.clip.sampling}); "
            "extract them with --outputs trunk"
        )


def derive_epoch_seed(seed: int, epoch: int) -> int:
    """Derive the seed of an epoch's draws from a run's: 48 bits of a hash of both."""
    return int.from_bytes(blake2b(f"{seed}\n{epoch}".encode(), digest_size=6).digest(), "big")


def _list_trunk(store: FeatureStore) -> list[str]:
    names = [output.name for output in store.spec.outputs if output.name.startswith("trunk") or output.name == "map"]
    if not names:
        raise StoreError(f"{store.path} holds nothing of the trunk; extract with --outputs trunk")
    return names


def _describe_network(store: FeatureStore) -> tuple[object, ...]:
    spec = store.spec
    return spec.encoder, spec.revision, spec.weights, spec.precision


def _widen(values: np.ndarray) -> Tensor:
    """Copy values into float32, pinned where CUDA is available."""
    widened = torch.empty(values.shape, dtype=torch.float32, pin_memory=torch.cuda.is_available())
    return widened.copy_(torch.from_numpy(values))


def _read_ahead(
    items: Sequence[Sequence[str]] | Sequence[str], read: Callable[..., _Read], n_ahead: int = N_AHEAD
) -> Iterator[_Read]:
    """Yield read(item) of each, in order, read by a thread; an error comes at its item, and what waits is dropped."""
    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="trunk-reader")
    waiting: deque[Future[_Read]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(read, item))
            if len(waiting) > n_ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
