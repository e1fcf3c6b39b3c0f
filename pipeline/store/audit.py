"""Statistics of a store's features, to show a broken network, a dead output or a lossy type."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np

from echoshift.pipeline.errors import StoreError, suggest
from echoshift.pipeline.store.interface import DoneIndex, FeatureStore, read_done_index
from echoshift.pipeline.store.layout import plan_row_blocks

NORM_QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)
N_NORM_BINS = 20
# A block's values are turned into float64; this many threads hold one each.
N_AUDIT_BLOCK_BYTES = 8 * 2**20
N_AUDIT_THREADS = 4
N_SAMPLE_ROWS = 1024
N_SAMPLE_BYTES = 64 * 2**20
SMALLEST_NORMAL_FP16 = 2.0**-14


@dataclass(frozen=True, slots=True)
class Fp16Error:
    """Cost of storing values as float16.

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
    """Statistics of one output of a store's done rows; a vector is one clip's features, flattened.

    Attributes:
        n_rows: done rows with audio (in a store of frames: done rows).
        n_silent: done rows without audio, which are left out.
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
    """Sums over a stretch of rows: n, mean and summed squares of all values, extremes a dimension, norms."""

    n: int = 0
    mean: float = 0.0
    squares: float = 0.0
    low: np.ndarray = field(default_factory=lambda: np.asarray(np.inf))
    high: np.ndarray = field(default_factory=lambda: np.asarray(-np.inf))
    norms: np.ndarray = field(default_factory=lambda: np.zeros(0))
    n_nonfinite: int = 0
    first_nonfinite_row: int = -1


def audit_output(store: FeatureStore, output: str, notify: Callable[[int], None] = lambda n_rows: None) -> OutputAudit:
    """Audit one output of every done row, block by block on a few threads; `notify` is told of rows as they are read.

    Raises StoreError when the store has no such output or no row is done.
    """
    shapes = {o.name: o.shape for o in store.spec.outputs}
    if output not in shapes:
        raise StoreError(f"{store.path} has no output {output!r}; {suggest(output, shapes, there='it has')}")
    index = read_done_index(store)
    if not index.done.any():
        raise StoreError(f"{store.path} has no done row to audit; run `echoshift extract` first")
    n_dims = math.prod(shapes[output])
    n_row_bytes = store.layout.n_clips * n_dims * np.dtype(store.spec.dtype).itemsize
    exists = np.arange(store.layout.n_clips)[None] < index.n_valid[:, None]
    exists &= (index.done & index.has_sound)[:, None]

    def summarise(rows: tuple[int, int]) -> _Summary:
        return _summarise(store.read_array(f"outputs/{output}", *rows), exists[slice(*rows)], rows[0])

    blocks = list(plan_row_blocks(store.layout, n_row_bytes, N_AUDIT_BLOCK_BYTES))
    total, norms = _Summary(), []
    with ThreadPoolExecutor(N_AUDIT_THREADS) as threads:
        for start in range(0, len(blocks), N_AUDIT_THREADS):
            some = blocks[start : start + N_AUDIT_THREADS]
            for rows, summary in zip(some, threads.map(summarise, some), strict=True):
                total = _merge(total, summary)
                norms.append(summary.norms)
                notify(rows[1] - rows[0])
    total = replace(total, norms=np.concatenate(norms))
    is_fp16 = np.dtype(store.spec.dtype) == np.float16
    sample = None if is_fp16 else _sample_values(store, output, index, n_row_bytes)
    return _describe(store, output, total, index, n_dims, sample)


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


def _summarise(values: np.ndarray, exists: np.ndarray, first_row: int) -> _Summary:
    """Sum up the existing clips of a block, [row, clip, …], whose values are all finite."""
    vectors = values[exists].reshape(-1, math.prod(values.shape[2:]))
    finite = np.isfinite(vectors).all(axis=1)
    bad_rows = np.nonzero(exists)[0][~finite]
    good = vectors if finite.all() else vectors[finite]
    exact = good.astype(np.float64)
    mean = float(exact.mean()) if exact.size else 0.0
    norms = np.sqrt(np.einsum("ij,ij->i", exact, exact))
    exact -= mean
    return _Summary(
        n=exact.size,
        mean=mean,
        squares=float(np.einsum("ij,ij->", exact, exact)),
        low=good.min(axis=0, initial=np.inf),
        high=good.max(axis=0, initial=-np.inf),
        norms=norms,
        n_nonfinite=len(bad_rows),
        first_nonfinite_row=first_row + int(bad_rows[0]) if len(bad_rows) else -1,
    )


def _merge(a: _Summary, b: _Summary) -> _Summary:
    """Merge all but the norms; means and squares as Chan, Golub and LeVeque (1979) do, which loses no digits."""
    n = a.n + b.n
    share = b.n / n if n else 0.0
    return _Summary(
        n=n,
        mean=a.mean + (b.mean - a.mean) * share,
        squares=a.squares + b.squares + (b.mean - a.mean) ** 2 * a.n * share,
        low=np.minimum(a.low, b.low),
        high=np.maximum(a.high, b.high),
        n_nonfinite=a.n_nonfinite + b.n_nonfinite,
        first_nonfinite_row=a.first_nonfinite_row if a.n_nonfinite else b.first_nonfinite_row,
    )


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
