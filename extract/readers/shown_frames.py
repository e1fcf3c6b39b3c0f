"""Indexes which frames a video shows and when, without decoding them."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt
from av.container import InputContainer

from echoshift.extract.readers.container import (
    check_declared_end,
    explain_av_error,
    get_container_start_s,
    get_declared_end_s,
    open_container,
)
from echoshift.pipeline.errors import DecodeError

_RESTART_S = 1.0  # decoding time stamps that fall back by more than this start over
_WHOLE_FILE_FORMATS = ("matroska", "flv")  # declare one duration for all streams, and are read whole anyway


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
        raise DecodeError(f"{path} holds no frame in its picture stream; fetch it again")
    keys = np.unique(np.frombuffer(packets.pts, dtype=np.int64))
    tick_s = float(stream.time_base)
    last_ticks = packets.last_duration
    if last_ticks <= 0:
        rate_hz = float(stream.average_rate or stream.guessed_rate or 25)
        last_ticks = max(round(float(np.median(np.diff(keys))) if len(keys) > 1 else 1 / rate_hz / tick_s), 1)
    found_s = (int(keys[-1]) + last_ticks) * tick_s
    check_declared_end(path, "pictures", get_declared_end_s(container, stream), found_s)
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
    """Count frames by decoding all once; the stream's container is positioned anew first."""
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
