"""Runs the parts of the extraction pipeline alone, on the same segments: reading, and computing from what was read."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from echoshift.extract.audio import log_spectrogram
from echoshift.extract.frames import ClipAssembler
from echoshift.extract.media import MediaSurvey, identify_segments
from echoshift.extract.rows import AudioWindow, FrameClips, FrameStretch, RowInput, RowReaders
from echoshift.extract.shard import ShardEncoder
from echoshift.extract.weights.load import WeightsRecord
from echoshift.extract.work import ExtractionPlan, RunOptions, ShardWork, StoreTarget
from echoshift.pipeline.errors import MediaError
from echoshift.pipeline.execution import ShardTask
from echoshift.pipeline.segments import Segment
from echoshift.pipeline.specs import FeatureSpec
from echoshift.pipeline.store.layout import Shard, compute_digests

Encoders = Sequence[tuple[FeatureSpec, WeightsRecord]]


@dataclass(slots=True)
class OutputSink:
    """Takes outputs in place of a store's rows, and counts them."""

    n_taken: int = 0

    def put(self, row: int, entry: int, features: dict[str, np.ndarray]) -> None:
        """Count a clip's outputs."""
        self.n_taken += 1

    def fail_for(self, row: int, error: MediaError) -> None:
        """Raise what would have failed a row."""
        raise error


@dataclass(slots=True)
class PipelineParts:
    """The pipeline taken apart for some segments: `inputs` is what reading gives, `clips` what networks take."""

    encoders: Encoders
    segments: Sequence[Segment]
    survey: MediaSurvey
    options: RunOptions
    device: torch.device
    n_readers: int
    n_batch: int
    inputs: list[tuple[int, RowInput | None]] = field(default_factory=list)
    clips: list[tuple[str, int, int, torch.Tensor]] = field(default_factory=list)

    def prepare(self) -> None:
        """Read and prepare everything beforehand, for the parts that begin with it."""
        self._read(self.inputs)
        self._feed(lambda *clip: self.clips.append(clip))

    def measure_reading_s(self) -> float:
        """Measure reading alone: demuxing, decoding, resampling, in as many threads as the pipeline has."""
        started = time.perf_counter()
        self._read(None)
        return time.perf_counter() - started

    def measure_computing_s(self) -> float:
        """Measure preparing frames and audio on the device, and the networks, from inputs read beforehand."""
        sinks, encoders = self._make_encoders()
        started = time.perf_counter()
        self._feed(lambda path, row, entry, clip: encoders[path].add(row, entry, clip))
        return self._finish(started, sinks, encoders)

    def measure_networks_s(self) -> float:
        """Measure the networks alone, in the same batches, from clips prepared beforehand."""
        sinks, encoders = self._make_encoders()
        started = time.perf_counter()
        for path, row, entry, clip in self.clips:
            encoders[path].add(row, entry, clip)
        return self._finish(started, sinks, encoders)

    def _plan(self) -> tuple[ExtractionPlan, ShardWork]:
        targets = {spec.encoder: StoreTarget(spec.encoder, spec, weights) for spec, weights in self.encoders}
        digests = {
            spec.encoder: compute_digests(self.segments, identify_segments(self.survey, self.segments, spec))
            for spec, _ in self.encoders
        }
        task = ShardTask(Shard(0, 0, len(self.segments)), tuple(targets))
        plan = ExtractionPlan(self.survey.root, self.survey.layout, targets, self.options)
        return plan, ShardWork(task, tuple(self.segments), digests)

    def _read(self, kept: list[tuple[int, RowInput | None]] | None) -> None:
        with RowReaders(*self._plan(), self.n_readers) as readers:
            for item in readers:
                if kept is not None:
                    kept.append(item)

    def _make_encoders(self) -> tuple[dict[str, OutputSink], dict[str, ShardEncoder]]:
        plan, _ = self._plan()
        sinks = {path: OutputSink() for path in plan.targets}
        encoders = {
            path: ShardEncoder(target, sinks[path], self.device, self.n_batch)  # type: ignore[arg-type]
            for path, target in plan.targets.items()
        }
        return sinks, encoders

    def _finish(self, started: float, sinks: dict[str, OutputSink], encoders: dict[str, ShardEncoder]) -> float:
        for encoder in encoders.values():
            encoder.run()
        duration_s = time.perf_counter() - started
        assert sum(sink.n_taken for sink in sinks.values()) == len(self.clips), "a clip gave no output"
        return duration_s

    def _feed(self, take: Callable[[str, int, int, torch.Tensor], None]) -> None:
        specs = {spec.encoder: spec for spec, _ in self.encoders}
        row = 0
        assembler = ClipAssembler(specs, self.device, lambda path, entry, clip: take(path, row, entry, clip))
        for row, item in self.inputs:
            if item is None:
                assembler.end()
            elif isinstance(item, FrameClips):
                assembler.begin(item)
            elif isinstance(item, FrameStretch):
                assembler.feed(item)
            elif isinstance(item, AudioWindow):
                spec = specs[item.store_path].audio
                assert spec is not None, "audio goes to stores of audio"
                samples = torch.from_numpy(item.samples)[None].to(self.device)
                take(item.store_path, row, item.number, log_spectrogram(samples, spec)[0])
