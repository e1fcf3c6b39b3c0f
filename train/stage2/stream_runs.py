"""Makes of one stream of a run what is trained: labels, pseudo-labels, rows of features, the recogniser to build."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from echoshift.pipeline.errors import RunError
from echoshift.pipeline.segments import Segment
from echoshift.train.cached.batches import Domain
from echoshift.train.cached.feature_bank import Rows
from echoshift.train.cached.training import Schedule, TrainedRun, TrainingData, TrainingJob
from echoshift.train.prediction_table import PredictionTable
from echoshift.train.splits import ShiftSplits, label_target_train
from echoshift.train.stage2.config import Stage2Config
from echoshift.train.stage2.recogniser import FeatureShapes, build_recogniser
from echoshift.train.stage2.requests import Stage2Request, StreamRequest
from echoshift.train.stage2.stage1_outputs import StreamFeatures, StreamInputs, open_stream, stays_stored
from echoshift.train.steps import Step, hash_json

NO_LABEL = -1
REVISION = 1


@dataclass(frozen=True, slots=True)
class StreamRun:
    """One stream of a run, planned; features are read when they are asked for."""

    request: Stage2Request
    stream: StreamRequest
    splits: ShiftSplits
    table: PredictionTable | None

    @property
    def config(self) -> Stage2Config:
        """The stream's configuration."""
        return self.stream.config

    @property
    def name(self) -> str:
        """Name the stream."""
        return self.stream.name

    @property
    def one_clip(self) -> bool:
        """Whether each clip is recognised by itself."""
        return self.config.recogniser.clips == "each"

    @property
    def over_clips(self) -> Literal["mean", "max"]:
        """How predictions of clips are combined then."""
        return self.config.recogniser.over_clips

    @property
    def title(self) -> str:
        """Name it in a line of progress."""
        several = f" {self.stream.name}" if len(self.request.streams) > 1 else ""
        return f"{self.request.title}{several}"

    @property
    def tracks_epochs(self) -> bool:
        """Whether a rule looks at every epoch, so that each is predicted."""
        return set(self.request.config.selection.rules) != {"last"}

    def plan_step(self) -> Step:
        """Plan the training; what decides it is in the key, labels of the target only where pseudo-labels are them."""
        described = self.config.describe()
        of_test = ("test", "selection", "streams", "data")
        settings: dict[str, Any] = {part: v for part, v in described.items() if part not in of_test}
        settings |= {"seed": self.request.seed, "classes": list(self.request.card.classes)}
        if self.tracks_epochs:
            settings |= {"every epoch": True, "test": described["test"]}
        splits, max_memory_mb = self.splits, self.config.data.max_memory_mb
        if stays_stored(self.stream.inputs, len(_list_ids(splits)), max_memory_mb * 2**20):
            settings["max_memory_mb"] = max_memory_mb  # it decides the order of batches then
        source = splits.source_train
        inputs = {
            "stream": self.stream.inputs.key,
            "source": hash_json([[(s.segment_id, s.domain) for s in source.segments], source.labels.tolist()]),
            "target": hash_json([segment.segment_id for segment in splits.target_train]),
            "labelled": hash_json([_ids(splits.target_labelled.segments), splits.target_labelled.labels.tolist()]),
        }
        if self.tracks_epochs:
            inputs["predicted"] = hash_json([_ids(splits.source_val.segments), _ids(splits.target_test)])
        if self.config.pseudo_labels.kind == "oracle":
            inputs["target labels (oracle)"] = hash_json(self._read_pseudo_labels().tolist())
        return Step(f"recogniser_{self.stream.name}", REVISION, settings, inputs)

    def open_features(self) -> StreamFeatures:
        """Read the stream's features into memory."""
        ids, train_ids = tuple(_list_ids(self.splits)), tuple(_list_train_ids(self.splits))
        return _open_features(self.stream.inputs, ids, train_ids, self.config.data.max_memory_mb)

    def open_test_rows(self) -> Rows:
        """Return the rows that the target's test segments are predicted from, without sound where that is the setting.

        Visual features are then those that the encoder makes without sound, where they were exported.
        """
        if self.request.config.test.sound == "kept":
            return self.open_features().test
        inputs = self.stream.inputs
        rows = self.open_features().test
        if inputs.features_without_sound is not None:
            without = replace(inputs, features=inputs.features_without_sound, train_features=None)
            ids, max_memory_mb = tuple(_ids(self.splits.target_test)), self.config.data.max_memory_mb
            rows = _open_features(without, ids, (), max_memory_mb).test
        return rows.without_sound()

    def describe(self) -> dict[str, str]:
        """Return the facts that a checkpoint's header holds."""
        return {
            "echoshift": "audio-infused recogniser",
            "classes": json.dumps(list(self.request.card.classes)),
            "config": json.dumps(self.config.describe(), sort_keys=True),
            "stream": self.stream.inputs.key,
        }

    def examine(self, run: TrainedRun) -> tuple[str, ...]:
        """Find nothing: the recogniser's LayerNorms keep its states apart."""
        return ()

    def name_test(self) -> tuple[dict[str, Any], dict[str, str]]:
        """Return settings and inputs that decide what test segments are predicted from, beside the weights."""
        if self.request.config.test.sound == "kept":
            return {"sound": "kept"}, {}
        return {"sound": "missing"}, {"without sound": self.stream.inputs.without_sound_key}

    def list_predicted(self) -> Mapping[str, tuple[Rows, np.ndarray, Domain]]:
        """List what is predicted: the source's validation split and the target's test split."""
        rows, test_rows, splits = self.open_features().test, self.open_test_rows(), self.splits
        predicted: dict[str, tuple[Rows, np.ndarray, Domain]] = {
            "target_test": (test_rows, test_rows.find(_ids(splits.target_test)), "target")
        }
        if len(splits.source_val):
            predicted["source_val"] = (rows, rows.find(_ids(splits.source_val.segments)), "source")
        return predicted

    def build(self) -> nn.Module:
        """Build the recogniser with the weights that the seed decides."""
        features = self.open_features()
        heard = features.train.find(_ids(self.splits.source_train.segments))
        has_audio = features.train.has_audio[heard]
        audio = features.train.audio[heard][has_audio]
        n_audio = features.train.audio.shape[1]
        shapes = FeatureShapes(
            visual={name: shape[1:] for name, shape in features.train.shapes.items()},
            n_audio=n_audio,
            n_classes=len(self.request.card.classes),
            multi_label=self.request.is_multi_label,
        )
        mean_audio = audio.mean(dim=0) if len(audio) else torch.zeros(n_audio)
        return build_recogniser(self.config, shapes, mean_audio, self.request.seed)

    def plan_job(self) -> TrainingJob:
        """Make the job that the loop trains."""
        data = self._make_data()
        schedule = self._plan_schedule(len(data.source))
        same = [
            {part: v for part, v in self.config.describe().items() if part not in ("selection", "streams")},
            {name: list(shape) for name, shape in data.train.shapes.items()},
            [data.train.audio.shape[1], self.request.is_multi_label, len(self.request.card.classes)],
            [bool(len(data.target)), bool(len(data.labelled))],
            [
                min(size, n)
                for size, n in ((schedule.n_source, len(data.source)), (schedule.n_target, len(data.target)))
            ],
        ]
        return TrainingJob(
            title=self.title,
            build=self.build,
            data=data,
            schedule=schedule,
            seed=self.request.seed,
            predict=self.list_predicted() if self.tracks_epochs else {},
            signature=hash_json(same),
            over_clips=self.over_clips,
        )

    def _make_data(self) -> TrainingData:
        splits, shift = self.splits, self.request.shift
        train = self.open_features().train
        target = splits.target_train if self.config.pseudo_labels.kind != "none" else ()
        return TrainingData(
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
            snapshots=tuple(range(n_per_epoch, n_steps, n_per_epoch)) if self.tracks_epochs else (),
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


@lru_cache(maxsize=2)
def _open_features(
    inputs: StreamInputs, segment_ids: tuple[str, ...], train_ids: tuple[str, ...], max_memory_mb: int
) -> StreamFeatures:
    return open_stream(inputs, segment_ids, train_ids, max_memory_mb * 2**20)


def _ids(segments: Sequence[Segment]) -> list[str]:
    return [segment.segment_id for segment in segments]


def _list_train_ids(splits: ShiftSplits) -> list[str]:
    return _ids([*splits.source_train.segments, *splits.target_labelled.segments, *splits.target_train])


def _list_ids(splits: ShiftSplits) -> list[str]:
    return [*_list_train_ids(splits), *_ids([*splits.source_val.segments, *splits.target_test])]
