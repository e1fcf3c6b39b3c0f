"""Makes the page's section on the dataset: counts, classes, durations, silence and the shift of labels."""

from __future__ import annotations

from markupsafe import Markup

from echoshift.pipeline.cards import DatasetCard
from echoshift.train.report.blocks import (
    Block,
    Cell,
    Column,
    Figure,
    FiguresBlock,
    HeadingBlock,
    MissingBlock,
    Section,
    TableBlock,
    TextBlock,
    count,
    number,
    percent,
)
from echoshift.train.report.charts import draw_histogram
from echoshift.train.report.dataset_facts import DatasetFacts

TEXT = False  # of a column: it holds no numbers


def make_dataset_section(facts: DatasetFacts, card: DatasetCard) -> Section:
    """Make the section."""
    blocks: list[Block] = [_make_parts_table(facts)]
    if not facts.sound_store:
        blocks.append(
            MissingBlock(
                "Which segments are silent isn't known yet: no store of sound has been extracted.",
                f"make extract DATASET={card.name} ENCODERS=resnet18_audio",
            )
        )
    else:
        blocks.append(TextBlock(f"Silent: no usable sound, as the store {facts.sound_store} found it.", "quiet"))
    blocks += [HeadingBlock("Classes", "classes"), _make_class_table(facts)]
    if facts.shifts:
        blocks += [
            HeadingBlock("Shift of the label distribution", "label-shift"),
            TextBlock(
                "It compares labels of the target's train split with the source's. No training sees them.", "analysis"
            ),
            _make_shift_table(facts),
        ]
    if facts.duration_bins:
        svg = draw_histogram(
            "durations",
            "Durations of segments by domain",
            facts.duration_bins,
            facts.durations,
            "seconds (logarithmic)",
            y_label="segments",
            is_logarithmic=True,
            size=(7.2, 2.6),
        )
        blocks += [
            HeadingBlock("Durations", "durations-heading"),
            FiguresBlock((Figure("Durations of segments, all splits, by domain.", Markup(svg)),), wide=True),
        ]
    lead = (
        f"{facts.n_segments:,} segments of {facts.n_videos:,} videos, {_say_duration(facts.total_s)} in all, "
        f"{len(facts.classes)} classes, {len({part.domain for part in facts.parts})} domains."
    )
    return Section("dataset", "Dataset", lead, tuple(blocks))


def _make_parts_table(facts: DatasetFacts) -> TableBlock:
    columns = (
        Column("domain", TEXT),
        Column("split", TEXT),
        *map(
            Column, ("segments", "videos", "total, min", "shortest, s", "median, s", "longest, s", "silent, %", "short")
        ),
    )
    rows = tuple(
        (
            Cell(part.domain),
            Cell(part.split),
            count(part.n_segments),
            count(part.n_videos),
            number(part.total_s / 60),
            number(part.shortest_s, 2),
            number(part.median_s, 2),
            number(part.longest_s, 2),
            percent(part.silent_share),
            count(part.n_short),
        )
        for part in facts.parts
    )
    return TableBlock(
        "parts", "Segments by domain and split", columns, rows, ("Short: fewer than 64 frames at 60 frames a second.",)
    )


def _make_class_table(facts: DatasetFacts) -> TableBlock:
    most = max((n for part in facts.parts for n in part.n_per_class), default=0) or 1
    rows = []
    for k, name in enumerate(facts.classes):
        cells = [Cell(f"{n:,}", n, n / most) for n in (part.n_per_class[k] for part in facts.parts)]
        total = sum(part.n_per_class[k] for part in facts.parts)
        rows.append((Cell(name), *cells, count(total)))
    columns = (
        Column("class", TEXT),
        *(Column(f"{part.domain} {part.split}") for part in facts.parts),
        Column("all"),
    )
    return TableBlock("class-counts", "Segments of each class, by domain and split", columns, tuple(rows))


def _make_shift_table(facts: DatasetFacts) -> TableBlock:
    columns = (
        Column("source", TEXT),
        Column("target", TEXT),
        Column("distance"),
        Column("class that differs most", TEXT),
        Column("share in source, %"),
        Column("share in target, %"),
    )
    rows = tuple(
        (
            Cell(shift.source),
            Cell(shift.target),
            Cell(f"{shift.distance:.3f}", shift.distance, shift.distance),
            Cell(shift.largest),
            percent(shift.source_share),
            percent(shift.target_share),
        )
        for shift in facts.shifts
    )
    return TableBlock(
        "label-shifts",
        "How far the labels of two train splits lie apart",
        columns,
        rows,
        ("Distance: total variation, half the sum over classes of |p - q|; 0: the same shares, 1: no class shared.",),
    )


def _say_duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} hours" if seconds >= 2 * 3600 else f"{seconds / 60:.1f} minutes"
