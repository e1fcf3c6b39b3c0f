"""Makes the page's section on Stage 1: losses, interaction clusters, absent activities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from markupsafe import Markup

from echoshift.train.report.blocks import (
    Bar,
    BarsBlock,
    Block,
    Cell,
    Column,
    DetailsBlock,
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
from echoshift.train.report.charts import draw_losses
from echoshift.train.report.stage1_facts import AbsentFacts, Stage1Facts

TEXT = False  # of a column: it holds no numbers
MAX_CHARTS = 12
MAX_CLUSTERINGS = 6


def make_stage1_section(runs: Sequence[Stage1Facts], dataset: str) -> Section:
    """Make the section."""
    title = "Stage 1: the audio-adaptive encoder"
    if not runs:
        missing = MissingBlock("No run of Stage 1 has come to its end yet.", f"make stage1 DATASET={dataset}")
        return Section("stage1", title, "", (missing,))
    names = name_variants(runs)
    blocks: list[Block] = [_make_run_table(runs, names), *_make_charts(runs, names)]
    blocks += _make_clusters(runs)
    blocks += _make_absent(runs, dataset)
    lead = f"{len(runs)} runs of {len(names)} variants and shifts. Losses are means over an epoch."
    return Section("stage1", title, lead, tuple(blocks))


def name_variants(runs: Sequence[Stage1Facts]) -> dict[tuple[str, str], str]:
    """Name each configuration by the grid's row that asked for it, or by its hash where none did, with its shift."""
    rows: dict[str, str] = {}
    for run in runs:
        if run.row:
            rows.setdefault(run.config_hash, run.row)
    return {run.variant: f"{rows.get(run.config_hash, f'settings {run.config_hash}')}, {run.shift}" for run in runs}


def _make_run_table(runs: Sequence[Stage1Facts], names: Mapping[tuple[str, str], str]) -> TableBlock:
    columns = (
        Column("variant", TEXT),
        *map(
            Column,
            (
                "seed",
                "epochs",
                "first loss",
                "last loss",
                "source validation, %",
                "audio classifier's last loss",
                "clusters",
                "absent right, %",
                "minutes",
            ),
        ),
    )
    rows = []
    for run in sorted(runs, key=lambda run: (list(names).index(run.variant), run.seed)):
        total = next((curve.values for curve in run.losses if curve.name == "total"), ())
        audio = run.audio_losses.values if run.audio_losses else ()
        validated = [value for value in run.validation.values if value is not None] if run.validation else []
        rows.append(
            (
                Cell(names[run.variant]),
                count(run.seed),
                count(len(total)),
                number(total[0] if total else None, 3),
                number(total[-1] if total else None, 3),
                percent(validated[-1] if validated else None),
                number(audio[-1] if audio else None, 3),
                count(sum(len(found.sizes) for found in run.clusters)) if run.clusters else number(None),
                percent(run.absent.accuracy if run.absent else None),
                number(run.duration_s / 60),
            )
        )
    notes = [
        f"{names[run.variant]}, seed {run.seed}: folders of {', '.join(run.lost)} are gone." for run in runs if run.lost
    ]
    notes.append(
        "Absent right: share of marks whose class the segment indeed lacks; it reads the target's labels (analysis)."
    )
    return TableBlock("stage1-runs", "Runs of Stage 1", columns, tuple(rows), tuple(notes))


def _make_charts(runs: Sequence[Stage1Facts], names: Mapping[tuple[str, str], str]) -> list[Block]:
    figures: list[Figure] = []
    for i, (variant, name) in enumerate(names.items()):
        curves = [_list_curves(run) for run in runs if run.variant == variant and run.losses]
        if curves and len(figures) < MAX_CHARTS:
            svg = draw_losses(f"loss-{i}", f"Losses of {name}", curves, "loss")
            figures.append(Figure(f"{name}.", Markup(svg)))
    if not figures:
        return []
    blocks: list[Block] = [
        HeadingBlock("Losses", "losses"),
        TextBlock("Thick: mean over seeds; thin: each seed. A loss that is 0 throughout isn't drawn.", "quiet"),
        FiguresBlock(tuple(figures)),
    ]
    if len(names) > MAX_CHARTS:
        blocks.append(TextBlock(f"The first {MAX_CHARTS} of {len(names)} variants are drawn.", "quiet"))
    # Runs of one source and seed share their audio classifier.
    of_audio = {curve.values for run in runs if (curve := run.audio_losses) is not None}
    if of_audio:
        heard = [{"audio classifier": values} for values in sorted(of_audio, reverse=True)]
        svg = draw_losses("loss-audio", "Loss of the audio classifier", heard, "loss")
        blocks.append(FiguresBlock((Figure("Audio classifier, on the source.", Markup(svg)),)))
    return blocks


def _list_curves(run: Stage1Facts) -> dict[str, tuple[float | None, ...]]:
    """List the losses that are worth a line: none that is 0 throughout, and no total of a single one."""
    curves = {curve.name: curve.values for curve in run.losses if any(curve.values)}
    return {"total": curves["total"]} if len(curves) == 2 and "total" in curves else curves


def _make_clusters(runs: Sequence[Stage1Facts]) -> list[Block]:
    by_key = {run.clusters_key: run for run in runs if run.clusters}
    if not by_key:
        return []
    blocks: list[Block] = [HeadingBlock("Interaction clusters", "clusters")]
    for i, run in enumerate(list(by_key.values())[:MAX_CLUSTERINGS]):
        most = max(found.n_samples for found in run.clusters) or 1
        rows = tuple(
            (
                Cell(found.name),
                Cell(f"{found.n_samples:,}", found.n_samples, found.n_samples / most),
                count(len(found.sizes)),
                Cell(" + ".join(map(str, found.sizes)) or "–", found.sizes[0] if found.sizes else None),
                count(found.n_silent),
                Cell(found.note or "the elbow of the inertias"),
            )
            for found in run.clusters
        )
        columns = (
            Column("class", TEXT),
            Column("segments"),
            Column("clusters"),
            Column("sizes", TEXT),
            Column("silent"),
            Column("why so many", TEXT),
        )
        source = run.shift.rpartition("-")[0]
        caption = f"Clusters of the sounds of {source}, seed {run.seed}"
        table = TableBlock(f"clusters-{i}", caption, columns, rows)
        blocks.append(table if i == 0 else DetailsBlock(caption, (table,)))
    if len(by_key) > MAX_CLUSTERINGS:
        blocks.append(TextBlock(f"The first {MAX_CLUSTERINGS} of {len(by_key)} clusterings are shown.", "quiet"))
    return blocks


def _make_absent(runs: Sequence[Stage1Facts], dataset: str) -> list[Block]:
    by_key = {run.absent_key: (run, run.absent) for run in runs if run.absent is not None}
    heading = HeadingBlock("Absent activities", "absent")
    if not by_key:
        text = "No run marked absent activities (absent.weight is 0, or nothing of it is left)."
        return [heading, MissingBlock(text, f"make stage1 DATASET={dataset}")]
    blocks: list[Block] = [
        heading,
        TextBlock(
            "How often a class that was marked absent is indeed none of the segment's. It reads labels of the target's "
            "train split; no training does.",
            "analysis",
        ),
    ]
    shifts = list(dict.fromkeys(run.shift for run, _ in by_key.values()))
    for i, shift in enumerate(shifts):
        found = [absent for run, absent in by_key.values() if run.shift == shift]
        blocks += [TextBlock(f"{shift}: {absent.fault}.", "warning") for absent in found if absent.fault]
        told = [absent for absent in found if absent.classes]
        if told:
            blocks += _make_absent_table(i, shift, told)
    return blocks


def _make_absent_table(i: int, shift: str, found: Sequence[AbsentFacts]) -> list[Block]:
    """Sum marks over seeds."""
    rows, bars = [], []
    for per_seed in zip(*(absent.classes for absent in found), strict=True):
        n_marks, n_right = sum(c.n_marks for c in per_seed), sum(c.n_right for c in per_seed)
        chance = sum(c.n_lacking for c in per_seed) / sum(absent.n_segments for absent in found)
        share = n_right / n_marks if n_marks else None
        rows.append((Cell(per_seed[0].name), count(n_marks), count(n_right), percent(share), percent(chance)))
        words = "never marked" if share is None else f"{100 * share:.1f} % of {n_marks:,}"
        at_random = 100 * chance
        bars.append(Bar(per_seed[0].name, None if share is None else 100 * share, at_random, at_random, words))
    caption = f"Marks of absent activities right, {shift}"
    columns = (Column("class", TEXT), *map(Column, ("marks", "right", "right, %", "at random, %")))
    seeds = f"Summed over {len(found)} seeds. " if len(found) > 1 else ""
    note = f"{seeds}At random: the share of segments that lack the class, which marks set at random would have right."
    return [
        BarsBlock(f"{caption}; the thin mark is what marks set at random would have right", tuple(bars)),
        TableBlock(f"absent-{i}", f"{caption}, in numbers", columns, tuple(rows), (note,)),
    ]
