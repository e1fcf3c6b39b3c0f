"""Stage 1's steps, each named by what it reads: audio classifier, clusters, encoder, predictions, features, table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from echoshift.extract.encoders.registry import find_encoder
from echoshift.extract.weights.load import load_encoder
from echoshift.pipeline.cards import DatasetCard, Shift
from echoshift.pipeline.errors import RunError
from echoshift.pipeline.segments import Segment
from echoshift.pipeline.specs import FeatureSpec, OutputSpec, fingerprint
from echoshift.pipeline.tensor_files import check_tensors, read_tensors
from echoshift.train.alignment.config import keep_used
from echoshift.train.predictions import AudioPredictions, Predictions, write_prediction_table
from echoshift.train.ranks import Ranks
from echoshift.train.splits import DataPlaces, LabelledSegments, ShiftSplits
from echoshift.train.stage1.audio import AudioClassifier, predict_audio, train_audio_classifier
from echoshift.train.stage1.balancing import cluster_interactions, map_to_pairs, weight_segments
from echoshift.train.stage1.clips import ClipSource
from echoshift.train.stage1.config import Stage1Config
from echoshift.train.stage1.encoder import (
    CHECKPOINT,
    AudioAdaptiveEncoder,
    CheckpointFacts,
    build_encoder,
    read_checkpoint,
    write_checkpoint,
)
from echoshift.train.stage1.export import SegmentPrediction, export_features, predict_segments
from echoshift.train.stage1.inputs import RunInputs, choose_visual, list_segments, list_train_segments
from echoshift.train.stage1.losses import mark_absent_multi, mark_absent_single
from echoshift.train.stage1.training import STATE, EncoderTask, train_encoder
from echoshift.train.steps import Step, StepResult, StepRunner, hash_json
from echoshift.train.watching import EpochWatcher

PREDICTIONS = "predictions.npz"
TABLE = "table.parquet"
_CLASSIFIER = "classifier.safetensors"


@dataclass(frozen=True, slots=True)
class Stage1Request:
    """Request for one run.

    Attributes:
        runs_dir: where steps and results lie, `runs/DATASET`.
        row: the grid's row that asks for it.
        export: whether adapted features, and the table for Stage 2, are wanted, or scores alone.
        rerun: names of steps that are done again.
    """

    places: DataPlaces
    shift: Shift
    seed: int
    config: Stage1Config
    runs_dir: Path
    row: str = ""
    export: bool = True
    rerun: frozenset[str] = frozenset()


@dataclass(slots=True)
class RunContext:
    """A run in progress; `results` are the steps that were asked for so far, by name."""

    request: Stage1Request
    inputs: RunInputs
    clips: ClipSource
    runner: StepRunner
    ranks: Ranks
    watcher: EpochWatcher
    device: torch.device
    results: dict[str, StepResult] = field(default_factory=dict)

    @property
    def config(self) -> Stage1Config:
        """The run's configuration."""
        return self.request.config

    @property
    def card(self) -> DatasetCard:
        """The data set's card."""
        return self.request.places.card

    @property
    def splits(self) -> ShiftSplits:
        """The shift's segments, without those that failed to be extracted."""
        return self.inputs.splits

    @property
    def multi_label(self) -> bool:
        """Whether a segment may have any number of classes."""
        return self.card.task == "multi-label"

    @property
    def decided_by(self) -> dict[str, Any]:
        """Seed and classes, which decide every step that trains."""
        return {"seed": self.request.seed, "classes": list(self.card.classes)}

    @property
    def title(self) -> str:
        """The run's name in a line of progress."""
        row = f", {self.request.row}" if self.request.row else ""
        return f"{self.request.shift.name}, seed {self.request.seed}{row}"

    def run(
        self, step: Step, make: Callable[[Path], Mapping[str, Any]], *, name: str = "", together: bool = False
    ) -> StepResult:
        """Run a step once; of several processes the first does it, or all `together` while the first keeps the record.

        `name` is what the run calls the step, where it has several of a kind. A step that others ask for again isn't
        looked at twice, let alone rerun twice.
        """
        folder = self.runner.find_folder(step)
        result = next((known for known in self.results.values() if known.folder == folder), None)
        if result is None and self.ranks.n_ranks == 1:
            result = self.runner.run(step, make)
        elif result is None:
            result = self._run_in_ranks(step, make, together)
        self.results[name or step.name] = result
        return result

    def _run_in_ranks(self, step: Step, make: Callable[[Path], Mapping[str, Any]], together: bool) -> StepResult:
        is_done = self.runner.is_done(step)
        self.ranks.wait()  # nobody looks any more before somebody begins
        if together and not is_done and not self.ranks.is_first:
            make(self.runner.find_folder(step))
        if self.ranks.is_first:
            self.runner.run(step, make)
        self.ranks.wait()
        return self.runner.run(step, make)


def classify_audio(context: RunContext) -> StepResult:
    """Train the audio classifier on the source, once for all its targets (METHODS 5.1)."""
    source, config, inputs = context.splits.source_train, context.config.audio_classifier, context.inputs
    step = Step(
        "audio_classifier",
        1,
        config.model_dump(mode="json") | context.decided_by,
        {"sound": f"{inputs.audio_name} {inputs.name_audio(source.segments)}", "source": _name_labels(source)},
    )

    def make(folder: Path) -> Mapping[str, Any]:
        ids = _list_ids(source.segments)
        context.watcher.start(f"{context.title}: audio classifier", len(ids) * config.n_epochs)
        model, losses = train_audio_classifier(
            load_encoder(inputs.audio_choice.spec.encoder, inputs.audio_choice.weights),
            inputs.audio,
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


def predict_from_audio(context: RunContext) -> StepResult:
    """Predict every segment of the shift from its audio."""
    classifier, inputs = classify_audio(context), context.inputs
    segments = list_segments(context.splits)
    named = {"classifier": classifier.key, "sound": inputs.name_audio(segments)}

    def make(folder: Path) -> Mapping[str, Any]:
        network = load_encoder(inputs.audio_choice.spec.encoder, inputs.audio_choice.weights)
        model = AudioClassifier(network, inputs.audio.n_features, len(context.card.classes))
        path = classifier.folder / _CLASSIFIER
        tensors = read_tensors(path)
        check_tensors(tensors, model.state_dict(), str(path))
        model.load_state_dict(tensors, strict=True)
        ids = _list_ids(segments)
        context.watcher.start(f"{context.title}: audio predictions", len(ids))
        found = predict_audio(
            model.to(context.device).eval(),
            inputs.audio,
            ids,
            multi_label=context.multi_label,
            device=context.device,
            advance=context.watcher.advance,
        )
        found.write(folder / PREDICTIONS)
        return {"n_segments": len(ids), "n_silent": int((~found.has_audio).sum())}

    return context.run(Step("audio_predictions", 1, {}, named), make)


def find_clusters(context: RunContext) -> StepResult:
    """Find interaction clusters by the frozen audio network's pooled features (METHODS 5.2)."""
    part = _get_clustered_part(context)
    if not len(part):
        raise RunError(
            f"{context.request.shift.name}: no segment of the target is labelled, so there is no audio of it to "
            f"cluster; use target_labels.clusters_from=source, or balance.kind=class"
        )
    config, inputs = context.config.clusters, context.inputs
    step = Step(
        "clusters",
        1,
        config.model_dump(mode="json") | context.decided_by,
        {"sound": f"{inputs.audio_name} {inputs.name_audio(part.segments)}", "labels": _name_labels(part)},
    )

    def make(folder: Path) -> Mapping[str, Any]:
        ids = _list_ids(part.segments)
        found = cluster_interactions(
            inputs.audio.read_pooled(ids),
            part.labels,
            inputs.audio.has_audio(ids),
            context.card.classes,
            config.max_clusters,
            config.n_init,
            context.request.seed,
        )
        _write_array(folder / "clusters.npy", found.assignment)
        return {"classes": [asdict(found_class) for found_class in found.classes]}

    return context.run(step, make)


def mark_absent(context: RunContext) -> StepResult:
    """Mark the absent activities of the target's train split (Eq. 1)."""
    audio, classifier = predict_from_audio(context), classify_audio(context)
    target, config = context.splits.target_train, context.config.absent
    settings: dict[str, Any] = {"task": context.card.task}
    settings |= {"gamma": config.gamma} if context.multi_label else {"n_absent": config.n_absent}
    # Not the key of all predictions: what a test segment sounds like must not train the encoder again.
    named = {"classifier": classifier.key, "sound": context.inputs.name_audio(target)}

    def make(folder: Path) -> Mapping[str, Any]:
        heard = AudioPredictions.read(audio.folder / PREDICTIONS).select(_list_ids(target))
        if context.multi_label:
            shares = context.splits.source_train.labels.mean(axis=0)
            absent = mark_absent_multi(heard.probabilities, heard.has_audio, shares, config.gamma)
        else:
            absent = mark_absent_single(heard.probabilities, heard.has_audio, config.n_absent)
        _write_array(folder / "absent.npy", absent)
        counts = dict(zip(context.card.classes, absent.sum(axis=0).tolist(), strict=True))
        return {"n_segments": len(target), "n_absent_by_class": counts, "n_silent": int((~heard.has_audio).sum())}

    return context.run(Step("absent_labels", 1, settings, named), make)


def train(context: RunContext) -> StepResult:
    """Train the encoder (METHODS 5.6); what it doesn't use, audio for one, isn't asked for."""
    config, inputs, splits = context.config, context.inputs, context.splits
    described = config.describe()
    settings = {name: described[name] for name in ("attention", "training", "balance")}
    settings["training"] |= {"lr": config.training.find_lr(context.request.shift.source), "lr_by_source": {}}
    settings["visual"] = {k: v for k, v in described["visual"].items() if k not in ("test_preset", "n_views")}
    settings |= {"absent_weight": config.absent.weight, **context.decided_by}
    clusters = find_clusters(context) if config.balance.kind == "audio" else None
    absent = mark_absent(context) if config.absent.weight and splits.target_train else None
    of_train = list_train_segments(splits)
    named = {
        "visual": inputs.visual_name,
        "source": _name_labels(splits.source_train),
        "target": hash_json(_list_ids(splits.target_train)),
        "labelled": _name_labels(splits.target_labelled),
        "clips": inputs.name_clips(of_train),
    }
    if config.attention.enabled or config.objective.enabled:
        named["sound"] = f"{inputs.audio_name} {inputs.name_audio(of_train)}"
    if config.objective.enabled:
        settings["objective"] = keep_used(described["objective"])
    if clusters is not None:
        named["clusters"] = clusters.key
    if absent is not None:
        named["absent"] = absent.key
    step = Step("encoder", 1, settings, named)
    return context.run(step, lambda folder: _train(context, folder, clusters, absent), together=True)


def _train(
    context: RunContext, folder: Path, clusters: StepResult | None, absent: StepResult | None
) -> Mapping[str, Any]:
    config, splits, inputs = context.config, context.splits, context.inputs
    if config.objective.enabled and len(splits.target_labelled):
        raise RunError(
            f"{context.request.shift.name}: an objective has no use for the target's labels; set "
            f"target_labels.use_tags=false, and no target_labels.labelled_fraction"
        )
    sees_target = absent is not None or (config.objective.enabled and config.objective.setting == "uda")
    target = splits.target_train if sees_target else ()
    if absent is None:
        marks = np.zeros((len(target), len(context.card.classes)), dtype=bool)
    else:
        marks = np.load(absent.folder / "absent.npy", allow_pickle=False)
    source_clusters, labelled_clusters = _read_clusters(context, clusters)
    task = EncoderTask(
        source=splits.source_train,
        source_weights=weight_segments(splits.source_train, source_clusters, config.balance),
        labelled=splits.target_labelled,
        labelled_weights=weight_segments(splits.target_labelled, labelled_clusters, config.balance),
        target_ids=tuple(_list_ids(target)),
        absent=marks,
        source_val=splits.source_val,
        validation_spec=inputs.test.spec,
        classes=context.card.classes,
        absent_weight=config.absent.weight,
        multi_label=context.multi_label,
    )
    model, lr, request = _build(context), config.training.find_lr(context.request.shift.source), context.request
    records = train_encoder(
        model,
        task,
        context.clips,
        inputs.audio,
        config.training,
        folder,
        lr=lr,
        seed=request.seed,
        device=context.device,
        ranks=context.ranks,
        watcher=context.watcher,
        title=f"{context.title}: encoder",
    )
    if not context.ranks.is_first:
        return {}
    facts = CheckpointFacts(
        encoder=config.visual.encoder,
        weights=inputs.train.weights.sha256,
        sound_weights=inputs.audio_choice.weights.sha256,
        sound=inputs.audio_name,
        classes=context.card.classes,
        config=config.model_dump_json(),
    )
    identity = write_checkpoint(folder / CHECKPOINT, model, facts)
    (folder / STATE).unlink(missing_ok=True)
    epochs = [{"epoch": r.epoch, "losses": dict(r.losses), "source_validation": r.validation} for r in records]
    return {"identity": identity, "lr": lr, "epochs": epochs}


def _build(context: RunContext) -> AudioAdaptiveEncoder:
    visual, audio = context.inputs.train, context.inputs.audio_choice
    has_objective = context.config.objective.enabled
    return build_encoder(
        load_encoder(visual.spec.encoder, visual.weights),
        context.inputs.audio.map_shape[0],
        len(context.card.classes),
        context.config,
        seed=context.request.seed,
        audio_network=load_encoder(audio.spec.encoder, audio.weights) if has_objective else None,
        source_domains=sorted({segment.domain for segment in context.splits.source_train.segments}),
        multi_label=context.multi_label,
    )


def _read_clusters(context: RunContext, clusters: StepResult | None) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Read the clusters of the source's and of the labelled target's segments; None for those without."""
    if clusters is None:
        return None, None
    found = np.load(clusters.folder / "clusters.npy", allow_pickle=False)
    clustered, source = _get_clustered_part(context), context.splits.source_train
    if clustered is source:
        return found, None
    return map_to_pairs(found, clustered.segments, source.segments), found


def _get_clustered_part(context: RunContext) -> LabelledSegments:
    """Return the segments whose audio is clustered (METHODS 9)."""
    if context.config.target_labels.clusters_from == "labelled-target":
        return context.splits.target_labelled
    return context.splits.source_train


def predict(
    context: RunContext,
    preset: str,
    segments: Sequence[Segment],
    *,
    name: str = "predictions",
    without_audio: bool = False,
) -> StepResult:
    """Predict segments from the clips of a preset, and keep no features; `without_audio` as if they had no track."""
    encoder = train(context)
    step = Step("predictions", 1, {"preset": preset}, _name_seen(context, encoder, segments, without_audio))

    def make(folder: Path) -> Mapping[str, Any]:
        ids, rows = _list_ids(segments), []
        context.watcher.start(f"{context.title}: predictions", len(ids))
        with _open_trained(context, encoder, preset, (), without_audio=without_audio) as (predict_ids, _):
            for prediction in predict_ids(ids):
                rows.append(prediction.probabilities)
                context.watcher.advance(1)
        Predictions(tuple(ids), np.stack(rows)).write(folder / PREDICTIONS)
        return {"n_segments": len(ids)}

    return context.run(step, make, name=name)


def export_store(
    context: RunContext, name: str, preset: str, segments: Sequence[Segment], *, without_audio: bool = False
) -> StepResult:
    """Write a store of adapted features of segments, and their predictions (METHODS 5.7); or as if without audio."""
    encoder = train(context)
    outputs = context.config.export.outputs
    settings = {"preset": preset, "outputs": list(outputs)}
    step = Step("features", 1, settings, _name_seen(context, encoder, segments, without_audio))

    def make(folder: Path) -> Mapping[str, Any]:
        context.watcher.start(f"{context.title}: {name.replace('_', ' ')}", len(segments))
        with _open_trained(context, encoder, preset, outputs, without_audio=without_audio) as (predict_ids, clips):
            spec = _make_adapted_spec(clips, str(encoder.outcome["identity"]), outputs)
            path = folder / f"{spec.encoder}-{fingerprint(spec)}.zarr"
            predictions = export_features(
                path,
                context.card.name,
                spec,
                segments,
                predict_ids,
                manifest_sha256=context.request.places.manifest.sha256,
                checkpoint=f"Stage 1, step encoder-{encoder.key}",
                advance=context.watcher.advance,
            )
        predictions.write(folder / PREDICTIONS)
        return {"store": path.name, "n_segments": len(segments)}

    return context.run(step, make, name=name)


def _name_seen(
    context: RunContext, encoder: StepResult, segments: Sequence[Segment], without_audio: bool
) -> dict[str, str]:
    """Name what a trained encoder is shown: clips, and the audio that gates them."""
    named = {"encoder": encoder.key, "clips": context.inputs.name_clips(segments)}
    if context.config.attention.enabled or context.config.objective.enabled:
        named["sound"] = "missing" if without_audio else context.inputs.name_audio(segments)
    return named


@contextmanager
def _open_trained(
    context: RunContext, encoder: StepResult, preset: str, outputs: Sequence[str], *, without_audio: bool
) -> Iterator[tuple[Callable[[Sequence[str]], Iterator[SegmentPrediction]], FeatureSpec]]:
    """Open a trained encoder; yield what predicts segments, in their order, from clips of a preset, and their spec."""
    inputs = context.inputs
    model = _build(context)
    read_checkpoint(encoder.folder / CHECKPOINT, model)
    model.to(context.device).eval()
    spec = choose_visual(context.config.visual, context.request.places, preset).spec

    def predict_from(clips: ClipSource) -> Callable[[Sequence[str]], Iterator[SegmentPrediction]]:
        return lambda segment_ids: predict_segments(
            model,
            clips.iterate_clips(segment_ids, spec),
            inputs.audio,
            multi_label=context.multi_label,
            device=context.device,
            outputs=tuple(outputs),
            without_audio=without_audio,
        )

    if not inputs.trunk_stores or preset == context.config.visual.test_preset:
        yield predict_from(context.clips), spec
    else:  # a cache of other clips
        with inputs.open_frames(context.request.seed, context.device) as frames:
            yield predict_from(frames), spec


def _make_adapted_spec(clips: FeatureSpec, identity: str, outputs: Sequence[str]) -> FeatureSpec:
    """Make the specification of adapted features: clips as extracted, weights those of the checkpoint."""
    assert clips.frame is not None, "the visual encoder has frames"
    shapes = find_encoder(clips.encoder).output_shapes(clips.clip, clips.frame)
    named = tuple(OutputSpec(name=name, shape=shapes[name]) for name in outputs)
    return clips.model_copy(update={"weights": identity, "outputs": named, "dtype": "float16"})


def write_table(context: RunContext, features: StepResult, labels: StepResult) -> StepResult:
    """Write the table that Stage 2 begins with; pseudo-labels are made of `labels`, predictions of a step."""
    audio, segments = predict_from_audio(context), list_segments(context.splits)
    settings = {"classes": list(context.card.classes), "task": context.card.task}
    step = Step("table", 2, settings, {"features": features.key, "labels": labels.key, "audio": audio.key})

    def make(folder: Path) -> Mapping[str, Any]:
        pseudo_labelled = [] if context.multi_label else _list_ids(context.splits.target_train)
        write_prediction_table(
            folder / TABLE,
            segments,
            context.card.classes,
            AudioPredictions.read(audio.folder / PREDICTIONS),
            Predictions.read(features.folder / PREDICTIONS),
            Predictions.read(labels.folder / PREDICTIONS),
            pseudo_labelled,
        )
        return {"n_segments": len(segments), "n_pseudo_labels": len(pseudo_labelled)}

    return context.run(step, make)


def _list_ids(segments: Sequence[Segment]) -> list[str]:
    return [segment.segment_id for segment in segments]


def _name_labels(part: LabelledSegments) -> str:
    """Hash the labels of segments."""
    return hash_json([_list_ids(part.segments), part.labels.tolist()])


def _write_array(path: Path, values: np.ndarray) -> None:
    """Write one array as .npy in one step."""
    fresh = path.with_name(f"{path.name}.partial.npy")
    np.save(fresh, values, allow_pickle=False)
    fresh.replace(path)
