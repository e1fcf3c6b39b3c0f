"""Chooses the finished runs that a picture is of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from echoshift.pipeline.errors import RunError
from echoshift.train.runs import RESULTS, RunRecord, keep_latest, read_runs
from echoshift.train.segment_view.run_predictions import find_method, find_objective
from echoshift.train.stage1.encoder import CHECKPOINT as ENCODER


@dataclass(frozen=True, slots=True)
class RunChoice:
    """Which runs a picture may be of; what is "" or None is left open, and the last run that fits is taken."""

    shift: str = ""
    seed: int | None = None
    row: str | None = None
    method: str = ""

    def fits(self, record: RunRecord) -> bool:
        """Return whether a run fits."""
        return (
            self.shift in ("", record.shift)
            and self.seed in (None, record.seed)
            and self.row in (None, record.row)
            and self.method in ("", find_method(record) or find_objective(record))
        )

    def describe(self) -> str:
        """Describe in words what is asked for."""
        parts = [part for part in (self.method, self.shift) if part]
        parts += [] if self.seed is None else [f"seed {self.seed}"]
        parts += [] if self.row is None else [f"row {self.row!r}"]
        return ", ".join(parts)


def choose_alignment_run(runs_dir: Path, choice: RunChoice) -> RunRecord:
    """Choose the last run of alignment that fits and isn't source_only, unless that is asked for."""

    def fits(record: RunRecord) -> bool:
        method = find_method(record)
        return bool(method) and (method != "source_only" or choice.method == "source_only") and choice.fits(record)

    method = choice.method or "rna"
    remedy = f"`echoshift align --set alignment.method={method}` makes one"
    return _choose(_list_runs(runs_dir), fits, "alignment", choice, remedy)


def find_source_only(runs_dir: Path, record: RunRecord) -> RunRecord | None:
    """Find the source_only run that a run of alignment is compared with: of its shift, seed and network."""

    def fits(other: RunRecord) -> bool:
        return (
            find_method(other) == "source_only"
            and (other.shift, other.seed, other.manifest_sha256) == (record.shift, record.seed, record.manifest_sha256)
            and _get_network(other) == _get_network(record)
            and other.fingerprints == record.fingerprints
        )

    return next((other for other in reversed(_list_runs(runs_dir)) if fits(other)), None)


def choose_stage1_run(runs_dir: Path, choice: RunChoice, *, with_features: bool = False) -> RunRecord:
    """Choose the last run of Stage 1 that fits and whose checkpoint, or exported features, are there."""

    def fits(record: RunRecord) -> bool:
        if record.stage != "stage1" or not choice.fits(record):
            return False
        if with_features:
            key = record.steps.get("features", "")
            return (runs_dir / "steps" / f"features-{key}" / "record.json").is_file()
        return (runs_dir / "steps" / f"encoder-{record.steps['encoder']}" / ENCODER).is_file()

    return _choose(_list_runs(runs_dir), fits, "Stage 1", choice, "`echoshift stage1` makes one")


def _list_runs(runs_dir: Path) -> list[RunRecord]:
    return sorted(keep_latest(read_runs(runs_dir / RESULTS)).values(), key=lambda record: record.ended)


def _choose(
    records: Sequence[RunRecord], fits: Callable[[RunRecord], bool], stage: str, choice: RunChoice, remedy: str
) -> RunRecord:
    found = [record for record in records if fits(record)]
    if not found:
        asked = choice.describe()
        raise RunError(f"no finished run of {stage}{f' of {asked}' if asked else ''} in the results; {remedy}")
    return found[-1]


def _get_network(record: RunRecord) -> object:
    return record.config["alignment"]["alignment"].get("network")
