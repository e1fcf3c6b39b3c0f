"""Reads rows ahead of the networks: frames in stretches, each decoded once for all stores, and windows of audio."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from queue import Empty, Full, Queue
from typing import Literal

import numpy as np

from echoshift.extract.clips import ClipPlan, plan_audio_windows, plan_clips
from echoshift.extract.flow import FlowMaker, FlowMethod, pair_frames
from echoshift.extract.media import OpenMedia
from echoshift.extract.readers.audio import AudioReader
from echoshift.extract.readers.interface import FrameReader, find_shown_frames
from echoshift.extract.work import ExtractionPlan, ShardWork
from echoshift.pipeline.errors import MediaError, MediaMemoryError, MediaTimeoutError
from echoshift.pipeline.segments import Segment
from echoshift.pipeline.specs import AudioSpec, ClipSpec, FeatureSpec

MAX_STRETCH_BYTES = 64 * 2**20
# Clips that a stretch touches exist at the same time: small frames must not make it long.
MAX_STRETCH_FRAMES = 64
N_INPUTS_AHEAD = 2
_POLL_S = 0.2


@dataclass(frozen=True, slots=True)
class FrameSource:
    """Where frames come from: which media, by which decoder, and, for computed flow, how it is made of them."""

    media: Literal["rgb", "flow"]
    decoder: Literal["pyav", "decord"]
    flow: FlowMethod | None = None

    @classmethod
    def of(cls, spec: FeatureSpec) -> FrameSource:
        """Return the source of a store of frames."""
        assert spec.frame is not None, "audio has no frames"
        frame = spec.frame
        method = None if frame.flow == "images" else FlowMethod(frame.flow, frame.short_side, frame.flow_bound)
        return cls(frame.source, spec.decoder, method)


@dataclass(frozen=True, slots=True)
class FrameClips:
    """The clips of a row for some stores of frames; comes before the frames.

    Attributes:
        source, clip: what the stores share; their crops may differ.
        times: seconds that each clip's views cover, float64 [n, 2].
        spans: first and last frame (index in the file), int64 [n, 2].
        numbers: of each frame of a clip, int64 [n, n_frames]; FrameStretch has the same numbers.
    """

    store_paths: tuple[str, ...]
    segment: Segment
    source: FrameSource
    clip: ClipSpec
    times: np.ndarray
    spans: np.ndarray
    numbers: np.ndarray


@dataclass(frozen=True, slots=True)
class FrameStretch:
    """Some of the frames of a row, uint8 [n, H, W, C], each once, with their numbers, int64 [n], ascending."""

    source: FrameSource
    frames: np.ndarray
    numbers: np.ndarray


@dataclass(frozen=True, slots=True)
class AudioSpan:
    """The time that each window of audio of a row covers; comes before the windows. As FrameClips, in samples."""

    store_path: str
    times: np.ndarray
    spans: np.ndarray


@dataclass(frozen=True, slots=True)
class AudioWindow:
    """The samples of one window of a row, float32 [n]."""

    store_path: str
    number: int
    samples: np.ndarray


@dataclass(frozen=True, slots=True)
class AudioEnd:
    """Whether a row had any audio, and how loud; comes after the windows, of which silence has none."""

    store_path: str
    has_audio: bool
    loudness_dbfs: float


@dataclass(frozen=True, slots=True)
class RowFailure:
    """Why a row of some stores gets no features; inputs that came before are void."""

    store_paths: tuple[str, ...]
    error: MediaError


RowInput = FrameClips | FrameStretch | AudioSpan | AudioWindow | AudioEnd | RowFailure


def read_row(
    media: OpenMedia, segment: Segment, specs: Mapping[str, FeatureSpec], digests: Mapping[str, np.ndarray]
) -> Iterator[RowInput]:
    """Read the inputs of one row for some stores; whatever fails yields a RowFailure for the stores it concerns.

    `specs` are by store path, and so are `digests`: what the row is to be made from, uint8 [16]; media that are other
    ones by the time they were read fail the row. Whatever the length of video and segment, at most MAX_STRETCH_BYTES of
    frames (or one frame) and MAX_STRETCH_FRAMES are read at a time.
    """
    of_frames: dict[tuple[str, str], dict[str, FeatureSpec]] = {}
    for path, spec in specs.items():
        if spec.frame is not None:
            of_frames.setdefault((spec.frame.source, spec.decoder), {})[path] = spec
    of_audio = ({path: spec} for path, spec in specs.items() if spec.audio is not None)
    for group in (*(of_frames[key] for key in sorted(of_frames)), *of_audio):
        path, spec = next(iter(group.items()))
        try:
            if spec.frame is not None:
                yield from read_frames(media, segment, group)
            else:
                yield from read_audio_windows(media, segment, path, spec)
        except MediaError as error:
            yield RowFailure(tuple(group), error)
            continue
        except MemoryError as error:
            failure = MediaMemoryError(f"video {segment.video_id}: reading it needs more memory than there is: {error}")
            yield RowFailure(tuple(group), failure)
            continue
        for path, spec in group.items():
            try:
                media.check_unchanged(segment, spec, digests[path])
            except MediaError as error:
                yield RowFailure((path,), error)


def read_frames(
    media: OpenMedia, segment: Segment, specs: Mapping[str, FeatureSpec]
) -> Iterator[FrameClips | FrameStretch]:
    """Read the frames of one row for stores, by path, that share media and decoder.

    Raises MediaError for what fails.
    """
    source = FrameSource.of(next(iter(specs.values())))
    reader = media.open_frames(segment, source.media, source.decoder)
    wanted: set[int] = set()
    makers: dict[FrameSource, FlowMaker] = {}
    groups: dict[tuple[FrameSource, ClipSpec], tuple[str, ...]] = {}
    for path, spec in specs.items():
        key = (FrameSource.of(spec), spec.clip)
        groups[key] = (*groups.get(key, ()), path)
    plain = next((source for source, _ in groups if source.flow is None), None)
    for (source, clip), paths in groups.items():
        plan = plan_clips_of(reader, segment, clip)
        shown = find_shown_frames(reader.frame_times_s, plan.frame_times_s)
        if source.flow is None:
            numbers = shown
            spans = np.stack([shown.min(axis=1), shown.max(axis=1)], axis=1)
            wanted.update(np.unique(shown).tolist())
        else:
            before, after = pair_frames(reader, plan.frame_times_s, shown, clip.rate_hz)
            if source not in makers:
                makers[source] = FlowMaker(source.flow)
            numbers = makers[source].add(before, after)
            spans = np.stack([before.min(axis=1), after.max(axis=1)], axis=1)
        yield FrameClips(paths, segment, source, clip, plan.times_s, spans, numbers)
    yield from _read_stretches(reader, plain, np.array(sorted(wanted), dtype=np.int64), makers)


def plan_clips_of(reader: FrameReader, segment: Segment, spec: ClipSpec) -> ClipPlan:
    """Plan the clips of a segment of an open video."""
    return plan_clips(
        spec, segment.start_s, segment.stop_s, reader.frame_times_s, reader.info.duration_s, segment.segment_id
    )


def _read_stretches(
    reader: FrameReader, plain: FrameSource | None, wanted: np.ndarray, makers: Mapping[FrameSource, FlowMaker]
) -> Iterator[FrameStretch]:
    """Decode each frame once, in order of time, and hand on the plain ones and the flow that becomes complete."""
    needed = np.unique(np.concatenate([wanted, *(maker.needed for maker in makers.values())]))
    n_frame_bytes = reader.info.height * reader.info.width * 3
    n_at_most = max(1, min(MAX_STRETCH_FRAMES, MAX_STRETCH_BYTES // n_frame_bytes))
    for start in range(0, len(needed), n_at_most):
        numbers = needed[start : start + n_at_most]
        frames = reader.read_frames(reader.frame_times_s[numbers])
        if plain is not None:
            chosen = np.isin(numbers, wanted, assume_unique=True)
            if chosen.all():
                yield FrameStretch(plain, frames, numbers)
            elif chosen.any():
                yield FrameStretch(plain, frames[chosen], numbers[chosen])
        for source, maker in makers.items():
            made = maker.feed(frames, numbers)
            if made is not None:
                yield FrameStretch(source, *made)


def plan_windows_of(media: OpenMedia, segment: Segment, spec: FeatureSpec) -> np.ndarray:
    """Plan the windows of audio of a segment in seconds, float64 [n, 2]; opens the video where clips centre them."""
    assert spec.audio is not None, "called for stores of audio only"
    clips = None
    if spec.audio.span == "clip":
        clips = plan_clips_of(media.open_frames(segment, "rgb", spec.decoder), segment, spec.clip)
    return plan_audio_windows(spec.audio, segment.start_s, segment.stop_s, clips)


def read_audio_windows(
    media: OpenMedia, segment: Segment, path: str, spec: FeatureSpec
) -> Iterator[AudioSpan | AudioWindow | AudioEnd]:
    """Read a row's windows one at a time; where all of them are zero, there was no audio and none is handed on."""
    audio = spec.audio
    assert audio is not None, "called for stores of audio only"
    location = media.locate(segment, "audio")
    windows = plan_windows_of(media, segment, spec)
    yield AudioSpan(path, windows, np.rint(windows * audio.rate_hz).astype(np.int64))
    n_samples, sum_of_squares, n_zero = 0, 0.0, 0
    reader = media.open_audio(location)
    for number, (start_s, stop_s) in enumerate(windows.tolist()):
        samples = _read_window(reader, audio, start_s, stop_s)
        n_samples += len(samples)
        if not samples.any() and sum_of_squares == 0:
            n_zero += 1  # handed on once it is known that there is any audio at all
            continue
        if sum_of_squares == 0:
            for before in range(n_zero):
                yield AudioWindow(path, before, np.zeros(audio.n_samples, dtype=np.float32))
        sum_of_squares += float(np.sum(np.square(samples, dtype=np.float64)))
        yield AudioWindow(path, number, samples)
    has_audio = sum_of_squares > 0
    loudness = 10 * math.log10(sum_of_squares / n_samples) if has_audio else -math.inf
    yield AudioEnd(path, has_audio, loudness)


def _read_window(reader: AudioReader | None, spec: AudioSpec, start_s: float, stop_s: float) -> np.ndarray:
    """Read a window's samples, float32 [n]; around a clip, what lies beyond the ends of the file is zero."""
    samples = np.zeros(0, dtype=np.float32)
    if reader is not None:
        samples = reader.read(max(0.0, start_s), stop_s, spec.rate_hz)
    if spec.span == "segment":
        return samples
    n_before = round(max(0.0, -start_s) * spec.rate_hz)
    return np.pad(samples, (n_before, max(0, spec.n_samples - n_before - len(samples))))[: spec.n_samples]


class RowReaders:
    """Threads that read the rows of a shard, each one row at a time, and wait when they are far ahead.

    Iterating yields (row, input), row by row in their order, and (row, None) after a row's last input. A row whose next
    input takes longer than the time limit fails, and its thread, which can't be stopped from outside, is left behind
    and replaced. Rows that every store keeps aren't read. Use as a context manager, so that threads end when the shard
    does.
    """

    def __init__(self, plan: ExtractionPlan, work: ShardWork, n_readers: int) -> None:
        self._plan = plan
        self._work = work
        self._kept = {path: frozenset(rows) for path, rows in work.task.kept_rows.items()}
        self._timeout_s = plan.options.segment_timeout_s
        self._rows: list[tuple[int, Segment]] = [
            (row, segment)
            for row, segment in enumerate(work.segments, start=work.task.shard.start_row)
            if segment is not None and self._list_paths(row)
        ]
        self._queues = {row: Queue[RowInput | BaseException | None](N_INPUTS_AHEAD) for row, _ in self._rows}
        self._next = iter(self._rows)
        self._lock = threading.Lock()
        self._given_up: set[int] = set()
        self._is_closed = threading.Event()
        self._n_readers = max(1, min(n_readers, len(self._rows)))

    def __enter__(self) -> RowReaders:
        for _ in range(self._n_readers):
            self._start_thread()
        return self

    def __exit__(self, *exc: object) -> None:
        self._is_closed.set()

    def __iter__(self) -> Iterator[tuple[int, RowInput | None]]:
        for row, segment in self._rows:
            queue = self._queues[row]
            item: RowInput | BaseException | None
            while True:
                try:
                    item = queue.get(timeout=self._timeout_s)
                except Empty:
                    yield row, self._give_up(row, segment)
                    item = None
                if isinstance(item, BaseException):
                    raise item
                yield row, item
                if item is None:
                    break
            del self._queues[row]

    def _give_up(self, row: int, segment: Segment) -> RowFailure:
        self._given_up.add(row)
        self._start_thread()
        error = MediaTimeoutError(
            f"reading video {segment.video_id} gave nothing for {self._timeout_s:g} s; the decoder hangs on it, or the "
            f"disk is slow: raise --segment-timeout, or fetch the video again"
        )
        return RowFailure(self._list_paths(row), error)

    def _start_thread(self) -> None:
        # A daemon: a decoder that hangs for ever must not keep the process from ending.
        threading.Thread(target=self._read_rows, name="row-reader", daemon=True).start()

    def _read_rows(self) -> None:
        with OpenMedia(self._plan.media_root, self._plan.media_layout) as media:
            while not self._is_closed.is_set():
                with self._lock:
                    row, segment = next(self._next, (-1, None))
                if segment is None:
                    return
                queue = self._queues[row]
                digests = {
                    path: of_rows[row - self._work.task.shard.start_row] for path, of_rows in self._work.digests.items()
                }
                try:
                    specs = {path: self._plan.targets[path].spec for path in self._list_paths(row)}
                    for item in chain(read_row(media, segment, specs, digests), (None,)):
                        if not self._put(queue, row, item):
                            return
                except BaseException as error:  # noqa: BLE001  raised again in the thread that waits for the row
                    self._put(queue, row, error)
                    return

    def _list_paths(self, row: int) -> tuple[str, ...]:
        """List the stores that need a row: those that don't keep it."""
        return tuple(path for path in self._work.task.store_paths if row not in self._kept.get(path, ()))

    def _put(
        self, queue: Queue[RowInput | BaseException | None], row: int, item: RowInput | BaseException | None
    ) -> bool:
        """Hand an input on once there is room; False when nobody waits for it any more."""
        while not self._is_closed.is_set() and row not in self._given_up:
            try:
                queue.put(item, timeout=_POLL_S)
            except Full:
                continue
            return True
        return False


def choose_n_readers(device_type: str, n_cores: int) -> int:
    """Return 1 reader on a CPU, whose cores the networks need, and up to 8 where a GPU waits for frames."""
    return max(1, min(8, n_cores // 2)) if device_type == "cuda" else 1
