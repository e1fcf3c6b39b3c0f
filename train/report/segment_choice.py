"""Chooses the segments that a page shows: few of each domain's split, the same ones whenever it is made."""

from __future__ import annotations

import difflib
import hashlib
from collections import Counter
from collections.abc import Sequence

from echoshift.pipeline.errors import RunError
from echoshift.pipeline.segments import Manifest, Segment


def choose_segments(manifest: Manifest, n_per_split: int, named: Sequence[str] = ()) -> list[Segment]:
    """Choose up to `n_per_split` segments of each domain's split, and those that are named, in the manifest's order.

    Within a split one of each class comes before a second of any (by a segment's first label); among equals the hash of
    the id decides, so that the choice depends neither on the order of the file nor on chance. Raises RunError for a
    named segment that the manifest lacks.
    """
    known = {segment.segment_id for segment in manifest}
    for segment_id in named:
        if segment_id not in known:
            near = difflib.get_close_matches(segment_id, known, n=3)
            hint = f"; did you mean {', '.join(near)}?" if near else ""
            raise RunError(f"the manifest of {manifest.dataset} has no segment {segment_id!r}{hint}")
    chosen = set(named)
    seen: Counter[tuple[str, str, str]] = Counter()
    ranked: dict[tuple[str, str], list[tuple[int, str, str]]] = {}
    for segment in sorted(manifest, key=_draw):
        label = segment.labels[0] if segment.labels else ""
        group = (segment.domain, segment.split, label)
        ranked.setdefault(group[:2], []).append((seen[group], _draw(segment), segment.segment_id))
        seen[group] += 1
    for members in ranked.values():
        chosen |= {segment_id for _, _, segment_id in sorted(members)[:n_per_split]}
    return [segment for segment in manifest if segment.segment_id in chosen]


def _draw(segment: Segment) -> str:
    return hashlib.blake2b(segment.segment_id.encode(), digest_size=8).hexdigest()
