"""Keeps what runs scored: one JSON line a run in `runs/DATASET/results.jsonl`, appended and never changed."""

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
    """That a line of a results file is no whole JSON, as a kill while it was written leaves it."""


class RunRecord(BaseModel):
    """One run that came to its end: what was trained on what, and what it scored.

    Attributes:
        stage: such as `stage1`.
        shift: a name of the card, such as D1-D2.
        row: the grid's row that asked for the run, "" where none did; for people, tables go by `config_hash`.
        config: JSON of everything that decides the result but data, shift and seed; `config_hash` is its hash.
        steps: by name, the keys of the steps that the run went through.
        fingerprints: by encoder, of the feature stores that it read.
        selection: the rule that chose the weights that were scored; `target_oracle` alone sees target labels.
            `mean_last` is the mean of the scores of the last checkpoints.
        started, ended: with their time zone, UTC.
        device: in words, such as `cpu` or the GPU's name.
        warnings: what is wrong with a network although it was trained to its end, a line each.
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
            raise ValueError("a time without a time zone; give datetime.now(UTC)")
        return time

    @property
    def key(self) -> RunKey:
        """What the run is a result of: stage, config hash, shift, seed and selection rule."""
        return (self.stage, self.config_hash, self.shift, self.seed, self.selection)


def hash_config(config: Mapping[str, Any]) -> str:
    """Compute the 12 hex digits that name a configuration, given as JSON (`model_dump(mode="json")`).

    Of an alignment's part only what its method reads counts (`keep_used`).
    """
    return hash_json(_keep_used_everywhere(config))


def _keep_used_everywhere(value: Any) -> Any:
    if isinstance(value, Mapping):
        kept = keep_used(value) if {"method", "class_weight", "network"} <= value.keys() else value
        return {name: _keep_used_everywhere(part) for name, part in kept.items()}
    return [_keep_used_everywhere(part) for part in value] if isinstance(value, (list, tuple)) else value


def append_run(path: Path, record: RunRecord) -> None:
    """Append a record as one line, under a lock, and return when it is on the disk.

    A kill leaves at most a torn last line; the next append begins a line of its own behind it. A write that fails (no
    room left) leaves the file as it was. Raises RunError naming the file.
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
    """Read all records of a results file, oldest first; [] where there is no file.

    A line that is no whole JSON is passed over with a TornLineWarning that names file and line. A whole one that is no
    record is a RunError: another version wrote it, or a hand did.
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
    """Keep, of records in the order they were written, the last of each key."""
    return {record.key: record for record in records}


@cache
def describe_code_version() -> str:
    """Name the code that runs: the package's version, with `git describe` of the checkout, if it is one."""
    release = version("echoshift")
    root = Path(__file__).resolve().parent.parent  # of the checkout, beyond the links
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
