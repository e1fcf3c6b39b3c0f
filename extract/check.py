"""Checks a store against its manifest and its media, and re-queues what fails."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import numpy as np

from echoshift.extract.encoders.registry import find_encoder
from echoshift.extract.media import MediaSurvey, identify_segments
from echoshift.extract.run import choose_spread, extract_on_trial
from echoshift.extract.weights.load import WeightsRecord, list_weights, resolve_weights
from echoshift.extract.work import RunOptions
from echoshift.pipeline.cards import DatasetCard, read_dataset_card
from echoshift.pipeline.errors import EchoshiftError, SpecError, StoreError, WeightsError
from echoshift.pipeline.manifest import locate_manifest, read_manifest
from echoshift.pipeline.segments import Manifest, Segment
from echoshift.pipeline.specs import FeatureSpec
from echoshift.pipeline.store.audit import NORM_QUANTILES, Fp16Error, OutputAudit, measure_fp16_error
from echoshift.pipeline.store.failures import read_failures
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
N_BAR_CHARACTERS = 40
MIN_COSINE = 0.999
# The unit roundoff of what a network computes in. fp32 is taken as TF32, with which GPUs run convolutions.
PRECISION_ROUNDOFF = {"fp32": 2.0**-11, "fp16": 2.0**-11, "bf16": 2.0**-8}
DTYPE_ROUNDOFF = {"float32": 2.0**-24, "float16": 2.0**-11}
# Roundings of layer after layer add up like a random walk: about the root of 64 layers, and norms keep the scale.
N_ROUNDINGS = 8

Outcome = Literal["equal", "close", "different", "failed"]


@dataclass(frozen=True, slots=True)
class CheckOptions:
    """Options of a check.

    Attributes:
        manifests_dir: where the dataset's card and manifest lie.
        media_root: None: data/DATASET beside the manifests.
        sample_percent: how much of the done rows is extracted again; 0, nothing.
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
        stale_ids: done rows whose media or times have changed since; no fault, the next extract computes them again.
        notes: what could not be checked, and why.
        sample: the rows extracted again; None when none were.
    """

    path: str
    n_rows: int
    faults: tuple[VerifyFault, ...]
    damages: tuple[IndexDamage, ...] = ()
    stale_ids: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    sample: ReextractionReport | None = None


def check_store(path: Place, options: CheckOptions, notify: Callable[[int], None] = lambda n_rows: None) -> StoreCheck:
    """Check checksums, numbers, times and ledger; with the media at hand spans too, and a sample extracted again.

    Raises SpecError when a sample is asked for and manifest or media aren't there.
    """
    store = open_store(path)
    damages = find_index_damage(store)
    faults = [
        VerifyFault(damage.array, "", f"rows {damage.start_row} to {damage.stop_row}: {damage.reason}")
        for damage in damages
    ]
    found = StoreCheck(store.path, store.layout.n_rows, tuple(faults), tuple(damages))
    damaged = {damage.array for damage in damages}
    if damaged & {"state", "segment_id"}:
        return replace(found, notes=("without states or ids nothing else can be checked; --repair first",))
    of_arrays = verify_store(store) if not damages else store.find_checksum_faults()
    faults += [fault for fault in of_arrays if fault.array not in damaged]
    found = replace(found, faults=tuple(faults))
    try:
        card, manifest = _read_dataset(store, options)
        root = options.media_root or options.manifests_dir.parent / card.name
        if not root.is_dir():
            raise SpecError(f"no media folder {root}; say where the videos lie with --media")
        survey = MediaSurvey(root, card.media)
    except (EchoshiftError, FileNotFoundError) as error:
        if options.sample_percent:
            raise
        return replace(found, notes=(f"spans were not checked: {error}",))
    if {fault.array for fault in faults} & {"times", "frames", "n_valid", "digest"}:
        return replace(found, notes=("spans and sample wait until the index is whole",))
    by_id = {segment.segment_id: segment for segment in manifest}
    done = store.read_array("state") == DONE
    segments = [
        by_id.get(segment_id) if is_done else None
        for segment_id, is_done in zip(store.segment_ids, done.tolist(), strict=True)
    ]
    present = np.asarray([segment is not None for segment in segments], dtype=bool)
    identities = identify_segments(survey, [segment for segment in segments if segment is not None], store.spec)
    fresh = present & (store.read_array("digest") == compute_digests(segments, identities)).all(axis=1)
    faults += check_spans(store, segments, fresh)
    stale_ids = tuple(store.segment_ids[row] for row in np.flatnonzero(present & ~fresh).tolist())
    sample: ReextractionReport | None = None
    notes: tuple[str, ...] = ()
    if options.sample_percent and fresh.any():
        n_sampled = max(1, math.ceil(int(done.sum()) * options.sample_percent / 100))
        rows = choose_spread(np.flatnonzero(fresh).tolist(), n_sampled, options.seed)
        sample = compare_sample(store, rows, segments, survey, options.run, notify)
        faults += sample.faults
    elif options.sample_percent:
        notes = ("no row could be extracted again: none is up to date",)
    return replace(found, faults=tuple(faults), stale_ids=stale_ids, notes=notes, sample=sample)


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
            f"{path}: {fault.array}: {fault.message}: no row to re-queue; delete the store and extract it again"
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
        margin_s += spec.audio.duration_s / 2  # windows lie around the middle of clips that lie inside
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


def _read_dataset(store: FeatureStore, options: CheckOptions) -> tuple[DatasetCard, Manifest]:
    card = read_dataset_card(str(store.attributes["dataset"]), options.manifests_dir)
    return card, read_manifest(locate_manifest(card.name, options.manifests_dir), card)


def _find_planned_ids(store: FeatureStore, options: CheckOptions) -> list[str]:
    remedy = "the rows can't be told apart any more: delete the store and extract it again"
    try:
        _, manifest = _read_dataset(store, options)
    except EchoshiftError as error:
        raise StoreError(f"{store.path}: its segment ids are damaged, and {error}; {remedy}") from error
    if manifest.sha256 != store.attributes["manifest_sha256"] or len(manifest) != store.layout.n_rows:
        raise StoreError(
            f"{store.path}: its segment ids are damaged, and the manifest is not the one it was made for; {remedy}"
        )
    return [segment.segment_id for segment in order_segments(manifest)]


@dataclass(frozen=True, slots=True)
class RowComparison:
    """One output of one row against itself, extracted again.

    Attributes:
        outcome: the same bytes; within the tolerance; beyond it; or the row can't be extracted now.
        max_abs: largest absolute difference.
        relative: norm of the difference over the norm of the new values, the worst clip's.
        cosine: of stored and new values, the worst clip's.
        detail: why it failed or differs, "" otherwise.
    """

    segment_id: str
    output: str
    outcome: Outcome
    max_abs: float = 0.0
    relative: float = 0.0
    cosine: float = 1.0
    detail: str = ""


@dataclass(frozen=True, slots=True)
class ReextractionReport:
    """The outcome of extracting a sample again; `fp16_errors` is by output, empty for a store of float32."""

    n_rows: int
    tolerance: float
    comparisons: tuple[RowComparison, ...]
    fp16_errors: Mapping[str, Fp16Error]

    @property
    def faults(self) -> list[VerifyFault]:
        """What differs beyond the tolerance or can't be extracted any more."""
        return [
            VerifyFault(f"outputs/{c.output}", c.segment_id, c.detail)
            for c in self.comparisons
            if c.outcome in ("different", "failed")
        ]


def derive_tolerance(spec: FeatureSpec) -> float:
    """Return the relative error that another device, batch or library explains.

    8 unit roundoffs of the precision, and one of the type stored: 4.4e-3 for fp32 networks and float16 features, 3.2e-2
    for bf16 ones. Reasoned from rounding, not measured between devices.
    """
    return N_ROUNDINGS * PRECISION_ROUNDOFF[spec.precision] + DTYPE_ROUNDOFF[spec.dtype]


def find_weights(store: FeatureStore) -> WeightsRecord:
    """Find the weights a store was made with, by their checksum: under the name it noted, or any installed one.

    Raises WeightsError saying what to install when they aren't there.
    """
    spec, source = store.spec, str(store.attributes["weights_source"])
    ref = source.partition(": ")[0]
    why = ""
    try:
        record = resolve_weights(ref, spec.encoder)
        if record.sha256 == spec.weights:
            return record
        why = f"{ref} is now another set, {record.sha256[:12]}"
    except WeightsError as error:
        why = str(error)
    for row in list_weights():
        if row.installed and row.encoder == spec.encoder:
            record = resolve_weights(row.name, spec.encoder)
            if record.sha256 == spec.weights:
                return record
    remedy = (
        "they depend on the version of torch" if ref.startswith("random:") else "install them, or put the file back"
    )
    raise WeightsError(f"{store.path} was made with {source} (sha256 {spec.weights[:12]}), not here: {why}; {remedy}")


def compare_sample(
    store: FeatureStore,
    rows: Sequence[int],
    segments: Sequence[Segment | None],
    survey: MediaSurvey,
    options: RunOptions,
    notify: Callable[[int], None] = lambda n_rows: None,
) -> ReextractionReport:
    """Extract rows again with the store's own specification and weights, in float32, and compare each output.

    `segments` has an entry a row of the store; the chosen rows' are there. Raises WeightsError when the weights aren't,
    StoreError when the encoder has been revised since.
    """
    spec = store.spec
    revision = find_encoder(spec.encoder).revision
    if revision != spec.revision:
        raise StoreError(
            f"{store.path} was made by revision {spec.revision} of {spec.encoder}, this is {revision}; extract it again"
        )
    weights = find_weights(store)
    chosen = [segment for row in rows if (segment := segments[row]) is not None]
    assert len(chosen) == len(rows), "only rows of the manifest can be extracted again"
    comparisons: list[RowComparison] = []
    fresh_values: dict[str, list[np.ndarray]] = {output.name: [] for output in spec.outputs}
    with TemporaryDirectory(prefix="echoshift-verify-") as folder:
        exact = spec.model_copy(update={"dtype": "float32"})
        (trial,) = extract_on_trial(
            Path(folder),
            [(exact, weights)],
            chosen,
            survey,
            options,
            n_rows_per_shard=min(store.layout.n_rows_per_shard, len(chosen)),
            n_clips=store.layout.n_clips,
            notify=notify,
        )
        failures = read_failures(trial.path)
        state = trial.read_array("state")
        for i, (row, segment) in enumerate(zip(rows, chosen, strict=True)):
            if state[i] != DONE:
                failure = failures.get(segment.segment_id)
                reason = f"{failure.exception}: {failure.reason}" if failure else "its shard gave no features"
                detail = f"can't be extracted again: {reason}"
                comparisons.append(RowComparison(segment.segment_id, spec.outputs[0].name, "failed", detail=detail))
                continue
            comparisons += _compare_row(store, trial, row, i, fresh_values)
    errors = {
        name: measure_fp16_error(np.concatenate([v.ravel() for v in values]))
        for name, values in fresh_values.items()
        if values and spec.dtype == "float16"
    }
    return ReextractionReport(len(rows), derive_tolerance(spec), tuple(comparisons), errors)


def compare_values(
    segment_id: str, output: str, stored: np.ndarray, fresh: np.ndarray, spec: FeatureSpec
) -> RowComparison:
    """Compare one row's clips, stored [clip, ...] in the store's type with fresh float32 ones of the same shape."""
    with np.errstate(over="ignore"):
        as_stored = fresh.astype(stored.dtype)
    if stored.tobytes() == as_stored.tobytes() or (np.isnan(stored).all() and np.isnan(as_stored).all()):
        return RowComparison(segment_id, output, "equal")
    a = stored.astype(np.float64).reshape(len(stored), -1)
    b = fresh.astype(np.float64).reshape(len(fresh), -1)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return RowComparison(
            segment_id, output, "different", math.inf, math.inf, 0.0, "features where there is no audio"
        )
    norm_a, norm_b = np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        cosines = np.where(norm_a + norm_b == 0, 1.0, np.nan_to_num((a * b).sum(axis=1) / (norm_a * norm_b)))
        relatives = np.nan_to_num(np.linalg.norm(a - b, axis=1) / norm_b, nan=0.0, posinf=np.inf)
    cosine, relative = float(cosines.min()), float(relatives.max())
    max_abs = float(np.abs(a - b).max())
    tolerance = derive_tolerance(spec)
    if cosine >= MIN_COSINE and relative <= tolerance:
        return RowComparison(segment_id, output, "close", max_abs, relative, cosine)
    detail = (
        f"extracted again it differs: cosine {cosine:.6f}, relative error {relative:.2e} (tolerance {tolerance:.1e})"
    )
    return RowComparison(segment_id, output, "different", max_abs, relative, cosine, detail)


def _compare_row(
    store: FeatureStore,
    trial: FeatureStore,
    row: int,
    trial_row: int,
    fresh_values: dict[str, list[np.ndarray]],
) -> list[RowComparison]:
    comparisons, segment_id = [], store.segment_ids[row]
    n_valid = int(store.read_array("n_valid", row, row + 1)[0])
    for name in ("n_valid", "times", "frames"):
        stored = store.read_array(name, row, row + 1)
        if stored.tobytes() != trial.read_array(name, trial_row, trial_row + 1).tobytes():
            detail = f"extracted again, its {name} are others"
            first = store.spec.outputs[0].name
            return [RowComparison(segment_id, first, "different", math.inf, math.inf, 0.0, detail)]
    for output in store.spec.outputs:
        array = f"outputs/{output.name}"
        values = store.read_array(array, row, row + 1)[0, :n_valid]
        fresh = trial.read_array(array, trial_row, trial_row + 1)[0, :n_valid]
        comparisons.append(compare_values(segment_id, output.name, values, fresh, store.spec))
        if np.isfinite(fresh).all():
            fresh_values[output.name].append(fresh)
    return comparisons


def describe_audit(audit: OutputAudit) -> Iterator[str]:
    """Describe one output in some thirty lines."""
    silent = f", {audit.n_silent} without audio left out" if audit.n_silent else ""
    yield f"{audit.output}: {audit.n_vectors} clips of {audit.n_rows} done rows{silent}"
    yield f"  values  mean {audit.mean:.5g}, std {audit.std:.5g}, min {audit.min:.5g}, max {audit.max:.5g}"
    yield f"  dead    {100 * audit.share_dead:.2f} % of {audit.n_dims} dimensions have one value throughout"
    quantiles = (f"{100 * q:g} %: {v:.5g}" for q, v in zip(NORM_QUANTILES, audit.norm_quantiles, strict=True))
    yield f"  norms   {', '.join(quantiles)}"
    fullest = max(audit.norm_counts, default=0)
    for (low, high), n in zip(pairwise(audit.norm_edges), audit.norm_counts, strict=True):
        bar = "#" * round(N_BAR_CHARACTERS * n / fullest) if fullest else ""
        yield f"  {low:12.5g} to {high:12.5g} {n:9d} {bar}".rstrip()
    if audit.fp16 is None:
        yield "  float16 is the store's type: what it cost can be measured only by extracting a sample in float32"
        return
    error = audit.fp16
    yield (
        f"  float16 would cost, on {error.n_values} values: relative error at most {error.max_relative:.3g}, "
        f"rms {error.rms_relative:.3g}, of the norm {error.norm_relative:.3g}; "
        f"overflow {100 * error.share_overflow:.3g} %, subnormal {100 * error.share_subnormal:.3g} %"
    )
