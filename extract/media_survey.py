"""Looks, before a run, at the media of every segment: where they are, what their content is, how many clips fit."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from echoshift.extract.clips import plan_clips
from echoshift.extract.media import Modality, identify_media, locate_media, open_frames, probe_duration_s
from echoshift.pipeline.cards import MediaLayout
from echoshift.pipeline.errors import MediaError, MediaNotFoundError
from echoshift.pipeline.segments import Segment
from echoshift.pipeline.specs import FeatureSpec
from echoshift.pipeline.store.layout import NO_MEDIA

UNREADABLE = "unreadable media"


@dataclass(slots=True)
class MediaSurvey:
    """Answers questions about the media below one root, and asks the disk once a file."""

    root: Path
    layout: MediaLayout
    _identities: dict[tuple[object, ...], str] = field(default_factory=dict)
    _missing: set[tuple[object, ...]] = field(default_factory=set)
    _reading_errors: dict[tuple[object, ...], str] = field(default_factory=dict)
    _frame_times: dict[object, tuple[np.ndarray, float]] = field(default_factory=dict)
    _durations: dict[object, float] = field(default_factory=dict)

    def identify(self, segment: Segment, modality: Modality) -> str:
        """Return the identity of a segment's media, NO_MEDIA when there are none, UNREADABLE when they can't be read.

        Such a row fails when it is extracted, with the reason, and turns stale when its media can be read; one that is
        done stays as it is meanwhile.
        """
        key = (modality, segment.video_id, segment.domain, segment.split)
        if key not in self._identities:
            try:
                location = locate_media(self.root, self.layout, segment, modality)
                self._identities[key] = identify_media(location) if location.kind != "none" else NO_MEDIA
            except MediaNotFoundError:
                self._identities[key] = NO_MEDIA
                self._missing.add(key)
            except (MediaError, OSError) as error:
                self._identities[key] = UNREADABLE
                self._reading_errors[key] = " ".join(str(error).split())
        return self._identities[key]

    def is_missing(self, segment: Segment, modality: Modality) -> bool:
        """Return whether a segment's media aren't there; loose frames without a sound file miss nothing."""
        self.identify(segment, modality)
        return (modality, segment.video_id, segment.domain, segment.split) in self._missing

    @property
    def has_reading_errors(self) -> bool:
        """Whether any of the media asked for so far can't be read."""
        return bool(self._reading_errors)

    def find_reading_error(self, segment: Segment, modality: Modality) -> str | None:
        """Return why a segment's media can't be read, None where they can, or aren't there."""
        self.identify(segment, modality)
        return self._reading_errors.get((modality, segment.video_id, segment.domain, segment.split))

    def probe_duration_s(self, segment: Segment, modality: Modality = "rgb") -> float:
        """Measure how long a segment's video is, in seconds; raises MediaNotFoundError or DecodeError."""
        location = locate_media(self.root, self.layout, segment, modality)
        if location.kind == "none":
            raise MediaNotFoundError(
                f"no {modality} of video {segment.video_id} below {self.root}; only loose frames are there"
            )
        if location not in self._durations:
            self._durations[location] = probe_duration_s(location)
        return self._durations[location]

    def count_clips(self, spec: FeatureSpec, segment: Segment) -> int:
        """Count a segment's clips and their views under windows; 1 where its media can't say (extraction will)."""
        modality: Modality = "rgb" if spec.frame is None else spec.frame.source
        try:
            location = locate_media(self.root, self.layout, segment, modality)
            if location not in self._frame_times:
                with open_frames(location, spec.decoder) as reader:
                    self._frame_times[location] = (reader.frame_times_s, reader.info.duration_s)
            plan = plan_clips(spec.clip, segment.start_s, segment.stop_s, *self._frame_times[location])
        except MediaError:
            return 1
        return len(plan.times_s)


def find_modality(spec: FeatureSpec) -> Modality:
    """Return the modality whose media a store is made from."""
    return "audio" if spec.frame is None else spec.frame.source


def identify_segments(
    survey: MediaSurvey, segments: Collection[Segment], spec: FeatureSpec, notify: Callable[[], None] = lambda: None
) -> dict[str, str]:
    """Map each segment's id to the identity of what its row is made from."""
    identities = {}
    for segment in segments:
        identities[segment.segment_id] = identify_sources(survey.identify, segment, spec)
        notify()
    return identities


def identify_sources(identify: Callable[[Segment, Modality], str], segment: Segment, spec: FeatureSpec) -> str:
    """Return the identity of all media that a row is made from.

    Sound that is centred on clips depends on the picture's times too, so both identities count.
    """
    identity = identify(segment, find_modality(spec))
    if spec.audio is not None and spec.audio.span == "clip":
        identity += identify(segment, "rgb")
    return identity


def count_clips_at_most(survey: MediaSurvey, segments: Collection[Segment], spec: FeatureSpec) -> int:
    """Return the length of a store's clip axis."""
    if spec.audio is not None and spec.audio.span == "segment":
        return spec.n_sound_views
    if spec.clip.sampling != "windows":
        return spec.clip.n_clips * spec.n_entries_per_clip
    n_of_view = spec.n_entries_per_clip // spec.clip.n_views  # crops, or views of the same sound
    return n_of_view * max((survey.count_clips(spec, segment) for segment in segments), default=1)
