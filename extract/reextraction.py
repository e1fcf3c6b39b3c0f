"""Extracts a sample of a store's done rows anew from their media and compares the numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import numpy as np

from echoshift.extract.encoders.registry import find_encoder
from echoshift.extract.media_survey import MediaSurvey
from echoshift.extract.run_options import RunOptions
from echoshift.extract.trial_extraction import choose_spread, extract_on_trial
from echoshift.extract.weights.load import WeightsRecord, list_weights, resolve_weights
from echoshift.pipeline.errors import StoreError, WeightsError
from echoshift.pipeline.segments import Segment
from echoshift.pipeline.specs import FeatureSpec
from echoshift.pipeline.store.auditing import Fp16Error, measure_fp16_error
from echoshift.pipeline.store.interface import FeatureStore, VerifyFault
from echoshift.pipeline.store.layout import DONE
from echoshift.pipeline.store.ledger import read_failures

MIN_COSINE = 0.999
# The unit roundoff of what a network computes in. fp32 is taken as TF32, with which GPUs run convolutions.
PRECISION_ROUNDOFF = {"fp32": 2.0**-11, "fp16": 2.0**-11, "bf16": 2.0**-8}
DTYPE_ROUNDOFF = {"float32": 2.0**-24, "float16": 2.0**-11}
# Roundings of layer after layer add up like a random walk: about the root of 64 layers, and norms keep the scale.
N_ROUNDINGS = 8

Outcome = Literal["equal", "close", "different", "failed"]


@dataclass(frozen=True, slots=True)
class RowComparison:
    """One output of one row against itself, extracted anew.

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
    """The outcome of extracting a sample anew; `fp16_errors` is by output, empty for a store of float32."""

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


def choose_rows(candidates: np.ndarray, n_done: int, percent: float, seed: int) -> list[int]:
    """Choose `percent` of the done rows, at least one, spread over the shards by a seeded choice."""
    return choose_spread(candidates.tolist(), max(1, math.ceil(n_done * percent / 100)), seed)


def compare_sample(
    store: FeatureStore,
    rows: Sequence[int],
    segments: Sequence[Segment | None],
    survey: MediaSurvey,
    options: RunOptions,
    notify: Callable[[int], None] = lambda n_rows: None,
) -> ReextractionReport:
    """Extract rows anew with the store's own specification and weights, in float32, and compare each output.

    `segments` has an entry a row of the store; the chosen rows' are there. Raises WeightsError when the weights aren't,
    StoreError when the encoder has been revised since.
    """
    spec = store.spec
    revision = find_encoder(spec.encoder).revision
    if revision != spec.revision:
        raise StoreError(
            f"{store.path} was made by revision {spec.revision} of {spec.encoder}, this is {revision}; extract it anew"
        )
    weights = find_weights(store)
    chosen = [segment for row in rows if (segment := segments[row]) is not None]
    assert len(chosen) == len(rows), "only rows of the manifest can be extracted anew"
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
                detail = f"can't be extracted anew: {reason}"
                comparisons.append(RowComparison(segment.segment_id, spec.outputs[0].name, "failed", detail=detail))
                continue
            comparisons += _compare_row(store, trial, row, i, segment.segment_id, fresh_values)
    errors = {
        name: measure_fp16_error(np.concatenate([v.ravel() for v in values]))
        for name, values in fresh_values.items()
        if values and spec.dtype == "float16"
    }
    return ReextractionReport(
        n_rows=len(rows),
        tolerance=derive_tolerance(spec),
        comparisons=tuple(comparisons),
        fp16_errors=errors,
    )


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
            segment_id, output, "different", math.inf, math.inf, 0.0, "features where there is no sound"
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
        f"extracted anew it differs: cosine {cosine:.6f}, relative error {relative:.2e} (tolerance {tolerance:.1e})"
    )
    return RowComparison(segment_id, output, "different", max_abs, relative, cosine, detail)


def _compare_row(
    store: FeatureStore,
    trial: FeatureStore,
    row: int,
    trial_row: int,
    segment_id: str,
    fresh_values: dict[str, list[np.ndarray]],
) -> list[RowComparison]:
    comparisons = []
    n_valid = int(store.read_array("n_valid", row, row + 1)[0])
    for name in ("n_valid", "times", "frames"):
        stored = store.read_array(name, row, row + 1)
        if stored.tobytes() != trial.read_array(name, trial_row, trial_row + 1).tobytes():
            detail = f"extracted anew, its {name} are others"
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
