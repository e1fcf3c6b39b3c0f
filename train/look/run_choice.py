"""The finished runs that a figure is of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from echoshift.pipeline.errors import RunError
from echoshift.train.runs import RESULTS, RunRecord, keep_latest, read_runs
from echoshift.train.stage1.encoder import CHECKPOINT
from echoshift.train.steps import RECORD

SOURCE_ONLY = "source_only"


@dataclass(frozen=True, slots=True)
class RunChoice:
    """The runs that a figure may be of; what is "" or None is left open, and the last run that fits is taken."""

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
            and self.method in ("", get_method(record) or get_objective(record))
        )

    def describe(self) -> str:
        """Describe in words what is asked for."""
        parts = [part for part in (self.method, self.shift) if part]
        parts += [] if self.seed is None else [f"seed {self.seed}"]
        parts += [] if self.row is None else [f"row {self.row!r}"]
        return ", ".join(parts)


def describe_run(record: RunRecord) -> str:
    """Name a run for people: stage, method (unless Stage 1's own), shift, seed, row, and the rule unless `last`."""
    method = get_method(record) or get_objective(record)
    stage = f"{record.stage} {method}" if method else record.stage
    row = f", {record.row}" if record.row else ""
    rule = "" if record.selection == "last" else f", rule {record.selection}"
    return f"{stage} {record.shift}, seed {record.seed}{row}{rule}"


def get_method(record: RunRecord) -> str:
    """Return the method of a run of alignment, "" of another stage's."""
    alignment = record.config.get("alignment", {}) if record.stage == "alignment" else {}
    return str(alignment.get("alignment", {}).get("method", ""))


def get_objective(record: RunRecord) -> str:
    """Return the method by which a run of Stage 1 was trained end to end, "" where it is Stage 1's own."""
    objective = record.config.get("objective", {}) if record.stage == "stage1" else {}
    return str(objective.get("method", "")) if objective.get("enabled") else ""


def find_checkpoint(runs_dir: Path, record: RunRecord) -> Path:
    """Return where the encoder of a run of Stage 1 lies; it may be gone."""
    return runs_dir / "steps" / f"encoder-{record.steps['encoder']}" / CHECKPOINT


def choose_alignment_run(runs_dir: Path, choice: RunChoice) -> RunRecord:
    """Choose the last run of alignment that fits and isn't source_only, unless that is asked for."""

    def fits(record: RunRecord) -> bool:
        method = get_method(record)
        return bool(method) and (method != SOURCE_ONLY or choice.method == SOURCE_ONLY)

    remedy = f"`echoshift align --set alignment.method={choice.method or 'rna'}` makes one"
    return _choose(runs_dir, fits, "alignment", choice, remedy)


def find_source_only(runs_dir: Path, record: RunRecord) -> RunRecord | None:
    """Find the source_only run that a run of alignment is compared with: of its shift, seed, network and features."""

    def describe(run: RunRecord) -> tuple[object, ...]:
        network = run.config["alignment"]["alignment"].get("network")
        return run.shift, run.seed, run.manifest_sha256, network, run.fingerprints

    others = (other for other in reversed(_list_runs(runs_dir)) if get_method(other) == SOURCE_ONLY)
    return next((other for other in others if describe(other) == describe(record)), None)


def choose_stage1_run(runs_dir: Path, choice: RunChoice, *, with_features: bool = False) -> RunRecord:
    """Choose the last run of Stage 1 that fits and whose checkpoint, or exported features, are there."""

    def fits(record: RunRecord) -> bool:
        if record.stage != "stage1":
            return False
        if with_features:
            return (runs_dir / "steps" / f"features-{record.steps.get('features', '')}" / RECORD).is_file()
        return find_checkpoint(runs_dir, record).is_file()

    return _choose(runs_dir, fits, "Stage 1", choice, "`echoshift stage1` makes one")


def _list_runs(runs_dir: Path) -> list[RunRecord]:
    return sorted(keep_latest(read_runs(runs_dir / RESULTS)).values(), key=lambda record: record.ended)


def _choose(runs_dir: Path, fits: Callable[[RunRecord], bool], stage: str, choice: RunChoice, remedy: str) -> RunRecord:
    found = [record for record in _list_runs(runs_dir) if choice.fits(record) and fits(record)]
    if not found:
        asked = choice.describe()
        raise RunError(f"no finished run of {stage}{f' of {asked}' if asked else ''} in the results; {remedy}")
    return found[-1]
