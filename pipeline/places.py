"""Says where what belongs to the checkout lies; imports nothing, as every command and shell completion reads it."""

from __future__ import annotations

from pathlib import Path

MANIFESTS_DIR = Path(__file__).resolve().parent.parent / "data" / "manifests"


def list_cards(manifests_dir: Path = MANIFESTS_DIR) -> list[str]:
    """Lists the names of the datasets that have a card in a folder; [] where there is no such folder."""
    return sorted(path.stem for path in manifests_dir.glob("*.toml"))
