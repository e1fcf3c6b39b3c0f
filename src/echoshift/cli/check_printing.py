"""Prints the outcome of a store's check and repair."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import typer

from echoshift.cli.json_answers import make_jsonable, print_json

if TYPE_CHECKING:
    from echoshift.extract.check import ReextractionReport, StoreCheck
    from echoshift.pipeline.store.verify import RepairReport

N_STALE_NAMED = 10


def print_check(check: StoreCheck, repaired: RepairReport | None, *, as_json: bool) -> None:
    """Print a line for every fault, what is stale, what a sample says, and what was re-queued."""
    if as_json:
        print_json({**make_jsonable(check), "repaired": repaired})
        return
    for fault in check.faults:
        where = f"segment {fault.segment_id}: " if fault.segment_id else ""
        typer.echo(f"{check.path}: {fault.array}: {where}{fault.message}")
    if check.stale_ids:
        named = ", ".join(check.stale_ids[:N_STALE_NAMED]) + (" …" if len(check.stale_ids) > N_STALE_NAMED else "")
        typer.echo(f"{len(check.stale_ids)} rows are stale, their media or times have changed since: {named}")
    for note in check.notes:
        typer.echo(f"note: {note}")
    if check.sample is not None:
        _print_sample(check.sample)
    if not check.faults:
        typer.echo(f"{check.path}: {check.n_rows} rows, no fault")
    elif repaired is None:
        typer.echo(
            f"{len(check.faults)} faults; --repair re-queues their rows, or delete the store and extract it anew"
        )
    else:
        restored = "; the segment ids were restored from the manifest" if repaired.restored_ids else ""
        typer.echo(
            f"{len(check.faults)} faults; {repaired.n_rows} rows in {repaired.n_shards} shards are re-queued, "
            f"`echoshift extract` with the same options computes them anew{restored}"
        )


def _print_sample(sample: ReextractionReport) -> None:
    counts = Counter(comparison.outcome for comparison in sample.comparisons)
    text = ", ".join(f"{counts[outcome]} {outcome}" for outcome in ("equal", "close", "different", "failed"))
    typer.echo(f"{sample.n_rows} rows extracted anew: {text} (outputs of rows; tolerance {sample.tolerance:.1e})")
    close = [comparison for comparison in sample.comparisons if comparison.outcome == "close"]
    if close:
        relative, cosine = max(c.relative for c in close), min(c.cosine for c in close)
        largest = max(c.max_abs for c in close)
        typer.echo(
            f"  the close ones: relative error up to {relative:.1e}, absolute {largest:.1e}, cosine {cosine:.6f}"
        )
    for output, error in sample.fp16_errors.items():
        typer.echo(
            f"  float16 cost {output}: relative error {error.rms_relative:.1e} rms, {error.max_relative:.1e} at most, "
            f"of the norm {error.norm_relative:.1e}; of {error.n_values} values {error.share_overflow:.2%} too large, "
            f"{error.share_subnormal:.2%} subnormal"
        )
