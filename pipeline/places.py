"""Where cards and manifests lie; imports nothing heavy, as every command and shell completion reads it."""

from __future__ import annotations

from pathlib import Path

MANIFESTS_DIR = Path("data/manifests")
"""The user's own cards and manifests, in the working folder."""
CARDS_DIR = Path(__file__).parent.parent / "cards"
"""The cards that come with echoshift."""


def locate_card(dataset: str, manifests_dir: Path = MANIFESTS_DIR) -> Path:
    """Locate a dataset's card: in `manifests_dir`, else among those that come with echoshift."""
    own, shipped = (folder / f"{dataset}.toml" for folder in (manifests_dir, CARDS_DIR))
    return shipped if shipped.is_file() and not own.is_file() else own


def list_card_files(manifests_dir: Path = MANIFESTS_DIR) -> list[Path]:
    """List the cards of a folder and those that come with echoshift, one a name, sorted by it."""
    names = {path.stem for folder in (manifests_dir, CARDS_DIR) for path in folder.glob("*.toml")}
    return [locate_card(name, manifests_dir) for name in sorted(names)]


def list_cards(manifests_dir: Path = MANIFESTS_DIR) -> list[str]:
    """List the names of the datasets that have a card (`list_card_files`)."""
    return [path.stem for path in list_card_files(manifests_dir)]
