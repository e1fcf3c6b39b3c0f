"""The features that figures are drawn of: of both modalities, cached and projected, and before and after Stage 1."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from echoshift.pipeline.errors import RunError
from echoshift.pipeline.segments import Segment
from echoshift.pipeline.store.interface import FeatureStore
from echoshift.pipeline.store.layout import DONE
from echoshift.pipeline.store.open import list_stores, open_store
from echoshift.pipeline.tensor_files import check_tensors, read_header, read_tensors
from echoshift.train.alignment.config import AlignmentStageConfig
from echoshift.train.alignment.method import find_method
from echoshift.train.alignment.two_streams import TwoStreams
from echoshift.train.features import FeatureBatch, FeatureRows, StreamInputs, open_stream, read_visual
from echoshift.train.look.run_choice import describe_run, get_method
from echoshift.train.loop import Domain
from echoshift.train.runs import RESULTS, RunRecord, hash_config, read_runs
from echoshift.train.splits import TEST, DataPlaces, find_shift
from echoshift.train.stage2.inputs import find_cached, find_stage1_outputs
from echoshift.train.steps import RECORD

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
        frames: float32 [n, n_clips, D_v].
        audio: float32 [n, n_clips, D_a]; without meaning where there is no sound.
        has_audio: bool [n].
        classify_frames, classify_audio: None where nothing classifies, as in the cache.
    """

    title: str
    segments: tuple[Segment, ...]
    frames: np.ndarray
    audio: np.ndarray
    has_audio: np.ndarray
    classify_frames: Classifier | None = None
    classify_audio: Classifier | None = None

    def join(self) -> np.ndarray:
        """Join the means over clips of both modalities, float32 [n, D_v + D_a]; zeros where there is no sound."""
        audio = np.where(self.has_audio[:, None], self.audio.mean(axis=1), 0)
        return np.concatenate([self.frames.mean(axis=1), audio], axis=1).astype(np.float32)


def read_cached_features(places: DataPlaces, runs_dir: Path, record: RunRecord) -> ModalityFeatures:
    """Read the features that the first network of a run of alignment was trained on, of its shift's test segments."""
    _, rows, segments = _open_rows(places, runs_dir, record)

    def average(batch: FeatureBatch) -> tuple[np.ndarray, np.ndarray]:
        means = [values.float().flatten(1, -2).mean(dim=1) for values in batch.visual.values()]
        return torch.cat(means, dim=-1).numpy(), batch.audio.numpy()

    return _collect("cached features", rows, segments, average, one_clip=True)


@torch.inference_mode()
def read_projected_features(places: DataPlaces, runs_dir: Path, record: RunRecord) -> ModalityFeatures:
    """Compute f^v and f^a, what the classifiers of a run's first network see, of its shift's test segments.

    Of several views the first is projected. With `network.clips` `one` each clip has features of its own. Raises
    RunError where the run's checkpoint is gone, or the features that it was trained on.
    """
    name = next(step.removeprefix("trained_") for step in record.steps if step.startswith("trained_"))
    folder = f"{get_method(record)}_{name}-{record.steps[f'trained_{name}']}"
    path = runs_dir / "steps" / folder / _CHECKPOINT
    if not path.is_file():
        raise RunError(f"{path} is gone; run `echoshift align` for {record.shift}, seed {record.seed}, again")
    inputs, rows, segments = _open_rows(places, runs_dir, record)
    if read_header(path).get("features") != inputs.key:
        raise RunError(f"{path} was trained on other features than lie in {places.cache_dir} now; run alignment again")
    streams, one_clip = _load_streams(path, record, rows, len(places.card.classes))
    target = find_shift(places.card, record.shift).target
    is_target = np.array([segment.domain == target for segment in segments])

    def project(batch: FeatureBatch) -> tuple[np.ndarray, np.ndarray]:
        source, of_target = (_encode(streams, batch, domain) for domain in ("source", "target"))
        frames, audio = (np.where(is_target[:, None], of_target[i], source[i]) for i in (0, 1))
        return frames, audio

    return _collect(get_method(record), rows, segments, project, one_clip, *_get_classifiers(streams))


def _collect(
    title: str,
    rows: FeatureRows,
    segments: tuple[Segment, ...],
    compute: Callable[[FeatureBatch], tuple[np.ndarray, np.ndarray]],
    one_clip: bool,
    *classifiers: Classifier | None,
) -> ModalityFeatures:
    """Compute features of the first view of segments, clip by clip or of all clips at once."""
    index = rows.find([segment.segment_id for segment in segments])
    chosen = torch.from_numpy(index)
    clips = [torch.full_like(chosen, clip) for clip in range(rows.n_clips)] if one_clip else [None]
    parts = [compute(rows.gather(chosen, clips=clip)) for clip in clips]
    frames, audio = (np.stack([part[i] for part in parts], axis=1) for i in (0, 1))
    return ModalityFeatures(title, segments, frames, audio, rows.has_audio[index].numpy(), *classifiers)


def _encode(streams: TwoStreams, batch: FeatureBatch, domain: Domain) -> tuple[np.ndarray, np.ndarray]:
    """Encode a batch as segments of a domain; statistics of a domain's own make the difference (AdaBN)."""
    starts = range(0, len(batch.audio), _N_AT_ONCE)
    found = [streams.encode(batch.cut(start, start + _N_AT_ONCE), domain) for start in starts]
    frames, audio = (torch.cat([part[i] for part in found]).numpy() for i in (0, 1))
    return frames, audio


def _load_streams(path: Path, record: RunRecord, rows: FeatureRows, n_classes: int) -> tuple[TwoStreams, bool]:
    config = AlignmentStageConfig.model_validate(record.config["streams"][0]["alignment"])
    method = find_method(config.alignment.method)
    of_domain = bool(getattr(method and method.kind, "domain_statistics", False))
    streams = TwoStreams(config.alignment.network, rows.describe_shapes(), n_classes, per_domain_statistics=of_domain)
    prefix = "streams."
    tensors = {n.removeprefix(prefix): t for n, t in read_tensors(path).items() if n.startswith(prefix)}
    if not tensors:
        raise RunError(f"{path}: {config.alignment.method} has no two streams whose features could be drawn")
    check_tensors(tensors, streams.state_dict(), str(path))
    streams.load_state_dict(tensors)
    return streams.eval(), config.alignment.network.clips == "one"


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


def _open_rows(
    places: DataPlaces, runs_dir: Path, record: RunRecord
) -> tuple[StreamInputs, FeatureRows, tuple[Segment, ...]]:
    """Open what a run's first network was trained on, of the test segments of its shift's domains that have any."""
    stage1 = record.config["streams"][0]["stage1"]
    if stage1 is None:
        raise RunError(
            f"{describe_run(record)}: it was trained on files named on the command line, which its record doesn't "
            f"keep; run it on the cache or on a run of Stage 1"
        )
    if set(stage1) == {"visual", "sound"}:
        inputs = find_cached(places.cache_dir, places.card.name, stage1["visual"], stage1["sound"])
    else:
        records = read_runs(runs_dir / RESULTS)
        inputs = find_stage1_outputs(runs_dir, records, hash_config(stage1), record.shift, record.seed)
    stores = [open_store(path) for path in (inputs.features, inputs.sound) if path is not None]
    segments = _list_test_segments(places, record, stores)
    if not segments:
        raise RunError(f"no test segment of {record.shift} has features in {inputs.features}; extract them")
    rows = open_stream(inputs, [segment.segment_id for segment in segments], _MAX_BYTES)
    return inputs, rows, tuple(segments)


def _list_test_segments(places: DataPlaces, record: RunRecord, stores: list[FeatureStore]) -> list[Segment]:
    """List the test segments of a shift's domains that all stores have, in the manifest's order."""
    shift = find_shift(places.card, record.shift)
    done = [{s for s, state in zip(x.segment_ids, x.read_array("state"), strict=True) if state == DONE} for x in stores]
    kept, domains = set.intersection(*done), {*shift.source, shift.target}
    return [s for s in places.manifest if s.split == TEST and s.domain in domains and s.segment_id in kept]


def read_adaptation(
    places: DataPlaces, runs_dir: Path, record: RunRecord
) -> tuple[list[Segment], list[tuple[str, FeatureStore]]]:
    """Open the features of a shift's test segments before and after a run of Stage 1, each store with a title.

    Raises RunError where the cache has no pooled features of the run's encoder, or the run exported none.
    """
    after = open_adapted_store(runs_dir, record)
    before = find_cached_store(places, record, after)
    titles = (f"before: {before.spec.encoder} as extracted", f"after: {describe_run(record)}")
    return _list_test_segments(places, record, [before, after]), list(zip(titles, (before, after), strict=True))


def read_means(store: FeatureStore, segments: list[Segment]) -> np.ndarray:
    """Read segments' features, float32 [n, D]: outputs side by side, each the mean over views, clips and tokens."""
    found = read_visual(store, [segment.segment_id for segment in segments])
    return np.concatenate([values.float().flatten(1, -2).mean(dim=1).numpy() for values in found.values()], axis=1)


def open_stores(places: DataPlaces) -> list[FeatureStore]:
    """Open the stores of a dataset that lie in the cache, by path."""
    stores = [open_store(path) for path in list_stores(places.cache_dir)]
    return [store for store in stores if store.attributes["dataset"] == places.card.name]


def open_adapted_store(runs_dir: Path, record: RunRecord) -> FeatureStore:
    """Open the features that a run of Stage 1 exported; raises RunError where it has none."""
    folder = runs_dir / "steps" / f"features-{record.steps.get('features', 'none')}"
    try:
        name = json.loads((folder / RECORD).read_text(encoding="utf-8"))["outcome"]["store"]
    except (OSError, ValueError, KeyError) as error:
        raise RunError(f"{describe_run(record)} exported no features; run `echoshift stage1` with --export") from error
    return open_store(folder / str(name))


def find_cached_store(places: DataPlaces, record: RunRecord, adapted: FeatureStore) -> FeatureStore:
    """Find the pooled features of a run's visual encoder in the cache; raises RunError where there are none.

    Of several stores it is that of the same clips as the adapted features, if there is one, and else the longest.
    """
    encoder = str(record.config["visual"]["encoder"])
    found = [
        store
        for store in open_stores(places)
        if store.spec.encoder == encoder and [output.name for output in store.spec.outputs] == ["pooled"]
    ]
    if not found:
        raise RunError(
            f"{places.cache_dir} has no pooled features of {places.card.name} by {encoder}, from before adaptation; "
            f"extract them (--encoders {encoder})"
        )
    return max(found, key=lambda store: (store.spec.clip == adapted.spec.clip, len(store.segment_ids)))
