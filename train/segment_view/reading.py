"""Gathers what is shown of segments, from media, cache and runs, and opens each store and checkpoint once."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import numpy as np

from echoshift.extract.media import OpenMedia
from echoshift.pipeline.errors import EchoshiftError, ManifestError, RunError
from echoshift.pipeline.segments import Segment
from echoshift.pipeline.specs import FeatureSpec, fingerprint
from echoshift.pipeline.store.interface import FeatureStore
from echoshift.pipeline.store.open import list_stores, open_store
from echoshift.train.data_places import DataPlaces
from echoshift.train.runs import RESULTS, RunRecord, keep_latest, read_runs
from echoshift.train.segment_view.gates import CheckpointGates, read_facts, summarise_gates
from echoshift.train.segment_view.pictures_and_sound import read_segment_sound, read_shown_frames, read_spectrogram
from echoshift.train.segment_view.run_predictions import PredictionReader, StoredPredictions, describe_run
from echoshift.train.segment_view.sound_specs import choose_sound_spec
from echoshift.train.segment_view.view import ClassScore, Part, SegmentGate, SegmentPrediction, SegmentView
from echoshift.train.stage1.encoder import CHECKPOINT

N_FRAMES, N_TOP = 5, 5
_Read = TypeVar("_Read")


@dataclass(frozen=True, slots=True)
class ViewOptions:
    """What is shown.

    Attributes:
        n_frames: pictures a segment.
        n_top: classes a prediction.
        shift, seed: of the runs that are asked; "" and None: all of them.
        with_media: whether pictures and sound are read.
    """

    n_frames: int = N_FRAMES
    n_top: int = N_TOP
    shift: str = ""
    seed: int | None = None
    with_media: bool = True


class SegmentViews:
    """Reads the views of segments of one dataset, one after the other; for one thread, within a `with` block.

    What several segments need is opened once. Segments of one video are read fastest one after the other.
    """

    def __init__(self, places: DataPlaces, runs_dir: Path, options: ViewOptions | None = None) -> None:
        """Make it for the runs of `runs_dir`, which is `runs/DATASET`."""
        self._places, self._runs_dir, self._options = places, runs_dir, options or ViewOptions()
        self._media = OpenMedia(places.media_root, places.card.media)
        self._segments = {segment.segment_id: segment for segment in places.manifest}
        self._predictions = PredictionReader(runs_dir, places.card, places.manifest)
        self._open_gates = lru_cache(maxsize=4)(self._open_checkpoint)
        self._read_stored = lru_cache(maxsize=None)(self._read_run)

    def __enter__(self) -> SegmentViews:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._media.__exit__(kind, error, trace)

    def read(self, segment_id: str) -> SegmentView:
        """Read the view of a segment; raises ManifestError with the nearest ids for one that isn't in the manifest."""
        segment = find_segment(self._segments, segment_id, self._places.card.name)
        missing: dict[Part, str] = {}
        frames, sound, spectrogram = None, None, None
        if self._options.with_media:
            frames = self._try(
                "frames", missing, lambda: read_shown_frames(self._media, segment, self._options.n_frames)
            )
            spec, is_stored = self._sound_spec
            rate_hz = spec.audio.rate_hz if spec.audio is not None else 0
            sound = self._try("sound", missing, lambda: read_segment_sound(self._media, segment, rate_hz))
            spectrogram = self._try(
                "spectrogram", missing, lambda: read_spectrogram(self._media, segment, spec, is_stored=is_stored)
            )
        gate = self._try("gate", missing, lambda: self._read_gate(segment))
        predictions, why = self._read_predictions(segment)
        if why:
            missing["predictions"] = why
        return SegmentView(
            dataset=self._places.card.name,
            synthetic=self._places.card.synthetic,
            segment=segment,
            classes=self._places.card.classes,
            frames=frames or (),
            sound=sound,
            spectrogram=spectrogram,
            gate=gate,
            predictions=predictions,
            missing=missing,
        )

    def _try(self, part: Part, missing: dict[Part, str], read: Callable[[], _Read]) -> _Read | None:
        """Read a part; what can't be read is a sentence."""
        try:
            return read()
        except EchoshiftError as error:
            missing[part] = make_sentence(str(error))
        return None

    @cached_property
    def _stores(self) -> dict[str, FeatureStore]:
        """The stores of the dataset that lie in the cache, by fingerprint."""
        stores = [open_store(path) for path in list_stores(self._places.cache_dir)]
        own = [store for store in stores if store.attributes["dataset"] == self._places.card.name]
        return {fingerprint(store.spec): store for store in own}

    @cached_property
    def _sound_spec(self) -> tuple[FeatureSpec, bool]:
        return choose_sound_spec(self._places.card, [store.spec for store in self._stores.values()])

    @cached_property
    def _records(self) -> tuple[RunRecord, ...]:
        """The latest record of each run that the options ask for, Stage 1 first, then by shift and seed."""
        stages = ("stage1", "stage2", "alignment")
        chosen = [
            record
            for record in keep_latest(read_runs(self._runs_dir / RESULTS)).values()
            if self._options.shift in ("", record.shift) and self._options.seed in (None, record.seed)
        ]
        return tuple(sorted(chosen, key=lambda record: (stages.index(record.stage), record.shift, record.seed)))

    def _iterate_records(self, segment: Segment) -> Iterator[tuple[RunRecord, str]]:
        """Return the runs whose shift has the segment's domain, each with what the segment is to it."""
        shifts = {shift.name: shift for shift in self._places.card.shifts}
        for record in self._records:
            shift = shifts.get(record.shift)
            if shift is None:  # _read_predictions says so
                continue
            if segment.domain == shift.target:
                yield record, f"target {segment.split}"
            elif segment.domain in shift.source:
                yield record, f"source {segment.split}"

    def _read_gate(self, segment: Segment) -> SegmentGate:
        """Read the gate of the last run of Stage 1 with attention, of those that the segment is a target to first."""
        found = [
            (role.startswith("target"), "table" in record.steps, record.ended, record)
            for record, role in self._iterate_records(segment)
            if record.stage == "stage1" and record.config.get("attention", {}).get("enabled")
            if self._find_checkpoint(record).is_file()
        ]
        if not found:
            raise RunError(
                f"no finished run of Stage 1 with attention has the domain {segment.domain}; `echoshift stage1 "
                f"{self._places.card.name}` trains one"
            )
        *_, record = max(found, key=lambda each: each[:3])
        checkpoint = self._find_checkpoint(record)
        hears, gates = self._open_gates(checkpoint).compute(segment.segment_id)
        groups = tuple(summarise_gates(name, values) for name, values in gates.items())
        return SegmentGate(describe_run(record), checkpoint, hears, groups)

    def _find_checkpoint(self, record: RunRecord) -> Path:
        return self._runs_dir / "steps" / f"encoder-{record.steps['encoder']}" / CHECKPOINT

    def _open_checkpoint(self, path: Path) -> CheckpointGates:
        name = read_facts(path).sound
        if name not in self._stores:
            raise RunError(
                f"the store of sound {name}, from which {path} makes gates, isn't in {self._places.cache_dir}; extract "
                f"it, or say with --cache where it lies"
            )
        return CheckpointGates(path, self._stores[name])

    def _read_run(self, record_number: int) -> tuple[tuple[StoredPredictions, ...], str]:
        """Read a run's predictions, or say why they can't be."""
        record = self._records[record_number]
        if record.manifest_sha256 != self._places.manifest.sha256:
            return (), f"{describe_run(record)}: made of another manifest"
        try:
            return self._predictions.read(record), ""
        except RunError as error:
            return (), str(error)

    def _read_predictions(self, segment: Segment) -> tuple[tuple[SegmentPrediction, ...], str]:
        numbers = {record.key: number for number, record in enumerate(self._records)}
        predictions: list[SegmentPrediction] = []
        shifts = {shift.name for shift in self._places.card.shifts}
        unknown = [record for record in self._records if record.shift not in shifts]
        faults = [f"{describe_run(record)}: the card has no such shift any more" for record in unknown]
        for record, role in self._iterate_records(segment):
            stored, fault = self._read_stored(numbers[record.key])
            if fault:
                faults.append(fault)
            predictions += self._describe(segment, record, role, stored)
        if faults:
            more = f", and {len(faults) - 1} more runs" if len(faults) > 1 else ""
            return tuple(predictions), make_sentence(f"left out: {faults[0]}{more}")
        if not predictions:
            why = f"no finished run has predicted it; runs predict the segments of shifts that have {segment.domain}"
            return (), make_sentence(why)
        return tuple(predictions), ""

    def _describe(
        self, segment: Segment, record: RunRecord, role: str, stored: Iterable[StoredPredictions]
    ) -> Iterator[SegmentPrediction]:
        classes, is_multi_label = self._places.card.classes, self._places.card.task == "multi-label"
        for part in stored:
            row = part.row_of.get(segment.segment_id)
            if row is None or (part.is_heard is not None and not part.is_heard[row]):
                continue
            p = part.probabilities[row]
            top = rank_classes(p, classes, segment.labels, self._options.n_top)
            guess = -1 if part.pseudo_labels is None else int(part.pseudo_labels[row])
            yield SegmentPrediction(
                run=describe_run(record),
                stage=record.stage,
                shift=record.shift,
                seed=record.seed,
                row=record.row,
                selection=record.selection,
                speaker=part.speaker,
                role=role,
                probabilities=p,
                top=top,
                is_right=None if is_multi_label else top[0].is_true,
                pseudo_label="" if guess < 0 else classes[guess],
            )


def read_segment_view(
    places: DataPlaces, runs_dir: Path, segment_id: str, options: ViewOptions | None = None
) -> SegmentView:
    """Read what is shown of one segment; `runs_dir` is `runs/DATASET`. For several, use SegmentViews.

    Raises ManifestError with the nearest ids for a segment that isn't in the manifest.
    """
    with SegmentViews(places, runs_dir, options) as views:
        return views.read(segment_id)


def find_segment(segments: dict[str, Segment], segment_id: str, dataset: str) -> Segment:
    """Find a segment by its id; raises ManifestError with the nearest ids."""
    if segment_id in segments:
        return segments[segment_id]
    near = difflib.get_close_matches(segment_id, segments, n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(near)}?" if near else f"`echoshift manifest show {dataset}` tells what is there"
    raise ManifestError(f"{dataset} has no segment {segment_id}; {hint}")


def rank_classes(
    probabilities: np.ndarray, classes: tuple[str, ...], labels: tuple[str, ...], n_top: int
) -> tuple[ClassScore, ...]:
    """Rank the `n_top` classes of highest probability, float [K]; of equal ones the first of the card comes first."""
    order = np.argsort(-probabilities, kind="stable")[:n_top]
    return tuple(ClassScore(classes[i], float(probabilities[i]), classes[i] in labels) for i in order.tolist())


def make_sentence(reason: str) -> str:
    """Make a sentence of an error's words."""
    words = " ".join(reason.split()).rstrip(".")
    return f"{words[:1].upper()}{words[1:]}."
