"""What sections of the page are made of, as nouns that the templates know how to show."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from markupsafe import Markup


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell of a table: its words, the number it is sorted by, and the length of a bar in it, 0 to 1."""

    text: str
    value: float | None = None
    bar: float | None = None


@dataclass(frozen=True, slots=True)
class Column:
    """A table's column; numbers stand to the right."""

    name: str
    is_number: bool = True


@dataclass(frozen=True, slots=True)
class TableBlock:
    """A table that sorts and filters; the first cell of a row is its header."""

    kind: ClassVar[str] = "table"
    id: str
    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Figure:
    """A chart as an `<svg>` element, whose text alternative is inside, with its caption."""

    caption: str
    svg: Markup


@dataclass(frozen=True, slots=True)
class FiguresBlock:
    """Charts side by side, as many as there is room for; `wide` ones take a row of their own."""

    kind: ClassVar[str] = "figures"
    figures: tuple[Figure, ...]
    wide: bool = False


@dataclass(frozen=True, slots=True)
class TextBlock:
    """A paragraph; `analysis` marks what reads the target's labels, which no training sees."""

    kind: ClassVar[str] = "text"
    text: str
    tone: Literal["plain", "analysis", "quiet", "warning"] = "plain"


@dataclass(frozen=True, slots=True)
class HeadingBlock:
    """A heading below a section's."""

    kind: ClassVar[str] = "heading"
    text: str
    id: str = ""


@dataclass(frozen=True, slots=True)
class MissingBlock:
    """A sentence that says what isn't there, with the command that makes it."""

    kind: ClassVar[str] = "missing"
    text: str
    command: str = ""


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar, in percent of the track: its mean, and the span from lowest to highest; None where there is none."""

    name: str
    mean: float | None
    low: float | None
    high: float | None
    words: str


@dataclass(frozen=True, slots=True)
class BarsBlock:
    """Bars below each other, each with its number in words."""

    kind: ClassVar[str] = "bars"
    caption: str
    bars: tuple[Bar, ...]


@dataclass(frozen=True, slots=True)
class ConfusionBlock:
    """A confusion matrix: counts, rows are labels, columns predictions."""

    kind: ClassVar[str] = "confusion"
    caption: str
    classes: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class ProbabilityLine:
    """One prediction of a segment: who says it, and the likeliest classes with their probabilities."""

    who: str
    classes: tuple[tuple[str, float, bool], ...]


@dataclass(frozen=True, slots=True)
class Picture:
    """An image as a data URL, with its text alternative and what stands below it."""

    url: str
    alternative: str
    caption: str = ""


@dataclass(frozen=True, slots=True)
class SegmentCard:
    """One segment: what it looks like, sounds like, and what is made of it; `sentences` say what is missing."""

    segment_id: str
    facts: str
    labels: tuple[str, ...]
    frames: tuple[Picture, ...]
    spectrogram: Picture | None
    sound_url: str
    gate: tuple[Bar, ...]
    gate_words: str
    predictions: tuple[ProbabilityLine, ...]
    sentences: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class SegmentsBlock:
    """Segments as cards, which filter together."""

    kind: ClassVar[str] = "segments"
    cards: tuple[SegmentCard, ...]


@dataclass(frozen=True, slots=True)
class DetailsBlock:
    """What is folded away until it is asked for."""

    kind: ClassVar[str] = "details"
    summary: str
    blocks: tuple[Block, ...]
    is_open: bool = False


@dataclass(frozen=True, slots=True)
class ChoiceBlock:
    """Several panels of which one is shown, by name."""

    kind: ClassVar[str] = "choice"
    id: str
    label: str
    panels: tuple[tuple[str, tuple[Block, ...]], ...]


Block = (
    TableBlock
    | FiguresBlock
    | TextBlock
    | HeadingBlock
    | MissingBlock
    | BarsBlock
    | ConfusionBlock
    | SegmentsBlock
    | DetailsBlock
    | ChoiceBlock
)


@dataclass(frozen=True, slots=True)
class Tile:
    """One number at the head of the page: what it is, and a line about it."""

    name: str
    number: str
    words: str = ""


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the page with an entry of its own in the table of contents."""

    id: str
    title: str
    lead: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True, slots=True)
class Page:
    """The whole page."""

    dataset: str
    title: str
    description: str
    is_synthetic: bool
    tiles: tuple[Tile, ...]
    sections: tuple[Section, ...]
    footer: tuple[tuple[str, str], ...] = field(default=())


def number(value: float | None, digits: int = 1) -> Cell:
    """Make a cell of a number, sorted by its full precision; a dash where there is none."""
    return Cell("–", None) if value is None else Cell(f"{value:,.{digits}f}", value)


def count(value: int) -> Cell:
    """Make a cell of a count."""
    return Cell(f"{value:,}", value)


def percent(share: float | None, digits: int = 1) -> Cell:
    """Make a cell of a share 0..1, shown and sorted in percent; a dash where there is none."""
    return number(None if share is None else 100 * share, digits)
