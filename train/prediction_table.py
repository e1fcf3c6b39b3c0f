"""Reads Stage 1's table of a shift: what sound and pictures say of each segment, and the pseudo-labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from echoshift.pipeline.errors import RunError

CLASSES = "classes"  # the key of the classes' names in the file's metadata
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
class PredictionTable:
    """The table of n segments; columns as `write_prediction_table` says.

    Attributes:
        has_audio: bool [n].
        audio_features: float32 [n, C_a]; of no meaning without sound.
        audio_probabilities, visual_probabilities: float32 [n, K].
        pseudo_labels: int64 [n], -1 where there is none.
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


def read_prediction_table(path: Path) -> PredictionTable:
    """Read a table; raises RunError naming the file, and the columns that it lacks."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except FileNotFoundError as error:
        raise RunError(f"there is no table {path}; run Stage 1") from error
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


def _read_lists(table: object, name: str) -> np.ndarray:
    """Read a column of lists of equal length, float32 [n, length]."""
    column = table[name].combine_chunks()  # type: ignore[index]
    values = column.flatten().to_numpy(zero_copy_only=False)
    return np.ascontiguousarray(values.reshape(len(column), -1), dtype=np.float32)
