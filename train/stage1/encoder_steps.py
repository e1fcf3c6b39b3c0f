"""Stage 1's steps that see: training the encoder, its predictions, and stores of adapted features."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from echoshift.extract.encoders.registry import find_encoder
from echoshift.extract.weights.load import load_encoder
from echoshift.pipeline.errors import RunError
from echoshift.pipeline.segments import Segment
from echoshift.pipeline.specs import FeatureSpec, OutputSpec, fingerprint
from echoshift.train.alignment.config import keep_used
from echoshift.train.splits import LabelledSegments
from echoshift.train.stage1.audio_adaptive_encoder import (
    AudioAdaptiveEncoder,
    CheckpointFacts,
    SegmentPrediction,
    build_encoder,
    predict_segments,
    read_checkpoint,
    write_checkpoint,
)
from echoshift.train.stage1.encoder_training import STATE, EncoderTask, EpochRecord, train_encoder
from echoshift.train.stage1.exporting import export_features, predict_all
from echoshift.train.stage1.input_stores import choose_visual
from echoshift.train.stage1.run_context import RunContext
from echoshift.train.stage1.run_inputs import list_train_segments, name_labels
from echoshift.train.stage1.sample_weights import map_to_pairs, weight_segments
from echoshift.train.stage1.sound_steps import PREDICTIONS, find_clusters, get_clustered_part, mark_absent
from echoshift.train.stage1.visual_inputs import VisualInputs
from echoshift.train.steps import Step, StepResult, hash_json

CHECKPOINT = "encoder.safetensors"


def train(context: RunContext) -> StepResult:
    """Train the encoder (METHODS 5.6); what it doesn't use, sound for one, isn't asked for."""
    config, inputs, splits = context.config, context.inputs, context.splits
    described = config.describe()
    settings = {name: described[name] for name in ("attention", "training", "balance")}
    settings["training"] |= {"lr": config.training.find_lr(context.request.shift.source), "lr_by_source": {}}
    settings["visual"] = {k: v for k, v in described["visual"].items() if k not in ("test_preset", "n_views")}
    clusters = find_clusters(context) if config.balance.kind == "audio" else None
    absent = mark_absent(context) if config.absent.weight and splits.target_train else None
    named = {
        "visual": inputs.visual_name,
        "source": context.source_name,
        "target": hash_json([segment.segment_id for segment in splits.target_train]),
        "labelled": name_labels(splits.target_labelled),
        "clips": inputs.name_clips(list_train_segments(splits)),
    }
    if config.attention.enabled or config.objective.enabled:
        named["sound"] = f"{inputs.sound_name} {inputs.name_sound(list_train_segments(splits))}"
    if config.objective.enabled:
        settings["objective"] = keep_used(described["objective"])
    if clusters is not None:
        named["clusters"] = clusters.key
    if absent is not None:
        named["absent"] = absent.key
    settings |= {"absent_weight": config.absent.weight, "seed": context.request.seed}
    settings["classes"] = list(context.card.classes)
    step = Step("encoder", 1, settings, named)
    return context.run(step, lambda folder: _train(context, folder, clusters, absent), together=True)


def _train(
    context: RunContext, folder: Path, clusters: StepResult | None, absent: StepResult | None
) -> Mapping[str, Any]:
    config, splits = context.config, context.splits
    if config.objective.enabled and len(splits.target_labelled):
        raise RunError(
            f"{context.request.shift.name}: an objective has no use for the target's labels; set "
            f"target_labels.use_tags=false, and no target_labels.labelled_fraction"
        )
    sees_target = absent is not None or (config.objective.enabled and config.objective.setting == "uda")
    target = splits.target_train if sees_target else ()
    model = _build(context)
    source_clusters, labelled_clusters = _read_clusters(context, clusters)
    task = EncoderTask(
        source=splits.source_train,
        source_weights=weight_segments(splits.source_train, source_clusters, config.balance),
        labelled=splits.target_labelled,
        labelled_weights=weight_segments(splits.target_labelled, labelled_clusters, config.balance),
        target_ids=tuple(segment.segment_id for segment in target),
        absent=_read_absent(context, absent, len(target)),
        source_val=splits.source_val,
        validation_spec=context.inputs.test.spec,
        classes=context.card.classes,
        absent_weight=config.absent.weight,
        multi_label=context.multi_label,
    )
    training = config.training
    lr = training.find_lr(context.request.shift.source)
    records = train_encoder(
        model,
        task,
        context.visual,
        context.inputs.sound,
        training,
        folder,
        lr=lr,
        seed=context.request.seed,
        device=context.device,
        ranks=context.ranks,
        watcher=context.watcher,
        title=f"{context.title}: encoder",
    )
    if not context.ranks.is_first:
        return {}
    sound = context.inputs.sound_choice
    facts = CheckpointFacts(
        encoder=config.visual.encoder,
        weights=context.inputs.train.weights.sha256,
        sound_weights=sound.weights.sha256,
        sound=context.inputs.sound_name,
        classes=context.card.classes,
        config=config.model_dump_json(),
    )
    identity = write_checkpoint(folder / CHECKPOINT, model, facts)
    (folder / STATE).unlink(missing_ok=True)
    return {"identity": identity, "lr": lr, "epochs": [_describe(record) for record in records]}


def _describe(record: EpochRecord) -> dict[str, Any]:
    return {"epoch": record.epoch, "losses": dict(record.losses), "source_validation": record.validation}


def _build(context: RunContext) -> AudioAdaptiveEncoder:
    choice, sound = context.inputs.train, context.inputs.sound_choice
    hears = context.config.objective.enabled
    return build_encoder(
        load_encoder(choice.spec.encoder, choice.weights),
        context.inputs.sound.map_shape[0],
        len(context.card.classes),
        context.config,
        seed=context.request.seed,
        sound_network=load_encoder(sound.spec.encoder, sound.weights) if hears else None,
        source_domains=sorted({segment.domain for segment in context.splits.source_train.segments}),
        multi_label=context.multi_label,
    )


def _read_clusters(context: RunContext, clusters: StepResult | None) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Read the clusters of the source's and of the labelled target's segments; None for those without."""
    if clusters is None:
        return None, None
    found = np.load(clusters.folder / "clusters.npy", allow_pickle=False)
    clustered = get_clustered_part(context)
    if clustered is context.splits.source_train:
        return found, None
    source: LabelledSegments = context.splits.source_train
    return map_to_pairs(found, clustered.segments, source.segments), found


def _read_absent(context: RunContext, absent: StepResult | None, n_target: int) -> np.ndarray:
    if absent is None:
        return np.zeros((n_target, len(context.card.classes)), dtype=bool)
    found: np.ndarray = np.load(absent.folder / "absent.npy", allow_pickle=False)
    return found


def predict(
    context: RunContext,
    preset: str,
    segments: Sequence[Segment],
    *,
    name: str = "predictions",
    without_sound: bool = False,
) -> StepResult:
    """Predict segments from the clips of a preset, and keep no features; `without_sound` as if they had no track."""
    encoder = train(context)
    step = Step("predictions", 1, {"preset": preset}, _name_seen(context, encoder, segments, without_sound))

    def make(folder: Path) -> Mapping[str, Any]:
        ids = [segment.segment_id for segment in segments]
        context.watcher.start(f"{context.title}: predictions", len(ids))
        with _open_trained(context, encoder, preset, (), without_sound=without_sound) as predicting:
            predict_all(ids, predicting.predict, context.watcher.advance).write(folder / PREDICTIONS)
        return {"n_segments": len(ids)}

    return context.run(step, make, name=name)


def export_store(
    context: RunContext, name: str, preset: str, segments: Sequence[Segment], *, without_sound: bool = False
) -> StepResult:
    """Write a store of adapted features of segments, and their predictions (METHODS 5.7); or as if without sound."""
    encoder = train(context)
    outputs = context.config.export.outputs
    settings = {"preset": preset, "outputs": list(outputs)}
    step = Step("features", 1, settings, _name_seen(context, encoder, segments, without_sound))

    def make(folder: Path) -> Mapping[str, Any]:
        clips = choose_visual(context.config.visual, context.request.places, preset).spec
        spec = _make_adapted_spec(clips, str(encoder.outcome["identity"]), outputs)
        path = folder / f"{spec.encoder}-{fingerprint(spec)}.zarr"
        context.watcher.start(f"{context.title}: {name.replace('_', ' ')}", len(segments))
        with _open_trained(context, encoder, preset, outputs, without_sound=without_sound) as predicting:
            predictions = export_features(
                path,
                context.card.name,
                spec,
                segments,
                predicting.predict,
                manifest_sha256=context.request.places.manifest.sha256,
                checkpoint=f"Stage 1, step encoder-{encoder.key}",
                advance=context.watcher.advance,
            )
        predictions.write(folder / PREDICTIONS)
        return {"store": path.name, "n_segments": len(segments)}

    return context.run(step, make, name=name)


def _name_seen(
    context: RunContext, encoder: StepResult, segments: Sequence[Segment], without_sound: bool = False
) -> dict[str, str]:
    """Name what a trained encoder is shown: clips, and the sound that gates them."""
    named = {"encoder": encoder.key, "clips": context.inputs.name_clips(segments)}
    if context.config.attention.enabled or context.config.objective.enabled:
        named["sound"] = "missing" if without_sound else context.inputs.name_sound(segments)
    return named


@dataclass(frozen=True, slots=True)
class _Trained:
    """A trained encoder that predicts the clips of one preset."""

    context: RunContext
    model: AudioAdaptiveEncoder
    visual: VisualInputs
    clips: FeatureSpec
    outputs: tuple[str, ...]
    without_sound: bool

    def predict(self, segment_ids: Sequence[str]) -> Iterator[SegmentPrediction]:
        """Predict segments in their order."""
        return predict_segments(
            self.model,
            self.visual.iterate_clips(segment_ids, self.clips),
            self.context.inputs.sound,
            multi_label=self.context.multi_label,
            device=self.context.device,
            outputs=self.outputs,
            without_sound=self.without_sound,
        )


@contextmanager
def _open_trained(
    context: RunContext, encoder: StepResult, preset: str, outputs: Sequence[str], *, without_sound: bool = False
) -> Iterator[_Trained]:
    model = _build(context)
    read_checkpoint(encoder.folder / CHECKPOINT, model)
    model.to(context.device).eval()
    clips = choose_visual(context.config.visual, context.request.places, preset).spec
    with context.open_clips(preset) as visual:
        yield _Trained(context, model, visual, clips, tuple(outputs), without_sound)


def _make_adapted_spec(clips: FeatureSpec, identity: str, outputs: Sequence[str]) -> FeatureSpec:
    """Make the specification of adapted features: clips as extracted, weights those of the checkpoint."""
    frame = clips.frame
    assert frame is not None, "the visual encoder sees"
    shapes = find_encoder(clips.encoder).output_shapes(clips.clip, frame)
    named = tuple(OutputSpec(name=name, shape=shapes[name]) for name in outputs)
    return clips.model_copy(update={"weights": identity, "outputs": named, "dtype": "float16"})
