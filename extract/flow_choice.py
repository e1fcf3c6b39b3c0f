"""Chooses where flow comes from when the user doesn't say: from u/ and v/ images where there are any, else computed."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from echoshift.extract.media import locate_media
from echoshift.pipeline.cards import DatasetCard
from echoshift.pipeline.errors import MediaNotFoundError
from echoshift.pipeline.segments import Manifest

COMPUTED: Literal["tvl1"] = "tvl1"  # what the published flow networks were trained on


def choose_flow(card: DatasetCard, manifest: Manifest, media_root: Path) -> Literal["images", "tvl1"]:
    """Return `images` if any segment's video has flow images below the media root, else the method of computing it.

    A video that lacks its images where others have them fails with that reason: flow from two sources would make
    features that can't be compared.
    """
    seen: set[tuple[str, str, str]] = set()
    for segment in manifest:
        video = (segment.video_id, segment.domain, segment.split)
        if video in seen:
            continue
        seen.add(video)
        try:
            locate_media(media_root, card.media, segment, "flow")
        except MediaNotFoundError:
            continue
        return "images"
    return COMPUTED
