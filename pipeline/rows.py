"""Orders segments into rows and computes the digest that says what a row was made from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from echoshift.pipeline.segments import Segment
from echoshift.pipeline.store.layout import N_DIGEST_BYTES

NO_MEDIA = "no media"


def order_segments(segments: Iterable[Segment]) -> list[Segment]:
    """Order segments by video and time, so that a shard reads stretches of video front to back."""
    return sorted(segments, key=lambda s: (s.video_id, s.start_s, s.stop_s, s.segment_id))


def plan_new_rows(known_ids: Sequence[str], segments: Iterable[Segment]) -> list[str]:
    """List, in row order, the ids of segments that a store with `known_ids` doesn't have yet."""
    known = set(known_ids)
    return [s.segment_id for s in order_segments(segments) if s.segment_id not in known]


def compute_digest(media_identity: str, start_s: float, stop_s: float) -> bytes:
    """Hash the identity of a video's content and a segment's times to 16 bytes (blake2b)."""
    text = f"{media_identity}\n{start_s!r}\n{stop_s!r}"
    return hashlib.blake2b(text.encode(), digest_size=N_DIGEST_BYTES).digest()


def compute_digests(segments: Sequence[Segment | None], identities: Mapping[str, str]) -> np.ndarray:
    """Compute the expected digests of rows, uint8 [row, 16]; zeros where a row has no segment in the manifest.

    `identities` maps a segment's id to its media's identity; NO_MEDIA stands for media that aren't there, so that a row
    turns stale when they appear.
    """
    nothing = bytes(N_DIGEST_BYTES)
    packed = b"".join(
        nothing if s is None else compute_digest(identities[s.segment_id], s.start_s, s.stop_s) for s in segments
    )
    return np.frombuffer(packed, dtype=np.uint8).reshape(len(segments), N_DIGEST_BYTES).copy()
