"""Makes the report of a dataset: gathers what is there, lays it out, writes one page; trains and extracts nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from echoshift.pipeline.store.location import locate
from echoshift.train.data_places import DataPlaces
from echoshift.train.grids import Stage, list_grids
from echoshift.train.report.blocks import Page, Tile
from echoshift.train.report.dataset_facts import DatasetFacts, count_dataset
from echoshift.train.report.dataset_section import make_dataset_section
from echoshift.train.report.feature_section import make_feature_section
from echoshift.train.report.grid_facts import PRESETS, GridsFacts, gather_grids
from echoshift.train.report.grid_section import make_grid_section, make_run_section
from echoshift.train.report.page import write_page
from echoshift.train.report.segment_choice import choose_segments
from echoshift.train.report.segment_section import make_segment_section
from echoshift.train.report.stage1_facts import read_stage1_facts
from echoshift.train.report.stage1_section import make_stage1_section
from echoshift.train.report.store_facts import StoreFacts, describe_store, list_dataset_stores, read_silence
from echoshift.train.report.store_section import make_store_section
from echoshift.train.runs import RESULTS, RunRecord, describe_code_version, keep_latest, read_runs
from echoshift.train.tables import MEAN
from echoshift.train.watching import EpochWatcher

PAGE = "index.html"


@dataclass(frozen=True, slots=True)
class ReportRequest:
    """What a report is made of.

    Attributes:
        runs_dir: where steps and results lie, `runs/DATASET`.
        resolve: makes the configuration, as JSON, of a preset, stage and overrides.
        present_shifts: names of the card's shifts of which the manifest has segments.
        presets: those under which grids are looked for; `grids` are grid files of one's own.
        n_segments: how many segments of each domain's split are shown, beside those named in `segment_ids`.
    """

    places: DataPlaces
    runs_dir: Path
    resolve: Callable[[str, Stage, tuple[str, ...]], Mapping[str, Any]]
    present_shifts: tuple[str, ...]
    presets: tuple[str, ...] = PRESETS
    grids: tuple[str, ...] = ()
    n_segments: int = 2
    segment_ids: tuple[str, ...] = field(default=())


@dataclass(frozen=True, slots=True)
class ReportOutcome:
    """The page that was written: where, how large, and of how many runs and stores."""

    path: Path
    n_bytes: int
    n_runs: int
    n_stores: int


def make_report(request: ReportRequest, path: Path, watcher: EpochWatcher) -> ReportOutcome:
    """Gather everything and write the page to `path`.

    Raises what reading manifests, stores and results raises; what isn't there yet is said in the page instead.
    """
    places, card = request.places, request.places.card
    choose_segments(places.manifest, 0, request.segment_ids)  # a wrong name is told before the work, not after it
    stores = list_dataset_stores(places.cache_dir, card.name)
    watcher.start("stores", sum(len(store.spec.outputs) for store in stores))
    store_facts = [
        describe_store(store, places.manifest, locate(store.path).measure_bytes(), watcher.advance) for store in stores
    ]
    has_audio, sound_store = read_silence(stores)
    dataset = count_dataset(places.manifest, card, has_audio, sound_store)
    records = [record for record in read_runs(request.runs_dir / RESULTS) if record.dataset == card.name]
    latest = list(keep_latest(records).values())
    watcher.start("grids", len(list_grids()) + len(request.grids))
    grids = gather_grids(
        card,
        request.present_shifts,
        records,
        places.manifest.sha256,
        request.runs_dir,
        request.resolve,
        presets=request.presets,
        more=request.grids,
        notify=watcher.advance,
    )
    stage1 = read_stage1_facts(latest, request.runs_dir, places.manifest, card)
    sections = [
        make_dataset_section(dataset, card),
        make_store_section(store_facts, card.name),
        make_stage1_section(stage1, card.name),
        make_grid_section(grids, latest, card),
        make_feature_section(
            places,
            request.runs_dir,
            latest,
            start=lambda n: watcher.start("features", n),
            advance=watcher.advance,
        ),
        make_segment_section(
            places,
            request.runs_dir,
            request.n_segments,
            request.segment_ids,
            start=lambda n: watcher.start("segments", n),
            advance=watcher.advance,
        ),
        make_run_section(latest, grids.shown, card.name),
    ]
    page = Page(
        dataset=card.name,
        title=card.title,
        description=" ".join(card.description.split()),
        is_synthetic=card.synthetic,
        tiles=make_tiles(dataset, store_facts, latest, grids),
        sections=tuple(sections),
        footer=_make_footer(request, len(latest)),
    )
    return ReportOutcome(path, write_page(path, page), len(latest), len(stores))


def make_tiles(
    dataset: DatasetFacts, stores: Sequence[StoreFacts], runs: Sequence[RunRecord], grids: GridsFacts
) -> tuple[Tile, ...]:
    """Make the numbers at the head of the page."""
    n_known = sum(part.n_heard + part.n_silent for part in dataset.parts)
    n_silent = sum(part.n_silent for part in dataset.parts)
    silent = f"{100 * n_silent / n_known:.1f} % of them silent" if n_known else "silence not known yet"
    tiles = [
        Tile("Segments", f"{dataset.n_segments:,}", silent),
        Tile("Classes", f"{len(dataset.classes):,}", f"in {len({part.domain for part in dataset.parts})} domains"),
        Tile("Feature stores", f"{len(stores):,}", f"{sum(store.n_failed for store in stores):,} failed rows"),
        Tile("Results", f"{len(runs):,}", f"{len(grids.done):,} grid tables"),
    ]
    if grids.done:
        grid = grids.done[0]
        column = MEAN if MEAN in grid.table.columns else grid.table.columns[0]
        scored = [(row, interval) for row in grid.table.rows if (interval := row.cells[column].interval) is not None]
        if scored:
            row, interval = scored[-1]
            spread = "" if interval.half_width is None else f" ±{interval.half_width:.1f}"
            words = f"%: {row.name}, {column}, {grid.name}, {interval.n} seeds"
            tiles.append(Tile("Last row of the first table", f"{interval.mean:.1f}{spread}", words))
    return tuple(tiles)


def _make_footer(request: ReportRequest, n_runs: int) -> tuple[tuple[str, str], ...]:
    return (
        ("Made", datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")),
        ("Code", describe_code_version()),
        ("Manifest", request.places.manifest.sha256),
        ("Results", f"{n_runs:,}, the latest of each configuration, shift, seed and rule"),
    )
