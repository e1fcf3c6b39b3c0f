"""Makes the page's section on feature stores: specification, coverage, failures, norms."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from echoshift.train.report.blocks import (
    Block,
    Cell,
    Column,
    DetailsBlock,
    Figure,
    FiguresBlock,
    MissingBlock,
    Section,
    TableBlock,
    TextBlock,
    count,
    number,
)
from echoshift.train.report.charts import draw_histogram
from echoshift.train.report.store_facts import StoreFacts

TEXT = False  # of a column: it holds no numbers


def make_store_section(stores: Sequence[StoreFacts], dataset: str) -> Section:
    """Make the section."""
    if not stores:
        missing = MissingBlock(
            "No feature store of this dataset is in the cache yet.", f"make extract DATASET={dataset}"
        )
        return Section("stores", "Feature stores", "", (missing,))
    blocks: list[Block] = [_make_coverage_table(stores)]
    n_failed = sum(store.n_failed for store in stores)
    if n_failed:
        blocks.append(_make_failure_table(stores))
    else:
        blocks.append(TextBlock("No segment failed to be extracted.", "quiet"))
    blocks += [_make_details(i, store) for i, store in enumerate(stores)]
    megabytes = sum(store.n_bytes for store in stores) / 1e6
    lead = f"{len(stores)} stores, {megabytes:,.1f} MB, each of one encoder's features under one specification."
    return Section("stores", "Feature stores", lead, tuple(blocks))


def _make_coverage_table(stores: Sequence[StoreFacts]) -> TableBlock:
    columns = (
        Column("encoder", TEXT),
        Column("fingerprint", TEXT),
        Column("outputs", TEXT),
        *map(Column, ("clips", "covered, %", "done", "failed", "pending", "absent", "silent", "MB")),
    )
    rows = tuple(
        (
            Cell(store.encoder),
            Cell(store.fingerprint),
            Cell(", ".join(norm.output for norm in store.norms) or "–"),
            count(store.n_clips),
            Cell(f"{100 * store.coverage:.1f}", 100 * store.coverage, store.coverage),
            count(store.n_done),
            count(store.n_failed),
            count(store.n_pending),
            count(store.n_absent),
            number(None) if store.n_silent is None else count(store.n_silent),
            number(store.n_bytes / 1e6),
        )
        for store in stores
    )
    notes = [f"Of the manifest's {stores[0].n_segments:,} segments; absent: the store has no row for them."]
    foreign = sum(store.n_foreign for store in stores)
    if foreign:
        notes.append(f"{foreign:,} rows are of segments that the manifest no longer holds.")
    return TableBlock("stores-coverage", "Coverage of the manifest", columns, rows, tuple(notes))


def _make_failure_table(stores: Sequence[StoreFacts]) -> TableBlock:
    columns = (
        Column("store", TEXT),
        Column("exception", TEXT),
        Column("segments"),
        Column("first segment", TEXT),
        Column("its reason", TEXT),
    )
    rows = tuple(
        (
            Cell(store.place),
            Cell(reason.exception),
            count(reason.n),
            Cell(reason.first_segment),
            Cell(reason.first_reason),
        )
        for store in stores
        for reason in store.failures
    )
    return TableBlock(
        "failures",
        "Segments that failed, by kind of failure",
        columns,
        rows,
        ("Nothing is ever substituted for them; runs leave them out and say so.",),
    )


def _make_details(i: int, store: StoreFacts) -> DetailsBlock:
    rows = tuple((Cell(name), Cell(words)) for name, words in store.settings)
    blocks: list[Block] = [
        TextBlock(f"Weights: {store.weights_source}. Created {store.created}.", "quiet"),
    ]
    figures = []
    for j, norm in enumerate(store.norms):
        shape = " x ".join(map(str, norm.shape))
        words = f"{norm.output} ({shape}): norms of {norm.n_vectors:,} clips, median {norm.median:.3g}"
        if norm.n_rows < norm.n_done:
            words += f"; a sample, {norm.n_rows:,} of {norm.n_done:,} segments"
        if norm.n_nonfinite:
            words += f"; {norm.n_nonfinite:,} more hold NaN or infinity"
        if norm.n_vectors:
            counts = {norm.output: norm.counts}
            svg = draw_histogram(
                f"norm-{i}-{j}", f"Norms of {store.place}", norm.edges, counts, "Euclidean norm", y_label="clips"
            )
            figures.append(Figure(f"{words}.", Markup(svg)))
        else:
            blocks.append(TextBlock(f"{words}: no histogram.", "warning"))
    if figures:
        blocks.append(FiguresBlock(tuple(figures)))
    blocks.append(TableBlock(f"spec-{i}", "Specification", (Column("setting", TEXT), Column("value", TEXT)), rows))
    return DetailsBlock(f"{store.encoder} {store.fingerprint}: specification and norms", tuple(blocks))
