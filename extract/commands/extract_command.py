"""Is `echoshift extract`: fills feature stores from a manifest and its media."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from extract.run_options import RunOptions
from pipeline.cards import MANIFESTS_DIR

if TYPE_CHECKING:
    from extract.extraction import ExtractionSummary

EXIT_SOME_FAILED = 3


class BackendName(StrEnum):
    """Lists the backends of a store."""

    zarr = "zarr"
    hdf5 = "hdf5"


class DtypeName(StrEnum):
    """Lists the types features are stored in."""

    float16 = "float16"
    float32 = "float32"


class PrecisionName(StrEnum):
    """Lists the precisions networks run in."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class DecoderName(StrEnum):
    """Lists the decoders of video files."""

    pyav = "pyav"
    decord = "decord"


def extract(
    dataset: Annotated[str, typer.Argument(help="A dataset with a card and a manifest in data/manifests.")],
    media: Annotated[Path | None, typer.Option(help="Where the videos lie; default data/DATASET.")] = None,
    encoders: Annotated[str, typer.Option(help="Names, separated by blanks; default: those of the card.")] = "",
    weights: Annotated[
        list[str] | None,
        typer.Option(help="ENCODER=REF; REF is a name of `weights ls`, a .safetensors file, or random:SEED."),
    ] = None,
    outputs: Annotated[
        list[str] | None, typer.Option(help="ENCODER=NAME,NAME instead of the encoder's default.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="[ENCODER.]part.field=value, such as clip.n_clips=10 or frame.crop=224."),
    ] = None,
    backend: Annotated[BackendName, typer.Option(help="How the store lies on disk.")] = BackendName.zarr,
    cache: Annotated[
        str,
        typer.Option(help="Where stores lie: a folder, or a URL such as s3://bucket/prefix.", envvar="ECHOSHIFT_CACHE"),
    ] = "cache",
    manifest: Annotated[Path | None, typer.Option(help="Another manifest than data/manifests/DATASET.csv.")] = None,
    manifests: Annotated[
        Path, typer.Option(help="Where cards and manifests lie.", envvar="ECHOSHIFT_MANIFESTS")
    ] = MANIFESTS_DIR,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[DtypeName, typer.Option(help="Type of the stored features.")] = DtypeName.float16,
    precision: Annotated[PrecisionName, typer.Option(help="Precision of the networks.")] = PrecisionName.fp32,
    decoder: Annotated[
        DecoderName, typer.Option(help="pyav is exact; decord returns wrong frames on some files.")
    ] = DecoderName.pyav,
    rows_per_shard: Annotated[
        int | None,
        typer.Option(
            help="Rows committed at a time, the most a kill can cost; counts for a new store; default: by bytes.", min=1
        ),
    ] = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Try failed segments again.")] = False,
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
) -> None:
    """Extract features into stores; resumes, skips what is done, ends with 3 if any segment failed."""
    from extract.commands.cluster_options import end_on_sigterm, plan_cluster
    from extract.commands.terminal import show_progress
    from extract.extraction import ExtractionRequest, extract_features
    from extract.feature_specs import StoreOptions, make_feature_spec
    from extract.weights.resolve import default_weights, resolve_weights
    from pipeline.cards import read_dataset_card
    from pipeline.errors import SpecError
    from pipeline.manifest_csv import read_manifest

    cluster = plan_cluster(workers, scheduler, slurm=slurm, slurm_options=slurm_option or [], device=device)
    card = read_dataset_card(dataset, manifests)
    names = encoders.split() or list(card.encoders)
    if not names:
        raise SpecError(f"the card of {dataset} names no encoders; give --encoders")
    chosen_weights = _parse_pairs("--weights", weights or [], names)
    chosen_outputs = _parse_pairs("--outputs", outputs or [], names)
    options = StoreOptions(dtype.value, precision.value, decoder.value)
    specs = []
    for name in names:
        record = resolve_weights(chosen_weights.get(name) or default_weights(name), name)
        wanted = [o for o in chosen_outputs.get(name, "").split(",") if o]
        specs.append((make_feature_spec(name, record, options, outputs=wanted, overrides=set_ or []), record))
    media_root = media or manifests.parent / dataset
    if not media_root.is_dir():
        raise SpecError(
            f"no media folder {media_root}; say where the videos of {dataset} lie with --media (make: MEDIA=)"
        )
    request = ExtractionRequest(
        card=card,
        manifest=read_manifest(manifest or manifests / f"{dataset}.csv", card),
        media_root=media_root,
        cache_dir=cache,
        backend=backend.value,
        encoders=tuple(specs),
        options=RunOptions(device, batch, readers, segment_timeout),
        cluster=cluster,
        retry_failed=retry_failed,
        n_rows_per_shard=rows_per_shard,
        wait_s=wait,
        allow_full_disk=allow_full_disk,
    )
    with end_on_sigterm(), show_progress("segments") as progress:
        summary = extract_features(request, progress, lambda message: typer.echo(message, err=True))
    print_summary(summary)
    if summary.n_failed:
        raise typer.Exit(EXIT_SOME_FAILED)


def _parse_pairs(option: str, pairs: list[str], encoders: list[str]) -> dict[str, str]:
    from pipeline.errors import SpecError

    parsed = {}
    for pair in pairs:
        encoder, equals, value = pair.partition("=")
        if not equals or encoder not in encoders:
            raise SpecError(f"{option} {pair!r} is not ENCODER=…, ENCODER one of {', '.join(encoders)}")
        parsed[encoder] = value
    return parsed


def print_summary(summary: ExtractionSummary) -> None:
    """Prints what each store holds for the manifest, and the first failures by name."""
    from extract.commands.terminal import print_table
    from pipeline.store.ledger import failures_path

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
