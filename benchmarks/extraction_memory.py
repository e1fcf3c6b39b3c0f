"""Measures the peak resident set of extraction while the video gets longer and the segments more.

    python -m benchmarks.extraction_memory [--encoders "slowfast_demo resnet_demo"] [--hours 3] [--repeats 1]

Every extraction runs in a process of its own, whose peak (VmHWM) is read at its end. Videos are drawn by code. Windows
of pictures and the sound around each slide over a video of 2 minutes, of 20 minutes and, at 5 Hz and 48 x 32, over a
film of hours and one of a tenth of it; and 60 and 600 segments of 2 s are taken from the 20 minutes. One segment of 2 s
says what a process needs at all.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from echoshift.extract.demo.generating import write_mp4
from echoshift.extract.feature_specs import StoreOptions, make_feature_spec
from echoshift.extract.run import ExtractionRequest, extract_features
from echoshift.extract.weights.load import resolve_weights
from echoshift.extract.work import RunOptions
from echoshift.pipeline.cards import read_dataset_card
from echoshift.pipeline.segments import Manifest, Segment

SEGMENT_S = 2.0
SOUND_RATE_HZ = 8000
WINDOWS = ("clip.sampling=windows", "clip.n_clips=1", "clip.step=30", "audio.span=clip")
ONE_CLIP = ("clip.n_clips=1",)
TARGET = 1.2


@dataclass(frozen=True, slots=True)
class Run:
    """One extraction: `n_segments` of SEGMENT_S, or, None, the whole video as one segment in windows."""

    name: str
    video: str
    n_segments: int | None
    duration_s: float
    encoders: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run took; `n_clips` of all stores."""

    peak_mb: float
    n_clips: int
    duration_s: float


class NoProgress:
    """Nothing."""

    def start(self, what: str, n_total: int) -> None:
        """Describe nothing."""

    def advance(self, n: int = 1) -> None:
        """Describe nothing."""


def draw_pictures(n_pictures: int, height: int, width: int) -> Iterator[np.ndarray]:
    """Draw noise that moves, in runs of 50 pictures uint8 [50, H, W, 3]."""
    still = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    for start in range(0, n_pictures, 50):
        yield np.stack([np.roll(still, i, axis=1) for i in range(start, min(start + 50, n_pictures))])


def write_video(path: Path, duration_s: float, rate_hz: int, height: int, width: int) -> None:
    n_samples = round(duration_s * SOUND_RATE_HZ)
    samples = np.random.default_rng(1).uniform(-0.1, 0.1, SOUND_RATE_HZ).astype(np.float32)
    sound = np.resize(samples, n_samples)
    write_mp4(path, draw_pictures(round(duration_s * rate_hz), height, width), rate_hz, sound, SOUND_RATE_HZ)


def extract_once(run: Run, root: Path) -> Outcome:
    """Extract in this process, and return its peak resident set."""
    spans = [(0.0, run.duration_s)]
    if run.n_segments is not None:
        spans = [(i * SEGMENT_S, (i + 1) * SEGMENT_S) for i in range(run.n_segments)]
    card = read_dataset_card("demo")
    segments = [
        Segment(f"{run.video}-{i}", run.video, start_s, stop_s, ("circle",), "studio", "train")
        for i, (start_s, stop_s) in enumerate(spans)
    ]
    encoders = []
    for name in run.encoders.split():
        record = resolve_weights("random:0", name)
        overrides = WINDOWS if run.n_segments is None else ONE_CLIP
        spec = make_feature_spec(name, record, StoreOptions(), outputs=["pooled"], overrides=overrides)
        encoders.append((spec, record))
    with tempfile.TemporaryDirectory(prefix="echoshift-bench-cache-") as cache:
        request = ExtractionRequest(
            card=card,
            manifest=Manifest("demo", tuple(segments), "generated"),
            media_root=root,
            cache_dir=Path(cache),
            backend="zarr",
            encoders=tuple(encoders),
            options=RunOptions(device="cpu"),
        )
        started = time.perf_counter()
        summary = extract_features(request, NoProgress())
        duration_s = time.perf_counter() - started
        n_clips = 0
        for store in summary.stores:
            if store.n_done != len(segments):
                raise SystemExit(f"{run.name}: {store.n_failed} segments failed: {store.failures[:1]}")
            n_clips += count_clips(store.path)
    return Outcome(read_peak_mb(), n_clips, duration_s)


def count_clips(store_path: str) -> int:
    from echoshift.pipeline.store.open import open_store

    return int(open_store(store_path).read_array("n_valid").sum())


def read_peak_mb() -> float:
    """Read this process's peak resident set; ru_maxrss would hold its parent's, if that was larger."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 1024


def measure(run: Run, root: Path) -> Outcome:
    command = [sys.executable, "-m", "benchmarks.extraction_memory", "--measure", json.dumps(asdict(run)), str(root)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{run.name} ended with exit code {done.returncode}; its error is above")
    return Outcome(**json.loads(done.stdout))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoders", default="slowfast_demo resnet_demo")
    parser.add_argument("--hours", type=float, default=3.0, help="of the longest video; 0 leaves it out")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        outcome = extract_once(Run(**json.loads(arguments.measure[0])), Path(arguments.measure[1]))
        print(json.dumps(asdict(outcome)))
        return
    names = arguments.encoders
    film_s = 3600 * arguments.hours
    runs = [
        Run("1 segment", "long", 1, SEGMENT_S, names),
        Run("windows, 2 min", "short", None, 120.0, names),
        Run("windows, 20 min", "long", None, 1200.0, names),
        Run("60 segments", "long", 60, SEGMENT_S, names),
        Run("600 segments", "long", 600, SEGMENT_S, names),
    ]
    with tempfile.TemporaryDirectory(prefix="echoshift-bench-media-") as folder:
        root = Path(folder)
        layout = read_dataset_card("demo").media.rgb[0]
        for video, duration_s, rate_hz, height, width in (
            ("short", 120.0, 15, 48, 64),
            ("long", 1200.0, 15, 48, 64),
            ("tenth", film_s / 10, 5, 32, 48),
            ("film", film_s, 5, 32, 48),
        ):
            if duration_s:
                place = root / layout.format(video_id=video, domain="studio", split="train", participant=video)
                write_video(place.with_suffix(".mp4"), duration_s, rate_hz, height, width)
        if film_s:
            runs.append(Run(f"windows, {arguments.hours / 10:g} h", "tenth", None, film_s / 10, names))
            runs.append(Run(f"windows, {arguments.hours:g} h", "film", None, film_s, names))
        peaks: dict[str, float] = {}
        print("| run | clips | seconds | peak MB |\n|---|---|---|---|")
        for run in runs:
            outcomes = [measure(run, root) for _ in range(arguments.repeats)]
            peaks[run.name] = statistics.median(outcome.peak_mb for outcome in outcomes)
            print(
                f"| {run.name} | {outcomes[0].n_clips} | {outcomes[0].duration_s:.1f} | {peaks[run.name]:.0f} |",
                flush=True,
            )
    pairs = [("windows, 2 min", "windows, 20 min"), ("60 segments", "600 segments")]
    if film_s:
        pairs.append((f"windows, {arguments.hours / 10:g} h", f"windows, {arguments.hours:g} h"))
    for small, large in pairs:
        print(f"{large} / {small}: {peaks[large] / peaks[small]:.3f} (target {TARGET})")


if __name__ == "__main__":
    main()
