"""The failure ledger beside a store, and its history of runs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from echoshift.pipeline.errors import StoreError
from echoshift.pipeline.store.interface import Failure
from echoshift.pipeline.store.location import Location, Place, locate


def failures_path(store_path: Place) -> Location:
    """Return the place of a store's failure ledger, one JSON line a failed segment."""
    return locate(store_path).beside(".failures.jsonl")


def read_failures(store_path: Place) -> dict[str, Failure]:
    """Read the failed segments by id; none when there is no ledger."""
    path = failures_path(store_path)
    failures = {}
    for number, line in enumerate((path.read_text() or "").splitlines(), start=1):
        try:
            failure = Failure(**json.loads(line))
        except (json.JSONDecodeError, TypeError) as error:
            raise StoreError(f"{path}:{number}: not a failure record: {error}; delete it and extract") from error
        failures[failure.segment_id] = failure
    return failures


def write_failures(store_path: Place, failures: Iterable[Failure]) -> None:
    """Replace the ledger in one step, sorted by segment; remove it when nothing failed."""
    path = failures_path(store_path)
    lines = [json.dumps(asdict(f), ensure_ascii=False) for f in sorted(failures, key=lambda f: f.segment_id)]
    if not lines:
        path.unlink()
        return
    path.write_text("\n".join(lines) + "\n")


def append_run(store_path: Place, record: Mapping[str, Any]) -> None:
    """Append one line about a run to the store's history; on an object store only its holder may."""
    locate(store_path).beside(".runs.jsonl").append_text(json.dumps(record, ensure_ascii=False) + "\n")


class FailureLedger:
    """Keeps a store's failures in the memory of the one process that commits, and writes them when they change."""

    def __init__(self, store_path: Place) -> None:
        self._store_path = locate(store_path)
        self._failures: dict[str, Failure] | None = None

    @property
    def failures(self) -> Mapping[str, Failure]:
        """The failures by segment, read from the disk the first time."""
        if self._failures is None:
            self._failures = read_failures(self._store_path)
        return self._failures

    def settle(self, segment_ids: Iterable[str], failures: Iterable[Failure]) -> None:
        """Replace what is known of these segments; the disk is touched only if that is something new."""
        before = self.failures
        new = {f.segment_id: f for f in failures}
        old = {s: before[s] for s in segment_ids if s in before}
        if old == new:
            return
        after = {s: f for s, f in before.items() if s not in old} | new
        write_failures(self._store_path, after.values())
        self._failures = after
