"""Reads the frames of a video file through PyAV; the default reader, exact on every file it accepts.

It indexes the shown time stamps by demuxing, seeks to the keyframe at or before the frame wanted, and decodes forward
to its exact time stamp. A frame that is missed or flagged corrupt is tried again from one keyframe before, then from
the start of the file; what is still not whole is an error. It keeps the decoder open and goes on forward while that is
cheaper than a seek.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import av
import numpy as np
import numpy.typing as npt
from av.container import InputContainer
from av.video.reformatter import VideoReformatter

from echoshift.extract.readers.container import (
    check_declared_end,
    explain_av_error,
    get_container_start_s,
    get_declared_end_s,
    open_container,
    pick_video_stream,
)
from echoshift.extract.readers.interface import FrameReader, VideoInfo, check_times, find_shown_frames
from echoshift.pipeline.errors import DecodeError

Matrix = tuple[int, int, int, int]
UPRIGHT: Matrix = (1, 0, 0, 1)
_RESTART_S = 1.0  # decoding time stamps that fall back by more than this start over
_WHOLE_FILE_FORMATS = ("matroska", "flv")  # declare one duration for all streams, and are read whole anyway
_SEEK_GAIN = 12  # frames of decoding that a seek has to save; it empties the decoder's pipeline
_FROM_START = -1


def get_orientation(frame: Any) -> Matrix:
    """Return the signs (a, b, c, d) of a frame's display matrix: a point (x, y) is shown at (a x + c y, b x + d y).

    x points right and y down; angles are rounded to multiples of 90 degrees.
    """
    side_data = frame.side_data.get("DISPLAYMATRIX")
    if side_data is None:
        return UPRIGHT
    values = np.frombuffer(side_data, dtype=np.int32)
    a, b, c, d = (int(values[i]) for i in (0, 1, 3, 4))
    if a == b == c == d == 0:
        return UPRIGHT
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return (1 if a >= 0 else -1, 0, 0, 1 if d >= 0 else -1)
    return (0, 1 if b >= 0 else -1, 1 if c >= 0 else -1, 0)


def compute_rotation_deg(orientation: Matrix) -> int:
    """Compute the clockwise turn of an orientation: 0, 90, 180 or 270 (a mirrored frame may be flipped besides)."""
    a, b, _, _ = orientation
    return round(math.degrees(math.atan2(b, a))) % 360


def turn_upright(image: npt.NDArray[np.uint8], orientation: Matrix) -> npt.NDArray[np.uint8]:
    """Turn and mirror a frame [H, W, C] as its orientation says; a view where possible."""
    a, b, c, d = orientation
    if b == 0:
        horizontal, vertical = a, d
    else:
        image = image.swapaxes(0, 1)
        horizontal, vertical = c, b
    return image[:: -1 if vertical < 0 else 1, :: -1 if horizontal < 0 else 1]


@dataclass(frozen=True, slots=True)
class ShownFrames:
    """The index of one video stream.

    Attributes:
        keys: what names a frame when it comes out of the decoder, ascending, int64 [n]: its time stamp in ticks, or
            its ordinal where `is_counted`.
        keyframe_pts, keyframe_dts: ticks of the places where decoding can start, ascending, int64 [k].
        tick_s: length of a tick in seconds (where counted: of a frame).
        start_s: what is subtracted from ticks * tick_s to give the shared clock.
        last_ticks: how long the last frame is shown.
        is_counted: time stamps are missing or don't tell the order of showing, so frames were decoded and counted.
    """

    keys: npt.NDArray[np.int64]
    keyframe_pts: npt.NDArray[np.int64]
    keyframe_dts: npt.NDArray[np.int64]
    tick_s: float
    start_s: float
    last_ticks: int
    is_counted: bool = False

    @property
    def times_s(self) -> npt.NDArray[np.float64]:
        """When each frame is first shown, float64 [n]."""
        return self.keys.astype(np.float64) * self.tick_s - self.start_s

    @property
    def duration_s(self) -> float:
        """When the last frame ends."""
        return (int(self.keys[-1]) + self.last_ticks) * self.tick_s - self.start_s


@dataclass(slots=True)
class _Packets:
    """What demuxing found, in decoding order."""

    pts: array[int] = field(default_factory=lambda: array("q"))
    keyframes: list[tuple[int, int]] = field(default_factory=list)
    n_untimed: int = 0
    is_reordered: bool = False
    last_pts: int | None = None
    last_duration: int = 0
    file_end_s: float = 0.0


def index_shown_frames(container: InputContainer, stream: Any, path: Path) -> ShownFrames:
    """Index the frames that a stream shows, by demuxing; the container is left at its end.

    Packets without a time stamp, marked discard (edit lists), empty, or that VP8 never shows are left out. Where no
    packet has a time stamp (raw H.264), or the container's don't tell the order of showing (AVI with B-frames), the
    frames are decoded once and counted, and their times follow from the mean rate.
    Raises DecodeError if there are no frames, if time stamps start over, or if the file declares clearly more.
    """
    packets = _read_packets(container, stream, path)
    is_unordered = (
        container.format.name == "avi" and bool(stream.codec_context.has_b_frames) and not packets.is_reordered
    )
    if packets.n_untimed > len(packets.pts) or is_unordered:
        return _count_frames(stream, path)
    if not packets.pts:
        raise DecodeError(f"{path} holds no frame in its video stream; fetch it again")
    keys = np.unique(np.frombuffer(packets.pts, dtype=np.int64))
    tick_s = float(stream.time_base)
    last_ticks = packets.last_duration
    if last_ticks <= 0:
        rate_hz = float(stream.average_rate or stream.guessed_rate or 25)
        last_ticks = max(round(float(np.median(np.diff(keys))) if len(keys) > 1 else 1 / rate_hz / tick_s), 1)
    found_s = (int(keys[-1]) + last_ticks) * tick_s
    check_declared_end(path, "frames", get_declared_end_s(container, stream), found_s)
    start_s = get_container_start_s(container)
    if container.format.name.startswith(_WHOLE_FILE_FORMATS) and container.duration is not None:
        check_declared_end(path, "media", container.duration / av.time_base, packets.file_end_s)
    keyframes = np.array(sorted(packets.keyframes), dtype=np.int64).reshape(-1, 2)
    return ShownFrames(keys, keyframes[:, 0], keyframes[:, 1], tick_s, start_s, last_ticks)


def _read_packets(container: InputContainer, stream: Any, path: Path) -> _Packets:
    found = _Packets()
    is_vp8 = stream.codec_context.name in ("vp8", "libvpx")
    wants_all = container.format.name.startswith(_WHOLE_FILE_FORMATS)
    restart_ticks = _RESTART_S / float(stream.time_base)
    last_dts = last_seen = None
    try:
        for packet in container.demux() if wants_all else container.demux(stream):
            if packet.size == 0:  # the flush at the end, and AVI's dropped frames
                continue
            if wants_all and packet.pts is not None and packet.time_base is not None:
                end_s = float((packet.pts + (packet.duration or 0)) * packet.time_base)
                found.file_end_s = max(found.file_end_s, end_s)
            if packet.stream_index != stream.index:
                continue
            pts, dts = packet.pts, packet.dts
            if dts is not None:
                if last_dts is not None and dts < last_dts - restart_ticks:
                    raise DecodeError(
                        f"{path}: time stamps start over after {last_dts * float(stream.time_base):.2f} s; "
                        "remux the file so that they ascend"
                    )
                last_dts = dts
            if pts is None:
                found.n_untimed += 1
                continue
            found.is_reordered |= last_seen is not None and pts < last_seen
            last_seen = pts
            if packet.is_keyframe:
                found.keyframes.append((pts, pts if dts is None else min(pts, dts)))
            if packet.is_discard or (is_vp8 and not memoryview(packet)[0] & 0x10):  # VP8: show_frame bit
                continue
            found.pts.append(pts)
            if found.last_pts is None or pts > found.last_pts:
                found.last_pts, found.last_duration = pts, packet.duration or 0
    except av.FFmpegError as error:
        raise DecodeError(f"{path}: reading fails at packet {len(found.pts)}: {explain_av_error(error)}") from error
    return found


def _count_frames(stream: Any, path: Path) -> ShownFrames:
    """Count frames by decoding all once."""
    n_frames = 0
    with open_container(path) as container:
        counted = container.streams[stream.index]
        counted.thread_type = "AUTO"
        try:
            for _ in container.decode(counted):
                n_frames += 1
        except av.FFmpegError as error:
            raise DecodeError(
                f"{path} has no usable time stamps, so it is decoded to count its frames, and that fails after "
                f"{n_frames}: {explain_av_error(error)}"
            ) from error
        rate = counted.average_rate or counted.guessed_rate
    if n_frames == 0 or not rate:
        raise DecodeError(f"{path} has neither time stamps nor a frame rate; remux it into a container that has")
    none = np.empty(0, dtype=np.int64)
    return ShownFrames(np.arange(n_frames, dtype=np.int64), none, none, float(1 / rate), 0.0, 1, is_counted=True)


class _ThreadedDecodeError(Exception):
    """Ends a walk with several threads, in which an error can't be laid to one packet."""


class VideoReader(FrameReader):
    """The frames of one video file: full size, RGB, upright.

    Frames are bit for bit those of a sequential decode converted by `to_ndarray(format="rgb24")`, then turned by the
    display matrix. The pixel aspect ratio is not applied. Of several streams it takes FFmpeg's best.
    Raises MediaNotFoundError or DecodeError (no media, no video, cut short) when made. An MPEG-TS or a raw stream
    declares no duration: one that is cut short just ends earlier.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._is_careful = False
        self._container = open_container(path)
        try:
            self._stream: Any = pick_video_stream(self._container, path)
            self._stream_index = self._stream.index
            self._index = index_shown_frames(self._container, self._stream, path)
            self._stream.thread_type = "AUTO"
            self._keys = self._index.keys
            self.frame_times_s = self._index.times_s
            self._starts = self._index.keyframe_pts  # where decoding can start
            self._start_positions = np.searchsorted(self._keys, self._starts)
            self._walk: Iterator[tuple[int, av.VideoFrame, bool]] | None = None
            self._last_key: int | None = None  # the frame that the walk gave last
            self._held: tuple[int, av.VideoFrame] | None = None
            self._fault: av.FFmpegError | None = None
            self._reformatter = VideoReformatter()
            self._drop_frames_without_start()
        except BaseException:
            self.close()
            raise

    @cached_property
    def info(self) -> VideoInfo:
        """The video's facts; decodes one frame the first time, for its shape and orientation."""
        frame = self._held[1] if self._held is not None else self._find_any_frame()
        orientation = get_orientation(frame)
        height, width = (frame.height, frame.width) if orientation[1] == 0 else (frame.width, frame.height)
        shown_ticks = int(self._keys[-1] - self._keys[0]) + self._index.last_ticks
        return VideoInfo(
            n_frames=len(self._keys),
            duration_s=self._index.duration_s,
            rate_hz=len(self._keys) / (shown_ticks * self._index.tick_s),
            height=height,
            width=width,
            rotation_deg=compute_rotation_deg(orientation),
        )

    def read_frames(self, times_s: npt.ArrayLike) -> npt.NDArray[np.uint8]:
        """Read the frames shown at the given times (any order, repeats allowed), uint8 [T, H, W, 3].

        Each frame is decoded and converted once a call; besides the result one decoded frame is kept.
        Raises DecodeError if a frame can't be decoded whole, SegmentOutsideVideoError past the end.
        """
        times = check_times(times_s, self._index.duration_s, self._path)
        if times.size == 0:
            return np.empty((0, self.info.height, self.info.width, 3), dtype=np.uint8)
        positions, inverse = np.unique(find_shown_frames(self.frame_times_s, times), return_inverse=True)
        frames: npt.NDArray[np.uint8] | None = None
        for nth, position in enumerate(positions):
            image = self._convert(self._find_frame(int(position)))
            if frames is None:
                frames = np.empty((times.size, *image.shape), dtype=np.uint8)
            elif image.shape != frames.shape[1:]:
                raise DecodeError(
                    f"{self._path}: the frame at {self.frame_times_s[position]:.3f} s is {image.shape[1]}x"
                    f"{image.shape[0]}, others are {frames.shape[2]}x{frames.shape[1]}; encode the video at one size"
                )
            for place in np.flatnonzero(inverse == nth):  # a boolean index would copy at half the speed
                frames[place] = image
        assert frames is not None
        return frames

    def close(self) -> None:
        """Close the file and the decoder."""
        self._walk = self._held = None
        self._container.close()

    def _convert(self, frame: av.VideoFrame) -> npt.NDArray[np.uint8]:
        image = cast("npt.NDArray[np.uint8]", self._reformatter.reformat(frame, format="rgb24").to_ndarray())
        return turn_upright(image, get_orientation(frame))

    def _find_frame(self, position: int) -> av.VideoFrame:
        """Find one frame, going on or seeking; `position` counts shown frames."""
        key = int(self._keys[position])
        if self._held is not None and self._held[0] == key:
            return self._held[1]
        self._fault = None
        nearest = int(np.searchsorted(self._starts, key, side="right")) - 1
        if self._can_go_on(key, nearest) and (frame := self._advance(key)) is not None:
            return frame
        for start in dict.fromkeys(max(start, _FROM_START) for start in (nearest, nearest - 1, _FROM_START)):
            was_careful = self._is_careful
            self._walk = self._decode_from(start)
            frame = self._advance(key)
            if frame is None and self._is_careful and not was_careful:
                self._walk = self._decode_from(start)
                frame = self._advance(key)
            if frame is not None:
                return frame
        what = "" if self._fault is None else f" ({explain_av_error(self._fault)})"
        raise DecodeError(
            f"{self._path}: the frame at {self.frame_times_s[position]:.3f} s can't be decoded whole{what}; "
            "the file is damaged there"
        ) from self._fault

    def _can_go_on(self, key: int, nearest: int) -> bool:
        if self._walk is None or self._last_key is None or self._last_key >= key:
            return False
        if nearest < 0:
            return True
        here = int(np.searchsorted(self._keys, self._last_key))
        return int(self._start_positions[nearest]) - here < _SEEK_GAIN

    def _advance(self, key: int) -> av.VideoFrame | None:
        """Decode forward to a frame and hold it; None if it doesn't come, or not whole."""
        if self._walk is None:
            return None
        try:
            for found, frame, is_whole in self._walk:
                self._last_key = found
                if found >= key:
                    self._held = (key, frame) if found == key and is_whole else None
                    return frame if self._held else None
        except _ThreadedDecodeError:
            self._is_careful = True
            self._reopen()
        self._walk = self._held = None
        return None

    def _reopen(self) -> None:
        self._container.close()
        self._container = open_container(self._path)
        self._stream = self._container.streams.get(self._stream_index)[0]
        self._stream.thread_type = "NONE" if self._is_careful else "AUTO"

    def _read_packets_from(self, start: int) -> Iterator[Any]:
        """Yield packets from a keyframe on; none if the container can't go there."""
        if start == _FROM_START:
            self._reopen()
            yield from self._container.demux(self._stream)
            return
        for target in dict.fromkeys((int(self._starts[start]), int(self._index.keyframe_dts[start]))):
            self._container.seek(target, stream=self._stream)
            packets = self._container.demux(self._stream)
            for packet in packets:
                if packet.size == 0 or packet.pts is None or not packet.is_keyframe:
                    continue  # the seek ended between keyframes
                if packet.pts > self._starts[start]:
                    break  # too late: some demuxers seek by decoding time
                yield packet
                yield from packets
                return

    def _decode_from(self, start: int) -> Iterator[tuple[int, av.VideoFrame, bool]]:
        """Yield (key, frame, is whole) in order of showing, from a keyframe or the start.

        After a packet that fails, the frames of the packets that follow it up to the next keyframe aren't whole, nor
        are those shown before that keyframe.
        """
        n_given = 0
        doubtful: set[int | None] = set()
        is_broken = False
        whole_from: int | None = None
        try:
            for packet in self._read_packets_from(start):
                if packet.size == 0 and packet.dts is not None:
                    continue  # AVI's dropped frame; a decoder takes it for the end
                if is_broken and packet.is_keyframe and packet.pts is not None:
                    is_broken, whole_from = False, packet.pts
                if is_broken or (whole_from is not None and packet.pts is not None and packet.pts < whole_from):
                    doubtful.add(packet.pts)
                try:
                    frames = packet.decode()
                except av.FFmpegError as error:
                    if not self._is_careful:
                        raise _ThreadedDecodeError from error
                    self._fault = error
                    is_broken = True
                    doubtful.add(packet.pts)
                    continue
                for frame in frames:
                    key = n_given if self._index.is_counted else frame.pts
                    n_given += 1
                    if key is not None:
                        yield key, frame, not frame.is_corrupt and frame.pts not in doubtful
        except av.FFmpegError as error:  # the container, not the decoder
            self._fault = error

    def _drop_frames_without_start(self) -> None:
        """Leave out frames before the first keyframe that no decoder can show (a stream cut inside a group)."""
        if self._starts.size == 0 or self._keys[0] >= self._starts[0]:
            return
        if self._index.is_counted:
            return
        first = int(self._starts[0])
        whole: set[int] = set()
        for attempt in ("with threads", "careful"):
            try:
                for key, _, is_whole in self._decode_from(_FROM_START):
                    if key >= first:
                        break
                    if is_whole:
                        whole.add(key)
                break
            except _ThreadedDecodeError:
                assert attempt == "with threads"
                self._is_careful = True
                whole.clear()
        keep = (self._keys >= first) | np.isin(self._keys, sorted(whole))
        self._keys, self.frame_times_s = self._keys[keep], self.frame_times_s[keep]
        self._start_positions = np.searchsorted(self._keys, self._starts)

    def _find_any_frame(self) -> av.VideoFrame:
        """Find the first frame that comes out at all, for its shape."""
        for _ in ("with threads", "careful"):
            self._walk = self._decode_from(_FROM_START)
            try:
                for key, frame, is_whole in self._walk:
                    self._last_key = key
                    if is_whole:
                        self._held = (key, frame)
                        return frame
                break
            except _ThreadedDecodeError:
                self._is_careful = True
        self._walk = None
        why = "" if self._fault is None else f" ({explain_av_error(self._fault)})"
        raise DecodeError(f"{self._path}: not one of its frames can be decoded{why}") from self._fault
