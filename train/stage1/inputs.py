"""What a run of Stage 1 reads: audio from its store, clips from media or level-2 stores, and how steps name it."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from echoshift.extract.encoders.network import require_trunk
from echoshift.extract.encoders.registry import find_encoder
from echoshift.extract.feature_specs import StoreOptions, choose_flow, make_feature_spec
from echoshift.extract.media import MediaSurvey, identify_segments, locate_media
from echoshift.extract.readers.container import (
    find_video_stream,
    get_container_start_s,
    get_declared_end_s,
    open_container,
)
from echoshift.extract.recipes import ZHANG2022_N_MASKED_BINS, ZHANG2022_NOISE
from echoshift.extract.run import ExtractionProgress, ExtractionRequest, extract_features
from echoshift.extract.weights.load import WeightsRecord, default_weights, resolve_weights
from echoshift.extract.work import RunOptions
from echoshift.pipeline.errors import MediaError, RunError
from echoshift.pipeline.manifest import find_media_faults, number_rows
from echoshift.pipeline.segments import END_TOLERANCE_S, Segment
from echoshift.pipeline.specs import FeatureSpec, fingerprint
from echoshift.pipeline.store.interface import FeatureStore, RowFinder
from echoshift.pipeline.store.layout import DONE, compute_digests
from echoshift.pipeline.store.location import Place
from echoshift.pipeline.store.open import has_store, name_store, open_store
from echoshift.train.splits import DataPlaces, ShiftSplits, keep_segments
from echoshift.train.stage1.audio import AudioFeatures
from echoshift.train.stage1.clips import ClipSource, TrunkClips
from echoshift.train.stage1.config import SoundConfig, Stage1Config, VisualConfig
from echoshift.train.stage1.encoder import GatedEncoder
from echoshift.train.stage1.frames import DecodedClips
from echoshift.train.steps import hash_json


@dataclass(frozen=True, slots=True)
class EncoderChoice:
    """A specification with the weights that it names; of audio, `settings` are what `extract --set` makes it by."""

    spec: FeatureSpec
    weights: WeightsRecord
    settings: tuple[str, ...] = ()


def choose_audio(config: SoundConfig) -> EncoderChoice:
    """Make the specification of the store of layer3 maps and pooled audio features, that of a plain `extract`.

    With views it is that of an extraction with `list_view_settings`.
    """
    record = resolve_weights(config.weights or default_weights(config.encoder), config.encoder)
    overrides = (*list_view_settings(config.n_views), *config.overrides)
    spec = make_feature_spec(config.encoder, record, StoreOptions(), outputs=("map", "pooled"), overrides=overrides)
    return EncoderChoice(spec, record, overrides)


def list_view_settings(n_views: int) -> tuple[str, ...]:
    """List what `extract --set` takes for views of audio as A's training has them; nothing for one view."""
    if n_views == 1:
        return ()
    values = {"n_views": n_views, "noise": ZHANG2022_NOISE, "n_masked_bins": ZHANG2022_N_MASKED_BINS}
    return tuple(f"audio.{name}={value}" for name, value in values.items())


def choose_visual(config: VisualConfig, places: DataPlaces, preset: str, *, n_views: int = 1) -> EncoderChoice:
    """Make the specification of the visual encoder's clips under a preset."""
    record = resolve_weights(config.weights or default_weights(config.encoder), config.encoder)
    overrides = list(config.overrides)
    if find_encoder(config.encoder).modality == "flow":
        flow = choose_flow(places.card, places.manifest, places.media_root)
        overrides.insert(0, f"frame.flow={flow}")
    if n_views > 1:
        overrides.append(f"clip.n_views={n_views}")
    spec = make_feature_spec(
        config.encoder, record, StoreOptions(), outputs=("trunk",), preset=preset, overrides=overrides
    )
    return EncoderChoice(spec, record)


@dataclass(frozen=True, slots=True)
class RunInputs:
    """Everything a run reads, and how each is named in the keys of steps.

    Attributes:
        splits: without the segments whose audio or frames failed to be extracted; `left_out` lists those.
        train, test: the specifications of training and test clips with their weights.
        trunk_stores: the level-2 stores, of training and of test clips; none where frames are decoded.
    """

    places: DataPlaces
    config: Stage1Config
    splits: ShiftSplits
    left_out: tuple[str, ...]
    audio: AudioFeatures
    audio_choice: EncoderChoice
    audio_store: FeatureStore
    train: EncoderChoice
    test: EncoderChoice
    trunk_stores: tuple[FeatureStore, ...]
    survey: MediaSurvey

    @property
    def audio_name(self) -> str:
        """The fingerprint of the store of audio."""
        return fingerprint(self.audio_choice.spec)

    @property
    def visual_name(self) -> str:
        """Mode and fingerprint of the training clips."""
        return f"{self.config.visual.mode} {fingerprint(self.train.spec)}"

    def name_audio(self, segments: Sequence[Segment]) -> str:
        """Hash which segments, and what their audio was made from."""
        ids = [segment.segment_id for segment in segments]
        return hash_json([ids, _read_digests(self.audio_store, ids)])

    def name_clips(self, segments: Sequence[Segment]) -> str:
        """Hash which segments, and what their clips are made from."""
        ids = [segment.segment_id for segment in segments]
        if not self.trunk_stores:
            identities = identify_segments(self.survey, list(segments), self.train.spec)
            return hash_json([ids, [bytes(digest).hex() for digest in compute_digests(list(segments), identities)]])
        found = dict.fromkeys(ids, "")
        for store in self.trunk_stores:
            known = sorted(set(store.segment_ids) & set(ids))
            found.update(zip(known, _read_digests(store, known), strict=True))
        return hash_json([ids, [found[i] for i in ids]])

    def open_training_clips(self, seed: int, device: torch.device) -> ClipSource:
        """Open what gives training clips, and those of the test preset."""
        if not self.trunk_stores:
            return self.open_frames(seed, device)
        train_store, *test_stores = self.trunk_stores
        return TrunkClips(train_store, test_stores, seed=seed)

    def open_frames(self, seed: int, device: torch.device) -> DecodedClips:
        """Open what decodes clips of any preset; raises RunError without media.

        Where `visual.n_readers` leaves it open no process decodes beside a CPU that trains, up to 8 beside a GPU.
        """
        places, n_readers = self.places, self.config.visual.n_readers
        if not places.media_root.is_dir():
            raise RunError(
                f"no media folder {places.media_root}, and clips of this kind aren't cached; say with "
                f'--media where the videos lie, or leave them out (export.train_preset="")'
            )
        if n_readers is None:
            n_readers = min(8, max(1, (os.cpu_count() or 2) - 1)) if device.type == "cuda" else 0
        spec = self.train.spec
        return DecodedClips(
            places.media_root,
            places.card.media,
            list_segments(self.splits),
            spec.model_copy(update={"clip": spec.clip.model_copy(update={"n_views": 1})}),
            seed=seed,
            n_readers=n_readers,
            n_cached_mb=self.config.visual.n_cached_mb,
        )


def list_segments(splits: ShiftSplits) -> list[Segment]:
    """List every segment of a shift once."""
    return [
        *splits.source_train.segments,
        *splits.source_val.segments,
        *splits.target_labelled.segments,
        *splits.target_train,
        *splits.target_test,
    ]


def list_train_segments(splits: ShiftSplits) -> list[Segment]:
    """List the train splits' segments."""
    return [*splits.source_train.segments, *splits.target_labelled.segments, *splits.target_train]


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
    _check_networks(config)
    visual, in_trunk = config.visual, config.visual.mode == "trunk"
    segments, of_train = list_segments(splits), list_train_segments(splits)
    audio_choice = choose_audio(config.sound)
    train = choose_visual(visual, places, visual.train_preset, n_views=visual.n_views if in_trunk else 1)
    test = choose_visual(visual, places, visual.test_preset)
    wanted = [(audio_choice, segments)]
    if in_trunk:
        wanted += [(train, of_train), (test, segments)]
    stores, failed = [], set()
    for choice, part in wanted:
        store = _fill_store(places, choice, part, progress, notify)
        ids = [segment.segment_id for segment in part]
        is_done = store.read_array("state")[_find_rows(store, ids)] == DONE
        failed |= {segment_id for segment_id, done in zip(ids, is_done, strict=True) if not done}
        stores.append(store)
    survey = MediaSurvey(places.media_root, places.card.media)
    if not in_trunk:
        failed |= find_without_frames(survey, segments, train.spec, notify)
    left_out = tuple(segment.segment_id for segment in segments if segment.segment_id in failed)
    if left_out:
        splits = keep_segments(splits, {segment.segment_id for segment in segments} - failed)
        if not len(splits.source_train) or not (splits.target_train or len(splits.target_labelled)):
            raise RunError(
                f"{places.card.name}: all train segments of the source or of the target failed to be extracted; "
                f"`echoshift store explain` says why"
            )
    return RunInputs(
        places=places,
        config=config,
        splits=splits,
        left_out=left_out,
        audio=AudioFeatures(stores[0]),
        audio_choice=audio_choice,
        audio_store=stores[0],
        train=train,
        test=test,
        trunk_stores=tuple(stores[1:]),
        survey=survey,
    )


def find_without_frames(
    survey: MediaSurvey, segments: Sequence[Segment], spec: FeatureSpec, notify: Callable[[str], None]
) -> set[str]:
    """Find the ids of segments that have no video, an unreadable one, or one that has ended before; tell of them.

    `extract` would fail them, so that who trains from the videos must leave them out as well. A file that breaks in the
    middle isn't noticed here; it ends the run with its name. Flow images aren't looked at.
    """
    if spec.frame is None or spec.frame.source != "rgb" or not survey.root.is_dir():
        return set()
    ends_s: dict[tuple[str, str, str], float] = {}
    for segment in segments:
        key = (segment.video_id, segment.domain, segment.split)
        if key not in ends_s:
            ends_s[key] = _read_declared_end_s(survey, segment)
    # Only what a header casts doubt on is looked through: that takes seconds for an hour of video.
    doubtful = [s for s in segments if s.stop_s > ends_s[s.video_id, s.domain, s.split] + END_TOLERANCE_S / 2]
    faults = find_media_faults(number_rows(doubtful), survey.probe_duration_s, Path())
    if faults:
        first = faults[0]
        notify(
            f"{len(faults)} segments have no frames and are left out: {first.segment_id} ({first.message}; "
            f"{first.remedy}){' …' if len(faults) > 1 else ''}; `echoshift manifest check --media` names all"
        )
    return {fault.segment_id for fault in faults}


def _read_declared_end_s(survey: MediaSurvey, segment: Segment) -> float:
    """Read when a video ends by its header, in seconds; inf where none says, -inf where it can't be opened."""
    try:
        location = locate_media(survey.root, survey.layout, segment, "rgb")
        if location.kind != "file":
            return survey.probe_duration_s(segment)
        with open_container(location.path) as container:
            stream = find_video_stream(container)
            end_s = None if stream is None else get_declared_end_s(container, stream)
            return math.inf if end_s is None else end_s - get_container_start_s(container)
    except MediaError:
        return -math.inf


def _check_networks(config: Stage1Config) -> None:
    """Raise SpecError for a network without a trunk, an unknown stage or a cache of what is to train.

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


def _fill_store(
    places: DataPlaces,
    choice: EncoderChoice,
    segments: Sequence[Segment],
    progress: ExtractionProgress,
    notify: Callable[[str], None],
) -> FeatureStore:
    """Open the store of a specification, after the segments that it lacks were extracted.

    Without media it must hold all of them. Raises RunError otherwise, and whatever extraction raises. Failed segments
    stay failed; who trains leaves them out.
    """
    path = name_store(places.cache_dir, places.card.name, choice.spec, "zarr")
    if not has_store(path):
        in_hdf5 = name_store(places.cache_dir, places.card.name, choice.spec, "hdf5") if not path.is_remote else path
        path = in_hdf5 if has_store(in_hdf5) else path
    if not places.media_root.is_dir():
        return _open_whole(places, path, choice, segments)
    request = ExtractionRequest(
        card=places.card,
        manifest=replace(places.manifest, segments=tuple(segments)),
        media_root=places.media_root,
        cache_dir=places.cache_dir,
        backend="hdf5" if str(path).endswith(".h5") else "zarr",
        encoders=((choice.spec, choice.weights),),
        options=RunOptions(device=places.device),
        wait_s=float("inf"),
    )
    summary = extract_features(request, progress, notify)
    if summary.stores[0].n_failed:
        notify(
            f"{summary.stores[0].n_failed} segments have no features of {choice.spec.encoder} and are left out; "
            f"`echoshift store explain SEGMENT` says why"
        )
    if summary.n_unchecked:
        notify(
            f"{summary.n_unchecked} segments' features of {choice.spec.encoder} are taken as they are: "
            f"their media can't be read now; {summary.stores[0].unchecked_reason}"
        )
    return open_store(path)


def _open_whole(places: DataPlaces, path: Place, choice: EncoderChoice, segments: Sequence[Segment]) -> FeatureStore:
    settings = "".join(f" --set {setting}" for setting in choice.settings)
    missing = (
        f"extract {places.card.name} with --encoders {choice.spec.encoder}{settings}, or say with --media where its "
        f"media lie"
    )
    if choice.spec.n_sound_views > 1:
        missing += ", or train on clean audio with sound.n_views=1"
    if not has_store(path):
        raise RunError(f"no media at {places.media_root}, and no store {path}; {missing}")
    store = open_store(path)
    known = set(store.segment_ids)
    absent = [segment.segment_id for segment in segments if segment.segment_id not in known]
    if absent:
        raise RunError(
            f"no media at {places.media_root}, and {path} lacks {len(absent)} segments, {absent[0]} first; {missing}"
        )
    return store


def _find_rows(store: FeatureStore, segment_ids: Sequence[str]) -> np.ndarray:
    return RowFinder(list(store.segment_ids)).find(str(store.path), segment_ids)


def _read_digests(store: FeatureStore, segment_ids: Sequence[str]) -> list[str]:
    """Read what segments' rows were made from, 32 hex digits each."""
    rows = _find_rows(store, segment_ids)
    return [bytes(digest).hex() for digest in store.read_array("digest")[rows]]
