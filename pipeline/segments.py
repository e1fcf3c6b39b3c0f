"""The segment, the unit that is extracted, trained on and scored, and the manifest that lists them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

# How far a segment may reach beyond its video's end: annotations are rounded, and audio and video end apart.
END_TOLERANCE_S = 0.5


@dataclass(frozen=True, slots=True)
class TimedLabel:
    """One class with the span, in seconds of the video, in which it happens (CharadesEgo's actions)."""

    label: str
    start_s: float
    stop_s: float


@dataclass(frozen=True, slots=True)
class Segment:
    """A span of one video with what is known of it; it holds no path, the media root comes from the command line.

    Attributes:
        segment_id: unique in its manifest (EPIC: the uid, as text).
        video_id: names the video below the media root, without a file ending; may contain `/`.
        start_s, stop_s: seconds from the start of the video; stop_s > start_s.
        labels: class names of the card; exactly one where the task is single-label, any number otherwise.
        domain, split: names of the card.
        noun: free text, "" when unknown.
        pair_id: the same for segments that show the same event from two views, "" when there is none.
        tags: sorted free words, such as `labelled` and `unlabelled`.
        timed_labels: where inside the video each label happens, () when unknown.
    """

    segment_id: str
    video_id: str
    start_s: float
    stop_s: float
    labels: tuple[str, ...]
    domain: str
    split: str
    noun: str = ""
    pair_id: str = ""
    tags: tuple[str, ...] = ()
    timed_labels: tuple[TimedLabel, ...] = ()

    @property
    def duration_s(self) -> float:
        """The length in seconds."""
        return self.stop_s - self.start_s


@dataclass(frozen=True, slots=True)
class Manifest:
    """The list of segments of one dataset, in file order, with the sha256 of the file they were read from."""

    dataset: str
    segments: tuple[Segment, ...]
    sha256: str

    def __len__(self) -> int:
        return len(self.segments)

    def __iter__(self) -> Iterator[Segment]:
        return iter(self.segments)
