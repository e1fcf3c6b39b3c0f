"""Predictions of segments: those of one network as arrays, and Stage 1's table of a shift for Stage 2 (Parquet)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from echoshift.pipeline.errors import RunError
from echoshift.pipeline.segments import Segment

if TYPE_CHECKING:
    from typing import Self

CLASSES = "classes"  # the key of the classes' names in the file's metadata
NO_LABEL = -1
COLUMNS = (
    "segment_id",
    "domain",
    "split",
    "has_audio",
    "audio_features",
    "audio_probabilities",
    "visual_probabilities",
    "pseudo_label",
)


@dataclass(frozen=True, slots=True, eq=False)
class Predictions:
    """Predictions of n segments by one network.

    Attributes:
        probabilities: float32 [n, K]: softmax, or sigmoid where the task is multi-label.
    """

    segment_ids: tuple[str, ...]
    probabilities: np.ndarray

    def select(self, segment_ids: Sequence[str]) -> Self:
        """Select segments, in their order; raises RunError for one that isn't among them."""
        row_of = {segment_id: row for row, segment_id in enumerate(self.segment_ids)}
        missing = [s for s in segment_ids if s not in row_of]
        if missing:
            raise RunError(f"no prediction of segment {missing[0]}; extract its features and run Stage 1 again")
        rows = [row_of[s] for s in segment_ids]
        return type(self)(tuple(segment_ids), *(values[rows] for values in self._arrays.values()))

    def write(self, path: Path) -> None:
        """Write them as .npz in one step."""
        fresh = path.with_name(f"{path.name}.partial.npz")
        np.savez(fresh, segment_ids=np.array(self.segment_ids), **self._arrays)
        fresh.replace(path)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read what `write` wrote; nothing in the file is run."""
        with np.load(path, allow_pickle=False) as arrays:
            return cls(tuple(arrays["segment_ids"].tolist()), *(arrays[field.name] for field in fields(cls)[1:]))

    @property
    def _arrays(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)[1:]}


@dataclass(frozen=True, slots=True, eq=False)
class AudioPredictions(Predictions):
    """Predictions p_a of the audio classifier.

    Attributes:
        features: the 512-d audio feature of Stage 2, float32 [n, D].
        has_audio: bool [n]; where False, features and probabilities mean nothing.
    """

    features: np.ndarray
    has_audio: np.ndarray


@dataclass(frozen=True, slots=True, eq=False)
class PredictionTable:
    """Stage 1's table of n segments; columns as `write_prediction_table` says.

    Attributes:
        has_audio: bool [n].
        audio_features: float32 [n, C_a]; of no meaning without audio.
        audio_probabilities, visual_probabilities: float32 [n, K].
        pseudo_labels: int64 [n], -1 for none.
        classes: the K names, in index order.
    """

    path: Path
    segment_ids: tuple[str, ...]
    has_audio: np.ndarray
    audio_features: np.ndarray
    audio_probabilities: np.ndarray
    visual_probabilities: np.ndarray
    pseudo_labels: np.ndarray
    classes: tuple[str, ...]

    def find(self, segment_ids: Sequence[str]) -> np.ndarray:
        """Find the rows of segments, int64 [n]; raises RunError naming the first that isn't there."""
        row_of = {segment_id: row for row, segment_id in enumerate(self.segment_ids)}
        try:
            return np.array([row_of[segment_id] for segment_id in segment_ids], dtype=np.int64)
        except KeyError as error:
            raise RunError(f"{self.path} has no segment {error.args[0]}; run Stage 1 on this manifest again") from error


def write_prediction_table(
    path: Path,
    segments: Sequence[Segment],
    classes: Sequence[str],
    audio: AudioPredictions,
    visual: Predictions,
    labels: Predictions,
    pseudo_labelled: Sequence[str],
) -> None:
    """Write one row a segment as Parquet; `labels` are the predictions that pseudo-labels are made of.

    Columns: segment_id, domain, split, has_audio, audio_features (the audio classifier's pooled layer4, lists of 512
    floats; of no meaning without audio), audio_probabilities and visual_probabilities (lists of K floats),
    pseudo_label: the argmax of the mean over views, an index of the classes, which are in the file's metadata; -1 for
    segments that get none, and where the task is multi-label.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    def as_lists(values: np.ndarray) -> Any:
        flat = pa.array(values.astype(np.float32).reshape(-1))
        return pa.FixedSizeListArray.from_arrays(flat, values.shape[1])

    ids = [segment.segment_id for segment in segments]
    guesses = labels.select(pseudo_labelled).probabilities.argmax(axis=1).tolist()
    guess_of = dict(zip(pseudo_labelled, guesses, strict=True))
    heard = audio.select(ids)
    columns = (
        ids,
        [segment.domain for segment in segments],
        [segment.split for segment in segments],
        heard.has_audio,
        as_lists(heard.features),
        as_lists(heard.probabilities),
        as_lists(visual.select(ids).probabilities),
        pa.array([guess_of.get(segment_id, NO_LABEL) for segment_id in ids], pa.int32()),
    )
    table = pa.table(dict(zip(COLUMNS, columns, strict=True)), metadata={CLASSES: "\n".join(classes)})
    fresh = path.with_name(f"{path.name}.partial")
    pq.write_table(table, fresh)
    fresh.replace(path)


def read_prediction_table(path: Path) -> PredictionTable:
    """Read a table; raises RunError naming the file, and the columns that it lacks."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except FileNotFoundError as error:
        raise RunError(f"no table {path}; run Stage 1") from error
    except (OSError, pa.ArrowInvalid) as error:
        raise RunError(f"{path} can't be read as a table of Stage 1: {error}; run Stage 1 again") from error
    lacking = [name for name in COLUMNS if name not in table.column_names]
    classes = (table.schema.metadata or {}).get(CLASSES.encode())
    if lacking or classes is None:
        what = f"column {lacking[0]}" if lacking else "names of classes"
        raise RunError(f"{path} is no table of Stage 1: it has no {what}; run Stage 1 again")
    return PredictionTable(
        path=path,
        segment_ids=tuple(table["segment_id"].to_pylist()),
        has_audio=table["has_audio"].to_numpy().astype(bool),
        audio_features=_read_lists(table, "audio_features"),
        audio_probabilities=_read_lists(table, "audio_probabilities"),
        visual_probabilities=_read_lists(table, "visual_probabilities"),
        pseudo_labels=table["pseudo_label"].to_numpy().astype(np.int64),
        classes=tuple(classes.decode().split("\n")),
    )


def _read_lists(table: Any, name: str) -> np.ndarray:
    """Read a column of lists of equal length, float32 [n, length]."""
    column = table[name].combine_chunks()
    values = column.flatten().to_numpy(zero_copy_only=False)
    return np.ascontiguousarray(values.reshape(len(column), -1), dtype=np.float32)
