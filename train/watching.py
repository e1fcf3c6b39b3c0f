"""Defines who is told how long work goes."""

from __future__ import annotations

from typing import Protocol


class EpochWatcher(Protocol):
    """Is told how training goes."""

    def start(self, what: str, n_total: int) -> None:
        """Begins a stretch of n_total steps."""
        ...

    def advance(self, n: int = 1, note: str = "") -> None:
        """Counts steps done; `note` is how they went, to be said beside their number and not in a line of its own."""
        ...

    def describe(self, what: str) -> None:
        """Says at once how it goes, in place of what the stretch was begun as."""
        ...


class SilentWatcher:
    """Says nothing, for what runs inside something that is watched."""

    def start(self, what: str, n_total: int) -> None:
        """Says nothing."""

    def advance(self, n: int = 1, note: str = "") -> None:
        """Says nothing."""

    def describe(self, what: str) -> None:
        """Says nothing."""
