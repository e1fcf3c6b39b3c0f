"""`echoshift store`: list, describe, verify, audit, explain, export, import and unlock stores."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from echoshift.cli.completion import complete_dataset, complete_segment, complete_store
from echoshift.cli.terminal import JsonOption, QuietOption, make_jsonable, print_json, print_table, show_progress
from echoshift.pipeline.places import MANIFESTS_DIR

if TYPE_CHECKING:
    from echoshift.extract.check import ReextractionReport, StoreCheck
    from echoshift.pipeline.store.verify import RepairReport

EXIT_FAULTS = 1

app = typer.Typer(no_args_is_help=True, help="List, describe, verify, audit, explain, export and import stores.")

StoreArgument = Annotated[
    str,
    typer.Argument(help="A store: CACHE/DATASET/ENCODER-FINGERPRINT.zarr or .h5.", autocompletion=complete_store),
]
CacheOption = Annotated[str, typer.Option(help="Where stores lie: a folder or a URL.", envvar="ECHOSHIFT_CACHE")]


ExportName = Literal["npz", "h5", "parquet", "epic100"]


ImportName = Literal["npz", "epic100"]


@app.command("ls")
def list_(cache: CacheOption = "cache", as_json: JsonOption = False) -> None:
    """List the stores below the cache, with what is in them."""
    from echoshift.pipeline.store.open import summarise_stores

    found = summarise_stores(cache)
    if as_json:
        print_json(found)
        return
    rows = [
        [
            s.dataset, s.encoder, ", ".join(f"{name} {list(shape)}" for name, shape in s.outputs.items()), s.n_clips,
            s.dtype, s.n_done, s.n_failed, s.n_rows, f"{s.n_bytes / 1e6:.1f}", s.store,
        ]
        for s in found
    ]  # fmt: skip
    columns = ("dataset", "encoder", "outputs", "clips", "type", "done", "failed", "rows", "MB", "store")
    print_table(f"stores in {cache}", columns, rows)


@app.command()
def info(store: StoreArgument, as_json: JsonOption = False) -> None:
    """Describe one store: its specification, where its weights came from, versions, rows."""
    import json

    import numpy as np

    from echoshift.pipeline.store.layout import STATE_NAMES
    from echoshift.pipeline.store.location import locate
    from echoshift.pipeline.store.open import open_store

    opened = open_store(store)
    states, counts = np.unique(opened.read_array("state"), return_counts=True)
    rows = {STATE_NAMES[s]: n for s, n in zip(states.tolist(), counts.tolist(), strict=True)}
    n_bytes = locate(store).measure_bytes()
    if as_json:
        print_json({"store": store, "attributes": opened.attributes, "rows": rows, "n_bytes": n_bytes})
        return
    typer.echo(json.dumps(dict(opened.attributes), indent=2, ensure_ascii=False))
    typer.echo(f"rows: {', '.join(f'{n} {name}' for name, n in rows.items())}; {n_bytes / 1e6:.1f} MB on disk")


@app.command()
def verify(
    store: StoreArgument,
    sample: Annotated[
        float, typer.Option(help="Percent of the done rows to extract again and compare; 0: none.", min=0, max=100)
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="The same seed samples the same rows.")] = 0,
    media: Annotated[Path | None, typer.Option(help="Where the videos lie; default data/DATASET.")] = None,
    manifests: Annotated[
        Path, typer.Option(help="Where cards and manifests lie.", envvar="ECHOSHIFT_MANIFESTS")
    ] = MANIFESTS_DIR,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N; for --sample.")] = "auto",
    repair: Annotated[bool, typer.Option("--repair", help="Re-queue what fails, for extract to compute.")] = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Check checksums, values, times, ledger, and a sample extracted again; ends with 1 and a line for every fault."""
    from contextlib import nullcontext

    from echoshift.cli.stores import print_check
    from echoshift.extract.check import CheckOptions, check_store, repair_store
    from echoshift.extract.work import RunOptions
    from echoshift.pipeline.store.open import hold_store, open_store

    open_store(store)  # holding makes files beside it, so that it must be there
    options = CheckOptions(manifests, media, sample, seed, RunOptions(device=device))
    with hold_store(store) if repair else nullcontext():
        with show_progress("segments", quiet=quiet) as progress:
            check = check_store(store, options, progress.advance)
        repaired = repair_store(store, check, options) if repair and check.faults else None
    print_check(check, repaired, as_json=as_json)
    if check.faults:
        raise typer.Exit(EXIT_FAULTS)


@app.command()
def unlock(
    store: Annotated[str, typer.Argument(help="A store on a URL whose run is dead.", autocompletion=complete_store)],
) -> None:
    """Remove the lock that a dead run left on a store on a URL, and say whose it was."""
    from echoshift.pipeline.store.lock import remove_lock

    holder = remove_lock(store)
    print(f"removed the lock of {holder}" if holder else f"{store} has no lock")


@app.command()
def explain(
    segment: Annotated[str, typer.Argument(help="A segment's id.", autocompletion=complete_segment)],
    store: Annotated[
        str | None,
        typer.Argument(help="One store; default: every store that may know it.", autocompletion=complete_store),
    ] = None,
    cache: CacheOption = "cache",
    dataset: Annotated[
        str, typer.Option(help="Look at this dataset's stores alone.", autocompletion=complete_dataset)
    ] = "",
    media: Annotated[Path | None, typer.Option(help="Where the videos lie; default data/DATASET.")] = None,
    manifests: Annotated[
        Path, typer.Option(help="Where cards and manifests lie.", envvar="ECHOSHIFT_MANIFESTS")
    ] = MANIFESTS_DIR,
    as_json: JsonOption = False,
) -> None:
    """Say why a segment's row is done, stale, failed or pending, in one store or in all that may know it."""
    from echoshift.extract.explain import explain_everywhere, format_explanation
    from echoshift.pipeline.store.open import list_stores

    paths = [store] if store is not None else list_stores(cache)
    explanations = explain_everywhere(paths, segment, manifests, media, dataset)
    if as_json:
        print_json(explanations)
        return
    for explanation in explanations:
        for line in format_explanation(explanation):
            typer.echo(line)


@app.command()
def export(
    store: StoreArgument,
    to: Annotated[Path, typer.Option(help="The file to write.")],
    form: Annotated[ExportName, typer.Option(help="What to write.")] = "npz",
    output: Annotated[str, typer.Option(help="Which output.")] = "pooled",
    as_json: JsonOption = False,
) -> None:
    """Write one output of every done row as npz, one h5, Parquet, or EPIC-100's pickle."""
    from echoshift.pipeline.store.interchange import export_store
    from echoshift.pipeline.store.open import open_store

    n_rows = export_store(open_store(store), output, to, form)
    if as_json:
        print_json({"store": store, "output": output, "form": form, "file": to, "n_segments": n_rows})
        return
    typer.echo(f"wrote {n_rows} segments to {to}")


@app.command()
def audit(
    store: StoreArgument,
    output: Annotated[str | None, typer.Option(help="Which output; default: all.")] = None,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Sum up what the features look like; ends with 1 and a line for every output that can't be right."""
    from echoshift.extract.check import describe_audit
    from echoshift.pipeline.store.audit import audit_output, find_audit_faults
    from echoshift.pipeline.store.open import open_store

    opened = open_store(store)
    names = [output] if output is not None else [o.name for o in opened.spec.outputs]
    audits = []
    with show_progress("rows", quiet=quiet) as progress:
        for name in names:
            progress.start(f"auditing {name}", opened.layout.n_rows)
            audits.append(audit_output(opened, name, progress.advance))
    faults = [fault for found in audits for fault in find_audit_faults(found)]
    if as_json:
        print_json({"store": store, "outputs": audits, "faults": faults})
    else:
        for found in audits:
            for line in describe_audit(found):
                typer.echo(line)
        for fault in faults:
            typer.echo(f"{store}: {fault}")
    if faults:
        raise typer.Exit(EXIT_FAULTS)


@app.command("import")
def import_(
    source: Annotated[Path, typer.Argument(help="A folder of SEGMENT_ID.npz or .npy, an exported .npz, or a pickle.")],
    dataset: Annotated[
        str,
        typer.Option(help="A dataset with a card and a manifest in data/manifests.", autocompletion=complete_dataset),
    ],
    encoder: Annotated[str, typer.Option(help="What the features are called; part of the store's name.")],
    form: Annotated[ImportName, typer.Option(help="npz (folder or file), or EPIC-100's pickle.")] = "npz",
    output: Annotated[str, typer.Option(help="The output's name in the store.")] = "pooled",
    modality: Annotated[str | None, typer.Option(help="RGB, Flow or Audio.")] = None,
    allow_unknown: Annotated[
        bool, typer.Option("--allow-unknown", help="Leave out segments that the manifest doesn't have.")
    ] = False,
    backend: Annotated[str, typer.Option(help="zarr or hdf5.")] = "zarr",
    cache: CacheOption = "cache",
    manifests: Annotated[
        Path, typer.Option(help="Where cards and manifests lie.", envvar="ECHOSHIFT_MANIFESTS")
    ] = MANIFESTS_DIR,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Make a store of features that were computed elsewhere; nothing in a pickle is run."""
    from echoshift.pipeline.cards import read_dataset_card
    from echoshift.pipeline.errors import StoreError, suggest
    from echoshift.pipeline.manifest import locate_manifest, read_manifest
    from echoshift.pipeline.store.interchange import import_features, open_import_source

    if backend not in ("zarr", "hdf5"):
        raise StoreError(f"no backend {backend!r}; {suggest(backend, ('zarr', 'hdf5'))}")
    manifest = read_manifest(locate_manifest(dataset, manifests), read_dataset_card(dataset, manifests))
    opened = open_import_source(source, form, modality)
    with show_progress("segments", quiet=quiet) as progress:
        progress.start("importing", len(manifest))
        summary = import_features(
            opened,
            manifest,
            cache,
            encoder=encoder,
            output=output,
            backend="zarr" if backend == "zarr" else "hdf5",
            allow_unknown=allow_unknown,
            notify=progress.advance,
        )
    if as_json:
        print_json(summary)
        return
    if summary.unknown_ids:
        typer.echo(f"left out: {len(summary.unknown_ids)} unknown segments, the first {summary.unknown_ids[0]}")
    typer.echo(
        f"{summary.path}: {summary.n_done} done ({summary.n_written} written now), {summary.n_pending} without features"
    )


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
            f"{len(check.faults)} faults; --repair re-queues their rows, or delete the store and extract it again"
        )
    else:
        restored = "; the segment ids were restored from the manifest" if repaired.restored_ids else ""
        typer.echo(
            f"{len(check.faults)} faults; {repaired.n_rows} rows in {repaired.n_shards} shards are re-queued, "
            f"`echoshift extract` with the same options computes them again{restored}"
        )


def _print_sample(sample: ReextractionReport) -> None:
    counts = Counter(comparison.outcome for comparison in sample.comparisons)
    text = ", ".join(f"{counts[outcome]} {outcome}" for outcome in ("equal", "close", "different", "failed"))
    typer.echo(f"{sample.n_rows} rows extracted again: {text} (outputs of rows; tolerance {sample.tolerance:.1e})")
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
