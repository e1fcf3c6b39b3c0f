"""Reads the pictures of a video file through PyAV; the default reader, exact on every file it accepts.

It indexes the shown time stamps by demuxing, seeks to the keyframe at or before the frame wanted, and decodes forward
to its exact time stamp. A frame that is missed or flagged corrupt is tried again from one keyframe before, then from
the start of the file; what is still not whole is an error. It keeps the decoder open and goes on forward while that is
cheaper than a seek.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import av
import numpy as np
import numpy.typing as npt
from av.video.reformatter import VideoReformatter

from echoshift.extract.readers.container import explain_av_error, open_container, pick_video_stream
from echoshift.extract.readers.orientation import compute_rotation_deg, get_orientation, turn_upright
from echoshift.extract.readers.protocol import VideoInfo, check_times, find_shown_frames
from echoshift.extract.readers.shown_frames import index_shown_frames
from echoshift.pipeline.errors import DecodeError

_SEEK_GAIN = 12  # frames of decoding that a seek has to save; it empties the decoder's pipeline
_FROM_START = -1


class _ThreadedDecodeError(Exception):
    """Ends a walk with several threads, in which an error can't be laid to one packet."""


class PyAvFrameReader:
    """Reads the pictures of one video file by time (protocol `FrameReader`); full size, RGB, upright.

    Pictures are bit for bit those of a sequential decode converted by `to_ndarray(format="rgb24")`, then turned by the
    display matrix. The pixel aspect ratio is not applied. Of several streams it takes FFmpeg's best.
    Raises MediaNotFoundError or DecodeError (no media, no pictures, cut short) when made. An MPEG-TS or a raw stream
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
            self._times_s = self._index.times_s
            self._starts = self._index.keyframe_pts  # where decoding can start
            self._start_positions = np.searchsorted(self._keys, self._starts)
            self._walk: Iterator[tuple[int, av.VideoFrame, bool]] | None = None
            self._last_key: int | None = None  # the frame that the walk gave last
            self._held: tuple[int, av.VideoFrame] | None = None
            self._fault: av.FFmpegError | None = None
            self._reformatter = VideoReformatter()
            self._info: VideoInfo | None = None
            self._drop_frames_without_start()
        except BaseException:
            self.close()
            raise

    @property
    def info(self) -> VideoInfo:
        """The video's facts; decodes one frame the first time, for its shape and orientation."""
        if self._info is None:
            frame = self._held[1] if self._held is not None else self._find_any_frame()
            orientation = get_orientation(frame)
            height, width = (frame.height, frame.width) if orientation[1] == 0 else (frame.width, frame.height)
            shown_ticks = int(self._keys[-1] - self._keys[0]) + self._index.last_ticks
            self._info = VideoInfo(
                n_frames=len(self._keys),
                duration_s=self._index.duration_s,
                rate_hz=len(self._keys) / (shown_ticks * self._index.tick_s),
                height=height,
                width=width,
                rotation_deg=compute_rotation_deg(orientation),
            )
        return self._info

    @property
    def frame_times_s(self) -> npt.NDArray[np.float64]:
        """When each frame is first shown, ascending, float64 [n_frames]."""
        return self._times_s

    def read_frames(self, times_s: npt.ArrayLike) -> npt.NDArray[np.uint8]:
        """Read the frames shown at the given times (any order, repeats allowed), uint8 [T, H, W, 3].

        Each frame is decoded and converted once a call; besides the result one decoded frame is kept.
        Raises DecodeError if a frame can't be decoded whole, SegmentOutsideVideoError past the end.
        """
        times = check_times(times_s, self._index.duration_s, self._path)
        if times.size == 0:
            return np.empty((0, self.info.height, self.info.width, 3), dtype=np.uint8)
        positions, inverse = np.unique(find_shown_frames(self._times_s, times), return_inverse=True)
        frames: npt.NDArray[np.uint8] | None = None
        for nth, position in enumerate(positions):
            image = self._convert(self._find_frame(int(position)))
            if frames is None:
                frames = np.empty((times.size, *image.shape), dtype=np.uint8)
            elif image.shape != frames.shape[1:]:
                raise DecodeError(
                    f"{self._path}: the picture at {self._times_s[position]:.3f} s is {image.shape[1]}x"
                    f"{image.shape[0]}, others are {frames.shape[2]}x{frames.shape[1]}; encode the video at one size"
                )
            for place in np.flatnonzero(inverse == nth):  # a boolean index would copy at half the speed
                frames[place] = image
        assert frames is not None
        return frames

    def close(self) -> None:
        """Return back the file handle and the decoder."""
        self._walk = self._held = None
        self._container.close()

    def __enter__(self) -> PyAvFrameReader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

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
        if self._can_go_on(key, nearest) and self._advance(key):
            return self._get_held()
        for start in dict.fromkeys(max(start, _FROM_START) for start in (nearest, nearest - 1, _FROM_START)):
            was_careful = self._is_careful
            self._walk = self._decode_from(start)
            if self._advance(key):
                return self._get_held()
            if self._is_careful and not was_careful:
                self._walk = self._decode_from(start)
                if self._advance(key):
                    return self._get_held()
        what = "" if self._fault is None else f" ({explain_av_error(self._fault)})"
        raise DecodeError(
            f"{self._path}: the frame at {self._times_s[position]:.3f} s can't be decoded whole{what}; "
            "the file is damaged there"
        ) from self._fault

    def _get_held(self) -> av.VideoFrame:
        assert self._held is not None
        return self._held[1]

    def _can_go_on(self, key: int, nearest: int) -> bool:
        if self._walk is None or self._last_key is None or self._last_key >= key:
            return False
        if nearest < 0:
            return True
        here = int(np.searchsorted(self._keys, self._last_key))
        return int(self._start_positions[nearest]) - here < _SEEK_GAIN

    def _advance(self, key: int) -> bool:
        """Decode forward to a frame and holds it; False if it doesn't come, or not whole."""
        if self._walk is None:
            return False
        try:
            for found, frame, is_whole in self._walk:
                self._last_key = found
                if found >= key:
                    self._held = (key, frame) if found == key and is_whole else None
                    return self._held is not None
        except _ThreadedDecodeError:
            self._is_careful = True
            self._reopen()
        self._walk = self._held = None
        return False

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
        self._keys, self._times_s = self._keys[keep], self._times_s[keep]
        self._start_positions = np.searchsorted(self._keys, self._starts)

    def _find_any_frame(self) -> av.VideoFrame:
        """Find the first frame that comes out at all, for the facts about the pictures."""
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
        raise DecodeError(f"{self._path}: not one of its pictures can be decoded{why}") from self._fault
