"""Watchers, which are told how far work has come."""

from __future__ import annotations

from typing import Protocol


class EpochWatcher(Protocol):
    """Told how training goes: a progress bar, or nothing."""

    def start(self, what: str, n_total: int) -> None:
        """Begin a stretch of n_total steps."""
        ...

    def advance(self, n: int = 1, note: str = "") -> None:
        """Count steps done; `note` is how they went, to be said beside their number and not in a line of its own."""
        ...

    def describe(self, what: str) -> None:
        """Describe at once how it goes, in place of what the stretch was begun as."""
        ...


class SilentWatcher:
    """A watcher that shows nothing, for what runs inside something that is watched."""

    def start(self, what: str, n_total: int) -> None:
        """Show nothing."""

    def advance(self, n: int = 1, note: str = "") -> None:
        """Show nothing."""

    def describe(self, what: str) -> None:
        """Show nothing."""
