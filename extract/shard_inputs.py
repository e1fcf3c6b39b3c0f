"""Reads what the networks need for one shard, row by row: pictures, samples, and when they were."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType

import numpy as np
import torch

from extract.clips import ClipPlan, plan_audio_windows, plan_clips
from extract.extraction_plan import ExtractionPlan, ShardWork, StoreTarget
from extract.media import MediaLocation, locate_media, open_frames
from extract.readers.protocol import FrameReader, find_shown_frames
from extract.readers.pyav_audio import read_audio
from extract.sound.spectrograms import rms_dbfs
from pipeline.errors import MediaError
from pipeline.segments import Segment
from pipeline.specs import AudioSpec, ClipSpec
from pipeline.store.interface import Failure

MAX_GROUP_BYTES = 128 * 2**20


@dataclass(frozen=True, slots=True)
class RowFacts:
    """Says what a row of some stores is going to cover; comes before the row's inputs.

    Attributes:
        times: seconds, float64 [n_valid, 2].
        frames: pictures or samples, int64 [n_valid, 2].
        loudness_dbfs: of the samples; None for pictures.
        has_audio: False where there is no sound, and then no input follows.
    """

    store_paths: tuple[str, ...]
    row: int
    times: np.ndarray
    frames: np.ndarray
    has_audio: bool = True
    loudness_dbfs: float | None = None


@dataclass(frozen=True, slots=True)
class RowFailure:
    """Says that a row of some stores gets no features, and why; inputs that came before are void."""

    store_paths: tuple[str, ...]
    row: int
    failure: Failure


@dataclass(frozen=True, slots=True)
class ClipRequest:
    """Is one clip of a row: which pictures of its group, int64 [n_frames], are to be encoded for which stores."""

    store_paths: tuple[str, ...]
    row: int
    clip: int
    picks: np.ndarray


@dataclass(frozen=True, slots=True)
class FrameGroup:
    """Is a stretch of decoded pictures, uint8 [n, H, W, C], each once, with the clips made from them."""

    frames: np.ndarray
    requests: tuple[ClipRequest, ...]


@dataclass(frozen=True, slots=True)
class SoundWindow:
    """Is the samples of one clip of a row, float32 [n]."""

    store_paths: tuple[str, ...]
    row: int
    clip: int
    samples: np.ndarray


@dataclass(frozen=True, slots=True)
class RowEnd:
    """Says that all inputs of a row, for every store, have been read."""

    row: int


ShardInput = RowFacts | RowFailure | FrameGroup | SoundWindow | RowEnd


class _OpenMedia:
    """Keeps the last used reader of each modality open, since rows follow each other in the same video."""

    def __init__(self, plan: ExtractionPlan) -> None:
        self._plan = plan
        self._readers: dict[tuple[str, str], tuple[MediaLocation, FrameReader]] = {}

    def open_pictures(self, segment: Segment, modality: str, decoder: str) -> FrameReader:
        location = locate_media(self._plan.media_root, self._plan.media_layout, segment, modality)  # type: ignore[arg-type]
        key = (modality, decoder)
        if key in self._readers:
            if self._readers[key][0] == location:
                return self._readers[key][1]
            self._readers.pop(key)[1].close()
        reader = open_frames(location, decoder)  # type: ignore[arg-type]
        self._readers[key] = (location, reader)
        return reader

    def __enter__(self) -> _OpenMedia:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for _, reader in self._readers.values():
            reader.close()


def read_shard_inputs(plan: ExtractionPlan, work: ShardWork) -> Iterator[ShardInput]:
    """Reads the inputs of a task's rows in row order; a row whose media fail yields a RowFailure and the rest go on."""
    task = work.task
    targets = [plan.targets[path] for path in task.store_paths]
    with _OpenMedia(plan) as media:
        for row, segment in enumerate(work.segments, start=task.shard.start_row):
            if segment is None:
                continue
            for (modality, decoder), group in _group_picture_targets(targets).items():
                paths = tuple(path for paths in group.values() for path in paths)
                try:
                    reader = media.open_pictures(segment, modality, decoder)
                    yield from _read_pictures(reader, segment, row, group)
                except MediaError as error:
                    yield RowFailure(paths, row, describe_failure(segment, error))
            for target in targets:
                if target.spec.audio is None:
                    continue
                try:
                    yield from _read_sound(plan, media, segment, row, target)
                except MediaError as error:
                    yield RowFailure((target.path,), row, describe_failure(segment, error))
            yield RowEnd(row)


def describe_failure(segment: Segment, error: MediaError) -> Failure:
    """Puts a media error into the ledger's terms: one line, and whether a retry can help."""
    reason = " ".join(str(error).split())
    return Failure(segment.segment_id, segment.video_id, type(error).__name__, reason, error.retryable)


def _group_picture_targets(targets: list[StoreTarget]) -> dict[tuple[str, str], dict[ClipSpec, tuple[str, ...]]]:
    """Groups stores that share a decode, and within it those that share their clips."""
    groups: dict[tuple[str, str], dict[ClipSpec, tuple[str, ...]]] = {}
    for target in targets:
        if target.spec.frame is not None:
            group = groups.setdefault((target.spec.frame.input, target.spec.decoder), {})
            group[target.spec.clip] = (*group.get(target.spec.clip, ()), target.path)
    return groups


def _read_pictures(
    reader: FrameReader, segment: Segment, row: int, group: dict[ClipSpec, tuple[str, ...]]
) -> Iterator[ShardInput]:
    clips: list[tuple[tuple[str, ...], int, np.ndarray]] = []
    for spec, paths in group.items():
        plan = plan_clips(spec, segment.start_s, segment.stop_s, reader.frame_times_s, reader.info.duration_s)
        yield RowFacts(paths, row, plan.times_s, _find_frame_spans(reader, plan))
        shown = find_shown_frames(reader.frame_times_s, plan.frame_times_s)
        clips += [(paths, i, shown[i]) for i in range(len(shown))]
    clips.sort(key=lambda clip: int(clip[2].min()))
    n_frame_bytes = reader.info.height * reader.info.width * 3
    n_frames_at_most = max(1, MAX_GROUP_BYTES // n_frame_bytes)
    waiting: list[tuple[tuple[str, ...], int, np.ndarray]] = []
    wanted: set[int] = set()
    for clip in clips:
        more = wanted | set(clip[2].tolist())
        if waiting and len(more) > n_frames_at_most:
            yield _read_group(reader, row, waiting)
            waiting, more = [], set(clip[2].tolist())
        waiting.append(clip)
        wanted = more
    if waiting:
        yield _read_group(reader, row, waiting)


def _read_group(reader: FrameReader, row: int, clips: list[tuple[tuple[str, ...], int, np.ndarray]]) -> FrameGroup:
    indices = np.unique(np.concatenate([shown for _, _, shown in clips]))
    frames = reader.read_frames(reader.frame_times_s[indices])
    requests = [ClipRequest(paths, row, i, np.searchsorted(indices, shown)) for paths, i, shown in clips]
    return FrameGroup(frames, tuple(requests))


def _find_frame_spans(reader: FrameReader, plan: ClipPlan) -> np.ndarray:
    shown = find_shown_frames(reader.frame_times_s, plan.frame_times_s)
    return np.stack([shown.min(axis=1), shown.max(axis=1)], axis=1)


def _read_sound(
    plan: ExtractionPlan, media: _OpenMedia, segment: Segment, row: int, target: StoreTarget
) -> Iterator[ShardInput]:
    spec = target.spec.audio
    assert spec is not None, "called for stores of sound only"
    location = locate_media(plan.media_root, plan.media_layout, segment, "audio")
    clips = None
    if spec.span == "clip":
        reader = media.open_pictures(segment, "rgb", target.spec.decoder)
        clips = plan_clips(
            target.spec.clip, segment.start_s, segment.stop_s, reader.frame_times_s, reader.info.duration_s
        )
    windows = plan_audio_windows(spec, segment.start_s, segment.stop_s, clips)
    sounds = [_read_window(location, spec, start_s, stop_s) for start_s, stop_s in windows.tolist()]
    everything = np.concatenate(sounds)
    has_audio = bool(everything.any())
    frames = np.rint(windows * spec.rate_hz).astype(np.int64)
    loudness = rms_dbfs(torch.from_numpy(everything)) if has_audio else -np.inf
    yield RowFacts((target.path,), row, windows, frames, has_audio, loudness)
    if has_audio:
        for clip, samples in enumerate(sounds):
            yield SoundWindow((target.path,), row, clip, samples)


def _read_window(location: MediaLocation, spec: AudioSpec, start_s: float, stop_s: float) -> np.ndarray:
    """Reads a window's samples, float32 [n]; around a clip, what lies beyond the ends of the file is zero."""
    samples = np.zeros(0, dtype=np.float32)
    if location.kind != "none":
        samples = read_audio(location.path, max(0.0, start_s), stop_s, spec.rate_hz)
    if spec.span == "segment":
        return samples
    n_before = round(max(0.0, -start_s) * spec.rate_hz)
    return np.pad(samples, (n_before, max(0, spec.n_samples - n_before - len(samples))))[: spec.n_samples]
