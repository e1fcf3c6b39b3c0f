"""Embeds the features of a shift's segments before and after adaptation, by Stage 1 or by a method of alignment."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from echoshift.pipeline.errors import RunError
from echoshift.pipeline.segments import Segment
from echoshift.pipeline.store.interface import FeatureStore
from echoshift.pipeline.store.layout import DONE
from echoshift.pipeline.store.open import list_stores, open_store
from echoshift.train.data_places import DataPlaces
from echoshift.train.features import read_visual
from echoshift.train.pictures.embedding import MAX_POINTS, EmbeddedFeatures, choose_segments, embed
from echoshift.train.pictures.modality_features import ModalityFeatures, read_cached_features, read_projected_features
from echoshift.train.runs import RunRecord
from echoshift.train.segment_view.run_predictions import describe_run
from echoshift.train.splits import TEST, find_shift
from echoshift.train.steps import RECORD


def embed_adaptation(
    places: DataPlaces, runs_dir: Path, record: RunRecord, *, seed: int = 0, max_points: int = MAX_POINTS
) -> tuple[EmbeddedFeatures, EmbeddedFeatures]:
    """Embed the test segments of a shift's domains as the cache has them, and as a run of Stage 1 does.

    Before are the pooled features of the same encoder in the cache; raises RunError where the cache has none, or the
    run exported none.
    """
    after = open_adapted_store(runs_dir, record)
    before = find_cached_store(places, record, after)
    shift = find_shift(places.card, record.shift)
    domains = {*shift.source, shift.target}
    there = _list_done(before) & _list_done(after)
    segments = [s for s in places.manifest if s.domain in domains and s.split == TEST and s.segment_id in there]
    chosen = [segments[i] for i in choose_segments(segments, max_points, seed)]
    titles = (f"before: {before.spec.encoder} as extracted", f"after: {describe_run(record)}")
    stores = zip((before, after), titles, strict=True)
    first, second = (embed_store(store, title, chosen, len(segments), seed) for store, title in stores)
    return first, second


def embed_alignment(
    places: DataPlaces, runs_dir: Path, record: RunRecord, *, seed: int = 0, max_points: int = MAX_POINTS
) -> tuple[EmbeddedFeatures, EmbeddedFeatures]:
    """Embed the test segments of a shift's domains as a run of alignment was given them, and as it projects them.

    The features of both modalities side by side, each the mean over clips; zeros where there is no sound.
    """
    before = read_cached_features(places, runs_dir, record)
    after = read_projected_features(places, runs_dir, record)
    chosen = choose_segments(before.segments, max_points, seed)
    titles = ("before: the features of both modalities", f"after: {describe_run(record)}")
    first, second = (
        EmbeddedFeatures(
            title,
            tuple(features.segments[i] for i in chosen),
            embed(join_modalities(features)[chosen], seed),
            len(features.segments),
        )
        for features, title in zip((before, after), titles, strict=True)
    )
    return first, second


def join_modalities(features: ModalityFeatures) -> np.ndarray:
    """Join the mean over clips of both modalities, float32 [n, D_v + D_a]; zeros where there is no sound."""
    audio = np.where(features.heard[:, None], features.audio.mean(axis=1), 0)
    return np.concatenate([features.visual.mean(axis=1), audio], axis=1).astype(np.float32)


def embed_store(store: FeatureStore, title: str, segments: list[Segment], n_all: int, seed: int) -> EmbeddedFeatures:
    """Embed the features of a store's segments: outputs side by side, each the mean over views, clips and tokens."""
    found = read_visual(store, [segment.segment_id for segment in segments])
    means = [values.float().flatten(1, -2).mean(dim=1).numpy() for values in found.values()]
    return EmbeddedFeatures(title, tuple(segments), embed(np.concatenate(means, axis=1), seed), n_all)


def open_adapted_store(runs_dir: Path, record: RunRecord) -> FeatureStore:
    """Open the features that a run of Stage 1 exported; raises RunError where it has none."""
    folder = runs_dir / "steps" / f"features-{record.steps.get('features', 'none')}"
    try:
        name = json.loads((folder / RECORD).read_text(encoding="utf-8"))["outcome"]["store"]
    except (OSError, ValueError, KeyError) as error:
        raise RunError(f"{describe_run(record)} exported no features; run `echoshift stage1` with --export") from error
    return open_store(folder / str(name))


def find_cached_store(places: DataPlaces, record: RunRecord, adapted: FeatureStore) -> FeatureStore:
    """Find the pooled features of a run's visual encoder in the cache; raises RunError where there are none.

    Of several stores it is that of the same clips as the adapted features, if there is one, and else the longest.
    """
    encoder = str(record.config["visual"]["encoder"])
    stores = [open_store(path) for path in list_stores(places.cache_dir)]
    found = [
        store
        for store in stores
        if store.attributes["dataset"] == places.card.name
        and store.spec.encoder == encoder
        and [output.name for output in store.spec.outputs] == ["pooled"]
    ]
    if not found:
        raise RunError(
            f"{places.cache_dir} has no pooled features of {places.card.name} by {encoder}, from before adaptation; "
            f"extract them (--encoders {encoder})"
        )
    return max(found, key=lambda store: (store.spec.clip == adapted.spec.clip, len(store.segment_ids)))


def _list_done(store: FeatureStore) -> set[str]:
    return {s for s, state in zip(store.segment_ids, store.read_array("state"), strict=True) if state == DONE}
