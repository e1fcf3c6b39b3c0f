"""`echoshift manifest`: imports annotation files into a manifest, checks one, and shows what is in it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from echoshift.cli.completion import complete_dataset
from echoshift.cli.options import DatasetArgument
from echoshift.cli.terminal import JsonOption, QuietOption, make_jsonable, print_json
from echoshift.pipeline.errors import ManifestError
from echoshift.pipeline.places import MANIFESTS_DIR

if TYPE_CHECKING:
    from echoshift.extract.media import MediaSurvey, NeededMediaProbe
    from echoshift.pipeline.cards import DatasetCard
    from echoshift.pipeline.segments import Segment

EXIT_FAULTS = 1

app = typer.Typer(no_args_is_help=True, help="Import annotations into a manifest, check it, show it.")
import_app = typer.Typer(no_args_is_help=True, help="Make data/manifests/DATASET.csv from annotation files.")
app.add_typer(import_app, name="import")

ManifestsOption = Annotated[Path, typer.Option(help="Where cards and manifests lie.", envvar="ECHOSHIFT_MANIFESTS")]
AllowCountsOption = Annotated[
    bool, typer.Option("--allow-counts", help="Accept other counts than the card's (a subset, say).")
]
MediaOption = Annotated[Path, typer.Option(help="Where the videos lie.")]


PairsName = Literal["all", "half", "none"]


@import_app.command()
def epic(
    folder: Annotated[Path, typer.Argument(help="MM-SADA's six D*_{train,test}.pkl, or the same as .csv.")],
    nouns: Annotated[Path | None, typer.Option(help="EPIC-55's EPIC_train_action_labels.csv, to join nouns.")] = None,
    allow_counts: AllowCountsOption = False,
    manifests: ManifestsOption = MANIFESTS_DIR,
) -> None:
    """Import MM-SADA's splits of EPIC-Kitchens-55."""
    from echoshift.pipeline.cards import read_dataset_card
    from echoshift.pipeline.importers.epic import import_epic

    card = read_dataset_card("epic", manifests)
    _write(card, import_epic(folder, card, nouns, allow_counts), manifests)


@import_app.command("charades_ego")
def charades_ego(
    folder: Annotated[Path, typer.Argument(help="CharadesEgo_v1_{train,test}_only{1st,3rd}.csv.")],
    labelled_fraction: Annotated[float, typer.Option(help="Share of the target's train videos with labels.")] = 0.5,
    pairs: Annotated[PairsName, typer.Option(help="Keep all pairs, half of them, or no video's counterpart.")] = (
        "all"
    ),
    allow_counts: AllowCountsOption = False,
    manifests: ManifestsOption = MANIFESTS_DIR,
) -> None:
    """Import CharadesEgo: third person to first person, multi-label."""
    from echoshift.pipeline.cards import read_dataset_card
    from echoshift.pipeline.importers.charades_ego import import_charades_ego

    card = read_dataset_card("charades_ego", manifests)
    _write(card, import_charades_ego(folder, card, labelled_fraction, pairs, allow_counts), manifests)


@import_app.command()
def folder(
    media: Annotated[Path, typer.Argument(help="Videos as DOMAIN/SPLIT/CLASS/*.mp4; ActorShift, or your own.")],
    dataset: Annotated[str, typer.Option(help="The dataset's name; its card is made when there is none.")],
    allow_counts: AllowCountsOption = False,
    manifests: ManifestsOption = MANIFESTS_DIR,
    quiet: QuietOption = False,
) -> None:
    """Import a folder of videos sorted by domain, split and class; each video is a segment."""
    from echoshift.cli.terminal import show_progress
    from echoshift.extract.media import MediaLocation, probe_duration_s
    from echoshift.pipeline.importers.folder import card_from_folder, import_folder, list_stray_videos

    card, is_new = _read_or_make_card(dataset, manifests, lambda: card_from_folder(media, dataset))
    with show_progress("videos", quiet=quiet) as progress:
        progress.start("measuring", 0)

        def probe(path: Path) -> float:
            progress.advance()
            return probe_duration_s(MediaLocation.of_file(path))

        segments = import_folder(media, probe, card, allow_counts)
    if strays := list_stray_videos(media):
        more = " and others" if len(strays) > 1 else ""
        typer.echo(f"note: {len(strays)} videos lie outside DOMAIN/SPLIT/CLASS/ and were not taken: {strays[0]}{more}")
    if is_new:
        _write_card(card, segments, manifests)
    _write(card, segments, manifests)


@import_app.command()
def hac(
    lists: Annotated[Path, typer.Argument(help="HAC_{train,test}_only_{human,animal,cartoon}.csv.")],
    media: MediaOption,
    allow_counts: AllowCountsOption = False,
    manifests: ManifestsOption = MANIFESTS_DIR,
) -> None:
    """Import SimMMDG's Human-Animal-Cartoon lists; the lengths come from the videos."""
    from echoshift.pipeline.cards import read_dataset_card
    from echoshift.pipeline.importers.folder import import_hac

    card = read_dataset_card("hac", manifests)
    _write(card, import_hac(lists, card, _survey(media, card).probe_duration_s, allow_counts), manifests)


@import_app.command("csv")
def csv_(
    file: Annotated[Path, typer.Argument(help="A manifest in echoshift's own format, .csv or .parquet.")],
    dataset: Annotated[str, typer.Option(help="The dataset's name; its card is made when there is none.")],
    allow_counts: AllowCountsOption = False,
    manifests: ManifestsOption = MANIFESTS_DIR,
) -> None:
    """Import a manifest in echoshift's own format: segment_id, video_id, start_s, stop_s, labels, domain, split."""
    from echoshift.pipeline.importers.own import card_from_csv, import_own_csv

    card, is_new = _read_or_make_card(dataset, manifests, lambda: card_from_csv(file, dataset))
    segments = import_own_csv(file, card, allow_counts)
    if is_new:
        _write_card(card, segments, manifests)
    _write(card, segments, manifests)


@app.command()
def check(
    dataset: Annotated[
        str, typer.Argument(help="A dataset with a card in data/manifests.", autocompletion=complete_dataset)
    ],
    file: Annotated[Path | None, typer.Option(help="Another file than data/manifests/DATASET.csv.")] = None,
    media: Annotated[Path | None, typer.Option(help="Also look at the videos: is each there, and long enough?")] = None,
    manifests: ManifestsOption = MANIFESTS_DIR,
    as_json: JsonOption = False,
) -> None:
    """Name file and line of every fault; ends with 1 if there is any."""
    from echoshift.pipeline.cards import read_dataset_card
    from echoshift.pipeline.manifest import check_manifest, join_missing, list_fault_lines, locate_manifest

    card = read_dataset_card(dataset, manifests)
    path = file or locate_manifest(dataset, manifests)
    probe = _make_probe(media, card) if media else None
    faults = check_manifest(path, card, probe.probe_duration_s if probe else None)
    n_errors = sum(fault.level == "error" for fault in faults)
    if as_json:
        counts = {"n_errors": n_errors, "n_warnings": len(faults) - n_errors}
        print_json({"dataset": dataset, "manifest": path, **counts, "faults": faults})
    else:
        told = faults
        if media and probe and len(probe.asked) > 1 and not probe.found:
            told = join_missing(faults, len(probe.asked), media)
        for line in list_fault_lines(told):
            typer.echo(line)
        typer.echo(f"{path}: {n_errors} errors, {len(faults) - n_errors} warnings")
    if n_errors:
        raise typer.Exit(EXIT_FAULTS)


@app.command()
def show(
    dataset: DatasetArgument,
    manifests: ManifestsOption = MANIFESTS_DIR,
    as_json: JsonOption = False,
) -> None:
    """Count segments, classes and videos of each domain and split."""
    from echoshift.pipeline.cards import read_dataset_card
    from echoshift.pipeline.manifest import locate_manifest, read_manifest

    card = read_dataset_card(dataset, manifests)
    manifest = read_manifest(locate_manifest(dataset, manifests), card)
    if as_json:
        print_json({**describe_counts(card, manifest.segments), "sha256": manifest.sha256})
    else:
        _print_counts(card, manifest.segments)


def _make_probe(media: Path, card: DatasetCard) -> NeededMediaProbe:
    from echoshift.extract.media import NeededMediaProbe, find_needed_modalities

    return NeededMediaProbe(_survey(media, card), find_needed_modalities(card))


def _survey(media: Path, card: DatasetCard) -> MediaSurvey:
    from echoshift.extract.media import MediaSurvey

    if not media.is_dir():
        raise ManifestError(f"no media folder {media}; say where the videos of {card.name} lie with --media")
    return MediaSurvey(media, card.media)


def _read_or_make_card(dataset: str, manifests: Path, make: Callable[[], DatasetCard]) -> tuple[DatasetCard, bool]:
    """Return the card, and whether it was made now; it is written once the segments are known to be sound."""
    from echoshift.pipeline.cards import read_dataset_card

    if re.fullmatch(r"\w[\w.+-]*", dataset) is None:
        raise ManifestError(f"--dataset {dataset!r} names a file and a folder; use letters, digits, and _ . + - alone")
    path = manifests / f"{dataset}.toml"
    return (read_dataset_card(dataset, manifests), False) if path.exists() else (make(), True)


def _write_card(card: DatasetCard, segments: tuple[Segment, ...], manifests: Path) -> None:
    from echoshift.pipeline.cards import write_card
    from echoshift.pipeline.importers.own import list_doubts

    path = manifests / f"{card.name}.toml"
    write_card(path, card)
    typer.echo(f"made the card {path}; correct in it what the files can't say (class order, shifts, task)")
    for doubt in list_doubts(card, segments):
        typer.echo(f"note: {doubt}; if that is wrong, correct the names, delete the card, and import again")


def _write(card: DatasetCard, segments: tuple[Segment, ...], manifests: Path) -> None:
    from echoshift.pipeline.manifest import locate_manifest, write_manifest

    path = locate_manifest(card.name, manifests)
    write_manifest(path, segments)
    _print_counts(card, segments)
    typer.echo(f"wrote {len(segments):,} segments to {path}")


def describe_counts(card: DatasetCard, segments: tuple[Segment, ...]) -> dict[str, object]:
    """Return what `manifest show` counts; classes by name, as a card fixes them."""
    from echoshift.pipeline.manifest import summarise_manifest

    splits = [
        {**make_jsonable(summary), "n_per_class": dict(zip(card.classes, summary.n_per_class, strict=True))}
        for summary in summarise_manifest(segments, card)
    ]
    return {"dataset": card.name, "title": card.title, "n_segments": len(segments), "splits": splits}


def _print_counts(card: DatasetCard, segments: tuple[Segment, ...]) -> None:
    from echoshift.cli.terminal import print_table
    from echoshift.pipeline.manifest import summarise_manifest

    summaries = summarise_manifest(segments, card)
    many = len(card.classes) > 20
    rows = [
        [
            f"{s.domain} {s.split}",
            s.n_segments,
            f"{sum(n > 0 for n in s.n_per_class)} of {len(card.classes)}"
            if many
            else " ".join(map(str, s.n_per_class)),
            s.n_videos,
            s.n_short,
        ]
        for s in summaries
    ]
    classes = "classes that occur" if many else f"classes 0..{len(card.classes) - 1}"
    print_table(card.title, ("split", "n", classes, "videos", "shorter than 64 frames at 60 Hz"), rows)
