"""Checks a store against its manifest and its media, and re-queues what fails."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from echoshift.extract.media_survey import MediaSurvey, identify_segments
from echoshift.extract.reextraction import ReextractionReport, choose_rows, compare_sample
from echoshift.extract.run_options import RunOptions
from echoshift.pipeline.cards import DatasetCard, read_dataset_card
from echoshift.pipeline.errors import EchoshiftError, SpecError, StoreError
from echoshift.pipeline.manifest import locate_manifest, read_manifest
from echoshift.pipeline.segments import Manifest, Segment
from echoshift.pipeline.store.interface import FeatureStore, VerifyFault
from echoshift.pipeline.store.layout import DONE, compute_digests, order_segments
from echoshift.pipeline.store.location import Place
from echoshift.pipeline.store.open import open_store
from echoshift.pipeline.store.verify import (
    IndexDamage,
    RepairReport,
    find_faulty_rows,
    find_index_damage,
    requeue_rows,
    restore_segment_ids,
    verify_store,
)

SPAN_TOLERANCE_S = 1e-6  # of arithmetic on float64 seconds


@dataclass(frozen=True, slots=True)
class CheckOptions:
    """How a store is checked.

    Attributes:
        manifests_dir: where the dataset's card and manifest lie.
        media_root: None: data/DATASET beside the manifests.
        sample_percent: how much of the done rows is extracted anew; 0, nothing.
    """

    manifests_dir: Path
    media_root: Path | None = None
    sample_percent: float = 0.0
    seed: int = 0
    run: RunOptions = field(default_factory=RunOptions)


@dataclass(frozen=True, slots=True)
class StoreCheck:
    """The outcome of a check.

    Attributes:
        faults: everything wrong with the store as it lies there.
        damages: stretches of the index that can't be read; each is among the faults too.
        stale_ids: done rows whose media or times have changed since; no fault, the next extract computes them anew.
        notes: what could not be checked, and why.
        sample: the rows extracted anew; None when none were.
    """

    path: str
    n_rows: int
    faults: tuple[VerifyFault, ...]
    damages: tuple[IndexDamage, ...] = ()
    stale_ids: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    sample: ReextractionReport | None = None


def check_store(path: Place, options: CheckOptions, notify: Callable[[int], None] = lambda n_rows: None) -> StoreCheck:
    """Check checksums, numbers, times and ledger; with the media at hand spans too, and a sample extracted anew.

    Raises SpecError when a sample is asked for and manifest or media aren't there.
    """
    store = open_store(path)
    damages = find_index_damage(store)
    faults = [_describe_damage(damage) for damage in damages]
    if any(damage.array in ("state", "segment_id") for damage in damages):
        note = "without states or ids nothing else can be checked; --repair first"
        return StoreCheck(store.path, store.layout.n_rows, tuple(faults), tuple(damages), notes=(note,))
    found = verify_store(store) if not damages else store.find_checksum_faults()
    damaged = {damage.array for damage in damages}
    faults += [fault for fault in found if fault.array not in damaged]
    try:
        card, manifest = _read_dataset(store, options)
        survey = MediaSurvey(_find_media(store, options), card.media)
    except (EchoshiftError, FileNotFoundError) as error:
        if options.sample_percent:
            raise
        note = f"spans were not checked: {error}"
        return StoreCheck(store.path, store.layout.n_rows, tuple(faults), tuple(damages), notes=(note,))
    broken = {fault.array for fault in faults}
    if broken & {"times", "frames", "n_valid", "digest"}:
        note = "spans and sample wait until the index is whole"
        return StoreCheck(store.path, store.layout.n_rows, tuple(faults), tuple(damages), notes=(note,))
    by_id = {segment.segment_id: segment for segment in manifest}
    segments = [by_id.get(segment_id) for segment_id in store.segment_ids]
    done = store.read_array("state") == DONE
    known_segments = [segment for segment, is_done in zip(segments, done, strict=True) if is_done and segment]
    identities = identify_segments(survey, known_segments, store.spec)
    present = [s if s is not None and s.segment_id in identities else None for s in segments]
    checkable = done & np.asarray([segment is not None for segment in present], dtype=bool)
    fresh = checkable & (store.read_array("digest") == compute_digests(present, identities)).all(axis=1)
    faults += check_spans(store, present, fresh)
    stale_ids = tuple(store.segment_ids[row] for row in np.flatnonzero(checkable & ~fresh).tolist())
    sample = None
    if options.sample_percent and fresh.any():
        rows = choose_rows(np.flatnonzero(fresh), int(done.sum()), options.sample_percent, options.seed)
        sample = compare_sample(store, rows, present, survey, options.run, notify)
        faults += sample.faults
    notes = ("no row could be extracted anew: none is up to date",) if options.sample_percent and sample is None else ()
    return StoreCheck(store.path, store.layout.n_rows, tuple(faults), tuple(damages), stale_ids, notes, sample)


def repair_store(path: Place, check: StoreCheck, options: CheckOptions) -> RepairReport:
    """Re-queue the shards of everything that failed a check; the caller holds the store.

    Damaged ids are restored where the manifest is still the one the store was made for, and the store was never
    extended; then its rows are that manifest's, in order. Raises StoreError where they can't be known.
    """
    store = open_store(path)
    restored = False
    if any(fault.array == "segment_id" for fault in check.faults):
        restore_segment_ids(store, _find_planned_ids(store, options))
        restored = True
        others = [damage for damage in find_index_damage(store) if damage.array != "segment_id"]
        if any(damage.array == "state" for damage in others):
            requeue_rows(store, (), others)
        store = open_store(path)
        check = check_store(path, CheckOptions(options.manifests_dir, options.media_root))
    rows, beyond = find_faulty_rows(store, check.faults)
    without_row = [fault for fault in beyond if not any(fault.array == damage.array for damage in check.damages)]
    if without_row:
        fault = without_row[0]
        raise StoreError(
            f"{path}: {fault.array}: {fault.message}: no row to re-queue; delete the store and extract it anew"
        )
    done = requeue_rows(store, rows, check.damages)
    return RepairReport(done.n_rows, done.n_shards, restored_ids=restored)


def check_spans(store: FeatureStore, segments: list[Segment | None], rows: np.ndarray) -> list[VerifyFault]:
    """Check that the times of rows, bool [row], lie inside their segments and ascend, and that frames go with them."""
    spec = store.spec
    times, frames, n_valid = (store.read_array(name) for name in ("times", "frames", "n_valid"))
    spans = np.asarray([(s.start_s, s.stop_s) if s is not None else (np.nan, np.nan) for s in segments]).reshape(-1, 2)
    margin_s = SPAN_TOLERANCE_S
    if spec.audio is not None and spec.audio.span == "clip":
        margin_s += spec.audio.duration_s / 2  # windows stand around the middle of clips that lie inside
    exists = (np.arange(times.shape[1])[None] < n_valid[:, None]) & rows[:, None]
    with np.errstate(invalid="ignore"):
        inside = (times[..., 0] >= spans[:, None, 0] - margin_s) & (times[..., 1] <= spans[:, None, 1] + margin_s)
        ascending = np.diff(times[..., 0], axis=1) >= 0
        if spec.audio is not None:
            fitting = (frames == np.rint(np.nan_to_num(times) * spec.audio.rate_hz)).all(axis=-1)
        else:
            fitting = (frames[..., 0] >= 0) & (frames[..., 1] >= frames[..., 0])
    checks: Mapping[str, tuple[str, np.ndarray]] = {
        "a clip lies outside its segment": ("times", (exists & ~inside).any(axis=1)),
        "its frames are not those of its times": ("frames", (exists & ~fitting).any(axis=1)),
    }
    if spec.clip.sampling == "windows" or store.layout.n_clips == spec.clip.n_clips:  # else views share the axis
        descends = (exists[:, 1:] & ~ascending).any(axis=1)
        checks = {**checks, "a clip begins before the one before it": ("times", descends)}
    return [
        VerifyFault(array, store.segment_ids[row], message)
        for message, (array, bad) in checks.items()
        for row in np.flatnonzero(bad).tolist()
    ]


def _describe_damage(damage: IndexDamage) -> VerifyFault:
    return VerifyFault(damage.array, "", f"rows {damage.start_row} to {damage.stop_row}: {damage.reason}")


def _read_dataset(store: FeatureStore, options: CheckOptions) -> tuple[DatasetCard, Manifest]:
    card = read_dataset_card(str(store.attributes["dataset"]), options.manifests_dir)
    return card, read_manifest(locate_manifest(card.name, options.manifests_dir), card)


def _find_media(store: FeatureStore, options: CheckOptions) -> Path:
    root = options.media_root or options.manifests_dir.parent / str(store.attributes["dataset"])
    if not root.is_dir():
        raise SpecError(f"no media folder {root}; say where the videos lie with --media")
    return root


def _find_planned_ids(store: FeatureStore, options: CheckOptions) -> list[str]:
    remedy = "the rows can't be told apart any more: delete the store and extract it anew"
    try:
        _, manifest = _read_dataset(store, options)
    except EchoshiftError as error:
        raise StoreError(f"{store.path}: its segment ids are damaged, and {error}; {remedy}") from error
    if manifest.sha256 != store.attributes["manifest_sha256"] or len(manifest) != store.layout.n_rows:
        raise StoreError(
            f"{store.path}: its segment ids are damaged, and the manifest is not the one it was made for; {remedy}"
        )
    return [segment.segment_id for segment in order_segments(manifest)]
