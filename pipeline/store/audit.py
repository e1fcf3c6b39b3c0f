"""Statistics of a store's features, to show a broken network, a dead output or a lossy type."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from echoshift.pipeline.errors import StoreError, suggest
from echoshift.pipeline.store.interface import DoneIndex, FeatureStore, read_done_index
from echoshift.pipeline.store.layout import plan_row_blocks

NORM_QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)
N_NORM_BINS = 20
# A block's values are turned into float64; this many threads hold one each.
N_AUDIT_BLOCK_BYTES = 8 * 2**20
N_AUDIT_THREADS = 4
N_MERGED_AT_A_TIME = 16
N_SAMPLE_ROWS = 1024
N_SAMPLE_BYTES = 64 * 2**20
SMALLEST_NORMAL_FP16 = 2.0**-14


@dataclass(frozen=True, slots=True)
class Fp16Error:
    """What storing values as float16 costs.

    Attributes:
        n_values: finite values looked at; the shares are of these.
        max_relative, rms_relative: of |x - fp16(x)| / |x|, over values that are neither 0 nor overflow. A value that
            becomes subnormal or 0 counts, which may make the largest 1.
        norm_relative: norm of all errors over norm of all values, without those that overflow.
        share_overflow: become infinite.
        share_subnormal: are not 0 and smaller than 2**-14, where float16 loses digits.
    """

    n_values: int
    max_relative: float
    rms_relative: float
    norm_relative: float
    share_overflow: float
    share_subnormal: float


@dataclass(frozen=True, slots=True)
class OutputAudit:
    """What one output of a store's done rows looks like; a vector is one clip's features, flattened.

    Attributes:
        n_rows: done rows with sound (in a store of pictures: done rows).
        n_silent: done rows without sound, which are left out.
        n_vectors: existing clips of the n_rows whose values are all finite; everything below is of these.
        n_nonfinite: existing clips of the n_rows with a value that is NaN or infinite.
        first_nonfinite: the segment of the first such clip, "" when there is none.
        mean, std, min, max: of all values; `std` is the population's.
        n_dims, share_dead: dimensions of a vector, and the share of them that has one value throughout.
        norm_quantiles: Euclidean norms of the vectors at NORM_QUANTILES.
        norm_edges, norm_counts: a histogram of the norms, N_NORM_BINS bins from the smallest to the largest.
        fp16: what float16 would cost, measured on a sample; None where the store holds float16 already.
    """

    output: str
    n_rows: int
    n_silent: int
    n_vectors: int
    n_nonfinite: int
    first_nonfinite: str
    mean: float
    std: float
    min: float
    max: float
    n_dims: int
    share_dead: float
    norm_quantiles: tuple[float, ...]
    norm_edges: tuple[float, ...]
    norm_counts: tuple[int, ...]
    fp16: Fp16Error | None


@dataclass(frozen=True, slots=True)
class _Summary:
    """What is kept of a stretch of rows: n, mean and summed squares of all values, extremes a dimension, norms."""

    n: int
    mean: float
    squares: float
    low: np.ndarray
    high: np.ndarray
    norms: np.ndarray
    n_nonfinite: int
    first_nonfinite_row: int


def audit_output(store: FeatureStore, output: str, notify: Callable[[int], None] = lambda n_rows: None) -> OutputAudit:
    """Audit one output of every done row, block by block with dask.array; `notify` is told of rows as they are read.

    Raises StoreError when the output is not there or no row is done.
    """
    import dask.array as da

    shapes = {o.name: o.shape for o in store.spec.outputs}
    if output not in shapes:
        raise StoreError(f"{store.path} has no output {output!r}; {suggest(output, shapes, there='it has')}")
    index = read_done_index(store)
    counted = index.done & index.has_sound
    if not index.done.any():
        raise StoreError(f"{store.path} has no done row to audit; run `echoshift extract` first")
    n_dims = int(np.prod(shapes[output], dtype=np.int64))
    rows = _OutputRows(store, output, shapes[output])
    n_row_bytes = store.layout.n_clips * n_dims * rows.dtype.itemsize
    sizes = tuple(b - a for a, b in plan_row_blocks(store.layout, n_row_bytes, N_AUDIT_BLOCK_BYTES))
    values = da.from_array(rows, chunks=(sizes, *rows.shape[1:]), name=False, meta=np.empty((0,), rows.dtype))
    exists = (np.arange(rows.shape[1])[None] < index.n_valid[:, None]) & counted[:, None]
    first_rows = np.cumsum((0, *sizes[:-1]))
    summaries = da.map_blocks(
        partial(_summarise, exists=exists, first_rows=first_rows, notify=_one_at_a_time(notify)),
        values,
        dtype=object,
        chunks=((1,) * len(sizes),),
        drop_axis=tuple(range(1, values.ndim)),
        name=f"audit-{id(rows)}",
        meta=np.empty(0, object),
    )
    merged = da.reduction(
        summaries,
        chunk=_keep,
        combine=_merge,
        aggregate=_merge,
        axis=0,
        dtype=object,
        split_every=N_MERGED_AT_A_TIME,
        meta=np.empty(0, object),
    )
    summary: _Summary = merged.compute(scheduler="threads", num_workers=N_AUDIT_THREADS)
    sample = None if rows.dtype == np.float16 else _sample_values(store, output, index, n_row_bytes)
    return _describe(store, output, summary, index, n_dims, sample)


def find_audit_faults(audit: OutputAudit) -> list[str]:
    """List what an audit found that features shouldn't have, a line each."""
    faults = []
    if audit.n_nonfinite:
        faults.append(
            f"outputs/{audit.output}: {audit.n_nonfinite} clips hold NaN or infinity, "
            f"the first of segment {audit.first_nonfinite}"
        )
    if audit.n_vectors > 1 and audit.share_dead == 1.0:
        faults.append(f"outputs/{audit.output}: all {audit.n_dims} dimensions are the same for every clip")
    return faults


def measure_fp16_error(values: np.ndarray) -> Fp16Error:
    """Measure what casting float32 values, of any shape, to float16 costs; values that aren't finite are left out."""
    exact = np.asarray(values).ravel()
    exact = exact[np.isfinite(exact)].astype(np.float64)
    with np.errstate(over="ignore"):
        cast = exact.astype(np.float16).astype(np.float64)
    n = len(exact)
    kept = np.isfinite(cast)
    error, size = np.abs(exact[kept] - cast[kept]), np.abs(exact[kept])
    relative = error[size > 0] / size[size > 0]
    norm = float(np.sqrt(np.sum(size**2)))
    return Fp16Error(
        n_values=n,
        max_relative=float(relative.max(initial=0.0)),
        rms_relative=float(np.sqrt(np.mean(relative**2))) if len(relative) else 0.0,
        norm_relative=float(np.sqrt(np.sum(error**2))) / norm if norm else 0.0,
        share_overflow=float(np.mean(~kept)) if n else 0.0,
        share_subnormal=float(np.mean((exact != 0) & (np.abs(exact) < SMALLEST_NORMAL_FP16))) if n else 0.0,
    )


class _OutputRows:
    """One output as dask wants its sources: shape, type, and slices."""

    def __init__(self, store: FeatureStore, output: str, clip_shape: Sequence[int]) -> None:
        self._store, self._name = store, f"outputs/{output}"
        self.shape = (store.layout.n_rows, store.layout.n_clips, *clip_shape)
        self.dtype = np.dtype(store.spec.dtype)
        self.ndim = len(self.shape)

    def __getitem__(self, key: tuple[slice, ...]) -> np.ndarray:
        return self._store.read_array(self._name, key[0].start, key[0].stop)[(slice(None), *key[1:])]


def _one_at_a_time(notify: Callable[[int], None]) -> Callable[[int], None]:
    lock = threading.Lock()

    def notify_alone(n_rows: int) -> None:
        with lock:
            notify(n_rows)

    return notify_alone


def _summarise(
    values: np.ndarray,
    exists: np.ndarray,
    first_rows: np.ndarray,
    notify: Callable[[int], None],
    block_info: Any = None,
) -> np.ndarray:
    first = int(first_rows[block_info[0]["chunk-location"][0]]) if block_info else 0
    here = exists[first : first + len(values)]
    vectors = values[here].reshape(-1, math.prod(values.shape[2:]))
    finite = np.isfinite(vectors).all(axis=1)
    bad_rows = np.nonzero(here)[0][~finite]
    good = vectors if finite.all() else vectors[finite]
    exact = good.astype(np.float64)
    n = exact.size
    mean = float(exact.mean()) if n else 0.0
    norms = np.sqrt(np.einsum("ij,ij->i", exact, exact))
    low, high = good.min(axis=0, initial=np.inf), good.max(axis=0, initial=-np.inf)
    exact -= mean
    squares = float(np.einsum("ij,ij->", exact, exact))
    first_bad = first + int(bad_rows[0]) if len(bad_rows) else -1
    notify(len(values))
    return _pack(_Summary(n, mean, squares, low, high, norms, len(bad_rows), first_bad))


def _pack(summary: _Summary) -> np.ndarray:
    packed = np.empty(1, object)
    packed[0] = summary
    return packed


def _keep(summaries: np.ndarray, axis: Any, keepdims: bool) -> np.ndarray:
    return summaries


def _merge(summaries: np.ndarray, axis: Any, keepdims: bool) -> Any:
    """Merge neighbouring summaries; means and squares as Chan, Golub and LeVeque (1979) do, which loses no digits."""
    parts: list[_Summary] = list(summaries.ravel())
    n = sum(part.n for part in parts)
    mean = sum(part.mean * part.n for part in parts) / n if n else 0.0
    merged = _Summary(
        n=n,
        mean=mean,
        squares=sum(part.squares + part.n * (part.mean - mean) ** 2 for part in parts),
        low=np.min([part.low for part in parts], axis=0),
        high=np.max([part.high for part in parts], axis=0),
        norms=np.concatenate([part.norms for part in parts]),
        n_nonfinite=sum(part.n_nonfinite for part in parts),
        first_nonfinite_row=next((p.first_nonfinite_row for p in parts if p.n_nonfinite), -1),
    )
    return _pack(merged) if keepdims else merged


def _sample_values(store: FeatureStore, output: str, index: DoneIndex, n_row_bytes: int) -> np.ndarray:
    """Read rows spread evenly over the done ones, at most 1,024 and 64 MiB, and of them the clips that exist."""
    rows = np.flatnonzero(index.done & index.has_sound)
    n = min(len(rows), N_SAMPLE_ROWS, max(N_SAMPLE_BYTES // n_row_bytes, 1))
    chosen = rows[np.linspace(0, len(rows) - 1, n).round().astype(np.int64)] if n else rows
    values = store.read([store.segment_ids[row] for row in chosen.tolist()], output)
    return values[np.arange(values.shape[1])[None] < index.n_valid[chosen, None]]


def _describe(
    store: FeatureStore, output: str, summary: _Summary, index: DoneIndex, n_dims: int, sample: np.ndarray | None
) -> OutputAudit:
    norms = summary.norms if len(summary.norms) else np.full(1, np.nan)
    some = len(summary.norms) > 0
    counts, edges = np.histogram(summary.norms, N_NORM_BINS)
    return OutputAudit(
        output=output,
        n_rows=int((index.done & index.has_sound).sum()),
        n_silent=int((index.done & ~index.has_sound).sum()),
        n_vectors=len(summary.norms),
        n_nonfinite=summary.n_nonfinite,
        first_nonfinite=store.segment_ids[summary.first_nonfinite_row] if summary.n_nonfinite else "",
        mean=summary.mean if some else float("nan"),
        std=float(np.sqrt(summary.squares / summary.n)) if some else float("nan"),
        min=float(summary.low.min()) if some else float("nan"),
        max=float(summary.high.max()) if some else float("nan"),
        n_dims=n_dims,
        share_dead=float(np.mean(summary.low == summary.high)) if some else float("nan"),
        norm_quantiles=tuple(float(q) for q in np.quantile(norms, NORM_QUANTILES)),
        norm_edges=tuple(edges.tolist()),
        norm_counts=tuple(counts.tolist()),
        fp16=None if sample is None else measure_fp16_error(sample),
    )
