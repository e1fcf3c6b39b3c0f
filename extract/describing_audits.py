"""Puts an audit of a store's output into lines of text, with a histogram of norms."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from echoshift.pipeline.store.audit import NORM_QUANTILES, OutputAudit

N_BAR_CHARACTERS = 40


def describe_audit(audit: OutputAudit) -> Iterator[str]:
    """Describe one output in some thirty lines."""
    silent = f", {audit.n_silent} without sound left out" if audit.n_silent else ""
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
