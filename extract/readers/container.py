"""Opens media files through PyAV, picks their streams, and compares what they declare with what they hold."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, BinaryIO

import av
from av.container import InputContainer
from av.stream import Disposition

from echoshift.pipeline.errors import DecodeError, MediaNotFoundError

# These formats are text, or refer to other files: a video of a dataset is neither.
REFUSED_FORMATS = frozenset({"tty", "hls", "concat", "dash", "sdp", "imf", "webm_dash_manifest", "lrc", "aqtitle"})
# The duration of these is an estimate of FFmpeg's, not a declaration of the file's.
_ESTIMATING_FORMATS = frozenset({"mpegts", "mpeg", "mp3", "aac", "ac3", "eac3", "h264", "hevc", "m4v", "mpegvideo"})
_DURATION_TAG = re.compile(r"(\d+):(\d\d):(\d\d(?:\.\d+)?)")
SHORTFALL_S = 0.5
SHORTFALL_PART = 0.01


def explain_av_error(error: av.FFmpegError) -> str:
    """Return FFmpeg's own words for an error, in one line."""
    return (error.strerror or str(error)).strip().splitlines()[0]


def open_container(path: Path) -> InputContainer:
    """Open a media file; other protocols and format that refer to other files are refused.

    Raises MediaNotFoundError if there is no such file, DecodeError if it is no media file.
    """
    if not path.is_file():
        raise MediaNotFoundError(f"{path}: no such file")
    try:
        container = av.open(
            str(path.absolute()), mode="r", options={"protocol_whitelist": "file"}, metadata_errors="ignore"
        )
    except av.FFmpegError as error:
        raise DecodeError(
            f"{path} ({path.stat().st_size} bytes) can't be opened as a media file: {explain_av_error(error)}; "
            "it is damaged, cut short, or no media file: fetch it again"
        ) from error
    if container.format.name in REFUSED_FORMATS:
        name = container.format.name
        container.close()
        raise DecodeError(f"{path} is no media file but {name}: give the media file itself")
    return container


def pick_video_stream(container: InputContainer, path: Path) -> Any:
    """Pick the video stream that FFmpeg calls the best (av_find_best_stream), never an attached cover.

    That rule prefers the default stream, then the one with more frames, then the higher bit rate. If it picks a cover,
    the first stream that is none is taken. Raises DecodeError if there is none, or no decoder for it.
    """
    stream = find_video_stream(container)
    if stream is None:
        kinds = ", ".join(s.type for s in container.streams) or "none"
        raise DecodeError(f"{path} holds no video that can be decoded (streams: {kinds})")
    return stream


def find_video_stream(container: InputContainer) -> Any | None:
    """Find the stream that `pick_video_stream` picks, or None."""
    best = container.streams.best("video")
    streams = [
        stream
        for stream in container.streams.video
        if stream.codec_context is not None and not stream.disposition & Disposition.attached_pic
    ]
    for stream in streams:
        if best is not None and stream.index == best.index:
            return stream
    return streams[0] if streams else None


def find_audio_stream(container: InputContainer) -> Any | None:
    """Find the audio stream that FFmpeg calls the best, preferring the programme of the video; None without one."""
    video = find_video_stream(container)
    best = (
        container.streams.best("audio")
        if video is None
        else container.streams.best("audio", related=video)  # the audio of the same programme
    )
    return best if best is not None and best.codec_context is not None else None


def has_whole_index(container: InputContainer, path: Path) -> bool:
    """Return whether all packets were known when a container was opened: true of an MP4 or MOV without fragments.

    Where a seek leads then depends on that index alone, not on what was read before. The file's outermost boxes are
    looked at (ISO/IEC 14496-12, 4.2: size and kind; size 1: 64 bits of size follow, 0: to the end of the file).
    """
    if "mp4" not in container.format.name.split(","):
        return False
    try:
        with path.open("rb") as file:
            return not _has_fragments(file, path.stat().st_size)
    except OSError:  # gone meanwhile, which whoever opens it next will say
        return False


def _has_fragments(file: BinaryIO, n_bytes: int) -> bool:
    place = 0
    while place + 8 <= n_bytes:
        file.seek(place)
        header = file.read(16)
        size, kind = int.from_bytes(header[:4], "big"), header[4:8]
        if size == 0:
            return False
        if size == 1:
            size = int.from_bytes(header[8:], "big")
        if kind == b"moof" or size < 8:  # or what is no box
            return True
        place += size
    return False


def get_container_start_s(container: InputContainer) -> float:
    """Return the container's start time in seconds, which is time zero of the shared clock; 0 where it has none."""
    return 0.0 if container.start_time is None else container.start_time / av.time_base


def get_declared_end_s(container: InputContainer, stream: Any) -> float | None:
    """Return where a stream ends by the file's own declaration, in seconds of its raw time stamps, or None.

    Sources: the stream's duration (MP4, AVI, ASF, WAV, FLAC), or Matroska's per-track DURATION tag.
    """
    if container.format.name in _ESTIMATING_FORMATS:
        return None
    for name, value in stream.metadata.items():
        if name.upper().startswith("DURATION") and (match := _DURATION_TAG.match(value)):
            hours, minutes, seconds = match.groups()
            return int(hours) * 3600 + int(minutes) * 60 + float(seconds)
    if stream.duration is None or stream.time_base is None:
        return None
    return float((stream.duration + (stream.start_time or 0)) * stream.time_base)


def check_declared_end(path: Path, what: str, declared_s: float | None, found_s: float) -> None:
    """Raise DecodeError if a stream ends clearly (0.5 s and 1 %) before the end that the file declares for it."""
    if declared_s is None or declared_s - found_s <= max(SHORTFALL_S, SHORTFALL_PART * declared_s):
        return
    raise DecodeError(
        f"{path} declares {declared_s:.2f} s of {what} but holds {max(found_s, 0.0):.2f} s: it is cut short "
        "or damaged; fetch it again"
    )
