"""Plans a run before it does anything: segments, clips, bytes and files of each store, and how long it takes."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import numpy as np

from echoshift.extract.media import (
    MediaSurvey,
    count_clips_at_most,
    identify_segments,
)
from echoshift.extract.run import ExtractionRequest, choose_rows, choose_rows_per_shard, choose_spread, extract_on_trial
from echoshift.pipeline.execution import plan_tasks
from echoshift.pipeline.segments import Segment
from echoshift.pipeline.specs import FeatureSpec
from echoshift.pipeline.store.interface import Backend
from echoshift.pipeline.store.layout import (
    DONE,
    FAILED,
    StoreLayout,
    measure_id_bytes,
    order_segments,
    plan_arrays,
    plan_new_rows,
    plan_shards,
)
from echoshift.pipeline.store.location import Location, Place, count_free_bytes, locate
from echoshift.pipeline.store.open import has_store, name_store, open_store

Level = Literal["Stage 1", "Stage 2"]

# About 95 % of ranges of two standard errors to either side hold the true mean.
N_STANDARD_ERRORS = 2.0
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
        n_bytes_to_add: what the disk must have free; an HDF5 store that grows is written again beside the old one.
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
    """The work of a run and its stores; `n_bytes_free` on the cache's disk is None where no disk can be asked."""

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


def find_level(output: str) -> Level:
    """Return the cache level of an output by its name (docs/extraction.md)."""
    return "Stage 1" if output.startswith("trunk") else "Stage 2"


def plan_run(request: ExtractionRequest, survey: MediaSurvey, notify: Callable[[], None] = lambda: None) -> RunEstimate:
    """Plan a run: read manifest, media and stores, and write nothing.

    `notify` is called once a segment and store. The bytes are those of the finished store.
    """
    segments = {segment.segment_id: segment for segment in request.manifest}
    rows = [_plan_rows(request, survey, spec, segments, notify) for spec, _ in request.encoders]
    estimates = [
        _estimate_store(request, survey, spec, segments, of_store)
        for (spec, _), of_store in zip(request.encoders, rows, strict=True)
    ]
    work: dict[tuple[int, ...], list[Segment]] = {}
    for encoders, segment_id in _share_work(rows):
        segment = segments.get(segment_id)
        if segment is not None and not all(survey.explain_missing(segment, request.encoders[i][0]) for i in encoders):
            work.setdefault(encoders, []).append(segment)
    shared = tuple(SharedWork(encoders, tuple(found)) for encoders, found in work.items())
    return RunEstimate(tuple(estimates), shared, measure_free_bytes(request.cache_dir))


@dataclass(frozen=True, slots=True)
class _Rows:
    """A store's rows as the run would find them; `state` is 0 of those that it would compute, or add.

    `new_ids` are of the rows that the store doesn't have yet, and come last.
    """

    path: Location
    ids: list[str]
    new_ids: list[str]
    state: np.ndarray
    wanted: np.ndarray
    kept: np.ndarray
    layout: StoreLayout


def _plan_rows(
    request: ExtractionRequest,
    survey: MediaSurvey,
    spec: FeatureSpec,
    segments: dict[str, Segment],
    notify: Callable[[], None],
) -> _Rows:
    identities = identify_segments(survey, segments.values(), spec, notify)
    path = name_store(request.cache_dir, request.card.name, spec, request.backend)
    if not has_store(path):
        ids = [segment.segment_id for segment in order_segments(segments.values())]
        layout = StoreLayout(
            n_rows=len(ids),
            n_clips=count_clips_at_most(survey, segments.values(), spec),
            n_rows_per_shard=choose_rows_per_shard(request, survey),
            n_id_bytes=measure_id_bytes(ids),
        )
        nothing = np.zeros(len(ids), dtype=bool)
        return _Rows(path, ids, ids, nothing.astype(np.uint8), ~nothing, nothing, layout)
    store = open_store(path)
    new_ids = plan_new_rows(store.segment_ids, segments.values())
    ids = [*store.segment_ids, *new_ids]
    layout = StoreLayout(
        n_rows=len(ids),
        n_clips=max(store.layout.n_clips, count_clips_at_most(survey, [segments[i] for i in new_ids], spec)),
        n_rows_per_shard=store.layout.n_rows_per_shard,
        n_id_bytes=store.layout.n_id_bytes,
    )
    rows = choose_rows(store, segments, identities, survey, retry_failed=request.retry_failed)
    nothing = np.zeros(len(new_ids), dtype=bool)
    return _Rows(
        path,
        ids,
        new_ids,
        np.concatenate([np.where(rows.in_manifest & ~rows.wanted, store.read_array("state"), 0), nothing]),
        np.concatenate([rows.wanted, ~nothing]),
        np.concatenate([rows.kept, nothing]),
        layout,
    )


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
    request: ExtractionRequest, survey: MediaSurvey, spec: FeatureSpec, segments: dict[str, Segment], rows: _Rows
) -> StoreEstimate:
    layout, wanted, path = rows.layout, rows.wanted, rows.path
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
    is_rewritten = request.backend == "hdf5" and len(rows.new_ids) > 0
    missing = {i for i, segment in segments.items() if survey.explain_missing(segment, spec) is not None}
    clips = {
        segment_id: 0 if segment_id in missing else count_clips_at_most(survey, [segment], spec)
        for segment_id, segment in segments.items()
    }
    to_do = [rows.ids[row] for row in np.flatnonzero(wanted).tolist()]
    return StoreEstimate(
        path=str(path),
        encoder=spec.encoder,
        dtype=spec.dtype,
        n_segments=len(segments),
        n_done=int((rows.state == DONE).sum()),
        n_failed=int((rows.state == FAILED).sum()),
        n_to_do=len(to_do),
        n_media_missing=len(missing),
        n_clips=sum(clips.values()),
        n_clips_to_do=sum(clips[segment_id] for segment_id in to_do),
        outputs=outputs,
        n_index_bytes=n_bytes - sum(output.n_bytes for output in outputs),
        n_bytes=n_bytes,
        n_bytes_now=n_bytes_now,
        n_bytes_to_add=n_bytes if is_rewritten else max(0, n_bytes - n_bytes_now),
        n_shards=layout.n_shards,
        n_shards_to_do=sum(bool(wanted[s.start_row : s.stop_row].any()) for s in plan_shards(layout)),
        n_files=n_files,
    )


def _share_work(stores: Sequence[_Rows]) -> list[tuple[tuple[int, ...], str]]:
    """List each segment that is computed with the stores it is computed for at once, as extraction groups them."""
    groups: dict[tuple[int, tuple[str, ...]], int] = {}
    shared: dict[tuple[int, str], list[int]] = {}
    for i, store in enumerate(stores):
        group = groups.setdefault((store.layout.n_rows_per_shard, tuple(store.ids)), i)
        for task in plan_tasks({"": store.wanted}, store.layout):
            for row in range(task.shard.start_row, task.shard.stop_row):
                if not store.kept[row]:
                    shared.setdefault((group, store.ids[row]), []).append(i)
    return [(tuple(encoders), segment_id) for (_, segment_id), encoders in shared.items()]


def _count_bytes(shape: Sequence[int], dtype: str) -> int:
    return math.prod(shape) * np.dtype(dtype).itemsize


@dataclass(frozen=True, slots=True)
class DurationEstimate:
    """The time that a number of segments take, in seconds, and the range it is expected in."""

    n_segments: int
    low_s: float
    expected_s: float
    high_s: float


@dataclass(frozen=True, slots=True)
class TimedSample:
    """The outcome of timing a sample of a run's segments.

    Attributes:
        device: what it ran on; the estimate holds for that.
        n_sampled, n_failed: segments timed, and those of them that gave no features for some store.
        segments_s: seconds each sampled segment took, whatever its stores.
        duration: of all segments to do.
    """

    device: str
    n_sampled: int
    n_failed: int
    segments_s: tuple[float, ...]
    duration: DurationEstimate


def estimate_duration(segments_s: Sequence[float], n_segments: int) -> DurationEstimate:
    """Extrapolate from seconds a sampled segment to n segments: mean times n, two standard errors to either side.

    One sampled segment says nothing of the spread: half to twice its time is given.
    """
    mean = statistics.fmean(segments_s)
    if len(segments_s) == 1:
        return DurationEstimate(n_segments, mean * n_segments / 2, mean * n_segments, mean * n_segments * 2)
    error = N_STANDARD_ERRORS * statistics.stdev(segments_s) / math.sqrt(len(segments_s))
    return DurationEstimate(
        n_segments, max(0.0, mean - error) * n_segments, mean * n_segments, (mean + error) * n_segments
    )


def time_sample(
    request: ExtractionRequest,
    survey: MediaSurvey,
    work: Sequence[SharedWork],
    n_sample: int,
    seed: int = 0,
    notify: Callable[[int], None] = lambda n_rows: None,
) -> TimedSample | None:
    """Extract `n_sample` segments of each kind of work into throw-away stores and time them; None: nothing to do.

    The segments are spread over the data set by a seeded choice and go through one shard, as in a run. Before, one of
    them goes through alone, uncounted: it loads networks and libraries.
    """
    if not work:
        return None
    segments_s: list[float] = []
    durations, n_failed = [], 0
    for kind in work:
        chosen = choose_spread(kind.segments, n_sample, seed)
        encoders = [request.encoders[i] for i in kind.encoders]
        stamps: list[tuple[float, int]] = []

        def note(n_rows: int, stamps: list[tuple[float, int]] = stamps) -> None:
            stamps.append((time.perf_counter(), n_rows))
            notify(n_rows)

        with TemporaryDirectory(prefix="echoshift-plan-") as folder:
            extract_on_trial(Path(folder) / "warm", encoders, chosen[:1], survey, request.options)
            started = time.perf_counter()
            stores = extract_on_trial(
                Path(folder) / "timed", encoders, chosen, survey, request.options, backend=request.backend, notify=note
            )
            duration_s = time.perf_counter() - started
            failed = [store.read_array("state") == FAILED for store in stores]
        n_failed += sum(any(rows[i] for rows in failed) for i in range(len(chosen)))
        of_kind = _split_duration(started, duration_s, stamps, len(chosen))
        segments_s += of_kind
        durations.append(estimate_duration(of_kind, len(kind.segments)))
    total = DurationEstimate(
        sum(d.n_segments for d in durations),
        sum(d.low_s for d in durations),
        sum(d.expected_s for d in durations),
        sum(d.high_s for d in durations),
    )
    return TimedSample(describe_device(request.options.device), len(segments_s), n_failed, tuple(segments_s), total)


def describe_device(device: str) -> str:
    """Describe which device a run would use: the GPU's name, or the CPU with its threads."""
    import torch

    from echoshift.pipeline.devices import resolve_device

    chosen = resolve_device(device)
    if chosen.type == "cuda":
        return f"{chosen} ({torch.cuda.get_device_name(chosen)})"
    return f"cpu ({torch.get_num_threads()} threads)"


def _split_duration(
    started: float, duration_s: float, stamps: Sequence[tuple[float, int]], n_segments: int
) -> list[float]:
    """Split the whole time over the segments by when each was read; the parts add up to the whole."""
    parts: list[float] = []
    last = started
    for when, n_rows in stamps:
        parts += [(when - last) / n_rows] * n_rows
        last = when
    if len(parts) != n_segments or sum(parts) <= 0:
        return [duration_s / n_segments] * n_segments
    return [part * duration_s / sum(parts) for part in parts]
