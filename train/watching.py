"""Defines who is told how long work goes."""

from __future__ import annotations

from typing import Protocol


class EpochWatcher(Protocol):
    """Is told how training goes."""

    def start(self, what: str, n_total: int) -> None:
        """Begins a stretch of n_total steps."""
        ...

    def advance(self, n: int = 1) -> None:
        """Counts steps done."""
        ...

    def describe(self, what: str) -> None:
        """Says how it goes."""
        ...


class SilentWatcher:
    """Says nothing, for what runs inside something that is watched."""

    def start(self, what: str, n_total: int) -> None:
        """Says nothing."""

    def advance(self, n: int = 1) -> None:
        """Says nothing."""

    def describe(self, what: str) -> None:
        """Says nothing."""
