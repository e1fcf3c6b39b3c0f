"""Predictions of a trained encoder for segments, and the store of adapted features that Stage 2 reads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from echoshift.extract.encoders.registry import find_encoder
from echoshift.pipeline.segments import Segment
from echoshift.pipeline.specs import FeatureSpec
from echoshift.pipeline.store.interface import FeatureStore, ShardIndex
from echoshift.pipeline.store.layout import DONE, PENDING, Shard, order_segments, plan_rows_per_shard, plan_shards
from echoshift.pipeline.store.lock import hold_store
from echoshift.pipeline.store.open import create_store, has_store, open_store
from echoshift.train.predictions import Predictions
from echoshift.train.stage1.audio import AudioFeatures
from echoshift.train.stage1.clips import ClipFacts
from echoshift.train.stage1.encoder import LOGITS, AudioAdaptiveEncoder


@dataclass(frozen=True, slots=True)
class SegmentPrediction:
    """Prediction of one segment.

    Attributes:
        probabilities: float32 [K]: the mean over clips of the softmax, or, multi-label, the maximum of the sigmoid.
        outputs: outputs of the visual encoder by name, float32 [n_clips, ...].
        facts: which times and frames the clips cover.
    """

    segment_id: str
    probabilities: np.ndarray
    outputs: Mapping[str, np.ndarray]
    facts: ClipFacts


@torch.inference_mode()
def predict_segments(
    model: AudioAdaptiveEncoder,
    clips: Iterable[tuple[str, Mapping[str, Tensor], ClipFacts]],
    audio: AudioFeatures,
    *,
    multi_label: bool,
    device: torch.device,
    outputs: Sequence[str] = (),
    without_audio: bool = False,
) -> Iterator[SegmentPrediction]:
    """Predict segments from all their clips; one window of audio gates all clips of a segment (METHODS 5.5).

    `without_audio` treats every segment as one without a track (the audio is missing at test).
    """
    model.eval()
    for segment_id, visual, facts in clips:
        on_device = {name: value.to(device) for name, value in visual.items()}
        n_clips = len(next(iter(on_device.values())))
        gates, heard = None, None
        if model.needs_audio:
            has_audio = torch.from_numpy(audio.has_audio([segment_id]) & (not without_audio)).to(device)
            heard = audio.read_maps([segment_id]).to(device), has_audio
            gates = model.compute_gates(*heard)
            if gates is not None:
                gates = {name: gate.expand(n_clips, -1) for name, gate in gates.items()}
        if model.objective is None:
            computed = model.gated.encode(on_device, gates, (*outputs, LOGITS))
            logits = computed[LOGITS].float()
            of_clips = logits.sigmoid() if multi_label else logits.softmax(dim=1)
        else:
            assert heard is not None, "an objective needs audio"
            classified = model.gated.network.classified_output
            computed = model.gated.encode(on_device, gates, tuple(dict.fromkeys((*outputs, classified))))
            of_clips = model.objective.predict_clips(computed[classified], *heard)
        p = of_clips.amax(dim=0) if multi_label else of_clips.mean(dim=0)
        named = {name: computed[name].float().cpu().numpy() for name in outputs}
        yield SegmentPrediction(segment_id, p.cpu().numpy(), named, facts)


def export_features(
    path: Path,
    dataset: str,
    spec: FeatureSpec,
    segments: Sequence[Segment],
    predict: Callable[[Sequence[str]], Iterable[SegmentPrediction]],
    *,
    manifest_sha256: str,
    checkpoint: str,
    advance: Callable[[int], None] = lambda n: None,
) -> Predictions:
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
    probabilities = []
    with hold_store(path):
        store = open_store(path)
        for shard in plan_shards(store.layout):
            part = parts / f"{shard.index:06d}.npz"
            wanted = ids[shard.start_row : shard.stop_row]
            is_done = bool((store.read_array("state", shard.start_row, shard.stop_row) == DONE).all())
            if not (is_done and part.is_file()):
                found = list(predict(wanted))
                Predictions(tuple(wanted), np.stack([p.probabilities for p in found])).write(part)
                _commit(store, shard, spec, found)
            probabilities.append(Predictions.read(part).probabilities)
            advance(shard.n_rows)
    return Predictions(tuple(ids), np.concatenate(probabilities))


def _commit(store: FeatureStore, shard: Shard, spec: FeatureSpec, found: Sequence[SegmentPrediction]) -> None:
    if (store.read_array("state", shard.start_row, shard.stop_row) != PENDING).any():
        store.begin_shard(shard)
    for output in spec.outputs:
        values = np.stack([prediction.outputs[output.name] for prediction in found]).astype(spec.dtype)
        n_rows, n_clips = store.get_output_chunks(output.name)
        for row in range(0, len(found), n_rows):
            for clip in range(0, values.shape[1], n_clips):
                chunk = values[row : row + n_rows, clip : clip + n_clips]
                store.write_outputs(output.name, shard.start_row + row, chunk, clip)
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
