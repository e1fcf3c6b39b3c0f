"""Prints what runs scored: by class, and one line a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from echoshift.cli.json_answers import make_jsonable

if TYPE_CHECKING:
    from echoshift.pipeline.cards import DatasetCard
    from echoshift.train.runs import RunRecord


def print_classes(record: RunRecord, card: DatasetCard) -> None:
    """Print what one run scored, class by class."""
    from echoshift.cli.terminal import print_table

    rows = [[c.name, _percent(c.value), c.n] for c in record.scores.per_class]
    name = "average precision" if card.task == "multi-label" else "accuracy"
    print_table(f"{record.shift}, seed {record.seed}, target test, by class", ("class", name, "n"), rows)


def print_records(stage: str, records: Sequence[RunRecord], card: DatasetCard, runs_dir: Path) -> None:
    """Print one line a run: the main score under its selection rule, silent and audible, each with its n."""
    from echoshift.cli.terminal import print_table
    from echoshift.train.runs import RESULTS

    metric = "mAP" if card.task == "multi-label" else "top-1"
    rows = []
    for record in records:
        scores = record.scores
        parts = [part for s in (scores.main, scores.silent, scores.audible) for part in (_percent(s.value), s.n)]
        rows.append([record.shift, record.seed, *parts, record.selection])
    columns = ("shift", "seed", metric, "n", "silent", "n", "audible", "n", "rule")
    print_table(f"{stage} on {card.name}, target test, percent", columns, rows)
    if any(record.selection == "target_oracle" for record in records):
        typer.echo("target_oracle sees the target's test labels: an upper bound, no result")
    if card.synthetic:
        typer.echo(f"{card.name} is synthetic: these numbers are no benchmark")
    typer.echo(f"results: {runs_dir / RESULTS}")


def describe_records(stage: str, card: DatasetCard, runs_dir: Path, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return what training came to: whole records, scores as shares and not percent; `runs` are of `describe_run`."""
    from echoshift.train.runs import RESULTS

    metric = "mAP" if card.task == "multi-label" else "top-1"
    head = {"stage": stage, "dataset": card.name, "synthetic": card.synthetic, "metric": metric}
    return {**head, "results": str(runs_dir / RESULTS), "runs": list(runs)}


def describe_run(record: RunRecord, left_out: Sequence[str], files: dict[str, object]) -> dict[str, Any]:
    """Return one run's whole record, its main score, the segments left out as failed, and the files it made."""
    score = make_jsonable(record.scores.main)
    return {**make_jsonable(record), "score": score, "left_out": list(left_out), "files": make_jsonable(files)}


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"
