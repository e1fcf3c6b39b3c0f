"""Makes an ordinary store of features that were computed elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from echoshift.pipeline.errors import StoreError
from echoshift.pipeline.rows import compute_digests, order_segments, plan_new_rows
from echoshift.pipeline.segments import Manifest, Segment
from echoshift.pipeline.specs import ClipSpec, FeatureSpec, OutputSpec
from echoshift.pipeline.store.attributes import describe_writer
from echoshift.pipeline.store.import_sources import ImportSource
from echoshift.pipeline.store.interface import Backend, FeatureStore, ShardIndex
from echoshift.pipeline.store.layout import DONE, PENDING, Shard, plan_rows_per_shard, plan_shards
from echoshift.pipeline.store.ledger import append_run
from echoshift.pipeline.store.location import Location, Place
from echoshift.pipeline.store.opening import create_store, has_store, hold_store, name_store, open_store


@dataclass(frozen=True, slots=True)
class ImportSummary:
    """The outcome of an import: rows done and pending in the store, rows written now, and what was left out.

    `unknown_ids` are segments of the source that the manifest doesn't have.
    """

    path: str
    n_done: int
    n_pending: int
    n_written: int
    unknown_ids: tuple[str, ...]


def make_import_spec(source: ImportSource, encoder: str, output: str) -> FeatureSpec:
    """Make the specification of a source's features; its fingerprint changes with every byte of the source."""
    if not encoder or set(encoder) & set("/\\ ") or encoder.startswith("."):
        raise StoreError(f"encoder {encoder!r} is part of the store's file name; use letters, digits, - and _")
    return FeatureSpec(
        encoder=encoder,
        weights=f"imported:{source.spec.source_sha256}",
        clip=ClipSpec(n_frames=1, n_clips=source.n_clips),
        imported=source.spec,
        outputs=(OutputSpec(name=output, shape=source.clip_shape),),
        dtype=source.dtype,
    )


def compute_import_digests(segment_ids: list[str], segments: dict[str, Segment], spec: FeatureSpec) -> np.ndarray:
    """Compute the digests that an imported store's rows should have, uint8 [row, 16].

    The source's content stands where the media's identity stands otherwise: a row is stale when its segment's times
    have changed in the manifest, and never because of media.
    """
    rows = [segments.get(segment_id) for segment_id in segment_ids]
    return compute_digests(rows, {s.segment_id: spec.weights for s in rows if s is not None})


def import_features(
    source: ImportSource,
    manifest: Manifest,
    cache_dir: Place,
    *,
    encoder: str,
    output: str = "pooled",
    backend: Backend = "zarr",
    allow_unknown: bool = False,
    notify: Callable[[int], None] = lambda n_rows: None,
) -> ImportSummary:
    """Write a source's features as done rows of a store; the same call goes on where one was killed.

    Segments of the manifest that the source doesn't have stay pending. Raises StoreError when the source has segments
    that the manifest doesn't have, unless `allow_unknown` leaves them out, or when they have none in common.
    """
    spec = make_import_spec(source, encoder, output)
    segments = {segment.segment_id: segment for segment in manifest}
    given = set(source.segment_ids)
    unknown = tuple(segment_id for segment_id in source.segment_ids if segment_id not in segments)
    if len(unknown) == len(given):
        raise StoreError(
            f"{source.place}: none of its {len(given)} segments (first: {unknown[0]}) is in the manifest of "
            f"{manifest.dataset}; is it the right dataset?"
        )
    if unknown and not allow_unknown:
        raise StoreError(
            f"{source.place}: segment {unknown[0]} is not in the manifest of {manifest.dataset}, nor are "
            f"{len(unknown) - 1} others; --allow-unknown leaves them out"
        )
    path = name_store(cache_dir, manifest.dataset, spec, backend)
    with hold_store(path):
        store = _open_or_create(path, spec, manifest, segments, source)
        digests = compute_import_digests(list(store.segment_ids), segments, spec)
        here = np.asarray([s in given and s in segments for s in store.segment_ids], dtype=bool)
        wanted = store.missing(digests) & here
        n_written = 0
        for shard in plan_shards(store.layout):
            rows = slice(shard.start_row, shard.stop_row)
            if wanted[rows].any():
                store.begin_shard(shard)
                store.commit_shard(shard, _write_shard(store, source, shard, here[rows], digests[rows]))
                n_written += int(here[rows].sum())
            notify(shard.n_rows)
        if n_written:
            append_run(store.path, {**describe_writer(), "imported_from": source.place, "n_rows": n_written})
        state = store.read_array("state")
    return ImportSummary(store.path, int((state == DONE).sum()), int((state == PENDING).sum()), n_written, unknown)


def _open_or_create(
    path: Location, spec: FeatureSpec, manifest: Manifest, segments: dict[str, Segment], source: ImportSource
) -> FeatureStore:
    if has_store(path):
        store = open_store(path)
        new_ids = plan_new_rows(store.segment_ids, segments.values())
        if new_ids:
            store.extend(new_ids, source.n_clips)
        return store
    return create_store(
        path,
        manifest.dataset,
        spec,
        [segment.segment_id for segment in order_segments(segments.values())],
        n_clips=source.n_clips,
        manifest_sha256=manifest.sha256,
        weights_source=f"imported from {source.place}",
        n_rows_per_shard=plan_rows_per_shard(spec, len(segments), source.n_clips),
    )


def _write_shard(
    store: FeatureStore, source: ImportSource, shard: Shard, here: np.ndarray, digests: np.ndarray
) -> ShardIndex:
    n, k = shard.n_rows, store.layout.n_clips
    output = store.spec.outputs[0]
    values = np.zeros((n, k, *output.shape), store.spec.dtype)
    times, n_valid = np.full((n, k, 2), np.nan), np.zeros(n, np.int32)
    has_audio = np.zeros(n, np.uint8)
    for i in np.flatnonzero(here).tolist():
        segment = source.read(store.segment_ids[shard.start_row + i])
        n_valid[i] = len(segment.features)
        with np.errstate(over="ignore"):
            values[i, : n_valid[i]] = segment.features
        times[i, : n_valid[i]] = segment.times
        has_audio[i] = not np.isnan(segment.features).all()
    store.write_outputs(output.name, shard.start_row, values)
    sound = store.spec.holds_sound
    return ShardIndex(
        times=times,
        frames=np.full((n, k, 2), -1, np.int64),
        n_valid=n_valid,
        digest=np.where(here[:, None], digests, 0).astype(np.uint8),
        state=np.where(here, DONE, PENDING).astype(np.uint8),
        has_audio=has_audio if sound else None,
        loudness_dbfs=np.where(has_audio, np.nan, -np.inf).astype(np.float32) if sound else None,
    )
