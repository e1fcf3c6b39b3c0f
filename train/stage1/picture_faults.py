"""Finds, before anything is trained, the segments whose pictures can't be decoded by what their files declare."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from extract.media_survey import MediaSurvey
from pipeline.manifest_check import find_media_faults, number_rows
from pipeline.segments import Segment
from pipeline.specs import FeatureSpec


def find_without_pictures(
    survey: MediaSurvey, segments: Sequence[Segment], spec: FeatureSpec, notify: Callable[[str], None]
) -> set[str]:
    """Finds the ids of segments that have no video, an unreadable one, or one that has ended before; tells of them.

    `extract` would fail them, so that who trains from the videos must leave them out as well. A file that breaks in the
    middle isn't noticed here; it ends the run by name. Flow images aren't looked at.
    """
    if spec.frame is None or spec.frame.source != "rgb" or not survey.root.is_dir():
        return set()
    faults = find_media_faults(number_rows(segments), survey, Path())
    if faults:
        first = faults[0]
        notify(
            f"{len(faults)} segments have no pictures and are left out: {first.segment_id} ({first.message}; "
            f"{first.remedy}){' …' if len(faults) > 1 else ''}; `echoshift manifest check --media` names all"
        )
    return {fault.segment_id for fault in faults}
