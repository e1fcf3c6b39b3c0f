"""Writes and reads Stage 1's table of a shift: what sound and pictures say of each segment, and the pseudo-labels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from echoshift.pipeline.segments import Segment
from echoshift.train.prediction_table import CLASSES
from echoshift.train.stage1.audio_classifier import AudioPredictions
from echoshift.train.stage1.exporting import VisualPredictions

NO_LABEL = -1


def write_prediction_table(
    path: Path,
    segments: Sequence[Segment],
    classes: Sequence[str],
    audio: AudioPredictions,
    visual: VisualPredictions,
    labels: VisualPredictions,
    pseudo_labelled: Sequence[str],
) -> None:
    """Write one row a segment as Parquet; `labels` are the predictions that pseudo-labels are made of.

    Columns: segment_id, domain, split, has_audio, audio_features (the audio classifier's pooled layer4, lists of 512
    floats; of no meaning without sound), audio_probabilities and visual_probabilities (lists of K floats),
    pseudo_label: the argmax of the mean over views, an index of the classes, which are in the file's metadata; -1 for
    segments that get none, and where the task is multi-label.
    """
    ids = [segment.segment_id for segment in segments]
    guesses = dict(zip(pseudo_labelled, labels.select(pseudo_labelled).argmax(axis=1).tolist(), strict=True))
    heard = audio.select(ids)
    table = pa.table(
        {
            "segment_id": ids,
            "domain": [segment.domain for segment in segments],
            "split": [segment.split for segment in segments],
            "has_audio": heard.has_audio,
            "audio_features": _as_lists(heard.features),
            "audio_probabilities": _as_lists(heard.probabilities),
            "visual_probabilities": _as_lists(visual.select(ids)),
            "pseudo_label": pa.array([guesses.get(segment_id, NO_LABEL) for segment_id in ids], pa.int32()),
        },
        metadata={CLASSES: "\n".join(classes)},
    )
    fresh = path.with_name(f"{path.name}.partial")
    pq.write_table(table, fresh)
    fresh.replace(path)


def _as_lists(values: np.ndarray) -> pa.Array:
    flat = pa.array(values.astype(np.float32).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
