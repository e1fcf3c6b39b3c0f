"""Reads the windows of sound of one row, one at a time, so that memory doesn't grow with their number."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from echoshift.extract.clips import plan_audio_windows, plan_clips
from echoshift.extract.open_media import OpenMedia
from echoshift.extract.readers.pyav_audio import PyAvAudioReader
from echoshift.extract.shard_inputs import ShardInput, SoundEnd, SoundSpan, SoundWindow
from echoshift.pipeline.segments import Segment
from echoshift.pipeline.specs import AudioSpec, FeatureSpec


def read_sound(media: OpenMedia, row: int, segment: Segment, path: str, spec: FeatureSpec) -> Iterator[ShardInput]:
    """Read a row's windows; where all of them are zero, there was no sound and none is handed on."""
    audio = spec.audio
    assert audio is not None, "called for stores of sound only"
    location = media.locate(segment, "audio")
    clips = None
    if audio.span == "clip":
        pictures = media.open_pictures(segment, "rgb", spec.decoder)
        clips = plan_clips(
            spec.clip,
            segment.start_s,
            segment.stop_s,
            pictures.frame_times_s,
            pictures.info.duration_s,
            segment.segment_id,
        )
    windows = plan_audio_windows(audio, segment.start_s, segment.stop_s, clips)
    yield SoundSpan(path, row, windows, np.rint(windows * audio.rate_hz).astype(np.int64))
    n_samples, sum_of_squares, n_zero = 0, 0.0, 0
    reader = media.open_sound(location)
    for entry, (start_s, stop_s) in enumerate(windows.tolist()):
        samples = _read_window(reader, audio, start_s, stop_s)
        n_samples += len(samples)
        if not samples.any() and sum_of_squares == 0:
            n_zero += 1  # handed on once it is known that there is any sound at all
            continue
        if sum_of_squares == 0:
            for before in range(n_zero):
                yield SoundWindow(path, row, before, np.zeros(audio.n_samples, dtype=np.float32))
        sum_of_squares += float(np.sum(np.square(samples, dtype=np.float64)))
        yield SoundWindow(path, row, entry, samples)
    has_audio = sum_of_squares > 0
    loudness = 10 * math.log10(sum_of_squares / n_samples) if has_audio else -math.inf
    yield SoundEnd(path, row, has_audio, loudness)


def _read_window(reader: PyAvAudioReader | None, spec: AudioSpec, start_s: float, stop_s: float) -> np.ndarray:
    """Read a window's samples, float32 [n]; around a clip, what lies beyond the ends of the file is zero."""
    samples = np.zeros(0, dtype=np.float32)
    if reader is not None:
        samples = reader.read(max(0.0, start_s), stop_s, spec.rate_hz)
    if spec.span == "segment":
        return samples
    n_before = round(max(0.0, -start_s) * spec.rate_hz)
    return np.pad(samples, (n_before, max(0, spec.n_samples - n_before - len(samples))))[: spec.n_samples]
