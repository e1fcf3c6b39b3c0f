"""Times a sample of a run's segments and extrapolates to all of them, with a range."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from echoshift.extract.extraction import ExtractionRequest
from echoshift.extract.media_survey import MediaSurvey
from echoshift.extract.run_estimate import SharedWork
from echoshift.extract.trial_extraction import choose_spread, extract_on_trial
from echoshift.pipeline.store.layout import FAILED

# About 95 % of ranges of two standard errors to either side hold the true mean.
N_STANDARD_ERRORS = 2.0


@dataclass(frozen=True, slots=True)
class DurationEstimate:
    """How long a number of segments take, in seconds, and the range it is expected in."""

    n_segments: int
    low_s: float
    expected_s: float
    high_s: float


@dataclass(frozen=True, slots=True)
class TimedSample:
    """What a timed sample of a run's segments says.

    Attributes:
        device: what it ran on; the estimate holds for that.
        n_sampled, n_failed: segments timed, and those of them that gave no features for some store.
        segments_s: seconds each sampled segment took, whatever its stores.
        duration: of all segments to do.
    """

    device: str
    n_sampled: int
    n_failed: int
    segments_s: tuple[float, ...]
    duration: DurationEstimate


def estimate_duration(segments_s: Sequence[float], n_segments: int) -> DurationEstimate:
    """Extrapolate from seconds a sampled segment to n segments: mean times n, two standard errors to either side.

    One sampled segment says nothing of the spread: half to twice its time is given.
    """
    mean = statistics.fmean(segments_s)
    if len(segments_s) == 1:
        return DurationEstimate(n_segments, mean * n_segments / 2, mean * n_segments, mean * n_segments * 2)
    error = N_STANDARD_ERRORS * statistics.stdev(segments_s) / math.sqrt(len(segments_s))
    return DurationEstimate(
        n_segments, max(0.0, mean - error) * n_segments, mean * n_segments, (mean + error) * n_segments
    )


def time_sample(
    request: ExtractionRequest,
    survey: MediaSurvey,
    work: Sequence[SharedWork],
    n_sample: int,
    seed: int = 0,
    notify: Callable[[int], None] = lambda n_rows: None,
) -> TimedSample | None:
    """Extract `n_sample` segments of each kind of work into throw-away stores and times them; None: nothing to do.

    The segments are spread over the data set by a seeded choice and go through one shard, as in a run. Before, one of
    them goes through alone, uncounted: it loads networks and libraries.
    """
    if not work:
        return None
    segments_s: list[float] = []
    durations, n_failed = [], 0
    for kind in work:
        chosen = choose_spread(kind.segments, n_sample, seed)
        encoders = [request.encoders[i] for i in kind.encoders]
        stamps: list[tuple[float, int]] = []

        def note(n_rows: int, stamps: list[tuple[float, int]] = stamps) -> None:
            stamps.append((time.perf_counter(), n_rows))
            notify(n_rows)

        with TemporaryDirectory(prefix="echoshift-plan-") as folder:
            extract_on_trial(Path(folder) / "warm", encoders, chosen[:1], survey, request.options)
            started = time.perf_counter()
            stores = extract_on_trial(
                Path(folder) / "timed", encoders, chosen, survey, request.options, backend=request.backend, notify=note
            )
            duration_s = time.perf_counter() - started
            failed = [store.read_array("state") == FAILED for store in stores]
        n_failed += sum(any(rows[i] for rows in failed) for i in range(len(chosen)))
        of_kind = _split_duration(started, duration_s, stamps, len(chosen))
        segments_s += of_kind
        durations.append(estimate_duration(of_kind, len(kind.segments)))
    total = DurationEstimate(
        sum(d.n_segments for d in durations),
        sum(d.low_s for d in durations),
        sum(d.expected_s for d in durations),
        sum(d.high_s for d in durations),
    )
    return TimedSample(describe_device(request.options.device), len(segments_s), n_failed, tuple(segments_s), total)


def describe_device(device: str) -> str:
    """Describe which device a run would use: the GPU's name, or the CPU with its threads."""
    import torch

    from echoshift.pipeline.devices import resolve_device

    chosen = resolve_device(device)
    if chosen.type == "cuda":
        return f"{chosen} ({torch.cuda.get_device_name(chosen)})"
    return f"cpu ({torch.get_num_threads()} threads)"


def _split_duration(
    started: float, duration_s: float, stamps: Sequence[tuple[float, int]], n_segments: int
) -> list[float]:
    """Split the whole time over the segments by when each was read; the parts add up to the whole."""
    parts: list[float] = []
    last = started
    for when, n_rows in stamps:
        parts += [(when - last) / n_rows] * n_rows
        last = when
    if len(parts) != n_segments or sum(parts) <= 0:
        return [duration_s / n_segments] * n_segments
    return [part * duration_s / sum(parts) for part in parts]
