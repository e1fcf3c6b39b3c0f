"""Plans which times of a video a segment's clips and windows of audio are read at, and which part of a frame is cut.

Every random number of a view is drawn from its name alone: none depends on what ran before.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from echoshift.extract.readers.interface import TIME_TOLERANCE_S, find_shown_frames
from echoshift.pipeline.errors import DecodeError, ManifestError, SegmentOutsideVideoError, SpecError
from echoshift.pipeline.segments import END_TOLERANCE_S
from echoshift.pipeline.specs import AudioSpec, ClipSpec, FrameSpec

RATE_ROUNDING = 1e-6
N_TRIES = 10


def draw(seed: int, segment_id: str, view: int, clip: int, what: str) -> float:
    """Draw a number from [0, 1), evenly: the first 53 bits of a blake2b of all that names it.

    The same on every machine, in every worker and batch, and under every version of NumPy.
    """
    name = _name(seed, segment_id, view, clip, what)
    return (int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "big") >> 11) / 2**53


def draw_integer(low: int, high: int, seed: int, segment_id: str, view: int, clip: int, what: str) -> int:
    """Draw a whole number from low..high, both included."""
    return low + int(draw(seed, segment_id, view, clip, what) * (high - low + 1))


def draw_array(
    shape: tuple[int, ...], seed: int, segment_id: str, view: int, clip: int, what: str
) -> npt.NDArray[np.float32]:
    """Draw an array of numbers from [0, 1), evenly, float32: 24 bits each, the upper ones of 4 bytes, low byte first.

    The bytes are a SHAKE-128 of all that names the array, as long as it is: 5 ms for the 258,028 numbers of a
    spectrogram, where a hash for each of them would take a second.
    """
    n_bytes = 4 * int(np.prod(shape))
    stream = hashlib.shake_128(_name(seed, segment_id, view, clip, what)).digest(n_bytes)
    drawn = (np.frombuffer(stream, dtype="<u4") >> np.uint32(8)).astype(np.float32) * np.float32(2**-24)
    return drawn.reshape(shape)


def _name(seed: int, segment_id: str, view: int, clip: int, what: str) -> bytes:
    return f"{seed}\n{segment_id}\n{view}\n{clip}\n{what}".encode()


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
        n_base = max(1, int(np.floor((stop_s - start_s) * spec.rate_hz + RATE_ROUNDING)))
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
    """Plan the windows of audio of a segment, start and end in seconds, float64 [n_windows, 2] (METHODS section 3).

    `span` = `segment`: one window from start_s, the segment's length or `duration_s`, whichever is shorter.
    `span` = `clip`: a window of `duration_s` around the middle of each clip of `clips`; it may begin before the file
    or end after it, where the audio is zero.
    """
    if not start_s < stop_s:
        raise ManifestError(f"a segment must stop after it starts, this one runs from {start_s} to {stop_s} s")
    if spec.span == "segment":
        return np.array([[start_s, min(stop_s, start_s + spec.duration_s)]])
    if clips is None:
        raise SpecError("audio with span = 'clip' needs a clip plan to centre its windows on")
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


@dataclass(frozen=True, slots=True)
class Crop:
    """A part of a frame, in pixels after its short side was resized to `short_side`.

    A part that isn't crop x crop of the FrameSpec is resized to that; a mirrored one is turned left to right then.
    """

    short_side: int
    top: int
    left: int
    height: int
    width: int
    is_mirrored: bool = False


def plan_resized_shape(height: int, width: int, short_side: int) -> tuple[int, int]:
    """Compute the (height, width) of a frame whose short side is resized to `short_side`.

    The long side is floor(long * short_side / short), in integers (torchvision's rule, and pytorchvideo's up to the
    rounding of its floats).
    """
    if height <= width:
        return short_side, short_side * width // height
    return short_side * height // width, short_side


def plan_centre_crop(height: int, width: int, crop: int) -> tuple[int, int]:
    """Compute the (top, left) of the centre crop: half of what is left over, rounded down."""
    return (height - crop) // 2, (width - crop) // 2


def plan_crop(
    spec: FrameSpec, clips: ClipSpec, segment_id: str, clip: int, view: int, number: int, height: int, width: int
) -> Crop:
    """Plan crop `number` of one view of one clip, of frames of height x width (METHODS section 2).

    What is drawn depends on `clips.seed`, the segment and the view, and on the clip where `spec.crop_for` says so.
    """
    name = (clips.seed, segment_id, view, clip if spec.crop_for == "clip" else -1)
    is_mirrored = spec.flip > 0 and draw(*name, "flip") < spec.flip
    short_side = spec.short_side
    if spec.crops == "random" and spec.short_sides is not None:
        smallest, largest = spec.short_sides
        short_side = draw_integer(smallest, largest, *name, "short side")
    height, width = plan_resized_shape(height, width, short_side)
    if spec.crops == "random-resized":
        return Crop(short_side, *_plan_random_box(spec, name, height, width), is_mirrored)
    top, left = plan_centre_crop(height, width, spec.crop)
    if spec.crops == "three" and width >= height:
        left = (0, left, width - spec.crop)[number]
    elif spec.crops == "three":
        top = (0, top, height - spec.crop)[number]
    elif spec.crops == "random":
        top = draw_integer(0, height - spec.crop, *name, "top")
        left = draw_integer(0, width - spec.crop, *name, "left")
    return Crop(short_side, top, left, spec.crop, spec.crop, is_mirrored)


def _plan_random_box(
    spec: FrameSpec, name: tuple[int, str, int, int], height: int, width: int
) -> tuple[int, int, int, int]:
    """Plan (top, left, height, width) of a random-resized crop, by the rule of torchvision's RandomResizedCrop."""
    low, high = spec.area
    log_low, log_high = (math.log(ratio) for ratio in spec.aspect)
    for trial in range(N_TRIES):
        area = height * width * (low + (high - low) * draw(*name, f"area {trial}"))
        aspect = math.exp(log_low + (log_high - log_low) * draw(*name, f"aspect {trial}"))
        box_width, box_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < box_width <= width and 0 < box_height <= height:
            top = draw_integer(0, height - box_height, *name, "top")
            return top, draw_integer(0, width - box_width, *name, "left"), box_height, box_width
    box_width = min(width, round(height * spec.aspect[1]))
    box_height = min(height, round(width / spec.aspect[0]))
    top, left = (height - box_height) // 2, (width - box_width) // 2
    return top, left, box_height, box_width
