"""How a run goes about its work: nothing here changes what a feature is or has a part in a fingerprint."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RunOptions:
    """What a run decides about machine and patience.

    Attributes:
        device: auto, cpu, cuda or cuda:n.
        n_clips_per_batch: how many clips go through a network at once, None for the device's own number; a batch never
            leaves its shard.
        n_readers: threads that read media, each a segment at a time, None for the device's own number.
        segment_timeout_s: how long reading may take between two of a segment's inputs before the segment fails.
    """

    device: str = "auto"
    n_clips_per_batch: int | None = None
    n_readers: int | None = None
    segment_timeout_s: float = 300.0
