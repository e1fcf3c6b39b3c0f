"""Reads the features of both modalities, as they lie in the cache and as a finished run of alignment projects them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from echoshift.pipeline.errors import RunError
from echoshift.pipeline.segments import Segment
from echoshift.pipeline.store.layout import DONE
from echoshift.pipeline.store.open import open_store
from echoshift.pipeline.tensor_files import check_tensors, read_header, read_tensors
from echoshift.train.alignment.config import AlignmentStageConfig
from echoshift.train.alignment.method import find_method as find_alignment_method
from echoshift.train.alignment.two_streams import TwoStreams
from echoshift.train.data_places import DataPlaces
from echoshift.train.features import FeatureBatch, FeatureRows
from echoshift.train.loop import Domain
from echoshift.train.runs import RESULTS, RunRecord, hash_config, read_runs
from echoshift.train.segment_view.run_predictions import find_method
from echoshift.train.splits import TEST, find_shift
from echoshift.train.stage2.inputs import StreamInputs, find_cached, find_stage1_outputs, open_stream

_CHECKPOINT = "trained.safetensors"
_N_AT_ONCE = 512
_MAX_BYTES = 2**33


@dataclass(frozen=True, slots=True, eq=False)
class Classifier:
    """The linear classifier of one modality: logits = features @ weight.T + bias.

    Attributes:
        weight: float32 [K, D].
        bias: float32 [K]; one classifier of joined features gives each modality half of it.
    """

    weight: np.ndarray
    bias: np.ndarray


@dataclass(frozen=True, slots=True, eq=False)
class ModalityFeatures:
    """The features of n segments, as one network, or the cache, has them.

    Attributes:
        title: says whose they are.
        visual: float32 [n, n_clips, D_v].
        audio: float32 [n, n_clips, D_a]; of no meaning where there is no sound.
        heard: bool [n].
        classify_visual, classify_audio: None where nothing classifies, as in the cache.
    """

    title: str
    segments: tuple[Segment, ...]
    visual: np.ndarray
    audio: np.ndarray
    heard: np.ndarray
    classify_visual: Classifier | None = None
    classify_audio: Classifier | None = None


def read_cached_features(places: DataPlaces, runs_dir: Path, record: RunRecord, network: int = 0) -> ModalityFeatures:
    """Read the features that a run of alignment was trained on, of every test segment of its shift."""
    rows, segments = _open_rows(places, runs_dir, record, network)
    index = rows.find([segment.segment_id for segment in segments])
    visual, audio = [], []
    for batch in _iterate_clips(rows, index, one_clip=True):
        visual.append(_join_outputs(batch).numpy())
        audio.append(batch.audio.numpy())
    heard = rows.has_audio[index].numpy()
    return ModalityFeatures("cached features", segments, np.stack(visual, axis=1), np.stack(audio, axis=1), heard)


@torch.inference_mode()
def read_projected_features(
    places: DataPlaces, runs_dir: Path, record: RunRecord, network: int = 0
) -> ModalityFeatures:
    """Compute f^v and f^a, what a run's classifiers see, of every test segment of its shift.

    Of several views the first is projected. With `network.clips` `one` each clip has features of its own. Raises
    RunError where the run's checkpoint is gone, or the features that it was trained on.
    """
    name = _list_networks(record)[network]
    path = runs_dir / "steps" / _name_step(record, name) / _CHECKPOINT
    if not path.is_file():
        raise RunError(f"{path} is gone; run `echoshift align` for {record.shift}, seed {record.seed}, again")
    rows, segments = _open_rows(places, runs_dir, record, network)
    inputs = _find_inputs(places, runs_dir, record, network)
    if read_header(path).get("features") != inputs.key:
        raise RunError(f"{path} was trained on other features than lie in {places.cache_dir} now; run alignment again")
    streams, config = _load_streams(path, record, network, rows, len(places.card.classes))
    index = rows.find([segment.segment_id for segment in segments])
    target = find_shift(places.card, record.shift).target
    is_target = np.array([segment.domain == target for segment in segments])
    visual, audio = [], []
    for batch in _iterate_clips(rows, index, one_clip=config.alignment.network.clips == "one"):
        parts = [_encode(streams, batch, is_target, domain) for domain in ("source", "target")]
        visual.append(np.where(is_target[:, None], parts[1][0], parts[0][0]))
        audio.append(np.where(is_target[:, None], parts[1][1], parts[0][1]))
    heard = rows.has_audio[index].numpy()
    return ModalityFeatures(
        find_method(record),
        segments,
        np.stack(visual, axis=1),
        np.stack(audio, axis=1),
        heard,
        *_get_classifiers(streams),
    )


def _encode(
    streams: TwoStreams, batch: FeatureBatch, is_target: np.ndarray, domain: Domain
) -> tuple[np.ndarray, np.ndarray]:
    """Encode a batch as segments of a domain; statistics of a domain's own make the difference (AdaBN)."""
    found = [
        streams.encode(
            FeatureBatch(
                {name: values[start : start + _N_AT_ONCE] for name, values in batch.visual.items()},
                batch.audio[start : start + _N_AT_ONCE],
                batch.has_audio[start : start + _N_AT_ONCE],
            ),
            domain,
        )
        for start in range(0, len(is_target), _N_AT_ONCE)
    ]
    visual, audio = (torch.cat([part[i] for part in found]).numpy() for i in range(2))
    return visual, audio


def _load_streams(
    path: Path, record: RunRecord, network: int, rows: FeatureRows, n_classes: int
) -> tuple[TwoStreams, AlignmentStageConfig]:
    described = record.config["streams"][network]["alignment"]
    config = AlignmentStageConfig.model_validate(described)
    method = find_alignment_method(config.alignment.method)
    of_domain = bool(getattr(method and method.kind, "domain_statistics", False))
    streams = TwoStreams(config.alignment.network, rows.describe_shapes(), n_classes, per_domain_statistics=of_domain)
    prefix = "streams."
    tensors = {n.removeprefix(prefix): t for n, t in read_tensors(path).items() if n.startswith(prefix)}
    if not tensors:
        raise RunError(f"{path}: {config.alignment.method} has no two streams whose features could be drawn")
    check_tensors(tensors, streams.state_dict(), str(path))
    streams.load_state_dict(tensors)
    return streams.eval(), config


def _get_classifiers(streams: TwoStreams) -> tuple[Classifier | None, Classifier | None]:
    def take(weight: torch.Tensor, bias: torch.Tensor) -> Classifier:
        return Classifier(weight.detach().numpy().copy(), bias.detach().numpy().copy())

    both, visual, audio = streams.classify_both, streams.classify_visual, streams.classify_audio
    if both is not None:
        width = streams.config.width
        return take(both.weight[:, :width], both.bias / 2), take(both.weight[:, width:], both.bias / 2)
    return (
        None if visual is None else take(visual.weight, visual.bias),
        None if audio is None else take(audio.weight, audio.bias),
    )


def _iterate_clips(rows: FeatureRows, index: np.ndarray, *, one_clip: bool) -> list[FeatureBatch]:
    """Return batches of the first view of segments: one a clip, or a single one of all clips."""
    chosen = torch.from_numpy(index)
    view = torch.zeros_like(chosen)
    clips = [torch.full_like(chosen, clip) for clip in range(rows.n_clips)] if one_clip else [None]
    return [rows.gather(chosen, view, clip) for clip in clips]


def _join_outputs(batch: FeatureBatch) -> torch.Tensor:
    """Return one vector a segment: outputs side by side, each the mean over its clips and tokens."""
    means = [values.float().flatten(1, -2).mean(dim=1) for values in batch.visual.values()]
    return torch.cat(means, dim=-1)


def _open_rows(
    places: DataPlaces, runs_dir: Path, record: RunRecord, network: int
) -> tuple[FeatureRows, tuple[Segment, ...]]:
    """Open the features of the test segments of a shift's domains, those that have any."""
    inputs = _find_inputs(places, runs_dir, record, network)
    segments = _list_test_segments(places, inputs, record)
    if not segments:
        raise RunError(f"no test segment of {record.shift} has features in {inputs.features}; extract them")
    ids = [segment.segment_id for segment in segments]
    return open_stream(inputs, ids, _MAX_BYTES), segments


def _list_test_segments(places: DataPlaces, inputs: StreamInputs, record: RunRecord) -> tuple[Segment, ...]:
    shift = find_shift(places.card, record.shift)
    kept = _list_done(inputs.features)
    if inputs.sound is not None:
        kept &= _list_done(inputs.sound)
    domains = {*shift.source, shift.target}
    return tuple(
        segment
        for segment in places.manifest
        if segment.split == TEST and segment.domain in domains and segment.segment_id in kept
    )


def _list_done(path: Path) -> set[str]:
    store = open_store(path)
    return {s for s, state in zip(store.segment_ids, store.read_array("state"), strict=True) if state == DONE}


def _find_inputs(places: DataPlaces, runs_dir: Path, record: RunRecord, network: int) -> StreamInputs:
    """Find what a network was trained on, by what its record says."""
    stage1 = record.config["streams"][network]["stage1"]
    if stage1 is None:
        raise RunError(
            f"{record.shift}, seed {record.seed}: features that were named by their files can't be found anew"
        )
    if set(stage1) == {"visual", "sound"}:
        return find_cached(places.cache_dir, places.card.name, stage1["visual"], stage1["sound"])
    records = read_runs(runs_dir / RESULTS)
    return find_stage1_outputs(runs_dir, records, hash_config(stage1), record.shift, record.seed)


def _list_networks(record: RunRecord) -> Sequence[str]:
    return [name.removeprefix("trained_") for name in record.steps if name.startswith("trained_")]


def _name_step(record: RunRecord, network: str) -> str:
    return f"{find_method(record)}_{network}-{record.steps[f'trained_{network}']}"
