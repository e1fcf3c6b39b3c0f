"""Reads spans of a file's sound as mono samples at any rate, sample-accurate and on the clock of the pictures."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import av
import numpy as np
import numpy.typing as npt

from echoshift.extract.readers.container import (
    check_declared_end,
    explain_av_error,
    find_audio_stream,
    get_container_start_s,
    get_declared_end_s,
    open_container,
)
from echoshift.extract.readers.sound_track import SoundTrack
from echoshift.pipeline.errors import DecodeError

Samples = npt.NDArray[np.float32]
_MARGIN_TAPS = 256  # input samples, times the downsampling factor: well over half of swresample's 32-tap filter


class PyAvAudioReader:
    """Reads spans of one file's sound; is used by one thread.

    Of several tracks it takes FFmpeg's best one of the programme of the pictures. Raises MediaNotFoundError or
    DecodeError when made, if the file is missing or is no media file; a file without sound has `has_track` False.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        container = open_container(path)
        stream = find_audio_stream(container)
        self._track = None if stream is None else SoundTrack(path, container, stream)
        if self._track is None:
            container.close()

    @property
    def has_track(self) -> bool:
        """Whether the file has a sound track that there is a decoder for."""
        return self._track is not None

    def read(self, start_s: float, stop_s: float, rate_hz: int) -> Samples:
        """Read a span, see `read_audio`."""
        n_wanted = round((stop_s - start_s) * rate_hz)
        if self._track is None or n_wanted <= 0:
            return np.empty(0, dtype=np.float32)
        first = round(start_s * rate_hz)
        return _resample_span(self._track, first, first + n_wanted, rate_hz)

    def close(self) -> None:
        """Return back the file handle and the decoder."""
        if self._track is not None:
            self._track.close()

    def __enter__(self) -> PyAvAudioReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def read_audio(path: Path, start_s: float, stop_s: float, rate_hz: int) -> Samples:
    """Read a span of a file's sound, float32 [n] in about -1..1.

    n is round((stop_s - start_s) * rate_hz) where the track covers the span, fewer where it ends earlier, and 0 where
    the file has no track or the span lies beyond its end (`has_audio_track` tells which). Before the track's first
    sample, and in gaps of its time stamps, the samples are zero; start_s may be negative.
    The first sample is the one nearest to start_s on the grid k / rate_hz of the shared clock (protocol.py), so that a
    span read alone equals the same span cut from the whole (but for noise that coders make up: SoundTrack).
    Several channels are mixed as FFmpeg mixes them into 16-bit files (coefficients scaled to sum to at most 1);
    resampling is swresample's, with its final flush.
    Raises DecodeError where the sound doesn't decode, or ends clearly before the end that the file declares
    (a WAV, MP3, Ogg or MPEG-TS that is cut short declares nothing, and just ends earlier).
    """
    with PyAvAudioReader(path) as reader:
        return reader.read(start_s, stop_s, rate_hz)


def has_audio_track(path: Path) -> bool:
    """Return whether a file has a sound track that there is a decoder for."""
    with open_container(path) as container:
        return find_audio_stream(container) is not None


def probe_audio_end_s(path: Path) -> float:
    """Return when a file's sound ends on the shared clock, by demuxing it; 0 without a track."""
    with open_container(path) as container:
        stream = find_audio_stream(container)
        if stream is None:
            return 0.0
        try:
            ends = [p.pts + (p.duration or 0) for p in container.demux(stream) if p.size and p.pts is not None]
        except av.FFmpegError as error:
            raise DecodeError(f"{path}: reading its sound fails: {explain_av_error(error)}") from error
        end_s = max(ends, default=0) * float(stream.time_base)
        check_declared_end(path, "sound", get_declared_end_s(container, stream), end_s)
        return max(end_s - get_container_start_s(container), 0.0)


def _resample_span(track: SoundTrack, first: int, stop: int, rate_hz: int) -> Samples:
    """Resample so that samples [first, stop) of the grid k / rate_hz come out, fewer if the track ends earlier.

    The resampler starts at a multiple of its phase period, at which input and output samples coincide, and far enough
    ahead that its start is forgotten: so its phases are those of a resampler that began at time zero.
    """
    divisor = math.gcd(track.rate_hz, rate_hz)
    in_period, out_period = track.rate_hz // divisor, rate_hz // divisor
    margin = _MARGIN_TAPS * math.ceil(track.rate_hz / rate_hz)
    n_periods = math.floor((first * in_period / out_period - margin) / in_period)
    in_first, out_first = n_periods * in_period, n_periods * out_period
    in_stop = math.ceil(stop * in_period / out_period) + margin
    wanted = np.zeros(stop - first, dtype=np.float32)
    n_in = 0

    def blocks() -> Iterator[Samples]:
        nonlocal n_in
        for block in track.read_blocks(in_first, in_stop):
            n_in += len(block)
            yield block

    position = out_first
    for out in _resample(blocks(), track.rate_hz, rate_hz):
        low, high = max(position, first), min(position + len(out), stop)
        if low < high:
            wanted[low - first : high - first] = out[low - position : high - position]
        position += len(out)
    if in_first + n_in >= in_stop:
        return wanted
    track_stop = -(-(in_first + n_in) * out_period // in_period)  # the first output sample past the track's end
    return wanted[: max(min(track_stop, stop) - first, 0)]


def _resample(blocks: Iterator[Samples], in_rate_hz: int, out_rate_hz: int) -> Iterator[Samples]:
    if in_rate_hz == out_rate_hz:
        yield from blocks
        return
    resampler = av.AudioResampler(format="fltp", layout="mono", rate=out_rate_hz)
    n_given = 0
    for block in blocks:
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(block)[None], format="fltp", layout="mono")
        frame.sample_rate = in_rate_hz
        frame.pts = n_given
        n_given += len(block)
        for out in resampler.resample(frame):
            yield out.to_ndarray()[0]
    if n_given:
        for out in resampler.resample(None):
            yield out.to_ndarray()[0]
