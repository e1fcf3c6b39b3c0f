"""Writes what an adapted encoder makes of segments: its predictions, and, if asked, a store of adapted features."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from echoshift.extract.encoders.registry import find_encoder
from echoshift.pipeline.segments import Segment
from echoshift.pipeline.specs import FeatureSpec
from echoshift.pipeline.store.interface import FeatureStore, ShardIndex
from echoshift.pipeline.store.layout import DONE, PENDING, Shard, order_segments, plan_rows_per_shard, plan_shards
from echoshift.pipeline.store.lock import hold_store
from echoshift.pipeline.store.open import create_store, has_store, open_store
from echoshift.train.stage1.audio_adaptive_encoder import SegmentPrediction

Predict = Callable[[Sequence[str]], Iterable[SegmentPrediction]]


@dataclass(frozen=True, slots=True)
class VisualPredictions:
    """P_v of n segments: probabilities float32 [n, K]."""

    segment_ids: tuple[str, ...]
    probabilities: np.ndarray

    def write(self, path: Path) -> None:
        """Write them as .npz in one step."""
        fresh = path.with_name(f"{path.name}.partial.npz")
        np.savez(fresh, segment_ids=np.array(self.segment_ids), probabilities=self.probabilities)
        fresh.replace(path)

    @classmethod
    def read(cls, path: Path) -> VisualPredictions:
        """Read what `write` wrote; nothing in the file is run."""
        with np.load(path, allow_pickle=False) as arrays:
            return cls(tuple(arrays["segment_ids"].tolist()), arrays["probabilities"])

    def select(self, segment_ids: Sequence[str]) -> np.ndarray:
        """Return the probabilities of some segments, in their order, float32 [n, K]."""
        row_of = {segment_id: i for i, segment_id in enumerate(self.segment_ids)}
        return self.probabilities[[row_of[segment_id] for segment_id in segment_ids]]


def export_features(
    path: Path,
    dataset: str,
    spec: FeatureSpec,
    segments: Sequence[Segment],
    predict: Predict,
    *,
    manifest_sha256: str,
    checkpoint: str,
    advance: Callable[[int], None] = lambda n: None,
) -> VisualPredictions:
    """Fill a store with adapted features, shard by shard, and return the predictions that come with them.

    `predict` gives predictions with the outputs that `spec` names. A run that was killed goes on: shards that are done
    are kept, their predictions lie beside the store, written before the shard is committed.
    """
    ordered = order_segments(segments)
    ids = [segment.segment_id for segment in ordered]
    if not has_store(path):
        n_entries = spec.clip.n_clips * spec.n_entries_per_clip
        create_store(
            path,
            dataset,
            spec,
            ids,
            n_clips=n_entries,
            manifest_sha256=manifest_sha256,
            weights_source=checkpoint,
            n_rows_per_shard=plan_rows_per_shard(spec, len(ids), n_entries),
            encoder_source=find_encoder(spec.encoder).source,
        )
    parts = path.with_name(f"{path.stem}-predictions")
    parts.mkdir(exist_ok=True)
    predictions = []
    with hold_store(path):
        store = open_store(path)
        for shard in plan_shards(store.layout):
            part = parts / f"{shard.index:06d}.npz"
            wanted = ids[shard.start_row : shard.stop_row]
            is_done = bool((store.read_array("state", shard.start_row, shard.stop_row) == DONE).all())
            if not (is_done and part.is_file()):
                found = list(predict(wanted))
                VisualPredictions(tuple(wanted), np.stack([p.probabilities for p in found])).write(part)
                _commit(store, shard, spec, found)
            predictions.append(VisualPredictions.read(part))
            advance(shard.n_rows)
    return VisualPredictions(tuple(ids), np.concatenate([part.probabilities for part in predictions]))


def predict_all(
    segment_ids: Sequence[str], predict: Predict, advance: Callable[[int], None] = lambda n: None
) -> VisualPredictions:
    """Return the predictions of segments without keeping features."""
    rows = []
    for prediction in predict(segment_ids):
        rows.append(prediction.probabilities)
        advance(1)
    return VisualPredictions(tuple(segment_ids), np.stack(rows))


def _commit(store: FeatureStore, shard: Shard, spec: FeatureSpec, found: Sequence[SegmentPrediction]) -> None:
    if (store.read_array("state", shard.start_row, shard.stop_row) != PENDING).any():
        store.begin_shard(shard)
    for output in spec.outputs:
        values = np.stack([prediction.outputs[output.name] for prediction in found]).astype(spec.dtype)
        for rows, clips in _list_chunks(store, output.name, len(found), values.shape[1]):
            store.write_outputs(output.name, shard.start_row + rows.start, values[rows, clips], clips.start)
    n = len(found)
    store.commit_shard(
        shard,
        ShardIndex(
            times=np.stack([prediction.facts.times_s for prediction in found]),
            frames=np.stack([prediction.facts.frames for prediction in found]),
            n_valid=np.array([len(prediction.facts.times_s) for prediction in found], dtype=np.int32),
            digest=np.stack([prediction.facts.digest for prediction in found]),
            state=np.full(n, DONE, dtype=np.uint8),
        ),
    )


def _list_chunks(store: FeatureStore, output: str, n_rows: int, n_clips: int) -> list[tuple[slice, slice]]:
    n_rows_per_chunk, n_clips_per_chunk = store.get_output_chunks(output)
    return [
        (slice(row, min(row + n_rows_per_chunk, n_rows)), slice(clip, min(clip + n_clips_per_chunk, n_clips)))
        for row in range(0, n_rows, n_rows_per_chunk)
        for clip in range(0, n_clips, n_clips_per_chunk)
    ]
