"""Reads what the stores of a dataset hold: specification, coverage of the manifest, failures, norms, silence."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from echoshift.pipeline.segments import Manifest
from echoshift.pipeline.specs import FeatureSpec
from echoshift.pipeline.store.failures import read_failures
from echoshift.pipeline.store.interface import FeatureStore
from echoshift.pipeline.store.layout import DONE, FAILED
from echoshift.pipeline.store.location import Place
from echoshift.pipeline.store.open import list_stores, open_store

N_NORM_ROWS = 256
N_NORM_BYTES = 64 * 2**20
N_NORM_BINS = 24
N_SHOWN_FAILURES = 20


@dataclass(frozen=True, slots=True)
class OutputNorms:
    """A histogram of Euclidean norms of one output's vectors, a vector being one clip's features, flattened.

    `n_rows` are the rows that were looked at, spread evenly over the `n_done` that are done and have sound where the
    store is of sound; `n_nonfinite` vectors hold NaN or infinity and are counted nowhere else.
    """

    output: str
    shape: tuple[int, ...]
    n_rows: int
    n_done: int
    n_vectors: int
    n_nonfinite: int
    median: float
    edges: tuple[float, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class FailureReason:
    """One kind of failure: how many segments, and the first of them with its reason in words."""

    exception: str
    n: int
    first_segment: str
    first_reason: str


@dataclass(frozen=True, slots=True)
class StoreFacts:
    """One store.

    Attributes:
        place: where it lies below the cache.
        settings: lines of the specification for people, what is at its default left out.
        n_done, n_failed, n_pending: of the manifest's segments; `n_absent` have no row.
        n_foreign: rows of segments that the manifest doesn't hold.
        n_silent: done rows without sound; None where the store isn't of sound.
    """

    place: str
    encoder: str
    fingerprint: str
    weights_source: str
    created: str
    dtype: str
    settings: tuple[tuple[str, str], ...]
    n_clips: int
    n_bytes: int
    n_segments: int
    n_done: int
    n_failed: int
    n_pending: int
    n_absent: int
    n_foreign: int
    n_silent: int | None
    failures: tuple[FailureReason, ...]
    norms: tuple[OutputNorms, ...]

    @property
    def coverage(self) -> float:
        """The share of the manifest's segments that are done."""
        return self.n_done / self.n_segments if self.n_segments else 0.0


def list_dataset_stores(cache: Place, dataset: str) -> list[FeatureStore]:
    """Open the stores of a dataset, by path."""
    return [open_store(path) for path in list_stores(cache) if str(path).rstrip("/").split("/")[-2] == dataset]


def describe_store(
    store: FeatureStore, manifest: Manifest, n_bytes: int, notify: Callable[[], None] = lambda: None
) -> StoreFacts:
    """Describe one store against a manifest; of its features a sample of rows is read."""
    state = np.asarray(store.read_array("state"))
    row_of = {segment_id: row for row, segment_id in enumerate(store.segment_ids)}
    rows = [row_of.get(segment.segment_id) for segment in manifest]
    states = state[np.array([row for row in rows if row is not None], dtype=np.int64)]
    n_done, n_failed = int((states == DONE).sum()), int((states == FAILED).sum())
    has_sound = _read_has_audio(store)
    norms = []
    for output in store.spec.outputs:
        norms.append(_measure_norms(store, output.name, output.shape, state, has_sound))
        notify()
    return StoreFacts(
        place="/".join(str(store.path).rstrip("/").split("/")[-2:]),
        encoder=store.spec.encoder,
        fingerprint=str(store.attributes["fingerprint"]),
        weights_source=str(store.attributes["weights_source"]),
        created=str(store.attributes["created"]["when"]),
        dtype=store.spec.dtype,
        settings=describe_spec(store.spec),
        n_clips=store.layout.n_clips,
        n_bytes=n_bytes,
        n_segments=len(manifest),
        n_done=n_done,
        n_failed=n_failed,
        n_pending=len(states) - n_done - n_failed,
        n_absent=len(rows) - len(states),
        n_foreign=len(row_of) - len(states),
        n_silent=None if has_sound is None else int(((state == DONE) & ~has_sound).sum()),
        failures=_count_failures(store),
        norms=tuple(norm for norm in norms if norm is not None),
    )


def read_silence(stores: Sequence[FeatureStore]) -> tuple[dict[str, bool], str]:
    """Read, by segment, whether there is sound, from the store of sound with the most done rows, and names it.

    ({}, "") where the dataset has no store of sound.
    """
    best: tuple[dict[str, bool], str] = ({}, "")
    for store in stores:
        has_sound = _read_has_audio(store)
        if has_sound is None:
            continue
        done = np.asarray(store.read_array("state")) == DONE
        known = {
            segment_id: bool(heard)
            for segment_id, is_done, heard in zip(store.segment_ids, done, has_sound, strict=True)
            if is_done
        }
        if len(known) > len(best[0]):
            best = known, str(store.path).rstrip("/").split("/")[-1]
    return best


def describe_spec(spec: FeatureSpec) -> tuple[tuple[str, str], ...]:
    """List a specification's settings as names and words; None and what doesn't apply is left out."""
    lines: list[tuple[str, str]] = []
    for part in ("clip", "frame", "audio", "imported"):
        value = getattr(spec, part)
        if value is not None:
            lines += [(f"{part}.{k}", _say(v)) for k, v in value.model_dump(mode="json").items() if v is not None]
    lines += [("outputs", ", ".join(f"{o.name} {' x '.join(map(str, o.shape))}" for o in spec.outputs))]
    lines += [(name, str(getattr(spec, name))) for name in ("dtype", "precision", "decoder", "revision")]
    return (*lines, ("weights sha256", spec.weights))


def _say(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _read_has_audio(store: FeatureStore) -> np.ndarray | None:
    return np.asarray(store.read_array("has_audio")).astype(bool) if store.spec.holds_sound else None


def _count_failures(store: FeatureStore) -> tuple[FailureReason, ...]:
    failures = list(read_failures(store.path).values())
    counts: Mapping[str, int] = Counter(failure.exception for failure in failures)
    reasons = []
    for exception, n in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:N_SHOWN_FAILURES]:
        first = next(failure for failure in failures if failure.exception == exception)
        reasons.append(FailureReason(exception, n, first.segment_id, first.reason))
    return tuple(reasons)


def _measure_norms(
    store: FeatureStore, output: str, shape: tuple[int, ...], state: np.ndarray, has_sound: np.ndarray | None
) -> OutputNorms | None:
    """Measure the norms of a sample of rows; None where no row is done."""
    usable = np.flatnonzero((state == DONE) & (True if has_sound is None else has_sound))
    if not len(usable):
        return None
    norms, n_rows = sample_norms(store, output, shape, usable)
    finite = norms[np.isfinite(norms)]
    counts, edges = np.histogram(finite, N_NORM_BINS)
    return OutputNorms(
        output=output,
        shape=shape,
        n_rows=n_rows,
        n_done=len(usable),
        n_vectors=len(finite),
        n_nonfinite=len(norms) - len(finite),
        median=float(np.median(finite)) if len(finite) else float("nan"),
        edges=tuple(edges.tolist()),
        counts=tuple(counts.tolist()),
    )


def sample_norms(store: FeatureStore, output: str, shape: tuple[int, ...], rows: np.ndarray) -> tuple[np.ndarray, int]:
    """Compute the Euclidean norms of the clips of up to N_NORM_ROWS of the rows, spread evenly, float64 [n_clips].

    Gives how many rows they are of. No more than N_NORM_BYTES are read; `rows` are done.
    """
    n_row_bytes = store.layout.n_clips * math.prod(shape) * np.dtype(store.spec.dtype).itemsize
    n = min(len(rows), N_NORM_ROWS, max(N_NORM_BYTES // max(n_row_bytes, 1), 1))
    chosen = rows[np.linspace(0, len(rows) - 1, n).round().astype(np.int64)]
    ids = store.segment_ids
    values = store.read([ids[row] for row in chosen.tolist()], output)
    n_valid = np.asarray(store.read_array("n_valid"))[chosen]
    vectors = values[np.arange(values.shape[1])[None] < n_valid[:, None]].reshape(-1, math.prod(shape))
    norms: np.ndarray = np.sqrt(np.square(vectors.astype(np.float64)).sum(axis=1))
    return norms, n
