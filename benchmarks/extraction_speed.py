"""Measures the extraction pipeline against its own parts, and against the plain loop that peers run, on real files.

    ECHOSHIFT_SHARED=... python -m benchmarks.extraction_speed [--segments 4] [--repeats 3] [--device auto]
        [--precision fp32] [--batch N] [--clips 1] [--weights random|installed] [--media FOLDER] [--seconds 3]

Each repeat measures, one after the other and on the same segments: the whole pipeline (throw-away stores made, filled
and committed), reading alone, computing alone (pictures and sound prepared on the device, and the networks), the
networks alone, and the plain loop of benchmarks/plain_loop.py in a process of its own. Networks are loaded, and each
part has run once, before. Medians over the repeats are printed. `parts` is 1/(1/reading + 1/computing) on a CPU, whose
cores both share, and min(reading, computing) on a GPU; `strict` has the networks alone in computing's place. Sound
alone takes SOUND_FACTOR times as many segments, since one takes so little time. The plain loop of all encoders is the
sum of each one's loop, which is what it does.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from benchmarks.pipeline_parts import Encoders, PipelineParts
from benchmarks.plain_loop import describe_plain_loop
from echoshift.extract.clips import plan_clips
from echoshift.extract.feature_specs import StoreOptions, make_feature_spec
from echoshift.extract.media import MediaSurvey, locate_media, open_frames
from echoshift.extract.rows import choose_n_readers
from echoshift.extract.run import choose_spread, extract_on_trial
from echoshift.extract.shard import choose_batch
from echoshift.extract.weights.load import default_weights, resolve_weights
from echoshift.extract.work import RunOptions
from echoshift.pipeline.cards import MediaLayout
from echoshift.pipeline.devices import resolve_device
from echoshift.pipeline.segments import Segment
from echoshift.pipeline.store.layout import FAILED

SOUND_FACTOR = 5
MIN_COSINE = 0.999


@dataclass(slots=True)
class Case:
    """Some encoders on some segments, and the seconds a segment that each repeat took."""

    name: str
    encoders: Encoders
    segments: Sequence[Segment]
    parts: PipelineParts
    whole_s: list[float] = field(default_factory=list)
    reading_s: list[float] = field(default_factory=list)
    computing_s: list[float] = field(default_factory=list)
    networks_s: list[float] = field(default_factory=list)
    plain_s: list[float] = field(default_factory=list)


class PlainLoop:
    """The other process."""

    def __init__(self, folder: Path, job: dict[str, object]) -> None:
        path = folder / "job.json"
        path.write_text(json.dumps(job))
        command = [sys.executable, "-m", "benchmarks.plain_loop", str(path)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._answer()

    def measure_s(self, encoder: str) -> float:
        """Run an encoder's loop over there."""
        assert self._process.stdin is not None
        print(encoder, file=self._process.stdin, flush=True)
        return float(self._answer())

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"the plain loop ended with exit code {self._process.wait()}; its error is above")
        return line

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def find_segments(root: Path, seconds: float) -> list[Segment]:
    """List the videos below a folder, the first seconds of each as one segment."""
    survey = MediaSurvey(root, MediaLayout())
    found = []
    for path in sorted(root.rglob("*.mp4")):
        video_id = path.relative_to(root).with_suffix("").as_posix()
        whole = Segment(video_id, video_id, 0.0, seconds, ("none",), "none", "none")
        stop_s = min(seconds, survey.probe_duration_s(whole))
        found.append(Segment(video_id, video_id, 0.0, stop_s, ("none",), "none", "none"))
    return found


def describe_segments(case: Case) -> list[dict[str, object]]:
    """Tell the plain loop where a single encoder's segments lie, and when its clips' pictures are shown."""
    ((spec, _),) = case.encoders
    described: list[dict[str, object]] = []
    for number, segment in enumerate(case.segments):
        location = locate_media(case.parts.survey.root, case.parts.survey.layout, segment, "rgb")
        clips: list[list[float]] = [[]]
        if spec.frame is not None:
            with open_frames(location, "pyav") as reader:
                times = (reader.frame_times_s, reader.info.duration_s)
            clips = plan_clips(spec.clip, segment.start_s, segment.stop_s, *times).frame_times_s.tolist()
        span = {"start_s": segment.start_s, "stop_s": segment.stop_s, "clips": clips}
        described.append({"id": str(number), "path": str(location.path), **span})
    return described


def run_whole(case: Case, options: RunOptions) -> tuple[float, dict[str, np.ndarray]]:
    """Measure the pipeline as it is, in seconds a segment, and return `pooled` by encoder."""
    with tempfile.TemporaryDirectory(prefix="echoshift-bench-") as folder:
        started = time.perf_counter()
        stores = extract_on_trial(Path(folder), case.encoders, case.segments, case.parts.survey, options)
        duration_s = time.perf_counter() - started
        for store in stores:
            if (store.read_array("state") == FAILED).any():
                raise SystemExit(f"{store.spec.encoder}: segments failed; see the media")
        features = {store.spec.encoder: np.array(store.read_all("pooled"), np.float64) for store in stores}
    return duration_s / len(case.segments), features


def compare_features(features: np.ndarray, folder: Path) -> tuple[float, float]:
    """Return the smallest cosine of a clip's features with the plain loop's, as they are and less the plain mean."""
    plain = np.stack([np.load(folder / f"{i}.npy") for i in range(len(features))]).astype(np.float64)
    a, b = (values.reshape(-1, values.shape[-1]) for values in (features, plain))
    return cosine(a, b), cosine(a - b.mean(axis=0), b - b.mean(axis=0))


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    products = (a * b).sum(axis=1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
    return float(products.min())


def print_cases(cases: Sequence[Case], device: torch.device) -> None:
    parts_name = "min(reading, computing)" if device.type == "cuda" else "1/(1/reading + 1/computing)"
    print(f"parts = {parts_name}; segments/s; medians\n")
    print("| encoder | whole | reading | computing | networks | whole / parts | strict | plain loop | whole / plain |")
    print("|---|---|---|---|---|---|---|---|---|")
    for case in cases:
        join = max if device.type == "cuda" else sum
        repeats = list(zip(case.whole_s, case.reading_s, case.computing_s, case.networks_s, strict=True))
        of_parts = statistics.median(join((read, compute)) / whole for whole, read, compute, _ in repeats)
        strict = statistics.median(join((read, network)) / whole for whole, read, _, network in repeats)
        of_plain = statistics.median(p / w for p, w in zip(case.plain_s, case.whole_s, strict=True))
        speeds = [1 / statistics.median(s) for s in (case.whole_s, case.reading_s, case.computing_s, case.networks_s)]
        figures = " | ".join(f"{speed:.2f}" for speed in speeds)
        plain = f"{1 / statistics.median(case.plain_s):.2f} | {of_plain:.2f}"
        print(f"| {case.name} | {figures} | {of_parts:.2f} | {strict:.2f} | {plain} |")


def print_settings(arguments: argparse.Namespace, device: torch.device, parts: PipelineParts) -> None:
    gpu = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
    print(f"{device}{gpu}, torch {torch.__version__}, {torch.get_num_threads()} threads, {parts.n_readers} reader(s),")
    print(
        f"{arguments.precision}, batch {parts.n_batch}, {arguments.weights} weights, {arguments.segments} segments of"
    )
    print(f"{arguments.seconds:g} s, {arguments.clips} clip(s) each, {arguments.repeats} repeats")


def parse_arguments() -> tuple[argparse.Namespace, Path]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16", "fp16"])
    parser.add_argument("--encoders", default="slowfast_r50 i3d_rgb resnet18_audio")
    parser.add_argument("--segments", type=int, default=4)
    parser.add_argument("--clips", type=int, default=1)
    parser.add_argument("--batch", type=int, default=None, help="clips a batch; default: the device's own")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--weights", default="random", choices=["random", "installed"])
    parser.add_argument("--media", type=Path, default=None, help="a folder of .mp4 files; default: shared grid_av")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each video")
    arguments = parser.parse_args()
    shared = os.environ.get("ECHOSHIFT_SHARED")
    root = arguments.media or (Path(shared) / "grid_av" if shared else None)
    if root is None or not root.is_dir():
        parser.error("needs videos: set ECHOSHIFT_SHARED to the shared data, or give --media FOLDER")
    if not any(root.rglob("*.mp4")):
        parser.error(f"there is no .mp4 below {root}; give --media FOLDER")
    return arguments, root


def make_cases(arguments: argparse.Namespace, root: Path, options: RunOptions, device: torch.device) -> list[Case]:
    encoders = []
    for name in arguments.encoders.split():
        record = resolve_weights("random:0" if arguments.weights == "random" else default_weights(name), name)
        stored = StoreOptions(dtype="float32", precision=arguments.precision)
        overrides = [f"clip.n_clips={arguments.clips}"]
        encoders.append((make_feature_spec(name, record, stored, outputs=["pooled"], overrides=overrides), record))
    found = find_segments(root, arguments.seconds)
    survey = MediaSurvey(root, MediaLayout())
    n_readers = choose_n_readers(device.type, os.cpu_count() or 1)
    groups: list[Encoders] = [[encoder] for encoder in encoders]
    cases = []
    for group in groups + ([encoders] if len(encoders) > 1 else []):
        is_sound = all(spec.frame is None for spec, _ in group)
        segments = choose_spread(found, arguments.segments * (SOUND_FACTOR if is_sound else 1), seed=0)
        n_batch = arguments.batch or choose_batch(device)
        parts = PipelineParts(group, segments, survey, options, device, n_readers, n_batch)
        cases.append(Case("all" if len(group) > 1 else group[0][0].encoder, group, segments, parts))
    return cases


def main() -> None:
    arguments, root = parse_arguments()
    device = resolve_device(arguments.device)
    options = RunOptions(device=str(device), n_clips_per_batch=arguments.batch)
    cases = make_cases(arguments, root, options, device)
    singles = [case for case in cases if len(case.encoders) == 1]
    print_settings(arguments, device, cases[0].parts)
    with tempfile.TemporaryDirectory(prefix="echoshift-bench-plain-") as folder:
        loops = {
            case.name: describe_plain_loop(spec, weights.ref, describe_segments(case))
            for case in singles
            for spec, weights in case.encoders
        }
        plain = PlainLoop(Path(folder), {"device": str(device), "folder": folder, "encoders": loops})
        for case in cases:  # once, untimed; and the features
            _, features = run_whole(case, options)
            case.parts.prepare()
            case.parts.measure_computing_s()
            case.parts.measure_networks_s()
            if case in singles:
                plain.measure_s(case.name)
                alike, centred = compare_features(features[case.name], Path(folder) / case.name)
                print(f"{case.name}: cosine with the plain loop {alike:.6f}, less the mean {centred:.6f}", flush=True)
                if not alike > MIN_COSINE:
                    raise SystemExit(f"{case.name}: the plain loop's features are others (cosine {alike:.6f})")
        for _ in range(arguments.repeats):
            for case in cases:
                n = len(case.segments)
                case.whole_s.append(run_whole(case, options)[0])
                if case in singles:
                    case.plain_s.append(plain.measure_s(case.name) / n)
                else:
                    case.plain_s.append(sum(single.plain_s[-1] for single in singles))
                case.reading_s.append(case.parts.measure_reading_s() / n)
                case.computing_s.append(case.parts.measure_computing_s() / n)
                case.networks_s.append(case.parts.measure_networks_s() / n)
        plain.close()
    print_cases(cases, device)


if __name__ == "__main__":
    main()
