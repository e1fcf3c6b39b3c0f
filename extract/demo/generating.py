"""Generates the demo data set: media files on disk, and the segments of its manifest."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from filelock import FileLock

from echoshift.extract.demo.drawing import draw_video
from echoshift.extract.demo.mp4_files import write_mp4
from echoshift.extract.demo.planning import VideoPlan, plan_demo, plan_segments
from echoshift.extract.demo.sounding import sound_video
from echoshift.extract.demo.worlds import FRAME_RATE_HZ, SAMPLE_RATE_HZ
from echoshift.pipeline.segments import Segment

N_THREADS = 2

REVISION = 2
"""Raised when drawing, sounding or encoding change: then videos of an older revision are made again."""

MARK = "generated.txt"


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
    mark_path, mark = out_dir / MARK, _describe_plans(plans)
    out_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(out_dir / f"{MARK}.lock"):
        if not _is_generated(out_dir, plans, mark):
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


def _describe_plans(plans: Sequence[VideoPlan]) -> str:
    digest = hashlib.sha256(repr(plans).encode()).hexdigest()
    return f"synthetic demo videos, revision {REVISION}, plan {digest}\n"


def _is_generated(out_dir: Path, plans: Sequence[VideoPlan], mark: str) -> bool:
    mark_path = out_dir / MARK
    if not mark_path.is_file() or mark_path.read_text(encoding="utf-8") != mark:
        return False
    return all(locate_demo_video(out_dir, plan).is_file() for plan in plans)


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
