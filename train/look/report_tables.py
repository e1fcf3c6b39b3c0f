"""The report's tables of a data set, of its stores and of Stage 1's runs."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from echoshift.pipeline.cards import DatasetCard
from echoshift.pipeline.errors import RunError
from echoshift.pipeline.manifest import summarise_manifest
from echoshift.pipeline.segments import Manifest, Segment
from echoshift.pipeline.specs import FeatureSpec
from echoshift.pipeline.store.failures import read_failures
from echoshift.pipeline.store.interface import FeatureStore
from echoshift.pipeline.store.layout import DONE, FAILED
from echoshift.train.look.figures import Plot, draw_histogram
from echoshift.train.runs import RunRecord
from echoshift.train.splits import TRAIN, DataPlaces, find_shift, keep_segments, label_target_train, split_for_shift
from echoshift.train.steps import RECORD
from echoshift.train.tables import PERCENT

N_SHOWN_FAILURES = 20
N_NORM_ROWS, N_NORM_BYTES = 256, 64 * 2**20


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell of a table: its words, the number it is sorted by, and the length of a bar in it, 0 to 1."""

    text: str
    value: float | None = None
    bar: float | None = None


def show(value: str | int | float | Cell | None, digits: int = 1) -> Cell:
    """Make a cell of words or a number, sorted by its full precision; a dash where there is none."""
    if isinstance(value, Cell):
        return value
    if value is None:
        return Cell("–")
    if isinstance(value, str):
        return Cell(value)
    return Cell(f"{value:,}" if isinstance(value, int) else f"{value:,.{digits}f}", value)


def percent(share: float | None) -> float | None:
    """Return a share 0..1 in percent, None where there is none."""
    return None if share is None else PERCENT * share


class PageTable:
    """A table of the page that sorts and filters; the first cell of a row is its header.

    Attributes:
        id: unique in the page.
        are_numbers: of each column, whether it holds a number.
        notes: whole sentences that belong below it.
    """

    def __init__(
        self,
        id_: str,
        caption: str,
        columns: Sequence[str],
        rows: Iterable[Sequence[str | int | float | Cell | None]],
        notes: Sequence[str] = (),
    ) -> None:
        self.id, self.caption, self.columns, self.notes = id_, caption, tuple(columns), tuple(notes)
        self.rows = [tuple(map(show, row)) for row in rows]
        self.are_numbers = [any(row[i].value is not None for row in self.rows) for i in range(len(columns))]


# The data set


def count_parts(manifest: Manifest, card: DatasetCard, has_audio: Mapping[str, bool]) -> PageTable:
    """Count segments by domain and split; `has_audio` is by id, as far as it is known."""
    rows: list[tuple[Any, ...]] = []
    for part in summarise_manifest(manifest, card):
        group = [s for s in manifest if (s.domain, s.split) == (part.domain, part.split)]
        if not group:
            continue
        durations_s = np.array([segment.duration_s for segment in group])
        known = [has_audio[s.segment_id] for s in group if s.segment_id in has_audio]
        silent = percent(known.count(False) / len(known)) if known else None
        spans = (float(durations_s.min()), float(np.median(durations_s)), float(durations_s.max()))
        total_min = float(durations_s.sum()) / 60
        counts = (part.n_segments, part.n_videos, total_min, *(show(s, 2) for s in spans), silent, part.n_short)
        rows.append((part.domain, part.split, *counts))
    times = ("total, min", "shortest, s", "median, s", "longest, s")
    columns = ("domain", "split", "segments", "videos", *times, "silent, %", "short")
    note = "Short: fewer than 64 frames at 60 frames a second."
    return PageTable("parts", "Segments by domain and split", columns, rows, [note])


def count_classes(manifest: Manifest, card: DatasetCard) -> PageTable:
    """Count segments of each class by domain and split; a segment of several classes counts in each."""
    parts = [part for part in summarise_manifest(manifest, card) if part.n_segments]
    most = max((n for part in parts for n in part.n_per_class), default=0) or 1
    rows: list[tuple[str | int | Cell, ...]] = []
    for k, name in enumerate(card.classes):
        counts = [part.n_per_class[k] for part in parts]
        rows.append((name, *(Cell(f"{n:,}", n, n / most) for n in counts), sum(counts)))
    columns = ("class", *(f"{part.domain} {part.split}" for part in parts), "all")
    return PageTable("class-counts", "Segments of each class, by domain and split", columns, rows)


def compare_labels(segments: Iterable[Segment], card: DatasetCard) -> PageTable:
    """Compare the label distributions of the train splits of each pair of domains that the card names as a shift.

    The distance is the total variation, half the sum over classes of |p - q|, 0 to 1. Multi-label: the distribution
    over all labels given. A pair is left out where a side has no label. It reads the target's labels: analysis alone.
    """
    counts: dict[str, Counter[str]] = {domain: Counter() for domain in card.domains}
    for segment in segments:
        if segment.split == TRAIN:
            counts[segment.domain].update(segment.labels)
    rows = []
    for shift in card.shifts:
        n = [
            np.array([sum(counts[domain][name] for domain in domains) for name in card.classes], np.float64)
            for domains in (shift.source, (shift.target,))
        ]
        if n[0].sum() and n[1].sum():
            source, target = (side / side.sum() for side in n)
            gap = np.abs(source - target)
            k, distance = int(gap.argmax()), float(gap.sum() / 2)
            shares = (percent(float(source[k])), percent(float(target[k])))
            length = Cell(f"{distance:.3f}", distance, distance)
            rows.append(("+".join(shift.source), shift.target, length, card.classes[k], *shares))
    note = "Distance: total variation, half the sum over classes of |p - q|; 0: the same shares, 1: no class shared."
    columns = ("source", "target", "distance", "class that differs most", "share in source, %", "share in target, %")
    return PageTable("label-shifts", "How far the labels of two train splits lie apart", columns, rows, [note])


# Stores


def read_silence(stores: Iterable[FeatureStore]) -> tuple[dict[str, bool], str]:
    """Read, by segment, whether there is sound, from the store of audio with the most done rows, and name it.

    ({}, "") where the dataset has no store of audio.
    """
    best: tuple[dict[str, bool], str] = ({}, "")
    for store in stores:
        if store.spec.holds_sound:
            done = np.asarray(store.read_array("state")) == DONE
            heard = zip(store.segment_ids, store.read_array("has_audio").astype(bool).tolist(), done, strict=True)
            known = {segment_id: has_audio for segment_id, has_audio, is_done in heard if is_done}
            if len(known) > len(best[0]):
                best = known, str(store.path).rstrip("/").split("/")[-1]
    return best


def count_coverage(sized: Sequence[tuple[FeatureStore, int]], manifest: Manifest) -> PageTable:
    """Count what stores, each with its size in bytes, hold of a manifest's segments."""
    rows, n_foreign = [], 0
    for store, n_bytes in sized:
        state, held = np.asarray(store.read_array("state")), set(store.segment_ids)
        row_of = {segment_id: row for row, segment_id in enumerate(store.segment_ids)}
        states = state[[row_of[s.segment_id] for s in manifest if s.segment_id in held]]
        n_done, n_failed = int((states == DONE).sum()), int((states == FAILED).sum())
        n_foreign += len(held) - len(states)
        share = n_done / len(manifest) if len(manifest) else 0.0
        silent = None
        if store.spec.holds_sound:
            silent = int(((state == DONE) & ~store.read_array("has_audio").astype(bool)).sum())
        names = (
            store.spec.encoder,
            str(store.attributes["fingerprint"]),
            ", ".join(o.name for o in store.spec.outputs),
        )
        left = (len(states) - n_done - n_failed, len(manifest) - len(states))
        covered = Cell(f"{100 * share:.1f}", 100 * share, share)
        rows.append((*names, store.layout.n_clips, covered, n_done, n_failed, *left, silent, n_bytes / 1e6))
    notes = [f"Of the manifest's {len(manifest):,} segments; absent: the store has no row for them."]
    if n_foreign:
        notes.append(f"{n_foreign:,} rows are of segments that the manifest no longer holds.")
    counts = ("clips", "covered, %", "done", "failed", "pending", "absent", "silent", "MB")
    columns = ("encoder", "fingerprint", "outputs", *counts)
    return PageTable("stores-coverage", "Coverage of the manifest", columns, rows, notes)


def list_failures(stores: Iterable[FeatureStore]) -> PageTable:
    """List the kinds of failure of each store, with the first segment of each and its reason."""
    rows = []
    for store in stores:
        failures = list(read_failures(store.path).values())
        place = "/".join(str(store.path).rstrip("/").split("/")[-2:])
        counts = Counter(failure.exception for failure in failures)
        for exception, n in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:N_SHOWN_FAILURES]:
            first = next(failure for failure in failures if failure.exception == exception)
            rows.append((place, exception, n, first.segment_id, first.reason))
    note = "Nothing is ever substituted for them; runs leave them out and say so."
    columns = ("store", "exception", "segments", "first segment", "its reason")
    return PageTable("failures", "Segments that failed, by kind of failure", columns, rows, [note])


def list_settings(id_: str, spec: FeatureSpec) -> PageTable:
    """List a specification's settings as names and words; None and what doesn't apply is left out."""
    rows = []
    for part in ("clip", "frame", "audio", "imported"):
        value = getattr(spec, part)
        for name, each in (value.model_dump(mode="json") if value is not None else {}).items():
            if each is not None:
                words = ", ".join(map(str, each)) if isinstance(each, list) else str(each)
                rows.append((f"{part}.{name}", words))
    rows.append(("outputs", ", ".join(f"{o.name} {' x '.join(map(str, o.shape))}" for o in spec.outputs)))
    rows += [(name, str(getattr(spec, name))) for name in ("dtype", "precision", "decoder", "revision")]
    return PageTable(id_, "Specification", ("setting", "value"), [*rows, ("weights sha256", spec.weights)])


def sample_norms(store: FeatureStore, output: str) -> tuple[np.ndarray, str]:
    """Compute the Euclidean norms of clips, float64 [n_clips], of up to N_NORM_ROWS rows that are done, spread evenly.

    Of a store of audio only rows with sound count. No more than N_NORM_BYTES are read. The words say of how many rows
    they are, where it isn't all of them.
    """
    usable = np.asarray(store.read_array("state")) == DONE
    if store.spec.holds_sound:
        usable &= store.read_array("has_audio").astype(bool)
    rows = np.flatnonzero(usable)
    if not len(rows):
        return np.zeros(0), "no row is done"
    width = math.prod(next(each.shape for each in store.spec.outputs if each.name == output))
    n_row_bytes = store.layout.n_clips * width * np.dtype(store.spec.dtype).itemsize
    n = min(len(rows), N_NORM_ROWS, max(N_NORM_BYTES // max(n_row_bytes, 1), 1))
    chosen = rows[np.linspace(0, len(rows) - 1, n).round().astype(np.int64)]
    values = store.read([store.segment_ids[row] for row in chosen.tolist()], output)
    n_valid = np.asarray(store.read_array("n_valid"))[chosen]
    vectors = values[np.arange(values.shape[1])[None] < n_valid[:, None]].reshape(-1, width)
    norms: np.ndarray = np.sqrt(np.square(vectors.astype(np.float64)).sum(axis=1))
    return norms, f"a sample, {n:,} of {len(rows):,} segments" if n < len(rows) else ""


def draw_store_norms(store: FeatureStore, output: str) -> tuple[Plot | None, str]:
    """Draw the norms of one output of a store, and say what they are of; None where there is nothing to draw."""
    norms, sampled = sample_norms(store, output)
    finite = norms[np.isfinite(norms)]
    words = f"{output}: norms of {len(finite):,} clips" + (f"; {sampled}" if sampled else "")
    if len(finite) < len(norms):
        words += f"; {len(norms) - len(finite):,} more hold NaN or infinity"
    if not len(finite):
        return None, words
    title = f"Norms of {store.spec.encoder}"
    return draw_histogram(
        title, {output: finite}, "Euclidean norm", "clips"
    ), f"{words}; median {np.median(finite):.3g}"


# Stage 1


@dataclass(frozen=True, slots=True)
class AbsentMarks:
    """What was marked absent in the target's train split, held against its labels: analysis, no training reads it.

    Attributes:
        counts: by class the marks, those that are right, and the segments that lack the class, int64 [3, K].
        fault: why the marks can't be held against labels, "" where they can.
    """

    n_segments: int
    counts: np.ndarray
    fault: str = ""

    @property
    def accuracy(self) -> float | None:
        """The share of marks that are right; None where there is no mark."""
        n_marks = int(self.counts[0].sum())
        return int(self.counts[1].sum()) / n_marks if n_marks else None


@dataclass(frozen=True, slots=True)
class Stage1Run:
    """What the steps of one run of Stage 1 left; `lost` names steps whose folder is gone.

    Attributes:
        losses: by name, by epoch.
        audio_losses: of the audio classifier, by epoch.
        clusters: by class, as the step of that name records them.
    """

    record: RunRecord
    losses: Mapping[str, Sequence[float | None]]
    validation: Sequence[float]
    audio_losses: tuple[float, ...]
    clusters: Sequence[Mapping[str, Any]]
    absent: AbsentMarks | None
    lost: tuple[str, ...]

    @property
    def variant(self) -> tuple[str, str]:
        """What the seeds of a variant share: configuration and shift."""
        return self.record.config_hash, self.record.shift


def read_stage1_runs(records: Iterable[RunRecord], runs_dir: Path, places: DataPlaces) -> list[Stage1Run]:
    """Read what the runs of Stage 1 among the records left, in their order; train and compute nothing."""
    runs = []
    for record in (record for record in records if record.stage == "stage1"):
        found: dict[str, Mapping[str, Any]] = {}
        steps = [s for s in ("encoder", "audio_classifier", "clusters", "absent_labels") if s in record.steps]
        for name in steps:
            path = runs_dir / "steps" / f"{name}-{record.steps[name]}" / RECORD
            try:
                found[name] = dict(json.loads(path.read_text(encoding="utf-8"))["outcome"])
            except FileNotFoundError:
                continue  # listed as lost
            except (ValueError, KeyError, TypeError) as error:
                raise RunError(f"{path} isn't a step's record: {error}; delete the folder and run again") from error
        epochs = found.get("encoder", {}).get("epochs", [])
        names = dict.fromkeys(name for epoch in epochs for name in epoch["losses"])
        runs.append(
            Stage1Run(
                record=record,
                losses={name: tuple(epoch["losses"].get(name) for epoch in epochs) for name in names},
                validation=[v for epoch in epochs if (v := epoch["source_validation"]) is not None],
                audio_losses=tuple(found.get("audio_classifier", {}).get("losses", ())),
                clusters=found.get("clusters", {}).get("classes", []),
                absent=_read_absent(record, runs_dir / "steps", places) if "absent_labels" in found else None,
                lost=tuple(name for name in steps if name not in found),
            )
        )
    return runs


def name_variants(runs: Sequence[Stage1Run]) -> dict[tuple[str, str], str]:
    """Name each configuration by the grid's row that first asked for it, or by its hash, with its shift."""
    rows: dict[str, str] = {}
    for run in runs:
        if run.record.row:
            rows.setdefault(run.record.config_hash, run.record.row)
    return {run.variant: f"{rows.get(run.variant[0], f'settings {run.variant[0]}')}, {run.variant[1]}" for run in runs}


def _read_absent(record: RunRecord, steps: Path, places: DataPlaces) -> AbsentMarks:
    manifest, card = places.manifest, places.card
    nothing = np.zeros((3, 0), np.int64)
    if record.shift not in [shift.name for shift in card.shifts]:
        return AbsentMarks(0, nothing, "the card has no such shift any more, so its marks can't be held against labels")
    try:
        marks = np.load(steps / f"absent_labels-{record.steps['absent_labels']}" / "absent.npy", allow_pickle=False)
        heard = steps / f"audio_predictions-{record.steps['audio_predictions']}" / "predictions.npz"
        with np.load(heard, allow_pickle=False) as arrays:
            kept = set(arrays["segment_ids"].tolist())
    except FileNotFoundError as error:
        return AbsentMarks(0, nothing, f"{error.filename} is gone, so the marks can't be read")
    chosen = record.config.get("target_labels", {})
    splits = split_for_shift(
        manifest,
        card,
        find_shift(card, record.shift),
        use_tags=chosen.get("use_tags", False),
        labelled_fraction=chosen.get("labelled_fraction"),
        pairs=chosen.get("pairs", "all"),
    )
    # The marks are of the target's unlabelled train split as far as the run had features.
    ids = [segment.segment_id for segment in keep_segments(splits, kept).target_train]
    if len(ids) != len(marks) or record.manifest_sha256 != manifest.sha256:
        fault = "the run is of another manifest, so its marks can't be held against labels"
        return AbsentMarks(len(marks), nothing, fault)
    labels = label_target_train(manifest, card, find_shift(card, record.shift), ids).labels
    return AbsentMarks(len(marks), count_right_marks(marks, labels))


def count_right_marks(marks: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Count, by class, the marks, those that are right, and the segments that lack the class, int64 [3, K].

    `marks` bool [n, K]; `labels` int64 [n] or 0 and 1 [n, K]. A mark is right where the segment lacks the class; the
    share of segments that lack it is what marks set at random would have right.
    """
    lacks = labels <= 0 if labels.ndim == 2 else labels[:, None] != np.arange(marks.shape[1])[None]
    return np.stack([marks.sum(axis=0), (marks & lacks).sum(axis=0), lacks.sum(axis=0)])


def list_stage1_runs(runs: Sequence[Stage1Run], names: Mapping[tuple[str, str], str]) -> PageTable:
    """List the runs of Stage 1, variant by variant."""
    rows = []
    for run in sorted(runs, key=lambda run: (list(names).index(run.variant), run.record.seed)):
        total = run.losses.get("total", ())
        ends = (total[0], total[-1]) if total else (None, None)
        validated = percent(run.validation[-1]) if run.validation else None
        audio = run.audio_losses[-1] if run.audio_losses else None
        n_clusters = sum(len(found["sizes"]) for found in run.clusters) if run.clusters else None
        right = percent(run.absent.accuracy) if run.absent else None
        left = (*(show(end, 3) for end in ends), validated, show(audio, 3), n_clusters, right)
        rows.append((names[run.variant], run.record.seed, len(total), *left, run.record.duration_s / 60))
    notes = [
        f"{names[run.variant]}, seed {run.record.seed}: folders of {', '.join(run.lost)} are gone."
        for run in runs
        if run.lost
    ]
    notes.append(
        "Absent right: the share of marks whose class the segment lacks; it reads the target's labels (analysis)."
    )
    losses = ("first loss", "last loss", "source validation, %", "audio classifier's last loss")
    columns = ("variant", "seed", "epochs", *losses, "clusters", "absent right, %", "minutes")
    return PageTable("stage1-runs", "Runs of Stage 1", columns, rows, notes)


def list_clusters(id_: str, run: Stage1Run) -> PageTable:
    """List how a class's sounds were grouped: the sizes of its clusters, the largest first."""
    most = max(found["n_samples"] for found in run.clusters) or 1
    rows = []
    for found in run.clusters:
        n, sizes = found["n_samples"], list(found["sizes"])
        listed = Cell(" + ".join(map(str, sizes)) or "–", sizes[0] if sizes else None)
        why = found["note"] or "the elbow of the inertias"
        rows.append((found["name"], Cell(f"{n:,}", n, n / most), len(sizes), listed, found["n_silent"], why))
    caption = f"Clusters of the sounds of {run.record.shift.rpartition('-')[0]}, seed {run.record.seed}"
    columns = ("class", "segments", "clusters", "sizes", "silent", "why so many")
    return PageTable(id_, caption, columns, rows)


def list_absent(id_: str, shift: str, found: Sequence[AbsentMarks], classes: Sequence[str]) -> PageTable:
    """List how often marks are right, summed over seeds."""
    marks, right, lacking = sum(absent.counts for absent in found).tolist()  # type: ignore[union-attr]
    n = sum(absent.n_segments for absent in found)
    rows = []
    for k, name in enumerate(classes):
        share = right[k] / marks[k] if marks[k] else None
        shown = None if share is None else Cell(f"{100 * share:.1f}", 100 * share, share)
        rows.append((name, marks[k], right[k], shown, percent(lacking[k] / n)))
    seeds = f"Summed over {len(found)} seeds. " if len(found) > 1 else ""
    note = f"{seeds}At random: the share of segments that lack the class, which marks set at random would have right."
    columns = ("class", "marks", "right", "right, %", "at random, %")
    return PageTable(id_, f"Marks of absent activities right, {shift}", columns, rows, [note])
