"""Finds the stores that Stage 1 trains from, and has extracted what they lack."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from echoshift.extract.encoders.registry import find_encoder
from echoshift.extract.feature_specs import StoreOptions, choose_flow, make_feature_spec
from echoshift.extract.media import MediaSurvey, identify_segments
from echoshift.extract.recipes import ZHANG2022_N_MASKED_BINS, ZHANG2022_NOISE
from echoshift.extract.run import ExtractionProgress, ExtractionRequest, extract_features
from echoshift.extract.weights.load import WeightsRecord, default_weights, resolve_weights
from echoshift.extract.work import RunOptions
from echoshift.pipeline.errors import RunError
from echoshift.pipeline.segments import Segment
from echoshift.pipeline.specs import FeatureSpec
from echoshift.pipeline.store.interface import FeatureStore, RowFinder
from echoshift.pipeline.store.layout import DONE, compute_digests
from echoshift.pipeline.store.location import Place
from echoshift.pipeline.store.open import has_store, name_store, open_store
from echoshift.train.data_places import DataPlaces
from echoshift.train.stage1.config import SoundConfig, VisualConfig


@dataclass(frozen=True, slots=True)
class EncoderChoice:
    """A specification with the weights that it names; of sound, `settings` are what `extract --set` makes it by."""

    spec: FeatureSpec
    weights: WeightsRecord
    settings: tuple[str, ...] = ()


def choose_sound(config: SoundConfig) -> EncoderChoice:
    """Make the specification of the store of layer3 maps and pooled sound features, that of a plain `extract`.

    With views it is that of an extraction with `list_view_settings`.
    """
    record = resolve_weights(config.weights or default_weights(config.encoder), config.encoder)
    overrides = (*list_view_settings(config.n_views), *config.overrides)
    spec = make_feature_spec(config.encoder, record, StoreOptions(), outputs=("map", "pooled"), overrides=overrides)
    return EncoderChoice(spec, record, overrides)


def list_view_settings(n_views: int) -> tuple[str, ...]:
    """List what `extract --set` takes for views of sound as A's training has them; nothing for one view."""
    if n_views == 1:
        return ()
    values = {"n_views": n_views, "noise": ZHANG2022_NOISE, "n_masked_bins": ZHANG2022_N_MASKED_BINS}
    return tuple(f"audio.{name}={value}" for name, value in values.items())


def choose_visual(
    config: VisualConfig, places: DataPlaces, preset: str, *, n_views: int = 1, outputs: Sequence[str] = ("trunk",)
) -> EncoderChoice:
    """Make the specification of the visual encoder's clips under a preset."""
    record = resolve_weights(config.weights or default_weights(config.encoder), config.encoder)
    overrides = list(config.overrides)
    if find_encoder(config.encoder).modality == "flow":
        flow = choose_flow(places.card, places.manifest, places.media_root)
        overrides.insert(0, f"frame.flow={flow}")
    if n_views > 1:
        overrides.append(f"clip.n_views={n_views}")
    spec = make_feature_spec(
        config.encoder, record, StoreOptions(), outputs=outputs, preset=preset, overrides=overrides
    )
    return EncoderChoice(spec, record)


def fill_store(
    places: DataPlaces,
    choice: EncoderChoice,
    segments: Sequence[Segment],
    progress: ExtractionProgress,
    notify: Callable[[str], None],
) -> FeatureStore:
    """Open the store of a specification, after the segments that it lacks were extracted.

    Where the media aren't there it must hold all of them. Raises RunError otherwise, and whatever extraction raises.
    Failed segments stay failed; who trains leaves them out.
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
        missing += ", or train on clean sound with sound.n_views=1"
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


def select_done(store: FeatureStore, segment_ids: Sequence[str]) -> np.ndarray:
    """Describe which segments' rows are done, bool [n]; raises StoreError for one that the store hasn't."""
    rows = RowFinder(list(store.segment_ids)).find(str(store.path), segment_ids)
    return np.asarray(store.read_array("state")[rows] == DONE)


def read_digests(store: FeatureStore, segment_ids: Sequence[str]) -> list[str]:
    """Read what segments' rows were made from, 32 hex digits each."""
    rows = RowFinder(list(store.segment_ids)).find(str(store.path), segment_ids)
    return [bytes(digest).hex() for digest in store.read_array("digest")[rows]]


def compute_media_digests(survey: MediaSurvey, spec: FeatureSpec, segments: Sequence[Segment]) -> list[str]:
    """Compute from the media what rows of a specification would be made from, 32 hex digits each (FORMAT.md)."""
    identities = identify_segments(survey, list(segments), spec)
    return [bytes(digest).hex() for digest in compute_digests(list(segments), identities)]
