"""Plans which times of a video a segment's clips and windows of sound are read at, and which time each row covers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from echoshift.extract.random_draws import draw
from echoshift.extract.readers.protocol import TIME_TOLERANCE_S, find_shown_frames
from echoshift.pipeline.errors import DecodeError, ManifestError, SegmentOutsideVideoError, SpecError
from echoshift.pipeline.segments import END_TOLERANCE_S
from echoshift.pipeline.specs import AudioSpec, ClipSpec

RATE_ROUNDING = 1e-6


@dataclass(frozen=True, slots=True)
class ClipPlan:
    """What the clips of one segment are made of.

    Attributes:
        frame_times_s: the times to ask a FrameReader for, float64 [n_clips, n_frames].
        times_s: start and end (exclusive) of the time each clip covers, float64 [n_clips, 2]. A clip covers its whole
            span, n_frames * stride frames of the time base, cut at the segment's end.
    """

    frame_times_s: npt.NDArray[np.float64]
    times_s: npt.NDArray[np.float64]

    @property
    def n_clips(self) -> int:
        """The number of clips."""
        return self.frame_times_s.shape[0]


def plan_clips(
    spec: ClipSpec,
    start_s: float,
    stop_s: float,
    video_frame_times_s: npt.NDArray[np.float64],
    video_end_s: float,
    segment_id: str = "",
) -> ClipPlan:
    """Plan the clips of the segment [start_s, stop_s) of a video, every view of them (METHODS section 2).

    Views follow each other within a clip: entry clip * n_views + view. `segment_id` seeds what is random.

    The time base: with `spec.rate_hz`, frame j is what is shown at start_s + j / rate_hz, and there are
    max(1, floor((stop_s - start_s) * rate_hz + 1e-6)) of them. Without, the frames are the video's own that are shown
    at some time in [start_s, stop_s), the one on the screen at start_s included.
    A segment shorter than a clip's span takes its frames again from the first one (indices modulo n), also with
    `windows`, which then give one clip; `times_s` covers the segment once.

    `video_frame_times_s` is when each frame is first shown, `video_end_s` when the last one ends, both on the clock of
    the readers. A stop_s beyond the end by at most END_TOLERANCE_S is moved to the end; raises
    SegmentOutsideVideoError for more, and for a start that is not inside the video.
    """
    stop_s = _clamp_stop(start_s, stop_s, video_end_s)
    if len(video_frame_times_s) == 0:
        raise DecodeError("the video has no frames to take clips from")
    if spec.rate_hz is None:
        base_times_s = _find_own_frames(start_s, stop_s, video_frame_times_s, video_end_s)
    else:
        n_base = _count_frames(stop_s - start_s, spec.rate_hz)
        base_times_s = start_s + np.arange(n_base + 1) / spec.rate_hz
    n_frames = len(base_times_s) - 1
    offsets = _plan_offsets(spec, n_frames, segment_id)
    taken = (offsets[:, None] + np.arange(spec.n_frames) * spec.stride) % n_frames
    ends = np.minimum(offsets + spec.span, n_frames)
    times_s = np.stack([base_times_s[offsets], base_times_s[ends]], axis=1)
    return ClipPlan(frame_times_s=base_times_s[taken], times_s=np.clip(times_s, start_s, stop_s))


def plan_audio_windows(
    spec: AudioSpec, start_s: float, stop_s: float, clips: ClipPlan | None
) -> npt.NDArray[np.float64]:
    """Plan the windows of sound of a segment, start and end in seconds, float64 [n_windows, 2] (METHODS section 3).

    `span` = `segment`: one window from start_s, the segment's length or `duration_s`, whichever is shorter.
    `span` = `clip`: a window of `duration_s` around the middle of each clip of `clips`; it may begin before the file
    or end after it, where the sound is zero.
    """
    if not start_s < stop_s:
        raise ManifestError(f"a segment must stop after it starts, this one runs from {start_s} to {stop_s} s")
    if spec.span == "segment":
        return np.array([[start_s, min(stop_s, start_s + spec.duration_s)]])
    if clips is None:
        raise SpecError("sound with span = 'clip' needs a clip plan to centre its windows on")
    middles_s = clips.times_s.mean(axis=1)
    return np.stack([middles_s - spec.duration_s / 2, middles_s + spec.duration_s / 2], axis=1)


def _clamp_stop(start_s: float, stop_s: float, video_end_s: float) -> float:
    if not start_s < stop_s:
        raise ManifestError(f"a segment must stop after it starts, this one runs from {start_s} to {stop_s} s")
    if start_s < 0 or start_s >= video_end_s:
        raise SegmentOutsideVideoError(
            f"the segment starts at {start_s:.3f} s, the video runs from 0 to {video_end_s:.3f} s: "
            "correct the segment, or check that this is its video"
        )
    if stop_s > video_end_s + END_TOLERANCE_S:
        raise SegmentOutsideVideoError(
            f"the segment stops at {stop_s:.3f} s, {stop_s - video_end_s:.3f} s after the video has ended "
            f"({END_TOLERANCE_S} s are tolerated): correct the segment, or check that the video is whole"
        )
    return min(stop_s, video_end_s)


def _count_frames(duration_s: float, rate_hz: float) -> int:
    return max(1, int(np.floor(duration_s * rate_hz + RATE_ROUNDING)))


def _find_own_frames(
    start_s: float, stop_s: float, video_frame_times_s: npt.NDArray[np.float64], video_end_s: float
) -> npt.NDArray[np.float64]:
    """Find when the frames shown in [start_s, stop_s) begin, and, one value more, when the last of them ends."""
    first = int(find_shown_frames(video_frame_times_s, start_s))
    n_until_stop = int(np.searchsorted(video_frame_times_s, stop_s - TIME_TOLERANCE_S, side="left"))
    boundaries_s = np.append(video_frame_times_s, max(video_end_s, float(video_frame_times_s[-1])))
    boundaries_s[0] = min(boundaries_s[0], start_s)  # what is shown before the first frame is the first frame
    return boundaries_s[first : max(n_until_stop, first + 1) + 1]


def _plan_offsets(spec: ClipSpec, n_frames: int, segment_id: str) -> npt.NDArray[np.int64]:
    """Plan at which frame of the segment each entry begins; all at 0 where the segment is shorter than the span."""
    n_beyond = n_frames - spec.span
    if spec.sampling == "windows":
        assert spec.step is not None  # ClipSpec refuses windows without a step
        return np.arange(0, max(n_beyond, 0) + 1, spec.step, dtype=np.int64).repeat(spec.n_views)
    if n_beyond < 0:
        return np.zeros(spec.n_clips * spec.n_views, dtype=np.int64)
    spacing = (n_beyond + 1) / spec.n_clips
    clips, views = range(spec.n_clips), range(spec.n_views)
    if spec.sampling == "random":
        places = [clip + draw(spec.seed, segment_id, view, clip, "offset") for clip in clips for view in views]
        return np.array([min(int(place * spacing), n_beyond) for place in places], dtype=np.int64)
    return np.array([int(i * spacing + spacing / 2) for i in clips for _ in views], dtype=np.int64)
