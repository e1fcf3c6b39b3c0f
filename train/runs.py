"""Records of finished runs: one JSON line a run in `runs/DATASET/results.jsonl`, appended and never changed."""

from __future__ import annotations

import json
import os
import subprocess
import warnings
from collections.abc import Iterable, Mapping
from datetime import datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from echoshift.pipeline.errors import RunError
from echoshift.train.alignment.config import keep_used
from echoshift.train.scores import Scores
from echoshift.train.stage2.config import SelectionRule
from echoshift.train.steps import hash_json

RESULTS = "results.jsonl"
_LOCK_TIMEOUT_S = 60.0
_GIT_TIMEOUT_S = 10.0

RunKey = tuple[str, str, str, int, str]


class TornLineWarning(UserWarning):
    """A line of a results file that is cut off, as a kill during writing leaves it."""


class RunRecord(BaseModel):
    """One finished run: what was trained on what, and what it scored.

    Attributes:
        stage: such as `stage1`.
        shift: a name of the card, such as D1-D2.
        row: the grid's row that asked for the run, or "". For people to read; tables go by `config_hash`.
        config: JSON of everything that decides the result except data, shift and seed; `config_hash` is its hash.
        steps: keys of the steps that the run went through, by name.
        fingerprints: of the feature stores that it read, by encoder.
        selection: the rule that chose the scored weights; only `target_oracle` sees target labels.
            `mean_last` is the mean of the scores of the last checkpoints.
        started, ended: UTC, with their time zone.
        device: `cpu` or the GPU's name.
        warnings: faults of a network that was trained to its end, such as dead units; a line each.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    dataset: str
    stage: str
    shift: str
    seed: int
    row: str = ""
    config: dict[str, Any]
    config_hash: str
    steps: dict[str, str] = Field(default_factory=dict)
    fingerprints: dict[str, str] = Field(default_factory=dict)
    manifest_sha256: str
    code_version: str
    selection: SelectionRule
    scores: Scores
    started: datetime
    ended: datetime
    duration_s: float
    device: str
    warnings: tuple[str, ...] = ()

    @field_validator("started", "ended")
    @classmethod
    def _check_zone(cls, time: datetime) -> datetime:
        if time.tzinfo is None:
            raise ValueError("a time without a time zone; use datetime.now(UTC)")
        return time

    @property
    def key(self) -> RunKey:
        """Stage, config hash, shift, seed and selection rule."""
        return (self.stage, self.config_hash, self.shift, self.seed, self.selection)


def hash_config(config: Mapping[str, Any]) -> str:
    """Hash a configuration, given as JSON (`model_dump(mode="json")`), to 12 hex digits.

    Of an alignment config, only the fields that its method reads count (`keep_used`).
    """
    return hash_json(_keep_used_everywhere(config))


def _keep_used_everywhere(value: Any) -> Any:
    if isinstance(value, Mapping):
        kept = keep_used(value) if {"method", "class_weight", "network"} <= value.keys() else value
        return {name: _keep_used_everywhere(part) for name, part in kept.items()}
    return [_keep_used_everywhere(part) for part in value] if isinstance(value, (list, tuple)) else value


def append_run(path: Path, record: RunRecord) -> None:
    """Append a record as one line, under a lock, and return when it is on the disk.

    A kill leaves at most a torn last line; the next append starts a new line after it. A write that fails (disk
    full) leaves the file as it was. Raises RunError naming the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    line = record.model_dump_json(exclude_defaults=True).encode() + b"\n"
    lock_path = path.with_name(f"{path.name}.lock")
    try:
        with FileLock(lock_path, timeout=_LOCK_TIMEOUT_S):
            _append(path, line)
    except Timeout as error:
        raise RunError(f"{lock_path} is held by another process for over {_LOCK_TIMEOUT_S:.0f} s; try again") from error
    except OSError as error:
        raise RunError(f"{path}: can't append a run: {error.strerror or error}") from error


def read_runs(path: Path) -> list[RunRecord]:
    """Read all records of a results file, oldest first; [] if the file does not exist.

    A torn line is skipped with a TornLineWarning that names file and line. A complete line that is not a record
    (written by another version, or edited) raises RunError.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except ValueError:  # of JSON or of UTF-8
            warnings.warn(
                f"{path}:{number}: a line torn by a kill is passed over; its run counts as missing",
                TornLineWarning,
                stacklevel=2,
            )
            continue
        try:
            record = RunRecord.model_validate(fields)
        except ValidationError as error:
            fault = error.errors()[0]
            where = ".".join(map(str, fault["loc"])) or "line"
            raise RunError(
                f"{path}:{number}: not a run's record: {where}: {fault['msg']}; read it with the version that wrote "
                f"it, or delete the line"
            ) from error
        # Computed, not believed: before 2026-12 it held all methods' fields.
        records.append(record.model_copy(update={"config_hash": hash_config(record.config)}))
    return records


def keep_latest(records: Iterable[RunRecord]) -> dict[RunKey, RunRecord]:
    """Keep the last record of each key; `records` are in the order they were written."""
    return {record.key: record for record in records}


@cache
def describe_code_version() -> str:
    """Return the package's version, with `git describe` where the code runs from a checkout."""
    release = version("echoshift")
    root = Path(__file__).resolve().parent.parent  # of the checkout; resolve() follows the links
    if not (root / ".git").exists():
        return release
    command = ["git", "-C", str(root), "describe", "--always", "--long", "--dirty", "--abbrev=12"]
    try:
        described = subprocess.run(command, capture_output=True, text=True, timeout=_GIT_TIMEOUT_S, check=True).stdout
    except (OSError, subprocess.SubprocessError):  # no git on this machine, or not its owner's checkout
        return f"{release}+unknown"
    return f"{release}+{described.strip()}"


def _append(path: Path, line: bytes) -> None:
    file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(file).st_size
        if size and os.pread(file, 1, size - 1) != b"\n":
            line = b"\n" + line
        try:
            written = 0
            while written < len(line):
                written += os.write(file, line[written:])
            os.fsync(file)
        except OSError:
            os.ftruncate(file, size)
            raise
    finally:
        os.close(file)
