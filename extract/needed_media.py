"""Asks, for a check of a manifest, for the media that the encoders of its card read."""

from __future__ import annotations

from dataclasses import dataclass, field

from echoshift.extract.encoders.registry import find_encoder
from echoshift.extract.media import MediaLocation, Modality, locate_media
from echoshift.extract.media_survey import MediaSurvey
from echoshift.pipeline.cards import DatasetCard
from echoshift.pipeline.errors import MediaNotFoundError
from echoshift.pipeline.segments import Segment


@dataclass(slots=True)
class NeededMediaProbe:
    """Measures each segment's video by the media that are needed (`MediaProbe`), and keeps which videos are there.

    Attributes:
        modalities: tried in order; the first whose media are there says how long the video is.
        asked, found: ids of videos; one that can't be read is found.
    """

    survey: MediaSurvey
    modalities: tuple[Modality, ...]
    asked: set[str] = field(default_factory=set)
    found: set[str] = field(default_factory=set)

    def probe_duration_s(self, segment: Segment) -> float:
        """Return the length in seconds; raises MediaNotFoundError of the last modality, or another MediaError."""
        self.asked.add(segment.video_id)
        location = self._locate(segment)
        self.found.add(segment.video_id)
        return self.survey.probe_duration_s(segment, location.modality)

    def _locate(self, segment: Segment) -> MediaLocation:
        for modality in self.modalities[:-1]:
            try:
                return locate_media(self.survey.root, self.survey.layout, segment, modality)
            except MediaNotFoundError:
                continue
        return locate_media(self.survey.root, self.survey.layout, segment, self.modalities[-1])


def find_needed_modalities(card: DatasetCard) -> tuple[Modality, ...]:
    """Find by which media a card's videos are looked for: pictures, unless no encoder of the card reads them.

    Sound that is centred on clips needs the pictures' times. Flow is read from its images, else computed from pictures.
    Sound beside pictures isn't asked for, because a segment may be silent. Raises SpecError for an unknown encoder.
    """
    entries = [find_encoder(name) for name in card.encoders]
    of_sound = [entry.audio is not None and entry.audio.span == "segment" for entry in entries]
    if entries and all(of_sound):
        return ("audio",)
    others = [entry for entry, hears in zip(entries, of_sound, strict=True) if not hears]
    if others and all(entry.modality == "flow" for entry in others):
        return ("flow", "rgb")
    return ("rgb",)
