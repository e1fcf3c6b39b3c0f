"""`echoshift plan` and `echoshift extract`: what a run would take, and the run that fills feature stores."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from echoshift.cli.options import (
    DEFAULT_CACHE,
    BackendOption,
    CacheOption,
    DatasetArgument,
    DecoderOption,
    DeviceOption,
    DtypeOption,
    EncodersOption,
    FlowOption,
    ManifestOption,
    ManifestsOption,
    MediaOption,
    OutputsOption,
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
from echoshift.cli.terminal import JsonOption, QuietOption, print_json
from echoshift.pipeline.places import MANIFESTS_DIR

if TYPE_CHECKING:
    from echoshift.extract.plan import RunEstimate, TimedSample
    from echoshift.extract.run import ExtractionSummary


def plan(
    dataset: DatasetArgument,
    media: MediaOption = None,
    encoders: EncodersOption = None,
    weights: WeightsOption = None,
    outputs: OutputsOption = None,
    preset: PresetOption = "",
    set_: SetOption = None,
    flow: FlowOption = "auto",
    backend: BackendOption = "zarr",
    cache: CacheOption = DEFAULT_CACHE,
    manifest: ManifestOption = None,
    manifests: ManifestsOption = MANIFESTS_DIR,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "float16",
    precision: PrecisionOption = "fp32",
    decoder: DecoderOption = "pyav",
    rows_per_shard: RowsPerShardOption = None,
    retry_failed: RetryFailedOption = False,
    sample: Annotated[int, typer.Option(help="Segments to time; 0 times nothing.", min=0)] = 8,
    seed: Annotated[int, typer.Option(help="The same seed times the same segments.")] = 0,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Say what extract would do with the same options: segments, clips, bytes, files, hours; writes no store."""
    from echoshift.cli.terminal import show_progress
    from echoshift.extract.media import MediaSurvey
    from echoshift.extract.plan import plan_run, time_sample
    from echoshift.extract.run import ExtractionRequest
    from echoshift.extract.work import RunOptions
    from echoshift.pipeline.cards import read_dataset_card
    from echoshift.pipeline.manifest import locate_manifest, read_manifest

    card = read_dataset_card(dataset, manifests)
    choices = SpecChoices(encoders, weights, outputs, preset, set_, flow, dtype, precision, decoder)
    listed = read_manifest(manifest or locate_manifest(dataset, manifests), card)
    media_root = find_media_root(dataset, media, manifests)
    request = ExtractionRequest(
        card=card,
        manifest=listed,
        media_root=media_root,
        cache_dir=cache,
        backend=backend,
        encoders=resolve_specs(card, listed, media_root, choices),
        options=RunOptions(device=device),
        retry_failed=retry_failed,
        n_rows_per_shard=rows_per_shard,
    )
    survey = MediaSurvey(request.media_root, card.media)
    with show_progress("segments", quiet=quiet) as progress:
        progress.start("looking at media", len(request.manifest) * len(request.encoders))
        estimate = plan_run(request, survey, progress.advance)
        timed = None
        if sample:
            progress.start("timing a sample", sum(min(sample, len(work.segments)) for work in estimate.work))
            timed = time_sample(request, survey, estimate.work, sample, seed, progress.advance)
    if as_json:
        print_json(describe_plan(estimate, timed))
        return
    print_plan(estimate, timed, asked=sample > 0)
    if not estimate.fits:
        typer.echo(f"warning: {cache} has not the room; choose fewer outputs, float16, or another --cache", err=True)


def describe_plan(estimate: RunEstimate, timed: TimedSample | None) -> dict[str, object]:
    """Return what a plan says in numbers, without the work itself."""
    return {
        "stores": estimate.stores,
        "n_bytes_to_add": estimate.n_bytes_to_add,
        "n_bytes_free": estimate.n_bytes_free,
        "fits": estimate.fits,
        "timed": timed,
    }


def print_plan(estimate: RunEstimate, timed: TimedSample | None, *, asked: bool) -> None:
    """Print a plan: a line a store, a line an output, the room on the disk, the time."""
    from echoshift.cli.terminal import print_table

    stores = estimate.stores
    columns = ("encoder", "segments", "done", "failed", "to do", "no media", "clips", "clips to do", "shards to do")
    print_table(
        "segments and clips",
        (*columns, "store"),
        [
            [
                s.encoder, s.n_segments, s.n_done, s.n_failed, s.n_to_do, s.n_media_missing, s.n_clips,
                s.n_clips_to_do, f"{s.n_shards_to_do} of {s.n_shards}", s.path,
            ]
            for s in stores
        ],
    )  # fmt: skip
    rows: list[list[object]] = []
    for s in stores:
        for o in s.outputs:
            kilobytes = f"{o.n_bytes_a_row / 1e3:.1f}"
            rows.append([s.encoder, o.name, list(o.shape), s.dtype, o.level, kilobytes, f"{o.n_bytes / 1e6:.1f}", ""])
        rows.append([s.encoder, "index", "", "", "", "", f"{s.n_index_bytes / 1e6:.1f}", s.n_files])
    print_table("bytes", ("encoder", "what", "a clip", "type", "for", "kB a row", "MB in all", "files"), rows)
    levels: dict[str, int] = {}
    for s in stores:
        for o in s.outputs:
            levels[o.level] = levels.get(o.level, 0) + o.n_bytes
    for level in sorted(levels):
        typer.echo(f"for {level}: {levels[level] / 1e6:.1f} MB")
    free = f"{estimate.n_bytes_free / 1e9:.1f} GB free" if estimate.n_bytes_free is not None else "free space unknown"
    typer.echo(f"to be added to the cache: {estimate.n_bytes_to_add / 1e6:.1f} MB; {free}")
    if timed is not None:
        time = timed.duration
        typer.echo(
            f"time: {format_duration(time.expected_s)} ({format_duration(time.low_s)} to "
            f"{format_duration(time.high_s)}) for {time.n_segments} segments on {timed.device}, from "
            f"{timed.n_sampled} timed segments, {timed.n_failed} of which failed"
        )
    elif asked:
        typer.echo("time: nothing to do")


def format_duration(seconds: float) -> str:
    """Write a duration the way a person says it: 12.3 s, 4.5 min, 6.7 h."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


EXIT_SOME_FAILED = 3


def extract(
    dataset: DatasetArgument,
    media: MediaOption = None,
    encoders: EncodersOption = None,
    weights: WeightsOption = None,
    outputs: OutputsOption = None,
    preset: PresetOption = "",
    set_: SetOption = None,
    flow: FlowOption = "auto",
    backend: BackendOption = "zarr",
    cache: CacheOption = DEFAULT_CACHE,
    manifest: ManifestOption = None,
    manifests: ManifestsOption = MANIFESTS_DIR,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "float16",
    precision: PrecisionOption = "fp32",
    decoder: DecoderOption = "pyav",
    rows_per_shard: RowsPerShardOption = None,
    retry_failed: RetryFailedOption = False,
    batch: Annotated[
        int | None, typer.Option(help="Clips through a network at once; default: 1 on a CPU, 16 on a GPU.", min=1)
    ] = None,
    readers: Annotated[
        int | None, typer.Option(help="Threads that read media; default: the device's own number.", min=1)
    ] = None,
    segment_timeout: Annotated[
        float | None,
        typer.Option(help="Seconds that a decoder may hang before its segment fails.", min=1),
    ] = None,
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
    from echoshift.cli.options import end_on_sigterm, plan_cluster
    from echoshift.cli.terminal import make_notifier, show_progress
    from echoshift.extract.run import ExtractionRequest, extract_features
    from echoshift.extract.work import RunOptions
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
        backend=backend,
        encoders=resolve_specs(card, listed, media_root, choices),
        options=RunOptions(device, batch, readers, *([] if segment_timeout is None else [segment_timeout])),
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
