"""Completes in the shell what names datasets, encoders, recipes, weights, stores, segments and settings of extraction.

A shell waits for each of these, so none imports what computes; what can't be read completes to nothing, as an error
has no place in the middle of a command line.
"""

from __future__ import annotations

import csv
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from echoshift.pipeline.places import MANIFESTS_DIR, list_card_files

if TYPE_CHECKING:
    from echoshift.cli.setting_keys import SettingKey

N_SEGMENTS_OFFERED = 200

Offers = list[tuple[str, str]]


def complete_dataset(ctx: typer.Context, incomplete: str) -> Offers:
    """Offer the datasets that have a card, with their titles."""
    return keep_begun(((path.stem, _read_title(path)) for path in _list_card_files(ctx)), incomplete)


def complete_encoders(incomplete: str) -> Offers:
    """Offer encoders for the last word of a list separated by blanks, with their modalities."""
    from echoshift.extract.encoders.registry import list_builtin_encoders
    from echoshift.pipeline.plugins import ENCODER_GROUP, list_plugin_names

    begun, blank, last = incomplete.rpartition(" ")
    offered = keep_begun(
        [
            *((name, entry.modality) for name, entry in list_builtin_encoders().items()),
            *((name, "") for name in list_plugin_names(ENCODER_GROUP)),
        ],
        last,
    )
    return [(f"{begun}{blank}{name}", help_) for name, help_ in offered if name not in begun.split()]


def complete_recipe(incomplete: str) -> Offers:
    """Offer the recipes of `extract --preset`."""
    from echoshift.extract.recipes import PRESETS

    return keep_begun(((preset.name, preset.summary) for preset in PRESETS.values()), incomplete)


def complete_weights(incomplete: str) -> Offers:
    """Offer the names of the catalogue of weights, with their encoders."""
    from echoshift.extract.weights.catalogue import read_catalogue

    return keep_begun(((entry.name, entry.encoder) for entry in read_catalogue().values()), incomplete)


def complete_encoder_weights(incomplete: str) -> Offers:
    """Offer ENCODER=NAME of the catalogue of weights."""
    from echoshift.extract.weights.catalogue import read_catalogue

    entries = read_catalogue().values()
    return keep_begun(((f"{entry.encoder}={entry.name}", entry.licence) for entry in entries), incomplete)


def complete_store(ctx: typer.Context, incomplete: str) -> Offers:
    """Offer the stores below a local cache."""
    cache = Path(str(ctx.params.get("cache") or "cache"))
    paths = sorted(path for ending in ("zarr", "h5") for path in cache.glob(f"*/*.{ending}"))
    return keep_begun(((str(path), path.parent.name) for path in paths), incomplete)


def complete_segment(ctx: typer.Context, incomplete: str) -> Offers:
    """Offer segments of the manifests, or of the one that --dataset names; 200 at most."""
    dataset = str(ctx.params.get("dataset") or "")
    offers: Offers = []
    for card in _list_card_files(ctx):
        if dataset in ("", card.stem):
            ids = (name for name in _iterate_segment_ids(card.with_suffix(".csv")) if name.startswith(incomplete))
            for name in ids:
                offers.append((name, card.stem))
                if len(offers) == N_SEGMENTS_OFFERED:
                    return offers
    return offers


def complete_spec_setting(incomplete: str) -> Offers:
    """Offer the keys of `extract --set`, and what a key may be once `=` is there."""
    return offer_settings(list_spec_settings(), incomplete)


def list_spec_settings() -> list[SettingKey]:
    """List the settings of preprocessing: every field of clip, frame and audio."""
    from echoshift.cli.setting_keys import list_setting_keys
    from echoshift.pipeline.specs import AudioSpec, ClipSpec, FrameSpec

    parts = (("clip", ClipSpec), ("frame", FrameSpec), ("audio", AudioSpec))
    return [key for name, model in parts for key in list_setting_keys(model, f"{name}.")]


def offer_settings(keys: Sequence[SettingKey], incomplete: str) -> Offers:
    """Offer `KEY=` for each key that begins so, and `KEY=VALUE` where the key is whole and its values are few."""
    name, equals, value = incomplete.partition("=")
    if equals:
        choices = next((key.choices for key in keys if key.key == name), ())
        return offer_values(name, ((choice, "") for choice in choices), value)
    return keep_begun(((f"{key.key}=", key.kind) for key in keys), incomplete)


def offer_values(name: str, values: Iterable[tuple[str, str]], incomplete: str) -> Offers:
    """Offer NAME=VALUE for the values that begin as what is typed behind the `=`."""
    return [(f"{name}={value}", help_) for value, help_ in keep_begun(values, incomplete)]


def keep_begun(offers: Iterable[tuple[str, str]], incomplete: str) -> Offers:
    """Keep the offers that begin as what is typed."""
    return [(name, help_) for name, help_ in offers if name.startswith(incomplete)]


def _list_card_files(ctx: typer.Context) -> list[Path]:
    return list_card_files(Path(ctx.params.get("manifests") or MANIFESTS_DIR))


def _read_title(card: Path) -> str:
    try:
        return str(tomllib.loads(card.read_text(encoding="utf-8")).get("title", ""))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError):
        return ""


def _iterate_segment_ids(manifest: Path) -> Iterator[str]:
    try:
        with manifest.open(encoding="utf-8", newline="") as file:
            yield from (row["segment_id"] for row in csv.DictReader(file) if row.get("segment_id"))
    except (OSError, UnicodeDecodeError, csv.Error):
        return
