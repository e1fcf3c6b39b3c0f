"""Plans which segments make up the batches of an epoch, from seed and epoch alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

SOURCE, LABELLED, TARGET = range(3)

Order = Callable[[int, int, int, int], np.ndarray]  # n, seed, number of the round, what


class BatchSizes(Protocol):
    """How many segments of the source, the target and its labelled part make up a batch."""

    @property
    def n_source(self) -> int:
        """How many of the source."""
        ...

    @property
    def n_target(self) -> int:
        """How many of the target's unlabelled part."""
        ...

    @property
    def n_labelled(self) -> int:
        """How many of the target's labelled part."""
        ...


@dataclass(frozen=True, slots=True)
class PlannedBatch:
    """The rows of one batch, or of one part of it: of the source, the target's labelled part, and its unlabelled.

    `shares` are what the mean loss of each of the three is multiplied by. Over the parts of a batch that are computed
    one after the other they add up to 1, over processes, whose gradients are averaged, they average 1: either way the
    gradient is that of the whole batch, however unevenly it is cut.
    """

    source: np.ndarray
    labelled: np.ndarray
    target: np.ndarray
    shares: tuple[float, float, float] = (1.0, 1.0, 1.0)

    @property
    def rows(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The three in the order of `shares`."""
        return self.source, self.labelled, self.target

    def split(self, n_parts: int) -> list[PlannedBatch]:
        """Cut a batch into parts that are computed one after the other, each with something of the source."""
        n_parts = min(n_parts, len(self.source))
        cut = zip(*(np.array_split(rows, n_parts) for rows in self.rows), strict=True)
        return [self._make_part(*rows, n_averaged=1) for rows in cut]

    def take_share(self, rank: int, n_ranks: int) -> PlannedBatch:
        """Return what one of several processes computes of a batch."""
        return self._make_part(*(rows[rank::n_ranks] for rows in self.rows), n_averaged=n_ranks)

    def _make_part(
        self, source: np.ndarray, labelled: np.ndarray, target: np.ndarray, *, n_averaged: int
    ) -> PlannedBatch:
        of_source, of_labelled, of_target = (
            share * n_averaged * len(part) / len(whole) if len(whole) else share
            for share, part, whole in zip(self.shares, (source, labelled, target), self.rows, strict=True)
        )
        return PlannedBatch(source, labelled, target, (of_source, of_labelled, of_target))


def plan_epoch(
    n_source: int,
    n_labelled: int,
    n_target: int,
    sizes: BatchSizes,
    *,
    seed: int,
    epoch: int,
    order: Order | None = None,
) -> list[PlannedBatch]:
    """Plan an epoch: every batch has n_source segments of the source, in a new order; what fills no batch is left out.

    The target's segments come from an endless row of shuffles, in which an epoch goes on where the one before stopped,
    so that all of them are seen equally often (the released code begins again each epoch and never sees most of them;
    METHODS 9). A source smaller than a batch is one batch. `order` takes the place of `shuffle`.
    """
    order = order or shuffle
    of_source = order(n_source, seed, epoch, SOURCE)
    size = min(sizes.n_source, n_source)
    n_batches = n_source // size
    labelled_size = min(sizes.n_labelled, n_labelled)
    target_size = min(sizes.n_target, n_target)
    return [
        PlannedBatch(
            of_source[i * size : (i + 1) * size],
            _take_from_row(n_labelled, (epoch * n_batches + i) * labelled_size, labelled_size, seed, LABELLED, order),
            _take_from_row(n_target, (epoch * n_batches + i) * target_size, target_size, seed, TARGET, order),
        )
        for i in range(n_batches)
    ]


def _take_from_row(n: int, start: int, size: int, seed: int, what: int, order: Order) -> np.ndarray:
    """Take `size` rows from an endless row of shuffles of n."""
    if not size:
        return np.zeros(0, dtype=np.int64)
    rounds = range(start // n, (start + size - 1) // n + 1)
    row = np.concatenate([order(n, seed, r, what) for r in rounds])
    return row[start % n : start % n + size].copy()  # a view would keep the whole shuffle


def shuffle(n: int, seed: int, number: int, what: int) -> np.ndarray:
    """Shuffle n rows, int64 [n]; seed, number of the round and what is shuffled decide the order."""
    return np.random.default_rng([seed, number, what]).permutation(n)
