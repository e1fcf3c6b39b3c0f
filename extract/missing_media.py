"""Keeps a run from costing features because media are gone, which it refuses, or can't be read for a while."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from echoshift.extract.media import locate_media
from echoshift.extract.media_survey import MediaSurvey, find_modality
from echoshift.pipeline.errors import MediaNotFoundError
from echoshift.pipeline.segments import Segment
from echoshift.pipeline.specs import FeatureSpec


def require_some_media(survey: MediaSurvey, segments: Collection[Segment], spec: FeatureSpec) -> None:
    """Raise MediaNotFoundError where not one segment has its media below the root."""
    if all(_is_missing(survey, segment, spec) for segment in segments):
        raise MediaNotFoundError(
            f"none of {len(segments)} segments has its media below {survey.root}: "
            f"{_explain(survey, next(iter(segments)), spec)}; name the folder with --media, or mount its disk"
        )


def require_media_of_done(
    survey: MediaSurvey, rows: Sequence[Segment | None], spec: FeatureSpec, done_again: np.ndarray, path: str
) -> None:
    """Raise MediaNotFoundError where rows that are done, bool [row], would be computed anew from media that are gone.

    They would fail, and the features they have would be lost.
    """
    lost = [
        segment
        for segment, again in zip(rows, done_again.tolist(), strict=True)
        if again and segment is not None and _is_missing(survey, segment, spec)
    ]
    if lost:
        raise MediaNotFoundError(
            f"{len(lost)} rows of {path} are done, and their media are gone: {_explain(survey, lost[0], spec)}; put "
            "them back, or take their segments out of the manifest, which leaves the rows as they are"
        )


@dataclass(frozen=True, slots=True)
class UncheckedRows:
    """The done rows whose media can't be read, bool [row], and the first one's reason; "" where there are none."""

    rows: np.ndarray
    reason: str

    @property
    def n_rows(self) -> int:
        """Their number."""
        return int(self.rows.sum())


def find_unchecked_rows(
    survey: MediaSurvey, rows: Sequence[Segment | None], spec: FeatureSpec, done: np.ndarray
) -> UncheckedRows:
    """Find the done rows, `done` bool [row], of which nobody can say now whether they are up to date.

    Computed again they would fail, and the features they have would be lost.
    """
    unchecked = np.zeros(len(rows), dtype=bool)
    reason = ""
    for row in np.flatnonzero(done).tolist() if survey.has_reading_errors else ():
        segment = rows[row]
        error = None if segment is None else _find_reading_error(survey, segment, spec)
        if segment is not None and error is not None:
            unchecked[row] = True
            reason = reason or f"video {segment.video_id}: {error}"
    return UncheckedRows(unchecked, reason)


def _find_reading_error(survey: MediaSurvey, segment: Segment, spec: FeatureSpec) -> str | None:
    error = survey.find_reading_error(segment, find_modality(spec))
    if error is None and spec.audio is not None and spec.audio.span == "clip":
        return survey.find_reading_error(segment, "rgb")
    return error


def _is_missing(survey: MediaSurvey, segment: Segment, spec: FeatureSpec) -> bool:
    of_clips = spec.audio is not None and spec.audio.span == "clip"
    return survey.is_missing(segment, find_modality(spec)) or (of_clips and survey.is_missing(segment, "rgb"))


def _explain(survey: MediaSurvey, segment: Segment, spec: FeatureSpec) -> str:
    for modality in (find_modality(spec), "rgb"):
        try:
            locate_media(survey.root, survey.layout, segment, modality)
        except MediaNotFoundError as error:
            return str(error)
    return segment.video_id
