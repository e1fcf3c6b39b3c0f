"""Generates the demo data set: media files on disk, and the segments of its manifest."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
from av.codec.context import Flags
from filelock import FileLock

from echoshift.extract.demo.drawing import draw_video
from echoshift.extract.demo.planning import FRAME_RATE_HZ, SAMPLE_RATE_HZ, VideoPlan, plan_demo, plan_segments
from echoshift.extract.demo.sounding import sound_video
from echoshift.pipeline.segments import Segment

N_THREADS = 2

REVISION = 2
"""Raised when drawing, sounding or encoding change: then videos of an older revision are made again."""

MARK = "generated.txt"

BITEXACT = {"fflags": "+bitexact"}
X264 = {"preset": "veryfast", "crf": "17", "g": "45", "x264-params": "cpu-independent=1"}
"""Without `cpu-independent`, libx264 encodes differently from run to run where it uses AVX-512 (DECISIONS.md)."""


def generate_demo(
    out_dir: Path,
    seed: int = 0,
    n_train: int = 120,
    n_test: int = 60,
    progress: Callable[[int, int], None] | None = None,
) -> list[Segment]:
    """Write the demo's media to `<out_dir>/<domain>/<video_id>.mp4` and return its segments, video by video in time.

    `n_train` and `n_test` are segments a domain; the card data/manifests/demo.toml counts the default. The same
    arguments give the same files. `progress` is called with (videos written, videos in all) after each. Nothing is
    written if `<out_dir>/generated.txt` says that this very plan was, and every video is still there; otherwise every
    video is, over what is there. Of two processes that generate into one folder the second waits for the first.
    """
    plans = plan_demo(seed, n_train, n_test)
    digest = hashlib.sha256(repr(plans).encode()).hexdigest()
    mark_path, mark = out_dir / MARK, f"synthetic demo videos, revision {REVISION}, plan {digest}\n"
    out_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(out_dir / f"{MARK}.lock"):
        is_generated = mark_path.is_file() and mark_path.read_text(encoding="utf-8") == mark
        if not is_generated or not all(locate_demo_video(out_dir, plan).is_file() for plan in plans):
            mark_path.unlink(missing_ok=True)
            _write_videos(out_dir, plans, progress)
            mark_path.write_text(mark, encoding="utf-8")
    return [segment for plan in plans for segment in plan_segments(plan)]


def locate_demo_video(out_dir: Path, plan: VideoPlan) -> Path:
    """Return where a planned video lies."""
    return out_dir / plan.world.name / f"{plan.video_id}.mp4"


def write_demo_video(out_dir: Path, plan: VideoPlan) -> Path:
    """Write one planned video and return its path."""
    path = locate_demo_video(out_dir, plan)
    samples = sound_video(plan) if plan.has_track else None
    write_mp4(path, draw_video(plan), FRAME_RATE_HZ, samples, SAMPLE_RATE_HZ)
    return path


def _write_videos(out_dir: Path, plans: Sequence[VideoPlan], progress: Callable[[int, int], None] | None) -> None:
    with ThreadPoolExecutor(N_THREADS) as pool:  # drawing and encoding both let go of the interpreter's lock
        writing = [pool.submit(write_demo_video, out_dir, plan) for plan in plans]
        try:
            for n_written, written in enumerate(as_completed(writing), 1):
                written.result()
                if progress is not None:
                    progress(n_written, len(plans))
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def write_mp4(
    path: Path,
    frames: Iterable[npt.NDArray[np.uint8]],
    frame_rate_hz: int,
    samples: npt.NDArray[np.float32] | None,
    sample_rate_hz: int,
) -> None:
    """Write runs of frames uint8 [T, H, W, 3] and mono samples float32 [n] (None: no track), both from time zero on.

    H.264 yuv420p by libx264 (with B-frames, as real files have them) and AAC, one thread each, nothing of the clock
    in the file: the same input gives the same bytes with the same libraries. The file appears under its name when it
    is whole.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with av.open(str(partial), "w", format="mp4", options=BITEXACT) as container:
        video: av.VideoStream | None = None
        audio = None
        if samples is not None:
            audio = container.add_stream("aac", rate=sample_rate_hz, layout="mono", options={"b": "64k"})
            audio.codec_context.flags |= Flags.bitexact
        n_frames = n_samples = 0
        for run in frames:
            if video is None:
                video = container.add_stream("libx264", rate=frame_rate_hz, options=X264)
                video.height, video.width = run.shape[1:3]
                video.pix_fmt = "yuv420p"
                video.codec_context.thread_count = 1
                video.codec_context.flags |= Flags.bitexact
            for image in run:
                frame = av.VideoFrame.from_ndarray(image, format="rgb24")
                frame.pts, frame.time_base = n_frames, Fraction(1, frame_rate_hz)
                container.mux(video.encode(frame))
                n_frames += 1
            if audio is not None and samples is not None:
                # Audio follows the frames run by run, so that the file is interleaved.
                stop = min(len(samples), n_frames * sample_rate_hz // frame_rate_hz)
                container.mux(audio.encode(_make_audio_frame(samples, n_samples, stop, sample_rate_hz)))
                n_samples = stop
        if audio is not None and samples is not None:
            if n_samples < len(samples):
                container.mux(audio.encode(_make_audio_frame(samples, n_samples, len(samples), sample_rate_hz)))
            container.mux(audio.encode(None))
        if video is not None:
            container.mux(video.encode(None))
    partial.replace(path)


def _make_audio_frame(samples: npt.NDArray[np.float32], start: int, stop: int, sample_rate_hz: int) -> av.AudioFrame:
    frame = av.AudioFrame.from_ndarray(samples[None, start:stop], format="fltp", layout="mono")
    frame.sample_rate = sample_rate_hz
    frame.pts, frame.time_base = start, Fraction(1, sample_rate_hz)
    return frame
