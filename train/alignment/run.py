"""A run of alignment, planned: which domains are seen, with which labels, for how long, and what came to nothing."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from echoshift.pipeline.errors import RunError
from echoshift.pipeline.segments import Segment
from echoshift.pipeline.store.layout import DONE
from echoshift.pipeline.store.open import open_store
from echoshift.train.alignment.config import AlignmentScheduleConfig, AlignmentStageConfig, keep_used
from echoshift.train.alignment.method import build_method, find_method
from echoshift.train.alignment.two_streams import TwoStreams
from echoshift.train.features import FeatureRows, StreamInputs, hears_clips
from echoshift.train.loop import NO_LABEL, Schedule, TrainedRun, TrainingData, TrainingJob
from echoshift.train.predictions import read_prediction_table
from echoshift.train.run_method import (
    TARGET_TEST,
    MethodRequest,
    NetworkRun,
    PlannedTraining,
    Predicted,
    hash_source,
    open_rows,
)
from echoshift.train.splits import (
    TEST,
    LabelledSegments,
    keep_segments,
    label_target_train,
    list_segment_ids,
    select_labelled,
    split_for_shift,
)
from echoshift.train.steps import Step, StepRunner, hash_json

REVISION = 1

# Half of a stream's units are dead from the start where features are much the same, and adaptation that works leaves
# up to 0.95 (DECISIONS.md, a dead stream).
ALL_BUT_NONE = 0.99
_N_LOOKED_AT, _N_AT_ONCE = 512, 128
_PULLS_FEATURES = ("rna", "hna", "mmd")  # whose weight, too large, throws features to one side


def plan_alignment(request: MethodRequest, notify: Callable[[str], None] = lambda message: None) -> PlannedTraining:
    """Look which segments have features, and plan a run's steps; those without are left out.

    Training sees the source's labelled train split; `uda` adds the target's without its labels, `supervised` is the
    target's own with them. Raises RunError where nothing is left of a part that training needs.
    """
    config = request.settings.config
    assert isinstance(config, AlignmentStageConfig), "settings of alignment"
    setting = config.alignment.setting
    splits = split_for_shift(request.manifest, request.card, request.shift)
    wanted = list_segment_ids(splits)
    tests = [segment.segment_id for segment in request.manifest if segment.split == TEST]
    kept, has_audio = {*wanted, *tests}, dict.fromkeys({*wanted, *tests}, True)
    for inputs in request.inputs.values():
        there = _find_done(inputs)
        kept &= set(there)
        has_audio.update({segment_id: heard for segment_id, heard in there.items() if segment_id in has_audio})
    left_out = tuple(segment_id for segment_id in wanted if segment_id not in kept)
    splits = keep_segments(splits, kept)
    source, target = splits.source_train, splits.target_train if setting == "uda" else ()
    if setting == "supervised":
        own_ids = [segment.segment_id for segment in splits.target_train]
        source = select_labelled(label_target_train(request.manifest, request.card, request.shift, own_ids), kept)
    for what, part in (("train segment", source.segments), ("test segment of the target", splits.target_test)):
        if not part:
            raise RunError(f"{request.title}: no {what} has features; extract {request.card.name}")
    if setting == "uda" and not target:
        raise RunError(f"{request.title}: the target has no train segment with features; extract them")
    if left_out:
        notify(f"{request.title}: {len(left_out)} segments without features left out: {left_out[0]} …")
    tested = tuple(segment_id for segment_id in tests if segment_id in kept)
    over_clips: Literal["mean", "max"] = "max" if request.is_multi_label else "mean"
    networks = []
    for settings in request.settings.streams:
        name, own = settings.stream.name, settings.config
        assert isinstance(own, AlignmentStageConfig), "settings of alignment"
        one_clip = own.alignment.network.clips == "one"
        networks.append(AlignmentRun(request, name, one_clip, over_clips, True, own, source, target, tested))
    runner = StepRunner(request.runs_dir / "steps", request.rerun, notify)
    return PlannedTraining(request, config.scoring.rules, splits, left_out, has_audio, tuple(networks), runner)


def _find_done(inputs: StreamInputs) -> dict[str, bool]:
    """Find the segments of which a network has all it reads, and whether each has sound."""
    store = open_store(inputs.features)
    done = {s for s, state in zip(store.segment_ids, store.read_array("state"), strict=True) if state == DONE}
    if inputs.table is not None:
        table = read_prediction_table(inputs.table)
        heard = dict(zip(table.segment_ids, table.has_audio.tolist(), strict=True))
    else:
        assert inputs.sound is not None, "a network reads sound from a table or from a store"
        sound = open_store(inputs.sound)
        states, has_audio = sound.read_array("state"), sound.read_array("has_audio")
        rows = zip(sound.segment_ids, states, has_audio, strict=True)
        heard = {segment_id: bool(audible) for segment_id, state, audible in rows if state == DONE}
    return {segment_id: is_heard for segment_id, is_heard in heard.items() if segment_id in done}


@dataclass(frozen=True)
class AlignmentRun(NetworkRun):
    """One network of a run.

    The key of its training names what it is trained on alone, so that one source-only network serves all targets.

    Attributes:
        source: what is trained on with labels; in the setting `supervised` the target's own train split.
        target: unlabelled; empty but in the setting `uda`.
        tests: every test segment of the data set, predicted when the training is over.
    """

    config: AlignmentStageConfig
    source: LabelledSegments
    target: tuple[Segment, ...]
    tests: tuple[str, ...]

    @property
    def domains(self) -> list[str]:
        """The domains of what is trained on with labels, in the card's order."""
        there = {segment.domain for segment in self.source.segments}
        return [domain for domain in self.request.card.domains if domain in there]

    def plan_step(self) -> Step:
        """Plan the training; which domains it sees is named by the inputs, not by the setting."""
        described = self.config.describe()
        used = keep_used(described["alignment"])
        settings: dict[str, Any] = {
            "alignment": {name: value for name, value in used.items() if name != "setting"},
            "iterations": described["iterations"],
            "seed": self.request.seed,
            "classes": list(self.request.card.classes),
        }
        if self.one_clip and hears_clips(self.inputs):
            settings["sound"] = "around each clip"
        inputs = {
            "features": self.inputs.key,
            "source": hash_source(self.source),
            "target": hash_json([segment.segment_id for segment in self.target]),
            "tests": hash_json(list(self.tests)),
        }
        return Step(f"{self.config.alignment.method}_{self.name}", REVISION, settings, inputs)

    def plan_job(self) -> TrainingJob:
        """Make the job that the loop trains; what is tested isn't opened for it."""
        rows = self._open_trained()
        source = rows.find([segment.segment_id for segment in self.source.segments])
        domains, labels = self.domains, self.source.labels
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
        return TrainingJob(self.title, self.build, data, schedule, self.request.seed, lr_name="iterations.lr")

    def build(self) -> nn.Module:
        """Build the method with the weights that the seed decides."""
        shapes = self._open_trained().describe_shapes(len(self.domains), multi_label=self.request.is_multi_label)
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
        """Describe, a line each, how training came to nothing: a dead stream, or no class learned."""
        method, rows = self.build(), self._open_trained()
        method.load_state_dict(run.state)
        source = rows.find([segment.segment_id for segment in self.source.segments])
        shares = measure_dead_units(method, rows, source, one_clip=self.one_clip)
        return describe_collapse(run, shares, self.source.labels, self.config)

    def list_predicted(self) -> Predicted:
        """List what is predicted: the test splits of all domains, each as a target."""
        rows = open_rows(self.inputs, self.tests, self.config.memory.max_memory_mb)
        return {TARGET_TEST: (rows, np.arange(len(self.tests)), "target")}

    def _open_trained(self) -> FeatureRows:
        ids = tuple(segment.segment_id for segment in (*self.source.segments, *self.target))
        return open_rows(self.inputs, ids, self.config.memory.max_memory_mb)


def plan_schedule(config: AlignmentScheduleConfig, *, has_target: bool) -> Schedule:
    """Plan the loop's schedule."""
    n_target = config.n_batch // 2 if has_target else 0
    drops = ((config.lr_drop_step, config.dropped_lr),) if config.lr_drop_step < config.n_steps else ()
    return Schedule(
        n_source=config.n_batch - n_target,
        n_target=n_target,
        n_labelled=0,
        n_steps=config.n_steps,
        optimiser="sgd",
        lr=config.lr,
        weight_decay=config.weight_decay,
        momentum=config.momentum,
        lr_drops=drops,
        snapshots=config.snapshots,
    )


@torch.inference_mode()
def measure_dead_units(method: nn.Module, rows: FeatureRows, index: np.ndarray, *, one_clip: bool) -> dict[str, float]:
    """Measure which share of each stream's units is the same for every segment, `frames` and `audio`, 0..1.

    A unit behind a ReLU is dead where its input is below 0 for all segments: no gradient reaches it again. Looks at up
    to 512 of the segments whose row numbers are `index`, int64 [n], at all their clips, or, unless `one_clip`, at their
    mean; of sound at those that have any. A stream that the network hasn't isn't measured, nor is one of fewer than two
    segments, nor a method without the two streams. The method is on the CPU, and in eval mode afterwards.
    """
    streams = next((module for module in method.eval().modules() if isinstance(module, TwoStreams)), None)
    if streams is None:
        return {}
    spread = np.unique(np.linspace(0, len(index) - 1, min(len(index), _N_LOOKED_AT)).astype(np.int64))
    looked_at = torch.from_numpy(index[spread])
    low: dict[str, Tensor] = {}
    high: dict[str, Tensor] = {}
    n_seen = {"frames": 0, "audio": 0}
    for part in looked_at.split(_N_AT_ONCE):
        held, place = rows.take(part), torch.arange(len(part))
        view = torch.zeros_like(part)
        for clip in [torch.full_like(part, clip) for clip in range(rows.n_clips)] if one_clip else [None]:
            visual, audio, heard = streams.encode(held.gather(place, view, clip), "source")
            for name, values in (("frames", visual), ("audio", audio[heard])):
                if not len(values):
                    continue
                n_seen[name] += len(values)
                least, most = values.amin(dim=0), values.amax(dim=0)
                low[name] = torch.minimum(low[name], least) if name in low else least
                high[name] = torch.maximum(high[name], most) if name in high else most
    there = {"frames": streams.project_visual is not None, "audio": streams.project_audio is not None}
    return {
        name: float((low[name] == high[name]).float().mean())
        for name, is_there in there.items()
        if is_there and n_seen[name] > 1
    }


def compute_guessing_loss(labels: np.ndarray) -> float:
    """Compute the loss of who knows only how often each class occurs in labels int64 [n], or 0 and 1 [n, K], in nats.

    It is the entropy of the classes, or, multi-label, the mean over classes of each one's.
    """
    if labels.ndim == 1:
        shares = np.bincount(labels) / len(labels)
        return float(-sum(share * np.log(share) for share in shares if share > 0))
    of_class = labels.mean(axis=0, dtype=np.float64)
    both = np.stack([of_class, 1 - of_class])
    return float(-(both * np.log(np.where(both > 0, both, 1))).sum(axis=0).mean())


def describe_collapse(
    run: TrainedRun, shares: Mapping[str, float], labels: np.ndarray, config: AlignmentStageConfig
) -> tuple[str, ...]:
    """Describe in a line each which streams are dead (`shares`, `measure_dead_units`), and that no class was learned.

    That is where the last epoch's mean class loss isn't below `compute_guessing_loss` of the training's `labels`; a
    method from outside, whose terms are its own, isn't judged by it. The line names the settings that help.
    """
    alignment, steps = config.alignment, config.iterations
    found_method = find_method(alignment.method)
    weighed = [part for part in (found_method.reads if found_method else ()) if part in _PULLS_FEATURES]
    knobs = [f"iterations.lr ({steps.lr:g})"]
    knobs += [f"alignment.own.weight ({alignment.own['weight']:g})"] if "weight" in alignment.own else []
    knobs += [f"alignment.{part}.weight ({getattr(alignment, part).weight:g})" for part in weighed]
    lower = f"lower {' or '.join(knobs)}"
    found = []
    dead = [f"{share:.1%} of the units of {name}" for name, share in shares.items() if share >= ALL_BUT_NONE]
    if dead:
        found.append(
            f"training has left {' and '.join(dead)} the same for every segment; where that isn't what the method is "
            f"for, {lower}"
        )
    if not alignment.source and alignment.class_weight > 0:
        reached, guessed = float(run.losses[-1, 0]) / alignment.class_weight, compute_guessing_loss(labels)
        if reached >= guessed:
            found.append(
                f"no class was learned: at the end the source's class loss is {reached:.2f}, that of guessing "
                f"{guessed:.2f}; {lower}, or, where it has hardly begun, raise iterations.n_steps ({steps.n_steps})"
            )
    return tuple(found)
