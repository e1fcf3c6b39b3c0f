"""`echoshift extract`: fills feature stores from a manifest and its media."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from echoshift.cli.json_answers import JsonOption, print_json
from echoshift.cli.spec_options import (
    DEFAULT_CACHE,
    BackendName,
    BackendOption,
    CacheOption,
    DatasetArgument,
    DecoderName,
    DecoderOption,
    DeviceOption,
    DtypeName,
    DtypeOption,
    EncodersOption,
    FlowName,
    FlowOption,
    ManifestOption,
    ManifestsOption,
    MediaOption,
    OutputsOption,
    PrecisionName,
    PrecisionOption,
    PresetOption,
    RetryFailedOption,
    RowsPerShardOption,
    SetOption,
    SpecChoices,
    WeightsOption,
    find_media_root,
    resolve_specs,
)
from echoshift.cli.terminal import QuietOption
from echoshift.extract.work import RunOptions
from echoshift.pipeline.places import MANIFESTS_DIR

if TYPE_CHECKING:
    from echoshift.extract.run import ExtractionSummary

EXIT_SOME_FAILED = 3


def extract(
    dataset: DatasetArgument,
    media: MediaOption = None,
    encoders: EncodersOption = None,
    weights: WeightsOption = None,
    outputs: OutputsOption = None,
    preset: PresetOption = "",
    set_: SetOption = None,
    flow: FlowOption = FlowName.auto,
    backend: BackendOption = BackendName.zarr,
    cache: CacheOption = DEFAULT_CACHE,
    manifest: ManifestOption = None,
    manifests: ManifestsOption = MANIFESTS_DIR,
    device: DeviceOption = "auto",
    dtype: DtypeOption = DtypeName.float16,
    precision: PrecisionOption = PrecisionName.fp32,
    decoder: DecoderOption = DecoderName.pyav,
    rows_per_shard: RowsPerShardOption = None,
    retry_failed: RetryFailedOption = False,
    batch: Annotated[
        int | None, typer.Option(help="Clips through a network at once; default: 1 on a CPU, 16 on a GPU.", min=1)
    ] = None,
    readers: Annotated[
        int | None, typer.Option(help="Threads that read media; default: the device's own number.", min=1)
    ] = None,
    segment_timeout: Annotated[
        float, typer.Option(help="Seconds that a decoder may hang before its segment fails.", min=1)
    ] = RunOptions().segment_timeout_s,
    workers: Annotated[
        int | None,
        typer.Option(help="Worker processes, each with a GPU or a share of the cores; jobs under --slurm.", min=1),
    ] = None,
    scheduler: Annotated[
        str | None, typer.Option(help="A running Dask scheduler: its address or its scheduler file.")
    ] = None,
    slurm: Annotated[
        bool, typer.Option("--slurm", help="Start --workers jobs under SLURM (needs the extra `slurm`).")
    ] = False,
    slurm_option: Annotated[
        list[str] | None,
        typer.Option(help="KEY=VALUE for dask_jobqueue.SLURMCluster, such as memory=32GB, over Dask's own settings."),
    ] = None,
    wait: Annotated[
        float | None,
        typer.Option(
            help="Seconds to wait for another run on the same store, inf for ever; default: refuse at once.", min=0
        ),
    ] = None,
    allow_full_disk: Annotated[
        bool, typer.Option("--allow-full-disk", help="Begin even where the disk has no room for all rows.")
    ] = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Extract features into stores; resumes, skips what is done, ends with 3 if a segment failed or can't be read."""
    from echoshift.cli.cluster_options import end_on_sigterm, plan_cluster
    from echoshift.cli.terminal import make_notifier, show_progress
    from echoshift.extract.run import ExtractionRequest, extract_features
    from echoshift.pipeline.cards import read_dataset_card
    from echoshift.pipeline.manifest import locate_manifest, read_manifest

    cluster = plan_cluster(workers, scheduler, slurm=slurm, slurm_options=slurm_option or [], device=device)
    card = read_dataset_card(dataset, manifests)
    listed = read_manifest(manifest or locate_manifest(dataset, manifests), card)
    media_root = find_media_root(dataset, media, manifests)
    choices = SpecChoices(encoders, weights, outputs, preset, set_, flow, dtype, precision, decoder)
    request = ExtractionRequest(
        card=card,
        manifest=listed,
        media_root=media_root,
        cache_dir=cache,
        backend=backend.value,
        encoders=resolve_specs(card, listed, media_root, choices),
        options=RunOptions(device, batch, readers, segment_timeout),
        cluster=cluster,
        retry_failed=retry_failed,
        n_rows_per_shard=rows_per_shard,
        wait_s=wait,
        allow_full_disk=allow_full_disk,
    )
    with end_on_sigterm(), show_progress("segments", quiet=quiet) as progress:
        summary = extract_features(request, progress, make_notifier(quiet=quiet))
    if as_json:
        print_json({"dataset": dataset, "n_failed": summary.n_failed, **describe_summary(summary)})
    else:
        print_summary(summary)
    if summary.n_failed or summary.n_unchecked:
        raise typer.Exit(EXIT_SOME_FAILED)


def describe_summary(summary: ExtractionSummary) -> dict[str, object]:
    """Return what each store holds, with all failures, and how long the run took."""
    from echoshift.pipeline.specs import fingerprint

    stores = [
        {
            "encoder": store.spec.encoder,
            "fingerprint": fingerprint(store.spec),
            "path": store.path,
            "n_done": store.n_done,
            "n_silent": store.n_silent if store.spec.audio is not None else None,
            "n_failed": store.n_failed,
            "n_pending": store.n_pending,
            "n_computed": store.n_computed,
            "n_unchecked": store.n_unchecked,
            "unchecked_reason": store.unchecked_reason,
            "failures": store.failures,
        }
        for store in summary.stores
    ]
    return {"duration_s": summary.duration_s, "stores": stores}


def print_summary(summary: ExtractionSummary) -> None:
    """Print what each store holds for the manifest, and the first failures by name."""
    from echoshift.cli.terminal import print_table
    from echoshift.pipeline.store.failures import failures_path

    rows = []
    for store in summary.stores:
        rate = f"{store.n_computed / summary.duration_s:.1f}" if store.n_computed else "-"
        silent = store.n_silent if store.spec.audio is not None else "-"
        rows.append([store.spec.encoder, store.n_done, silent, store.n_failed, store.n_computed, rate, store.path])
    columns = ("encoder", "done", "no sound", "failed", "computed now", "segments/s", "store")
    print_table(f"{summary.duration_s:.1f} s", columns, rows)
    for store in summary.stores:
        for failure in store.failures[:10]:
            typer.echo(f"failed: {store.spec.encoder}: {failure.segment_id}: {failure.exception}: {failure.reason}")
        if len(store.failures) > 10:
            typer.echo(f"… and {len(store.failures) - 10} more in {failures_path(store.path)}")
        if store.n_unchecked:
            typer.echo(
                f"not checked: {store.spec.encoder}: {store.n_unchecked} done rows, which stay as they are: "
                f"their media can't be read now; {store.unchecked_reason}"
            )
