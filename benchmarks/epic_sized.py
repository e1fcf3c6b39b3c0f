"""Makes features of EPIC-Kitchens' size out of random numbers: a store, Stage 1's tables, a manifest and a card.

    python -m benchmarks.epic_sized --folder FOLDER [--annotations FOLDER] [--seeds 1] [--small 1]

With MM-SADA's split files (`--annotations`) the segments are the real ones; without, there are as many of each class as
the card of `epic` counts. Nothing else is EPIC's: features are drawn, and the dataset is named `epic_sized`.

A segment's feature is its class' mean, its domain's offset, what its domain makes of the class, and noise of the
segment and of each clip. Stage 1's tables guess the class, pictures right at 55 %, sound at 45 %.
`--small 10` makes a tenth.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from echoshift.pipeline.cards import DatasetCard, Shift, read_dataset_card, write_card
from echoshift.pipeline.importers.epic import import_epic
from echoshift.pipeline.manifest import write_manifest
from echoshift.pipeline.segments import Segment
from echoshift.pipeline.specs import ClipSpec, FeatureSpec, FrameSpec, OutputSpec
from echoshift.pipeline.store.interface import ShardIndex
from echoshift.pipeline.store.layout import order_segments, plan_rows_per_shard, plan_shards
from echoshift.pipeline.store.open import create_store, open_store
from echoshift.train.predictions import AudioPredictions, Predictions, write_prediction_table

DATASET = "epic_sized"
N_CLIPS, N_VISUAL, N_AUDIO = 5, 2304, 512
P_RIGHT, P_HEARD_RIGHT, P_SILENT = 0.55, 0.45, 0.02
_SIGNAL, _OFFSET, _OF_DOMAIN, _CLIP_NOISE = 0.06, 0.3, 0.04, 0.7  # beside noise of 1 a segment


@dataclass(frozen=True, slots=True)
class EpicSized:
    """Where the files lie; `table` is that of a shift and a seed, as Stage 2's streams name it."""

    folder: Path
    card: DatasetCard
    segments: tuple[Segment, ...]

    @property
    def features(self) -> Path:
        """Name the store."""
        return self.folder / "features.zarr"

    @property
    def manifests(self) -> Path:
        """Name the folder of manifest and card."""
        return self.folder / "manifests"

    def table(self, shift: str, seed: int) -> Path:
        """Name the table of a shift and a seed."""
        return self.folder / f"table-{shift}-{seed}.parquet"


def make_epic_sized(folder: Path, annotations: Path | None, *, n_seeds: int = 1, small: int = 1) -> EpicSized:
    """Make all files; what lies there from before is read again if its store is whole."""
    epic = read_dataset_card("epic")
    segments = _invent_segments(epic) if annotations is None else import_epic(annotations, epic)
    segments = segments[::small]
    card = epic.model_copy(
        update={
            "name": DATASET,
            "title": "Random features of EPIC's size",
            "description": "Numbers drawn by benchmarks/epic_sized.py; no recording of anything.",
            "synthetic": True,
            "counts": (),
            "sources": (),
            "published": (),
            "encoders": (),
            "shifts": tuple(shift for shift in epic.shifts if len(shift.source) == 1),
        }
    )
    made = EpicSized(folder, card, segments)
    last = made.table(card.shifts[-1].name, n_seeds - 1)
    if last.exists() and set(open_store(made.features).segment_ids) == {s.segment_id for s in segments}:
        return made
    write_card(made.manifests / f"{DATASET}.toml", card)
    sha256 = write_manifest(made.manifests / f"{DATASET}.csv", segments)
    _fill_store(made, sha256)
    audio = _draw_audio(made)
    for seed in range(n_seeds):
        for i, shift in enumerate(card.shifts):
            _write_table(made, shift, seed, audio, np.random.default_rng([2, seed, i]))
    return made


def _invent_segments(card: DatasetCard) -> tuple[Segment, ...]:
    return tuple(
        Segment(
            f"{c.domain}-{c.split}-{k}-{i}", f"{c.domain}_{i % 20}", i, i + 2, (card.classes[k],), c.domain, c.split
        )
        for c in card.counts
        for k, (name, n) in enumerate(zip(card.classes, c.n_per_class, strict=True))
        for i in range(n)
    )


def _index(made: EpicSized, segments: Sequence[Segment]) -> tuple[np.ndarray, np.ndarray]:
    classes = np.array([made.card.class_index[s.labels[0]] for s in segments])
    return classes, np.array([made.card.domains.index(s.domain) for s in segments])


def _draw_centres(made: EpicSized, n_dims: int, signal: float) -> np.ndarray:
    """Draw where each domain's classes lie, float32 [n_domains, K, n_dims]."""
    rng = np.random.default_rng([0, n_dims])
    n_domains, n_classes = len(made.card.domains), len(made.card.classes)
    means = rng.standard_normal((1, n_classes, n_dims)) * signal
    means = means + rng.standard_normal((n_domains, 1, n_dims)) * _OFFSET
    means = means + rng.standard_normal((n_domains, n_classes, n_dims)) * _OF_DOMAIN
    return means.astype(np.float32)


def _fill_store(made: EpicSized, sha256: str) -> None:
    ordered = order_segments(made.segments)
    classes, domains = _index(made, ordered)
    centres = _draw_centres(made, N_VISUAL, _SIGNAL)
    spec = FeatureSpec(
        encoder=DATASET,
        weights="0" * 64,
        clip=ClipSpec(n_frames=32, n_clips=N_CLIPS),
        frame=FrameSpec(short_side=8, crop=8, mean=(0, 0, 0), std=(1, 1, 1)),
        outputs=(OutputSpec(name="pooled", shape=(N_VISUAL,)),),
        dtype="float16",
    )
    store = create_store(
        made.features,
        DATASET,
        spec,
        [s.segment_id for s in ordered],
        n_clips=N_CLIPS,
        manifest_sha256=sha256,
        weights_source="none",
        n_rows_per_shard=plan_rows_per_shard(spec, len(ordered), N_CLIPS),
    )
    rng = np.random.default_rng(1)
    for shard in plan_shards(store.layout):
        rows, n = slice(shard.start_row, shard.stop_row), shard.n_rows
        values = (centres[domains[rows], classes[rows]] + rng.standard_normal((n, N_VISUAL), np.float32))[:, None]
        values = values + rng.standard_normal((n, N_CLIPS, N_VISUAL), np.float32) * np.float32(_CLIP_NOISE)
        store.begin_shard(shard)
        store.write_outputs("pooled", shard.start_row, values.astype(np.float16))
        store.commit_shard(
            shard,
            ShardIndex(
                times=np.tile(np.array([0.0, 1.0]), (n, N_CLIPS, 1)),
                frames=np.zeros((n, N_CLIPS, 2), np.int64),
                n_valid=np.full(n, N_CLIPS, np.int32),
                digest=np.ones((n, 16), np.uint8),
                state=np.ones(n, np.uint8),
            ),
        )


def _draw_audio(made: EpicSized) -> tuple[np.ndarray, np.ndarray]:
    """Draw the audio features, float32 [n, 512], and who has any, bool [n]."""
    rng = np.random.default_rng(3)
    classes, domains = _index(made, made.segments)
    noise = rng.standard_normal((len(classes), N_AUDIO), np.float32)
    return _draw_centres(made, N_AUDIO, 2 * _SIGNAL)[domains, classes] + noise, rng.random(len(classes)) >= P_SILENT


def _write_table(
    made: EpicSized, shift: Shift, seed: int, audio: tuple[np.ndarray, np.ndarray], rng: np.random.Generator
) -> None:
    domains = {*shift.source, shift.target}
    kept = [i for i, s in enumerate(made.segments) if s.domain in domains]
    segments = [made.segments[i] for i in kept]
    ids = tuple(s.segment_id for s in segments)
    classes, _ = _index(made, segments)
    heard = AudioPredictions(ids, _guess(classes, P_HEARD_RIGHT, made, rng), audio[0][kept], audio[1][kept])
    seen = Predictions(ids, _guess(classes, P_RIGHT, made, rng))
    labelled = [s.segment_id for s in segments if s.domain == shift.target and s.split == "train"]
    path = made.table(shift.name, seed)
    write_prediction_table(path, segments, made.card.classes, heard, seen, seen, labelled)


def _guess(classes: np.ndarray, p_right: float, made: EpicSized, rng: np.random.Generator) -> np.ndarray:
    """Draw probabilities float32 [n, K] whose argmax is right with probability p_right."""
    n, n_classes = len(classes), len(made.card.classes)
    wrong = (classes + rng.integers(1, n_classes, n)) % n_classes
    guess = np.where(rng.random(n) < p_right, classes, wrong)
    sure = rng.uniform(0.51, 0.99, (n, 1))
    rest = rng.dirichlet(np.ones(n_classes), n) * (1 - sure)
    return (rest + sure * np.eye(n_classes)[guess]).astype(np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--annotations", type=Path)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--small", type=int, default=1)
    args = parser.parse_args()
    made = make_epic_sized(args.folder, args.annotations, n_seeds=args.seeds, small=args.small)
    print(f"{len(made.segments)} segments: {made.features}, {made.table('D1-D2', 0)}, manifest in {made.manifests}")


if __name__ == "__main__":
    main()
