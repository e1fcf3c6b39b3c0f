"""Sums up the stores below a cache, as `echoshift store ls` shows them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from echoshift.pipeline.specs import fingerprint
from echoshift.pipeline.store.layout import DONE, FAILED
from echoshift.pipeline.store.location import Place
from echoshift.pipeline.store.open import list_stores, open_store


@dataclass(frozen=True, slots=True)
class StoreSummary:
    """One store in numbers; `outputs` are the shapes of one clip by name, `n_bytes` is what it takes on disk."""

    store: str
    dataset: str
    encoder: str
    fingerprint: str
    outputs: Mapping[str, tuple[int, ...]]
    n_clips: int
    dtype: str
    n_done: int
    n_failed: int
    n_rows: int
    n_bytes: int


def summarise_stores(cache: Place) -> list[StoreSummary]:
    """Sum up every store below a cache, by path; raises StoreError naming one that can't be opened."""
    summaries = []
    for path in list_stores(cache):
        store = open_store(path)
        state = store.read_array("state")
        summaries.append(
            StoreSummary(
                store=str(path),
                dataset=str(store.attributes["dataset"]),
                encoder=store.spec.encoder,
                fingerprint=fingerprint(store.spec),
                outputs={output.name: output.shape for output in store.spec.outputs},
                n_clips=store.layout.n_clips,
                dtype=store.spec.dtype,
                n_done=int((state == DONE).sum()),
                n_failed=int((state == FAILED).sum()),
                n_rows=store.layout.n_rows,
                n_bytes=path.measure_bytes(),
            )
        )
    return summaries
