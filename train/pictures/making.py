"""Makes each kind of picture from a dataset's stores and finished runs; trains nothing and extracts nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from echoshift.pipeline.errors import ManifestError, RunError
from echoshift.train.data_places import DataPlaces
from echoshift.train.pictures.embedding import MAX_POINTS, draw_embedding
from echoshift.train.pictures.figures import Picture
from echoshift.train.pictures.modality_features import ModalityFeatures, read_cached_features, read_projected_features
from echoshift.train.pictures.norm_histograms import compute_norms, draw_norm_histograms
from echoshift.train.pictures.norm_shares import N_TOP, compute_shares, draw_shares
from echoshift.train.pictures.run_choice import RunChoice, choose_alignment_run, choose_stage1_run, find_source_only
from echoshift.train.runs import RunRecord
from echoshift.train.segment_view.run_predictions import find_method

SOURCE_ONLY = "source_only"


def make_norm_histograms(places: DataPlaces, runs_dir: Path, choice: RunChoice) -> Picture:
    """Draw feature norms before and after a run of alignment (Planamente et al., Figure 6).

    Before is the source_only run of the same shift, seed and network, and, whether there is one or not, the cached
    features that both were trained on. Raises RunError where no run fits.
    """
    record = choose_alignment_run(runs_dir, choice)
    features: list[ModalityFeatures] = [read_cached_features(places, runs_dir, record)]
    features += [read_projected_features(places, runs_dir, run) for run in _list_compared(runs_dir, record)]
    return draw_norm_histograms([compute_norms(each) for each in features], describe_data(places, record))


def make_norm_shares(places: DataPlaces, runs_dir: Path, choice: RunChoice, n_top: int = N_TOP) -> Picture:
    """Draw what the modalities weigh with and without alignment (Planamente et al., Figure 7).

    Without is the source_only run of the same shift, seed and network; where there is none, the run stands alone.
    Raises RunError where no run fits, and for a dataset of several labels a segment.
    """
    if places.card.task == "multi-label":
        raise RunError(f"{places.card.name} has several labels a segment; the balance of modalities is of one")
    record = choose_alignment_run(runs_dir, choice)
    shares = []
    for run in _list_compared(runs_dir, record):
        features = read_projected_features(places, runs_dir, run)
        labels = np.array([places.card.class_index[segment.labels[0]] for segment in features.segments])
        shares.append(compute_shares(features, labels, n_top))
    return draw_shares(shares, describe_data(places, record))


def make_embedding(
    places: DataPlaces, runs_dir: Path, choice: RunChoice, *, tsne_seed: int = 0, max_points: int = MAX_POINTS
) -> Picture:
    """Draw features before and after adaptation in the plane.

    Visual ones of Stage 1, or, where the choice names a method of alignment, those of both modalities. Raises RunError
    where no run fits, or Stage 1 exported none.
    """
    from echoshift.train.pictures.adapted_features import embed_adaptation, embed_alignment

    if choice.method:
        record = choose_alignment_run(runs_dir, choice)
        parts = embed_alignment(places, runs_dir, record, seed=tsne_seed, max_points=max_points)
    else:
        record = choose_stage1_run(runs_dir, choice, with_features=True)
        parts = embed_adaptation(places, runs_dir, record, seed=tsne_seed, max_points=max_points)
    return draw_embedding(parts, places.card.classes, describe_data(places, record), tsne_seed)


def make_activation_maps(
    places: DataPlaces, runs_dir: Path, choice: RunChoice, segment_id: str, rows: Sequence[str] = (), target: str = ""
) -> Picture:
    """Draw class activation maps of a segment's middle clip (Planamente et al., Figure 6).

    `rows` are those of a grid whose runs are drawn one below the other; none: the last run that fits, and above it,
    where the choice names a method that Stage 1 was trained by end to end, the last one of the same shift and seed by
    `source_only`, if there is one. `target` "" is the class that each run finds most probable. Raises RunError where no
    run fits, MediaError where the segment can't be read, ManifestError for an unknown segment.
    """
    from echoshift.extract.media import OpenMedia
    from echoshift.pipeline.errors import MediaNotFoundError
    from echoshift.train.pictures.activation_figure import draw_activation_maps
    from echoshift.train.pictures.activation_maps import ActivationMapper
    from echoshift.train.segment_view.pictures_and_sound import read_segment_sound
    from echoshift.train.segment_view.reading import find_segment

    if not segment_id:
        raise ManifestError("a class activation map is of one segment; name it (--segment)")
    segment = find_segment({s.segment_id: s for s in places.manifest}, segment_id, places.card.name)
    choices = [replace(choice, row=row) for row in rows] or [choice]
    records = [choose_stage1_run(runs_dir, each) for each in choices]
    if choice.method not in ("", SOURCE_ONLY) and not rows:
        records = [*_find_end_to_end_source_only(runs_dir, records[0]), *records]
    with OpenMedia(places.media_root, places.card.media) as media:
        maps = [ActivationMapper(places, runs_dir, record).map(media, segment, target) for record in records]
        try:
            sound = read_segment_sound(media, segment, 16000)
        except MediaNotFoundError:
            sound = None  # drawn as "no sound"
    return draw_activation_maps(maps, sound, _name_dataset(places))


def _find_end_to_end_source_only(runs_dir: Path, record: RunRecord) -> list[RunRecord]:
    try:
        return [choose_stage1_run(runs_dir, RunChoice(record.shift, record.seed, None, SOURCE_ONLY))]
    except RunError:
        return []  # then the run stands alone


def describe_data(places: DataPlaces, record: RunRecord) -> str:
    """Name data, shift and seed for a title, and say where the data are synthetic."""
    return f"{_name_dataset(places)}, {record.shift}, seed {record.seed}, test segments of its domains"


def _name_dataset(places: DataPlaces) -> str:
    return f"{places.card.name}{' (synthetic)' if places.card.synthetic else ''}"


def _list_compared(runs_dir: Path, record: RunRecord) -> list[RunRecord]:
    """List the runs that are drawn: the one without alignment, where it is done, and the one with it."""
    without = find_source_only(runs_dir, record) if find_method(record) != "source_only" else None
    return [record] if without is None else [without, record]
