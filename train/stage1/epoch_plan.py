"""Plans which segments make up the batches of an epoch, from seed and epoch alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from train.stage1.config import TrainingConfig

_SOURCE, _LABELLED, _TARGET = range(3)


@dataclass(frozen=True, slots=True)
class PlannedBatch:
    """Is the rows of one batch, or of one part of it: of the source, the target's labelled part, and its unlabelled.

    `share` is the part's share of its batch; the shares of a batch's parts add up to 1.
    """

    source: np.ndarray
    labelled: np.ndarray
    target: np.ndarray
    share: float = 1.0

    def split(self, n_parts: int) -> list[PlannedBatch]:
        """Cuts a batch into parts that are computed one after the other, each with something of the source."""
        n_parts = min(n_parts, len(self.source))
        cut = [np.array_split(rows, n_parts) for rows in (self.source, self.labelled, self.target)]
        return [
            PlannedBatch(source, labelled, target, len(source) / len(self.source))
            for source, labelled, target in zip(*cut, strict=True)
        ]

    def take_share(self, rank: int, n_ranks: int) -> PlannedBatch:
        """Gives what one of several processes computes of a batch."""
        return PlannedBatch(
            self.source[rank::n_ranks], self.labelled[rank::n_ranks], self.target[rank::n_ranks], self.share
        )


def plan_epoch(
    n_source: int, n_labelled: int, n_target: int, config: TrainingConfig, *, seed: int, epoch: int
) -> list[PlannedBatch]:
    """Plans an epoch: every batch has n_source segments of the source, in a new order; what fills no batch is left out.

    The target's segments come from an endless row of shuffles, in which an epoch goes on where the one before stopped,
    so that all of them are seen equally often (the released code begins anew each epoch and never sees most of them;
    METHODS 9). A source smaller than a batch is one batch.
    """
    order = _shuffle(n_source, seed, epoch, _SOURCE)
    size = min(config.n_source, n_source)
    n_batches = n_source // size
    labelled_size = min(config.n_labelled, n_labelled)
    target_size = min(config.n_target, n_target)
    return [
        PlannedBatch(
            order[i * size : (i + 1) * size],
            _take_from_row(n_labelled, (epoch * n_batches + i) * labelled_size, labelled_size, seed, _LABELLED),
            _take_from_row(n_target, (epoch * n_batches + i) * target_size, target_size, seed, _TARGET),
        )
        for i in range(n_batches)
    ]


def _take_from_row(n: int, start: int, size: int, seed: int, what: int) -> np.ndarray:
    """Takes `size` rows from an endless row of shuffles of n."""
    if not size:
        return np.zeros(0, dtype=np.int64)
    rounds = range(start // n, (start + size - 1) // n + 1)
    row = np.concatenate([_shuffle(n, seed, r, what) for r in rounds])
    return row[start % n : start % n + size]


def _shuffle(n: int, seed: int, number: int, what: int) -> np.ndarray:
    return np.random.default_rng([seed, number, what]).permutation(n)
