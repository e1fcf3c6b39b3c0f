"""Opens what a run of Stage 1 reads, sound from its store and pictures from media or level-2 stores, and names it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from echoshift.extract.encoders.network import require_trunk
from echoshift.extract.encoders.registry import find_encoder
from echoshift.extract.media import MediaSurvey
from echoshift.extract.run import ExtractionProgress
from echoshift.pipeline.cards import DatasetCard
from echoshift.pipeline.errors import RunError
from echoshift.pipeline.segments import Segment
from echoshift.pipeline.specs import fingerprint
from echoshift.pipeline.store.interface import FeatureStore
from echoshift.train.data_places import DataPlaces
from echoshift.train.splits import LabelledSegments, ShiftSplits, keep_segments
from echoshift.train.stage1.config import Stage1Config
from echoshift.train.stage1.frame_inputs import FrameInputs
from echoshift.train.stage1.gated_encoder import GatedEncoder
from echoshift.train.stage1.input_stores import (
    EncoderChoice,
    choose_sound,
    choose_visual,
    compute_media_digests,
    fill_store,
    read_digests,
    select_done,
)
from echoshift.train.stage1.picture_faults import find_without_pictures
from echoshift.train.stage1.sound_features import SoundFeatures
from echoshift.train.stage1.trunk_inputs import TrunkInputs
from echoshift.train.stage1.visual_inputs import VisualInputs
from echoshift.train.steps import hash_json


@dataclass(frozen=True, slots=True)
class RunInputs:
    """Everything a run reads, and how each is named in the keys of steps.

    Attributes:
        splits: without the segments whose sound or pictures failed to be extracted; `left_out` lists those.
        train, test: the specifications of training and test clips with their weights.
        trunk_stores: the level-2 stores, of training and of test clips; none where frames are decoded.
        survey: tells which videos the frames come from.
    """

    places: DataPlaces
    splits: ShiftSplits
    left_out: tuple[str, ...]
    sound: SoundFeatures
    sound_choice: EncoderChoice
    sound_store: FeatureStore
    train: EncoderChoice
    test: EncoderChoice
    trunk_stores: tuple[FeatureStore, ...]
    config: Stage1Config
    survey: MediaSurvey

    @property
    def sound_name(self) -> str:
        """The fingerprint of the store of sound."""
        return fingerprint(self.sound_choice.spec)

    @property
    def visual_name(self) -> str:
        """Name the training clips: mode and fingerprint."""
        return f"{self.config.visual.mode} {fingerprint(self.train.spec)}"

    def name_sound(self, segments: Sequence[Segment]) -> str:
        """Hash which segments, and what their sound was made from."""
        ids = [segment.segment_id for segment in segments]
        return hash_json([ids, read_digests(self.sound_store, ids)])

    def name_clips(self, segments: Sequence[Segment]) -> str:
        """Hash which segments, and what their clips are made from."""
        ids = [segment.segment_id for segment in segments]
        if not self.trunk_stores:
            return hash_json([ids, compute_media_digests(self.survey, self.train.spec, segments)])
        found = dict.fromkeys(ids, "")
        for store in self.trunk_stores:
            known = set(store.segment_ids) & set(ids)
            found.update(zip(sorted(known), read_digests(store, sorted(known)), strict=True))
        return hash_json([ids, [found[i] for i in ids]])

    def open_visual(self, seed: int, device: torch.device) -> VisualInputs:
        """Open what gives training clips, and those of the test preset."""
        if not self.trunk_stores:
            return self.open_frames(seed, device)
        train_store, *test_stores = self.trunk_stores
        return TrunkInputs(train_store, test_stores, seed=seed)

    def open_frames(self, seed: int, device: torch.device) -> FrameInputs:
        """Open what decodes clips of any preset; raises RunError where the media aren't there."""
        if not self.places.media_root.is_dir():
            raise RunError(
                f"no media folder {self.places.media_root}, and clips of this kind aren't cached; say with "
                f'--media where the videos lie, or leave them out (export.train_preset="")'
            )
        config = self.config.visual
        return FrameInputs(
            self.places.media_root,
            self.places.card.media,
            list_segments(self.splits),
            self.train.spec.model_copy(update={"clip": self.train.spec.clip.model_copy(update={"n_views": 1})}),
            seed=seed,
            n_readers=choose_n_readers(config.n_readers, device),
            n_cached_mb=config.n_cached_mb,
        )


def choose_n_readers(asked: int | None, device: torch.device) -> int:
    """Return how many processes decode: none beside a CPU that trains, up to 8 beside a GPU."""
    if asked is not None:
        return asked
    return min(8, max(1, (os.cpu_count() or 2) - 1)) if device.type == "cuda" else 0


def list_segments(splits: ShiftSplits) -> list[Segment]:
    """List every segment of a shift once."""
    groups = (
        splits.source_train.segments,
        splits.source_val.segments,
        splits.target_labelled.segments,
        splits.target_train,
        splits.target_test,
    )
    return [segment for group in groups for segment in group]


def list_train_segments(splits: ShiftSplits) -> list[Segment]:
    """List the train splits' segments."""
    return [*splits.source_train.segments, *splits.target_labelled.segments, *splits.target_train]


def name_labels(part: LabelledSegments) -> str:
    """Hash the labels of segments."""
    return hash_json([[segment.segment_id for segment in part.segments], part.labels.tolist()])


def open_run_inputs(
    places: DataPlaces,
    splits: ShiftSplits,
    config: Stage1Config,
    progress: ExtractionProgress,
    notify: Callable[[str], None],
) -> RunInputs:
    """Open the stores that a run reads, after what they lack was extracted, and leave out what failed.

    Raises RunError where nothing is left of a part that training needs.
    """
    _check_training(config)
    segments = list_segments(splits)
    sound_choice = choose_sound(config.sound)
    sound_store = fill_store(places, sound_choice, segments, progress, notify)
    is_done = dict(_done(sound_store, segments))
    in_trunk = config.visual.mode == "trunk"
    visual = config.visual
    train = choose_visual(visual, places, visual.train_preset, n_views=visual.n_views if in_trunk else 1)
    test = choose_visual(visual, places, visual.test_preset)
    survey = MediaSurvey(places.media_root, places.card.media)
    stores: tuple[FeatureStore, ...] = ()
    if in_trunk:
        train_store = fill_store(places, train, list_train_segments(splits), progress, notify)
        test_store = fill_store(places, test, segments, progress, notify)
        stores = (train_store, test_store)
        for store, part in ((train_store, list_train_segments(splits)), (test_store, segments)):
            for segment_id, done in _done(store, part):
                is_done[segment_id] = is_done[segment_id] and done
    else:
        is_done |= dict.fromkeys(find_without_pictures(survey, segments, train.spec, notify), False)
    left_out = tuple(segment_id for segment_id, done in is_done.items() if not done)
    kept = _leave_out(splits, set(left_out), places.card)
    return RunInputs(
        places=places,
        splits=kept,
        left_out=left_out,
        sound=SoundFeatures(sound_store),
        sound_choice=sound_choice,
        sound_store=sound_store,
        train=train,
        test=test,
        trunk_stores=stores,
        config=config,
        survey=survey,
    )


def _check_training(config: Stage1Config) -> None:
    """Raise SpecError for a network without a trunk, a stage that isn't there or a cache of what is to train.

    Called before hours of extraction.
    """
    training = config.training
    with torch.device("meta"):  # nothing is allocated or drawn
        network, _ = (
            require_trunk(find_encoder(name).build(), name) for name in (config.visual.encoder, config.sound.encoder)
        )
        gated = GatedEncoder(network, 2, training.trainable_from, training.batch_norm)
    if config.visual.mode == "trunk":
        gated.check_cached_trunk()


def _done(store: FeatureStore, segments: Sequence[Segment]) -> Iterable[tuple[str, bool]]:
    ids = [segment.segment_id for segment in segments]
    return zip(ids, select_done(store, ids).tolist(), strict=True)


def _leave_out(splits: ShiftSplits, left_out: set[str], card: DatasetCard) -> ShiftSplits:
    if not left_out:
        return splits

    kept = keep_segments(splits, {s.segment_id for s in list_segments(splits)} - left_out)
    if not len(kept.source_train) or not (kept.target_train or len(kept.target_labelled)):
        raise RunError(
            f"{card.name}: all train segments of the source or of the target failed to be extracted; "
            f"`echoshift store explain` says why"
        )
    return kept
