"""Asks, for a check of a manifest, for the media that the encoders of its card read."""

from __future__ import annotations

from dataclasses import dataclass, field

from extract.encoders.registry import find_encoder
from extract.media import Modality
from extract.media_survey import MediaSurvey
from pipeline.cards import DatasetCard
from pipeline.errors import MediaNotFoundError
from pipeline.segments import Segment


@dataclass(slots=True)
class NeededMediaProbe:
    """Measures each segment's video by the media that are needed (`MediaProbe`), and keeps which videos are there.

    Attributes:
        modalities: tried in order; the first whose media are there says how long the video is.
        asked, missing: ids of videos.
    """

    survey: MediaSurvey
    modalities: tuple[Modality, ...]
    asked: set[str] = field(default_factory=set)
    missing: set[str] = field(default_factory=set)

    def probe_duration_s(self, segment: Segment) -> float:
        """Gives the length in seconds; raises MediaNotFoundError of the last modality, or another MediaError."""
        self.asked.add(segment.video_id)
        for modality in self.modalities[:-1]:
            try:
                return self.survey.probe_duration_s(segment, modality)
            except MediaNotFoundError:
                continue
        try:
            return self.survey.probe_duration_s(segment, self.modalities[-1])
        except MediaNotFoundError:
            self.missing.add(segment.video_id)
            raise


def find_needed_modalities(card: DatasetCard) -> tuple[Modality, ...]:
    """Finds by which media a card's videos are looked for: pictures, unless no encoder of the card reads them.

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
