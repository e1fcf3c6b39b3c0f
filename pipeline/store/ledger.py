"""Keeps, beside a store, which segments failed and why, and a line for every run that wrote to it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.errors import StoreError
from pipeline.store.interface import Failure


def failures_path(store_path: Path) -> Path:
    """Gives the place of a store's failure ledger, one JSON line a failed segment."""
    return Path(f"{store_path}.failures.jsonl")


def read_failures(store_path: Path) -> dict[str, Failure]:
    """Reads the failed segments by id; none when there is no ledger."""
    path = failures_path(store_path)
    if not path.exists():
        return {}
    failures = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            failure = Failure(**json.loads(line))
        except (json.JSONDecodeError, TypeError) as error:
            raise StoreError(f"{path}:{number}: not a failure record: {error}; delete it and extract") from error
        failures[failure.segment_id] = failure
    return failures


def write_failures(store_path: Path, failures: Iterable[Failure]) -> None:
    """Replaces the ledger in one step, sorted by segment; removes it when nothing failed."""
    path = failures_path(store_path)
    lines = [json.dumps(asdict(f), ensure_ascii=False) for f in sorted(failures, key=lambda f: f.segment_id)]
    if not lines:
        path.unlink(missing_ok=True)
        return
    fresh = path.with_name(f"{path.name}.{os.getpid()}.partial")
    fresh.write_text("\n".join(lines) + "\n", encoding="utf-8")
    fresh.replace(path)


def append_run(store_path: Path, record: dict[str, Any]) -> None:
    """Appends one line about a run to the store's history."""
    with Path(f"{store_path}.runs.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(record, ensure_ascii=False) + "\n")
