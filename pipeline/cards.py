"""The dataset card: what a dataset's classes, domains, shifts, files and published numbers are."""

from __future__ import annotations

import re
import tomllib
from functools import cached_property
from pathlib import Path
from string import Formatter
from typing import Literal

import tomli_w
from pydantic import Field, ValidationError, field_validator, model_validator

from echoshift.pipeline.errors import CardError, suggest
from echoshift.pipeline.places import MANIFESTS_DIR, list_cards, locate_card
from echoshift.pipeline.specs import SpecModel


class Shift(SpecModel):
    """One adaptation problem: from which domains, to which."""

    source: tuple[str, ...] = Field(min_length=1)
    target: str

    @property
    def name(self) -> str:
        """The name used on the command line, such as `D1-D2` or `D1+D2-D3`."""
        return f"{'+'.join(self.source)}-{self.target}"


class ExpectedCount(SpecModel):
    """Expected number of segments of a domain's split, of each class and of videos."""

    domain: str
    split: str
    n_segments: int
    n_per_class: tuple[int, ...] = ()
    n_videos: int | None = None


class OfficialSource(SpecModel):
    """Where a dataset's annotation or media files officially come from."""

    what: str
    where: str
    files: tuple[str, ...] = ()
    licence: str = ""


class PublishedNumber(SpecModel):
    """One row of a published table; `scores` maps a shift's name, or `mean`, to percent."""

    paper: str
    table: str
    method: str
    metric: str
    scores: dict[str, float]
    note: str = ""


class MediaLayout(SpecModel):
    """Where a segment's media lie below the media root, and the clock of frames that lie loose.

    `rgb`, `flow` and `audio` are path templates tried in order, with the fields {video_id}, {domain}, {split} and
    {participant} (the part of video_id before the first `_`). A template without a file ending stands for a folder of
    frames, or for a video file with any known ending. A `.tar` template is a tar of frames.
    Frame file number n is shown from (n - n_first_frame) / frame_rate_hz seconds on; n_first_frame and n_first_flow
    may lie between two numbers (EPIC's flow, which rounds). A pattern holds one %d, such as %010d, and may hold
    {video_id}, which stands for the last part of video_id.
    """

    rgb: tuple[str, ...] = ("{video_id}",)
    flow: tuple[str, ...] = ()
    audio: tuple[str, ...] = ()
    frame_rate_hz: float | None = None
    frame_pattern: str = "frame_%010d.jpg"
    n_first_frame: float = 1
    flow_rate_hz: float | None = None
    flow_pattern: str = "frame_%010d.jpg"
    n_first_flow: float = 1

    @field_validator("rgb", "flow", "audio")
    @classmethod
    def _check_templates(cls, templates: tuple[str, ...]) -> tuple[str, ...]:
        for template in templates:
            fields = {field for _, field, _, _ in Formatter().parse(template) if field is not None}
            unknown = fields - {"video_id", "domain", "split", "participant"}
            if unknown or "video_id" not in fields:
                raise ValueError(
                    f"template {template!r} must hold {{video_id}} and no field but domain, split, participant"
                )
        return templates

    @field_validator("frame_pattern", "flow_pattern")
    @classmethod
    def _check_pattern(cls, pattern: str) -> str:
        if re.fullmatch(r"[^%]*%(0\d+)?d[^%]*", pattern.replace("{video_id}", "")) is None or "/" in pattern:
            raise ValueError(f"pattern {pattern!r} must be a file name with one number, such as frame_%010d.jpg")
        return pattern


class DatasetCard(SpecModel):
    """Everything that is fixed about a dataset before any of its files are there.

    `encoders` are those that `echoshift extract` runs when none are named.
    """

    name: str
    title: str
    description: str = ""
    synthetic: bool = False
    task: Literal["single-label", "multi-label"]
    metric: Literal["top1", "map"]
    classes: tuple[str, ...] = Field(min_length=2)
    domains: tuple[str, ...] = Field(min_length=1)
    splits: tuple[str, ...] = ("train", "test")
    shifts: tuple[Shift, ...] = ()
    counts: tuple[ExpectedCount, ...] = ()
    sources: tuple[OfficialSource, ...] = ()
    published: tuple[PublishedNumber, ...] = ()
    media: MediaLayout = MediaLayout()
    encoders: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _check_consistency(self) -> DatasetCard:
        if (self.task == "multi-label") != (self.metric == "map"):
            raise ValueError(f"metric {self.metric!r} is not that of a {self.task} task; use top1 or map")
        if len(set(self.classes)) != len(self.classes):
            raise ValueError("a class is listed twice")
        for shift in self.shifts:
            unknown = {*shift.source, shift.target} - set(self.domains)
            if unknown:
                domain = sorted(unknown)[0]
                raise ValueError(f"shift {shift.name} names unknown domain {domain!r}; {suggest(domain, self.domains)}")
        for count in self.counts:
            if count.domain not in self.domains or count.split not in self.splits:
                raise ValueError(f"counts name unknown {count.domain}/{count.split}")
            if count.n_per_class and (
                len(count.n_per_class) != len(self.classes) or sum(count.n_per_class) != count.n_segments
            ):
                raise ValueError(f"n_per_class of {count.domain}/{count.split} doesn't add up to n_segments")
        return self

    @cached_property
    def class_index(self) -> dict[str, int]:
        """Map a class name to its index."""
        return {name: i for i, name in enumerate(self.classes)}


def read_card(path: Path) -> DatasetCard:
    """Read and check one card; raises CardError with the file and the field at fault."""
    try:
        return DatasetCard.model_validate(tomllib.loads(path.read_text(encoding="utf-8-sig")))
    except FileNotFoundError as error:
        hint = suggest(path.stem, list_cards(path.parent), listed_by="echoshift list datasets", there="cards there:")
        raise CardError(f"no dataset card {path}; {hint}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise CardError(f"{path} is not valid TOML: {error}") from error
    except ValidationError as error:
        faults = "; ".join(
            f"{'.'.join(map(str, e['loc'])) or 'card'}: {_describe_fault(e['type'], e['msg'], e['loc'])}"
            for e in error.errors()
        )
        raise CardError(f"{path}: {faults}") from error


def _describe_fault(kind: str, message: str, place: tuple[int | str, ...]) -> str:
    if kind != "extra_forbidden":
        return message.removeprefix("Value error, ")
    hint = f"; {suggest(str(place[0]), DatasetCard.model_fields)}" if len(place) == 1 else ""
    return f"no such key{hint}"


def read_dataset_card(dataset: str, manifests_dir: Path = MANIFESTS_DIR) -> DatasetCard:
    """Read the card of a dataset from `manifests_dir`, or of those that come with echoshift.

    Raises CardError if there is none, and for a card copied from another dataset that still has its name: features
    would go into that one's stores.
    """
    path = locate_card(dataset, manifests_dir)
    card = read_card(path)
    if card.name != dataset:
        raise CardError(f"{path}: name is {card.name!r}; set name = {dataset!r}, as the file is called")
    return card


def write_card(path: Path, card: DatasetCard) -> None:
    """Write a card as TOML, leaving out what is at its default."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = tomli_w.dumps(card.model_dump(mode="json", exclude_defaults=True, exclude_none=True))
    fresh = path.with_name(f"{path.name}.partial")
    fresh.write_text(text, encoding="utf-8")
    fresh.replace(path)
