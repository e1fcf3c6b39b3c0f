"""Looks at what commands read and write: the cache with its stores, weights, cards and manifests."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from echoshift.extract.doctor.findings import Finding
from echoshift.pipeline.errors import CardError, EchoshiftError, ManifestError, StoreError
from echoshift.pipeline.places import list_cards
from echoshift.pipeline.store.location import locate

GB = 1e9
LEAST_FREE_GB = 10.0


def check_cache(cache: str) -> Iterator[Finding]:
    """Look at the cache: can it be written, how much is free, what is in it, and can each store be opened?"""
    place = locate(cache)
    if place.is_remote:
        yield Finding("ok", "cache", f"{cache} is a URL; whether it can be written shows at the first write")
    else:
        yield _check_folder(Path(cache))
    yield from _check_stores(cache)


def _check_folder(folder: Path) -> Finding:
    from echoshift.pipeline.store.faults import count_free_bytes

    remedy = "choose another with --cache or ECHOSHIFT_CACHE, or change its owner"
    if folder.exists() and not folder.is_dir():
        return Finding("fail", "cache", f"{folder} is a file, not a folder", remedy)
    above = folder.absolute()
    while not above.exists():
        above = above.parent
    try:
        with tempfile.NamedTemporaryFile(dir=above, prefix=".echoshift-doctor-"):
            pass
    except OSError as error:
        return Finding("fail", "cache", f"{above} can't be written: {error.strerror}", remedy)
    free_gb = count_free_bytes(str(folder)) / GB
    is_new = "" if folder.exists() else ", not made yet"
    message = f"{folder.absolute()}{is_new}, can be written, {free_gb:.1f} GB free"
    if free_gb < LEAST_FREE_GB:
        return Finding("warn", "cache", message, "`echoshift plan` says how much a run needs")
    return Finding("ok", "cache", message)


def _check_stores(cache: str) -> Iterator[Finding]:
    from echoshift.pipeline.store.layout import DONE, FAILED
    from echoshift.pipeline.store.opening import list_stores, open_store

    n_stores, n_bytes = Counter[str](), 0
    for path in list_stores(cache):
        try:
            store = open_store(path)
            state = store.read_array("state")
        except StoreError as error:
            yield Finding("fail", "stores", str(error), "run `echoshift store verify` on it, or delete it")
            continue
        dataset = str(store.attributes["dataset"])
        n_stores[dataset] += 1
        n_bytes += path.measure_bytes()
        n_failed, n_pending = int((state == FAILED).sum()), int(((state != DONE) & (state != FAILED)).sum())
        if n_failed:
            remedy = f"{path}.failures.jsonl says why; `echoshift extract {dataset} --retry-failed` tries them again"
            yield Finding("warn", "stores", f"{path}: {n_failed} of {len(state)} rows failed", remedy)
        if n_pending:
            remedy = "the same `echoshift extract` goes on"
            yield Finding("warn", "stores", f"{path}: {n_pending} of {len(state)} rows are still to do", remedy)
    listed = ", ".join(f"{n} of {dataset}" for dataset, n in sorted(n_stores.items())) or "none yet"
    yield Finding("ok", "stores", f"{listed}; {n_bytes / 1e6:.1f} MB")


def check_weights(weights_dir: Path | None) -> Iterator[Finding]:
    """Look at which weights of the catalogue are installed; what isn't is no fault until a command needs it."""
    from echoshift.extract.weights.load import find_weights_dir, list_weights

    folder = find_weights_dir(weights_dir)
    rows = list_weights(weights_dir)
    installed = [row.name for row in rows if row.installed]
    message = f"{len(installed)} of {len(rows)} in {folder}{': ' if installed else ''}{', '.join(installed)}"
    if installed:
        yield Finding("ok", "weights", message)
    else:
        yield Finding("warn", "weights", message, "make weights gets I3D's; `echoshift weights ls` names all")


def check_datasets(manifests: Path) -> Iterator[Finding]:
    """Look at every card and manifest: can they be read, and are the videos where commands look first?"""
    names = list_cards(manifests)
    without = []
    for name in names:
        try:
            finding = _check_dataset(name, manifests)
        except CardError as error:
            finding = Finding("fail", "datasets", _in_one_line(error), "correct the card")
        except ManifestError as error:
            remedy = f"`echoshift manifest check {name}` names every fault"
            finding = Finding("fail", "datasets", _in_one_line(error), remedy)
        if finding is None:
            without.append(name)
        else:
            yield finding
    if without:
        level_fine = len(without) < len(names)
        remedy = "`echoshift manifest import --help`, `echoshift demo generate`, or --manifests (ECHOSHIFT_MANIFESTS)"
        message = f"{', '.join(without)}: card, but no manifest"
        yield Finding("ok", "datasets", message) if level_fine else Finding("warn", "datasets", message, remedy)


def _check_dataset(name: str, manifests: Path) -> Finding | None:
    """Look at one dataset; None where it has a card alone."""
    from echoshift.pipeline.cards import read_dataset_card
    from echoshift.pipeline.manifest_csv import locate_manifest, read_manifest

    card = read_dataset_card(name, manifests)
    path = locate_manifest(name, manifests)
    if not path.is_file():
        return None
    n_segments = len(read_manifest(path, card))
    media = manifests.parent / name
    where = f"videos in {media}" if media.is_dir() else f"no folder {media}: name that of the videos with --media"
    return Finding("ok", "datasets", f"{name}: {n_segments:,} segments; {where}")


def _in_one_line(error: EchoshiftError) -> str:
    first, *others = str(error).splitlines()
    return f"{first} (and {len(others)} lines more)" if others else first
