"""A run of Stage 2, planned: which segments have features, and what each stream trains."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from echoshift.pipeline.errors import RunError
from echoshift.pipeline.segments import Segment
from echoshift.train.features import FeatureRows
from echoshift.train.loop import NO_LABEL, Schedule, TrainingData, TrainingJob
from echoshift.train.predictions import PredictionTable, read_prediction_table
from echoshift.train.run_method import (
    SOURCE_VAL,
    TARGET_TEST,
    MethodRequest,
    NetworkRun,
    PlannedTraining,
    Predicted,
    hash_source,
    open_rows,
)
from echoshift.train.splits import ShiftSplits, keep_segments, label_target_train, list_segment_ids, split_for_shift
from echoshift.train.stage2.config import Stage2Config
from echoshift.train.stage2.recogniser import build_recogniser
from echoshift.train.steps import Step, StepRunner, hash_json

REVISION = 1


def plan_stage2(request: MethodRequest, notify: Callable[[str], None] = lambda message: None) -> PlannedTraining:
    """Read the tables of a run's streams and plan its steps.

    Segments that a stream hasn't, because they failed to be extracted, are left out. Raises RunError where nothing is
    left of a part that training needs.
    """
    config, labels = request.settings.config, request.settings.target_labels
    assert isinstance(config, Stage2Config), "settings of Stage 2"
    splits = split_for_shift(
        request.manifest,
        request.card,
        request.shift,
        use_tags=labels.use_tags,
        labelled_fraction=labels.labelled_fraction,
        pairs=labels.pairs,
    )
    wanted = list_segment_ids(splits)
    tables: dict[str, PredictionTable | None] = {}
    kept, has_audio = set(wanted), dict.fromkeys(wanted, True)
    for name, inputs in request.inputs.items():
        table = None if inputs.table is None else read_prediction_table(inputs.table)
        tables[name] = table
        if table is not None:
            _check_classes(table, request)
            kept &= set(table.segment_ids)
            has_audio.update(zip(table.segment_ids, table.has_audio.tolist(), strict=True))
    left_out = tuple(segment_id for segment_id in wanted if segment_id not in kept)
    splits = keep_segments(splits, kept)
    if not len(splits.source_train) or not splits.target_test:
        raise RunError(
            f"{request.title}: no segment of {'the source' if not len(splits.source_train) else 'the target test'} "
            f"is in the tables of all streams; run Stage 1 on this manifest"
        )
    if left_out:
        notify(f"{request.title}: {len(left_out)} segments without features left out: {left_out[0]} …")
    looks_at_epochs = set(config.selection.rules) != {"last"}
    streams = []
    for settings in request.settings.streams:
        name, own = settings.stream.name, settings.config
        assert isinstance(own, Stage2Config), "settings of Stage 2"
        one_clip, over_clips = own.recogniser.clips == "each", own.recogniser.over_clips
        streams.append(
            StreamRun(request, name, one_clip, over_clips, looks_at_epochs, own, config, splits, tables[name])
        )
    runner = StepRunner(request.runs_dir / "steps", request.rerun, notify)
    return PlannedTraining(request, config.selection.rules, splits, left_out, has_audio, tuple(streams), runner)


def _check_classes(table: PredictionTable, request: MethodRequest) -> None:
    if table.classes != request.card.classes:
        raise RunError(
            f"{table.path} has the classes {', '.join(table.classes)}, the card of {request.card.name} has "
            f"{', '.join(request.card.classes)}; run Stage 1 with this card"
        )


@dataclass(frozen=True)
class StreamRun(NetworkRun):
    """One stream of a run.

    Attributes:
        config: the stream's own.
        common: what all streams have in common: selection rules, sound at test.
    """

    config: Stage2Config
    common: Stage2Config
    splits: ShiftSplits
    table: PredictionTable | None

    def plan_step(self) -> Step:
        """Plan the training; labels of the target are in the key only where pseudo-labels are them."""
        described = self.config.describe()
        settings: dict[str, Any] = {
            part: values for part, values in described.items() if part not in ("test", "selection", "streams")
        }
        settings |= {"seed": self.request.seed, "classes": list(self.request.card.classes)}
        if self.predicts_snapshots:
            settings |= {"every epoch": True, "test": described["test"]}
        splits = self.splits
        labelled = splits.target_labelled
        inputs = {
            "stream": self.inputs.key,
            "source": hash_source(splits.source_train),
            "target": hash_json(_ids(splits.target_train)),
            "labelled": hash_json([_ids(labelled.segments), labelled.labels.tolist()]),
        }
        if self.predicts_snapshots:
            inputs["predicted"] = hash_json([_ids(splits.source_val.segments), _ids(splits.target_test)])
        if self.config.pseudo_labels.kind == "oracle":
            inputs["target labels (oracle)"] = hash_json(self._read_pseudo_labels().tolist())
        return Step(f"recogniser_{self.name}", REVISION, settings, inputs)

    def describe(self) -> dict[str, str]:
        """Return the facts that a checkpoint's header holds."""
        return {
            "echoshift": "audio-infused recogniser",
            "classes": json.dumps(list(self.request.card.classes)),
            "config": json.dumps(self.config.describe(), sort_keys=True),
            "stream": self.inputs.key,
        }

    def name_test(self) -> tuple[dict[str, Any], dict[str, str]]:
        """Return settings and inputs that decide what test segments are predicted from, beside the weights."""
        if self.common.test.sound == "kept":
            return {"sound": "kept"}, {}
        return {"sound": "missing"}, {"without sound": self.inputs.without_sound_key}

    def list_predicted(self) -> Predicted:
        """List what is predicted: the source's validation split and the target's test split."""
        rows, test_rows, splits = self._open_all(), self._open_test(), self.splits
        predicted: Predicted = {TARGET_TEST: (test_rows, test_rows.find(_ids(splits.target_test)), "target")}
        if len(splits.source_val):
            source_val = rows, rows.find(_ids(splits.source_val.segments)), "source"
            predicted = {**predicted, SOURCE_VAL: source_val}  # type: ignore[dict-item]
        return predicted

    def build(self) -> nn.Module:
        """Build the recogniser with the weights that the seed decides."""
        train = self._open_trained()
        source = train.find(_ids(self.splits.source_train.segments))
        audio = train.audio[source][train.has_audio[source]]
        shapes = train.describe_shapes(multi_label=self.request.is_multi_label)
        mean_audio = audio.mean(dim=0) if len(audio) else torch.zeros(shapes.n_audio)
        return build_recogniser(self.config, shapes, len(self.request.card.classes), mean_audio, self.request.seed)

    def plan_job(self) -> TrainingJob:
        """Make the job that the loop trains."""
        splits, shift = self.splits, self.request.shift
        train = self._open_trained()
        target = splits.target_train if self.config.pseudo_labels.kind != "none" else ()
        data = TrainingData(
            train=train,
            source=train.find(_ids(splits.source_train.segments)),
            source_labels=splits.source_train.labels,
            source_domains=np.array([shift.source.index(s.domain) for s in splits.source_train.segments]),
            target=train.find(_ids(target)),
            pseudo_labels=self._read_pseudo_labels() if target else splits.source_train.labels[:0],
            labelled=train.find(_ids(splits.target_labelled.segments)),
            labelled_labels=splits.target_labelled.labels,
            one_clip=self.one_clip,
        )
        return TrainingJob(self.title, self.build, data, self._plan_schedule(len(data.source)), self.request.seed)

    def _plan_schedule(self, n_source: int) -> Schedule:
        chosen = self.config.schedule
        n_per_epoch = n_source // min(chosen.n_source, n_source)
        n_steps = chosen.n_steps or chosen.n_epochs * n_per_epoch
        return Schedule(
            n_source=chosen.n_source,
            n_target=chosen.n_target,
            n_labelled=chosen.n_labelled,
            n_steps=n_steps,
            optimiser="adam",
            lr=chosen.lr,
            weight_decay=chosen.weight_decay,
            snapshots=tuple(range(n_per_epoch, n_steps, n_per_epoch)) if self.predicts_snapshots else (),
            precision=chosen.precision,
        )

    def _read_pseudo_labels(self) -> np.ndarray:
        """Read what Stage 1 takes the target's train segments for, int64 [n] or float32 [n, K]."""
        request, chosen, ids = self.request, self.config.pseudo_labels, _ids(self.splits.target_train)
        if chosen.kind == "oracle":
            return label_target_train(request.manifest, request.card, request.shift, ids).labels
        if self.table is None:
            raise RunError(
                f"{self.title}: features without Stage 1's table have no pseudo-labels; name the table "
                f"(streams), or train on the source alone (pseudo_labels.kind=none)"
            )
        rows = self.table.find(ids)
        probabilities = self.table.visual_probabilities[rows]
        if request.is_multi_label:
            return (probabilities >= chosen.threshold).astype(np.float32)
        labels = self.table.pseudo_labels[rows].astype(np.int64)
        if chosen.kind == "thresholded":
            sure = np.take_along_axis(probabilities, np.maximum(labels, 0)[:, None], axis=1)[:, 0] >= chosen.threshold
            labels = np.where(sure, labels, NO_LABEL)
        return labels

    def _open_trained(self) -> FeatureRows:
        """Open what is trained on: augmented views where the stream has any."""
        if self.inputs.train_features is None:
            return self._open_all()
        ids = tuple(_list_train_ids(self.splits))
        return open_rows(self.inputs, ids, self.config.data.max_memory_mb, of_training=True)

    def _open_all(self) -> FeatureRows:
        splits = self.splits
        ids = [*_list_train_ids(splits), *_ids([*splits.source_val.segments, *splits.target_test])]
        return open_rows(self.inputs, tuple(ids), self.config.data.max_memory_mb)

    def _open_test(self) -> FeatureRows:
        """Open the rows that the target's test segments are predicted from, without sound where that is the setting.

        Visual features are then those that the encoder makes without sound, where they were exported.
        """
        if self.common.test.sound == "kept":
            return self._open_all()
        if self.inputs.features_without_sound is None:
            return self._open_all().without_sound()
        without = replace(self.inputs, features=self.inputs.features_without_sound, train_features=None)
        ids = tuple(_ids(self.splits.target_test))
        return open_rows(without, ids, self.config.data.max_memory_mb).without_sound()


def _ids(segments: Sequence[Segment]) -> list[str]:
    return [segment.segment_id for segment in segments]


def _list_train_ids(splits: ShiftSplits) -> list[str]:
    return _ids([*splits.source_train.segments, *splits.target_labelled.segments, *splits.target_train])
