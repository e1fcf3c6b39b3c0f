"""Makes of a run of alignment what is trained: which domains are seen, with which labels, for how long."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import nn

from echoshift.pipeline.cards import DatasetCard, Shift
from echoshift.pipeline.segments import Manifest, Segment
from echoshift.train.alignment.collapse import describe_collapse, measure_dead_units
from echoshift.train.alignment.config import AlignmentConfig, keep_used
from echoshift.train.alignment.methods import build_method
from echoshift.train.alignment.schedule import plan_schedule
from echoshift.train.alignment.stage_config import AlignmentStageConfig
from echoshift.train.alignment.two_streams import StreamShapes
from echoshift.train.cached.batches import Domain
from echoshift.train.cached.feature_bank import Rows
from echoshift.train.cached.training import TrainedRun, TrainingData, TrainingJob
from echoshift.train.splits import LabelledSegments, ShiftSplits
from echoshift.train.stage2.stage1_outputs import StreamInputs, hears_clips, open_stream, stays_stored
from echoshift.train.steps import Step, hash_json

REVISION = 1
NO_LABEL = -1


@dataclass(frozen=True, slots=True)
class AlignmentRequest:
    """One run.

    Attributes:
        inputs: by network, the files that it reads.
        configs: by network, its configuration.
        described: the whole configuration as JSON.
        runs_dir: where steps and results lie, `runs/DATASET`.
        row: the grid's row that asks for it.
        rerun: names of steps that are done anew.
    """

    card: DatasetCard
    manifest: Manifest
    shift: Shift
    seed: int
    config: AlignmentStageConfig
    inputs: Mapping[str, StreamInputs]
    configs: Mapping[str, AlignmentStageConfig]
    described: Mapping[str, Any]
    runs_dir: Path
    row: str = ""
    rerun: frozenset[str] = frozenset()

    @property
    def title(self) -> str:
        """Name the run in a line of progress."""
        row = f", {self.row}" if self.row else ""
        return f"{self.shift.name}, seed {self.seed}{row}"


@dataclass(frozen=True, slots=True)
class AlignmentRun:
    """One network of a run, planned (`MethodRun`).

    The key of its training names what it is trained on alone, so that one source-only network serves all targets.

    Attributes:
        source: what is trained on with labels; in the setting `supervised` the target's own train split.
        target: unlabelled; empty but in the setting `uda`.
        tests: every test segment of the data set, predicted when the training is over.
    """

    request: AlignmentRequest
    name: str
    source: LabelledSegments
    target: tuple[Segment, ...]
    tests: tuple[str, ...]

    @property
    def config(self) -> AlignmentStageConfig:
        """The network's configuration."""
        return self.request.configs[self.name]

    @property
    def inputs(self) -> StreamInputs:
        """The files that it reads."""
        return self.request.inputs[self.name]

    @property
    def title(self) -> str:
        """Name it in a line of progress."""
        several = f" {self.name}" if len(self.request.inputs) > 1 else ""
        return f"{self.request.title}{several}"

    @property
    def one_clip(self) -> bool:
        """Whether each clip is predicted by itself."""
        return self.config.alignment.network.clips == "one"

    @property
    def over_clips(self) -> Literal["mean", "max"]:
        """How predictions of clips are combined then."""
        return "max" if self.request.card.task == "multi-label" else "mean"

    @property
    def domains(self) -> list[str]:
        """The domains of what is trained on with labels, in the card's order."""
        there = {segment.domain for segment in self.source.segments}
        return [domain for domain in self.request.card.domains if domain in there]

    def plan_step(self) -> Step:
        """Plan the training; what decides it is in the key."""
        described = self.config.describe()
        settings: dict[str, Any] = {
            "alignment": self._describe_method(),
            "iterations": described["iterations"],
            "seed": self.request.seed,
            "classes": list(self.request.card.classes),
        }
        max_memory_mb = self.config.memory.max_memory_mb
        ids = self._list_trained()
        if stays_stored(self.inputs, len(ids), max_memory_mb * 2**20):
            settings["max_memory_mb"] = max_memory_mb  # it decides the order of batches then
        if self.one_clip and hears_clips(self.inputs):
            settings["sound"] = "around each clip"
        source = self.source
        inputs = {
            "features": self.inputs.key,
            "source": hash_json([[(s.segment_id, s.domain) for s in source.segments], source.labels.tolist()]),
            "target": hash_json([segment.segment_id for segment in self.target]),
            "tests": hash_json(list(self.tests)),
        }
        return Step(f"{self.config.alignment.method}_{self.name}", REVISION, settings, inputs)

    def plan_job(self) -> TrainingJob:
        """Make the job that the loop trains; what is tested isn't opened for it."""
        rows = self._open_trained()
        source = rows.find([segment.segment_id for segment in self.source.segments])
        domains = self.domains
        labels = self.source.labels
        target = rows.find([segment.segment_id for segment in self.target])
        unknown = np.full((len(target), *labels.shape[1:]), NO_LABEL if labels.ndim == 1 else np.nan, labels.dtype)
        data = TrainingData(
            train=rows,
            source=source,
            source_labels=labels,
            source_domains=np.array([domains.index(segment.domain) for segment in self.source.segments]),
            target=target,
            pseudo_labels=unknown,
            labelled=source[:0],
            labelled_labels=labels[:0],
            one_clip=self.one_clip,
        )
        schedule = plan_schedule(self.config.iterations, has_target=bool(self.target))
        same = [
            self._describe_method(),
            self.config.iterations.model_dump(mode="json"),
            {name: list(shape) for name, shape in rows.shapes.items()},
            [rows.audio.shape[1], rows.n_views, len(domains), len(self.request.card.classes)],
            [min(schedule.n_source, len(source)), min(schedule.n_target, len(target))],
        ]
        return TrainingJob(
            title=self.title,
            build=self.build,
            data=data,
            schedule=schedule,
            seed=self.request.seed,
            predict={},
            signature=hash_json(same),
            over_clips=self.over_clips,
            keeps_states=True,
            lr_name="iterations.lr",
        )

    def build(self) -> nn.Module:
        """Build the method with the weights that the seed decides."""
        rows = self._open_trained()
        shapes = StreamShapes(
            visual={name: shape[1:] for name, shape in rows.shapes.items()},
            n_audio=rows.audio.shape[1],
            n_sources=len(self.domains),
            multi_label=self.request.card.task == "multi-label",
        )
        return build_method(self.config.alignment, shapes, len(self.request.card.classes), self.request.seed)

    def describe(self) -> dict[str, str]:
        """Return the facts that a checkpoint's header holds."""
        return {
            "echoshift": "alignment of modalities or domains",
            "classes": json.dumps(list(self.request.card.classes)),
            "config": json.dumps(self.config.describe(), sort_keys=True),
            "features": self.inputs.key,
        }

    def examine(self, run: TrainedRun) -> tuple[str, ...]:
        """Return whether training came to nothing: a dead stream, or no class learned."""
        method, rows = self.build(), self._open_trained()
        method.load_state_dict(run.state)
        source = rows.find([segment.segment_id for segment in self.source.segments])
        shares = measure_dead_units(method, rows, source, one_clip=self.one_clip)
        return describe_collapse(run, shares, self.source.labels, self.config)

    def name_test(self) -> tuple[dict[str, Any], dict[str, str]]:
        """Return what decides what test segments are predicted from: nothing beside the training's own key."""
        return {}, {}

    def list_predicted(self) -> Mapping[str, tuple[Rows, np.ndarray, Domain]]:
        """List what is predicted: the test splits of all domains, each as a target."""
        rows = _open_rows(self.inputs, self.tests, self.config.memory.max_memory_mb)
        return {"target_test": (rows, np.arange(len(self.tests)), "target")}

    def _describe_method(self) -> dict[str, Any]:
        """Describe as JSON what training depends on; which domains it sees is named by the inputs, not the setting."""
        used = keep_used(self.config.alignment.model_dump(mode="json"))
        return {name: value for name, value in used.items() if name != "setting"}

    def _list_trained(self) -> list[str]:
        return [segment.segment_id for segment in (*self.source.segments, *self.target)]

    def _open_trained(self) -> Rows:
        return _open_rows(self.inputs, tuple(self._list_trained()), self.config.memory.max_memory_mb)


def split_by_setting(
    config: AlignmentConfig, splits: ShiftSplits, target_own: LabelledSegments
) -> tuple[LabelledSegments, tuple[Segment, ...]]:
    """Return what is trained on with labels, and what without: DG, UDA or supervised (`target_own`)."""
    if config.setting == "supervised":
        return target_own, ()
    return splits.source_train, splits.target_train if config.setting == "uda" else ()


@lru_cache(maxsize=4)
def _open_rows(inputs: StreamInputs, segment_ids: tuple[str, ...], max_memory_mb: int) -> Rows:
    return open_stream(inputs, segment_ids, (), max_memory_mb * 2**20).test
