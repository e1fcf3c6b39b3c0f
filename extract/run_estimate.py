"""Plans what a run would do before it does anything: segments, clips, bytes and files of each store, and its work."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from echoshift.extract.extraction import ExtractionRequest
from echoshift.extract.media_survey import MediaSurvey, count_clips_at_most, find_modality, identify_segments
from echoshift.extract.missing_media import find_unchecked_rows
from echoshift.extract.shard_sizing import choose_rows_per_shard
from echoshift.pipeline.execution import plan_tasks, select_rows
from echoshift.pipeline.segments import Segment
from echoshift.pipeline.specs import FeatureSpec
from echoshift.pipeline.store.interface import Backend
from echoshift.pipeline.store.layout import (
    DONE,
    FAILED,
    StoreLayout,
    compute_digests,
    measure_id_bytes,
    order_segments,
    plan_arrays,
    plan_new_rows,
    plan_shards,
)
from echoshift.pipeline.store.location import Place, count_free_bytes, locate
from echoshift.pipeline.store.open import has_store, name_store, open_store

Level = Literal["Stage 1", "Stage 2"]

N_CHECKSUM_BYTES = 4
# What zarr writes of an array (its zarr.json) and of the root group with the specification; what HDF5 keeps besides.
N_ZARR_ARRAY_JSON_BYTES = 800
N_ATTRIBUTE_BYTES = 4000
N_HDF5_ARRAY_BYTES = 1000
N_HDF5_FILE_BYTES = 7000


@dataclass(frozen=True, slots=True)
class OutputEstimate:
    """What one output takes on disk.

    Attributes:
        level: what it is for: Stage 1 trains from trunks, Stage 2 from pooled features, tokens and maps.
        n_bytes_a_row: of one segment, all its clips.
        n_bytes: of all rows, with checksums and the unused ends of chunks.
    """

    name: str
    level: Level
    shape: tuple[int, ...]
    n_bytes_a_row: int
    n_bytes: int


@dataclass(frozen=True, slots=True)
class StoreEstimate:
    """What one store would hold and need.

    Attributes:
        n_segments: of the manifest; each is done, failed (and not tried again) or to do.
        n_media_missing: segments whose media aren't there; they are among those to do, or failed.
        n_clips, n_clips_to_do: of the segments whose media are there.
        n_index_bytes: everything but the outputs.
        n_bytes, n_bytes_now: of the whole store, when it is full and today.
        n_bytes_to_add: what the disk must have free; an HDF5 store that grows is written anew beside the old one.
        n_shards_to_do: shards with a row to compute; all rows of such a shard are computed.
    """

    path: str
    encoder: str
    dtype: str
    n_segments: int
    n_done: int
    n_failed: int
    n_to_do: int
    n_media_missing: int
    n_clips: int
    n_clips_to_do: int
    outputs: tuple[OutputEstimate, ...]
    n_index_bytes: int
    n_bytes: int
    n_bytes_now: int
    n_bytes_to_add: int
    n_shards: int
    n_shards_to_do: int
    n_files: int


@dataclass(frozen=True, slots=True)
class SharedWork:
    """Segments that are computed for the same stores, and so share each decode; without those that miss media."""

    encoders: tuple[int, ...]
    segments: tuple[Segment, ...]


@dataclass(frozen=True, slots=True)
class RunEstimate:
    """What a run would do; `n_bytes_free` on the cache's disk is None where no disk can be asked."""

    stores: tuple[StoreEstimate, ...]
    work: tuple[SharedWork, ...]
    n_bytes_free: int | None

    @property
    def n_bytes_to_add(self) -> int:
        """The bytes that the run would add to the cache."""
        return sum(store.n_bytes_to_add for store in self.stores)

    @property
    def fits(self) -> bool:
        """Whether the cache's disk has room; True where it can't be asked."""
        return self.n_bytes_free is None or self.n_bytes_to_add <= self.n_bytes_free


@dataclass(frozen=True, slots=True)
class _Rows:
    """A store's rows as the run would find them."""

    path: str
    ids: tuple[str, ...]
    wanted: np.ndarray
    kept: np.ndarray
    layout: StoreLayout


def find_level(output: str) -> Level:
    """Return the cache level of an output by its name (docs/extraction.md)."""
    return "Stage 1" if output.startswith("trunk") else "Stage 2"


def plan_run(request: ExtractionRequest, survey: MediaSurvey, notify: Callable[[], None] = lambda: None) -> RunEstimate:
    """Plan a run: reads manifest, media and stores, and write nothing.

    `notify` is called once a segment and store. The bytes are those of the finished store.
    """
    segments = {segment.segment_id: segment for segment in request.manifest}
    estimates, rows = [], []
    for spec, _ in request.encoders:
        estimate, of_store = _estimate_store(request, survey, spec, segments, notify)
        estimates.append(estimate)
        rows.append(of_store)
    modalities = [find_modality(spec) for spec, _ in request.encoders]
    work: dict[tuple[int, ...], list[Segment]] = {}
    for encoders, segment_id in _share_work(rows):
        segment = segments.get(segment_id)
        if segment is not None and not all(survey.is_missing(segment, modalities[i]) for i in encoders):
            work.setdefault(encoders, []).append(segment)
    shared = tuple(SharedWork(encoders, tuple(found)) for encoders, found in work.items())
    return RunEstimate(tuple(estimates), shared, measure_free_bytes(request.cache_dir))


def measure_store(spec: FeatureSpec, layout: StoreLayout, backend: Backend) -> tuple[dict[str, int], int, int]:
    """Compute the bytes of each array of a full store, of its metadata, and the number of its files."""
    arrays = plan_arrays(spec, layout)
    if backend == "hdf5":
        sizes = {a.name: _count_bytes(a.shape, a.dtype) + N_CHECKSUM_BYTES * layout.n_shards for a in arrays}
        return sizes, N_HDF5_FILE_BYTES + N_HDF5_ARRAY_BYTES * len(arrays), 1
    n_chunks = {a.name: math.prod(math.ceil(n / c) for n, c in zip(a.shape, a.chunks, strict=True)) for a in arrays}
    sizes = {a.name: n_chunks[a.name] * (_count_bytes(a.chunks, a.dtype) + N_CHECKSUM_BYTES) for a in arrays}
    n_metadata = N_ATTRIBUTE_BYTES + N_ZARR_ARRAY_JSON_BYTES * len(arrays)
    return sizes, n_metadata, sum(n_chunks.values()) + len(arrays) + 2


def measure_free_bytes(cache_dir: Place) -> int | None:
    """Return the bytes free on the disk of a folder that needn't be there yet; None for what is no local folder."""
    place = locate(cache_dir)
    return None if place.is_remote else count_free_bytes(str(place))


def _estimate_store(
    request: ExtractionRequest,
    survey: MediaSurvey,
    spec: FeatureSpec,
    segments: dict[str, Segment],
    notify: Callable[[], None],
) -> tuple[StoreEstimate, _Rows]:
    identities = identify_segments(survey, list(segments.values()), spec, notify)
    path = name_store(request.cache_dir, request.card.name, spec, request.backend)
    state = np.zeros(0, dtype=np.uint8)
    if has_store(path):
        store = open_store(path)
        new_ids = plan_new_rows(store.segment_ids, segments.values())
        ids = [*store.segment_ids, *new_ids]
        layout = StoreLayout(
            n_rows=len(ids),
            n_clips=max(store.layout.n_clips, count_clips_at_most(survey, [segments[i] for i in new_ids], spec)),
            n_rows_per_shard=store.layout.n_rows_per_shard,
            n_id_bytes=store.layout.n_id_bytes,
        )
        known = [segments.get(segment_id) for segment_id in store.segment_ids]
        in_manifest = np.asarray([segment is not None for segment in known])
        digests = compute_digests(known, identities)
        wanted = select_rows(store, digests, in_manifest, retry_failed=request.retry_failed)
        state = store.read_array("state")
        wanted &= ~find_unchecked_rows(survey, known, spec, state == DONE).rows
        kept = np.concatenate([(state == DONE) & ~wanted, np.zeros(len(new_ids), dtype=bool)])
        state = np.where(in_manifest & ~wanted, state, 0)
        wanted = np.concatenate([wanted, np.ones(len(new_ids), dtype=bool)])
    else:
        ids = new_ids = [segment.segment_id for segment in order_segments(segments.values())]
        layout = StoreLayout(
            n_rows=len(ids),
            n_clips=count_clips_at_most(survey, list(segments.values()), spec),
            n_rows_per_shard=choose_rows_per_shard(request, survey),
            n_id_bytes=measure_id_bytes(ids),
        )
        wanted, kept = np.ones(len(ids), dtype=bool), np.zeros(len(ids), dtype=bool)
    rows = _Rows(str(path), tuple(ids), wanted, kept, layout)
    sizes, n_metadata_bytes, n_files = measure_store(spec, layout, request.backend)
    outputs = tuple(
        OutputEstimate(
            name=o.name,
            level=find_level(o.name),
            shape=o.shape,
            n_bytes_a_row=_count_bytes((layout.n_clips, *o.shape), spec.dtype),
            n_bytes=sizes[f"outputs/{o.name}"],
        )
        for o in spec.outputs
    )
    n_bytes = sum(sizes.values()) + n_metadata_bytes
    n_bytes_now = path.measure_bytes() if has_store(path) else 0
    grows_anew = request.backend == "hdf5" and len(new_ids) > 0
    clips = _count_clips(survey, spec, segments)
    to_do = [ids[row] for row in np.flatnonzero(wanted).tolist()]
    modality = find_modality(spec)
    return StoreEstimate(
        path=str(path),
        encoder=spec.encoder,
        dtype=spec.dtype,
        n_segments=len(segments),
        n_done=int((state == DONE).sum()),
        n_failed=int((state == FAILED).sum()),
        n_to_do=len(to_do),
        n_media_missing=sum(survey.is_missing(segment, modality) for segment in segments.values()),
        n_clips=sum(clips.values()),
        n_clips_to_do=sum(clips[segment_id] for segment_id in to_do),
        outputs=outputs,
        n_index_bytes=n_bytes - sum(output.n_bytes for output in outputs),
        n_bytes=n_bytes,
        n_bytes_now=n_bytes_now,
        n_bytes_to_add=n_bytes if grows_anew else max(0, n_bytes - n_bytes_now),
        n_shards=layout.n_shards,
        n_shards_to_do=sum(bool(wanted[s.start_row : s.stop_row].any()) for s in plan_shards(layout)),
        n_files=n_files,
    ), rows


def _share_work(stores: Sequence[_Rows]) -> list[tuple[tuple[int, ...], str]]:
    """List each segment that is computed with the stores it is computed for at once, as extraction groups them."""
    alike: dict[tuple[object, ...], list[int]] = {}
    for i, store in enumerate(stores):
        alike.setdefault((store.layout.n_rows_per_shard, *store.ids), []).append(i)
    shared = []
    for group in alike.values():
        first = stores[group[0]]
        for task in plan_tasks({stores[i].path: stores[i].wanted for i in group}, first.layout):
            computing = [i for i in group if stores[i].path in task.store_paths]
            for row in range(task.shard.start_row, task.shard.stop_row):
                encoders = tuple(i for i in computing if not stores[i].kept[row])
                if encoders:
                    shared.append((encoders, first.ids[row]))
    return shared


def _count_clips(survey: MediaSurvey, spec: FeatureSpec, segments: dict[str, Segment]) -> dict[str, int]:
    modality = find_modality(spec)
    return {
        segment_id: 0 if survey.is_missing(segment, modality) else count_clips_at_most(survey, [segment], spec)
        for segment_id, segment in segments.items()
    }


def _count_bytes(shape: Sequence[int], dtype: str) -> int:
    return math.prod(shape) * np.dtype(dtype).itemsize
