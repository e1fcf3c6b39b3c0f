"""Reads spans of a file's audio as mono samples at any rate, sample-accurate and on the clock of the frames."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np
import numpy.typing as npt
from av.container import InputContainer

from echoshift.extract.readers.container import (
    check_declared_end,
    explain_av_error,
    find_audio_stream,
    get_container_start_s,
    get_declared_end_s,
    has_whole_index,
    open_container,
)
from echoshift.pipeline.errors import DecodeError

Samples = npt.NDArray[np.float32]
PREROLL_S = 0.5  # decoders need a start: MP3's bit reservoir, Opus' 80 ms, AAC's overlap and band replication
FROM_START_S = 20.0  # nearer to the start than this, decoding begins there: exact for every container
_BACK_S = (PREROLL_S, 10.0)  # how far before the span a seek aims, in turn; then the start
_GAP_S = 0.015  # less than one AAC or MP3 frame is lost: time stamps jitter, none is missing
_VORBIS_GAP_S = 0.05  # FFmpeg's time stamps of Vorbis are up to half a block off where block sizes change
_MARGIN_TAPS = 256  # input samples, times the downsampling factor: well over half of swresample's 32-tap filter
_N_ANCHOR = 24  # frames whose time stamps place the first one after a seek
# Decoders whose packets and header say all there is to know, so that a new one can be made beside an open container.
# Not Opus' and PCM's: they take the channels from the container.
_SELF_CONTAINED = frozenset({"aac", "mp3float", "ac3", "eac3", "alac", "flac"})


class AudioTrack:
    """The audio track of a file, decoded into gapless mono blocks.

    Positions count samples of the track's rate from the container's start.

    It is made of a container that was just opened, and closes it. What is read is a function of the span alone. Where
    a coder stores noise by its level (AAC's noise substitution, AC-3's dither), a span after a seek has other noise
    than the whole track; everything else is the same.
    """

    def __init__(self, path: Path, container: InputContainer, stream: av.AudioStream) -> None:
        self._path = path
        self._stream_index = stream.index
        self._take(container)
        name = self._stream.codec_context.name
        self._keeps_container = name in _SELF_CONTAINED and has_whole_index(container, path)
        self.rate_hz: int = self._stream.codec_context.sample_rate
        self._gap = round((_VORBIS_GAP_S if "vorbis" in self._stream.codec_context.name else _GAP_S) * self.rate_hz)
        self._mixer: tuple[object, av.AudioResampler] | None = None
        self._grid: tuple[int, int] | Literal[False] | None = False  # not looked for yet
        if self.rate_hz <= 0:
            self.close()
            raise DecodeError(f"{path}: its audio declares no sample rate; encode it again")

    def close(self) -> None:
        """Close the file and the decoder."""
        self._container.close()

    def read_blocks(self, first: int, stop: int) -> Iterator[Samples]:
        """Read samples [first, stop) as consecutive blocks; they end earlier if and only if the track does.

        The samples are zero where the track has none: before its start and in gaps of at least 15 ms.
        Raises DecodeError where the audio doesn't decode or the track is cut short.
        """
        position, end = first, 0
        for place, mono in self._read_placed(first, stop):
            if place >= stop:
                break
            end = place + len(mono)
            begin = position - place
            if begin >= len(mono):
                continue
            if begin < 0:
                yield np.zeros(-begin, dtype=np.float32)
                position, begin = place, 0
            block = mono[begin : begin + stop - position]
            yield block
            position += len(block)
            if position >= stop:
                return
        else:
            self._check_end(end)
            return
        yield np.zeros(stop - position, dtype=np.float32)

    def _take(self, container: InputContainer) -> None:
        self._container: Any = container
        self._stream: Any = container.streams.get(self._stream_index)[0]
        self._start_s = get_container_start_s(container)
        self._is_untouched = True

    def _reopen(self) -> None:
        if not self._is_untouched:
            self._container.close()
            self._take(open_container(self._path))

    def _check_end(self, end: int) -> None:
        declared_s = get_declared_end_s(self._container, self._stream)
        check_declared_end(self._path, "audio", declared_s, end / self.rate_hz + self._start_s)

    def _read_placed(self, first: int, stop: int) -> Iterator[tuple[int, Samples]]:
        """Yield (position, mono samples), gapless but for true gaps, from at or before `first` on."""
        for back_s in _BACK_S:
            target_s = first / self.rate_hz - back_s
            if target_s < FROM_START_S:
                break
            frames = self._decode_from(target_s, first)
            head = list(islice(frames, _N_ANCHOR))
            # A seek that came out too late, or at frames without time stamps, is no place to start.
            if head and head[0][0] is not None and head[0][0] <= first - 0.5 * PREROLL_S * self.rate_hz:
                yield from self._place(head, frames, self._get_grid())
                return
        frames = self._decode_from(None, first)
        yield from self._place(list(islice(frames, 1)), frames, None)

    def _place(
        self,
        head: list[tuple[float | None, Samples]],
        rest: Iterator[tuple[float | None, Samples]],
        grid: tuple[int, int] | None,
    ) -> Iterator[tuple[int, Samples]]:
        """Count samples on from the first frame's place, and start over where time stamps leave a gap."""
        if not head:
            return
        offsets, n_samples = [], 0
        for stamp, mono in head:
            if stamp is not None:
                offsets.append(stamp - n_samples)
            n_samples += len(mono)
        near = [offset for offset in offsets if abs(offset - offsets[0]) <= self._gap]
        place = round(float(np.median(near))) if near else 0
        if grid is not None:
            origin, size = grid
            end = place + len(head[0][1])
            snapped = origin + round((end - origin) / size) * size
            if abs(snapped - end) <= self._stream.time_base * self.rate_hz:
                place += snapped - end
        for stamp, mono in chain(head, rest):
            if stamp is not None and abs(stamp - place) > self._gap:
                late = round(stamp) - place
                if late < 0:
                    mono = mono[-late:]
                else:
                    place += late
            if len(mono):
                yield place, mono
            place += len(mono)

    def _get_grid(self) -> tuple[int, int] | None:
        """Return (origin, size) of the frames, which end at origin + k * size, where a tick is longer than a sample.

        Matroska's is 1 ms, some 40 samples. None where ticks are fine, or where frames have no one size (Vorbis).
        """
        if self._stream.time_base * self.rate_hz <= 1:
            return None
        if self._grid is False:
            with open_container(self._path) as container:
                head = list(islice(self._decode_packets(container, self._get_decoder(container), 0), 6))
            sizes = {len(mono) for _, mono in head[1:]}
            self._grid = None
            if len(sizes) == 1 and head[0][0] is not None:
                self._grid = (round(head[0][0]) + len(head[0][1]), sizes.pop())
        return self._grid or None

    def _decode_from(self, target_s: float | None, first: int) -> Iterator[tuple[float | None, Samples]]:
        # A span's bytes must not depend on what was read before, but AAC's and AC-3's decoders keep a random state
        # through a seek, and Ogg's demuxer gives other time stamps after a seek from elsewhere: so each opens again.
        # Except where the index is whole: parsing that of a long film takes longer than decoding a window, and there a
        # new decoder is enough.
        if target_s is None or not self._keeps_container:
            self._reopen()
            decoder = self._get_decoder(self._container)
        else:
            decoder = av.CodecContext.create(self._stream.codec_context.name, "r")
            decoder.extradata = self._stream.codec_context.extradata
        self._is_untouched = False
        if target_s is not None:
            ticks = int((target_s + self._start_s) / float(self._stream.time_base))
            try:
                self._container.seek(ticks, stream=self._stream)
            except av.FFmpegError:
                return  # not seekable: the caller decodes from the start
        yield from self._decode_packets(self._container, decoder, first)

    def _get_decoder(self, container: Any) -> Any:
        return container.streams.get(self._stream_index)[0].codec_context

    def _decode_packets(self, container: Any, decoder: Any, first: int) -> Iterator[tuple[float | None, Samples]]:
        """Yield (position by time stamp, mono samples); faults before `first` don't count."""
        try:
            for packet in container.demux(container.streams.get(self._stream_index)[0]):
                if packet.size == 0 and packet.dts is not None:
                    continue
                try:
                    frames = decoder.decode(packet)
                except av.FFmpegError as error:
                    end_s = self._get_end_s(packet)
                    if end_s is not None and end_s * self.rate_hz <= first:
                        continue
                    raise self._explain(packet, explain_av_error(error)) from error
                for frame in frames:
                    stamp = None
                    if frame.pts is not None:
                        stamp = (float(frame.pts * frame.time_base) - self._start_s) * self.rate_hz
                    if frame.is_corrupt and (stamp is None or stamp + frame.samples > first):
                        raise self._explain(packet, "the decoder calls a frame corrupt")
                    yield stamp, self._mix(frame)
        except av.FFmpegError as error:
            raise DecodeError(f"{self._path}: reading its audio fails: {explain_av_error(error)}") from error

    def _get_end_s(self, packet: Any) -> float | None:
        if packet.pts is None or not packet.duration:
            return None
        return float((packet.pts + packet.duration) * packet.time_base) - self._start_s

    def _explain(self, packet: Any, why: str) -> DecodeError:
        where = "" if packet.pts is None else f" at {float(packet.pts * packet.time_base) - self._start_s:.3f} s"
        return DecodeError(f"{self._path}: its audio can't be decoded{where}: {why}; the file is damaged there")

    def _mix(self, frame: av.AudioFrame) -> Samples:
        """Mix a decoded frame into mono float32 [n] with FFmpeg's coefficients, scaled to sum to at most 1."""
        if frame.sample_rate != self.rate_hz:
            raise DecodeError(
                f"{self._path}: its audio changes from {self.rate_hz} to {frame.sample_rate} Hz; encode it at one rate"
            )
        kind = (frame.format.name, frame.layout.name)
        if kind == ("fltp", "mono"):
            return frame.to_ndarray()[0].astype(np.float32, copy=False)
        if self._mixer is None or self._mixer[0] != kind:
            mixer = av.AudioResampler(
                format="fltp", layout="mono", rate=self.rate_hz, options={"rematrix_maxval": "1.0"}
            )
            self._mixer = (kind, mixer)
        frame.pts = None
        mixed = [out.to_ndarray()[0] for out in self._mixer[1].resample(frame)]
        return np.concatenate(mixed) if mixed else np.empty(0, dtype=np.float32)


class AudioReader:
    """The audio of one file, read by the span; is used by one thread.

    Of several tracks it takes FFmpeg's best one of the programme of the frames. Raises MediaNotFoundError or
    DecodeError when made, if the file is missing or is no media file; a file without audio has `has_track` False.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        container = open_container(path)
        stream = find_audio_stream(container)
        self._track = None if stream is None else AudioTrack(path, container, stream)
        if self._track is None:
            container.close()

    @property
    def has_track(self) -> bool:
        """Whether the file has an audio track that there is a decoder for."""
        return self._track is not None

    def read(self, start_s: float, stop_s: float, rate_hz: int) -> Samples:
        """Read a span, see `read_audio`."""
        n_wanted = round((stop_s - start_s) * rate_hz)
        if self._track is None or n_wanted <= 0:
            return np.empty(0, dtype=np.float32)
        first = round(start_s * rate_hz)
        return _resample_span(self._track, first, first + n_wanted, rate_hz)

    def close(self) -> None:
        """Close the file and the decoder."""
        if self._track is not None:
            self._track.close()

    def __enter__(self) -> AudioReader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def read_audio(path: Path, start_s: float, stop_s: float, rate_hz: int) -> Samples:
    """Read a span of a file's audio, float32 [n] in about -1..1.

    n is round((stop_s - start_s) * rate_hz) where the track covers the span, fewer where it ends earlier, and 0 where
    the file has no track or the span lies beyond its end (`AudioReader.has_track` tells which). Before the track's
    first sample, and in gaps of its time stamps, the samples are zero; start_s may be negative.
    The first sample is the one nearest to start_s on the grid k / rate_hz of the shared clock (interface.py), so that a
    span read alone equals the same span cut from the whole (but for noise that coders make up: AudioTrack).
    Several channels are mixed as FFmpeg mixes them into 16-bit files (coefficients scaled to sum to at most 1);
    resampling is swresample's, with its final flush.
    Raises DecodeError where the audio doesn't decode, or ends clearly before the end that the file declares
    (a WAV, MP3, Ogg or MPEG-TS that is cut short declares nothing, and just ends earlier).
    """
    with AudioReader(path) as reader:
        return reader.read(start_s, stop_s, rate_hz)


def probe_audio_end_s(path: Path) -> float:
    """Return when a file's audio ends on the shared clock, by demuxing it; 0 without a track."""
    with open_container(path) as container:
        stream = find_audio_stream(container)
        if stream is None:
            return 0.0
        try:
            ends = [p.pts + (p.duration or 0) for p in container.demux(stream) if p.size and p.pts is not None]
        except av.FFmpegError as error:
            raise DecodeError(f"{path}: reading its audio fails: {explain_av_error(error)}") from error
        end_s = max(ends, default=0) * float(stream.time_base)
        check_declared_end(path, "audio", get_declared_end_s(container, stream), end_s)
        return max(end_s - get_container_start_s(container), 0.0)


def _resample_span(track: AudioTrack, first: int, stop: int, rate_hz: int) -> Samples:
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
