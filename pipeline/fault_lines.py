"""The faults of a manifest in as many lines as a person reads: one a video where the whole video is at fault."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from echoshift.pipeline.manifest_check import Fault

N_LISTED_VIDEOS = 20
_KINDS = ("missing", "unreadable")


def list_fault_lines(faults: Sequence[Fault]) -> list[str]:
    """List faults as `LEVEL: fault`, errors before warnings.

    Of missing videos, and of unreadable ones, the first N_LISTED_VIDEOS have a line each, which counts their segments;
    a last one after all errors counts the others. Whatever else is wrong has a line of its own.
    """
    videos: dict[tuple[str, str], list[Fault]] = {}
    for fault in faults:
        if fault.media:
            videos.setdefault((fault.media, fault.message), []).append(fault)
    of_videos: dict[int, str] = {}  # by the fault that stands for its video
    more = []
    for kind in _KINDS:
        of_kind = [members for (media, _), members in videos.items() if media == kind]
        of_videos.update((id(members[0]), _describe_video(members)) for members in of_kind[:N_LISTED_VIDEOS])
        if hidden := of_kind[N_LISTED_VIDEOS:]:
            n_segments = sum(map(len, hidden))
            what = f"{kind} video{'s' if len(hidden) > 1 else ''}"
            counted = f"and {len(hidden)} more {what}, of {n_segments} segments"
            more.append(f"error: {hidden[0][0].path}: {counted}; --json lists all")
    errors = [
        of_videos.get(id(fault), f"error: {fault}")
        for fault in faults
        if fault.level == "error" and (not fault.media or id(fault) in of_videos)
    ]
    return [*errors, *more, *(f"warning: {fault}" for fault in faults if fault.level == "warning")]


def _describe_video(members: Sequence[Fault]) -> str:
    first, n_more = members[0], len(members) - 1
    of_video = f" and {n_more} more of its video" if n_more else ""
    return f"error: {first.path}:{first.line}: segment {first.segment_id}{of_video}: {first.message}; {first.remedy}"


def join_missing(faults: Sequence[Fault], n_videos: int, folder: Path) -> list[Fault]:
    """Put one fault of the file before the others, in place of those of missing videos, where all n_videos are.

    It says what was looked for first.
    """
    missing = [fault for fault in faults if fault.media == "missing"]
    reason = missing[0].message.removeprefix("no media: ")
    message = f"none of the {n_videos} videos is in {folder}: {reason}"
    joined = Fault(missing[0].path, 0, "", message, "name the folder that holds them with --media, or mount its disk")
    return [joined, *(fault for fault in faults if fault.media != "missing")]
