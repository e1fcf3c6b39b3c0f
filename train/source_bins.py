"""How often the source shows what a test segment shows: the rare and frequent bins of A's Fig. 4."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal

import numpy as np

from echoshift.train.splits import LabelledSegments, count_labels

# A, section 5.1: rare are 0-1 and 2-10 instances in the source, frequent are those with more than 10.
BIN_NAMES = ("0-1", "2-10", "over 10")
BIN_STARTS = (2, 11)
N_RARE_BINS = 2
NO_BIN = -1


@dataclass(frozen=True, slots=True)
class SourceBins:
    """The bin of each test segment, or, where the task is multi-label, of each class.

    Attributes:
        by: what was counted in the source: `pair` (class and noun) or `class`.
        index: into BIN_NAMES, int64 [n] (multi-label: [K]); NO_BIN where nothing can be counted.
    """

    by: Literal["pair", "class"]
    index: np.ndarray


def bin_by_source(source: LabelledSegments, test: LabelledSegments, n_classes: int) -> SourceBins:
    """Bin test segments by how many of the source's train segments show the same (A, Fig. 4).

    Single-label: the same pair of class and noun (EPIC: verb and noun) where both splits have nouns; a test segment
    without a noun is then in no bin, and a source segment without one counts for none. Where either split has no nouns
    at all, it is the same class. Multi-label: classes are binned, by the number of source segments that have them.
    """
    if test.labels.ndim == 2:
        return SourceBins("class", _find_bins(count_labels(source.labels, n_classes)))
    source_nouns, test_nouns = ([segment.noun for segment in part.segments] for part in (source, test))
    if not any(source_nouns) or not any(test_nouns):
        return SourceBins("class", _find_bins(count_labels(source.labels, n_classes))[test.labels])
    seen = Counter(zip(source.labels.tolist(), source_nouns, strict=True))
    counts = np.array([seen[pair] for pair in zip(test.labels.tolist(), test_nouns, strict=True)], dtype=np.int64)
    has_noun = np.array([bool(noun) for noun in test_nouns])
    return SourceBins("pair", np.where(has_noun, _find_bins(counts), NO_BIN))


def _find_bins(counts: np.ndarray) -> np.ndarray:
    return np.digitize(counts, BIN_STARTS).astype(np.int64)
