"""Measures an epoch of Stage 1 in `frames` mode against one in `trunk` mode, interleaved, with and without attention.

Run as `python -m benchmarks.stage1_modes --media FOLDER [--segments 16] [--batch 4] [--repeats 3] [--precision fp32]
[--encoder i3d_rgb] [--weights random:0] [--views 2] [--cached-mb 0] [--sound-s 10]`. Segments are the first seconds of
the videos below FOLDER. Both modes train the same network by the same step (cross-entropy, Adam), a step of one and a
step of the other in turn. Printed are medians in ms a segment of the parts of a step, their share, and the ratio of the
two modes. Attention is the same work in both: where its figures differ, the machine was busy with something else. Sound
is random numbers of the size of ResNet-18's map. `--cached-mb 0` decodes in every epoch; with more, epochs after the
first find the pictures in memory, which the first epoch here, that isn't measured, sees to.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from echoshift.extract.encoders.registry import find_encoder
from echoshift.extract.feature_specs import StoreOptions, make_feature_spec
from echoshift.extract.media import MediaSurvey, identify_segments
from echoshift.extract.shard import process_shard
from echoshift.extract.weights.load import load_encoder, resolve_weights
from echoshift.extract.work import ExtractionPlan, RunOptions, ShardWork, StoreTarget
from echoshift.pipeline.cards import MediaLayout
from echoshift.pipeline.devices import keep_freed_memory
from echoshift.pipeline.execution import ShardTask, commit_report
from echoshift.pipeline.importers.folder import VIDEO_ENDINGS
from echoshift.pipeline.segments import Segment
from echoshift.pipeline.store.interface import FeatureStore
from echoshift.pipeline.store.layout import compute_digests, plan_shards
from echoshift.pipeline.store.open import create_store, open_store
from echoshift.train.stage1.clips import ClipSource, TrunkClips
from echoshift.train.stage1.config import AttentionConfig
from echoshift.train.stage1.encoder import AudioAttention, GatedEncoder
from echoshift.train.stage1.frames import DecodedClips

LAYOUT = MediaLayout()
N_CLASSES = 8
PARTS = ("inputs", "trunk", "attention", "head and step")


class Training:
    """Trains step by step, and notes how long each part of a step takes."""

    def __init__(
        self, encoder: GatedEncoder, attention: AudioAttention | None, map_shape: tuple[int, ...], precision: str
    ) -> None:
        self.encoder, self.attention, self.map_shape = encoder, attention, map_shape
        self.dtype = torch.bfloat16 if precision == "bf16" else None
        parameters = [p for p in encoder.parameters() if p.requires_grad]
        self.optimiser = torch.optim.Adam([*parameters, *(attention.parameters() if attention else ())], lr=1e-4)
        self.parts_s: dict[str, float] = {}

    def run(self, given: Iterator[dict[str, Tensor]], n: int) -> dict[str, float]:
        """Make the next step, on n segments, and return the seconds of its parts."""
        self.parts_s = defaultdict(float)
        with self.timing("inputs"):
            visual = next(given)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.dtype is not None):
            self.step(visual, torch.randn(n, *self.map_shape))
        return dict(self.parts_s)

    def step(self, visual: dict[str, Tensor], sound: Tensor) -> None:
        """Make one step; the gates' gradient is handed over by hand, so that both sides of it can be timed."""
        n = len(sound)
        gates, leaves = None, None
        if self.attention is not None:
            with self.timing("attention"):
                gates = self.attention(sound, torch.ones(n, dtype=torch.bool))
                leaves = {name: gate.detach().requires_grad_() for name, gate in gates.items()}
        if "clip" in visual:
            with self.timing("trunk"):
                visual = self.encoder.compute_trunk(visual)
        with self.timing("head and step"):
            logits = self.encoder(visual, leaves)
            nn.functional.cross_entropy(logits, torch.arange(n) % N_CLASSES).backward()
        if gates is not None and leaves is not None:
            with self.timing("attention"):
                torch.autograd.backward(list(gates.values()), [leaf.grad for leaf in leaves.values()])
        with self.timing("head and step"):
            self.optimiser.step()
            self.optimiser.zero_grad(set_to_none=True)

    @contextmanager
    def timing(self, part: str) -> Iterator[None]:
        """Add what the block takes to a part."""
        started = time.perf_counter()
        yield
        self.parts_s[part] += time.perf_counter() - started


def main() -> None:
    """Make the trunk store, train in turn in both modes, and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--media", type=Path, required=True)
    parser.add_argument("--encoder", default="i3d_rgb")
    parser.add_argument("--weights", default="random:0")
    parser.add_argument("--segments", type=int, default=16)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--views", type=int, default=2)
    parser.add_argument("--cached-mb", type=int, default=0)
    parser.add_argument("--sound-s", type=float, default=10.0, help="seconds of sound that attention sees")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    options = parser.parse_args()
    keep_freed_memory()
    map_shape = plan_map_shape(options.sound_s)
    segments = find_segments(options.media, options.segments)
    batches = [[s.segment_id for s in segments[i : i + options.batch]] for i in range(0, len(segments), options.batch)]
    weights = resolve_weights(options.weights, options.encoder)
    spec_options = {"preset": "zhang-stage1-train", "outputs": ("trunk",)}
    spec = make_feature_spec(options.encoder, weights, StoreOptions(precision=options.precision), **spec_options)
    with tempfile.TemporaryDirectory(prefix="stage1-modes-") as folder:
        store, making_s = make_trunk_store(Path(folder), options, segments)
        frames = DecodedClips(options.media, LAYOUT, segments, spec, seed=0, n_readers=0, n_cached_mb=options.cached_mb)
        modes: dict[str, ClipSource] = {"frames": frames, "trunk": TrunkClips(store, [], seed=0)}
        print(
            f"{options.encoder}, {len(segments)} segments, batch {options.batch}, {options.precision}, "
            f"{torch.get_num_threads()} threads, medians of {options.repeats}; the store of {options.views} views took "
            f"{1e3 * making_s / len(segments):.0f} ms a segment\n"
        )
        print(f"| attention | mode | ms a segment | {' | '.join(PARTS)} | frames / trunk |")
        print(f"|---|---|---|{'---|' * (len(PARTS) + 1)}")
        for has_attention in (False, True):
            torch.manual_seed(0)
            encoder = GatedEncoder(load_encoder(options.encoder, weights), N_CLASSES).train()
            attention = (
                AudioAttention(map_shape[0], encoder.gate_channels, AttentionConfig()).train()
                if has_attention
                else None
            )
            report(Training(encoder, attention, map_shape, options.precision), modes, batches, options.repeats)


def plan_map_shape(sound_s: float) -> tuple[int, ...]:
    """Return the shape of ResNet-18's layer3 for so many seconds of sound."""
    entry = find_encoder("resnet18_audio")
    assert entry.audio is not None, "it hears"
    return entry.output_shapes(entry.clip, entry.audio.model_copy(update={"duration_s": sound_s}))["map"]


def report(training: Training, modes: dict[str, ClipSource], batches: Sequence[Sequence[str]], n_repeats: int) -> None:
    """Measure epochs of both modes step by step in turn, after one that isn't counted, and print a row of each.

    The ratio is the median over the pairs of steps, which meet the same neighbours on the machine.
    """
    taken: dict[str, list[dict[str, float]]] = {mode: [] for mode in modes}
    for repeat in range(n_repeats + 1):
        given = {mode: inputs.iterate_batches(batches, repeat) for mode, inputs in modes.items()}
        for batch in batches:
            for mode in modes:
                parts_s = training.run(given[mode], len(batch))
                if repeat:
                    taken[mode].append({part: s / len(batch) for part, s in parts_s.items()})
    pairs = zip(*(map(_add_up, taken[mode]) for mode in ("frames", "trunk")), strict=True)
    ratio = statistics.median(frames_s / trunk_s for frames_s, trunk_s in pairs)
    has_attention = "no" if training.attention is None else "yes"
    for mode, found in taken.items():
        parts = [statistics.median(p.get(part, 0.0) for p in found) for part in PARTS]
        cells = " | ".join(f"{1e3 * s:.1f} ({100 * s / sum(parts):.0f} %)" for s in parts)
        total_ms = 1e3 * statistics.median(map(_add_up, found))
        print(f"| {has_attention} | {mode} | {total_ms:.1f} | {cells} | {ratio:.1f} |", flush=True)


def _add_up(parts_s: dict[str, float]) -> float:
    return sum(parts_s.values())


def find_segments(media: Path, n: int) -> list[Segment]:
    """Make segments of the first two seconds of videos."""
    paths = sorted(path for path in media.rglob("*") if path.suffix.lower() in VIDEO_ENDINGS)[:n]
    if len(paths) < n:
        raise SystemExit(f"{media} holds {len(paths)} videos, --segments asks for {n}")
    names = [path.relative_to(media).with_suffix("").as_posix() for path in paths]
    return [Segment(name, name, 0.0, 2.0, ("a",), "d", "train") for name in names]


def make_trunk_store(
    folder: Path, options: argparse.Namespace, segments: Sequence[Segment]
) -> tuple[FeatureStore, float]:
    """Extract the views of the segments into a float16 store, as `echoshift extract` does, and times it."""
    weights = resolve_weights(options.weights, options.encoder)
    spec = make_feature_spec(
        options.encoder,
        weights,
        StoreOptions(precision=options.precision),
        preset="zhang-stage1-train",
        overrides=(f"clip.n_views={options.views}",),
        outputs=("trunk",),
    )
    ids = [segment.segment_id for segment in segments]
    store = create_store(
        folder / f"{options.encoder}.zarr",
        "bench",
        spec,
        ids,
        n_clips=options.views,
        manifest_sha256="m",
        weights_source="bench",
        n_rows_per_shard=len(ids),
    )
    started = time.perf_counter()
    survey = MediaSurvey(options.media, LAYOUT)
    digests = {store.path: compute_digests(segments, identify_segments(survey, segments, spec))}
    plan = ExtractionPlan(
        options.media, LAYOUT, {store.path: StoreTarget(store.path, spec, weights)}, RunOptions(device="cpu")
    )
    work = ShardWork(ShardTask(plan_shards(store.layout)[0], (store.path,)), tuple(segments), digests)
    commit_report({store.path: store}, process_shard(plan, work, {store.path: store}))
    return open_store(store.path), time.perf_counter() - started


if __name__ == "__main__":
    main()
