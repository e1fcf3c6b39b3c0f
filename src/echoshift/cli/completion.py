"""Completion in the shell of the names that commands take; imports nothing that computes.

What can't be read completes to nothing: an error has no place in the middle of a command line.
"""

from __future__ import annotations

import csv
import tomllib
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import typer

from echoshift.pipeline.places import MANIFESTS_DIR, list_card_files

N_SEGMENTS_OFFERED = 200
STAGES = ("stage1", "stage2", "alignment")
_TRAIN = Path(__file__).parent.parent / "train"
_STAGE_OF_COMMAND = {"stage1": ("stage1",), "stage2": ("stage2", "stage1"), "align": ("alignment", "stage1")}

Offers = list[tuple[str, str]]


def complete_dataset(ctx: typer.Context, incomplete: str) -> Offers:
    """Offer the datasets that have a card, with their titles."""
    return _keep_begun(((path.stem, str(_read_toml(path).get("title", ""))) for path in _list_cards(ctx)), incomplete)


def complete_encoders(incomplete: str) -> Offers:
    """Offer encoders for the last word of a list separated by blanks, with their modalities."""
    from echoshift.extract.encoders.registry import list_builtin_encoders
    from echoshift.pipeline.plugins import ENCODER_GROUP, list_plugin_names

    named = [(name, entry.modality) for name, entry in list_builtin_encoders().items()]
    return _complete_last([*named, *((name, "") for name in list_plugin_names(ENCODER_GROUP))], incomplete)


def complete_recipe(incomplete: str) -> Offers:
    """Offer the recipes of `extract --preset`."""
    from echoshift.extract.recipes import PRESETS

    return _keep_begun(((preset.name, preset.summary) for preset in PRESETS.values()), incomplete)


def complete_weights(incomplete: str) -> Offers:
    """Offer the names of the catalogue of weights, with their encoders."""
    from echoshift.extract.weights.catalogue import read_catalogue

    return _keep_begun(((entry.name, entry.encoder) for entry in read_catalogue().values()), incomplete)


def complete_encoder_weights(incomplete: str) -> Offers:
    """Offer ENCODER=NAME of the catalogue of weights."""
    from echoshift.extract.weights.catalogue import read_catalogue

    entries = read_catalogue().values()
    return _keep_begun(((f"{entry.encoder}={entry.name}", entry.licence) for entry in entries), incomplete)


def complete_store(ctx: typer.Context, incomplete: str) -> Offers:
    """Offer the stores below a local cache."""
    cache = Path(str(ctx.params.get("cache") or "cache"))
    paths = sorted(path for ending in ("zarr", "h5") for path in cache.glob(f"*/*.{ending}"))
    return _keep_begun(((str(path), path.parent.name) for path in paths), incomplete)


def complete_segment(ctx: typer.Context, incomplete: str) -> Offers:
    """Offer segments of the manifests, or of the one that --dataset names; 200 at most."""
    dataset = str(ctx.params.get("dataset") or "")
    folder = Path(ctx.params.get("manifests") or MANIFESTS_DIR)
    cards = [card for card in _list_cards(ctx) if dataset in ("", card.stem)]
    ids = ((name, card.stem) for card in cards for name in _iterate_segment_ids(folder / f"{card.stem}.csv"))
    return list(islice((offer for offer in ids if offer[0].startswith(incomplete)), N_SEGMENTS_OFFERED))


def complete_grid(incomplete: str) -> Offers:
    """Offer the grids that come with echoshift, with their titles."""
    return _keep_begun(list_grid_titles(), incomplete)


def complete_preset(ctx: typer.Context, incomplete: str) -> Offers:
    """Offer the presets of the command's stage, or of all stages."""
    stages = _STAGE_OF_COMMAND.get(ctx.info_name or "", STAGES)
    named = ((name, ", ".join(of)) for name, of in list_preset_stages().items() if {*of} & {*stages})
    return _keep_begun(named, incomplete)


def complete_shifts(ctx: typer.Context, incomplete: str) -> Offers:
    """Offer shifts for the last word of a list separated by blanks: of the named dataset, or of all cards."""
    dataset = str(ctx.params.get("dataset") or "")
    cards = [card for card in _list_cards(ctx) if dataset in ("", card.stem)]
    shifts = ((card.stem, shift) for card in cards for shift in _read_toml(card).get("shifts", ()))
    return _complete_last(((f"{'+'.join(s['source'])}-{s['target']}", name) for name, s in shifts), incomplete)


def list_grid_titles() -> list[tuple[str, str]]:
    """List the grids that come with echoshift, with their titles."""
    return sorted((path.stem, str(_read_toml(path).get("title", ""))) for path in (_TRAIN / "grids").glob("*.toml"))


def list_preset_stages() -> dict[str, list[str]]:
    """List the presets of training, each with the stages that have it."""
    found: dict[str, list[str]] = {}
    for stage in STAGES:
        for path in sorted((_TRAIN / stage / "presets").glob("*.toml")):
            found.setdefault(path.stem, []).append(stage)
    return dict(sorted(found.items()))


def _keep_begun(offers: Iterable[tuple[str, str]], incomplete: str) -> Offers:
    return [(name, help_) for name, help_ in offers if name.startswith(incomplete)]


def _complete_last(offers: Iterable[tuple[str, str]], incomplete: str) -> Offers:
    begun, blank, last = incomplete.rpartition(" ")
    kept = _keep_begun(offers, last)
    return [(f"{begun}{blank}{name}", help_) for name, help_ in kept if name not in begun.split()]


def _list_cards(ctx: typer.Context) -> list[Path]:
    return list_card_files(Path(ctx.params.get("manifests") or MANIFESTS_DIR))


def _iterate_segment_ids(manifest: Path) -> Iterator[str]:
    try:
        with manifest.open(encoding="utf-8", newline="") as file:
            yield from (row["segment_id"] for row in csv.DictReader(file) if row.get("segment_id"))
    except (OSError, UnicodeDecodeError, csv.Error):
        return


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError):
        return {}
