"""Stage 1's steps that listen: audio classifier, its predictions, interaction clusters, absent activities."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from echoshift.extract.weights.load import load_encoder
from echoshift.pipeline.errors import RunError
from echoshift.pipeline.tensor_files import check_tensors, read_tensors
from echoshift.train.absent_activities import mark_absent_multi, mark_absent_single
from echoshift.train.splits import LabelledSegments
from echoshift.train.stage1.audio_classifier import (
    AudioClassifier,
    AudioPredictions,
    predict_audio,
    train_audio_classifier,
)
from echoshift.train.stage1.clustering import cluster_interactions
from echoshift.train.stage1.run_context import RunContext, write_array
from echoshift.train.stage1.run_inputs import list_segments, name_labels
from echoshift.train.steps import Step, StepResult

PREDICTIONS = "predictions.npz"
_CLASSIFIER = "classifier.safetensors"


def classify_sound(context: RunContext) -> StepResult:
    """Train the audio classifier on the source, once for all its targets (METHODS 5.1)."""
    source, config, inputs = context.splits.source_train, context.config.audio_classifier, context.inputs
    step = Step(
        "audio_classifier",
        1,
        {**config.model_dump(mode="json"), "seed": context.request.seed, "classes": list(context.card.classes)},
        {"sound": f"{inputs.sound_name} {inputs.name_sound(source.segments)}", "source": context.source_name},
    )

    def make(folder: Path) -> Mapping[str, Any]:
        choice = inputs.sound_choice
        ids = [segment.segment_id for segment in source.segments]
        context.watcher.start(f"{context.title}: audio classifier", len(ids) * config.n_epochs)
        model, losses = train_audio_classifier(
            load_encoder(choice.spec.encoder, choice.weights),
            inputs.sound,
            ids,
            source.labels,
            len(context.card.classes),
            config,
            seed=context.request.seed,
            device=context.device,
            advance=context.watcher.advance,
        )
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
        save_file(tensors, folder / _CLASSIFIER)
        return {"losses": losses, "n_segments": len(ids)}

    return context.run(step, make)


def predict_sound(context: RunContext) -> StepResult:
    """Predict every segment of the shift from its sound."""
    classifier = classify_sound(context)
    segments = list_segments(context.splits)
    step = Step(
        "audio_predictions", 1, {}, {"classifier": classifier.key, "sound": context.inputs.name_sound(segments)}
    )

    def make(folder: Path) -> Mapping[str, Any]:
        model = _load_classifier(context, classifier.folder / _CLASSIFIER)
        ids = [segment.segment_id for segment in segments]
        context.watcher.start(f"{context.title}: audio predictions", len(ids))
        found = predict_audio(
            model,
            context.inputs.sound,
            ids,
            multi_label=context.multi_label,
            device=context.device,
            advance=context.watcher.advance,
        )
        found.write(folder / PREDICTIONS)
        return {"n_segments": len(ids), "n_silent": int((~found.has_audio).sum())}

    return context.run(step, make)


def find_clusters(context: RunContext) -> StepResult:
    """Find interaction clusters by the frozen audio network's pooled features (METHODS 5.2)."""
    part = get_clustered_part(context)
    if not len(part):
        raise RunError(
            f"{context.request.shift.name}: no segment of the target is labelled, so there is no sound of it to "
            f"cluster; use target_labels.clusters_from=source, or balance.kind=class"
        )
    config, sound, classes = context.config.clusters, context.inputs.sound, context.card.classes
    step = Step(
        "clusters",
        1,
        {**config.model_dump(mode="json"), "seed": context.request.seed, "classes": list(classes)},
        {
            "sound": f"{context.inputs.sound_name} {context.inputs.name_sound(part.segments)}",
            "labels": name_labels(part),
        },
    )

    def make(folder: Path) -> Mapping[str, Any]:
        ids = [segment.segment_id for segment in part.segments]
        found = cluster_interactions(
            sound.read_pooled(ids),
            part.labels,
            sound.has_audio(ids),
            classes,
            config.max_clusters,
            config.n_init,
            context.request.seed,
        )
        write_array(folder / "clusters.npy", found.assignment)
        return {"classes": [asdict(found_class) for found_class in found.classes]}

    return context.run(step, make)


def get_clustered_part(context: RunContext) -> LabelledSegments:
    """Return the segments whose sound is clustered (METHODS 9)."""
    if context.config.target_labels.clusters_from == "labelled-target":
        return context.splits.target_labelled
    return context.splits.source_train


def mark_absent(context: RunContext) -> StepResult:
    """Mark the absent activities of the target's train split (Eq. 1)."""
    audio, classifier = predict_sound(context), classify_sound(context)
    target = context.splits.target_train
    ids = [segment.segment_id for segment in target]
    config = context.config.absent
    settings: dict[str, Any] = {"task": context.card.task}
    settings |= {"gamma": config.gamma} if context.multi_label else {"n_absent": config.n_absent}
    # Not the key of all predictions: what a test segment sounds like must not train the encoder anew.
    named = {"classifier": classifier.key, "sound": context.inputs.name_sound(target)}
    step = Step("absent_labels", 1, settings, named)

    def make(folder: Path) -> Mapping[str, Any]:
        heard = AudioPredictions.read(audio.folder / PREDICTIONS).select(ids)
        if context.multi_label:
            shares = context.splits.source_train.labels.mean(axis=0)
            absent = mark_absent_multi(heard.probabilities, heard.has_audio, shares, config.gamma)
        else:
            absent = mark_absent_single(heard.probabilities, heard.has_audio, config.n_absent)
        write_array(folder / "absent.npy", absent)
        counts = dict(zip(context.card.classes, absent.sum(axis=0).tolist(), strict=True))
        return {"n_segments": len(ids), "n_absent_by_class": counts, "n_silent": int((~heard.has_audio).sum())}

    return context.run(step, make)


def _load_classifier(context: RunContext, path: Path) -> AudioClassifier:
    choice = context.inputs.sound_choice
    network = load_encoder(choice.spec.encoder, choice.weights)
    model = AudioClassifier(network, context.inputs.sound.n_features, len(context.card.classes))
    tensors = read_tensors(path)
    check_tensors(tensors, model.state_dict(), str(path))
    model.load_state_dict(tensors, strict=True)
    device: torch.device = context.device
    return model.to(device).eval()
