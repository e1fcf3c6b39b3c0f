"""Finds, before anything is trained, the segments whose pictures can't be decoded by what their files declare."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from echoshift.extract.media import MediaSurvey, locate_media
from echoshift.extract.readers.container import (
    find_video_stream,
    get_container_start_s,
    get_declared_end_s,
    open_container,
)
from echoshift.pipeline.errors import MediaError
from echoshift.pipeline.manifest import find_media_faults, number_rows
from echoshift.pipeline.segments import END_TOLERANCE_S, Segment
from echoshift.pipeline.specs import FeatureSpec


def find_without_pictures(
    survey: MediaSurvey, segments: Sequence[Segment], spec: FeatureSpec, notify: Callable[[str], None]
) -> set[str]:
    """Find the ids of segments that have no video, an unreadable one, or one that has ended before; tell of them.

    `extract` would fail them, so that who trains from the videos must leave them out as well. A file that breaks in the
    middle isn't noticed here; it ends the run by name. Flow images aren't looked at.
    """
    if spec.frame is None or spec.frame.source != "rgb" or not survey.root.is_dir():
        return set()
    ends_s: dict[tuple[str, str, str], float] = {}
    for segment in segments:
        key = (segment.video_id, segment.domain, segment.split)
        if key not in ends_s:
            ends_s[key] = _read_declared_end_s(survey, segment)
    # Only what a header casts doubt on is looked through: that takes seconds for an hour of video.
    doubtful = [s for s in segments if s.stop_s > ends_s[s.video_id, s.domain, s.split] + END_TOLERANCE_S / 2]
    faults = find_media_faults(number_rows(doubtful), survey, Path())
    if faults:
        first = faults[0]
        notify(
            f"{len(faults)} segments have no pictures and are left out: {first.segment_id} ({first.message}; "
            f"{first.remedy}){' …' if len(faults) > 1 else ''}; `echoshift manifest check --media` names all"
        )
    return {fault.segment_id for fault in faults}


def _read_declared_end_s(survey: MediaSurvey, segment: Segment) -> float:
    """Read when a video ends by its header, in seconds; inf where none says, -inf where it can't be opened."""
    try:
        location = locate_media(survey.root, survey.layout, segment, "rgb")
        if location.kind != "file":
            return survey.probe_duration_s(segment)
        with open_container(location.path) as container:
            stream = find_video_stream(container)
            end_s = None if stream is None else get_declared_end_s(container, stream)
            return math.inf if end_s is None else end_s - get_container_start_s(container)
    except MediaError:
        return -math.inf
