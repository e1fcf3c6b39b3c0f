"""Is `echoshift store`: lists, describes, verifies, explains and exports feature stores."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from pipeline.cards import MANIFESTS_DIR

EXIT_FAULTS = 1

app = typer.Typer(no_args_is_help=True, help="List, describe, verify, explain and export feature stores.")

StoreArgument = Annotated[Path, typer.Argument(help="A store: cache/DATASET/ENCODER-FINGERPRINT.zarr or .h5.")]
CacheOption = Annotated[Path, typer.Option(help="Where stores lie.", envvar="ECHOSHIFT_CACHE")]


class ExportName(StrEnum):
    """Lists the forms of an export."""

    npz = "npz"
    h5 = "h5"
    parquet = "parquet"
    epic100 = "epic100"


@app.command("ls")
def list_(cache: CacheOption = Path("cache")) -> None:
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
                f"{measure_bytes(path) / 1e6:.1f}",
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
    from pipeline.store.opening import open_store

    opened = open_store(store)
    typer.echo(json.dumps(dict(opened.attributes), indent=2, ensure_ascii=False))
    states, counts = np.unique(opened.read_array("state"), return_counts=True)
    text = ", ".join(f"{n} {STATE_NAMES[s]}" for s, n in zip(states.tolist(), counts.tolist(), strict=True))
    typer.echo(f"rows: {text}; {measure_bytes(store) / 1e6:.1f} MB on disk")


@app.command()
def verify(
    store: StoreArgument,
    sample: Annotated[
        float, typer.Option(help="Percent of the done rows to extract anew and compare; 0: none.", min=0, max=100)
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="The same seed samples the same rows.")] = 0,
    media: Annotated[Path | None, typer.Option(help="Where the videos lie; default data/DATASET.")] = None,
    manifests: Annotated[
        Path, typer.Option(help="Where cards and manifests lie.", envvar="ECHOSHIFT_MANIFESTS")
    ] = MANIFESTS_DIR,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N; for --sample.")] = "auto",
    repair: Annotated[bool, typer.Option("--repair", help="Re-queue what fails, for extract to compute anew.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check checksums, values, times, ledger, and a sample extracted anew; ends with 1 and a line for every fault."""
    from contextlib import nullcontext

    from extract.commands.check_printing import print_check
    from extract.commands.terminal import show_progress
    from extract.run_options import RunOptions
    from extract.store_check import CheckOptions, check_store, repair_store
    from pipeline.store.opening import hold_store, open_store

    open_store(store)  # holding makes files beside it, so that it must be there
    options = CheckOptions(manifests, media, sample, seed, RunOptions(device=device))
    with hold_store(store) if repair else nullcontext():
        with show_progress("segments") as progress:
            check = check_store(store, options, progress.advance)
        repaired = repair_store(store, check, options) if repair and check.faults else None
    print_check(check, repaired, as_json=as_json)
    if check.faults:
        raise typer.Exit(EXIT_FAULTS)


@app.command()
def explain(
    segment: Annotated[str, typer.Argument(help="A segment's id.")],
    store: Annotated[Path | None, typer.Argument(help="One store; default: every store that may know it.")] = None,
    cache: CacheOption = Path("cache"),
    dataset: Annotated[str, typer.Option(help="Look at this dataset's stores alone.")] = "",
    media: Annotated[Path | None, typer.Option(help="Where the videos lie; default data/DATASET.")] = None,
    manifests: Annotated[
        Path, typer.Option(help="Where cards and manifests lie.", envvar="ECHOSHIFT_MANIFESTS")
    ] = MANIFESTS_DIR,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON list.")] = False,
) -> None:
    """Say why a segment's row is done, stale, failed or pending, in one store or in all that may know it."""
    import json
    from dataclasses import asdict

    from extract.explaining import explain_everywhere, format_explanation
    from pipeline.store.opening import list_stores

    paths = [store] if store is not None else list_stores(cache)
    explanations = explain_everywhere(paths, segment, manifests, media, dataset)
    if as_json:
        typer.echo(json.dumps([asdict(explanation) for explanation in explanations], ensure_ascii=False))
        return
    for explanation in explanations:
        for line in format_explanation(explanation):
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


def measure_bytes(path: Path) -> int:
    """Adds up the bytes of a file or of a folder's files."""
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
