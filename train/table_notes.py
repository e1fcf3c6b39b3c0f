"""Writes what must be read with a table: what its numbers are, over what, and what is missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from echoshift.pipeline.cards import DatasetCard, PublishedNumber
from echoshift.train.runs import RunRecord
from echoshift.train.selection_rules import SelectionRule

NO_BENCHMARK = "The dataset is synthetic: these numbers are no benchmark."
_METRICS = {
    "single-label": "Top-1 accuracy in %",
    "multi-label": "Mean average precision in %, a class without positives counting 0",
}


def write_notes(
    *,
    card: DatasetCard,
    records: Sequence[RunRecord],
    missing: Mapping[str, tuple[int, int]],
    n_other_manifest: int,
    baseline: str,
    has_segment_tests: bool,
    parts: Sequence[str],
    published: Sequence[PublishedNumber],
    selection: SelectionRule,
    with_target_labels: Sequence[str] = (),
    warned: Mapping[str, Mapping[tuple[str, int], RunRecord]] = MappingProxyType({}),
) -> tuple[str, ...]:
    """Write a table's notes, each a sentence or two.

    `missing` maps a row to its runs done and planned, `warned` a row to its runs with warnings by shift and seed.
    """
    notes = [NO_BENCHMARK] if card.synthetic else []
    notes.append(
        f"{_METRICS[card.task]} on the target's test split: mean ± half width of the 95 % t-interval (n seeds); one "
        f"seed has no interval. Weights by the rule `{selection}`."
    )
    if selection == "target_oracle":
        notes.append("The rule `target_oracle` sees the target's test labels: an upper bound, no result.")
    if selection == "mean_last":
        notes.append("The rule `mean_last`: each run's score is the mean over its last checkpoints.")
    for row in with_target_labels:
        notes.append(f"Row {row!r} is trained on the target's own labels: an upper bound, no result.")
    if baseline:
        notes.append(
            f"Difference to {baseline!r} in points over (shift, seed) pairs: mean ± half width (n pairs), and p of the "
            f"paired t-test."
        )
    if has_segment_tests:
        notes.append("p (segments): paired bootstrap over test segments, the trained networks given.")
    notes.extend(_describe_part(part, records, card) for part in parts)
    for number in {number.note: number for number in published}.values():
        setting = f" ({number.note})" if number.note else ""
        notes.append(f"Published: {number.paper}, {number.table}{setting}; theirs, not measured here.")
    for row, (n_done, n_planned) in missing.items():
        notes.append(f"Row {row!r} is not whole: {n_done} of {n_planned} runs are done.")
    for row, runs in warned.items():
        (shift, seed), record = next(iter(runs.items()))
        notes.append(
            f"Row {row!r}: {len(runs)} of its runs ended with a warning, such as {shift}, seed {seed}: "
            f"{record.warnings[0]}."
        )
    if n_other_manifest:
        notes.append(f"Runs on another manifest that are left out: {n_other_manifest}.")
    for what, values in (
        ("manifests", {record.manifest_sha256[:12] for record in records}),
        ("versions of the code", {record.code_version for record in records}),
        ("devices", {record.device for record in records}),
    ):
        if len(values) > 1:
            notes.append(f"The runs are of {len(values)} {what}: {', '.join(sorted(values))}.")
    return tuple(notes)


def _describe_part(part: str, records: Sequence[RunRecord], card: DatasetCard) -> str:
    """Describe what a part of the test set is, and how many segments (or classes) it has, summed over shifts."""
    by_shift = {record.shift: record.scores for record in records}
    scores = [getattr(of_shift, part) for of_shift in by_shift.values()]
    counted = [score for score in scores if score is not None]
    if not counted:
        return f"{part.capitalize()}: no run says."
    n_total = sum(of_shift.n for of_shift in by_shift.values())
    if part in ("silent", "audible"):
        meaning = f"test segments {'without' if part == 'silent' else 'with'} sound"
    else:
        of = " or ".join(sorted({s.binned_by for s in by_shift.values() if s.binned_by is not None}))
        what = "class and noun" if of == "pair" else "class" if of == "class" else "class, with noun where known,"
        seen = "at most 10" if part == "rare" else "more than 10"
        meaning = f"{what} seen {seen} times in the source"
    if card.task == "multi-label":
        meaning += ", over the classes that have positives there"
    if part in ("rare", "frequent") and card.task == "multi-label":
        n_classes = sum(score.n_classes or 0 for score in counted)
        return f"{part.capitalize()}: {meaning}; {n_classes} classes, summed over shifts."
    return f"{part.capitalize()}: {meaning}; {sum(s.n for s in counted)} of {n_total} test segments."
