"""What Stage 1's loops ask of whoever gives them pictures, whether decoded anew or read from the cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Protocol

import numpy as np
from torch import Tensor

from echoshift.pipeline.specs import FeatureSpec


@dataclass(frozen=True, slots=True)
class ClipFacts:
    """What the entries of one segment were made from, as a feature store keeps it (FORMAT.md).

    Attributes:
        times_s: seconds that each covers, float64 [n_entries, 2].
        frames: first and last picture, index in the file, int64 [n_entries, 2].
        digest: of the media and the segment's times, uint8 [16].
    """

    times_s: np.ndarray
    frames: np.ndarray
    digest: np.ndarray


class VisualInputs(Protocol):
    """A GatedEncoder's visual inputs by name: `clip`, or the trunk's outputs; float32, on the CPU.

    Several iterations may be under way at a time, each with read-ahead of its own. An iterator that is dropped or
    closed early ends what it started. Use as a context manager, or call `close`.
    """

    def iterate_batches(self, batches: Sequence[Sequence[str]], epoch: int) -> Iterator[dict[str, Tensor]]:
        """Return each batch of segment ids, in order: by name [B, ...], one augmented view a segment.

        What is drawn depends on seed, epoch and segment alone. Tensors are pinned where there is CUDA. Raises
        MediaError or StoreError naming the segment that can't be read.
        """
        ...

    def iterate_clips(
        self, segment_ids: Sequence[str], spec: FeatureSpec
    ) -> Iterator[tuple[str, dict[str, Tensor], ClipFacts]]:
        """Return all entries of each segment, in order: its id, by name [n_entries, ...], and what they are made from.

        Of `spec` only `clip`, `frame` and `decoder` are asked. Raises as `iterate_batches`.
        """
        ...

    def close(self) -> None:
        """End the processes and threads that read ahead."""
        ...

    def __enter__(self) -> VisualInputs: ...

    def __exit__(self, *exc: object) -> None: ...


def derive_epoch_seed(seed: int, epoch: int) -> int:
    """Derive the seed of an epoch's draws from a run's: 48 bits of a hash of both."""
    return int.from_bytes(blake2b(f"{seed}\n{epoch}".encode(), digest_size=6).digest(), "big")
