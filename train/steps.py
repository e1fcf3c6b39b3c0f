"""Steps of a run, named by a hash of what they depend on, so that a finished step is not repeated.

A step's key is a hash of its settings and of the keys of what it reads. Its folder, `runs/DATASET/steps/NAME-KEY`,
holds what it made; `record.json` is written last: a folder without one is a step that is running or was killed.
"""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from echoshift.pipeline.errors import RunError
from echoshift.pipeline.store.layout import describe_versions

RECORD = "record.json"
_POLL_S = 1.0


@dataclass(frozen=True, slots=True)
class Step:
    """One piece of work.

    Attributes:
        name: such as `encoder`; part of the folder's name.
        revision: raised when the step's own numerics change.
        settings: JSON of the configuration that decides the outcome, seed included.
        inputs: keys or fingerprints of what it reads, by name.
    """

    name: str
    revision: int
    settings: Mapping[str, Any]
    inputs: Mapping[str, str]

    @property
    def key(self) -> str:
        """The 12 hex digits that name the step's folder."""
        return hash_json([self.name, self.revision, dict(self.settings), dict(self.inputs)])


@dataclass(frozen=True, slots=True)
class StepResult:
    """A finished step: its folder, the outcome in its record, and whether an earlier run had done it."""

    key: str
    folder: Path
    outcome: Mapping[str, Any]
    was_done: bool


@dataclass(frozen=True, slots=True)
class StepRunner:
    """Runner of the steps of one dataset; those named in `rerun` are repeated even if done.

    `notify` is called with a line of text when a step has to wait for another process.
    """

    root: Path
    rerun: frozenset[str] = frozenset()
    notify: Callable[[str], None] = lambda message: None

    def find_folder(self, step: Step) -> Path:
        """Return the folder of a step, which need not exist."""
        return self.root / f"{step.name}-{step.key}"

    def is_done(self, step: Step) -> bool:
        """Return whether a step is done."""
        return (self.find_folder(step) / RECORD).is_file()

    def run(self, step: Step, make: Callable[[Path], Mapping[str, Any]]) -> StepResult:
        """Run a step unless its record exists; `make(folder)` does the work and returns JSON for the record.

        What a killed `make` left in the folder is still there at the next call, so it can resume. Of two processes
        that want the same step one does it, the other waits.
        """
        folder = self.find_folder(step)
        folder.parent.mkdir(parents=True, exist_ok=True)
        record_path = folder / RECORD
        if record_path.is_file() and step.name not in self.rerun:
            return StepResult(step.key, folder, _read_outcome(record_path), was_done=True)
        with _hold(folder.with_name(f"{folder.name}.lock"), step, self.notify):
            if record_path.is_file():
                if step.name not in self.rerun:
                    return StepResult(step.key, folder, _read_outcome(record_path), was_done=True)
                record_path.unlink()
                shutil.rmtree(folder)
            folder.mkdir(exist_ok=True)
            started, clock = datetime.now(UTC), time.perf_counter()
            outcome = dict(make(folder))
            record = {
                "step": step.name,
                "key": step.key,
                "revision": step.revision,
                "settings": dict(step.settings),
                "inputs": dict(step.inputs),
                "outcome": outcome,
                "started": started.isoformat(timespec="seconds"),
                "duration_s": round(time.perf_counter() - clock, 3),
                **_describe_machine(),
            }
            write_json(record_path, record)
        return StepResult(step.key, folder, outcome, was_done=False)


def _describe_machine() -> dict[str, Any]:
    """Describe what else results depend on: versions, threads and machine change the rounding."""
    import torch  # not at the top: looking steps up does not need it

    return {"versions": describe_versions(), "machine": platform.machine(), "n_threads": torch.get_num_threads()}


def hash_json(value: object) -> str:
    """Compute 12 hex digits of the sha256 of a value's canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def write_json(path: Path, value: object) -> None:
    """Write a JSON file atomically."""
    fresh = path.with_name(f"{path.name}.partial")
    fresh.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    fresh.replace(path)


def _read_outcome(path: Path) -> Mapping[str, Any]:
    try:
        outcome = json.loads(path.read_text(encoding="utf-8"))["outcome"]
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path} isn't a step's record: {error}; delete the folder and run again") from error
    if not isinstance(outcome, dict):
        raise RunError(f"{path} isn't a step's record; delete the folder and run again")
    return outcome


@contextmanager
def _hold(path: Path, step: Step, notify: Callable[[str], None]) -> Iterator[None]:
    """Hold a step's lock while the block runs; notify if it has to wait."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        notify(f"another run is at step {step.name}-{step.key}; waiting for it")
        lock.acquire(poll_interval=_POLL_S)
    try:
        yield
    finally:
        lock.release()
