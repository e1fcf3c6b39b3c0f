"""Is `echoshift store`: lists, describes, verifies, explains and exports feature stores."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from pipeline.cards import MANIFESTS_DIR

EXIT_FAULTS = 1

app = typer.Typer(no_args_is_help=True, help="List, describe, verify, explain and export feature stores.")

StoreArgument = Annotated[str, typer.Argument(help="A store: CACHE/DATASET/ENCODER-FINGERPRINT.zarr or .h5.")]
CacheOption = Annotated[str, typer.Option(help="Where stores lie: a folder or a URL.", envvar="ECHOSHIFT_CACHE")]


class ExportName(StrEnum):
    """Lists the forms of an export."""

    npz = "npz"
    h5 = "h5"
    parquet = "parquet"
    epic100 = "epic100"


@app.command("ls")
def list_(cache: CacheOption = "cache") -> None:
    """List the stores below the cache, with what is in them."""
    from extract.commands.terminal import print_table
    from pipeline.store.layout import DONE, FAILED
    from pipeline.store.opening import list_stores, open_store

    rows = []
    for path in list_stores(cache):
        store = open_store(path)
        state = store.read_array("state")
        outputs = ", ".join(f"{o.name} {list(o.shape)}" for o in store.spec.outputs)
        rows.append(
            [
                store.attributes["dataset"],
                store.spec.encoder,
                outputs,
                store.layout.n_clips,
                store.spec.dtype,
                int((state == DONE).sum()),
                int((state == FAILED).sum()),
                store.layout.n_rows,
                f"{path.measure_bytes() / 1e6:.1f}",
                path,
            ]
        )
    columns = ("dataset", "encoder", "outputs", "clips", "type", "done", "failed", "rows", "MB", "store")
    print_table(f"stores in {cache}", columns, rows)


@app.command()
def info(store: StoreArgument) -> None:
    """Describe one store: its specification, where its weights came from, versions, rows."""
    import json

    import numpy as np

    from pipeline.store.layout import STATE_NAMES
    from pipeline.store.location import locate
    from pipeline.store.opening import open_store

    opened = open_store(store)
    typer.echo(json.dumps(dict(opened.attributes), indent=2, ensure_ascii=False))
    states, counts = np.unique(opened.read_array("state"), return_counts=True)
    text = ", ".join(f"{n} {STATE_NAMES[s]}" for s, n in zip(states.tolist(), counts.tolist(), strict=True))
    typer.echo(f"rows: {text}; {locate(store).measure_bytes() / 1e6:.1f} MB on disk")


@app.command()
def verify(store: StoreArgument) -> None:
    """Check checksums, values, times and the failure ledger; ends with 1 and a line for every fault."""
    from pipeline.store.opening import open_store
    from pipeline.store.verifying import verify_store

    opened = open_store(store)
    faults = verify_store(opened)
    for fault in faults:
        where = f"segment {fault.segment_id}: " if fault.segment_id else ""
        typer.echo(f"{store}: {fault.array}: {where}{fault.message}")
    if faults:
        typer.echo(f"{len(faults)} faults; delete the store and extract it anew")
        raise typer.Exit(EXIT_FAULTS)
    typer.echo(f"{store}: {opened.layout.n_rows} rows, no fault")


@app.command()
def explain(
    segment: Annotated[str, typer.Argument(help="A segment's id.")],
    store: StoreArgument,
    media: Annotated[Path | None, typer.Option(help="Where the videos lie; default data/DATASET.")] = None,
    manifests: Annotated[
        Path, typer.Option(help="Where cards and manifests lie.", envvar="ECHOSHIFT_MANIFESTS")
    ] = MANIFESTS_DIR,
) -> None:
    """Say why a segment's row is done, stale, failed or pending."""
    from extract.explaining import explain_segment
    from pipeline.store.opening import open_store

    opened = open_store(store)
    dataset = str(opened.attributes["dataset"])
    for line in explain_segment(opened, segment, manifests, media or manifests.parent / dataset):
        typer.echo(line)


@app.command()
def export(
    store: StoreArgument,
    to: Annotated[Path, typer.Option(help="The file to write.")],
    form: Annotated[ExportName, typer.Option(help="What to write.")] = ExportName.npz,
    output: Annotated[str, typer.Option(help="Which output.")] = "pooled",
) -> None:
    """Write one output of every done row as npz, one h5, Parquet, or EPIC-100's pickle."""
    from pipeline.store.exporting import export_store
    from pipeline.store.opening import open_store

    n_rows = export_store(open_store(store), output, to, form.value)
    typer.echo(f"wrote {n_rows} segments to {to}")
