"""All that is known of one segment, from media, cache and runs: frames, audio, spectrogram, gates, predictions."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from types import TracebackType
from typing import Literal, TypeVar

import numpy as np
import torch

from echoshift.extract.media import OpenMedia
from echoshift.pipeline.errors import EchoshiftError, ManifestError, RunError, WeightsError, suggest
from echoshift.pipeline.segments import Manifest, Segment
from echoshift.pipeline.specs import FeatureSpec, fingerprint
from echoshift.pipeline.store.interface import FeatureStore
from echoshift.pipeline.tensor_files import check_tensors, read_header, read_tensors
from echoshift.train.look.features import open_stores
from echoshift.train.look.run_choice import describe_run, find_checkpoint
from echoshift.train.look.segment_media import (
    SegmentAudio,
    ShownFrame,
    Spectrogram,
    choose_audio_spec,
    read_segment_audio,
    read_shown_frames,
    read_spectrogram,
)
from echoshift.train.predictions import read_prediction_table
from echoshift.train.runs import RESULTS, RunRecord, keep_latest, read_runs
from echoshift.train.scores import read_hits
from echoshift.train.splits import TEST, DataPlaces, find_shift
from echoshift.train.stage1.audio import AudioFeatures
from echoshift.train.stage1.config import Stage1Config
from echoshift.train.stage1.encoder import AudioAttention, CheckpointFacts
from echoshift.train.stage2.config import SelectionRule
from echoshift.train.steps import RECORD, hash_json

N_EXTREME = 5
_ATTENTION = "attention."
_TABLE, _PREDICTIONS = "table.parquet", "predictions.npz"
_STAGES = ("stage1", "stage2", "alignment")

Part = Literal["frames", "audio", "spectrogram", "gate", "predictions"]
Speaker = Literal["audio", "frames", "recogniser", "alignment"]
_Read = TypeVar("_Read")


@dataclass(frozen=True, slots=True, eq=False)
class GateGroup:
    """The gates of one path's channels, such as `trunk_slow`.

    Attributes:
        values: float32 [n_channels], 0 closed, 1 open.
        mean, spread: of the values; the spread is the standard deviation of the population.
        most_open, most_closed: numbers of a few channels, the extreme one first.
    """

    name: str
    values: np.ndarray
    mean: float
    spread: float
    most_open: tuple[int, ...]
    most_closed: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SegmentGate:
    """What the audio-based attention of one checkpoint makes of the segment's sound.

    Without sound (`hears` False) the gate is the one that all silent segments share.
    """

    run: str
    checkpoint: Path
    hears: bool
    groups: tuple[GateGroup, ...]


@dataclass(frozen=True, slots=True)
class ShownScore:
    """One class with its probability, and whether the manifest has it in the segment."""

    name: str
    probability: float
    is_true: bool


@dataclass(frozen=True, slots=True, eq=False)
class ShownPrediction:
    """What one run takes the segment for.

    Attributes:
        run: names the run, such as `stage2 studio-workshop, seed 0, + z`.
        speaker: Stage 1's audio classifier (`audio`, p_a) or visual encoder (`frames`, p_v), a recogniser of Stage 2,
            or a method of alignment.
        role: what the segment is to the run, such as `source train` or `target test`.
        probabilities: float32 [K]; with the rule `mean_last` the mean over the last checkpoints.
        top: the classes of highest probability, highest first.
        is_right: whether the highest is the true one; None where a segment may have several.
        pseudo_label: what Stage 1 takes the segment for; "" where it takes it for nothing.
    """

    run: str
    stage: str
    shift: str
    seed: int
    row: str
    selection: SelectionRule
    speaker: Speaker
    role: str
    probabilities: np.ndarray
    top: tuple[ShownScore, ...]
    is_right: bool | None
    pseudo_label: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class SegmentView:
    """All that is known of one segment; `missing` has, by part, the sentence that says why it isn't there, or whole."""

    dataset: str
    synthetic: bool
    segment: Segment
    classes: tuple[str, ...]
    frames: tuple[ShownFrame, ...]
    audio: SegmentAudio | None
    spectrogram: Spectrogram | None
    gate: SegmentGate | None
    predictions: tuple[ShownPrediction, ...]
    missing: dict[Part, str]


@dataclass(frozen=True, slots=True)
class ViewOptions:
    """What is read of a segment.

    Attributes:
        n_frames: frames a segment.
        n_top: classes a prediction.
        shift, seed: of the runs that are asked; "" and None: all of them.
        with_media: whether frames and audio are read.
    """

    n_frames: int = 5
    n_top: int = 5
    shift: str = ""
    seed: int | None = None
    with_media: bool = True


class SegmentReader:
    """Reads the views of segments of one dataset, one after the other; for one thread, within a `with` block.

    What several segments need is opened once. Segments of one video are read fastest one after the other.
    """

    def __init__(self, places: DataPlaces, runs_dir: Path, options: ViewOptions | None = None) -> None:
        """Make it for the runs of `runs_dir`, which is `runs/DATASET`."""
        self._places, self._runs_dir, self._options = places, runs_dir, options or ViewOptions()
        self._media = OpenMedia(places.media_root, places.card.media)
        self._open_gates = lru_cache(maxsize=4)(self._open_checkpoint)
        self._read_table = lru_cache(maxsize=None)(read_prediction_table)
        self._read_stored = lru_cache(maxsize=None)(self._read_run)

    def __enter__(self) -> SegmentReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._media.__exit__(kind, error, trace)

    def read(self, segment_id: str) -> SegmentView:
        """Read the view of a segment; raises ManifestError with the nearest ids for one that isn't in the manifest."""
        segment = find_segment(self._places.manifest, segment_id)
        card, media, options = self._places.card, self._media, self._options
        missing: dict[Part, str] = {}

        def attempt(part: Part, read: Callable[[], _Read]) -> _Read | None:
            try:
                return read()
            except EchoshiftError as error:
                missing[part] = make_sentence(str(error))
            return None

        frames, audio, spectrogram = None, None, None
        if options.with_media:
            spec, is_stored = self._audio_spec
            rate_hz = spec.audio.rate_hz if spec.audio is not None else 0
            frames = attempt("frames", lambda: read_shown_frames(media, segment, options.n_frames))
            audio = attempt("audio", lambda: read_segment_audio(media, segment, rate_hz))
            spectrogram = attempt(
                "spectrogram", lambda: read_spectrogram(media, segment, spec, spec.encoder if is_stored else "")
            )
        gate = attempt("gate", lambda: self._read_gate(segment))
        predictions, why = self._read_predictions(segment)
        if why:
            missing["predictions"] = make_sentence(why)
        return SegmentView(
            card.name,
            card.synthetic,
            segment,
            card.classes,
            frames or (),
            audio,
            spectrogram,
            gate,
            tuple(predictions),
            missing,
        )

    @cached_property
    def _stores(self) -> dict[str, FeatureStore]:
        """The stores of the dataset that lie in the cache, by fingerprint."""
        return {fingerprint(store.spec): store for store in open_stores(self._places)}

    @cached_property
    def _audio_spec(self) -> tuple[FeatureSpec, bool]:
        return choose_audio_spec(self._places.card, [store.spec for store in self._stores.values()])

    @cached_property
    def _records(self) -> tuple[RunRecord, ...]:
        """The latest record of each run that the options ask for, Stage 1 first, then by shift and seed."""
        chosen = [
            record
            for record in keep_latest(read_runs(self._runs_dir / RESULTS)).values()
            if self._options.shift in ("", record.shift) and self._options.seed in (None, record.seed)
        ]
        return tuple(sorted(chosen, key=lambda record: (_STAGES.index(record.stage), record.shift, record.seed)))

    def _iterate_records(self, segment: Segment) -> Iterator[tuple[int, RunRecord, str]]:
        """Return the runs whose shift has the segment's domain, each with what the segment is to it."""
        shifts = {shift.name: shift for shift in self._places.card.shifts}
        for number, record in enumerate(self._records):
            shift = shifts.get(record.shift)
            if shift is not None and segment.domain == shift.target:
                yield number, record, f"target {segment.split}"
            elif shift is not None and segment.domain in shift.source:
                yield number, record, f"source {segment.split}"

    def _read_gate(self, segment: Segment) -> SegmentGate:
        """Read the gate of the last run of Stage 1 with attention, of those that the segment is a target to first."""
        found = [
            (role.startswith("target"), "table" in record.steps, record.ended, record)
            for _, record, role in self._iterate_records(segment)
            if record.stage == "stage1" and record.config.get("attention", {}).get("enabled")
            if find_checkpoint(self._runs_dir, record).is_file()
        ]
        if not found:
            raise RunError(
                f"no finished run of Stage 1 with attention has the domain {segment.domain}; `echoshift stage1 "
                f"{self._places.card.name}` trains one"
            )
        *_, record = max(found, key=lambda each: each[:3])
        checkpoint = find_checkpoint(self._runs_dir, record)
        hears, gates = self._open_gates(checkpoint).compute(segment.segment_id)
        groups = tuple(summarise_gates(name, values) for name, values in gates.items())
        return SegmentGate(describe_run(record), checkpoint, hears, groups)

    def _open_checkpoint(self, path: Path) -> CheckpointGates:
        name = read_checkpoint_facts(path).sound
        if name not in self._stores:
            raise RunError(
                f"the store of audio {name}, from which {path} makes gates, isn't in {self._places.cache_dir}; extract "
                f"it, or say with --cache where it lies"
            )
        return CheckpointGates(path, self._stores[name])

    def _read_predictions(self, segment: Segment) -> tuple[list[ShownPrediction], str]:
        """Read what each run takes a segment for, and say what is left out."""
        card, predictions = self._places.card, []
        shifts = {shift.name for shift in card.shifts}
        unknown = [record for record in self._records if record.shift not in shifts]
        faults = [f"{describe_run(record)}: the card has no such shift any more" for record in unknown]
        for number, record, role in self._iterate_records(segment):
            stored, fault = self._read_stored(number)
            faults += [fault] if fault else []
            for part in stored:
                row = part.row_of.get(segment.segment_id)
                if row is None or (part.is_heard is not None and not part.is_heard[row]):
                    continue
                top = rank_classes(part.probabilities[row], card.classes, segment.labels, self._options.n_top)
                guess = -1 if part.pseudo_labels is None else int(part.pseudo_labels[row])
                predictions.append(
                    ShownPrediction(
                        run=describe_run(record),
                        stage=record.stage,
                        shift=record.shift,
                        seed=record.seed,
                        row=record.row,
                        selection=record.selection,
                        speaker=part.speaker,
                        role=role,
                        probabilities=part.probabilities[row],
                        top=top,
                        is_right=None if card.task == "multi-label" else top[0].is_true,
                        pseudo_label="" if guess < 0 else card.classes[guess],
                    )
                )
        if faults:
            more = f", and {len(faults) - 1} more runs" if len(faults) > 1 else ""
            return predictions, f"left out: {faults[0]}{more}"
        none = f"no finished run has predicted it; runs predict the segments of shifts that have {segment.domain}"
        return predictions, "" if predictions else none

    def _read_run(self, number: int) -> tuple[list[StoredPredictions], str]:
        """Read a run's predictions, or say why they can't be."""
        record = self._records[number]
        if record.manifest_sha256 != self._places.manifest.sha256:
            return [], f"{describe_run(record)}: made of another manifest"
        try:
            return (self._read_stage1(record) if record.stage == "stage1" else [self._read_networks(record)]), ""
        except RunError as error:
            return [], str(error)

    def _read_stage1(self, record: RunRecord) -> list[StoredPredictions]:
        path = self._runs_dir / "steps" / f"table-{record.steps.get('table')}" / _TABLE
        if path.is_file():
            table = self._read_table(path)
            row_of = _number(table.segment_ids)
            return [
                StoredPredictions("audio", row_of, table.audio_probabilities, is_heard=table.has_audio),
                StoredPredictions("frames", row_of, table.visual_probabilities, table.pseudo_labels),
            ]
        found = []
        if (heard := self._find(record, "audio_predictions")) is not None:
            arrays = _read_arrays(heard)
            row_of = _number(arrays["segment_ids"].tolist())
            found.append(StoredPredictions("audio", row_of, arrays["probabilities"], is_heard=arrays["has_audio"]))
        if (seen := self._find(record, "predictions")) is None:
            raise RunError(f"{describe_run(record)}: its predictions are no longer in {self._runs_dir / 'steps'}")
        arrays = _read_arrays(seen)
        row_of = _number(arrays["segment_ids"].tolist())
        return [*found, StoredPredictions("frames", row_of, arrays["probabilities"])]

    def _read_networks(self, record: RunRecord) -> StoredPredictions:
        """Read the mean of a run's networks."""
        parts, ids = [], None
        for name in (name for name in record.steps if name.startswith("predictions_")):
            if (path := self._find(record, name)) is None:
                raise RunError(f"{describe_run(record)}: its predictions are no longer in {self._runs_dir / 'steps'}")
            found = _read_arrays(path)["probabilities"]
            parts.append(found if found.ndim == 2 else found.mean(axis=0))
            ids = ids or self._identify(record, path.parent)
        if not parts or ids is None:
            raise RunError(f"{describe_run(record)}: it doesn't say whose predictions it has; run it again")
        mean = np.asarray(np.mean(parts, axis=0, dtype=np.float64)).astype(np.float32)
        return StoredPredictions("recogniser" if record.stage == "stage2" else "alignment", _number(ids), mean)

    def _find(self, record: RunRecord, name: str) -> Path | None:
        """Find the predictions of a step by its key, whatever the step is called."""
        folders = sorted((self._runs_dir / "steps").glob(f"*-{record.steps.get(name)}"))
        return next((folder / _PREDICTIONS for folder in folders if (folder / _PREDICTIONS).is_file()), None)

    def _identify(self, record: RunRecord, folder: Path) -> list[str] | None:
        """Find the ids of a run's test segments, in order: those whose hash the step of predictions was named by."""
        try:
            wanted = json.loads((folder / RECORD).read_text(encoding="utf-8"))["inputs"]["test"]
        except (OSError, ValueError, KeyError) as error:
            raise RunError(f"{folder / RECORD} isn't a step's record; delete the folder and run again") from error
        hits = read_hits(self._runs_dir / "steps" / f"scores-{record.steps.get('scores', '')}")
        target = find_shift(self._places.card, record.shift).target
        of_manifest = [s.segment_id for s in self._places.manifest if s.domain == target and s.split == TEST]
        candidates = ([] if hits is None else hits[0], of_manifest)
        return next((ids for ids in candidates if hash_json(ids) == wanted), None)


@dataclass(frozen=True, slots=True, eq=False)
class StoredPredictions:
    """What one network, or the mean of a run's networks, takes n segments for.

    Attributes:
        probabilities: float32 [n, K].
        pseudo_labels: int64 [n], -1 where there is none; None where the run makes none.
        is_heard: bool [n], of who hears alone: rows where it is False mean nothing.
    """

    speaker: Speaker
    row_of: Mapping[str, int]
    probabilities: np.ndarray
    pseudo_labels: np.ndarray | None = None
    is_heard: np.ndarray | None = None


def read_segment_view(
    places: DataPlaces, runs_dir: Path, segment_id: str, options: ViewOptions | None = None
) -> SegmentView:
    """Read the view of one segment (SegmentReader); `runs_dir` is `runs/DATASET`."""
    with SegmentReader(places, runs_dir, options) as reader:
        return reader.read(segment_id)


def find_segment(manifest: Manifest, segment_id: str) -> Segment:
    """Find a segment by its id; raises ManifestError with the nearest ids."""
    found = next((segment for segment in manifest if segment.segment_id == segment_id), None)
    if found is None:
        known = (segment.segment_id for segment in manifest)
        hint = suggest(segment_id, known, listed_by=f"echoshift manifest show {manifest.dataset}")
        raise ManifestError(f"{manifest.dataset} has no segment {segment_id!r}; {hint}")
    return found


def rank_classes(
    probabilities: np.ndarray, classes: tuple[str, ...], labels: tuple[str, ...], n_top: int
) -> tuple[ShownScore, ...]:
    """Rank the `n_top` classes of highest probability, float [K]; of equal ones the first of the card comes first."""
    order = np.argsort(-probabilities, kind="stable")[:n_top]
    return tuple(ShownScore(classes[i], float(probabilities[i]), classes[i] in labels) for i in order.tolist())


def make_sentence(reason: str) -> str:
    """Make a sentence of an error's words."""
    words = " ".join(reason.split()).rstrip(".")
    return f"{words[:1].upper()}{words[1:]}."


class CheckpointGates:
    """The attention of one checkpoint and the store of audio whose maps it hears.

    Raises WeightsError for a file that is no checkpoint of Stage 1 or has changed, or has no attention.
    """

    def __init__(self, path: Path, store: FeatureStore) -> None:
        self._audio = AudioFeatures(store)
        tensors, facts = read_tensors(path), read_checkpoint_facts(path)
        if facts.identify(tensors) != read_header(path)["identity"]:
            raise WeightsError(f"{path} has changed since it was written; run Stage 1 again")
        own = {name.removeprefix(_ATTENTION): t for name, t in tensors.items() if name.startswith(_ATTENTION)}
        if not own:
            raise WeightsError(f"{path} was trained without attention, so that nothing is gated")
        biases = {name: tensor for name, tensor in own.items() if name.startswith("heads.") and name.endswith(".bias")}
        channels = {name.split(".")[1]: len(tensor) for name, tensor in biases.items()}
        config = Stage1Config.model_validate_json(facts.config)
        self._attention = AudioAttention(self._audio.map_shape[0], channels, config.attention).eval()
        check_tensors(own, self._attention.state_dict(), str(path))
        self._attention.load_state_dict(own)

    @torch.inference_mode()
    def compute(self, segment_id: str) -> tuple[bool, Mapping[str, np.ndarray]]:
        """Return whether the segment is heard, and its gates by path, float32 [n_channels].

        Raises StoreError for a segment that the store of audio hasn't, or whose row isn't done.
        """
        has_audio = self._audio.has_audio([segment_id])
        gates = self._attention(self._audio.read_maps([segment_id]), torch.from_numpy(has_audio))
        return bool(has_audio[0]), {name: gate[0].numpy() for name, gate in gates.items()}


def read_checkpoint_facts(path: Path) -> CheckpointFacts:
    """Read what a checkpoint of Stage 1 holds besides its tensors; raises WeightsError where it is none."""
    header = read_header(path)
    try:
        return CheckpointFacts(
            header["encoder"],
            header["weights"],
            header["sound_weights"],
            header["sound"],
            tuple(json.loads(header["classes"])),
            header["config"],
        )
    except KeyError as error:
        raise WeightsError(f"{path} is no checkpoint of an audio-adaptive encoder; run Stage 1 again") from error


def summarise_gates(name: str, values: np.ndarray) -> GateGroup:
    """Summarise the gates of one path, float [n_channels]; of equal gates the lower channel comes first."""
    most_open, most_closed = (tuple(np.argsort(v, kind="stable")[:N_EXTREME].tolist()) for v in (-values, values))
    mean, spread = float(values.mean(dtype=np.float64)), float(values.std(dtype=np.float64))
    return GateGroup(name, values, mean, spread, most_open, most_closed)


def _number(segment_ids: Sequence[str]) -> dict[str, int]:
    return {segment_id: row for row, segment_id in enumerate(segment_ids)}


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as arrays:
        return dict(arrays)
